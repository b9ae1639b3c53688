"""Passes that expand, from graphs (tests/recorded_graphs.py), over shared files, against the dense oracle."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import ringattn
from ringattn.kernels.selective import tiled
from ringattn.operator_calls import attend_by_operator
from ringattn.scoring import expansion, watched
from ringattn.scoring.expansion import Expansion
from ringattn.scoring.rotary import Rope
from ringattn.testing import dense_attention, error
from ringattn.transport import copy_engine
from ringattn.transport.row_graphs import WORTH_CALLS
from tests.processes import run_ranks
from tests.ringattn.test_graphs import recording_transport, without_new_inputs

TOKENS, DIM, LAYERS, STEPS = 21, 8, 3, 3


@dataclass(frozen=True)
class Case:
    kind: str
    lag: int | None = None
    layout: str = "zigzag"
    documents: bool = False
    theta: float = 10_000.0
    how: str = "eager"  # or by "keeping", "operator"
    layers: int = LAYERS


CASES = [
    Case("sas"),
    Case("sas", theta=100.0),  # of the same shapes
    Case("latent", layout="striped"),
    Case("factors", layout="contiguous"),
    Case("sas", lag=1, layout="contiguous"),
    Case("latent", lag=4),
    Case("factors", lag=1),
    Case("latent", lag=1, documents=True),
]
OTHER_WAYS = [Case("sas", lag=4, how="keeping"), Case("latent", how="operator"), Case("latent", lag=1, how="operator")]


def build(case, layer):
    """The module, and the shapes of q and the payload, [B, S, ...]."""
    torch.manual_seed(layer)
    rope = Rope(theta=case.theta)
    if case.kind == "sas":
        sizes = {"heads": 4, "kv_heads": 2, "simulated_heads": 8, "head_dim": DIM, "simulated_dim": 12}
        return ringattn.SimulatedScore(**sizes, rope=rope).key_value.double(), (8, 12), (2, DIM), (2, DIM)
    if case.kind == "latent":
        sizes = {"heads": 4, "latent_dim": 6, "rotary_dim": 4, "nope_dim": DIM, "value_dim": 5}
        return ringattn.LatentExpansion(**sizes, rope=rope).double(), (4, DIM + 4), (1, 6), (1, 4)
    return ringattn.FactorExpansion(heads=4, rope=rope), (4, DIM), (2, 4 + DIM), (2, 4 + 5)


def documents_of(case, step):
    return (0, 5 + step, 6 + step, TOKENS) if case.documents else None


def draw(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, TOKENS, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def selection_of(case):
    return None if case.lag is None else ringattn.Selection(lag=case.lag, gain=0.5)


def weights_of(out, seed):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)


def oracle(case, module, tensors, documents, seed):
    q, k, v = (x.clone().requires_grad_() for x in tensors)
    keys, values = module(k, v, torch.arange(TOKENS))
    out = dense_attention(q, keys, values, documents=documents, selection=selection_of(case))
    wanted = [q, k, v, *(p for p in module.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out, wanted, weights_of(out, seed))]


def attend(case, module, plan, rank, leaves, transport):
    options = {"selection": selection_of(case), "expand": module, "transport": transport}
    if case.how == "operator":
        more = {"scale": None, "kernel": "auto", "ulysses": 1}
        return attend_by_operator(*leaves, plan, dist.group.WORLD, **options, **more)
    call = partial(ringattn.ring_attention, plan=plan, group=dist.group.WORLD, **options)
    if case.how == "keeping":
        return checkpoint(call, *leaves, use_reentrant=False, context_fn=ringattn.keeping_attention)
    return call(*leaves)


def differences(case, modules, plan, rank, transport, seed):
    """All layers forward, then all backward: largest error of out and of all gradients."""
    calls = []
    for layer, (module, *shapes) in enumerate(modules):
        tensors = draw(shapes, seed + layer)
        leaves = [ringattn.shard(x, plan, rank).requires_grad_() for x in tensors]
        calls.append((module, tensors, leaves, attend(case, module, plan, rank, leaves, transport)))
    worst = 0.0
    for layer, (module, tensors, leaves, out) in reversed(list(enumerate(calls))):
        truth = oracle(case, module, tensors, plan.documents, seed + layer)
        parameters = [p for p in module.parameters() if p.requires_grad]
        dout = ringattn.shard(weights_of(truth[0], seed + layer), plan, rank)
        (*found,) = torch.autograd.grad(out, [*leaves, *parameters], dout)
        for gradient in found[3:]:
            dist.all_reduce(gradient)
        expected = [*(ringattn.shard(x, plan, rank) for x in truth[:4]), *truth[4:]]
        worst = max(worst, *map(error, [out.detach(), *found], expected))
    return worst


def change(modules, step):
    """Weights are updated: in their memory, or in new one."""
    with torch.no_grad():
        for module, *_ in modules:
            for parameter in module.parameters():
                parameter.mul_(0.9)
                if step % 2:
                    parameter.data = parameter.data.clone()


def worker(rank, world_size, folder, cases, fault):
    tiled._ROWS, tiled._KEYS = 8, 16
    transport, results = recording_transport(folder), []
    transport.memory.reserve(2**20)  # for all cases: graphs go where it grows
    if fault is not None:
        FAULTS[fault](transport._graphs)
    for case in cases:
        modules, plan, worst = [build(case, layer) for layer in range(case.layers)], None, 0.0
        before = len(transport._graphs._captured)
        for step in range(STEPS):
            calls = counted(type(modules[0][0]))
            documents = documents_of(case, step)
            fresh = ringattn.Plan(TOKENS, world_size, layout=case.layout, documents=documents)
            plan = fresh if plan is None else plan.with_documents(documents)
            with calls:
                worst = max(worst, differences(case, modules, plan, rank, transport, 100 * step))
            change(modules, step)
        graphs = len(transport._graphs._captured) - before
        # In the last step only the oracle expands.
        totals = transport.stats.take()
        replayed = totals.untimed_hops / totals.hops if totals.hops else None  # none comes, none is sent
        results.append((worst, graphs, calls.number - case.layers, replayed))
    return results


class counted:
    """Calls of a class's forward, while it is entered."""

    def __init__(self, kind):
        self.kind, self.forward, self.number = kind, kind.forward, 0

    def __enter__(self):
        def forward(module, *payload):
            self.number += 1
            return self.forward(module, *payload)

        self.kind.forward = forward

    def __exit__(self, *error):
        self.kind.forward = self.forward


