"""Sums and merges of parts in Triton's interpreter against plain tensor operations; on GPUs tests/gpu runs them."""

import pytest
import torch

pytest.importorskip("triton")

from ringattn import merge
from ringattn.kernels.triton_parts import merge_parts, sum_parts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu tests this where there is CUDA")

ROWS = 70
SPANS = [(0, ROWS), (35, ROWS), (0, 35), (13, 14), (2, 69), (0, ROWS), (30, 60), (0, 1)]


@pytest.fixture
def lazy(monkeypatch):
    monkeypatch.setattr(merge, "_fused", lambda device, dtype: dtype == torch.float32)


def parts(count, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(count)
    found = []
    for number in range(count):
        start, stop = SPANS[number % len(SPANS)]
        out = torch.randn(2, 3, stop - start, 24, generator=generator, dtype=torch.float32).to(dtype).transpose(1, 2)
        lse = 20 * torch.randn(2, 3, stop - start, generator=generator)
        lse[:, :, -3:-1] = -torch.inf
        lse[:, :, -1] = -torch.inf
        out[:, -1] = torch.nan if number else 0.0  # not to be read, though the kernel contract asks for finite
        found.append((slice(start, stop), out, lse))
    return found


def plain_sum(found, rows=ROWS):
    total = torch.zeros(2, rows, 3, 24)
    for span, part, _ in found:
        total[:, span] += part
    return total


@pytest.mark.parametrize("count", [1, 4, 6])
def test_sums(count):
    found = [(span, part.nan_to_num(), lse) for span, part, lse in parts(count)]
    out = torch.full((2, ROWS, 3, 24), torch.nan)
    sum_parts([(span.start, 0, part) for span, part, _ in found], out)
    torch.testing.assert_close(out, plain_sum(found), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_merges(count):
    found = parts(count)
    out, lse = torch.full((2, ROWS, 3, 24), torch.nan), torch.full((2, 3, ROWS), torch.nan)
    merge_parts([(span.start, part, part_lse) for span, part, part_lse in found], out, lse)
    expected = torch.zeros(2, ROWS, 3, 24), torch.full((2, 3, ROWS), -torch.inf)
    for span, part, part_lse in found:
        merge.merge_(expected[0][:, span], expected[1][:, :, span], part.nan_to_num(), part_lse)
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected[1])
    assert torch.equal(out[:, -1], torch.zeros_like(out[:, -1]))  # a row that never sees a key


@pytest.mark.parametrize("count", [0, 1, pytest.param(6, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("settles", [False, True])
def test_a_lazy_sum_of_any_number_of_parts(lazy, count, settles):
    found = [(span, part.nan_to_num(), lse) for span, part, lse in parts(count)]
    total = merge.RowSum((2, ROWS, 3, 24), torch.bfloat16, torch.device("cpu"))
    for number, (span, part, _) in enumerate(found):
        total.add(span, part)
        if settles and number == 1:
            total.settle()
    torch.testing.assert_close(total.result(torch.float32), plain_sum(found), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_parts_of_some_heads(monkeypatch, fused):
    monkeypatch.setattr(merge, "_fused", lambda device, dtype: fused)
    total, expected = merge.RowSum((2, ROWS, 6, 24), torch.float32, torch.device("cpu")), torch.zeros(2, ROWS, 6, 24)
    for (span, part, _), share in zip(parts(7, torch.float32), [0, 1, 1, 0, 1, 0, 1], strict=True):
        total.add(span, part.nan_to_num(), (share, 2))
        expected[:, span, 3 * share : 3 * share + 3] += part.nan_to_num()
    torch.testing.assert_close(total.result(torch.float32), expected, rtol=1e-6, atol=1e-5)


def test_a_single_whole_part_is_the_sum_and_a_view_can_take_the_result(lazy):
    (span, part, _), *_ = parts(1)
    part = part.nan_to_num()
    total = merge.RowSum(part.shape, part.dtype, part.device)
    total.add(span, part)
    assert total.result() is part
    wide = torch.zeros(2, ROWS, 6, 24, dtype=torch.bfloat16)
    total.result(into=wide[:, :, 2:5])
    assert torch.equal(wide[:, :, 2:5], part)
    assert not wide[:, :, :2].any()


@pytest.mark.parametrize("count", [0, 1, 7, *(pytest.param(many, marks=pytest.mark.slow) for many in (6, 13))])
def test_a_lazy_merge_of_any_number_of_parts(lazy, count):
    q, found = torch.zeros(2, ROWS, 3, 8, dtype=torch.bfloat16), parts(count)
    merged = merge.RowMerge(q, 24)
    expected = torch.zeros(2, ROWS, 3, 24), torch.full((2, 3, ROWS), -torch.inf)
    for span, part, lse in found:
        merged.add(span, part, lse)
        merge.merge_(expected[0][:, span], expected[1][:, :, span], part.nan_to_num(), lse)
    out, lse = torch.full((2, ROWS, 3, 24), torch.nan), torch.full((2, 3, ROWS), torch.nan)
    merged.result(out, lse)
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected[1])


def test_a_merge_is_never_in_place(lazy, monkeypatch):
    from ringattn.kernels import triton_parts

    def watched(parts, out, lse):
        assert all(
            part.data_ptr() != out.data_ptr() and part_lse.data_ptr() != lse.data_ptr() for _, part, part_lse in parts
        )
        return merge_parts(parts, out, lse)

    monkeypatch.setattr(triton_parts, "merge_parts", watched)
    merged = merge.RowMerge(torch.zeros(2, ROWS, 3, 8, dtype=torch.bfloat16), 24)
    for span, part, lse in parts(18):
        merged.add(span, part, lse)
    merged.result(torch.empty(2, ROWS, 3, 24), torch.empty(2, 3, ROWS))


def test_copies_to_and_from_some_heads_of_a_wider_tensor(lazy):
    wide = torch.randn(2, ROWS, 6, 24, dtype=torch.bfloat16)
    narrow = torch.zeros(2, ROWS, 2, 24, dtype=torch.bfloat16)
    merge.copy_(narrow, wide[:, :, 1:3])
    assert torch.equal(narrow, wide[:, :, 1:3])
    back = torch.zeros_like(wide)
    merge.copy_(back[:, :, 4:], narrow)
    assert torch.equal(back[:, :, 4:], narrow)
    assert not back[:, :, :4].any()
