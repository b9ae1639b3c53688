"""Every engine against the same training in one process: gradients, norms, clipping, bad steps, resuming."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from launch import memory_state
from launch.engine import Engine
from launch.errors import NumericsError
from tests.launch.engine import toy
from tests.processes import run_ranks

UNTIED = " untied"
CLIP = 0.6  # below the norm of some steps and above that of others


def micros_of(step: int) -> int:
    """Three micro-batches and one, in turn."""
    return 1 if step % 2 else 3


def train(engine: Engine, steps: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the given steps."""
    return [toy.engine_step(engine, step, micros=micros_of(step)) for step in steps]


def bad_step(engine: Engine) -> dict[str, Any]:
    """A step with NaN on the last rank only, dropped; then one dropped half way."""
    topology = engine.topology
    before = toy.own(engine.state())
    spoil = math.nan if topology.rank == topology.world_size - 1 else 1.0
    _, norm = toy.engine_step(engine, 1, micros=2, spoil=spoil, finish=False)
    named = [name for names in topology.gather_objects(engine.bad_gradients()) for name in names]
    refused = False
    try:
        engine.update(0.1)
    except NumericsError:
        refused = True
    engine.discard()
    unchanged = {"nan": toy.holds(engine, before)}
    loss_sum = engine.forward(**toy.own_inputs(engine, 2, 0))
    engine.backward(loss_sum, 5, last=False)
    engine.discard()
    engine.forward(**toy.own_inputs(engine, 2, 0))
    engine.discard()
    unchanged["half"] = toy.holds(engine, before)
    return {"norm": norm, "agreed": toy.same_on_all_ranks([norm]), "named": named, "refused": refused, **unchanged}


def check_bad_step(bad: dict[str, Any]) -> None:
    """What `bad_step` tells: NaN is seen and named on all ranks, and refused, and what is dropped leaves no trace."""
    assert math.isnan(bad["norm"])
    assert bad["agreed"]
    assert bad["refused"]
    assert any("layers.0" in name for name in bad["named"])
    assert bad["nan"]
    assert bad["half"]


def check_engine(rank: int, world_size: int, kinds: tuple[str, ...], steps: int) -> dict[str, Any]:
    found = {}
    for kind in kinds:
        engine = toy.start(kind.removesuffix(UNTIED), tied=not kind.endswith(UNTIED), clip_norm=CLIP)
        fresh, initial = toy.whole(engine.state()), toy.own(engine.state())
        bad = bad_step(engine)
        train(engine, range(1))
        after_one = toy.whole(engine.state())
        toy.fill(engine, initial)
        with torch.no_grad():
            evaluation = float(engine.forward(**toy.inputs(0, 0, world_size, 0)))
        half = steps // 2
        history = train(engine, range(half))
        saved = toy.own(engine.state())
        history += train(engine, range(half, steps))
        final = toy.own(engine.state())
        toy.fill(engine, saved)
        again = train(engine, range(half, steps))
        found[kind] = {
            "fresh": fresh,
            "bad": bad,
            "after_one": after_one,
            "evaluation": evaluation,
            "history": history,
            "agreed": toy.same_on_all_ranks([number for pair in history for number in pair]),
            "resumed": toy.holds(engine, final) and again == history[half:],
        }
        engine.close()
    return found if rank == 0 else {}


@cache
def results(world_size: int, kinds: tuple[str, ...], steps: int) -> dict[str, Any]:
    """All checks of one world in one start of its processes: deepspeed takes a second to import."""
    return run_ranks(check_engine, world_size, kinds, steps, timeout=240.0)[0]


