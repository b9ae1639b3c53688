"""Checkpointed layers that keep attention: the same gradients, and the ring runs forward once instead of twice."""

import itertools
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import ringattn
from ringattn.testing import dense_attention, error
from tests.processes import run_ranks

LENGTH, LAYERS = 21, 2
SELECTIVE = partial(create_selective_checkpoint_contexts, [torch.ops.ringattn.attend.default])
WAYS = {
    "kept whole": None,
    "recomputed": {},
    "keeping": {"context_fn": ringattn.keeping_attention},
    "selective": {"context_fn": SELECTIVE},
}


class Expand(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(4, 8, bias=False)

    def forward(self, k, v, positions):
        return self.up(k) * torch.cos(positions)[:, None, None], v


class Layer(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.into, self.out = torch.nn.Linear(16, 16 + 12 + 8), torch.nn.Linear(16, 16)
        self.expand = Expand() if kind == "expand" else None

    def forward(self, x, plan, group, transport):
        q, k, v = self.into(x).split((16, 12, 8), dim=-1)
        q, v = q.unflatten(-1, (2, 8)), v.unflatten(-1, (1, 8))
        k = k[..., : 4 if self.expand else 8].unflatten(-1, (1, -1))
        options = {"selection": ringattn.Selection(memory_tau=1.0)} if self.kind == "selection" else {}
        carrier = "ulysses" if self.kind == "ulysses" else "transport"
        options |= {"expand": self.expand, carrier: transport}
        found = ringattn.ring_attention(q, k, v, plan, group, **options)
        out, cost = found if isinstance(found, tuple) else (found, 0.0)
        return x + torch.tanh(self.out(out.flatten(2))) + 0.1 * (cost[..., None] if self.kind == "selection" else cost)


def problem(kind, rank, world_size, **mask):
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(Layer(kind) for _ in range(LAYERS)).double()
    plan = ringattn.Plan(LENGTH, world_size, **mask)
    return layers, ringattn.shard(torch.randn(1, LENGTH, 16, dtype=torch.float64), plan, rank), plan


def gradients(way, layers, x, *arguments):
    x = x.detach().requires_grad_()
    hidden = x
    for layer in layers:
        if way is None:
            hidden = layer(hidden, *arguments)
        else:
            hidden = checkpoint(layer, hidden, *arguments, use_reentrant=False, **way)
    return [hidden.detach(), *torch.autograd.grad(hidden.square().sum(), [x, *layers.parameters()], allow_unused=True)]


def off(found, expected):
    pairs = list(zip(found, expected, strict=True))
    assert all((a is None) == (b is None) for a, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs if a is not None)


def keeping_worker(rank, world_size, kind, mask):
    """For each way: how far off it is, and the exchanges of its forward and backward."""
    group = dist.group.WORLD if world_size > 1 else None
    transport = "auto"
    if group is not None:
        transport = ringattn.make_ulysses(group, 2) if kind == "ulysses" else ringattn.make_transport("p2p", group)
    layers, x, plan = problem(kind, rank, world_size, **mask)
    expected, found = None, {}
    for name, way in WAYS.items():
        result = gradients(way, layers, x, plan, group, transport)
        expected = expected or result
        found[name] = (off(result, expected), transport.stats.take().hops if group is not None else 0)
    return found


@pytest.mark.parametrize(
    ("kind", "cp_size"), [*itertools.product(["plain", "expand", "selection"], [1, 2]), ("ulysses", 2)]
)
def test_the_same_gradients_and_one_forward_of_the_ring(kind, cp_size):
    mask = {} if kind == "selection" else {"documents": (0, 15, LENGTH)}
    for found in run_ranks(keeping_worker, cp_size, kind, mask):
        assert all(error <= 1e-12 for error, _ in found.values()), found
        whole, recomputed, keeping, selective = (hops for _, hops in found.values())
        assert selective == whole
        if cp_size > 1:
            assert recomputed > whole
        assert keeping == (recomputed if kind == "ulysses" else whole)  # it exchanges heads again


def test_a_retained_graph_is_walked_twice():
    layers, x, plan = problem("plain", 0, 1)
    x.requires_grad_()
    out = checkpoint(layers[0], x, plan, None, "auto", use_reentrant=False, context_fn=ringattn.keeping_attention)
    first, second = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_kept_is_freed_with_the_graph():
    layers, x, plan = problem("plain", 0, 1)
    contexts = []

    def context_fn():
        contexts.append(ringattn.keeping_attention())
        return contexts[-1]

    out = checkpoint(layers[0], x.requires_grad_(), plan, None, "auto", use_reentrant=False, context_fn=context_fn)
    kept = contexts[0][0]._kept
    (pairs,) = kept._results
    assert [tuple(stored.get().shape) for stored in pairs] == [(1, LENGTH, 2, 8), (1, 2, LENGTH)]
    alive = weakref.ref(kept)
    contexts.clear()
    del kept, pairs
    assert alive() is not None
    del out
    assert alive() is None


def test_an_output_changed_in_place_is_refused():
    plan = ringattn.Plan(LENGTH, 1)
    q = torch.randn(1, LENGTH, 2, 8, requires_grad=True)

    def layer(q):
        out = ringattn.ring_attention(q, q, q, plan)
        kept = torch.exp(out.clone())
        out.detach().add_(1.0)
        return kept

    out = checkpoint(layer, q, use_reentrant=False, context_fn=ringattn.keeping_attention)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_a_second_run_that_attends_more_often_is_refused():
    plan, again = ringattn.Plan(LENGTH, 1), []
    q = torch.randn(1, LENGTH, 2, 8, requires_grad=True)

    def layer(q):
        out = ringattn.ring_attention(q, q, q, plan)
        if again:
            out = ringattn.ring_attention(out, q, q, plan)
        again.append(True)
        return torch.exp(out)

    out = checkpoint(layer, q, use_reentrant=False, context_fn=ringattn.keeping_attention)
    with pytest.raises(RuntimeError, match="more often"):
        out.sum().backward()


class Silent(torch.autograd.Function):
    """Hands on what it is given, and says nothing of its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return None


def silent_selection_worker(rank, world_size, degree):
    """Largest error of a rank's gradients where nothing comes back to the last rank's result and cost."""
    plan = ringattn.Plan(LENGTH, world_size)
    torch.manual_seed(0)
    whole = [torch.randn(1, LENGTH, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    own = [ringattn.shard(x.detach(), plan, rank).requires_grad_() for x in whole]
    selection = ringattn.Selection(gain=0.5, memory_tau=1.0)
    out, _ = ringattn.ring_attention(*own, plan, dist.group.WORLD, selection=selection, ulysses=degree)
    last = rank == world_size - 1
    ((Silent.apply(out) if last else out).square().sum() + own[0].sum()).backward()
    heard = torch.ones(LENGTH, dtype=torch.float64)
    heard[plan.positions(world_size - 1)] = 0.0
    alone, _ = ringattn.ring_attention(*whole, ringattn.Plan(LENGTH, 1), selection=selection)
    (alone.square() * heard[None, :, None, None]).sum().backward()
    expected = [ringattn.shard(x.grad, plan, rank) for x in whole]
    expected[0] = expected[0] + 1.0
    return max(error(x.grad, truth) for x, truth in zip(own, expected, strict=True))


@pytest.mark.parametrize("degree", [1, 2])
def test_so_does_a_rank_with_selection(degree):
    assert max(run_ranks(silent_selection_worker, 2, degree)) <= 1e-10


def silent_worker(rank, world_size, way, degree):
    """Largest error of a rank's gradients where nothing comes back to the last rank's result."""
    plan = ringattn.Plan(LENGTH, world_size)
    torch.manual_seed(0)
    whole = [torch.randn(1, LENGTH, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    own = [ringattn.shard(x.detach(), plan, rank).requires_grad_() for x in whole]

    def attend(q, k, v):
        return ringattn.ring_attention(q, k, v, plan, dist.group.WORLD, ulysses=degree)

    out = attend(*own) if WAYS[way] is None else checkpoint(attend, *own, use_reentrant=False, **WAYS[way])
    last = rank == world_size - 1
    ((Silent.apply(out) if last else out).square().sum() + own[0].sum()).backward()
    heard = torch.ones(LENGTH, dtype=torch.float64)
    heard[plan.positions(world_size - 1)] = 0.0
    (dense_attention(*whole).square() * heard[None, :, None, None]).sum().backward()
    expected = [ringattn.shard(x.grad, plan, rank) for x in whole]
    expected[0] = expected[0] + 1.0
    return max(error(x.grad, truth) for x, truth in zip(own, expected, strict=True))


@pytest.mark.parametrize(("way", "degree"), itertools.product(WAYS, (1, 2)))
def test_a_rank_to_which_no_gradient_comes_back_takes_part_all_the_same(way, degree):
    assert max(run_ranks(silent_worker, 2, way, degree)) <= 1e-10
