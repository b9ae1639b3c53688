"""The self-check passes what is right, and names on all ranks what is wrong: each fault is planted in a real ring."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.kernels import KERNELS
from ringattn.kernels.reference import ReferenceKernel
from ringattn.selfcheck import _fewer_heads, _length
from ringattn.transport.p2p import P2PTransport
from tests.processes import run_ranks

SHAPE = {"heads": 8, "kv_heads": 4, "head_dim": 8}
SAS = {"heads": 4, "kv_heads": 2, "simulated_heads": 8, "head_dim": 8, "simulated_dim": 12, "kernel_size": 3}
SIMULATED = {
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 12,
    "value_dim": 8,
    "payload": ((2, 8), (2, 8)),
    "expand": lambda: ringattn.SimulatedScore(**SAS).key_value,
}
FACTORS = {
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 6,
    "payload": ((2, 10), (3, 10)),
    "expand": partial(ringattn.FactorExpansion, heads=4),
}


def right_runs():
    learned = ringattn.Selection(head=3, gain=torch.zeros(1), memory_tau=1.0)
    return [
        {**SHAPE, "documents": True},
        {**SHAPE, "documents": True, "layout": "striped", "window": 4096, "sinks": 4, "dtype": torch.float64},
        {**SHAPE, "causal": False, "layout": "contiguous", "kernel": "reference", "dtype": torch.bfloat16},
        {**SHAPE, "documents": True, "selection": learned, "guided": True},
        {**SHAPE, "selection": ringattn.Selection(head=5, lag=4096), "dtype": torch.bfloat16},
        {**SIMULATED, "documents": True, "selection": ringattn.Selection(head=6), "dtype": torch.bfloat16},
        {**FACTORS, "scale": 0.3},
    ]


def right_worker(rank, world_size):
    group = dist.group.WORLD if world_size > 1 else None
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = [ringattn.self_check(group=group, **run) for run in right_runs()]
    assert torch.equal(torch.get_rng_state(), before)
    return found


@pytest.mark.parametrize(
    "cp_size", [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_what_is_right_passes_within_the_time(cp_size):
    for report in run_ranks(right_worker, cp_size)[0]:
        assert report.seconds < 5.0
        assert report.cp_size == cp_size
        assert report.seq_len % 2 == 1
        assert report.seq_len % cp_size or cp_size == 1
        assert {"out", "dq", "dk", "dv"} <= report.errors.keys() == report.tolerances.keys()
        for name, error in report.errors.items():
            assert error <= report.tolerances[name], name
            assert error > 0, name  # it compares something


def stats_worker(rank, world_size):
    transport = ringattn.make_transport("p2p", dist.group.WORLD)
    ringattn.self_check(group=dist.group.WORLD, transport=transport, **SHAPE)
    return transport.stats.take().hops


def test_it_leaves_no_counts_behind():
    assert run_ranks(stats_worker, 2) == [0, 0]


def ulysses_worker(rank, world_size, degree):
    made = {layout: ringattn.make_ulysses(dist.group.WORLD, degree, layout=layout) for layout in ("zigzag", "striped")}
    learned = ringattn.Selection(head=3, gain=torch.zeros(1), memory_tau=1.0)
    runs = [
        {**SHAPE, "documents": True, "dtype": torch.bfloat16},
        {**SHAPE, "layout": "striped", "window": 4096, "sinks": 4},
        {**SHAPE, "documents": True, "selection": learned, "guided": True},
        {**SIMULATED, "selection": ringattn.Selection(head=6)},
        {"heads": 12, "kv_heads": 1, "head_dim": 8},
    ]
    found = [
        ringattn.self_check(group=dist.group.WORLD, **run, ulysses=made[run.get("layout", "zigzag")]) for run in runs
    ]
    assert made["zigzag"].stats.take().hops == 0
    return [*found, ringattn.self_check(group=dist.group.WORLD, **SHAPE, ulysses=degree)]


@pytest.mark.parametrize(
    ("cp_size", "degree"),
    [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow), pytest.param(4, 4, marks=pytest.mark.slow)],
)
def test_heads_for_tokens_pass_too(cp_size, degree):
    for report in run_ranks(ulysses_worker, cp_size, degree)[0]:
        assert report.seconds < 5.0
        assert all(0 < error <= report.tolerances[name] for name, error in report.errors.items())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "degree", "expected"),
    [
        (32, 8, 1, 1, (8, 2)),
        (12, 1, 4, 1, (12, 1)),
        (32, 8, 4, 2, (16, 4)),
        (32, 8, 4, 4, (32, 8)),
        (64, 16, 4, 4, (32, 8)),
        (32, 8, 16, 16, (32, 8)),  # each key/value head to two ranks
        (36, 18, 4, 4, (36, 18)),  # to be refused as they are
        (7, 2, 1, 1, (7, 2)),
    ],
)
def test_the_heads_of_the_small_problems_can_be_dealt_out_as_the_runs(heads, kv_heads, size, degree, expected):
    assert _fewer_heads(heads, kv_heads, SimpleNamespace(size=size, degree=degree)) == expected


def swapped_heads_worker(rank, world_size, degree):
    """The exchange of heads mixes up what comes from two members."""
    from ringattn.head_exchange import HeadExchange

    right = HeadExchange.to_tokens

    def swapped(self, parcel, tensors):
        return [x.flip(2) if len(tensors) == 1 else x for x in right(self, parcel, tensors)]

    HeadExchange.to_tokens = swapped
    with pytest.raises(ringattn.SelfCheckError) as caught:
        ringattn.self_check(group=dist.group.WORLD, **SHAPE, ulysses=degree)
    return str(caught.value)


def test_a_fault_of_the_exchange_of_heads_is_told_from_one_of_the_ring():
    told = run_ranks(swapped_heads_worker, 2, 2)
    assert told[0] == told[1]
    assert "with ulysses=1 and transport='p2p' it is right, so what exchanges heads for tokens" in told[0]
    assert "ulysses of degree 2" in told[0]
    assert "(hop" not in told[0]


def unfit_worker(rank, world_size):
    with pytest.raises(ringattn.TopologyError, match="got 36 and 18 heads; possible over 4 ranks: 2; or use the ring"):
        ringattn.self_check(heads=36, kv_heads=18, head_dim=8, group=dist.group.WORLD, ulysses=4)


def test_heads_that_do_not_fit_the_run_are_not_made_to_fit():
    run_ranks(unfit_worker, 4)


class IgnoresCausal(ReferenceKernel):
    def forward(self, q, k, v, *, causal, mask, scale):
        return super().forward(q, k, v, causal=False, mask=mask, scale=scale)

    def backward(self, dout, q, k, v, out, lse, *, causal, mask, scale):
        return super().backward(dout, q, k, v, out, lse, causal=False, mask=mask, scale=scale)


class IgnoresDocuments(ReferenceKernel):
    """Masks of a row with documents are dropped; without documents there are none here."""

    def forward(self, q, k, v, *, causal, mask, scale):
        return super().forward(q, k, v, causal=causal, mask=None, scale=scale)


class DropsGradient(ReferenceKernel):
    def backward(self, *tensors, **options):
        dq, dk, dv = super().backward(*tensors, **options)
        return dq, dk, torch.zeros_like(dv)


class ScalesByTheRing(ReferenceKernel):
    def backward(self, *tensors, **options):
        dq, dk, dv = super().backward(*tensors, **options)
        return dq, dk * dist.get_world_size(), dv


class GivesNothing(ReferenceKernel):
    def forward(self, *tensors, **options):
        out, lse = super().forward(*tensors, **options)
        return out * torch.nan, lse


class Tampered:
    """A message under way whose bytes are changed when they are here."""

    def __init__(self, pending, change):
        self.pending, self.change = pending, change

    def wait(self):
        self.pending.wait()
        self.change()


class TamperedTransport(P2PTransport):
    """Tells `change(where, received bytes, bytes of the message before)` of everything that arrives."""

    change = None
    before = None

    def post(self, send, send_to, receive, receive_from, where, plan):
        def changed():
            kept = receive.clone()
            type(self).change(where, receive, self.before)
            self.before = kept

        return Tampered(super().post(send, send_to, receive, receive_from, where, plan), changed)


def stale(where, received, before):
    """The second hop brings what the first one brought, as far as it reaches."""
    if where.startswith(("forward hop 2", "backward hop 2")) and "gradients" not in where:
        size = min(len(received), len(before))
        received[:size] = before[:size]


def swapped(where, received, before):
    """Keys in the place of values: a message holds one after the other."""
    if where.startswith(("forward hop 1", "backward hop 1")) and "gradients" not in where:
        received.copy_(received.roll(len(received) // 2))


def lost(where, received, before):
    if where.startswith("backward hop 1") and "gradients" in where:
        received.zero_()


def plant(fault):
    """Arguments of `self_check` with the fault in them."""
    if isinstance(fault, type):
        KERNELS["planted"] = fault()
        return {"kernel": "planted"}
    kind = type("Planted", (TamperedTransport,), {"change": staticmethod(fault)})
    return {"transport": kind(dist.group.WORLD)}


def fault_worker(rank, world_size, faults, run):
    told = []
    for fault in faults:
        try:
            ringattn.self_check(group=dist.group.WORLD, **{**run, **plant(fault)})
            told.append("nothing was raised")
        except ringattn.SelfCheckError as error:
            told.append(str(error))
    return told


FAULTS = {
    IgnoresCausal: (r"out on rank \d", r"queries of rank \d get from keys of rank \d", "kernel is wrong"),
    IgnoresDocuments: (r"out on rank \d", r"queries of rank \d get from keys of rank \d", "kernel is wrong"),
    DropsGradient: (r"dv on rank \d", r"keys of rank \d get back from queries of rank \d", "kernel is wrong"),
    ScalesByTheRing: (r"dk on rank \d", r"keys of rank \d get back from queries of rank \d", "kernel is wrong"),
    GivesNothing: (r"out on rank \d, .* got an error of nan", r"queries of rank \d get", "kernel is wrong"),
    stale: (r"out on rank \d", r"queries of rank \d get from keys of rank \d \(hop 2\)", "carries the payloads"),
    swapped: (r"out on rank \d", r"queries of rank \d get from keys of rank \d \(hop 1\)", "carries the payloads"),
    lost: (r"dk on rank \d", r"get back from queries of rank \d \(hop 1\)", "carries the payloads"),
}


def check_messages(faults, told):
    for rank_told in told[1:]:
        assert rank_told == told[0]  # the same words on all ranks
    for fault, message in zip(faults, told[0], strict=True):
        for expected in FAULTS[fault]:
            assert re.search(expected, message), (fault, expected, message)
        assert "expected within" in message
        assert "Next: " in message


KERNEL_FAULTS = [fault for fault in FAULTS if isinstance(fault, type)]
TRANSPORT_FAULTS = [fault for fault in FAULTS if not isinstance(fault, type)]


def test_faults_of_a_kernel_are_named_on_all_ranks():
    told = run_ranks(fault_worker, 2, KERNEL_FAULTS, {**SHAPE, "documents": True})
    check_messages(KERNEL_FAULTS, told)
    assert re.search(r"queries of rank (\d) get from keys of rank \1 \(hop 0\)", told[0][0])  # causal is the diagonal


def test_faults_of_a_transport_are_named_on_all_ranks():
    check_messages(TRANSPORT_FAULTS, run_ranks(fault_worker, 3, TRANSPORT_FAULTS, SHAPE))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "striped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_faults_are_named_in_every_layout_and_precision(layout, dtype):
    run = {**SHAPE, "documents": True, "layout": layout, "dtype": dtype}
    check_messages(FAULTS, run_ranks(fault_worker, 4, list(FAULTS), run))


def test_documents_must_be_asked_for():
    """Without documents in the run, a kernel that ignores masks does no harm, and is not blamed."""
    assert run_ranks(fault_worker, 2, [IgnoresDocuments], SHAPE) == [["nothing was raised"]] * 2


class LosesPositions(torch.nn.Module):
    """An expansion that is right at home and wrong elsewhere: as if RoPE had taken places in the shard."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, k, v, positions):
        turn = torch.cos(positions.to(k.dtype) - (positions[0] if k.dtype != torch.float64 else 0))
        return k * turn[:, None, None], v


