"""Parameters of `expand` that change in place, or make way for others, between forward and backward: refused."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import ringattn
from tests.processes import run_ranks
from tests.ringattn.test_keeping import LENGTH, WAYS, Expand, Layer, off, problem

CHANGED = r"backward: up.weight of Expand, the module of expand, of shape \(8, 4\), has been changed in place since the"


def attend(expand, plan=None, group=None, **options):
    """Out [B, S, H, Dv] of a payload that `expand` widens."""
    plan = plan or ringattn.Plan(LENGTH, 1)
    shapes = ((2, 8), (1, 4), (1, 8))
    q, k, v = (
        torch.randn(1, LENGTH, *shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        for n, shape in enumerate(shapes)
    )
    rank = 0 if group is None else dist.get_rank(group)
    q, k, v = (ringattn.shard(x, plan, rank).requires_grad_() for x in (q, k, v))
    out = ringattn.ring_attention(q, k, v, plan, group, expand=expand, **options)
    return out[0] if isinstance(out, tuple) else out


def change(expand):
    with torch.no_grad():
        expand.up.weight.mul_(2)


@pytest.mark.parametrize("selection", [None, ringattn.Selection(memory_tau=1.0)])
def test_a_change_in_place_is_refused(selection):
    expand = Expand().double()
    out = attend(expand, selection=selection)
    change(expand)
    with pytest.raises(RuntimeError, match=CHANGED):
        out.sum().backward()


@pytest.mark.parametrize("way", [name for name, way in WAYS.items() if way is not None])
def test_a_change_in_place_is_refused_where_layers_are_checkpointed(way):
    """What is kept of attention is of the old ones, whatever is made anew."""
    layers, x, plan = problem("expand", 0, 1)
    out = checkpoint(layers[0], x.requires_grad_(), plan, None, "auto", use_reentrant=False, **WAYS[way])
    change(layers[0].expand)
    with pytest.raises(RuntimeError, match=CHANGED):
        out.sum().backward()


def unsent_worker(rank, world_size):
    """What is raised after a change on all ranks, and the bytes that the backward sent."""
    plan, group, expand = ringattn.Plan(LENGTH, world_size), dist.group.WORLD, Expand().double()
    transport = ringattn.make_transport("p2p", group)
    out = attend(expand, plan, group, transport=transport)
    change(expand)
    transport.stats.take()
    with pytest.raises(RuntimeError, match=CHANGED):
        out.sum().backward()
    sent = transport.stats.take().bytes_sent
    attend(expand, plan, group, transport=transport).sum().backward()  # the ring is as good as before
    return sent


def test_it_is_refused_before_anything_is_sent():
    assert run_ranks(unsent_worker, 2) == [0, 0]


class Normed(torch.nn.Module):
    """An embedding that brings its rows to one length in place whenever it runs."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(LENGTH, 8, max_norm=0.1, dtype=torch.float64)

    def forward(self, k, v, positions):
        return self.table(positions)[None, :, None] + torch.cat([k, k], dim=-1), v


@pytest.mark.parametrize("selection", [None, ringattn.Selection(memory_tau=1.0)], ids=["plain", "selection"])
@pytest.mark.parametrize("kind", ["linear", "normed"])
def test_what_autograd_allows_is_allowed(kind, selection):
    """Graphs that wait for each other, are walked twice or made anew, and data that goes elsewhere and comes back
    (ZeRO-3); with weights that `expand` itself writes at each call."""
    expand = (Expand() if kind == "linear" else Normed()).double()
    (parameter,) = expand.parameters()
    call = partial(attend, expand, selection=selection)
    (expected,) = torch.autograd.grad(call().sum(), parameter)
    data = parameter.data
    outs = [call().sum() for _ in range(2)]
    found = [torch.autograd.grad(out, parameter)[0] for out in outs]
    out = call().sum()
    parameter.data = torch.empty(0, dtype=data.dtype)
    parameter.data = data.clone()
    parameter.data.copy_(data)
    found += [torch.autograd.grad(out, parameter, retain_graph=True)[0] for _ in range(2)]
    found.append(torch.autograd.grad(checkpoint(call, use_reentrant=False).sum(), parameter)[0])
    assert all(torch.equal(x, expected) for x in found)
    with torch.inference_mode():
        attend(copy.deepcopy(expand))  # its parameters have no versions


