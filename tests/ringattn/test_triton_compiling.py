"""Seconds of compiling, as Triton tells them: those of this time only, and others that listen hear them too."""

from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from ringattn.triton_compiling import compiling  # noqa: E402


def add_one(X, n):
    at = tl.program_id(0)
    if at < n:
        tl.store(X + at, tl.load(X + at) + 1.0)


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


def test_a_real_compilation_tells(monkeypatch, tmp_path):
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    # not `triton.jit`, which makes something else of it where the interpreter is in use
    source = ASTSource(fn=JITFunction(add_one), signature={"X": "*fp32", "n": "i32"})
    found = []
    for _ in range(2):
        with compiling() as took:
            triton.compile(source, target=GPUTarget("cuda", 90, 32))
        found.append(took.seconds)
    assert found[0] > 0.0
    assert found[1] == 0.0
