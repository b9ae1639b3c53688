"""When ranks can reach each other's memory: two hosts are two even if they have one name, and GPUs are told apart."""

import gc
import os
import socket
import sys
import weakref
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.transport import peer_memory
from tests.processes import run_ranks


def test_a_host_is_its_name_and_its_last_start(tmp_path, monkeypatch):
    names = []
    for number in ("one", "two"):
        (tmp_path / number).write_text(f"{number}\n")
        monkeypatch.setattr(peer_memory, "_BOOT", tmp_path / number)
        names.append(peer_memory.host_name())
    assert names == [f"{socket.gethostname()} (boot one)", f"{socket.gethostname()} (boot two)"]
    monkeypatch.setattr(peer_memory, "_BOOT", tmp_path / "missing")
    assert peer_memory.host_name() == socket.gethostname()


@contextmanager
def gpus(rank, uuids, names, reach):
    """As on GPUs: uuids and hosts of the ranks, all GPUs visible to each; reach: (from, to) by uuid."""
    own = sorted(set(uuids))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda group: "nccl")
        patch.setattr(torch.cuda, "current_device", lambda: own.index(uuids[rank]))
        patch.setattr(torch.cuda, "device_count", lambda: len(own))
        patch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=own[number]))
        patch.setattr(torch.cuda, "can_device_access_peer", lambda here, there: (own[here], own[there]) in reach)
        patch.setattr(peer_memory, "host_name", lambda: names[rank])
        yield


def refused_worker(rank, world_size, uuids, names, reach):
    with gpus(rank, uuids, names, reach):
        problem = peer_memory.peer_memory_problem(dist.group.WORLD)
        if problem is None:
            return None
        with pytest.raises(ringattn.TopologyError) as caught:
            ringattn.make_transport("copy_engine", dist.group.WORLD)
        fallback = ringattn.make_transport("auto", dist.group.WORLD)
        assert str(caught.value) == f"transport: copy_engine cannot be had: {problem}; use transport='auto' or 'p2p'"
        assert fallback.description == f"p2p over nccl (copy_engine cannot be had: {problem})"
    return problem


@pytest.mark.parametrize(
    ("uuids", "names", "reach", "expected"),
    [
        ("ab", "hh", {("a", "b"), ("b", "a")}, None),
        ("ab", "hh", {("a", "b")}, "rank 1: its GPU has no peer access to that of rank 0"),
        ("aa", "hh", {}, "rank 0: two ranks share one GPU"),
        ("ab", "hi", {("a", "b"), ("b", "a")}, "rank 0: the ranks are on 2 hosts (h, i)"),
        ("aa", "hi", {}, "rank 0: the ranks are on 2 hosts (h, i)"),
    ],
)
def test_why_there_is_no_copy_engine_is_the_same_on_all_ranks(uuids, names, reach, expected):
    assert run_ranks(refused_worker, 2, uuids, names, reach) == [expected] * 2


def inside_worker(rank, world_size, uuids, names, reach):
    with gpus(rank, uuids, names, reach):
        return peer_memory.peer_memory_problem(dist.group.WORLD, inside_hosts=True)


@pytest.mark.parametrize(
    ("uuids", "names", "reach", "expected"),
    [
        ("abcd", "hhii", {*zip("abcd", "badc", strict=True)}, None),
        ("abab", "hhii", {*zip("ab", "ba", strict=True)}, None),  # GPUs of one name on either host
        ("abcd", "hhii", {*zip("abc", "bad", strict=True)}, "rank 3: its GPU has no peer access to that of rank 2"),
        ("abcc", "hhii", {*zip("ab", "ba", strict=True)}, "rank 2: two ranks share one GPU"),
        ("aaaa", "hijk", {}, None),
    ],
)
def test_inside_hosts_ranks_of_other_hosts_are_not_asked_after(uuids, names, reach, expected):
    assert run_ranks(inside_worker, 4, uuids, names, reach) == [expected] * 4


def rendezvous_worker(rank, world_size, counts):
    try:
        peer_memory.agree_on_rendezvous(dist.group.WORLD, counts[rank])
    except ringattn.TopologyError as error:
        return str(error)
    return None


@pytest.mark.parametrize("counts", [(2, 2, 2), (2, 0, 2)])
def test_a_rendezvous_that_would_hang_is_refused_on_all_ranks(counts):
    """Ranks 0 and 2 were in a ring that rank 1 was not in."""
    found = run_ranks(rendezvous_worker, 3, counts)
    if len(set(counts)) == 1:
        assert found == [None] * 3
        return
    assert len(set(found)) == 1
    assert "(rank 0: 2, rank 1: 0, rank 2: 2)" in found[0]
    assert "use transport='p2p' for rings that overlap" in found[0]


def test_after_one_that_failed_no_other_is_begun():
    found = run_ranks(rendezvous_worker, 3, (1, peer_memory._BROKEN, 1))
    assert len(set(found)) == 1
    assert "once that of rank 1 could not" in found[0]
    assert "use transport='p2p'" in found[0]


def mapping_worker(rank, world_size, fails, number=0):
    """What two regions after each other end with, of which one cannot be mapped on some rank, and its region's size."""
    numbers = iter(range(2))

    def rendezvous(own, group):
        if next(numbers) == number and rank == fails:
            raise RuntimeError("invalid device ordinal")
        return SimpleNamespace(get_buffer=lambda place, sizes, dtype: torch.empty(sizes, dtype=dtype))

    symmetric = SimpleNamespace(empty=torch.empty, rendezvous=rendezvous)
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda *device: None)
        patch.setitem(sys.modules, "torch.distributed._symmetric_memory", symmetric)
        patch.setattr(torch.distributed, "_symmetric_memory", symmetric, raising=False)
        memory = peer_memory.CudaPeerMemory(dist.group.WORLD, torch.device("cpu"))
        for size in (1, 2**21 + 1):
            try:
                told.append(str(memory.reserve(size)))
            except ringattn.TopologyError as error:
                told.append(str(error))
    return *told, [len(memory.region(place)) for place in range(world_size)] if memory._size else None


