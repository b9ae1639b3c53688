"""Exchanges of heads and their way back are one passage: after an error in between nothing more is sent.

And nothing that is right is taken for such an error: layers one after the other, checkpoints around them or around
attention alone, compiled layers, gradients of some inputs only; with selection, against the dense float64 oracle.
"""

import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import ringattn
from ringattn.scoring.attention import SelectiveAttention
from ringattn.softmax import SoftmaxAttention
from ringattn.testing import dense_attention, error, memory_cost, selection_bias, visibility
from ringattn.ulysses import make_ulysses
from tests.processes import run_ranks
from tests.ringattn.unwritten import watched

KINDS = {
    "plain": ({}, SoftmaxAttention),
    "selection": ({"selection": ringattn.Selection(head=1)}, SelectiveAttention),
    "expand": ({"expand": lambda k, v, positions: (k * 2.0, v)}, SoftmaxAttention),
    "expand, selection": (
        {"expand": lambda k, v, positions: (k * 2.0, v), "selection": ringattn.Selection()},
        SelectiveAttention,
    ),
}


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("planted")


def call(plan, ulysses, rank, **options):
    q, k, v = (torch.randn(1, plan.shard_len(rank), 6, 8, requires_grad=True) for _ in range(3))
    return ringattn.ring_attention(q, k, v, plan, dist.group.WORLD, ulysses=ulysses, **options)


def failing_worker(rank, world_size, kind, degree):
    """No memory is left between the two exchanges, once on every rank; the program goes on."""
    options, work = KINDS[kind]
    ulysses, told = make_ulysses(dist.group.WORLD, degree), []
    for name in ("forward", "backward"):
        if name == "backward":
            ulysses.turn.end()  # as if nothing had broken off
        plan = ringattn.Plan(24, world_size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work, name, out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                call(plan, ulysses, rank, **options).sum().backward()
        sent = ulysses.stats.bytes_sent
        for again in (plan, ringattn.Plan(12, world_size)):  # rows of another length would meet the same wait
            with pytest.raises(ringattn.PeerError) as caught:
                call(again, ulysses, rank, **options)
            told.append(str(caught.value))
        assert ulysses.stats.bytes_sent == sent
    return told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "degree"), [(2, 2), (3, 3), (4, 2)])
def test_after_an_error_between_the_exchanges_nothing_more_is_sent(size, degree, kind):
    for told in run_ranks(failing_worker, size, kind, degree):
        for name, message in zip(("forward", "forward", "backward", "backward"), told, strict=True):
            assert f"an earlier pass (ulysses {name}) broke off on this rank" in message


def alone_worker(rank, world_size, kind, name):
    """Only rank 0 has no memory left. What it does next must not be taken for the way back that others wait for."""
    options, work = KINDS[kind]
    ulysses = make_ulysses(dist.group.WORLD, world_size, timeout=lambda: timedelta(seconds=20))
    plan, told = ringattn.Plan(24, world_size), []
    call(plan, ulysses, rank, **options).sum().backward()
    if rank:
        call(plan, ulysses, rank, **options).sum().backward()
        return None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, name, out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            call(plan, ulysses, rank, **options).sum().backward()
    # The ranks would have to agree on each of the latter: a collective too.
    others = plan.with_documents([0, 9, 24]), ringattn.Plan(24, world_size)
    for again in (plan, *others):
        began = time.monotonic()
        with pytest.raises(ringattn.PeerError) as caught:
            call(again, ulysses, rank, **options)
        assert time.monotonic() - began < 1.0
        told.append(str(caught.value))
    return told


@pytest.mark.parametrize("kind", ["plain", "selection"])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_rank_that_broke_off_alone_is_refused_and_the_others_are_told(kind, name):
    broken, *others = run_ranks(alone_worker, 3, kind, name, check=False)
    assert broken.error is None, broken.traceback
    assert all(f"an earlier pass (ulysses {name}) broke off on this rank" in told for told in broken.value)
    assert all(isinstance(other.error, ringattn.PeerError) for other in others)
    assert all("tokens for heads: another rank died" in str(other.error) for other in others)


LAYERS, TOKENS, HEADS, WIDTH, TAU = 3, 22, 6, 4, 1.5
DOCUMENTS = (0, 9, TOKENS)


def problem():
    """x [1, T, F], and of each layer: what makes q, k, v of it, and the weights of its own and the earlier votes."""
    generator = torch.Generator().manual_seed(7)
    features = HEADS * WIDTH
    x = torch.randn(1, TOKENS, features, generator=generator, dtype=torch.float64)
    into = torch.randn(LAYERS, features, 3 * features, generator=generator, dtype=torch.float64) / features**0.5
    return x, into, torch.tensor([[0.3, 0.0], [0.2, 0.1], [0.4, 0.2]], dtype=torch.float64)


def heads_of(x, into):
    return [part.unflatten(-1, (HEADS, WIDTH)) for part in (x @ into).chunk(3, dim=-1)]


