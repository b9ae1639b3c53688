"""The rehearsal of the self-check compiles all that the check then runs: nothing is compiled after it."""

import os

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn import selfcheck
from tests.gpu.test_ring_gpu import needs_gpus
from tests.gpu.test_ulysses_gpu import plain_runs, scored_runs
from tests.processes import run_ranks

pytestmark = pytest.mark.gpu

KINDS = {"plain": "bf16", "exact": "selection", "lag 128": "lag", "SAS": "sas"}


def worker(rank, world_size, kind, folder):
    """Kernels compiled before the check runs, and while it does; each rank with a cache of its own, empty."""
    os.environ["TRITON_CACHE_DIR"] = f"{folder}/{rank}"
    from triton import knobs  # here, as where there is no GPU there may be no triton

    from ringattn.selfcheck_case import rehearse
    from ringattn.triton_compiling import compiling, rehearsal

    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl") if world_size > 1 else None
    transport = "auto" if group is None else ringattn.make_transport("auto", group)
    before, during = [], []
    place, compare = [before], selfcheck.compare

    def listen(*, src, cache_hit, **rest):
        if not cache_hit:
            place[0].append(src.name)

    def checked(case, parts):
        if kind == "plain":  # which the self-check does not rehearse, as it has a kernel or two
            place[0] = before
            with compiling() as took, rehearsal(took):
                rehearse(case, parts)
        place[0] = during
        return compare(case, parts)

    knobs.compilation.listener = listen
    selfcheck.compare = checked
    run = (plain_runs() | scored_runs())[KINDS[kind]]
    ringattn.self_check(group=group, device=f"cuda:{rank}", transport=transport, **run)
    torch.cuda.synchronize()
    return before, during


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_compiled_after_the_rehearsal(tmp_path, kind, world_size):
    needs_gpus(world_size)
    if kind in ("exact", "lag 128") and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("Triton's kernels of selection are used on Hopper and later")
    for before, during in run_ranks(worker, world_size, kind, str(tmp_path), timeout=300):
        assert before or (kind, world_size) == ("plain", 1)  # else nothing was rehearsed
        assert during == []
