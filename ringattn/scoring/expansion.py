"""Expansion: what turns a compact payload into keys and values where it is used, and its gradient.

The ring moves `k` and `v` as the caller gave them: few heads, latents, factors. `expand(k, v, positions)` makes the
keys and values of a block out of them on every rank that they visit, and its vector-Jacobian product turns the block's
gradients into compact ones, which travel home. Gradients of its parameters add up on the ranks that did the expanding;
the usual reduction over ranks completes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ringattn.errors import Problem, RingAttnError
from ringattn.kernels import accumulator_dtype
from ringattn.merge import RowSum
from ringattn.plan import Plan
from ringattn.schedule import Stop
from ringattn.scoring.expansion_module import launch_key
from ringattn.scoring.graph_inputs import GraphInputs, computing_with, graph_inputs
from ringattn.scoring.watched import WatchedModule

Expand = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(k [B, S, ...], v [B, S, ...], positions [S]) -> (keys [B, S, G, D], values [B, S, G, Dv])."""


class Visiting:
    """A visiting payload, expanded for a backward: keys, values, and sums of their gradients.

    Attributes:
        keys: [B, n, G, D]; values: [B, n, G, Dv], without a graph.
        sums: take the gradients of keys and values.
        payload_gradients: of the payload, once the context has ended: in the accumulator dtype, or as a kernel gave
            them where nothing was to be added up.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.sums = (RowSum(keys.shape, keys.dtype, keys.device), RowSum(values.shape, values.dtype, values.device))
        self.payload_gradients: tuple[Tensor, ...] = ()


class Expansion:
    """`expand`, or the identity for None, bound to a plan so that it knows the positions of every source.

    Autocast is remembered from where it is made, so that an expansion computes in the backward pass as it did forward.

    Args:
        expand: the caller's function or module, or None.
        plan: gives the positions of a source's tokens.
        device: of the tensors.

    Attributes:
        like: stand-ins, without memory, for the own keys and values, once `own` has seen what they are.
        parameters: of `expand`, those that take gradients.
        parameter_gradients: their sums so far, of the backward that runs.
    """

    def __init__(self, expand: Expand | None, plan: Plan, device: torch.device) -> None:
        self._expand = expand
        self._plan = plan
        self.device = device
        self._autocast = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))
        self._own: tuple[int, tuple[Tensor, Tensor]] | None = None
        self._launch_key = launch_key(expand)
        self.like: tuple[Tensor, ...] = ()
        owner = owner_module(expand)
        self.parameters = () if owner is None else trainable_parameters(owner)
        self.parameter_gradients: list[Tensor | None] = []
        self._watched = None if owner is None else WatchedModule(owner, whole=owner is expand)

    def own(self, rank: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, str | None]:
        """Expand the own payload before any hop, so that a wrong shape is found there; hop 0 uses the result.

        The first time with gradients on, also look for tensors with gradients that it uses but the ring cannot see.
        What has a launch key is expanded for the first call of a kind only: later ones know what comes of it.

        Args:
            rank: the own rank.
            k, v: the own payload.

        Returns:
            Keys, values (without a graph; stand-ins, without memory, if there is a launch key), and a problem or None.
        """
        if self._expand is None:
            return k, v, None
        owner = getattr(self._expand, "__self__", self._expand)  # a bound method is a new object every time
        check = torch.is_grad_enabled() and owner not in self._plan._checked
        kind = self._kind(k, v)
        if kind in self._plan._expanded and not check:
            self.like = self._plan._expanded[kind]
            return *self._plan._expanded[kind], None
        # This graph is looked at and dropped; a checkpoint around the call must not count what it would save.
        with torch.set_grad_enabled(check), self._as_called(), saved_tensors_hooks(_same, _same):
            positions = self._plan.positions(rank, self.device)
            keys, values, problem = expand_checked(self._expand, k.detach(), v.detach(), positions)
        if check and problem is None:
            problem = hidden_problem((keys, values), self.parameters)
        if problem is not None:
            return k, v, problem
        if check:
            self._plan._checked.add(owner)
        self._own = (rank, (keys.detach(), values.detach()))
        if not self.has_launch_key:
            return *self._own[1], None
        self.like = keys, values = _without_memory(keys), _without_memory(values)
        if kind is not None:
            self._plan._expanded[kind] = keys, values
        return keys, values, None

    def own_keys(self, stop: Stop, payload: tuple[Tensor, ...], head: int) -> Tensor:
        """[B, S, D]: the keys of one head of the own payload, whose tokens are those of `stop`; hop 0 uses the rest."""
        expanded = self.forward(stop, payload)
        self._own = (stop.only[0], expanded)
        return expanded[0][:, :, head].clone()  # a view would keep the keys of all heads

    @property
    def has_launch_key(self) -> bool:
        """See `ExpansionModule.launch_key`. The same on all ranks, so what travels may follow from it."""
        return self._launch_key is not None

    def graph_inputs(self) -> GraphInputs | None:
        """The parameters as inputs of a graph; None if a graph cannot stand for what this rank's module does now."""
        if self._launch_key is None:
            return None
        assert isinstance(self._expand, nn.Module)
        given = graph_inputs(self._expand, self.device)
        if given is None or [x.shape for x in given.trained] != [x.shape for x in self.parameters]:
            return None  # other parameters take gradients than at the forward
        return given

    def graph_key(self, given: GraphInputs) -> Hashable:
        """What a graph of this expansion holds for good."""
        return self._launch_key, given.key, self._autocast

    def computing_with(self, given: GraphInputs, tensors: tuple[Tensor, ...], *, backward: bool) -> Expansion:
        """The same with these tensors for parameters, at the beginning of a pass."""
        assert isinstance(self._expand, nn.Module)
        other = copy.copy(self)
        wanted = [x.requires_grad for x in given.tensors]
        if backward:
            tensors = tuple(x.detach().requires_grad_(grad) for x, grad in zip(tensors, wanted, strict=True))
        other._expand = computing_with(self._expand, given, tensors)
        other.parameters = tuple(x for x, grad in zip(tensors, wanted, strict=True) if grad)  # type: ignore[misc]
        other._forget_gradients()
        return other

    def _kind(self, k: Tensor, v: Tensor) -> Hashable | None:
        """What shapes and dtypes of keys and values follow from; None if nobody knows."""
        given = self.graph_inputs()
        if given is None:
            return None
        payload = tuple((x.shape, x.dtype, x.device) for x in (k, v))
        return self.graph_key(given), given.kinds, payload

    def forget_own(self) -> None:
        """Drop what `own` expanded: no forward will use it."""
        self._own = None

    @property
    def plain(self) -> bool:
        """Whether keys and values travel as they are."""
        return self._expand is None

    def forward(self, stop: Stop, held: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens that visit, without a graph."""
        if self._expand is None:
            return held[0], held[1]
        source, columns = stop.only
        if self._own is not None and self._own[0] == source:
            expanded, self._own = self._own[1], None
            return expanded
        with torch.no_grad(), self._as_called():
            return self._expand(held[0], held[1], self._positions(source, columns))

    @contextmanager
    def backward(self, stop: Stop, held: tuple[Tensor, ...]) -> Iterator[Visiting]:
        """Expanded payload whose gradients, added inside the context, are turned into compact ones at its end."""
        if self._expand is None:
            visiting = Visiting(held[0], held[1])
            yield visiting
            visiting.payload_gradients = tuple(total.result() for total in visiting.sums)
            return
        source, columns = stop.only
        leaves = [x.detach().requires_grad_() for x in held[:2]]
        with torch.enable_grad(), self._as_called():
            expanded = self._expand(leaves[0], leaves[1], self._positions(source, columns))
        visiting = Visiting(expanded[0].detach(), expanded[1].detach())
        yield visiting
        self._pull_back(leaves, expanded, visiting)

    def _pull_back(self, leaves: list[Tensor], expanded: tuple[Tensor, Tensor], visiting: Visiting) -> None:
        pairs = [(x, dx.result(x.dtype)) for x, dx in zip(expanded, visiting.sums, strict=True) if x.requires_grad]
        found: tuple[Tensor | None, ...] = (None,) * (len(leaves) + len(self.parameters))
        if pairs:
            found = torch.autograd.grad(
                [x for x, _ in pairs], [*leaves, *self.parameters], [dx for _, dx in pairs], allow_unused=True
            )
        visiting.payload_gradients = tuple(
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, found[: len(leaves)], strict=True)
        )
        self._add_parameter_gradients(found[len(leaves) :])

    def _add_parameter_gradients(self, gradients: tuple[Tensor | None, ...]) -> None:
        for index, grad in enumerate(gradients):
            if grad is not None:
                self.parameter_gradients[index] = _added(self.parameter_gradients[index], grad)

    def forward_ended(self) -> None:
        """See `WatchedModule`."""
        if self._watched is not None:
            self._watched.forward_ended()

    def start_backward(self) -> None:
        """Begin a backward (a retained graph may be walked twice). Before anything is sent.

        Raises:
            RuntimeError: since the forward a parameter or a buffer was changed in place, or other parameters took the
                places of those: out and lse are of what they were.
        """
        problem = None if self._watched is None else self._watched.problem()
        if problem is not None:
            raise RuntimeError(
                f"ring_attention: backward: {problem}: keys and values would be expanded by other weights than the "
                "output was made with. Call backward before what changes them (an optimizer's step), or "
                "ring_attention again after it"
            )
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        self.parameter_gradients = [None] * len(self.parameters)

    def finished_parameter_gradients(self) -> tuple[Tensor, ...]:
        """Sums over all hops, one per parameter in its dtype; zeros where this rank expanded nothing."""
        return tuple(
            torch.zeros_like(parameter) if grad is None else grad.to(parameter.dtype)
            for parameter, grad in zip(self.parameters, self.parameter_gradients, strict=True)
        )

    def _positions(self, source: int, columns: range) -> Tensor:
        return self._plan.positions(source, self.device)[columns.start : columns.stop]

    def _as_called(self) -> AbstractContextManager[object]:
        enabled, dtype = self._autocast
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled)


def expand_problem(expand: Any) -> str | None:
    """Why nothing can be expanded by this, or None."""
    if expand is None or callable(expand):
        return None
    return f"expand: expected a function or module, or None, got {expand!r}"


# What memory, a device or a connection ran into: from there the others cannot be asked, and who ends the process (the
# launcher) knows these by their types.
_NOT_FROM_EXPAND = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError, dist.DistError, RingAttnError)


def expand_checked(expand: Expand, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, str | None]:
    """Keys, values and None; or k, v and what is wrong, perhaps on this rank only: the others must hear of it.

    Raises:
        MemoryError, OutOfMemoryError, AcceleratorError, DistError, RingAttnError: `expand` met with it.
    """
    problem = expand_problem(expand)
    if problem is not None:
        return k, v, problem
    try:
        result = expand(k, v, positions)
    except _NOT_FROM_EXPAND:
        raise
    except ValueError as error:  # it refuses its input
        return k, v, Problem(f"expand: {error}", error)
    except Exception as error:  # else the others would wait for this rank until their time is up
        return k, v, Problem(f"expand: {type(error).__name__}: {error}", error)
    if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(x, Tensor) for x in result):
        return k, v, f"expand: expected a pair of tensors (keys, values), got {type(result).__name__}"
    return *result, None


def owner_module(expand: Expand | None) -> nn.Module | None:
    """The module that `expand` is, or is a method of; None if there is none."""
    if isinstance(expand, nn.Module):
        return expand
    owner = getattr(expand, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def trainable_parameters(owner: nn.Module) -> tuple[nn.Parameter, ...]:
    """Those that take gradients, in their order."""
    return tuple(parameter for parameter in owner.parameters() if parameter.requires_grad)


def _same(x: Tensor) -> Tensor:
    return x


def _without_memory(x: Tensor) -> Tensor:
    """Of the same shape, dtype and device."""
    return x.detach().new_empty(()).expand(x.shape)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    part = part.to(accumulator_dtype(part.dtype))
    return part if total is None else total + part


def hidden_problem(result: Sequence[Tensor], known: Sequence[Tensor]) -> str | None:
    """What is wrong if the graph of what `expand` made has leaves that are not among the known tensors, or None."""
    known_ids = {id(x) for x in known}
    waiting = [x.grad_fn for x in result if x.grad_fn is not None]
    seen, hidden = set(waiting), 0
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        hidden += leaf is not None and id(leaf) not in known_ids
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    if not hidden:
        return None
    return (
        f"expand: it uses {hidden} tensors with gradients that the ring cannot see, so that these gradients would be "
        "lost; pass an nn.Module that owns them as parameters, or a method of one"
    )
