"""Memory that runs out: on a GPU of one rank, and on the host, done to real processes by planted errors."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.config import Config
from launch.errors import EXIT_BUG, EXIT_CONFIG, EXIT_DONE, EXIT_OUT_OF_MEMORY, OutOfMemory, exit_status_of
from launch.memory_choice import plan_memory
from launch.memory_search import DeviceFacts
from launch.out_of_memory import as_out_of_memory
from launch.status import read_status
from launch.train import as_lost_peer
from ringattn.errors import TopologyError
from tests.launch.runs import settings, train_worker, write_corpus
from tests.processes import run_ranks

TORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 79.11 GiB. "
    "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def short_run(corpus, run_dir, **changes):
    plain = {"optim__steps": 6, "optim__warmup_steps": 0, "optim__rows_per_step": 2, "data__held_out_rows": 1}
    return settings(corpus, run_dir, **{**plain, **changes})


def run(nested):
    """Train, with all that is printed in a file beside the run folder: the processes share no captured output."""
    with open(f"{nested['run']['dir']}.printed", "ab", buffering=0) as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    return train_worker(0, 1, [nested])[0]


def printed(run_dir):
    return Path(f"{run_dir}.printed").read_text()


def out_of_memory_worker(rank, world_size, nested, victim):
    from launch.steps import StepRunner

    forward, steps = StepRunner._forward, {"seen": 0}

    def failing(self, *arguments):
        steps["seen"] += torch.is_grad_enabled()
        if rank == victim and steps["seen"] == 5:
            raise torch.OutOfMemoryError(TORCH_SAYS)
        return forward(self, *arguments)

    StepRunner._forward = failing
    began = time.monotonic()
    return run(nested), time.monotonic() - began


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_gpu_of_one_rank_is_one_message_and_ends_all_ranks(corpus, tmp_path, victim):
    nested = short_run(corpus, tmp_path)
    outcomes = run_ranks(out_of_memory_worker, 3, nested, victim, check=False)
    assert [outcome.value[0] for outcome in outcomes] == [EXIT_OUT_OF_MEMORY] * 3
    told = read_status(tmp_path)
    assert (told.exit_status, told.outcome) == (EXIT_OUT_OF_MEMORY, "failed")
    for part in (
        f"rank {victim} of 3 ran out of GPU memory in step 3, forward of row 4: CUDA out of memory",
        "Tried to allocate 3.00 GiB",
        "The estimate was: predicted peak",
        "Next: ",
    ):
        assert part in told.message
    assert "PYTORCH_ALLOC_CONF" not in told.message
    told = printed(tmp_path)
    assert told.count("error:") == told.count("ran out of GPU memory") == 1
    assert "lost a peer" not in told


def short_of_host_memory(rank, world_size, nested, left, after):
    import launch.watch
    from launch.steps import StepRunner

    train, steps = StepRunner.train, {"seen": 0}

    def counting(self, *arguments, **options):
        steps["seen"] += 1
        time.sleep(0.05)
        return train(self, *arguments, **options)

    StepRunner.train = counting
    launch.watch._POLL_S = 0.01
    launch.watch.host_memory_limit = lambda: 100 * 2**30
    launch.watch.host_memory_available = lambda: left if steps["seen"] >= after else 50 * 2**30
    return run(nested)


def test_short_host_memory_saves_and_stops_all_ranks(corpus, tmp_path):
    nested = short_run(corpus, tmp_path, optim__steps=100)
    assert run_ranks(short_of_host_memory, 2, nested, 2**30, 3) == [EXIT_OUT_OF_MEMORY] * 2
    told = read_status(tmp_path)
    assert "host memory is running out: 1.0 GiB of 100 GiB left, below the 1.5 GiB" in told.message
    assert f"saved after step {told.step}" in told.message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{told.step:06d}"]
    assert printed(tmp_path).count("error:") == 1
    more = short_run(corpus, tmp_path, optim__steps=told.step + 1)
    assert run_ranks(train_worker, 2, [more]) == [[EXIT_DONE]] * 2


@pytest.mark.slow
def test_hardly_any_host_memory_ends_at_once(corpus, tmp_path):
    nested = short_run(corpus, tmp_path, optim__steps=1000)
    outcomes = run_ranks(short_of_host_memory, 2, nested, 2**28, 3, check=False)
    assert outcomes[0].exitcode == EXIT_OUT_OF_MEMORY
    told = read_status(tmp_path)
    assert "256 MiB of 100 GiB left, below the 512 MiB at which a run ends at once" in told.message
    assert told.exit_status == EXIT_OUT_OF_MEMORY


def hanging_worker(rank, world_size, nested):
    """Rank 1 has a bug while rank 0 waits in something that no lost peer ends, as kernels of a GPU do."""
    import launch.watch
    from launch.steps import StepRunner

    launch.watch._GRACE_S = 0.2

    def broken(self, *arguments, **options):
        if rank == 1:
            raise ZeroDivisionError("planted")
        time.sleep(30)

    StepRunner.train = broken
    return run(nested)


@pytest.mark.slow
def test_a_rank_that_cannot_notice_is_ended_by_its_watch(corpus, tmp_path):
    began = time.monotonic()
    outcomes = run_ranks(hanging_worker, 2, short_run(corpus, tmp_path), check=False)
    assert time.monotonic() - began < 15
    assert outcomes[0].exitcode == EXIT_BUG
    assert outcomes[1].value == EXIT_BUG
    assert read_status(tmp_path).message == "rank 1: planted"


def small_machine(rank, world_size, nested, host_bytes):
    import launch.memory_choice
    import launch.trainer

    def unread(*arguments, **options):
        raise AssertionError("the data must not be read for a run that cannot fit")

    launch.trainer.open_corpus = unread
    launch.memory_choice.host_memory_limit = lambda: host_bytes
    return run(nested)


def test_what_cannot_fit_is_refused_before_the_data_is_read(corpus, tmp_path):
    nested = short_run(corpus, tmp_path, model__vocab_size=4_000_000, model__dim=512)
    assert run_ranks(small_machine, 2, nested, 2 * 2**30) == [EXIT_CONFIG] * 2
    told = read_status(tmp_path).message
    assert "memory: data.seq_len=101 over 2 ranks is predicted not to fit" in told
    assert "of host memory and has 1.0 GiB" in told
    assert "more processes (parallel.cp)" in told
    assert printed(tmp_path).count("error:") == 1


def plain_worker(rank, world_size, nested):
    return run(nested)


def test_auto_says_what_it_chose_and_predicted_stands_beside_measured(corpus, tmp_path):
    nested = {**short_run(corpus, tmp_path, optim__steps=1), "memory": {"auto": True}}
    assert run_ranks(plain_worker, 2, nested) == [EXIT_DONE] * 2
    told = printed(tmp_path)
    assert "memory: nothing recomputed or moved (auto); predicted peak" in told
    assert " in the largest process, " in told
    assert " predicted" in told


WAYS = [
    (torch.OutOfMemoryError(TORCH_SAYS), "GPU"),
    (torch.AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), "GPU"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "GPU"),  # as seen
    (RuntimeError("CUDA driver error: out of memory"), "GPU"),
    (TopologyError(f"transport: copy_engine cannot map them: rank 1: OutOfMemoryError: {TORCH_SAYS}"), "GPU"),
    (torch.distributed.DistBackendError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"), "GPU"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "host"),
    (RuntimeError("memory.offload: 4.00 GiB of host memory could not be pinned (error 2)"), "host"),
    (OSError(12, "Cannot allocate memory"), "host"),
    (MemoryError(), "host"),
]
NO_MEMORY = (
    RuntimeError("shape mismatch"),
    torch.distributed.DistBackendError("NCCL error: remote closed"),
    KeyError("out of memory"),
)


@pytest.mark.parametrize(
    ("error", "kind"),
    WAYS,
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_every_way_in_which_memory_runs_out_is_told_as_that(error, kind):
    topology = SimpleNamespace(rank=1, world_size=2, cp=2)
    told = as_out_of_memory(error, topology, "forward of row 3", 4, None)
    assert isinstance(told, OutOfMemory)
    assert exit_status_of(told) == 71 != EXIT_BUG
    assert f"rank 1 of 2 ran out of {kind} memory in step 5, forward of row 3" in str(told)
    assert as_lost_peer(told, topology, "forward of row 3", 4) is told


def test_other_errors_are_not_memory():
    for error in NO_MEMORY:
        assert as_out_of_memory(error, SimpleNamespace(rank=0, world_size=2), "training", 0, None) is error


def planned(**sections):
    base = {
        "run": {"dir": "unused"},
        "data": {"seq_len": 65_536},
        "optim": {"steps": 1},
        "model": {"preset": "llama-3-8b", "vocab_size": 128_256},
        "engine": {"name": "fsdp", "precision": "bf16"},
    }
    facts = DeviceFacts(device_bytes=80 * 2**30, host_bytes=125 * 2**30)
    return plan_memory(Config(**{**base, **sections}), 4, facts)


def test_what_is_largest_is_of_the_memory_that_ran_out():
    """Sizes by hand: 32 layers of 16,384 tokens of 4,096 in bf16, of which the last layer's input stays; 3 copies of
    8 B fp32 weights over four ranks; a rank's part of these weights in bf16."""
    topology = SimpleNamespace(rank=0, world_size=4, cp=4)
    memory = {"recompute": "keep_attention", "offload": "inputs", "tile": 4096}
    plan = planned(memory=memory, checkpoint={"asynchronous": True})
    host = str(as_out_of_memory(MemoryError(), topology, "saving", 4, plan))
    assert "on the host (largest: copies for asynchronous saves 22.4 GiB, inputs of layers 3.9 GiB, libraries" in host
    assert "offload=none, tile=null; or checkpoint.asynchronous=false with the memory settings as they are" in host
    gpu = str(as_out_of_memory(torch.OutOfMemoryError(TORCH_SAYS), topology, "backward", 4, plan))
    assert f"at its {plan.estimate.peak.name} (largest: AdamW's moments 15.0 GiB, weights in fp32 7.5 GiB" in gpu
    assert "asynchronous saves" not in gpu.partition("largest")[2].partition(")")[0]
    kept = {"recompute": "keep_attention"}
    zero = planned(memory=kept, engine={"name": "zero", "precision": "bf16", "zero_stage": 3})
    assert "while the model is built (largest: DeepSpeed's copy of its weights 3.7 GiB, libraries 2.2 GiB)" in str(
        as_out_of_memory(MemoryError(), topology, "building the model", None, zero)
    )


def test_on_a_cpu_the_largest_are_those_of_the_only_memory():
    config = Config(run={"dir": "unused", "device": "cpu"}, data={"seq_len": 4096}, optim={"steps": 1})
    plan = plan_memory(config, 2, DeviceFacts(device_bytes=None, host_bytes=2**36))
    told = str(as_out_of_memory(MemoryError(), SimpleNamespace(rank=0, world_size=2, cp=2), "forward", 0, plan))
    total = plan.estimate.host_bytes
    assert sum(size for _, size in plan.estimate.host_items) == pytest.approx(total)
    assert "at its backward of" in told
    assert "largest: libraries 553 MiB, activations of all layers" in told
