"""Which passes that expand share a graph, which have one of their own and which have none; against those without."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import ringattn
from ringattn.rehearsing import rehearsing
from ringattn.scoring.expansion import Expansion
from ringattn.scoring.expansion_module import ExpansionModule, launch_key
from ringattn.scoring.rotary import Rope
from ringattn.testing import error
from ringattn.transport import copy_engine
from tests.processes import run_ranks
from tests.ringattn.test_graphs import recording_transport, without_new_inputs

TOKENS = 21


class Mixed(ExpansionModule):
    """Of fp32 a product that autocast rounds; of parameters, whatever takes gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, k, v, positions):
        return (k @ self.weight).to(k.dtype) + self.shift, v.sin()

    def value_width(self, v):
        return v.shape[-1]

    def launch_key(self):
        return ()


class Filtering(Mixed):
    """Its weight has four dimensions and more elements than all that a graph may take."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 8, 1000, 8).mT)

    def forward(self, k, v, positions):
        return k @ self.weight[0, :, :, 7] + self.shift, v.sin()

    def launch_key(self):
        return "filter"


class Louder(Mixed):
    """Says nothing of its own launches."""

    def forward(self, k, v, positions):
        k, v = super().forward(k, v, positions)
        return 2 * k, v


def compared(module, plan, rank, transport, step, lag=None):
    """Largest error of out and gradients against the same over messages."""
    generator = torch.Generator().manual_seed(step)
    whole = [torch.randn(1, TOKENS, heads, 8, generator=generator) for heads in (4, 2, 2, 4)]
    *leaves, dout = (ringattn.shard(x, plan, rank).requires_grad_() for x in whole)
    wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
    found = []
    for channel in (transport, "p2p"):
        selection = None if lag is None else ringattn.Selection(lag=lag, gain=0.2)
        out = ringattn.ring_attention(
            *leaves, plan, dist.group.WORLD, selection=selection, expand=module, transport=channel
        )
        found.append([out.detach(), *torch.autograd.grad(out, wanted, dout)])
    return max(map(error, *found))


def frozen_worker(rank, world_size, folder, fault):
    """First all parameters learn, then one, then both in evaluation: each has graphs of its own."""
    transport, plan, module = recording_transport(folder), ringattn.Plan(TOKENS, world_size), Mixed()
    transport.memory.reserve(2**20)
    if fault:
        key = Expansion.graph_key
        Expansion.graph_key = lambda self, given: key(self, type(given)(key=(), names=(), tensors=()))
    worst, graphs = 0.0, []
    for change in (lambda: None, lambda: module.weight.requires_grad_(False), lambda: module.eval()):
        change()
        for step in range(4):
            worst = max(worst, compared(module, plan, rank, transport, step))
        graphs.append(len(transport._graphs._captured))
    return worst, graphs


def test_frozen_parameters_and_evaluation_have_graphs_of_their_own(tmp_path):
    for worst, graphs in run_ranks(frozen_worker, 2, str(tmp_path), False):
        assert worst <= 1e-5
        assert graphs == [2, 4, 6]


@pytest.mark.slow
def test_a_graph_with_other_frozen_parameters_is_missed(tmp_path):
    with pytest.raises(AssertionError, match="Error"):  # other gradients than are wanted
        run_ranks(frozen_worker, 2, str(tmp_path), True)


def filtering_worker(rank, world_size, folder):
    transport, plan, module = recording_transport(folder), ringattn.Plan(TOKENS, world_size), Filtering()
    transport.memory.reserve(2**20)
    copy_engine.GRAPH_BYTES = (
        1000 * 8 * 4 * TOKENS // world_size
    )  # what is as wide as the weight's last dimensions is too wide
    worst = max(compared(module, plan, rank, transport, step) for step in range(4))
    return worst, len(transport._graphs._captured)


def test_parameters_are_not_taken_for_tokens(tmp_path):
    for worst, graphs in run_ranks(filtering_worker, 2, str(tmp_path)):
        assert worst <= 1e-5
        assert graphs == 2


def autocast_worker(rank, world_size, folder, fault):
    """With autocast and without, in turns; and how far apart the two are."""
    transport, plan, module = recording_transport(folder), ringattn.Plan(TOKENS, world_size), Mixed()
    transport.memory.reserve(2**20)
    if fault:
        Expansion.graph_key = lambda self, given: given.key
    worst = 0.0
    for step in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16) if step % 2 else nullcontext():
            worst = max(worst, compared(module, plan, rank, transport, step))
    return worst, len(transport._graphs._captured)


@pytest.mark.parametrize("fault", [False, True])
def test_a_graph_serves_autocast_as_it_was_captured(fault, tmp_path):
    for worst, graphs in run_ranks(autocast_worker, 2, str(tmp_path), fault):
        assert (worst <= 1e-5) == (not fault)
        assert graphs == (2 if fault else 4)


def hook_worker(rank, world_size, folder, everywhere):
    """A hook on all ranks from the beginning, or on one once there are graphs: its passes are launched by the host."""
    transport, module, seen = recording_transport(folder), Mixed(), []
    transport.memory.reserve(2**20)
    plan, worst = ringattn.Plan(TOKENS, world_size), 0.0
    for step in range(6):
        if (everywhere and step == 0) or (rank == 0 and step == 4 and not everywhere):
            module.register_forward_hook(lambda *call: seen.append(call))
        row = plan.with_documents((0, 5 + step, 12, TOKENS))
        worst = max(worst, compared(module, row, rank, transport, step, lag=1))
        worst = max(worst, compared(module, plan, rank, transport, step))
    return worst, len(transport._graphs._captured), len(seen)


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_module_with_a_hook_is_called_every_time_and_the_other_ranks_may_have_graphs(everywhere, tmp_path):
    """What travels is the same with and without: of rows with documents, too, which in graphs travel whole."""
    first, second = run_ranks(hook_worker, 2, str(tmp_path), everywhere)
    assert max(first[0], second[0]) <= 1e-5
    assert first[1] == second[1] == (0 if everywhere else 4)
    calls = 2 * 2 * 2  # kinds of attention, transports, passes; at least one hop each
    assert first[2] >= calls * (6 if everywhere else 2)
    assert (second[2] > 0) == everywhere


def test_who_says_nothing_of_its_launches_has_no_graphs():
    plan, device = ringattn.Plan(TOKENS, 2), torch.device("cpu")

    def given(module):
        return Expansion(module, plan, device).graph_inputs()

    latent = {"heads": 4, "latent_dim": 6, "rotary_dim": 4, "nope_dim": 8, "value_dim": 5}
    known = ringattn.LatentExpansion(**latent, rope=Rope())
    assert given(known).names == ("key.weight", "value.weight")
    assert launch_key(known) != launch_key(ringattn.LatentExpansion(**latent, rope=Rope(theta=100.0)))
    assert launch_key(known.forward) is None
    assert launch_key(ringattn.LatentExpansion(**latent, rope=lambda x, positions: x)) is None
    assert launch_key(ringattn.FactorExpansion(heads=4)) is not None
    assert launch_key(Mixed()) is not None
    assert launch_key(Louder()) is None
    for change in (
        lambda module: setattr(module, "forward", module.forward),
        lambda module: module.key.register_full_backward_hook(print),
        lambda module: weight_norm(module.key),
        lambda module: module.register_buffer("count", torch.zeros(1)),
        lambda module: module.to("meta"),
        lambda module: module.compile(backend="eager"),
    ):
        module = ringattn.LatentExpansion(**latent)
        assert given(module) is not None
        change(module)
        assert given(module) is None


def beside_worker(rank, world_size, folder):
    """Bytes sent by calls as they come, in a rehearsal and while the caller captures; and calls that were counted."""
    transport, module, sent, worst = recording_transport(folder), Mixed(), [], 0.0
    plan = ringattn.Plan(TOKENS, world_size)
    for rehearses, captured in ((False, False), (True, False), (False, True)):
        token = rehearsing.set(rehearses)
        torch.cuda.is_current_stream_capturing = lambda captured=captured: captured
        worst = max(worst, compared(module, plan.with_documents((0, 5, 6, TOKENS)), rank, transport, 0, lag=1))
        worst = max(worst, compared(module, plan, rank, transport, 0))
        rehearsing.reset(token)
        sent.append(transport.stats.take().bytes_sent)
    return worst, sent, list(transport._graphs._calls.values())


def test_a_rehearsal_and_a_capture_by_the_caller_launch_what_other_calls_launch(tmp_path):
    for worst, sent, calls in run_ranks(beside_worker, 2, str(tmp_path)):
        assert worst <= 1e-5
        assert len(set(sent)) == 1
        assert calls == [1] * 4  # forward and backward; neither of the others leads to a graph


def refused_worker(rank, world_size, folder, again):
    """A rank's module makes wider keys of the same payload, after calls that were right."""
    transport, plan, module = recording_transport(folder), ringattn.Plan(TOKENS, world_size), Mixed()
    for step in range(4):
        compared(module, plan, rank, transport, step)
    if rank == 0:
        module.weight, module.shift = nn.Parameter(torch.randn(8, 9)), nn.Parameter(torch.randn(9))
    compared(module, plan if again else plan.with_documents(None), rank, transport, 0)


