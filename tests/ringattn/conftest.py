"""Triton's interpreter, without what took half of its time."""

import dataclasses
import inspect
import sys
import types

import pytest

_BUILTINS = {}


def _builtins_to_patch(package):
    """`inspect.getmembers` of a part of triton.language, for the interpreter, which then takes the built-in ones.

    It asks at each call of a function inside a kernel, and the kernel has them all patched by then.
    """
    is_builtin = sys.modules["triton.language"].core.is_builtin
    if package not in _BUILTINS:
        _BUILTINS[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
    members = [(name, getattr(package, name)) for name in _BUILTINS[package]]
    return members if any(is_builtin(member) for _, member in members[:1]) else []


@pytest.fixture(autouse=True)
def quick_interpreter(request, monkeypatch):
    """Slow tests keep the interpreter's check that no 32-bit sum or product of integers overflows."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    quick = types.SimpleNamespace(**{**vars(inspect), "getmembers": _builtins_to_patch})
    monkeypatch.setattr(interpreter, "inspect", quick)
    if request.node.get_closest_marker("slow") is None:
        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
