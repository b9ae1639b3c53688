"""The engines over NCCL: one process, and two where there are two GPUs."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.launch.engine import toy
from tests.launch.engine.test_engines import CLIP, bad_step, check_bad_step, micros_of, train
from tests.processes import run_ranks

pytestmark = pytest.mark.gpu

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
KINDS = toy.KINDS if HAS_DEEPSPEED else ("ddp", "fsdp", "fsdp host", "fsdp keep")


def on_gpu(rank: int, world_size: int, port: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    dist.destroy_process_group()  # the test's own gloo world; Topology makes one over NCCL
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # One NCCL world for all engines of this process, as a run has one.
    toy.Topology.start(toy.toy_config("ddp", device="cuda"))
    found: dict[str, Any] = {}
    for kind in kinds:
        for precision in ("fp32", "bf16"):
            engine = toy.start(kind, device="cuda", precision=precision, clip_norm=CLIP)
            fresh = toy.own(engine.state())
            bad = bad_step(engine)
            history = train(engine, range(4))
            trained = toy.own(engine.state())
            toy.fill(engine, fresh)
            again = train(engine, range(4))
            found[f"{kind} {precision}"] = {
                "backend": dist.get_backend(engine.topology.world_group),
                "device": str(next(iter(engine.module.parameters())).device),
                "bad": bad,
                "history": history,
                "agreed": toy.same_on_all_ranks([number for pair in history for number in pair]),
                "resumed": toy.holds(engine, trained) and again == history,
            }
            engine.close()
    dist.destroy_process_group()
    return found


@cache
def results(world_size: int) -> dict[str, Any]:
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return run_ranks(on_gpu, world_size, store.port, KINDS, timeout=300.0)[0]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", toy.KINDS)
def test_training_on_gpu_follows_the_cpu(kind: str, precision: str, world_size: int) -> None:
    if kind not in KINDS:
        pytest.skip("deepspeed is not installed")
    found = results(world_size)[f"{kind} {precision}"]
    assert found["backend"] == "nccl"
    assert found["device"].startswith("cpu" if kind.endswith("host") else "cuda")
    assert found["agreed"]
    assert found["resumed"]
    check_bad_step(found["bad"])
    config = toy.toy_config("ddp", clip_norm=CLIP)
    single = toy.Reference(config, world_size=world_size, tied=True, dtype=torch.float32)
    tolerance = {"fp32": (1e-5, 1e-4), "bf16": (5e-3, 0.15)}[precision]
    for step, (loss, norm) in enumerate(found["history"]):
        wanted_loss, wanted_norm = single.step(step, micros=micros_of(step))
        assert loss == pytest.approx(wanted_loss, rel=tolerance[0]), step
        assert norm == pytest.approx(wanted_norm, rel=tolerance[1]), step
