"""No load path can run code: what Python can be told to execute is not in the library, its benchmarks or its examples."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("lss", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
# a function by its own name, however its module was imported
CALLS = {"eval", "exec", "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list",
         "send_object_list", "recv_object_list"}  # fmt: skip
METHODS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "torch.load", "torch.save"}
# a value of these other than the one that is safe is refused, and so is one that is computed
KEYWORDS = {"weights_only": True, "shell": False, "allow_pickle": False}


def findings(source: str) -> list[str]:
    """What the lint refuses in a source, as `line: what`."""
    tree = ast.parse(source)
    names = {}  # a name in this file -> what it was imported as
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                      for alias in node.names}  # fmt: skip
            found += [f"{node.lineno}: {a.name}" for a in node.names if a.name.split(".")[0] in MODULES]
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [f"{node.lineno}: {node.module}"] if (node.module or "").split(".")[0] in MODULES else []
            found += [f"{node.lineno}: {a.name}" for a in node.names if a.name in CALLS | MODULES]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):  # a call, or the function handed on
            full = ast.unparse(node)
            first, dot, rest = full.partition(".")
            full = names.get(first, first) + dot + rest
            last = full.rsplit(".", 1)[-1]
            own = isinstance(node, ast.Name) or last not in ("eval", "exec")  # model.eval() is another matter
            if full in METHODS or (last in CALLS and own) or (isinstance(node, ast.Name) and names.get(first) in METHODS):
                found.append(f"{node.lineno}: {full}")
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                safe = KEYWORDS.get(keyword.arg or "")
                given = keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
                if safe is not None and given is not safe:
                    found.append(f"{node.lineno}: {keyword.arg}")
            full = ast.unparse(node.func)
            if full == "__import__" or (full in ("import_module", "importlib.import_module") and node.args
                                        and isinstance(node.args[0], ast.Constant)
                                        and str(node.args[0].value).split(".")[0] in MODULES):  # fmt: skip
                found.append(f"{node.lineno}: {full}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_can_load_code_or_start_a_shell(path):
    assert findings(path.read_text()) == []


REFUSED = [
    "import pickle", "import pickle as p", "from pickle import loads", "import _pickle", "import dill", "import marshal",
    "import torch\ntorch.load('x')", "import torch as t\nt.load('x')", "from torch import load\nload('x')",
    "from torch import load as get\nget('x')", "import torch\nf = torch.load", "f(weights_only=False)", "f(weights_only=x)",
    "import subprocess\nsubprocess.run('ls', shell=True)", "f(shell=1)", "f(shell=yes)", "import os\nos.system('ls')",
    "from os import system\nsystem('ls')", "eval('1')", "exec('1')", "g = eval", "import builtins\nx = map(exec, y)",
    "import numpy as np\nnp.load('x', allow_pickle=True)", "f(allow_pickle=not False)",
    "import torch.distributed as dist\ndist.all_gather_object(a, b)", "dist.broadcast_object_list(a)",
    "from torch.distributed import all_gather_object", "__import__('pickle')",
    "import importlib\nimportlib.import_module('pickle')",
]  # fmt: skip
ACCEPTED = [
    "model.eval()", "f(weights_only=True)", "f(shell=False)", "f(allow_pickle=False)", "text = 'import pickle; eval(x)'",
    "# torch.load(x)", "json.load(file)", "from safetensors.torch import load_file\nload_file('x')", "evaluate(model)",
]  # fmt: skip


@pytest.mark.parametrize("source", REFUSED)
def test_the_lint_sees(source):
    assert findings(source)


@pytest.mark.parametrize("source", ACCEPTED)
def test_the_lint_passes_over(source):
    assert findings(source) == []
