"""GPU kernels as text: an argument that nothing reads is passed, and may be compiled for, in vain."""

import ast
from pathlib import Path

import pytest

import ringattn

ROOT = Path(ringattn.__file__).parent
FILES = [path for path in sorted(ROOT.rglob("*.py")) if "@triton.jit" in path.read_text()]


def kernels(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(x) for x in node.decorator_list):
            yield node


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_kernels_read_all_their_arguments(path):
    found = list(kernels(path))
    assert found
    for kernel in found:
        read = {node.id for statement in kernel.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
        assert [argument.arg for argument in kernel.args.args if argument.arg not in read] == [], kernel.name
