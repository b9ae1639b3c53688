"""Who am I: launchers' variables, the mesh, its groups, timeouts and the small agreements over them."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.config import Config
from launch.errors import ConfigError, PeerLost, exit_status_of
from launch.topology import Launch, Topology, choose_device, read_launch
from launch.train import as_lost_peer
from tests.processes import run_ranks

RENDEZVOUS = {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}


def config(device: str = "cpu", **parallel: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "unused", "device": device},
            "data": {"seq_len": 64},
            "optim": {"steps": 1, "rows_per_step": 12},
            "parallel": parallel,
        }
    )


def test_processes_join_without_multicast(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL asks the environment when the first group is made."""
    found: dict[str, str | None] = {}

    def join(*arguments: Any, **named: Any) -> None:
        found.update({name: os.environ.get(name) for name in ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST")})
        raise RuntimeError("nobody there")

    for name in ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST"):
        monkeypatch.setenv(name, "")  # so that it is as before when the test is over
        monkeypatch.delenv(name)
    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(PeerLost, match="nobody there"):
        Topology.start(config())
    assert found == {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(rank=0, world_size=1, local_rank=0, address=None)),
        ({"MASTER_ADDR": "left over"}, Launch(rank=0, world_size=1, local_rank=0, address=None)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **RENDEZVOUS},
            Launch(rank=5, world_size=8, local_rank=1, address="node7:29500"),
        ),
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", **RENDEZVOUS},
            Launch(rank=3, world_size=4, local_rank=1, address="node7:29500"),
        ),
        # A batch script or a step of one task is a process on its own.
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},
            Launch(rank=0, world_size=1, local_rank=0, address=None),
        ),
    ],
)
def test_reads_each_launcher(environment: dict[str, str], expected: Launch) -> None:
    assert read_launch(environment) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, ["RANK set but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing", "torchrun"]),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, ["MASTER_ADDR", "before srun"]),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **RENDEZVOUS}, ["RANK='x'", "whole numbers"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **RENDEZVOUS}, ["RANK=2", "rank < world size"]),
    ],
)
def test_refuses_half_an_environment(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_launch(environment)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_device_choice() -> None:
    assert choose_device("cpu", 3) == torch.device("cpu")
    if not torch.cuda.is_available():
        assert choose_device("auto", 3) == torch.device("cpu")
        with pytest.raises(ConfigError, match=r"run\.device=cuda: no CUDA device"):
            choose_device("cuda", 0)


def describe(rank: int, world_size: int, parallel: dict[str, Any]) -> dict[str, Any]:
    topology = Topology.start(config(**parallel))
    ring = dist.get_process_group_ranks(topology.cp_group)
    found = {
        "place": (topology.rank, topology.dp_rank, topology.cp_rank),
        "sizes": (topology.dp, topology.cp, topology.world_size),
        "ring": ring,
        "mesh": topology.mesh.mesh.tolist(),
        "names": topology.mesh.mesh_dim_names,
        "backend": dist.get_backend(topology.cpu_group),
        "objects": topology.gather_objects({"rank": rank}),
        "any": (topology.any_true(rank == world_size - 1), topology.any_true(False)),
        "max": topology.max_of(rank / 3),
        "sum": topology.sum_of(rank + 0.1),
    }
    topology.close()
    found["left alone"] = dist.is_initialized()  # the tests' own group
    return found


@pytest.mark.parametrize(
    ("world_size", "parallel", "mesh"),
    [
        (1, {}, [[0]]),
        (2, {}, [[0, 1]]),
        (3, {"dp": 3}, [[0], [1], [2]]),
        (4, {"cp": 2}, [[0, 1], [2, 3]]),
    ],
)
def test_ranks_of_a_ring_are_consecutive(world_size: int, parallel: dict[str, Any], mesh: list[list[int]]) -> None:
    for rank, found in enumerate(run_ranks(describe, world_size, parallel)):
        dp_rank = next(index for index, ring in enumerate(mesh) if rank in ring)
        assert found["place"] == (rank, dp_rank, mesh[dp_rank].index(rank))
        assert found["sizes"] == (len(mesh), len(mesh[0]), world_size)
        assert found["ring"] == mesh[dp_rank]
        assert found["mesh"] == mesh
        assert found["names"] == ("dp", "cp")
        assert found["backend"] == "gloo"
        assert found["objects"] == [{"rank": other} for other in range(world_size)]
        assert found["any"] == (True, False)
        assert found["max"] == (world_size - 1) / 3
        assert found["sum"] == pytest.approx(sum(other + 0.1 for other in range(world_size)), rel=1e-15)
        assert found["left alone"]


def alone(rank: int, world_size: int) -> list[Any]:
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    topology = Topology.start(config())
    answers = [topology.world_size, topology.gather_objects("me"), topology.any_true(True), dist.is_initialized()]
    topology.close()
    return [*answers, dist.is_initialized()]


def test_a_process_on_its_own_needs_no_launcher() -> None:
    assert run_ranks(alone, 1) == [[1, ["me"], True, True, False]]


def launched(rank: int, world_size: int, port: int) -> tuple[int, int]:
    dist.destroy_process_group()
    # As under torchrun: the store is the agent's, so no rank has to open the port.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    topology = Topology.start(config())
    total = int(topology.sum_of(rank))
    topology.close()
    return topology.cp_rank, total


def test_joins_the_launchers_rendezvous() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert run_ranks(launched, 2, store.port) == [(0, 1), (1, 1)]


def no_peer(rank: int, world_size: int, port: int) -> str:
    dist.destroy_process_group()
    os.environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    with pytest.raises(PeerLost) as caught:
        Topology.start(config(setup_timeout_s=0.5))
    return str(caught.value)


def test_a_missing_peer_is_named_after_the_timeout() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    message = run_ranks(no_peer, 1, store.port)[0]
    assert "rank 0 of 2" in message
    assert f"127.0.0.1:{store.port}" in message
    assert "parallel.setup_timeout_s=0.5" in message


def wrong_mesh(rank: int, world_size: int) -> tuple[str, bool]:
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    with pytest.raises(ConfigError) as caught:
        Topology.start(config(cp=3))
    return str(caught.value), dist.is_initialized()


def test_a_wrong_mesh_is_refused_before_any_group() -> None:
    """Only one of the two processes exists and nothing listens on the port: a collective would hang or fail."""
    message, started = run_ranks(wrong_mesh, 1)[0]
    assert "parallel.cp=3" in message
    assert not started


def silent_peer(rank: int, world_size: int) -> list[Any]:
    topology = Topology.start(config(hop_timeout_s=0.3, setup_timeout_s=20.0))
    later = dist.new_group(timeout=timedelta(seconds=600))
    topology.adopt(later)
    seen: list[Any] = [topology.timeouts.now]
    topology.use_hop_timeout()
    with topology.patient():
        seen.append(topology.timeouts.now)
        topology.barrier()
    seen.append(topology.timeouts.now)
    if rank == 1:
        time.sleep(4)  # silent, not gone
        return seen
    began = time.monotonic()
    for group in (topology.world_group, topology.cp_group, topology.cpu_group, later):
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.zeros(1), group=group)
    assert time.monotonic() - began < 3
    return seen


def test_timeouts_are_long_before_and_short_after_the_first_step() -> None:
    wanted = [timedelta(seconds=20), timedelta(seconds=20), timedelta(seconds=0.3)]
    outcomes = run_ranks(silent_peer, 2, timeout=15.0, check=False)
    assert outcomes[0].value == wanted, outcomes[0].traceback


@pytest.mark.parametrize(
    ("cp", "text", "status"),
    [
        (2, "CUDA error: unspecified launch failure\nCUDA kernel errors might be ...", 69),
        (1, "CUDA error: unspecified launch failure", 70),
        (2, "CUDA error: an illegal memory access was encountered", 70),
    ],
)
def test_a_barrier_that_gave_up_is_a_lost_peer_with_words(cp, text, status):
    topology = SimpleNamespace(rank=1, world_size=2, cp=cp)
    error = as_lost_peer(torch.AcceleratorError(text), topology, "training", 4)
    assert exit_status_of(error) == status
    if status == 69:
        assert "rank 1 of 2 lost a peer in step 5, training: a barrier of the ring ended its kernel" in str(error)
        assert "parallel.hop_timeout_s" in str(error)
