"""The house: rows import only from lower rows, and sizes stay small."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LONGEST
from tests.mutants.mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "lss").rglob("*.py"))
MAY_TALK = ("lss/comm/", "lss/launch.py", "lss/meeting.py", "lss/one_host.py", "lss/mesh.py", "lss/parallel/",
            "lss/checkpoint/", "lss/planner/")  # fmt: skip


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_import_contracts_hold():
    tool = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    assert tool, "import-linter is not installed: pip install -e .[test]"
    done = subprocess.run([tool], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_file_is_small_and_documented(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert len(source.splitlines()) <= 400
    if source.strip():
        assert ast.get_docstring(tree), "a module says what it is"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            documented = len(ast.get_docstring(node, clean=False).splitlines()) if ast.get_docstring(node) else 0
            code = node.end_lineno - node.lineno + 1 - documented
            assert code < 60, f"{node.name} has {code} lines"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_has_its_place(mutant):
    """`make mutants` plants them one by one; a line that has changed would leave one out."""
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1


@pytest.mark.parametrize("file", LONGEST)
def test_the_longest_files_are_there(file):
    """One that has another name would be begun last, by one worker, while the other has nothing left to do."""
    assert (ROOT / file).is_file()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_the_named_places_talk_to_torch_distributed(path):
    if name(path).startswith(MAY_TALK):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.distributed", f"line {node.lineno}"
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("torch.distributed") for alias in node.names), f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
            # the type of a mesh is a name that signatures need
            assert [alias.name for alias in node.names] == ["DeviceMesh"], f"line {node.lineno}"
