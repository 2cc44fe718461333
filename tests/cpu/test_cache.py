"""Compiled code and the folder that keeps it: what importing does, what a start does."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
IMPORTING = """
import importlib, json, os, sys
from pathlib import Path

before = dict(os.environ)
for source in sorted(Path("llamacli").rglob("*.py")):
    name = ".".join(source.with_suffix("").parts)
    if not name.endswith("__main__") and name not in ("llamacli.bench.peer", "llamacli.bench.plot"):
        importlib.import_module(name.removesuffix(".__init__"))
import llvmlite.binding as llvm
from llamacli.cpu.kernels.jit import loader
try:
    llvm.Target.from_default_triple()
    ready = True
except RuntimeError:
    ready = False
print(json.dumps([before == dict(os.environ), ready, loader.chosen_target.cache_info().currsize]))
"""


def test_importing_makes_no_folder_sets_no_variable_and_starts_no_compiler(tmp_path):
    env = {**os.environ, "LLAMACLI_CACHE": str(tmp_path / "kernels"), "LLAMACLI_SIMD": "no such variant"}
    done = subprocess.run([sys.executable, "-c", IMPORTING], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unchanged, compiler_ready, variants_chosen = json.loads(done.stdout)
    assert unchanged
    assert not compiler_ready
    assert variants_chosen == 0
    assert list(tmp_path.iterdir()) == []
