import torch

from ringattn.merge import merge_


def state(n=3):
    return torch.zeros(1, n, 2, 4, dtype=torch.float64), torch.full((1, 2, n), -torch.inf, dtype=torch.float64)


def test_merging_pieces_equals_the_whole():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, 3, 10, generator=generator, dtype=torch.float64) * 30
    values = torch.randn(1, 10, 2, 4, generator=generator, dtype=torch.float64)
    out, lse = state()
    for columns in (slice(0, 1), slice(1, 7), slice(7, 10)):
        piece = scores[..., columns]
        merge_(out, lse, torch.einsum("bhnm,bmhd->bnhd", piece.softmax(-1), values[:, columns]), piece.logsumexp(-1))
    torch.testing.assert_close(out, torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), values))
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_rows_that_see_nothing_stay_zero_and_never_become_nan():
    out, lse = state()
    block_lse = torch.tensor([[[-torch.inf, 1.0, -torch.inf]] * 2], dtype=torch.float64)
    merge_(out, lse, torch.ones_like(out), block_lse)
    merge_(out, lse, torch.ones_like(out), torch.full_like(lse, -torch.inf))
    assert torch.equal(lse, block_lse)
    assert torch.equal(out[0, :, 0, 0], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    assert out.isfinite().all()
