"""The seam between a layer and whatever computes its attention: the callable, and the call that all kinds share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.kinds import attention_shape
from model.rope import Rotation
from model.selector import Carried, Selector
from ringattn.scoring.expansion import Expand

AttentionFn = Callable[..., Tensor | tuple[Tensor, Tensor]]
"""(q, k, v, *, selection=None, expand=None, scale=None) -> out, or (out, penalty); the ring lives in it.

q [B, S, H, D]; k and v [B, S, G, D], or the payload that `expand(k, v, positions)` turns into keys [B, S, G, D] and
values [B, S, G, Dv] where it is used; out [B, S, H, Dv] in q's dtype. selection: a `ringattn.Selection`. scale: factor
of the scores, None is 1/sqrt(D). Only what a model needs is passed: a function of q, k and v serves one of grouped
heads without selection. A penalty (made of the cost that comes with `selection.memory_tau`) is a scalar that the
decoder adds to its loss sum.
"""


Outcome = tuple[Tensor, Tensor | None, Carried]
"""(result, penalty or None, votes for deeper layers): a plain tuple, in which engines look for tensors.

The result is an attention's out [B, S, H', Dv], or the hidden states [B, S, E] of what contains it. Votes are (weights
[R + 1], own q and k [B, S, Dz]), or () without guidance and in the last layer; see `Carried`.
"""


class Attending(nn.Module):
    """Base of all kinds: selection around the attention callable, and the check of what comes back.

    A kind is what it makes of a token before the callable (`project`) and after it (`finish`), both token by token.

    Attributes:
        scale: Factor of the scores; None is 1/sqrt(D).
    """

    scale: float | None = None
    o_proj: nn.Linear

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.shape = attention_shape(config)
        self.selector = Selector(config, layer) if config.selection is not None else None

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, H, D] and the payload, k and v [B, S, ...], of normed hidden states [B, S, E]."""
        raise NotImplementedError

    def finish(self, out: Tensor) -> Tensor:
        """The change of the hidden states [B, S, E], of the attention's out [B, S, H, Dv]; `o_proj` alone."""
        change: Tensor = self.o_proj(out.flatten(2))
        return change

    def expansion(self) -> Expand | None:
        """What makes keys and values of the payload, if it is not keys and values."""
        return None

    def forward(self, x: Tensor, rotation: Rotation, attention: AttentionFn, carried: Carried = ()) -> Outcome:
        """Change of the hidden states, penalty, votes for deeper layers."""
        out, penalty, votes = self.attend(*self.project(x, rotation), rotation, attention, carried)
        return self.finish(out), penalty, votes

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotation: Rotation,
        attention: AttentionFn,
        carried: Carried,
    ) -> Outcome:
        """Call the attention: out [B, S, H', Dv], penalty, votes for deeper layers.

        Raises:
            ValueError: What came back is not [B, S, H', Dv] in q's dtype, or has a penalty that is no scalar.
        """
        expand, scale = self.expansion(), self.scale
        options: dict[str, object] = {}
        if expand is not None:
            options["expand"] = expand
        if scale is not None:
            options["scale"] = scale
        votes: Carried = ()
        if self.selector is not None:
            chosen = self.selector(carried, q, scale)
            options["selection"] = chosen.selection
            if chosen.weights is not None:
                votes = (chosen.weights, *self._voters(q, k, v, rotation, expand))
        found = attention(q, k, v, **options)
        out, penalty = found if isinstance(found, tuple) else (found, None)
        expected = (*q.shape[:3], self.shape.value_dim)
        if out.shape != expected or out.dtype != q.dtype:
            raise ValueError(
                f"attention callable: expected {q.dtype} of shape {list(expected)}, got {out.dtype} of shape "
                f"{list(out.shape)}; it must return [B, S, H, Dv] in q's dtype"
            )
        if penalty is not None and penalty.ndim:
            raise ValueError(
                f"attention callable: expected a scalar beside the output, in units of the loss sum, got shape "
                f"{list(penalty.shape)}; reduce the tokens' memory cost first"
            )
        return out, penalty, votes

    def _voters(
        self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, expand: Expand | None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, S, D] of the selection head; copies, so that deeper layers do not hold all heads."""
        assert self.selector is not None
        head = self.selector.config.head
        key_head = head // (self.shape.heads // self.shape.key_heads)

        def keys(k: Tensor, v: Tensor) -> Tensor:
            expanded = k if expand is None else expand(k, v, rotation.positions)[0]
            return expanded[:, :, key_head].contiguous()

        if expand is not None and torch.is_grad_enabled():
            # what the expansion of all heads would keep for the backward is many times the payload
            own = checkpoint(keys, k, v, use_reentrant=False, preserve_rng_state=False)
        else:
            own = keys(k, v)
        return q[:, :, head].contiguous(), own