def sharded_worker(rank, world_size, offloaded):
    """How far two steps under FSDP2 are off those without, by how layers are kept; each of two micro-batches."""
    policy = CPUOffloadPolicy(pin_memory=False) if offloaded else OffloadPolicy()
    plan, group, found = ringattn.Plan(LENGTH, world_size), dist.group.WORLD, {}
    for name, way in WAYS.items():
        ends = []
        for sharded in (False, True):
            torch.manual_seed(0)
            layers = torch.nn.ModuleList(Layer("expand") for _ in range(2)).double()
            if sharded:
                for layer in layers:
                    fully_shard(layer, reshard_after_forward=True, offload_policy=policy)
            optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3)
            for _ in range(2):
                losses = []
                for number in range(2):
                    generator = torch.Generator().manual_seed(number)
                    x = torch.randn(1, LENGTH, 16, generator=generator, dtype=torch.float64)
                    x = ringattn.shard(x, plan, rank).requires_grad_()
                    for layer in layers:
                        run = layer if way is None else partial(checkpoint, layer, use_reentrant=False, **way)
                        x = run(x, plan, group, "auto")
                    losses.append(x.square().sum())
                for loss in losses:
                    loss.backward()
                for parameter in layers.parameters():
                    if not sharded:
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= world_size
                optimizer.step()
                optimizer.zero_grad()
            ends.append([x.full_tensor() if sharded else x.detach() for x in layers.parameters()])
        found[name] = off(*ends)
    return found


@pytest.mark.parametrize("offloaded", [False, True])
def test_parameters_that_fsdp_gathers_again_are_the_same(offloaded):
    for found in run_ranks(sharded_worker, 2, offloaded):
        assert all(difference <= 1e-12 for difference in found.values()), found


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("selection", [None, ringattn.Selection(memory_tau=1.0)])
def test_parameters_that_were_there_for_the_forward_alone_are_refused(selection, trained):
    """Their gradients came out as zeros, and those of the payload by the module's own."""
    expand = Expand().double().requires_grad_(trained)
    others = {f"expand.{name}": (2 * x.detach()).requires_grad_(trained) for name, x in expand.named_parameters()}

    class Calling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.expand = expand

        def forward(self):
            return attend(self.expand, selection=selection)

    out = torch.func.functional_call(Calling(), others)
    with pytest.raises(RuntimeError, match=r"up.weight of Expand, the module of expand, is another parameter than in"):
        out.sum().backward()


class Frozen(torch.nn.Module):
    """What takes no gradients."""

    def __init__(self):
        super().__init__()
        self.base = torch.nn.Linear(4, 8, bias=False, dtype=torch.float64).requires_grad_(False)
        self.register_buffer("factor", torch.full((), 0.5, dtype=torch.float64))

    def forward(self, k, v, positions):
        return self.base(k)[:, :, None].flatten(3) * self.factor, v


@pytest.mark.parametrize("name", ["base.weight", "factor"])
def test_what_takes_no_gradients_is_watched_too(name):
    expand = Frozen()
    out = attend(expand)
    dict([*expand.named_parameters(), *expand.named_buffers()])[name].mul_(2)
    with pytest.raises(RuntimeError, match=rf"backward: {name} of Frozen, the module of expand, of shape"):
        out.sum().backward()


class Whole(torch.nn.Module):
    """A layer whose `expand` is a method: other parts of it write to buffers."""

    def __init__(self):
        super().__init__()
        self.up, self.after = torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8)
        self.mlp = torch.nn.Linear(8, 8)

    def expand(self, k, v, positions):
        return self.up(k), v

    def forward(self, x, plan, group):
        q, k, v = x[:, :, None].expand(-1, -1, 2, -1).contiguous(), x[:, :, None, :4], x[:, :, None]
        out = ringattn.ring_attention(q, k.contiguous(), v.contiguous(), plan, group, expand=self.expand)
        return x + self.mlp(self.after(out.mean(2).mT).mT)


@pytest.mark.parametrize("again", [False, True])
def test_of_a_method_s_module_other_parts_may_change(again):
    layer, plan = Whole().double(), ringattn.Plan(LENGTH, 1)
    x = torch.randn(2, LENGTH, 8, dtype=torch.float64, requires_grad=True)
    call = partial(checkpoint, layer, use_reentrant=False) if again else layer
    outs = [call(x, plan, None).sum() for _ in range(2)]
    sum(outs).backward()
    assert layer.up.weight.grad.abs().sum() > 0
    out = call(x, plan, None)
    with torch.no_grad():
        layer.up.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"up.weight of Whole, the module of expand, of shape"):
        out.sum().backward()


def apart_worker(rank, world_size):
    """Micro-batches of a layer whose feed-forward is sharded by itself, gathered until the last one."""
    plan, layer = ringattn.Plan(LENGTH, world_size), Whole().double()
    fully_shard(layer.mlp)
    fully_shard(layer)
    x = ringattn.shard(torch.ones(2, LENGTH, 8, dtype=torch.float64), plan, rank)
    for last in (False, True):
        layer.set_reshard_after_backward(last)
        layer.set_requires_gradient_sync(last)
        layer(x, plan, dist.group.WORLD).square().sum().backward()
    return True


def test_of_a_method_s_module_parts_may_be_gathered_by_themselves():
    assert run_ranks(apart_worker, 2) == [True, True]


def test_weights_that_are_made_at_the_first_call_may_be():
    class Lazy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.LazyLinear(8, bias=False, dtype=torch.float64)

        def forward(self, k, v, positions):
            return self.up(k), v

    attend(Lazy()).sum().backward()
