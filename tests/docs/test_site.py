"""The site builds, every link and heading in it is there, and the reference has what `import lss` offers."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

import lss
from tests.test_house import ROOT

needs_mkdocs = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="mkdocs-material and mkdocstrings are not installed: pip install -c constraints.txt -e .[docs]",
)


@needs_mkdocs
def test_it_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api.html").read_text()
    assert [place for place in places() if f'id="{place}"' not in reference] == []
    assert "Collectives" in reference
    for page in ("index.html", "contributing.html", "start/genome.html", "examples/own_model.py"):
        assert (tmp_path / page).is_file()
    assert "not run:" not in (tmp_path / "index.html").read_text()


def places():
    """What the reference shows, by where it stands."""
    return re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)


def test_the_reference_shows_all_that_import_lss_offers_and_it_has_docstrings():
    shown = {place.rpartition(".")[2] for place in places()}
    assert set(lss.__all__) <= shown
    for place in places():
        module, _, name = place.rpartition(".")
        assert getattr(import_module(module), name).__doc__, place
