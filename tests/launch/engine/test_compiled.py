"""`engine.compile`: what each engine's decoder computes with, and that it trains as without."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch import decoder
from launch.config import Config
from model.pointwise import PLAIN, Pointwise
from tests.launch.engine import toy
from tests.processes import run_ranks

# DeepSpeed keeps parameters of up to 100,000 elements whole: of the toy ZeRO-3 would gather none.
SHAPE = replace(toy.toy_shape(tied=True), dim=320, heads=5, head_dim=64, ffn_dim=320)


def compile_config(kind: str, choice: bool | str) -> Config:
    config = toy.toy_config(kind, clip_norm=0.6)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"compile": choice})})


@pytest.mark.parametrize(("choice", "device"), [(True, "cpu"), (False, "cuda"), ("auto", "cpu"), ("auto", "cuda")])
@pytest.mark.parametrize("kind", toy.KINDS)
def test_halves_of_layers_are_functions_where_weights_do_not_come_by_calls_of_modules(
    kind: str, choice: bool | str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Pointwise, str | None, bool]] = []

    def make(backend: str | None = None, *, halves: bool = False) -> Pointwise:
        made.append((Pointwise(backend, halves=halves), backend, halves))
        return made[-1][0]

    modules: list[torch.nn.Module] = []

    def build(name: str, module: torch.nn.Module, **_: Any) -> Any:
        modules.extend(module.modules())
        return SimpleNamespace(write_weights=lambda write: None)

    monkeypatch.setattr(decoder, "Pointwise", make)
    monkeypatch.setattr(decoder, "build_engine", build)
    topology: Any = SimpleNamespace(device=torch.device(device), gather_objects=lambda value: [value])
    decoder.build_model(compile_config(kind, choice), toy.toy_shape(tied=True), topology)
    used = {module.pointwise for module in modules if hasattr(module, "pointwise")}
    if choice is True or (choice, device) == ("auto", "cuda"):
        assert [rest for _, *rest in made] == [["inductor", kind != "zero3"]]
        assert used == {made[0][0]}
    else:
        assert not made
        assert used == {PLAIN}


def train_both(
    rank: int, world_size: int, kind: str
) -> list[tuple[list[tuple[float, float]], dict[str, torch.Tensor]]]:
    """Two steps of two micro-batches compiled and not compiled: (loss, gradient norm) of each, and the whole state."""
    # the same graphs as with inductor, without a minute of a compiler of C++
    decoder.Pointwise = lambda _, *, halves: Pointwise("aot_eager", halves=halves)  # type: ignore[assignment, misc]
    found, graphs = [], torch._dynamo.utils.counters["stats"]
    for choice in (True, False):
        config = compile_config(kind, choice)
        engine = toy.build_model(config, SHAPE, toy.Topology.start(config))
        graphs.clear()
        history = [toy.engine_step(engine, step, micros=2) for step in range(2)]
        assert (graphs["unique_graphs"] > 0) == choice
        found.append((history, toy.whole(engine.state())))
        engine.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in toy.KINDS if kind != "zero0"])
def test_compiled_training_is_that_without(kind: str) -> None:
    (history, state), (wanted, expected) = run_ranks(train_both, 2, kind, timeout=300.0)[0]
    assert history == [pytest.approx(pair, rel=1e-5) for pair in wanted]
    # Adam's update is ill-conditioned where gradients are near 0
    moments = {key: value for key, value in expected.items() if key.endswith(".exp_avg")}
    assert toy.worst({key: state[key] for key in moments}, moments) < 1e-4
    weights = {key: value for key, value in expected.items() if key.startswith("model.")}
    assert toy.worst({key: state[key] for key in weights}, weights) < 1e-3
