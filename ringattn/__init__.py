"""ringattn: exact attention over one sequence that is cut over many ranks.

plan = ringattn.Plan(seq_len, cp_size, layout="zigzag", causal=True)
q = ringattn.shard(q, plan, rank)                       # likewise k and v
out = ringattn.ring_attention(q, k, v, plan, group=group)
out = ringattn.unshard(out.detach(), plan, group)
"""

from ringattn import testing
from ringattn.attention import ring_attention
from ringattn.errors import PeerError, RingAttnError, TopologyError
from ringattn.keeping import keeping_attention
from ringattn.layout import shard, unshard
from ringattn.plan import Plan
from ringattn.scoring.latent import FactorExpansion, LatentExpansion
from ringattn.scoring.selection import Selection, Votes
from ringattn.scoring.simulated import SimulatedScore
from ringattn.scoring.statistics import SelectionStatistics, selection_statistics
from ringattn.selfcheck import SelfCheckError, self_check
from ringattn.transport import make_transport
from ringattn.ulysses import make_ulysses

__all__ = [
    "FactorExpansion",
    "LatentExpansion",
    "PeerError",
    "Plan",
    "RingAttnError",
    "Selection",
    "SelectionStatistics",
    "SelfCheckError",
    "SimulatedScore",
    "TopologyError",
    "Votes",
    "keeping_attention",
    "make_transport",
    "make_ulysses",
    "ring_attention",
    "selection_statistics",
    "self_check",
    "shard",
    "testing",
    "unshard",
]