def check(cases, everyone):
    for number, case in enumerate(cases):
        for worst, graphs, expanded, _ in (found[number] for found in everyone):
            assert worst <= 1e-10, case
            assert (graphs, expanded) == (2, 0), case  # forward and backward
        assert max(found[number][3] or 0 for found in everyone) > 0, case  # of the hops, by graphs


@pytest.mark.parametrize("size", [2, 3])
def test_layers_that_are_alike_share_a_graph_and_have_their_own_parameters(size, tmp_path):
    check(CASES, run_ranks(worker, size, str(tmp_path), CASES, None, timeout=120))


def test_other_ways_to_call_take_graphs_too(tmp_path):
    check(OTHER_WAYS, run_ranks(worker, 2, str(tmp_path), OTHER_WAYS, None, timeout=120))


def wide_worker(rank, world_size, folder, limits):
    """How many graphs there are when so many bytes may be as wide as the widest that a pass has."""
    sizes = {"heads": 4, "latent_dim": 6, "rotary_dim": 4, "nope_dim": DIM, "value_dim": VALUES}
    module = ringattn.LatentExpansion(**sizes, rope=Rope()).double()
    modules = [(module, (4, DIM + 4), (1, 6), (1, 4))] * LAYERS
    found = []
    for limit in limits:
        copy_engine.GRAPH_BYTES = limit
        transport, plan = recording_transport(f"{folder}/{limit}"), ringattn.Plan(TOKENS, world_size)
        transport.memory.reserve(2**20)
        for step in range(STEPS):
            assert differences(Case("latent"), modules, plan, rank, transport, step) <= 1e-10
        found.append(len(transport._graphs._captured))
    return found


VALUES = 20


def test_keys_or_values_up_to_the_limit_are_graphs(tmp_path):
    """Values of 4 heads of 20 are the widest, of keys and queries of 12; both together pass the first limit."""
    widest = 4 * VALUES * 8 * ringattn.Plan(TOKENS, 2).longest_shard
    limits = (widest, widest - 1)
    for limit in limits:
        (tmp_path / str(limit)).mkdir()
    assert run_ranks(wide_worker, 2, str(tmp_path), limits, timeout=120) == [[2, 0]] * 2


ROWS_OF_DOCUMENTS = [
    Case(kind, layout=layout, documents=True, layers=WORTH_CALLS + 1)
    for kind, layout in (("sas", "zigzag"), ("latent", "striped"), ("factors", "contiguous"))
]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_layers_of_a_row_of_documents_share_its_graphs(size, tmp_path):
    """All but the first layer of a row, in both passes; in the first row two of five."""
    everyone = run_ranks(worker, size, str(tmp_path), ROWS_OF_DOCUMENTS, None, timeout=120)
    for number, case in enumerate(ROWS_OF_DOCUMENTS):
        shares = {found[number][3] for found in everyone} - {None}
        assert shares, case
        assert all(2 / 5 <= share <= 4 / 5 for share in shares), case  # hops differ from row to row
        for worst, graphs, expanded, _ in (found[number] for found in everyone):
            assert worst <= 1e-10, case
            assert graphs == 0, case  # they are the row's
            # The last row's first layer is launched, the second captured: each payload once forward, once backward.
            assert 0 < expanded <= 2 * 2 * size, case


def parameters_where_they_lie(transport_graphs):
    expansion.computing_with = lambda module, given, tensors: module
    watched._version = lambda x: 0  # a recorded graph writes views of what it reads anew, unlike one of CUDA


def without_launch_key(transport_graphs):
    Expansion.graph_key = lambda self, given: (given.key, self._autocast)


def with_own_payload_of_the_capture(transport_graphs):
    Expansion.forget_own = lambda self: None  # it is the third layer's first call, for which that was expanded


FAULTS = {
    "parameters": parameters_where_they_lie,
    "launch key": without_launch_key,
    "own payload": with_own_payload_of_the_capture,
    "inputs": without_new_inputs,
}


@pytest.mark.parametrize(
    ("fault", "cases"),
    [
        ("parameters", CASES[:1]),
        ("launch key", CASES[:2]),
        ("own payload", CASES[:1]),
        ("inputs", CASES[3:4]),
        ("parameters", ROWS_OF_DOCUMENTS[:1]),
        ("inputs", ROWS_OF_DOCUMENTS[2:]),
    ],
)
def test_a_graph_that_is_not_the_call_s_is_missed(fault, cases, tmp_path):
    for found in run_ranks(worker, 2, str(tmp_path), cases, fault, timeout=120):
        assert max(worst for worst, *_ in found) > 1e-6
