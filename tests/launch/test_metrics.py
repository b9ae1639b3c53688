"""The metrics file stays valid JSON lines whatever happens; missing packages are refused at the start."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy
import pytest
import torch

from launch import metrics
from launch.errors import ConfigError, WriteError
from launch.meters import host_memory_bytes, known_peak_tflops, peak_memory_bytes, reset_peak_memory, utilisation
from launch.metrics import MetricsWriter, read_metrics

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def _config(**settings: Any) -> Any:
    return SimpleNamespace(**{"every_steps": 1, "tensorboard": False, "wandb": False, "peak_tflops": None, **settings})


def _lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_record_is_on_disk_at_once_with_its_step_and_time(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "new" / "run", _config()) as writer:
        writer.write(3, {"loss_nats_per_token": 5.5, "ring_bytes_sent": 1024, "mfu_causal": None})
        (line,) = _lines(tmp_path / "new" / "run")  # before close: a kill loses nothing
    assert line.pop("time_unix_seconds") > 1e9
    assert line == {"step": 3, "loss_nats_per_token": 5.5, "ring_bytes_sent": 1024, "mfu_causal": None}


def test_non_finite_numbers_are_texts_and_numpy_scalars_are_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, _config()) as writer:
        writer.write(
            1,
            {
                "a": math.nan,
                "b": math.inf,
                "c": -math.inf,
                "d": cast(float, numpy.float32(0.5)),
                "e": numpy.float64("nan"),
            },
        )
    (line,) = _lines(tmp_path)
    assert [line[key] for key in "abcde"] == ["nan", "inf", "-inf", 0.5, "nan"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", _config(), enabled=False) as writer:
        writer.write(1, {"loss_nats_per_token": 1.0})
        writer.resume(1)
        writer.event("evaluation")
    assert not (tmp_path / "run").exists()


def test_a_resume_takes_back_later_steps_without_erasing_them(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, _config()) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss_nats_per_token": float(step)})
    with MetricsWriter(tmp_path, _config()) as writer:
        writer.resume(2, cp=4)
        writer.write(3, {"loss_nats_per_token": 30.0})
    lines = _lines(tmp_path)
    assert [line.get("event", line["step"]) for line in lines] == [1, 2, 3, 4, "resume", 3]
    assert (lines[4]["step"], lines[4]["cp"]) == (2, 4)
    assert [(r["step"], r["loss_nats_per_token"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


@pytest.mark.parametrize("length", [7, 5000])
def test_a_line_cut_by_a_kill_is_removed_and_reported(tmp_path: Path, length: int) -> None:
    with MetricsWriter(tmp_path, _config()) as writer:
        writer.write(1, {"loss_nats_per_token": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": ' + b"2" * (length - 9) if length > 9 else b'{"step":'[:length])
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    with MetricsWriter(tmp_path, _config()) as writer:
        writer.write(2, {"loss_nats_per_token": 2.0})
    lines = _lines(tmp_path)
    assert [line.get("event", line.get("step")) for line in lines] == [1, "dropped_partial_line", 2]
    assert lines[1]["dropped_bytes"] == length


def test_bad_values_are_named(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, _config()) as writer:
        with pytest.raises(TypeError, match=r"loss: expected a number, text or None, got Tensor; call \.item\(\)"):
            writer.write(1, {"loss": torch.tensor(1.0)})  # type: ignore[dict-item]
        with pytest.raises(ValueError, match="step: written by the writer itself"):
            writer.write(1, {"step": 2})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_due_follows_the_interval(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, _config(every_steps=3), enabled=False)
    assert [step for step in range(1, 10) if writer.due(step)] == [3, 6, 9]


def test_an_unwritable_place_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"metrics: cannot open .*file/metrics\.jsonl: .*check run\.dir") as caught:
        MetricsWriter(tmp_path / "file", _config())
    assert caught.value.exit_status == 73


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_is_a_write_error(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, _config())
    writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(WriteError, match=r"cannot write .*metrics\.jsonl: No space left"):
        writer.write(1, {"loss_nats_per_token": 1.0})
    writer.close()


def test_missing_packages_are_refused_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        MetricsWriter(tmp_path / "run", _config(tensorboard=True, wandb=True), enabled=False)
    first, second = str(caught.value).splitlines()
    assert first.startswith("metrics.tensorboard: expected the package 'tensorboard', which is not installed")
    assert second.endswith("install it (pip install wandb) or set metrics.wandb=false")


def test_the_check_loads_no_torch() -> None:
    code = (
        "import sys, types; from launch.metrics import check_sinks;"
        "check_sinks(types.SimpleNamespace(tensorboard=False, wandb=False)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=20)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_has_the_scalars_and_hides_what_a_resume_took_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, _config(tensorboard=True)) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss_nats_per_token": float(step), "mfu_causal": None, "note": "text"})
    with MetricsWriter(tmp_path, _config(tensorboard=True)) as writer:
        writer.resume(1)
        writer.write(2, {"loss_nats_per_token": 20.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss_nats_per_token"]
    assert [(event.step, event.value) for event in events.Scalars("loss_nats_per_token")] == [(1, 1.0), (2, 20.0)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_writes_an_offline_run(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, _config(wandb=True)) as writer:
        writer.write(1, {"loss_nats_per_token": 1.0})
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0, 67.0),
        ("NVIDIA H100 PCIe", 756.0, 51.2),
        ("NVIDIA H200", 989.0, 67.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA GB200", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("Intel(R) Xeon(R) Processor", None, None),
    ],
)
def test_peaks_by_device_name(name: str, bf16: float | None, fp32: float | None) -> None:
    assert known_peak_tflops(name, "bf16") == bf16
    assert known_peak_tflops(name, "fp32") == fp32


def test_an_unknown_precision_has_no_peak() -> None:
    with pytest.raises(ValueError, match="precision: expected bf16 or fp32, got 'fp8'"):
        known_peak_tflops("NVIDIA H200", "fp8")


def test_utilisation_is_per_device() -> None:
    assert utilisation(1e9, 1e6, processes=4, peak_tflops=500.0) == pytest.approx(0.5)
    assert utilisation(1e9, 1e6, processes=4, peak_tflops=None) is None


def test_peak_memory_sees_a_block_that_is_gone_and_can_be_reset() -> None:
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    block = bytearray(os.urandom(1 << 20) * 64)
    assert host_memory_bytes() - before > 48 << 20
    del block
    peak = peak_memory_bytes(CPU)
    assert peak - before > 48 << 20
    reset_peak_memory(CPU)
    if sys.platform == "linux":
        assert peak - peak_memory_bytes(CPU) > 32 << 20


def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import meters

    with_proc = host_memory_bytes()
    monkeypatch.setattr(meters, "_proc_status", dict)
    assert host_memory_bytes() == pytest.approx(with_proc, rel=0.2)
    assert peak_memory_bytes(CPU) >= 0.9 * with_proc