@pytest.mark.parametrize("again", [False, True])
def test_what_a_module_makes_is_looked_at_anew_if_its_parameters_have_other_sizes(again, tmp_path):
    outcomes = run_ranks(refused_worker, 2, str(tmp_path), again, check=False, timeout=90)
    assert isinstance(outcomes[0].error, ringattn.TopologyError)
    assert "expand: expected keys of q's width 8, got 9" in str(outcomes[0].error)
    if not again:  # under another plan all ranks are asked
        assert "arguments refused there" in str(outcomes[1].error)


class Hiding(Mixed):
    """Claims to compute with its parameters alone."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def forward(self, k, v, positions):
        return k * self.other, v

    def launch_key(self):
        return ()


def test_every_payload_and_every_module_is_looked_at():
    plan = ringattn.Plan(TOKENS, 1)

    def attend(expand, *widths):
        tensors = [torch.randn(1, TOKENS, 4, width, requires_grad=True) for width in widths]
        return ringattn.ring_attention(*tensors, plan.with_documents(None), expand=expand)

    factors = ringattn.FactorExpansion(heads=4)
    for width in (8, 12):
        attend(factors, width, 4 + width, 4 + width)
    attend(Hiding(torch.ones(1)), 8, 8, 8)
    with pytest.raises(ValueError, match="it uses 1 tensors with gradients that the ring cannot see"):
        attend(Hiding(torch.ones(1, requires_grad=True)), 8, 8, 8)


def self_check_worker(rank, world_size, folder):
    told, sizes = [], {"heads": 4, "latent_dim": 6, "rotary_dim": 4, "nope_dim": 8, "value_dim": 8}
    for fault in (None, without_new_inputs):
        transport = recording_transport(f"{folder}/{fault is None}")
        if fault is not None:
            fault(transport._graphs)
        try:
            ringattn.self_check(
                heads=4,
                kv_heads=4,
                head_dim=12,
                value_dim=8,
                dtype=torch.float64,
                payload=((1, 6), (1, 4)),
                expand=lambda: ringattn.LatentExpansion(**sizes, rope=Rope()),
                group=dist.group.WORLD,
                transport=transport,
            )
            told.append(f"right, {len(transport._graphs._captured)} graphs")
        except ringattn.SelfCheckError as error:
            told.append(str(error))
    return told


def test_the_self_check_looks_at_what_graphs_give(tmp_path):
    for name in ("True", "False"):
        (tmp_path / name).mkdir()
    for right, wrong in run_ranks(self_check_worker, 2, str(tmp_path), timeout=60):
        assert right == "right, 2 graphs"
        assert "attention as this run would compute it is wrong" in wrong
