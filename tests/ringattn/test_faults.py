"""Ranks that disagree all say so before anything is sent, and a dead peer is named."""

import os
import re
import signal
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.softmax import SoftmaxAttention
from tests.processes import run_ranks


def qkv(tokens, heads=4, groups=2, width=8, dtype=torch.float32, batch=1):
    return [torch.randn(batch, tokens, h, width, dtype=dtype, requires_grad=True) for h in (heads, groups, groups)]


def in_float8(tensors):
    return [x.detach().to(torch.float8_e4m3fn) for x in tensors]


def votes_worker(rank, world_size, counts):
    """Each rank comes with its number of earlier layers' votes."""
    votes = [torch.randn(1, 16, 8) for _ in range(2)]
    earlier = tuple(
        ringattn.Votes(q=votes[0], k=votes[1], weight=torch.tensor([0.1]), scale=None) for _ in range(counts[rank])
    )
    selection = ringattn.Selection(gain=0.3, earlier=earlier)
    group = dist.new_group(timeout=timedelta(seconds=4))
    with pytest.raises(ringattn.PeerError) as caught:
        ringattn.ring_attention(*qkv(16), ringattn.Plan(32, world_size), group, selection=selection)
    return str(caught.value)


@pytest.mark.parametrize("counts", [(0, 1), (2, 1)])
def test_other_numbers_of_votes_end_no_process(counts):
    """Messages of other sizes meet: gloo aborts where they have the same tag."""
    for message in run_ranks(votes_worker, 2, counts):
        assert "died or did not answer in time" in message


def disagree_worker(rank, world_size, kind):
    plan = ringattn.Plan(24, world_size, causal=not (kind == "plan" and rank == 1))
    if rank == 1 and kind == "hosts":
        plan = replace(plan, hosts=world_size)
    tokens = plan.shard_len(rank)
    tensors = qkv(tokens)
    if rank == 1 and kind == "dtype":
        tensors = qkv(tokens, dtype=torch.bfloat16)
    if rank == 1 and kind == "batch":
        tensors = qkv(tokens, batch=2)
    if rank == 1 and kind == "length":
        tensors = qkv(tokens + 1)
    if kind == "documents":
        plan = plan.with_documents([0, 8 + rank, 24])
    if kind == "float8":
        tensors = in_float8(tensors)
    scale = 2.0 if rank == 1 and kind == "scale" else None
    transport = ringattn.make_transport("p2p", dist.group.WORLD)
    try:
        ringattn.ring_attention(*tensors, plan, dist.group.WORLD, scale=scale, transport=transport)
    except ringattn.TopologyError as error:
        assert transport.stats.take().bytes_sent == 0
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("dtype", "rank 1: .*bfloat16"),
        ("batch", "rank 1: .*batch 2"),
        ("plan", "rank 1: plan"),
        ("hosts", "what differs: plan\n"),
        ("length", "rank 1"),
        ("scale", "rank 1: .*scale 2"),
        ("documents", "rank 2: .*documents"),
        ("float8", "q, k, v need one dtype of fp64, fp32, bf16, fp16; got torch.float8_e4m3fn"),
    ],
)
def test_ranks_that_disagree_or_cannot_all_raise_before_any_hop(kind, expected):
    for message in run_ranks(disagree_worker, 3, kind):
        assert re.search(expected, message), message


def changed_worker(rank, world_size):
    plan = ringattn.Plan(24, world_size)
    ringattn.ring_attention(*qkv(plan.shard_len(rank)), plan, dist.group.WORLD)
    try:
        ringattn.ring_attention(*qkv(plan.shard_len(rank), dtype=torch.float64), plan, dist.group.WORLD)
    except ringattn.TopologyError as error:
        return str(error)
    return "nothing was raised"


def test_a_shape_that_changes_under_an_agreed_plan_is_refused_without_a_collective():
    for message in run_ranks(changed_worker, 2):
        assert "have changed: agreed" in message
        assert "float32, scale 0.353553; now" in message
        assert "Build another Plan" in message


def groups_worker(rank, world_size):
    """Rank 0 is in two rings, one after the other, and uses one plan for both."""
    pairs = [(0, 1), (0, 2)]
    groups = [dist.new_group(pair, timeout=timedelta(seconds=5)) for pair in pairs]
    plan = ringattn.Plan(16, 2)
    for pair, group in zip(pairs, groups, strict=True):
        if rank in pair:
            ringattn.ring_attention(*qkv(8), plan, group)


def test_a_plan_is_agreed_on_with_each_group():
    run_ranks(groups_worker, 3)