def stack(attend, x, into, weights, way):
    """Loss of layers that vote with their second head, each guided by the one before, with a memory loss."""
    loss, earlier = 0.0, None
    for number in range(LAYERS):

        def attention(q, k, v, weights, earlier_q=None, earlier_k=None):
            votes = () if earlier_q is None else (ringattn.Votes(q=earlier_q, k=earlier_k, weight=weights[1]),)
            selection = ringattn.Selection(head=1, lag=2, gain=weights[0], earlier=votes, memory_tau=TAU)
            return attend(q, k, v, selection)

        def layer(x, into, weights, *earlier, attention=attention):
            q, k, v = heads_of(x, into)
            out, cost = way["attention"](attention)(q, k, v, weights, *earlier)
            return x + torch.tanh(out.flatten(2)), cost, q[:, :, 1], k[:, :, 1]

        x, cost, *earlier = way["layer"](layer)(x, into[number], weights[number], *(earlier or ()))
        loss = loss + cost.square().sum()
    return loss + x.square().sum()


def plain(function):
    return function


def checkpointed(function, **options):
    return partial(checkpoint, function, use_reentrant=False, **options)


keeping = partial(checkpointed, context_fn=ringattn.keeping_attention)
compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
WAYS = {
    "plain": {"layer": plain, "attention": plain},
    "layers run again": {"layer": checkpointed, "attention": plain},
    "layers run again but for attention": {"layer": keeping, "attention": plain},
    # Nothing of the call is needed after it: its second run is broken off once it has what the first had kept.
    "attention run again": {"layer": plain, "attention": checkpointed},
    "attention kept": {"layer": plain, "attention": keeping},
    "one in the other": {"layer": checkpointed, "attention": checkpointed},
    "compiled": {"layer": plain, "attention": compiled},
}


def dense(q, k, v, selection):
    bias = selection_bias(q, k, selection, documents=DOCUMENTS)
    cost = memory_cost(bias, visibility(TOKENS, documents=DOCUMENTS), TAU)
    return dense_attention(q, k, v, selection=selection, documents=DOCUMENTS), cost


def layers_worker(rank, world_size, degree, layout, ways):
    """The largest error of all gradients, for each way; then of those of the weights, where no others are asked for."""
    group, found = dist.group.WORLD, {}
    ulysses = make_ulysses(group, degree, layout=layout)
    plan = ringattn.Plan(TOKENS, world_size, layout, documents=DOCUMENTS)

    def attend(q, k, v, selection):
        return ringattn.ring_attention(q, k, v, plan, group, selection=selection, ulysses=ulysses)

    whole = [x.requires_grad_() for x in problem()]
    expected = torch.autograd.grad(stack(dense, *whole, WAYS["plain"]), whole)
    x, *shared = problem()
    own = [y.requires_grad_() for y in (ringattn.shard(x, plan, rank), *shared)]
    for name in ways:
        with watched():
            dx, *shares = torch.autograd.grad(stack(attend, *own, WAYS[name]), own)
        for share in shares:
            dist.all_reduce(share)
        found[name] = [ringattn.unshard(dx, plan, group), *shares]
    errors = {name: max(map(error, gradients, expected)) for name, gradients in found.items()}
    for part in ("out", "cost"):
        (share,) = torch.autograd.grad(frozen(attend, *own, part), own[2:])
        dist.all_reduce(share)
        errors[part] = error(share, *torch.autograd.grad(frozen(dense, *whole, part), whole[2:]))
    ulysses.turn.check()
    return errors


def frozen(attend, x, into, weights, part):
    """Loss of one part of what attention returns, whose weights alone have gradients."""
    q, k, v = (y.detach() for y in heads_of(x, into[0]))
    votes = (ringattn.Votes(q=q[:, :, 0], k=k[:, :, 0], weight=weights[1, 1]),)
    out, cost = attend(q, k, v, ringattn.Selection(head=1, gain=weights[0, :1], earlier=votes, memory_tau=TAU))
    return {"out": out, "cost": cost}[part].square().sum()


EAGER = [name for name in WAYS if name != "compiled"]


@pytest.mark.parametrize(
    ("size", "degree", "layout", "ways"),
    [
        (2, 2, "contiguous", EAGER),  # without an order of tokens nothing is kept after the call for its backward
        (3, 3, "zigzag", EAGER),
        (2, 2, "zigzag", ["compiled"]),
        pytest.param(3, 3, "zigzag", ["compiled"], marks=pytest.mark.slow),
        pytest.param(4, 2, "contiguous", [*WAYS], marks=pytest.mark.slow),
    ],
)
def test_layers_with_selection_equal_the_dense_oracle(size, degree, layout, ways):
    for errors in run_ranks(layers_worker, size, degree, layout, ways, timeout=100):
        assert all(off <= 1e-10 for off in errors.values()), errors
