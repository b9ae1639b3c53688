"""State that goes from engine to engine through torch's distributed checkpoints, and bf16 with fp32 masters."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from launch.engine import Engine
from launch.errors import CheckpointError
from tests.launch.engine import toy
from tests.processes import run_ranks

CHAIN = ("ddp", "fsdp", "fsdp host", "zero1", "zero2", "zero3", "zero0", "ddp")


def hand_over(rank: int, world_size: int, folder: str) -> tuple[list[tuple[str, bool, bool]], int, dict[str, Any]]:
    """Each engine loads what the one before saved, is compared bit by bit, trains a step and saves.

    Returns what was found, the rows of the embedding in this rank's part of ZeRO-3's state, and that state.
    """
    found: list[tuple[str, bool, bool]] = []
    before: dict[str, torch.Tensor] = {}
    rows, from_zero3 = 0, {}
    for number, kind in enumerate(CHAIN):
        engine = toy.start(kind, clip_norm=0.6)
        if before:
            state = engine.state()
            dcp.load(state, checkpoint_id=f"{folder}/{number - 1}", process_group=engine.topology.cpu_group)
            engine.load(state)
            now = toy.whole(engine.state())
            same = now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)
            found.append((kind, same, computes_with(engine, now)))
        toy.engine_step(engine, number, micros=1)
        dcp.save(engine.state(), checkpoint_id=f"{folder}/{number}", process_group=engine.topology.cpu_group)
        before = toy.whole(engine.state())
        if kind == "zero3":
            rows, from_zero3 = local_rows(engine.state()["model.embed.weight"]), before
        engine.close()
    return found, rows, from_zero3


def local_rows(tensor: torch.Tensor) -> int:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().shape[0]


def computes_with(engine: Engine, state: dict[str, torch.Tensor]) -> bool:
    """Whether a forward gives the loss of a plain module with the weights of `state`."""
    plain = toy.toy_module(engine.config, tied=True)
    plain.load_state_dict({key[6:]: value for key, value in state.items() if key.startswith("model.")}, strict=False)
    batch = toy.inputs(7, engine.topology.rank, engine.topology.world_size, 0)
    with torch.no_grad():
        got, wanted = float(engine.forward(**batch)), float(plain(**batch))
    return abs(got - wanted) <= 1e-6 * abs(wanted)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("chain")
    return folder, run_ranks(hand_over, 2, str(folder), timeout=120.0)


def test_any_engine_continues_any_other(chain: tuple[Path, list[Any]]) -> None:
    for found, _, _ in chain[1]:
        assert [kind for kind, _, _ in found] == list(CHAIN[1:])
        assert all(same for _, same, _ in found), found
        assert all(right for _, _, right in found), found


def test_a_rank_keeps_its_own_rows_only(chain: tuple[Path, list[Any]]) -> None:
    assert [rows for _, rows, _ in chain[1]] == [19, 18]  # the 37 rows of the embedding


def load_state(rank: int, world_size: int, folder: str) -> dict[str, torch.Tensor]:
    engine = toy.start("fsdp", clip_norm=0.6)
    with torch.no_grad():  # an evaluation gathers the root's weights; load must not leave the old ones in use
        engine.forward(**toy.own_inputs(engine, 0, 0))
    state = engine.state()
    dcp.load(state, checkpoint_id=folder, process_group=engine.topology.cpu_group)
    engine.load(state)
    now = toy.whole(engine.state())
    assert computes_with(engine, now)
    return now


def test_state_fits_another_world_size(chain: tuple[Path, list[Any]]) -> None:
    saved = chain[1][0][2]
    loaded = run_ranks(load_state, 3, str(chain[0] / str(CHAIN.index("zero3"))))[0]
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert loaded["optim.step"].item() == CHAIN.index("zero3") + 1


def misfit(rank: int, world_size: int) -> tuple[str, bool]:
    engine = toy.start("ddp")
    before = toy.whole(engine.state())
    state = {**toy.whole(engine.state()), "model.extra": torch.zeros(2)}
    state["model.norm.weight"] = torch.ones(5)
    del state["optim.embed.weight.exp_avg"]
    with pytest.raises(CheckpointError) as caught:
        engine.load(state)
    after = toy.whole(engine.state())
    return str(caught.value), all(torch.equal(after[key], before[key]) for key in before)


def test_misfit_lists_every_problem_and_changes_nothing() -> None:
    message, unchanged = run_ranks(misfit, 1)[0]
    assert "3 problems" in message
    assert "model.norm.weight: expected shape [18], got [5]" in message
    assert "optim.embed.weight.exp_avg: missing" in message
    assert "model.extra: not in this model" in message
    assert unchanged


def low_precision(rank: int, world_size: int, kinds: tuple[str, ...], masters: bool) -> dict[str, Any]:
    found = {}
    for kind in kinds:
        engine = toy.start(kind, precision="bf16", recompute=True, clip_norm=0.6)
        found[kind] = look_at_masters(engine) if masters else {"history": four_steps(engine)}
        engine.close()
    return found


def four_steps(engine: Engine) -> list[tuple[float, float]]:
    return [toy.engine_step(engine, step, micros=1 if step % 2 else 3) for step in range(4)]


def look_at_masters(engine: Engine) -> dict[str, Any]:
    fresh, initial = toy.whole(engine.state()), toy.own(engine.state())
    history = four_steps(engine)
    trained = toy.whole(engine.state())
    toy.fill(engine, initial)
    again = four_steps(engine)
    return {
        "fresh": fresh,
        "again": again == history,
        "rounded": all(torch.equal(v, v.bfloat16().float()) for k, v in trained.items() if k.startswith("model.")),
        "used": used_weights(engine),
    }


def used_weights(engine: Engine) -> bool:
    """Whether the weights the module computes with are the rounded masters (where the engine keeps two copies)."""
    masters = toy.whole(engine.state())
    for name, parameter in engine.module.named_parameters():
        master = masters[f"model.{name}"]
        if parameter.dtype != torch.bfloat16 or parameter.shape != master.shape:
            continue  # one copy only, or a shard of ZeRO-3
        if not torch.equal(parameter.detach(), master.bfloat16()):
            return False
    return True


@cache
def low_precision_results(masters: bool) -> dict[str, Any]:
    return run_ranks(low_precision, 2, toy.KINDS, masters, timeout=120.0)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", toy.KINDS)
def test_bf16_keeps_exact_masters(kind: str) -> None:
    found = low_precision_results(masters=True)[kind]
    exact = toy.toy_module(toy.toy_config(kind), tied=True)
    for name, parameter in exact.named_parameters():
        assert torch.equal(found["fresh"][f"model.{name}"], parameter.detach()), name
    assert not found["rounded"]
    assert found["used"]
    assert found["again"]


@pytest.mark.parametrize("kind", toy.KINDS)
def test_bf16_follows_float32(kind: str) -> None:
    single = toy.Reference(toy.toy_config(kind, clip_norm=0.6), world_size=2, tied=True, dtype=torch.float32)
    for step, (loss, norm) in enumerate(low_precision_results(masters=False)[kind]["history"]):
        wanted_loss, wanted_norm = single.step(step, micros=1 if step % 2 else 3)
        assert loss == pytest.approx(wanted_loss, rel=5e-3), step
        # From the second step on the weights differ too, by the signs of gradients near 0.
        assert norm == pytest.approx(wanted_norm, rel=2e-2 if step == 0 else 0.15), step