def killed_worker(rank, world_size, phase):
    plan = ringattn.Plan(64, world_size)
    transport = ringattn.make_transport("p2p", dist.group.WORLD)
    transport.stats.layer = 4
    post = transport.post

    def fault(send, send_to, receive, receive_from, where, plan):
        if rank == 1 and where.startswith(f"{phase} hop 2"):
            os.kill(os.getpid(), signal.SIGKILL)
        return post(send, send_to, receive, receive_from, where, plan)

    transport.post = fault
    started = time.monotonic()
    try:
        ringattn.ring_attention(
            *qkv(plan.shard_len(rank)), plan, dist.group.WORLD, transport=transport
        ).sum().backward()
    except ringattn.PeerError as error:
        return time.monotonic() - started, str(error)
    return None


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_killed_rank_is_reported_by_its_neighbours_within_two_seconds(phase):
    outcomes = run_ranks(killed_worker, 3, phase, check=False)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for rank in (0, 2):
        seconds, message = outcomes[rank].value
        assert seconds < 2.0
        assert f"ring rank {rank}, layer 5, {phase} hop" in message
        assert "a neighbour died or did not answer" in message


def out_of_memory(*arguments, **options):
    raise torch.OutOfMemoryError("planted")


def void_worker(rank, world_size, by_name, phase):
    """Rank 0 alone breaks off amid a pass, and then calls under plans that the ranks have not agreed on."""
    group, plan, told = dist.group.WORLD, ringattn.Plan(64, world_size), []
    transport = "p2p" if by_name else ringattn.make_transport("p2p", group)

    def call(plan, times=1):
        if times > 1:
            call(plan, times - 1)
        out = ringattn.ring_attention(*qkv(plan.shard_len(rank)), plan, group, transport=transport)
        if phase == "backward":
            out.sum().backward()

    call(plan)
    if rank:
        with pytest.raises(ringattn.PeerError, match="a neighbour died or did not answer"):
            call(plan, times=2)  # what rank 0 had sent before may do for one of them
        return None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SoftmaxAttention, f"_{phase}", broken_off(getattr(SoftmaxAttention, f"_{phase}")))
        with pytest.raises(torch.OutOfMemoryError):
            call(plan)
    # By name, a plan that is not derived from this one has another transport.
    for other in (plan.with_documents([0, 9, 64]), *(() if by_name else (ringattn.Plan(32, world_size),))):
        began = time.monotonic()
        with pytest.raises(ringattn.PeerError) as caught:
            call(other)
        told.append((time.monotonic() - began, str(caught.value)))
    return told


def broken_off(step):
    """The same pass without memory for its blocks."""

    def run(work, *arguments):
        work._blocks = out_of_memory
        return step(work, *arguments)

    return run


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_after_a_pass_that_broke_off_a_rank_agrees_on_nothing(phase, by_name):
    for seconds, message in run_ranks(void_worker, 2, by_name, phase)[0]:
        assert f"an earlier pass ({phase}) broke off on this rank" in message
        assert seconds < 0.5


def silent_worker(rank, world_size):
    plan = ringattn.Plan(64, world_size)
    transport = ringattn.make_transport("p2p", dist.group.WORLD, timeout=lambda: timedelta(seconds=1.0))
    tensors = qkv(plan.shard_len(rank))
    ringattn.ring_attention(*tensors, plan, dist.group.WORLD, transport=transport)
    if rank == 1:
        time.sleep(4.0)
        return None
    started = time.monotonic()
    try:
        ringattn.ring_attention(*tensors, plan, dist.group.WORLD, transport=transport)
    except ringattn.PeerError as error:
        return time.monotonic() - started, str(error)
    return None


def test_a_silent_rank_is_reported_after_the_timeout_in_force():
    seconds, message = run_ranks(silent_worker, 2, check=False)[0].value
    assert 0.9 < seconds < 3.0
    assert "forward hop 1" in message


def out_of_step_worker(rank, world_size, reordered):
    """One rank goes another way than the others; what it says, or how far its last result is off."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    plan, other = ringattn.Plan(32, world_size), ringattn.Plan(32, world_size, causal=False)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, 32, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]

    def attend(plan, *, grad=False):
        shards = [ringattn.shard(x, plan, rank).requires_grad_(grad) for x in whole]
        return ringattn.ring_attention(*shards, plan, group, transport="p2p")

    for one in (plan, other):  # agreed on, so that nothing is asked later
        attend(one)
    try:
        if reordered:
            for one in (other, plan) if rank else (plan, other):
                attend(one)
            return "done"
        out = attend(plan, grad=rank == 0)  # on rank 1 nothing wants gradients, by mistake
        if rank == 0:
            out.sum().backward()
        attend(plan)
        return "done"
    except ringattn.PeerError as error:
        return str(error)


@pytest.mark.parametrize("reordered", [False, True])
def test_passes_out_of_step_are_an_error_and_no_wrong_numbers(reordered):
    for told in run_ranks(out_of_step_worker, 2, reordered, timeout=60):
        assert "a neighbour died or did not answer in time" in told
