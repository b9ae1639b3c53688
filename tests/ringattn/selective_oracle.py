"""What the tests of selective kernels share: the dense definition in float64, and a chain of pieces without a ring."""

import math

import torch

from ringattn.kernels.selective.geometry import Ballot, Geometry

NAMES = ("out", "lse", "cost", "dq", "dk", "dv", "dballot_q", "dballot_k", "dweights")


def problem(
    n=64, heads=2, groups=None, width=16, v_width=None, terms=1, ballot_width=None, lag=1, documents=None,
    protect_first=True, cost=False, tau=1.0, batch=1, dtype=torch.float32, device="cpu", seed=1, weights=None,
    spread=1.0,
):  # fmt: skip
    """Random tensors of one layer, as a dict; `documents` are the boundaries of packed documents."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread).to(device, dtype)

    groups = groups or heads
    v_width, ballot_width = v_width or width, ballot_width or width
    starts = None
    if documents is not None:
        bounds = torch.tensor(documents, dtype=torch.int64)
        starts = bounds[torch.searchsorted(bounds, torch.arange(n), right=True) - 1].to(device, torch.int32)
    return {
        "q": draw(batch, n, heads, width), "k": draw(batch, n, groups, width), "v": draw(batch, n, groups, v_width),
        "dout": draw(batch, n, heads, v_width), "ballot_q": draw(batch, n, terms, ballot_width),
        "ballot_k": draw(batch, n, terms, ballot_width),
        "weights": torch.tensor(weights or [0.2 / (r + 1) for r in range(terms)], dtype=torch.float32, device=device),
        "scales": tuple((r + 1) / math.sqrt(ballot_width) for r in range(terms)), "scale": 1 / math.sqrt(width),
        "starts": starts, "lag": lag, "protect_first": protect_first, "tau": tau,
        "dcost": torch.rand(batch, n, generator=generator).to(device) if cost else None,
    }  # fmt: skip


def dense(case, rows=slice(None), keys=slice(None)):
    """out, lse, cost and all gradients by autograd through the N x N definition, in float64 on the CPU.

    Of `rows` and `keys` alone, as if there were no others.
    """
    of = {"q": rows, "k": keys, "v": keys, "ballot_q": rows, "ballot_k": keys}
    leaf = {name: case[name][:, part].detach().double().cpu().requires_grad_() for name, part in of.items()}
    leaf["weights"] = case["weights"].detach().double().cpu().requires_grad_()
    n, share = case["q"].shape[1], case["q"].shape[2] // case["k"].shape[2]
    starts = torch.zeros(n, dtype=torch.long) if case["starts"] is None else case["starts"].cpu().long()
    i, j = torch.arange(n)[rows, None], torch.arange(n)[None, keys]
    visible = (j <= i) & (j >= starts[rows, None])
    may_vote = visible & (j < i)
    if case["protect_first"]:
        may_vote &= j != starts[None, keys]
    z = torch.einsum("bnrd,bmrd->brnm", leaf["ballot_q"], leaf["ballot_k"])
    z = z * torch.tensor(case["scales"], dtype=torch.float64).view(1, -1, 1, 1)
    votes = (z.relu() * leaf["weights"].view(1, -1, 1, 1)).sum(1) * may_vote
    counts = ((i // case["lag"] * case["lag"]) > i.T).double()
    bias = counts @ votes  # F[i, j] = sum of votes[m, j] over m < lag * (i // lag)
    k, v = (leaf[x].repeat_interleave(share, dim=2) for x in ("k", "v"))
    scores = torch.einsum("bnhd,bmhd->bhnm", leaf["q"], k) * case["scale"] - bias[:, None]
    scores = scores.masked_fill(~visible, -torch.inf)
    blind = ~visible.any(dim=1, keepdim=True)  # rows that see nothing
    attention = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    out = torch.einsum("bhnm,bmhd->bnhd", attention, v)
    cost = (bias.clamp_max(case["tau"]) * visible).sum(-1) / case["tau"]
    loss = (out * case["dout"][:, rows].double().cpu()).sum()
    if case["dcost"] is not None:
        loss = loss + (cost * case["dcost"][:, rows].double().cpu()).sum()
    loss.backward()
    result = {"out": out, "lse": scores.logsumexp(-1), "cost": cost if case["dcost"] is not None else None}
    result |= {f"d{name}": x.grad for name, x in leaf.items()}
    return {name: None if x is None else x.detach() for name, x in result.items()}


def errors(found, truth, case):
    """Relative error of each result. dweights, single numbers that cancel, are held against what one row adds."""
    result = {}
    for name in NAMES:
        if truth[name] is not None:
            scale = truth[name].norm()
            if name == "dweights":
                parts = torch.einsum("bnrd,bnrd->bnr", truth["dballot_q"], case["ballot_q"].double().cpu())
                scale = scale + (parts / case["weights"].double().cpu()).norm()
            result[name] = float((found[name].double() - truth[name]).norm() / scale.clamp_min(1e-12))
    return result


def run_pieces(kernel, case, cuts=((0, None),), key_cuts=((0, None),), *, backwards=False):
    """All results of `dense`, by a kernel that sees rows and keys in pieces, chained as a ring would chain them.

    What the first block of some rows or keys may find unwritten is NaN. `backwards`: the last block comes first.
    """
    n = case["q"].shape[1]
    cuts = [(a, n if b is None else b) for a, b in cuts]
    key_cuts = [(a, n if b is None else b) for a, b in key_cuts]
    like = {"dtype": torch.float32, "device": case["q"].device}
    result = {f"d{name}": torch.full(case[name].shape, torch.nan, **like) for name in ("q", "k", "v")}
    result |= {f"d{name}": torch.zeros(case[name].shape, **like) for name in ("ballot_q", "ballot_k", "weights")}
    batch, _, heads, v_width = case["dout"].shape
    result["out"] = torch.full((batch, n, heads, v_width), torch.nan, **like)
    result["lse"] = torch.full((batch, heads, n), -torch.inf, **like)
    result["cost"] = torch.zeros(batch, n, **like)
    seen = [(r, c) for r in cuts for c in key_cuts if c[0] < r[1]][:: -1 if backwards else 1]
    new_rows, new_keys = ({pair[i]: pair for pair in reversed(seen)} for i in (0, 1))  # the first block of each
    part = {rc: part_of(case, *rc) for rc in seen}
    sums = {rc: kernel.sums(*part[rc]) for rc in seen}
    # Votes of earlier pieces; pieces cut inside a block of `lag` rows count only from the next multiple on.
    lag = case["lag"]
    carries = {
        (r, c): sum(
            (sums[p, c] for p in cuts if (p, c) in sums and p[1] <= r[0] // lag * lag),
            torch.zeros(batch, c[1] - c[0], **like),
        )
        for r, c in seen
    }
    for r, c in seen:
        rows, keys = slice(*r), slice(*c)
        extra = {"cost": result["cost"][:, rows], "tau": case["tau"]} if case["dcost"] is not None else {}
        kernel.forward_(
            case["q"][:, rows], case["k"][:, keys], case["v"][:, keys], part[r, c][0], carries[r, c], part[r, c][1],
            case["scale"], result["out"][:, rows], result["lse"][:, :, rows], fresh_rows=new_rows[r] == (r, c), **extra,
        )  # fmt: skip
    columns = {}
    for r, c in seen:
        rows, keys = slice(*r), slice(*c)
        extra = {"dcost": case["dcost"][:, rows], "tau": case["tau"]} if case["dcost"] is not None else {}
        columns[r, c] = kernel.backward_(
            case["dout"][:, rows], case["q"][:, rows], case["k"][:, keys], case["v"][:, keys], part[r, c][0],
            carries[r, c], part[r, c][1], case["scale"], result["out"][:, rows], result["lse"][:, :, rows],
            result["dq"][:, rows], result["dk"][:, keys], result["dv"][:, keys], result["dballot_q"][:, rows],
            result["dballot_k"][:, keys], result["dweights"], fresh_rows=new_rows[r] == (r, c),
            fresh_keys=new_keys[c] == (r, c), **extra,
        )  # fmt: skip
    for r, c in seen:
        later = [columns[p, c] for p in cuts if (p, c) in columns and p[0] // lag * lag >= r[1]]
        if later:
            rows, keys = slice(*r), slice(*c)
            kernel.suffix_(
                part[r, c][0], sum(later), part[r, c][1], result["dballot_q"][:, rows], result["dballot_k"][:, keys],
                result["dweights"],
            )  # fmt: skip
    return {name: x.cpu() for name, x in result.items()}


def part_of(case, rows, keys):
    starts = case["starts"]
    ballot = Ballot(
        q=case["ballot_q"][:, rows[0] : rows[1]], k=case["ballot_k"][:, keys[0] : keys[1]], weights=case["weights"],
        scales=case["scales"],
    )  # fmt: skip
    geometry = Geometry(
        q_start=rows[0], k_start=keys[0], lag=case["lag"], protect_first=case["protect_first"],
        q_documents=None if starts is None else starts[rows[0] : rows[1]],
        k_documents=None if starts is None else starts[keys[0] : keys[1]],
    )  # fmt: skip
    return ballot, geometry