def test_a_region_that_could_not_be_mapped_is_the_last_one():
    for first, second, sizes in run_ranks(mapping_worker, 2, 1):
        assert "cannot map the other ranks' GPU memory: rank 1: RuntimeError: invalid device ordinal" in first
        assert "expected ranks whose peer memory could be mapped so far" in second
        assert sizes is None
    assert run_ranks(mapping_worker, 2, None) == [("True", "True", [2**22] * 2)] * 2


def test_where_bigger_regions_could_not_be_mapped_on_one_rank_all_keep_the_old_ones():
    for first, second, sizes in run_ranks(mapping_worker, 2, 1, 1):
        assert first == "True"
        assert "cannot map the other ranks' GPU memory: rank 1" in second
        assert sizes == [2**21] * 2


class Own:
    """What a step has made before it fails."""


def holding_worker(rank, world_size):
    """Whether what a failed step made is gone when the error has been dealt with, without the garbage collector."""
    made = []

    def step():
        with peer_memory.all_or_none(dist.group.WORLD, "map them", "Expected GPUs"):
            own = Own()
            made.append(weakref.ref(own))
            if rank == 0:
                raise RuntimeError("invalid device ordinal")

    gc.disable()
    with suppress(ringattn.TopologyError):
        step()
    gone = made[0]() is None
    gc.enable()
    return gone


def test_what_a_failed_step_has_made_is_not_held():
    assert run_ranks(holding_worker, 2) == [True, True]


def reserving_worker(rank, world_size):
    """Which switches of multicast are set when memory is made."""
    found = {}

    def note(*arguments):
        found.update({name: os.environ.get(name) for name in SWITCHES})
        raise RuntimeError("no GPU")

    for name in SWITCHES:
        os.environ.pop(name, None)
    os.environ["NCCL_NVLS_ENABLE"] = "1"  # somebody's wish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", note)
        with pytest.raises(RuntimeError, match="no GPU"):
            peer_memory.CudaPeerMemory(dist.group.WORLD, torch.device("cpu")).reserve(1)
    return found


SWITCHES = ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST")


def test_peer_memory_is_made_without_multicast():
    assert run_ranks(reserving_worker, 1) == [{SWITCHES[0]: "1", SWITCHES[1]: "1"}]


def first_message_worker(rank, world_size, step):
    """Which switches of multicast are set at the first message of what makes a transport."""
    found = {}
    arguments = ("auto", dist.group.WORLD) if step == "make_transport" else (dist.group.WORLD, 1)

    def note(*given, **options):
        found.update({name: os.environ.get(name) for name in SWITCHES})
        raise RuntimeError("no NCCL")

    for name in SWITCHES:
        os.environ.pop(name, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", note)
        with pytest.raises(ringattn.PeerError, match="no NCCL"):
            getattr(ringattn, step)(*arguments)
    return found


@pytest.mark.parametrize("step", ["make_transport", "make_ulysses"])
def test_multicast_is_off_before_the_first_message(step):
    assert run_ranks(first_message_worker, 1, step) == [{SWITCHES[0]: "0", SWITCHES[1]: "1"}]


def failing_worker(rank, world_size, failures):
    """What each rank raises when a step fails on some."""
    try:
        with peer_memory.all_or_none(dist.group.WORLD, "map them", "Expected GPUs"):
            if rank in failures:
                raise failures[rank]
    except Exception as error:
        return type(error), str(error)
    return None


def test_where_peer_memory_cannot_be_had_on_one_rank_all_are_told():
    assert run_ranks(failing_worker, 3, {}) == [None] * 3
    lost = RuntimeError("CUDA driver error: invalid device ordinal\nand more")
    found = run_ranks(failing_worker, 3, {1: lost, 2: AttributeError("None has no get_buffer")})
    assert len(set(found)) == 1
    kind, message = found[0]
    assert kind is ringattn.TopologyError
    assert (
        "copy_engine cannot map them: rank 1: RuntimeError: CUDA driver error: invalid device ordinal. Expected GPUs; "
        in message
    )
    assert message.endswith("use transport='p2p', which needs none")
    wordless = run_ranks(failing_worker, 2, {1: AssertionError()})
    assert all("cannot map them: rank 1: AssertionError: . Expected" in message for _, message in wordless)
    first, second = run_ranks(failing_worker, 2, {1: torch.OutOfMemoryError("no room")})
    assert first[0] is ringattn.TopologyError
    assert second == (torch.OutOfMemoryError, "no room")


def patience_worker(rank, world_size):
    group = dist.new_group(range(world_size), timeout=timedelta(seconds=6))
    memory = peer_memory.CudaPeerMemory(group, torch.device("cpu"))
    told = peer_memory.CudaPeerMemory(group, torch.device("cpu"), lambda: timedelta(seconds=4))
    limits = [memory.patience_ms(), told.patience_ms()]
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=9), group)
    return [*limits, memory.patience_ms()]


def test_barriers_wait_as_long_as_the_group_unless_told_otherwise():
    assert run_ranks(patience_worker, 1) == [[6000, 4000, 9000]]
