"""What the module of `expand` computes with, watched from a forward to its backward, which expands again."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class WatchedModule:
    """Parameters and buffers of a module, as they are at a call.

    They are not saved for the backward: hooks on saved tensors would move them about. Their versions tell of changes in
    place, as autograd sees them: not of what is done to `x.data`, nor of what FSDP gathers into it.

    Args:
        module: what `expand` is, or is a method of.
        whole: `expand` is the module. Of a method's owner, such as a whole layer, nobody knows what the method reads:
            only changes of its parameters are told then, as other parts may write to buffers, and FSDP gathers parts
            one after the other.
    """

    def __init__(self, module: nn.Module, *, whole: bool) -> None:
        self._module = module
        parameters: dict[str, Tensor] = dict(module.named_parameters())
        self._parameters = parameters if whole else {}
        tensors = {**parameters, **dict(module.named_buffers())} if whole else parameters
        self._versions = {name: (x, _version(x)) for name, x in tensors.items()}

    def forward_ended(self) -> None:
        """What the module changed itself in the forward (an embedding's max_norm, running means) it may change again:
        it is watched no longer."""
        self._versions = {name: (x, was) for name, (x, was) in self._versions.items() if _version(x) == was}

    def problem(self) -> str | None:
        """What is not as it was, or None."""
        kind = type(self._module).__name__
        now = dict(self._module.named_parameters())
        for name, x in self._parameters.items():
            if now.get(name) is not x:
                return (
                    f"{name} of {kind}, the module of expand, is another parameter than in the forward, where "
                    "something put its own in its place (torch.func.functional_call does)"
                )
        for name, (tensor, was) in self._versions.items():
            if _version(tensor) != was:
                return (
                    f"{name} of {kind}, the module of expand, of shape {tuple(tensor.shape)}, has been changed in "
                    f"place since the forward (it is at version {_version(tensor)}, expected {was})"
                )
        return None


def _version(x: Tensor) -> int:
    return 0 if is_lazy(x) or x.is_inference() else x._version
