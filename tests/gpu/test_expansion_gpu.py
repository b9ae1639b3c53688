"""Passes that expand as CUDA graphs, over copy engines: what they give against the same launched by the host."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.scoring.rotary import Rope
from tests.gpu.test_ring_gpu import needs_gpus
from tests.processes import run_ranks

pytestmark = pytest.mark.gpu

TOKENS, LAYERS, STEPS = 1021, 2, 4


@dataclass(frozen=True)
class Case:
    kind: str
    lag: int | None = None
    documents: bool = False


CASES = [
    Case("sas"),
    Case("wide sas"),
    Case("latent"),
    Case("factors"),
    Case("sas", lag=128),
    Case("latent", lag=1),
    Case("latent", lag=1, documents=True),
]


def build(kind, layer):
    """The module, its parameters fp32, and the shapes of q and the payload, [B, S, ...]."""
    torch.manual_seed(layer)
    if kind in ("sas", "wide sas"):
        sizes = {"heads": 4, "kv_heads": 2, "simulated_heads": 8, "head_dim": 64, "simulated_dim": 64}
        module = ringattn.SimulatedScore(**sizes, kernel_size=3 if kind == "wide sas" else 1).key_value
        return module.cuda(), (8, 64), (2, 64), (2, 64)
    if kind == "latent":
        sizes = {"heads": 4, "latent_dim": 64, "rotary_dim": 32, "nope_dim": 32, "value_dim": 64}
        return ringattn.LatentExpansion(**sizes, rope=Rope()).cuda(), (4, 64), (1, 64), (1, 32)
    return ringattn.FactorExpansion(heads=4, rope=Rope()), (4, 64), (2, 4 + 64), (2, 4 + 64)


def draw(shapes, plan, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.randn(1, TOKENS, *shape, generator=generator) for shape in shapes]
    return [ringattn.shard(x, plan, rank).to("cuda", torch.bfloat16) for x in whole]


def change(module, step):
    """Weights are updated: in their memory, or in new one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.9)
            if step % 2:
                parameter.data = parameter.data.clone()


def results(case, modules, plan, group, rank, transport, seed):
    """All layers forward, then all backward: of each out, dq, dk, dv and the parameters' gradients as one vector."""
    calls = []
    for layer, (module, *shapes) in enumerate(modules):
        *leaves, dout = draw([*shapes, shapes[0]], plan, rank, seed + layer)
        leaves = [x.requires_grad_() for x in leaves]
        selection = None if case.lag is None else ringattn.Selection(lag=case.lag, gain=0.01)
        out = ringattn.ring_attention(*leaves, plan, group, selection=selection, expand=module, transport=transport)
        calls.append((leaves, [*module.parameters()], out, dout[..., : out.shape[-1]].contiguous()))
    found = []
    for leaves, parameters, out, dout in reversed(calls):
        gradients = torch.autograd.grad(out, [*leaves, *parameters], dout)
        vector = torch.cat([x.flatten().double() for x in (*gradients[3:], out.new_zeros(1))])
        found += [out.detach(), *gradients[:3], vector]
    return found


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-9))


def worker(rank, world_size):
    """Of each case the largest difference, how many graphs there are and how many hops they made."""
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    transport, launched = (ringattn.make_transport("copy_engine", group, graphs=graphs) for graphs in (True, False))
    transport.memory.reserve(2**24)  # for all cases: graphs go where it grows
    told = []
    for case in CASES:
        modules, plan, worst = (
            [build(case.kind, layer) for layer in range(LAYERS)],
            ringattn.Plan(TOKENS, world_size),
            0.0,
        )
        before = len(transport._graphs._captured)
        for step in range(STEPS):
            row = plan.with_documents((0, 100 + step, 500, TOKENS) if case.documents else None)
            pair = [results(case, modules, row, group, rank, channel, 10 * step) for channel in (transport, launched)]
            worst = max(worst, *map(relative, *pair))
            for module, *_ in modules:
                change(module, step)
        graphs = len(transport._graphs._captured) - before
        told.append((worst, graphs, transport.stats.take().untimed_hops))
    torch.cuda.synchronize()
    dist.destroy_process_group(group)
    return told


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_graphs_give_what_launches_by_the_host_give(world_size):
    """Two layers with parameters of their own share each graph."""
    needs_gpus(world_size)
    everyone = run_ranks(worker, world_size, timeout=300)
    for number, case in enumerate(CASES):
        for worst, graphs, _ in (told[number] for told in everyone):
            assert worst <= 1e-2, (case, worst)
            assert graphs == 2, case
        assert sum(told[number][2] for told in everyone) > 0, case
