"""Seconds of compiling, as Triton tells them: those of this time only, and others that listen hear them too."""

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


def test_a_real_compilation_tells(tmp_path):
    """In a process of its own: where the interpreter has run a kernel, Triton's language stays what it made of it."""
    script = tmp_path / "compile.py"
    script.write_text(REAL)
    places = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    told = subprocess.run([sys.executable, script], env={**os.environ, **places}, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    first, again = map(float, told.stdout.split())
    assert first > 0.0
    assert again == 0.0
