"""Modules that expand and say something of themselves: how wide values are, and what shapes their launches."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from ringattn.handles import give_handle


class ExpansionModule(nn.Module):
    """A module to be given as `expand` that torch.compile takes as an input: one graph serves all that are alike.

    Any module can be given; others are compiled for one by one. With a `launch_key` it runs in CUDA graphs, too.
    """

    def __init__(self) -> None:
        super().__init__()
        give_handle(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of copies and pickles: they have handles of their own."""
        super().__setstate__(state)
        give_handle(self)

    def value_width(self, v: Tensor) -> int:
        """Dv of the values that it makes of a payload `v`."""
        raise NotImplementedError

    def launch_key(self) -> Hashable | None:
        """What shapes its launches, besides the shapes and dtypes of payload and parameters: sizes, rope, kernel.

        None, as here: they may differ from call to call. What has a key makes keys and values of payload, positions and
        parameters alone, by the same launches whenever shapes are the same, and does not wait for the device. Modules
        of one class with equal keys may then share CUDA graphs. It must be the same on all ranks. A class that
        overrides `forward` only has none, whatever its base says.
        """
        return None


def launch_key(expand: object) -> Hashable | None:
    """What `expand` says of its launches, if the class that says it is the one that computes."""
    if not isinstance(expand, ExpansionModule):
        return None
    saying = next(one for one in type(expand).__mro__ if not {"forward", "launch_key"}.isdisjoint(vars(one)))
    return expand.launch_key() if "launch_key" in vars(saying) else None
