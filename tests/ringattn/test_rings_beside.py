"""Inner rings of Ulysses beside each other: what one of them cannot have, none takes, and all ranks are told why."""

import pytest
import torch
import torch.distributed as dist

import ringattn
from tests.peer_memory import FilePeerMemory
from tests.processes import run_ranks
from tests.ringattn.test_hybrid import HiddenMemory

RING = "the ring of the world's ranks [1, 3], counted from 0 here: "
REASONS = {
    "asked": "rank 1: no peer access",
    "mapped": "cannot map the other ranks' GPU memory: rank 1: RuntimeError: invalid device ordinal. Expected GPUs",
}


def beside_worker(rank, world_size, folder, name, trouble, everywhere=False):
    """What this rank is told, when the ring of odd ranks (or each) shows trouble as it is asked, or mapped."""
    troubled = trouble is not None and (everywhere or rank % 2 == 1)

    def problem_of(group, *, inside_hosts=False):
        return REASONS["asked"] if troubled and trouble == "asked" else None

    def memory(group, device, timeout, ranks=None):
        kind = HiddenMemory if troubled and trouble == "mapped" else FilePeerMemory
        return kind(group, f"{folder}/{rank % 2}", ranks=ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ringattn.transport, "hosts_of", lambda group: ["a"] * dist.get_world_size(group))
        patch.setattr(ringattn.transport, "peer_memory_problem", problem_of)
        patch.setattr(ringattn.transport, "CudaPeerMemory", memory)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        try:
            made = ringattn.make_ulysses(dist.group.WORLD, 2, transport=name)
        except ringattn.TopologyError as error:
            return str(error)
    ringattn.self_check(heads=4, kv_heads=4, head_dim=8, group=dist.group.WORLD, ulysses=made)
    return made.transport.description


@pytest.fixture
def folder(tmp_path):
    """One for each of two rings."""
    for place in "01":
        (tmp_path / place).mkdir()
    return str(tmp_path)


@pytest.mark.parametrize("name", ["auto", "copy_engine", "hybrid"])
def test_rings_that_can_have_it_all_take_it(name, folder):
    told = run_ranks(beside_worker, 4, folder, name, None, timeout=60)
    assert all(one.startswith("copy_engine") for one in told)


@pytest.mark.parametrize("trouble", ["asked", "mapped"])
@pytest.mark.parametrize("name", ["auto", "copy_engine", "hybrid"])
def test_what_one_ring_cannot_have_none_takes(name, trouble, folder):
    """They come to their graphs in step, or are refused together."""
    told = run_ranks(beside_worker, 4, folder, name, trouble, timeout=60)
    expected = f"transport: {name} cannot be had: {RING}{REASONS[trouble]}; use transport='auto' or 'p2p'"
    if name == "auto":
        expected = f"p2p over gloo (copy_engine cannot be had: {RING}{REASONS[trouble]})"
    assert told == [expected] * 4


@pytest.mark.parametrize("name", ["auto", "copy_engine"])
def test_what_no_ring_can_have_is_no_one_ring_s_fault(name, folder):
    for one in run_ranks(beside_worker, 4, folder, name, "asked", True, timeout=60):
        assert f"copy_engine cannot be had: {REASONS['asked']}" in one


def together_worker(rank, world_size, folder, fits):
    """Rings over made-up hosts, where all ranks of the world must come to a new group together, as on NCCL."""
    hosts = "aabb" if rank % 2 == 0 or fits else "abab"
    new_group = dist.new_group

    def together(ranks, **options):
        dist.barrier()
        return new_group(ranks, **options)

    def problem_of(group, *, inside_hosts=False):
        return None if inside_hosts else "the ranks are on 2 hosts"

    def memory(group, device, timeout, ranks):
        return FilePeerMemory(group, f"{folder}/{rank % 2}", ranks=ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", together)
        patch.setattr(ringattn.transport, "hosts_of", lambda group: list(hosts))
        patch.setattr(ringattn.transport, "peer_memory_problem", problem_of)
        patch.setattr(ringattn.transport, "CudaPeerMemory", memory)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        return ringattn.make_ulysses(dist.group.WORLD, 2).transport.description


@pytest.mark.parametrize("fits", [True, False])
def test_rings_agree_on_groups_for_each_host_before_any_is_made(fits, folder):
    even, odd, *others = run_ranks(together_worker, 8, folder, fits, timeout=60)
    assert others == [even, odd] * 3
    if fits:
        assert even == odd
        assert even.startswith("copy_engine inside each of 2 hosts, p2p over gloo between them (auto: ")
        return
    assert odd == "p2p over gloo (copy_engine cannot be had: the ranks are on 2 hosts)"
    assert even == (
        "p2p over gloo (copy_engine cannot be had: the ranks are on 2 hosts; nor hybrid: the ring of the world's ranks "
        "[1, 3, 5, 7], counted from 0 here: no several hosts with equally many neighbours on each)"
    )
