"""Every kind of attention over a ring of GPUs: gradients against float64, and training as in one process."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringattn
from launch.errors import EXIT_DONE
from model.decoder import Decoder
from model.memory import Memory
from tests.launch.runs import losses, settings, train_worker, write_corpus
from tests.model.dense import random_row
from tests.model.kinds import kind
from tests.processes import run_ranks

pytestmark = pytest.mark.gpu

LENGTH = 517
KINDS: dict[str, dict[str, Any]] = {
    "mha": {"kv_heads": 4},
    "mqa": {"kv_heads": 1},
    "gqa": {"kv_heads": 2},
    "mla": {"latent_dim": 64, "rope_dim": 32, "value_dim": 64, "kv_heads": 4, "qk_norm": False},
    "tpa": {"query_rank": 3, "key_rank": 2, "value_rank": 2, "qk_norm": False},
    "sas": {"simulated_heads": 8, "simulated_dim": 96, "kernel_size": 5},
}
SELECTIONS = {name: (None, "lagged", "guided learned", *(("exact",) if name == "gqa" else ())) for name in KINDS}
# Scalars and biases are sums of terms that nearly cancel; in bf16 their sign may be all that is left.
SHORT = ("selector", "bias")


def need(processes: int) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs, there are {torch.cuda.device_count()}")


def gradients(name: str, selection: str | None, dtype: torch.dtype, rank: int, size: int) -> dict[str, torch.Tensor]:
    """Loss and gradients of a decoder over the ring, whole on every rank, on the CPU in fp64."""
    config = kind(name, selection, dim=128, heads=4, head_dim=64, ffn_dim=256, layers=3, **KINDS[name])
    module = Decoder(config, Memory(recompute=True))
    module.init_weights(1)
    module = module.to("cuda", dtype)
    plan = ringattn.Plan(LENGTH, size, documents=(0, 200, 201, LENGTH))
    group = dist.group.WORLD if size > 1 else None
    attention = functools.partial(ringattn.ring_attention, plan=plan, group=group)
    tokens, labels, _ = (x.cuda() for x in random_row(config, LENGTH))
    cut = (ringattn.shard(x, plan, rank) for x in (tokens, labels))
    loss = module(*cut, plan.positions(rank).cuda(), attention, 64)
    loss.backward()
    found = {"loss": loss.detach()} | {key: x.grad for key, x in module.named_parameters() if x.grad is not None}
    found = {key: x.double() for key, x in found.items()}
    if group is not None:
        for x in found.values():
            dist.all_reduce(x)
    return {key: x.cpu() for key, x in found.items()}


def on_nccl(rank: int, size: int, store: str) -> None:
    """Leave the gloo world of `run_ranks` for one of GPUs."""
    os.environ["LOCAL_RANK"] = str(rank)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.destroy_process_group()
    dist.init_process_group("nccl", store=dist.FileStore(store, size), rank=rank, world_size=size, device_id=device)


def gradient_worker(rank: int, size: int, store: str, name: str) -> list[dict[str, torch.Tensor]] | None:
    on_nccl(rank, size, store)
    found = [gradients(name, selection, torch.bfloat16, rank, size) for selection in SELECTIONS[name]]
    return None if rank else found


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_every_kind_are_no_worse_than_in_one_process(name: str, size: int) -> None:
    need(size)
    with tempfile.TemporaryDirectory() as folder:
        rings = run_ranks(gradient_worker, size, str(Path(folder) / "store"), name, timeout=500)[0]
    for selection, ring in zip(SELECTIONS[name], rings, strict=True):
        alone, truth = (gradients(name, selection, dtype, 0, 1) for dtype in (torch.bfloat16, torch.float64))
        assert ring.keys() == alone.keys() == truth.keys()
        for key, exact in truth.items():
            off, same = (float((x[key] - exact).norm() / exact.norm()) for x in (ring, alone))
            floor = 2e-3 if key == "loss" else 0.3 if any(word in key for word in SHORT) else 0.02
            assert off <= 2.0 * same + floor, (selection, key, off, same)


def train_on_nccl(rank: int, size: int, store: str, runs: list[dict[str, dict[str, Any]]]) -> list[int]:
    on_nccl(rank, size, store)
    return train_worker(rank, size, runs)


@pytest.mark.parametrize(
    ("name", "guided"), [("mla", False), ("tpa", False), ("sas", False), ("gqa", True), ("sas", True)]
)
def test_training_over_a_ring_of_gpus_follows_one_process(tmp_path: Path, name: str, guided: bool) -> None:
    need(2)
    corpus, found = write_corpus(tmp_path), {}
    for size in (1, 2):
        nested = settings(corpus, tmp_path / str(size), optim__steps=6, optim__warmup_steps=0)
        nested["run"]["device"] = "cuda"
        nested["engine"] = {"name": "fsdp", "precision": "bf16", "compile": False}
        nested["model"] |= {"dim": 128, "head_dim": 64, "attention": name, **KINDS[name]}
        if guided:
            nested["model"] |= {"selection": True, "selection_gain": "learned", "selection_guide": True}
        store = str(tmp_path / f"store {size}")
        assert run_ranks(train_on_nccl, size, store, [nested], timeout=300) == [[EXIT_DONE]] * size
        found[size] = losses(tmp_path / str(size))
    assert found[1][-1] < found[1][0] - 0.2  # it learns, so the comparison means something
    assert max(abs(a - b) / b for a, b in zip(found[2], found[1], strict=True)) <= 5e-3, found
