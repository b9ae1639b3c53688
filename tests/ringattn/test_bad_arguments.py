"""Arguments that cannot be honoured are refused before anything is sent, on all ranks where these could be told."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import ringattn
from tests.processes import run_ranks


def qkv(tokens, heads=4, groups=2, width=8, dtype=torch.float32, batch=1):
    return [torch.randn(batch, tokens, h, width, dtype=dtype, requires_grad=True) for h in (heads, groups, groups)]


def in_float8(tensors):
    return [x.detach().to(torch.float8_e4m3fn) for x in tensors]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"expected q \[B, S, H, D\]"),
        (lambda q, k, v: (q, k, v[:, :7]), "with one B and S, got q"),
        (
            lambda q, k, v: (q[:, :7], k[:, :7], v[:, :7]),
            "holds 8 of 8 tokens under this plan, q has 7.*cut the sequence",
        ),
        (lambda q, k, v: (q[:, :, :3], k, v), "multiple of key/value heads, got 3 and 2"),
        (lambda q, k, v: (q, k.double(), v), "one dtype of fp64, fp32, bf16, fp16; got torch.float32, torch.float64"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "one dtype"),
        (lambda *tensors: in_float8(tensors), "one dtype of fp64, fp32, bf16, fp16; got torch.float8_e4m3fn"),
    ],
)
def test_bad_tensors(change, message):
    with pytest.raises(ValueError, match=message):
        ringattn.ring_attention(*change(*qkv(8)), ringattn.Plan(8, 1))


def test_bad_group_kernel_and_transport():
    with pytest.raises(ValueError, match=r"cp_size 2, the group has 1 rank \(group=None is a single process\)"):
        ringattn.ring_attention(*qkv(8), ringattn.Plan(16, 2))
    with pytest.raises(ValueError, match="kernel: expected auto or one of"):
        ringattn.ring_attention(*qkv(8), ringattn.Plan(8, 1), kernel="fast")
    with pytest.raises(ValueError, match="transport: expected auto or one of copy_engine, hybrid, p2p, got 'tcp'"):
        ringattn.make_transport("tcp", None)
    with pytest.raises(ValueError, match="transport: expected auto or one of copy_engine, hybrid, p2p, got 'tcp'"):
        ringattn.ring_attention(*qkv(8), ringattn.Plan(8, 1), transport="tcp")


NO_DEGREE = "expected a degree, an integer, or what ringattn.make_ulysses made; got "


@pytest.mark.parametrize(
    ("degree", "told"),
    [
        (0, "the degree must divide the 1 rank of the ring, got 0; possible: 1"),
        (-2, "the degree must divide the 1 rank of the ring, got -2; possible: 1"),
        ("2", f"{NO_DEGREE}'2'"),
        (2.0, f"{NO_DEGREE}2.0"),
        (None, f"{NO_DEGREE}None"),
    ],
)
def test_a_bad_degree_is_named_in_a_single_process_too(degree, told):
    with pytest.raises(ValueError, match=told):
        ringattn.ring_attention(*qkv(8), ringattn.Plan(8, 1), ulysses=degree)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"q": np.zeros((1, 8, 4, 8))}, "expected q, k and v as torch tensors, got ndarray"),
        ({"plan": None}, "plan: expected a ringattn.Plan, got None"),
        ({"transport": None}, "transport: expected auto or one of copy_engine, hybrid, p2p, got None"),
        ({"transport": ["p2p"]}, r"transport: expected auto or one of copy_engine, hybrid, p2p, got \['p2p'\]"),
        ({"expand": "mla"}, "expand: expected a function or module, or None, got 'mla'"),
        ({"kernel": ["cpu"]}, r"kernel: expected a name, got \['cpu'\]"),
        ({"ulysses": True}, f"{NO_DEGREE}True"),
        ({"q": torch.tensor(1.0)}, r"expected q \[B, S, H, D\]"),
    ],
    ids=str,
)
def test_arguments_of_another_kind_are_named(change, told):
    given = dict(zip(("q", "k", "v"), qkv(8), strict=True)) | {"plan": ringattn.Plan(8, 1)} | change
    with pytest.raises(ValueError, match=told):
        ringattn.ring_attention(**given)


def kind_worker(rank, world_size, change, way):
    """On rank 1 an argument is of another kind."""
    plan, group = ringattn.Plan(24, world_size), dist.group.WORLD
    ulysses = ringattn.make_ulysses(group, world_size)
    change = {name: ulysses if given == "ulysses" else given for name, given in change.items()}
    options = {**({"ulysses": ulysses} if way == "ulysses" else {}), **(change if rank else {})}

    def attend(*tensors):
        return ringattn.ring_attention(*tensors, plan, group, **options)

    run = attend
    if way == "operator":
        contexts = partial(create_selective_checkpoint_contexts, [torch.ops.ringattn.attend.default])
        run = partial(checkpoint, attend, use_reentrant=False, context_fn=contexts)
    # A degree is asked for where Ulysses is made, which says ValueError on the rank that gave it.
    with pytest.raises(
        (ringattn.TopologyError, ValueError) if "ulysses" in change else ringattn.TopologyError
    ) as caught:
        run(*qkv(12))
    return str(caught.value)


KINDS = [{"expand": "mla"}, {"kernel": ["cpu"]}, {"scale": [1.0]}, {"transport": None}, {"transport": "ulysses"}]
KINDS += [{"ulysses": True}, {"ulysses": "2"}]


WAYS = [(way, change) for way in ("eager", "operator") for change in KINDS] + [("ulysses", kind) for kind in KINDS[:3]]


@pytest.mark.parametrize(("way", "change"), WAYS, ids=str)
def test_an_argument_of_another_kind_on_one_rank_is_told_to_all(way, change):
    first, second = run_ranks(kind_worker, 2, change, way)
    assert f"{next(iter(change))}: expected" in second
    assert "rank 1: arguments refused there" in first


class Raising(torch.nn.Module):
    """Expands k, or raises an error."""

    def __init__(self, error=None):
        super().__init__()
        self.error = error

    def forward(self, k, v, positions):
        if isinstance(self.error, Exception):
            raise self.error
        return k @ torch.eye(8 if self.error is None else 7), v


def raising_worker(rank, world_size, way):
    """On rank 1 `expand` raises what torch raises for shapes that do not fit; what each rank is told."""
    plan, group = ringattn.Plan(24, world_size), dist.group.WORLD
    options = {"ulysses": ringattn.make_ulysses(group, world_size)} if way == "ulysses" else {}

    def attend(expand):
        def call(*tensors):
            return ringattn.ring_attention(*tensors, plan, group, expand=expand, **options)

        if way != "operator":
            return call(*qkv(12))
        contexts = partial(create_selective_checkpoint_contexts, [torch.ops.ringattn.attend.default])
        return checkpoint(call, *qkv(12), use_reentrant=False, context_fn=contexts)

    with pytest.raises(ringattn.TopologyError) as caught:
        attend(Raising("other shape" if rank else None))
    return str(caught.value), repr(caught.value.__cause__)


@pytest.mark.parametrize("way", ["eager", "operator", "ulysses"])
def test_whatever_expand_raises_on_one_rank_is_told_to_all(way):
    (first, no_cause), (second, cause) = run_ranks(raising_worker, 2, way, timeout=20)
    assert "rank 1: arguments refused there" in first
    assert "expand: RuntimeError: mat1 and mat2 shapes cannot be multiplied" in second
    assert no_cause == "None"
    assert cause.startswith("RuntimeError('mat1 and mat2 shapes")


def memory_worker(rank, world_size):
    """Memory runs out while every rank expands."""
    for error in (torch.OutOfMemoryError("planted"), MemoryError("planted")):
        with pytest.raises(type(error), match=r"^planted$"):
            ringattn.ring_attention(*qkv(12), ringattn.Plan(24, world_size), dist.group.WORLD, expand=Raising(error))


def test_memory_that_ran_out_in_expand_stays_what_it_is():
    run_ranks(memory_worker, 2)


def test_in_a_single_process_what_expand_raises_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes"):
        ringattn.ring_attention(*qkv(8), ringattn.Plan(8, 1), expand=Raising("other shape"))
    with pytest.raises(ValueError, match="ring_attention: expand: refused") as caught:
        ringattn.ring_attention(*qkv(8), ringattn.Plan(8, 1), expand=Raising(ValueError("refused")))
    assert isinstance(caught.value.__cause__, ValueError)


def other_group_worker(rank, world_size, what):
    """Rings {0, 1} and {2, 3}, and what carries their payloads made for {0, 2} and {1, 3}."""
    rings, others = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    own, _, other = [[dist.new_group(ranks) for ranks in groups] for groups in (rings, rings, others)]
    own, other = own[rank // 2], other[rank % 2]
    made = {
        "transport": lambda group: {"transport": ringattn.make_transport("p2p", group)},
        "ulysses": lambda group: {"ulysses": ringattn.make_ulysses(group, 2)},
    }[what](other)
    again = dist.new_group(rings[rank // 2], use_local_synchronization=True)  # the same ranks are as good
    fitting = {
        "transport": lambda: {"transport": ringattn.make_transport("p2p", again)},
        "ulysses": lambda: {"ulysses": ringattn.make_ulysses(again, 2)},
    }[what]()
    plan, tensors = ringattn.Plan(32, 2), qkv(16)
    with pytest.raises(ValueError if what == "ulysses" else ringattn.TopologyError) as caught:
        ringattn.ring_attention(*tensors, plan, own, **made)
    assert bool(ringattn.ring_attention(*tensors, ringattn.Plan(32, 2), own, **fitting).isfinite().all())
    return str(caught.value)


@pytest.mark.parametrize("what", ["transport", "ulysses"])
def test_what_was_made_for_other_ranks_is_refused(what):
    """It would bring tokens of another sequence."""
    for rank, message in enumerate(run_ranks(other_group_worker, 4, what)):
        made, asked = [rank % 2, 2 + rank % 2], [2 * (rank // 2), 2 * (rank // 2) + 1]
        assert (
            f"{what}: made for the group of ranks {made} (of the world), and this call's group has {asked}" in message
        )


def device_worker(rank, world_size, ulysses):
    """On rank 1 the group is as one of NCCL, the tensors are on the CPU."""
    plan, group = ringattn.Plan(24, world_size), dist.group.WORLD
    made = ringattn.make_ulysses(group, 2) if ulysses else 1
    tensors = qkv(plan.shard_len(rank))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda group: "nccl" if rank else "gloo")
        with pytest.raises(ringattn.TopologyError) as caught:
            ringattn.ring_attention(*tensors, plan, group, transport="p2p", ulysses=made)
    return str(caught.value)


@pytest.mark.parametrize("ulysses", [False, True])
def test_tensors_where_the_group_cannot_send_them_from_are_refused_on_all_ranks(ulysses):
    first, second = run_ranks(device_worker, 2, ulysses)
    assert "rank 1: q, k, v are on cpu, and the group's backend nccl sends what is on cuda; move them there" in second
    assert "or give a group made with backend='gloo'" in second
    assert "rank 1: arguments refused there" in first
