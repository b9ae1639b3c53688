"""The fused merge in Triton's interpreter against the torch form; on GPUs tests/gpu runs it compiled."""

import pytest
import torch

pytest.importorskip("triton")

from ringattn.kernels.triton_merge import merge_ as fused
from ringattn.merge import merge_

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu tests this where there is CUDA")


def test_the_fused_merge_equals_the_torch_form():
    generator = torch.Generator().manual_seed(0)
    batch, rows, heads, width = 2, 37, 3, 24
    out, lse = torch.zeros(batch, rows, heads, width), torch.full((batch, heads, rows), -torch.inf)
    ours, our_lse = torch.full_like(out, torch.nan), lse.clone()  # nothing may be read where lse is -inf
    for number in range(3):
        part = torch.randn(batch, heads, rows, width, generator=generator, dtype=torch.bfloat16).transpose(1, 2)
        part_lse = 20 * torch.randn(batch, heads, rows, generator=generator)
        part_lse[:, :, number * 5 : number * 5 + 9] = -torch.inf
        part_lse[:, :, -1] = -torch.inf  # a row that never sees a key
        merge_(out, lse, part, part_lse)
        fused(ours, our_lse, part, part_lse)
    torch.testing.assert_close(ours, out)
    torch.testing.assert_close(our_lse, lse)
    assert torch.equal(ours[:, -1], torch.zeros_like(ours[:, -1]))
