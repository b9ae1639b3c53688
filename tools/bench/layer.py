"""One layer's attention of some kind over a ring: what `bench_layer` calls, whatever the transport."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import ringattn
from model.config import DEFAULT_KERNEL_SIZE
from ringattn.transport import Transport
from tools.bench.payloads import Kind as Payload
from tools.bench.payloads import Sizes, build
from tools.bench.problem import Point
from tools.bench.ranks import Ranks
from tools.bench_selection import GAIN

PARTS = ("out", "dq", "dk", "dv", "dweights")  # the last: of what expands, or of selection's gain


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What is computed.

    Attributes:
        payload: of `tools.bench.payloads`.
        lag: of selection; None is none.
        documents: whether rows hold several.
    """

    payload: str = "gqa"
    lag: int | None = None
    documents: bool = False


KINDS = {
    "softmax": LayerKind(),
    "documents": LayerKind(documents=True),
    "lagged": LayerKind(lag=128),
    "lagged-documents": LayerKind(lag=128, documents=True),
    "selective": LayerKind(lag=1),
    "selective-documents": LayerKind(lag=1, documents=True),
    "sas": LayerKind(payload="sas"),
    "sas-documents": LayerKind(payload="sas", documents=True),
    "latent": LayerKind(payload="mla"),
}


def documents_of(point: Point, row: int) -> tuple[int, ...]:
    """Cumulative starts of the point's number of documents: others in every row, the same on all ranks."""
    inner = random.Random(row).sample(range(1, point.seq_len), point.documents - 1)
    return (0, *sorted(inner), point.seq_len)


def payload_of(kind: LayerKind, point: Point, ranks: Ranks) -> Payload:
    """What travels, with the weights that expand it: "sas" as the trainer has it with twice the heads, as wide.

    A latent is as wide as four heads, and half of a head's features turn: DeepSeek-V2's shape (arXiv 2405.04434).
    """
    sizes = Sizes(
        heads=point.heads,
        kv_heads=point.kv_heads,
        head_dim=point.head_dim,
        simulated_heads=2 * point.heads,
        simulated_dim=point.head_dim,
        kernel_size=DEFAULT_KERNEL_SIZE,
        latent_dim=4 * point.head_dim,
        rotary_dim=point.head_dim // 4 * 2,
        rank=2,
    )
    torch.manual_seed(0)  # the same weights on all ranks
    payload = build(kind.payload, sizes, sas_gqa=True)
    if payload.expand is not None:
        payload.expand.to(ranks.device, point.torch_dtype)
    return payload


def inputs_of(payload: Payload, point: Point, ranks: Ranks, count: int) -> list[tuple[Tensor, ...]]:
    """So many times q and the payload, which require gradients, and dout; random, other ones on every rank."""
    tokens = point.plan(ranks.size, point.layout).shard_len(ranks.rank)

    def draw(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(ranks.device).manual_seed(1000 * seed + ranks.rank)
        q, k, v, dout = (
            torch.randn(1, tokens, *shape, generator=generator, device=ranks.device, dtype=point.torch_dtype)
            for shape in (payload.query, *payload.parts, (payload.query[0], point.head_dim))
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout

    return [draw(seed) for seed in range(count)]


class Layers:
    """The calls of some layers on one row after the other, as a model makes them, over one transport.

    Args:
        kind: with documents every row is another one, and its plan is made and agreed on as in training.
        sets: what `inputs_of` gives; they take turns.
        layers: calls on each row: all forward, then all backward.
    """

    def __init__(
        self,
        kind: LayerKind,
        point: Point,
        ranks: Ranks,
        transport: Transport,
        payload: Payload,
        sets: Sequence[tuple[Tensor, ...]],
        layers: int,
    ) -> None:
        self.transport = transport
        self._point, self._ranks, self._sets, self._layers = point, ranks, sets, layers
        self._expand = payload.expand
        self._weights: tuple[Tensor, ...] = () if payload.expand is None else tuple(payload.expand.parameters())
        self._selection = None
        if kind.lag is not None:
            # Learned, as a trainer has it: a number would be brought to the device with every call.
            gain = torch.full((1,), GAIN, device=ranks.device, requires_grad=True)
            self._selection = ringattn.Selection(lag=kind.lag, gain=gain)
            self._weights = (*self._weights, gain)
        self._several = kind.documents
        self._plan = ringattn.Plan(point.seq_len, ranks.size, layout=point.layout, hosts=transport.hosts)
        self._rows = 0

    def forward(self, number: int) -> None:
        """A row forward; `number` chooses the inputs."""
        plan = self._next_plan()
        for layer in range(self._layers):
            self._attend(plan, self._inputs(number, layer))

    def both(self, number: int) -> list[tuple[Tensor, ...]]:
        """A row forward and backward: `PARTS` of the last two layers, as far as there are any.

        Two, since each has other inputs: what one of them overwrites of the other shows.
        """
        plan = self._next_plan()
        calls = []
        for layer in range(self._layers):
            inputs = self._inputs(number, layer)
            calls.append((inputs, self._attend(plan, inputs)))
        found = []
        while calls:
            (*leaves, dout), out = calls.pop()
            gradients = torch.autograd.grad(out, (*leaves, *self._weights), dout)
            if len(calls) >= self._layers - 2:
                weights = [x.flatten() for x in gradients[len(leaves) :]]
                # As one vector: some weights' gradients are little but rounding.
                rest = (torch.cat(weights)[None, None],) if weights else ()
                found.append((out.detach(), *gradients[: len(leaves)], *rest))
        return found

    def _next_plan(self) -> ringattn.Plan:
        if not self._several:
            return self._plan
        self._rows += 1
        return self._plan.with_documents(documents_of(self._point, self._rows))

    def _inputs(self, number: int, layer: int) -> tuple[Tensor, ...]:
        return self._sets[(number * self._layers + layer) % len(self._sets)]

    def _attend(self, plan: ringattn.Plan, inputs: Sequence[Tensor]) -> Tensor:
        q, k, v, _ = inputs
        carry = {"selection": self._selection, "expand": self._expand, "transport": self.transport}
        out: Tensor = ringattn.ring_attention(q, k, v, plan, self._ranks.group, **carry)  # type: ignore[arg-type]
        return out
