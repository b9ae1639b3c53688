"""A kernel that takes packs, for CPUs: masked attention over rows laid end to end, as the packed operators see them."""

import torch

from ringattn.kernels.reference import ReferenceKernel
from ringattn.mask import Relation


class PackingReference(ReferenceKernel):
    """Takes the place of one kernel; `calls` counts packs and, beside them, single blocks."""

    packs = True

    def __init__(self, name="flash"):
        self.name = name
        self.calls = {"packs": 0, "documents": 0, "blocks": 0}

    def unsupported(self, q, k, v, masked):
        return "it knows no general mask" if masked else None

    def forward(self, *tensors, **how):
        self.calls["blocks"] += 1
        return super().forward(*tensors, **how)

    def forward_packed(self, q, k, v, *, pack, scale):
        self.calls["packs"] += 1
        self.calls["documents"] += len(pack.q_starts) - 1
        flat, mask = self._flat(pack, q, k, v)
        out, lse = super().forward(*flat, causal=False, mask=mask, scale=scale)
        return out.view(*q.shape[:3], -1), lse.view(q.shape[2], *q.shape[:2]).transpose(0, 1)

    def backward_packed(self, dout, q, k, v, out, lse, *, pack, scale):
        flat, mask = self._flat(pack, q, k, v)
        dout, out = (x.reshape(1, -1, *x.shape[2:]) for x in (dout, out))
        lse = lse.transpose(0, 1).reshape(1, q.shape[2], -1)
        found = super().backward(dout, *flat, out, lse, causal=False, mask=mask, scale=scale)
        return tuple(x.view(like.shape) for x, like in zip(found, (q, k, v), strict=True))

    @staticmethod
    def _flat(pack, q, k, v):
        """All rows of the batch as one, and what may be seen there by the starts alone."""
        q_starts, k_starts = pack.starts(q.shape[0], q.device)
        rows, keys = torch.arange(q.shape[:2].numel()), torch.arange(k.shape[:2].numel())
        q_number, k_number = (
            torch.searchsorted(starts.long(), places, right=True) - 1
            for starts, places in ((q_starts, rows), (k_starts, keys))
        )
        mask = q_number[:, None] == k_number[None, :]
        if pack.relation is Relation.CAUSAL:
            within = rows - q_starts.long()[q_number], keys - k_starts.long()[k_number]
            mask &= within[1][None, :] <= within[0][:, None]
        return [x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v)], mask
