"""Plant each mutant in a copy of the tree and show that the tests notice: `make mutants`, WORKERS=2 of them at a time.

Exit status 1 where a mutant survives, or where its tests fail without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutants.mutants import MUTANTS, Mutant  # noqa: E402


def copy_tree(target: Path) -> None:
    """Copy what the tests need."""
    for name in ("lss", "tests", "configs"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", target)


def run_tests(tree: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """(whether all pass, the first test that failed or pytest's last line) in this tree."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "--tb=no", "-rf", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run {' '.join(tests)}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = done.stdout.strip().splitlines() or [""]
    failed = [line.removeprefix("FAILED ").split(" - ")[0] for line in lines if line.startswith("FAILED ")]
    return done.returncode == 0, failed[0] if failed else lines[-1]


def plant(tree: Path, mutant: Mutant) -> None:
    """Replace the mutant's line, which must stand exactly once."""
    path = tree / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: its place in {mutant.file} is found {source.count(mutant.old)} times, not once")
    path.write_text(source.replace(mutant.old, mutant.new))


def survives(folder: Path, mutant: Mutant) -> bool:
    """Whether the tests pass with this mutant planted; says so."""
    tree, started = folder / f"mutant_{MUTANTS.index(mutant)}", time.monotonic()
    copy_tree(tree)
    plant(tree, mutant)
    survived, summary = run_tests(tree, mutant.tests)
    shutil.rmtree(tree)
    word = "SURVIVED" if survived else "caught"
    print(f"{word:9} {mutant.name} ({time.monotonic() - started:.0f} s) {summary}", flush=True)
    return survived


def main(wanted: list[str]) -> int:
    """Run the mutants whose name contains one of the words given, or all."""
    mutants = [m for m in MUTANTS if not wanted or any(word in m.name for word in wanted)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(int(os.environ.get("WORKERS", "2"))) as workers:
        clean = Path(folder) / "clean"
        copy_tree(clean)
        every_test = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        passed, summary = run_tests(clean, every_test)
        print(f"{'pass' if passed else 'FAIL':9} without any mutant: {summary}", flush=True)
        if not passed:
            return 1
        survivors = sum(workers.map(partial(survives, Path(folder)), mutants))
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