@cache
def reference(world_size: int, steps: int, tied: bool = True) -> dict[str, Any]:
    config = toy.toy_config("ddp", clip_norm=CLIP)
    exact = toy.Reference(config, world_size=world_size, tied=tied, dtype=torch.float64)
    initial = {name: p.detach().float().clone() for name, p in exact.module.named_parameters()}
    _, norm = exact.step(0, micros=micros_of(0))
    names = [name for name, _ in exact.module.named_parameters()]
    after_one = {f"model.{name}": p.detach().clone() for name, p in exact.module.named_parameters()}
    for name, parameter in exact.module.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            after_one[f"optim.{name}.{moment}"] = exact.optimizer.state[parameter][moment].clone()
    single = toy.Reference(config, world_size=world_size, tied=tied, dtype=torch.float32)
    history = [single.step(step, micros=micros_of(step)) for step in range(steps)]
    return {"initial": initial, "names": names, "norm": norm, "after_one": after_one, "history": history}


ONCE = tuple(kind for kind in toy.KINDS if kind != "zero2")  # its state is cut as zero1's; slow, and in test_state.py
PAIR = (*ONCE, "fsdp" + UNTIED, "zero3" + UNTIED)
FAST = [
    *((2, PAIR, 4, kind) for kind in ONCE),
    *((3, ("ddp", "fsdp"), 2, kind) for kind in ("ddp", "fsdp")),
]
SLOW = [(world_size, toy.KINDS, 20, kind) for world_size in (1, 2, 3, 4) for kind in toy.KINDS]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
engines = pytest.mark.parametrize(("world_size", "kinds", "steps", "kind"), CASES)


@engines
def test_fresh_state_is_complete(world_size: int, kinds: tuple[str, ...], steps: int, kind: str) -> None:
    fresh = results(world_size, kinds, steps)[kind]["fresh"]
    wanted = reference(world_size, steps)
    keys = {f"model.{name}" for name in wanted["names"]} | {"optim.step"}
    keys |= {f"optim.{name}.{moment}" for name in wanted["names"] for moment in ("exp_avg", "exp_avg_sq")}
    assert fresh.keys() == keys
    assert fresh["optim.step"].item() == 0
    for name, values in wanted["initial"].items():
        assert torch.equal(fresh[f"model.{name}"], values), name
        assert fresh[f"optim.{name}.exp_avg"].abs().max() == 0
        assert fresh[f"optim.{name}.exp_avg_sq"].dtype == torch.float32