def test_a_fault_of_expand_is_not_put_on_the_ring():
    run = {**SHAPE, "payload": ((4, 8), (4, 8)), "expand": LosesPositions}
    for message in run_ranks(expand_worker, 2, run):
        assert re.search(r"out on rank \d", message), message
        assert "without selection and expand the same ring is right" in message


def expand_worker(rank, world_size, run):
    with pytest.raises(ringattn.SelfCheckError) as caught:
        ringattn.self_check(group=dist.group.WORLD, **run)
    return str(caught.value)


def test_bad_arguments_are_refused_as_by_ring_attention():
    with pytest.raises(ValueError, match="multiple of key/value heads"):
        ringattn.self_check(heads=3, kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="kernel: expected auto or one of"):
        ringattn.self_check(heads=2, kv_heads=2, head_dim=8, kernel="fast")


@pytest.mark.parametrize("name", ["heads", "kv_heads", "head_dim", "value_dim"])
def test_sizes_of_nothing_are_refused_by_name(name):
    with pytest.raises(
        ValueError, match=f"self_check: {name}: expected 1 or more, got 0; give that of the run's model"
    ):
        ringattn.self_check(**{"heads": 2, "kv_heads": 2, "head_dim": 8, name: 0})


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"self_check: device: expected one that .* got 'cuda:0' .*give device='cpu'"):
        ringattn.self_check(heads=2, kv_heads=2, head_dim=8, device="cuda:0")


def test_problems_on_gpus_are_long_enough_for_the_tiles_of_a_lag():
    """Four groups of it at least, up to lag 128: multiples of that have other tiles, and one stands for all."""
    for lag, least in ((1, 257), (100, 401), (128, 513), (512, 513)):
        length = _length(4, "cuda", lag)
        assert least <= length <= least + 2
        assert length % 4
    assert _length(4, "cpu", 128) == _length(4, "cpu", 1)
