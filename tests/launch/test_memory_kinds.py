"""What the planner counts for selection and for what expands: moments of the backward that plain attention lacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import ringattn
from launch.config import MemoryConfig
from launch.memory_items import attention_items
from launch.memory_plan import estimate_memory
from model.config import SelectionConfig, preset
from model.kinds import attention_shape
from tests.launch.test_memory_plan import gpu_case


def test_sas_beyond_the_fused_kernels_counts_what_its_expansion_keeps() -> None:
    """On a GPU, too: 64 heads with kernels of 5 are more taps than the fused kernels hold, and fp32 is not theirs."""
    case = gpu_case(524_288, "llama-3-8b")
    peaks = {}
    for heads in (32, 64):
        model = preset("llama-3-8b", attention="sas", simulated_heads=heads, simulated_dim=128)
        for kernel, size in ((1, 2), (5, 2), (1, 4)):
            sas = replace(case, model=replace(model, kernel_size=kernel), element_bytes=size)
            tiled = MemoryConfig(recompute=True, tile=4096, offload="inputs")
            expanded = [item for item in estimate_memory(sas, tiled).peak_items if item.name.startswith("expanded")]
            peaks[heads, kernel, size] = expanded[0].device / (case.tokens * heads * 128)
    # keys and values, and their gradients in the same dtype; else gradients in fp32, and four widths of steps
    assert peaks == {
        (32, 1, 2): 8, (32, 5, 2): 8, (32, 1, 4): 32, (64, 1, 2): 8, (64, 5, 2): 20, (64, 1, 4): 32,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [{"selection": SelectionConfig()}, {"attention": "mla", "qk_norm": False}])
def test_a_ring_of_one_rounds_gradients_while_their_sums_are_there(kind: dict[str, Any]) -> None:
    """Found by reading `run_selective_backward` and `SoftmaxAttention._backward`; nothing else differs here."""
    shape = {"latent_dim": 512, "rope_dim": 64} if "attention" in kind else {}
    inside = {}
    for ranks in (1, 2):
        plan = ringattn.Plan(65_536 * ranks, ranks)
        case = replace(gpu_case(65_536, processes=1), model=preset("qwen3-0.6b", **kind, **shape), plan=plan)
        items = {item.name: item.device for item in attention_items(case, MemoryConfig(recompute=True), 1)}
        inside[ranks] = items["gradients inside a layer"]
    sizes = attention_shape(preset("qwen3-0.6b", **kind, **shape))
    assert inside[1] - inside[2] == 2 * 65_536 * (sizes.heads * sizes.score_dim + sizes.payload)