def compare_first_step(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got["optim.step"].item() == 1
    moments = {key: value for key, value in wanted.items() if key.startswith("optim.")}
    assert toy.worst({key: got[key] for key in moments}, moments) < 1e-5
    # Adam's first update is the sign of the gradient, ill-conditioned where that is near 0.
    weights = {key: value for key, value in wanted.items() if key.startswith("model.")}
    assert toy.worst({key: got[key] for key in weights}, weights) < 1e-3


def compare_norm(got: float, wanted: float) -> None:
    assert got == pytest.approx(wanted, rel=1e-6)
    assert got > CLIP  # the first step is one that is clipped


@engines
def test_first_step_equals_float64(world_size: int, kinds: tuple[str, ...], steps: int, kind: str) -> None:
    """exp_avg after one step is the clipped gradient times 1 - beta1, so gradient, clipping and decay are all in it."""
    found, wanted = results(world_size, kinds, steps)[kind], reference(world_size, steps)
    compare_first_step(found["after_one"], wanted["after_one"])
    compare_norm(found["history"][0][1], wanted["norm"])


@engines
def test_training_equals_one_process(world_size: int, kinds: tuple[str, ...], steps: int, kind: str) -> None:
    found, wanted = results(world_size, kinds, steps)[kind], reference(world_size, steps)["history"]
    assert found["agreed"]
    for step, (got, expected) in enumerate(zip(found["history"], wanted, strict=True)):
        assert got[0] == pytest.approx(expected[0], rel=1e-5), step
        assert got[1] == pytest.approx(expected[1], rel=1e-5), step


@engines
def test_bad_step_changes_nothing(world_size: int, kinds: tuple[str, ...], steps: int, kind: str) -> None:
    check_bad_step(results(world_size, kinds, steps)[kind]["bad"])


@engines
def test_resume_is_bitwise(world_size: int, kinds: tuple[str, ...], steps: int, kind: str) -> None:
    assert results(world_size, kinds, steps)[kind]["resumed"]


@engines
def test_evaluation_does_not_disturb(world_size: int, kinds: tuple[str, ...], steps: int, kind: str) -> None:
    config = toy.toy_config(kind)
    with torch.no_grad():
        wanted = float(toy.toy_module(config, tied=True)(**toy.inputs(0, 0, world_size, 0)))
    assert results(world_size, kinds, steps)[kind]["evaluation"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_untied_head(kind: str) -> None:
    """The tied head is in all other tests."""
    found = results(2, PAIR, 4)[kind + UNTIED]
    compare_first_step(found["after_one"], reference(2, 4, tied=False)["after_one"])
    assert found["bad"]["nan"]
    assert found["resumed"]


def order_of_gradients(rank: int, world_size: int, tied: bool) -> list[tuple[bool, bool]]:
    """Whether head and embedding have their reduced gradients when the backward pass leaves the last and the first
    layer, and when it ends."""
    engine = toy.start("fsdp", tied=tied)
    module, seen = engine.module, []

    def look(*_: Any) -> None:
        weights = (module.head.weight, module.embed.weight)
        # While a weight is gathered its module has the whole one, with the whole gradient.
        seen.append(tuple(isinstance(weight, toy.DTensor) and weight.grad is not None for weight in weights))

    for layer in (module.layers[-1], module.layers[0]):
        layer.register_forward_pre_hook(lambda _, arguments: arguments[0].register_hook(look) and None)
    engine.backward(engine.forward(**toy.own_inputs(engine, 1, 0)), 5, last=True)
    look()
    engine.close()
    return seen


def test_the_gradient_of_a_head_of_its_own_is_reduced_before_the_layers() -> None:
    assert run_ranks(order_of_gradients, 2, False) == [[(True, False), (True, False), (True, True)]] * 2
    assert run_ranks(order_of_gradients, 2, True) == [[(False, False), (False, False), (False, True)]] * 2


def prefetched(rank: int, world_size: int, paired: float) -> list[tuple[str, list[str]]]:
    """Which parts of three layers announce which others, by their kinds."""
    memory_state._PAIRED = paired  # type: ignore[assignment]
    told: list[tuple[Any, Any]] = []
    announce = FSDPModule.set_modules_to_forward_prefetch
    FSDPModule.set_modules_to_forward_prefetch = lambda self, modules: told.append((self, modules))  # type: ignore
    try:
        config = toy.toy_config("fsdp")
        engine = toy.build_model(config, replace(toy.toy_shape(tied=False), layers=3), toy.Topology.start(config))
    finally:
        FSDPModule.set_modules_to_forward_prefetch = announce  # type: ignore[method-assign]
    names = {part: name for name, part in engine.module.named_modules()}
    engine.close()
    return [(names[part], [names[other] for other in others]) for part, others in told]


def test_each_unit_of_layers_gathers_the_next_and_the_last_the_head() -> None:
    alone = [("layers.0", ["layers.1"]), ("layers.1", ["layers.2"]), ("layers.2", ["head"])]
    assert run_ranks(prefetched, 1, 0.0) == [alone]
    assert run_ranks(prefetched, 1, math.inf) == [[("layers.0", ["layers.2"]), ("layers.2", ["head"])]]


def gathered(rank: int, world_size: int, kind: str) -> tuple[list[int], list[float]]:
    """How often something is gathered in each of two steps and an evaluation between them, and the three losses."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    memory_state._PAIRED = 0  # layers are units
    gather, counts, losses = _fsdp_param_group.foreach_all_gather, [], []
    _fsdp_param_group.foreach_all_gather = lambda *rest: (counts.append(counts.pop() + 1), gather(*rest))[1]
    engine = toy.start(kind)
    for step in range(3):
        counts.append(0)
        if step == 1:
            with torch.no_grad():
                losses.append(float(engine.forward(**toy.own_inputs(engine, step, 0))))
        else:
            losses.append(toy.engine_step(engine, step, micros=2)[0])
    engine.close()
    _fsdp_param_group.foreach_all_gather = gather
    return counts, losses


def test_weights_that_are_kept_are_gathered_once_for_each_row() -> None:
    twice, losses = run_ranks(gathered, 2, "fsdp")[0]
    once, kept = run_ranks(gathered, 2, "fsdp keep")[0]
    assert kept == losses
    rows, layers = 2, 2
    assert twice[0] - once[0] == rows * layers
    assert once[1] == twice[1]
    # The evaluation has left all layers gathered: the first row after it gathers nothing of them.
    assert once[2] == once[0] - layers - (twice[0] - twice[2])


def odd_count(rank: int, world_size: int, kinds: tuple[str, ...]) -> list[list[tuple[float, float]]]:
    """(loss, gradient norm) of two steps with an odd number of parameters, for each engine."""
    shape = replace(toy.toy_shape(tied=True), dim=17, vocab_size=38)
    histories = []
    for kind in kinds:
        config = toy.toy_config(kind, clip_norm=CLIP)
        engine = toy.build_model(config, shape, toy.Topology.start(config))
        assert sum(p.numel() for p in toy.Decoder(shape).parameters()) % 2 == 1
        histories.append(train(engine, range(2)))
        engine.close()
    return histories


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_odd_number_of_parameters(world_size: int) -> None:
    """DeepSpeed refuses buckets of an odd number of elements, and ours are as large as a small model."""
    wanted, *others = run_ranks(odd_count, world_size, ("ddp", "zero1", "zero2", "zero3"), timeout=120.0)[0]
    for found in others:
        assert found == [pytest.approx(pair, rel=1e-5) for pair in wanted]


def with_wrong_scale(rank: int, world_size: int, kind: str) -> float:
    """The bug this file exists for: an engine that believes its gradients are summed, not averaged.

    Only the norm shows it where the gradient is clipped, which is why every step's norm is compared.
    """
    engine = toy.start(kind, clip_norm=CLIP)
    original = engine._backward
    engine._backward = lambda loss, *, last: original(loss / world_size, last=last)  # type: ignore[method-assign]
    return toy.engine_step(engine, 0, micros=3)[1]


def test_a_wrong_scale_is_seen() -> None:
    norm = run_ranks(with_wrong_scale, 2, "ddp")[0]
    with pytest.raises(AssertionError):
        compare_norm(norm, reference(2, 4)["norm"])


def refuse(rank: int, world_size: int) -> list[str]:
    engine = toy.start("ddp")
    messages = []
    for call in (
        lambda: engine.backward(torch.zeros((), requires_grad=True), -1, last=True),
        lambda: toy.build_engine("dpp", engine.module, topology=engine.topology, config=engine.config),
    ):
        with pytest.raises((ValueError, toy.LaunchError)) as caught:
            call()
        messages.append(str(caught.value))
    # A step without any valid token has gradient 0, not NaN.
    engine.backward(engine.forward(**toy.inputs(0, 1, 2, 0)), 0, last=True)
    messages.append(str(engine.gradient_norm()))
    return messages


def test_refusals() -> None:
    negative, unknown, norm = run_ranks(refuse, 1)[0]
    assert "got -1" in negative
    assert "expected ddp, fsdp or zero" in unknown
    assert float(norm) == 0.0


def without_deepspeed(rank: int, world_size: int) -> str:
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    with pytest.raises(toy.LaunchError) as caught:
        toy.start("zero1")
    return f"{caught.value.exit_status} {caught.value}"


def test_zero_without_deepspeed_says_what_to_install() -> None:
    message = run_ranks(without_deepspeed, 1)[0]
    assert message.startswith("64 engine.name=zero needs DeepSpeed")
    assert "pip install" in message
