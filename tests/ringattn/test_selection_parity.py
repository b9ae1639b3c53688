"""Our selective attention against x-transformers' `attn_selective=True`: same weights, same outputs, same gradients.

What its source does (x_transformers/attend.py, `selective_attn`, and `Attend.forward`), and how ours says the same:

- the votes are those of query head 0 on its scaled scores, after the causal fill with -max: `Selection(head=0)`, and
  our votes are on j < m only;
- the first key's column of votes is zeroed (`no_mask_sos`), the diagonal too: `protect_first=True`, its default here;
- one row of zeros is padded on top and the sum runs down the queries: strictly earlier queries vote, `lag=1`;
- the sum is subtracted from the scores of every head, head 0 included, without a factor: `gain=1.0`;
- nothing is detached: the gradient reaches head 0's query and key through the votes;
- scores are scaled by 1/sqrt(D), ours by default;
- grouped heads: `repeat(k, 'b kvh n d -> b (r kvh) n d')`, so query head h uses key/value head h % G, where ours uses
  h // (H / G). The same weights give the same numbers once the query heads are put in our order. Head 0 stays head 0.
- it has no documents, no gain and no lag.
"""

import pytest
import torch
from einops import rearrange

import ringattn
from ringattn.testing import dense_attention, error, selection_bias

x_transformers = pytest.importorskip("x_transformers", reason="x-transformers is a test dependency")

TOLERANCE = 1e-5
WIDTH, LENGTH = 16, 37


def their_attention(heads, groups, **settings):
    torch.manual_seed(heads)
    return x_transformers.x_transformers.Attention(
        dim=24, dim_head=WIDTH, heads=heads, kv_heads=groups, causal=True, flash=False, **settings
    )


def through_oracle(q, k, v):
    return dense_attention(q, k, v, selection=ringattn.Selection())


def through_ring(q, k, v):
    plan = ringattn.Plan(q.shape[1], 1)
    return ringattn.ring_attention(q, k, v, plan, selection=ringattn.Selection())


def ours(layer, x, attend):
    """The same layer with our attention between its projections."""
    groups, repeats = layer.kv_heads, layer.heads // layer.kv_heads
    # their query head (r g) -> our query head (g r)
    q = rearrange(layer.to_q(x), "b n (r g d) -> b n (g r) d", g=groups, r=repeats)
    k, v = (rearrange(project(x), "b n (g d) -> b n g d", g=groups) for project in (layer.to_k, layer.to_v))
    out = attend(q, k, v)
    return layer.to_out(rearrange(out, "b n (g r) d -> b n (r g d)", g=groups, r=repeats))


def everything(layer, function):
    """Output, gradient of the input and of every weight; the scores are large enough for votes to matter."""
    generator = torch.Generator().manual_seed(1)
    x, dout = (torch.randn(2, LENGTH, 24, generator=generator) for _ in range(2))
    x.requires_grad_()
    layer.zero_grad()
    out = function(x)
    out.backward(dout)
    gradients = {name: weight.grad.clone() for name, weight in layer.named_parameters()}
    return {"out": out.detach(), "dx": x.grad, **gradients}


@pytest.mark.parametrize("attend", [through_oracle, through_ring])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_outputs_and_gradients_equal_x_transformers(heads, groups, attend):
    layer = their_attention(heads, groups, selective=True)
    theirs = everything(layer, layer)
    mine = everything(layer, lambda x: ours(layer, x, attend))
    assert theirs.keys() == mine.keys()
    for name, expected in theirs.items():
        assert error(mine[name], expected) <= TOLERANCE, name


def test_the_votes_matter_here_and_another_convention_is_noticed():
    layer = their_attention(4, 2, selective=True)
    theirs = everything(layer, layer)
    plain = everything(layer, lambda x: ours(layer, x, dense_attention))
    assert error(plain["out"], theirs["out"]) > 100 * TOLERANCE
    for wrong in ({"protect_first": False}, {"head": 1}, {"lag": 2}, {"gain": 0.5}):
        chosen = ringattn.Selection(**wrong)
        other = everything(
            layer, lambda x, s=chosen: ours(layer, x, lambda q, k, v: dense_attention(q, k, v, selection=s))
        )
        assert error(other["out"], theirs["out"]) > 10 * TOLERANCE, wrong
        assert error(other["to_q.weight"], theirs["to_q.weight"]) > 10 * TOLERANCE, wrong


def test_the_option_of_its_decoder_sets_what_is_compared_here():
    decoder = x_transformers.Decoder(dim=24, depth=1, heads=4, attn_dim_head=WIDTH, attn_selective=True)
    assert [m.attend.selective for m in decoder.modules() if hasattr(m, "attend")] == [True]


def test_the_bias_itself():
    """Their function, given our scores, subtracts our F."""
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2, LENGTH, 3, WIDTH, generator=generator) for _ in range(2))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * WIDTH**-0.5
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    filled = scores.masked_fill(~seen, -torch.finfo(scores.dtype).max)
    theirs = (filled - x_transformers.attend.selective_attn(filled)).masked_fill(~seen, 0.0)
    expected = selection_bias(q, k, ringattn.Selection()).masked_fill(~seen, 0.0)
    assert error(theirs, expected[:, None].expand_as(theirs)) <= TOLERANCE * expected.max()
