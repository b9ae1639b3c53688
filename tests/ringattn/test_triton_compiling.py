"""Seconds of compiling, as Triton tells them, and rehearsals, in which kernels are compiled and do nothing."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from triton import knobs

from ringattn.triton_compiling import compiling

ROOT = Path(__file__).parents[2]
REAL = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ringattn.triton_compiling import compiling

@triton.jit
def add_one(X, n):
    at = tl.program_id(0)
    if at < n:
        tl.store(X + at, tl.load(X + at) + 1.0)

for _ in range(2):
    with compiling() as took:
        triton.compile(ASTSource(fn=add_one, signature={"X": "*fp32", "n": "i32"}), target=GPUTarget("cuda", 90, 32))
    print(took.seconds)
"""


REHEARSED = """
import threading
import time
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from ringattn.triton_compiling import compiling, rehearsal, run_kernel

class Hopper:  # a driver without a GPU
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Hopper())

@triton.jit
def add_one(X, n):
    at = tl.program_id(0)
    if at < n:
        tl.store(X + at, tl.load(X + at) + 1.0)

@triton.jit
def cannot(X, n):
    tl.store(X, there_is_no_such_name)

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        assert threading.current_thread() is threading.main_thread()
        run_kernel(add_one, (3,), dy, 3)
        return 2 * dy

x = torch.zeros(3, requires_grad=True)
with compiling() as took:
    began = time.perf_counter()
    with rehearsal(took):
        run_kernel(cannot, (3,), x.detach(), 3)
        for _ in range(2):
            run_kernel(add_one, (3,), x.detach(), 3)
            run_kernel(add_one, (3,), x.detach().double(), 3)
        Twice.apply(x).sum().backward()
    first, whole = took.seconds, time.perf_counter() - began
    with rehearsal(took):
        run_kernel(add_one, (3,), x.detach(), 3)
print(x.tolist(), x.grad.tolist(), len(add_one.device_caches[0][0]), len(cannot.device_caches[0][0]))
print(0.9 * whole < first < whole, took.seconds == first)
try:
    run_kernel(add_one, (3,), x.detach(), 3)
except Exception as error:  # it is launched again
    print("launched")
try:
    run_kernel(cannot, (3,), x.detach(), 3)
except triton.CompilationError:
    print("told")
"""


def tell(seconds, *, cache_hit):
    knobs.compilation.listener(
        src=None, metadata={}, metadata_group={}, times=SimpleNamespace(total=int(seconds * 1e6)), cache_hit=cache_hit
    )


def test_what_is_compiled_counts_and_what_was_on_disk_does_not(monkeypatch):
    heard = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **told: heard.append(told["cache_hit"]))
    with compiling() as found:
        tell(1.5, cache_hit=False)
        tell(0.25, cache_hit=False)
        tell(7.0, cache_hit=True)
    assert found.seconds == 1.75
    tell(3.0, cache_hit=False)
    assert found.seconds == 1.75
    assert heard == [False, False, True, False]


def output(folder, text):
    """In a process of its own: where the interpreter has run a kernel, Triton's language stays what it made of it."""
    script = folder / "compile.py"
    script.write_text(text)
    places = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    told = subprocess.run([sys.executable, script], env={**os.environ, **places}, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_a_real_compilation_tells(tmp_path):
    first, again = map(float, output(tmp_path, REAL).split())
    assert first > 0.0
    assert again == 0.0


def test_a_rehearsal_compiles_what_is_launched_later_and_runs_nothing(tmp_path):
    """Forward and backward, each kind once; what does not compile is told by who launches it."""
    assert output(tmp_path, REHEARSED).splitlines() == [
        "[0.0, 0.0, 0.0] [2.0, 2.0, 2.0] 2 0",
        "True True",
        "launched",
        "told",
    ]
