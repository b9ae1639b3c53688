"""Imports go one way, heavy packages sit where they belong, and importing has no effects."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ("ringattn", "model", "launch", "tools")
HEAVY = {
    "deepspeed": {"launch/engine/zero.py", "launch/engine/zero_shards.py"},
    "datasets": {"launch/data"},
    "tokenizers": {"launch/data"},
    "transformers": {"launch/data", "tools/bench/rival_step.py"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def files():
    return [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def violations(path, names):
    here = path.relative_to(ROOT).as_posix()
    layer = LAYERS.index(here.split("/")[0])
    for name in names:
        top = name.split(".")[0]
        if top in LAYERS and LAYERS.index(top) > layer:
            yield f"{here} imports {name}: {LAYERS[layer]} must not know {top}"
        if top in HEAVY and not any(here == place or here.startswith(f"{place}/") for place in HEAVY[top]):
            yield f"{here} imports {name}: only {sorted(HEAVY[top])} may"
        if top == "tests":
            yield f"{here} imports {name}"


def test_imports_go_one_way():
    assert [line for path in files() for line in violations(path, imports(path))] == []


def test_the_check_can_fail():
    ring, trainer = ROOT / "ringattn/ring.py", ROOT / "launch/trainer.py"
    assert list(violations(ring, ["launch.trainer"]))
    assert list(violations(trainer, ["deepspeed"]))
    assert not list(violations(trainer, ["ringattn", "model.decoder"]))


def test_the_library_needs_torch_and_einops_only():
    allowed = {"torch", "einops", "ringattn", *sys.stdlib_module_names}
    files = (ROOT / "ringattn").rglob("*.py")
    # GPU kernels need triton, which CUDA builds of torch bring along; nothing else may import those files at its top.
    names = {name.split(".")[0] for path in files if not path.name.startswith("triton_") for name in imports(path)}
    assert names <= allowed


def test_configuration_loads_no_torch():
    code = (
        "import importlib, sys\n"
        "for name in ('launch.cli', 'launch.config_load', 'launch.errors', 'model.presets'):\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_importing_ringattn_starts_nothing_and_loads_no_triton_kernel():
    code = (
        "import os, sys, threading; before = dict(os.environ), threading.active_count()\n"
        "import ringattn\n"
        "assert not [name for name in sys.modules if name.startswith('ringattn') and 'triton' in name]\n"
        "import torch.distributed as dist\n"
        "assert (dict(os.environ), threading.active_count()) == before\n"
        "assert not dist.is_initialized()"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
