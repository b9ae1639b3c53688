"""torch.compile through selection, `expand` and Ulysses: one graph, and the numbers of the dense definition."""

import copy
import functools
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import library, nn

import ringattn
from ringattn import operator_calls
from ringattn.operators import attend, attend_backward
from ringattn.scoring.expansion_module import ExpansionModule
from ringattn.testing import error
from tests.processes import run_ranks
from tests.ringattn import test_selection_ring as selective
from tests.ringattn.test_compile import counting_backend
from tests.ringattn.test_keeping import LENGTH, gradients, off, problem

Case = selective.Case
CASES = [
    Case(LENGTH, "zigzag", lag=4, documents=(0, 9, LENGTH), terms=3, cost=True),
    Case(LENGTH, "contiguous", terms=2, head=2, cost=True, expanded=True),
    Case(LENGTH + 3, "zigzag", protect_first=False, expanded=True),
]


@pytest.fixture(autouse=True)
def forgetful():
    """What other tests compiled of the same code counts towards the compiler's limit."""
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, backend=backend, fullgraph=True)


def dense_worker(rank, world_size, degree):
    attention = compiled(ringattn.ring_attention)
    ringattn.ring_attention = functools.partial(attention, ulysses=degree)
    group = dist.group.WORLD if world_size > 1 else None
    return [selective.attend(case, rank, world_size, group) for case in CASES]


def check_dense(results):
    for case, result in zip(CASES, results, strict=False):
        for name, actual, expected in zip(selective.names(case), result, selective.oracle(case), strict=True):
            assert error(actual, expected) <= 1e-10, (case, name, error(actual, expected))


def test_equals_the_dense_definition(monkeypatch):
    monkeypatch.setattr(ringattn, "ring_attention", compiled(ringattn.ring_attention))
    check_dense([selective.attend(case, 0, 1, None) for case in CASES[:2]])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "degree"), [(2, 1), (3, 1), (2, 2), (4, 2)])
def test_over_rings_and_with_heads_exchanged(size, degree):
    for results in run_ranks(dense_worker, size, degree, timeout=200):
        check_dense(results)


class Attending(nn.Module):
    """Attention alone, to a module's expansion of k [B, S, G, D] and v."""

    def __init__(self, expand):
        super().__init__()
        self.expand = expand

    def forward(self, q, k, v, plan):
        return ringattn.ring_attention(q, k, v, plan, expand=self.expand)


def latent(seed):
    torch.manual_seed(seed)
    return ringattn.LatentExpansion(heads=2, latent_dim=6, rotary_dim=4, nope_dim=4, value_dim=5).double()


class Turned(nn.Module):
    """Any module, and a method of it."""

    def __init__(self, width=8):
        super().__init__()
        self.up = nn.Linear(6, width, bias=False, dtype=torch.float64)
        self.wide = nn.Linear(4, 3, bias=False, dtype=torch.float64)

    def forward(self, k, v, positions):
        return self.up(k) * torch.cos(positions)[:, None, None], self.wide(v)

    def method(self, k, v, positions):
        return self.up(k), v


def payload(length=LENGTH):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 8), (1, 6), (1, 4)]
    return [torch.randn(1, length, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def outcome(module, inputs, plan):
    """Out, and gradients of the inputs and of all parameters."""
    leaves = [*(x.clone().requires_grad_() for x in inputs)]
    out = module(*leaves, plan)
    parameters = list(module.parameters())
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [*leaves, *parameters])]


def graphs_of(modules, lengths=(LENGTH,)):
    """How many graphs there were after each module and length; each result is that of eager."""
    backend, graphs = counting_backend()
    counts = []
    for length in lengths:
        for module in modules:
            plan, inputs = ringattn.Plan(length, 1), payload(length)
            found = outcome(compiled(module, backend), inputs, plan)
            assert off(found, outcome(module, inputs, plan)) <= 1e-12
            counts.append(len(graphs))
    return counts


def test_one_graph_serves_all_expansions_that_are_alike_and_their_copies():
    first = Attending(latent(0))
    copies = [copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    for number, module in enumerate(copies):
        for parameter in module.parameters():
            parameter.data.mul_(number + 2.0)  # what would expand by the original would be off
    modules = [first, Attending(latent(1)), *copies, Attending(copy.copy(first.expand))]
    assert len({int(module.expand._ringattn_handle) for module in modules}) == len(modules)
    assert graphs_of(modules) == [1] * len(modules)


def test_any_module_and_its_methods_are_compiled_for_one_by_one():
    modules = [Turned(), Turned()]
    counts = graphs_of([Attending(x) for x in (modules[0], modules[0].method, modules[1], copy.deepcopy(modules[1]))])
    assert counts == [1, 2, 3, 4]


def test_other_lengths_are_one_more_graph():
    assert graphs_of([Attending(latent(0))], (LENGTH, 30, 34, 41)) == [1, 2, 2, 2]


def test_functions_break_the_graph_and_are_right():
    def attention(q, k, v, plan):
        def twice(k, v, positions):
            return 2.0 * torch.cat((k, k[..., :2]), dim=-1), v

        return ringattn.ring_attention(q, k, v, plan, expand=twice)

    plan, inputs = ringattn.Plan(LENGTH, 1), payload()
    found = torch.compile(attention, backend="aot_eager")(*inputs, plan)
    assert error(found, attention(*inputs, plan)) <= 1e-12
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(attention)(*inputs, plan)


class Misjudged(ExpansionModule):
    def value_width(self, v):
        return v.shape[-1] + 1

    def forward(self, k, v, positions):
        return torch.cat((k, k[..., :2]), dim=-1), v


def test_values_of_another_width_than_was_compiled_for_are_refused():
    with pytest.raises(RuntimeError, match="values of width 5, called with one of 4"):
        compiled(Attending(Misjudged()))(*payload(), ringattn.Plan(LENGTH, 1))


class Hiding(Turned):
    def __init__(self, hidden):
        super().__init__()
        self.hidden = [hidden]  # nobody's parameter

    def forward(self, k, v, positions):
        return self.up(k) * self.hidden[0], v


def test_tensors_whose_gradients_would_be_lost_are_refused():
    module = Attending(Hiding(torch.ones((), dtype=torch.float64, requires_grad=True)))
    with pytest.raises(ValueError, match="uses 1 tensors with gradients that the ring cannot see"):
        compiled(module)(*payload(), ringattn.Plan(LENGTH, 1))
    with torch.no_grad():
        compiled(module)(*payload(), ringattn.Plan(LENGTH, 1))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["expand", "selection"])
def test_without_gradients(kind, context):
    layers, x, plan = problem(kind, 0, 1)
    with context():
        x = x.clone()  # an inference tensor, where there are some
        assert error(compiled(layers[0])(x, plan, None, "auto"), layers[0](x, plan, None, "auto")) <= 1e-14


def test_expands_as_autocast_says_where_it_is_called():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 8, bias=False)

        def forward(self, k, v, positions):
            return self.up(k).float(), v

    module, plan = Attending(Narrow()), ringattn.Plan(LENGTH, 1)
    inputs = [x.float() for x in payload()]
    plain = outcome(module, inputs, plan)
    with torch.autocast("cpu"):
        eager, found = (outcome(f, inputs, plan) for f in (module, compiled(module)))
    assert off(found, eager) == 0
    assert off(plain, eager) > 1e-4


def by_operator(q, k, v, plan, group=None, *, selection=None, expand=None, transport="auto", ulysses=1):
    """As a dispatcher mode has it."""
    options = {"selection": selection, "expand": expand, "transport": transport, "ulysses": ulysses}
    return operator_calls.attend_by_operator(q, k, v, plan, group, kernel="auto", scale=None, **options)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*itertools.product(["plain", "expand", "selection"], [torch.float64]), ("selection", torch.bfloat16)],
)
def test_the_operators_by_the_rules_of_torch(monkeypatch, kind, dtype):
    calls, (layers, x, plan) = [], problem(kind, 0, 1)
    layers, x = layers.to(dtype), x.to(dtype)

    def recording(*arguments, **numbers):
        calls.append((arguments, numbers))
        return attend(*arguments, **numbers)

    monkeypatch.setattr(operator_calls, "attend", recording)
    monkeypatch.setattr(ringattn, "ring_attention", by_operator)
    layers[0](x.requires_grad_(), plan, None, "auto")
    ((arguments, numbers),) = calls
    # not those that compare two runs: each call has a token of its own
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(attend, arguments, numbers, test_utils=names)
    out, lse, cost, token = (x.detach() for x in attend(*arguments, **numbers))
    given = [[y.detach() for y in x] if isinstance(x, list) else x.detach() for x in arguments[:5]]
    dcost = torch.ones_like(cost) if kind == "selection" else None
    library.opcheck(attend_backward, (torch.ones_like(out), dcost, *given, out, lse, token))


def retaining_worker(rank, world_size):
    """Two walks of one graph around an operator, for each kind: how they differ, and how small a gradient is."""
    ringattn.ring_attention, found = by_operator, {}
    for kind in ("expand", "selection", "ulysses"):
        layers, x, plan = problem(kind, rank, world_size)
        out = layers[0](x.requires_grad_(), plan, dist.group.WORLD, 2 if kind == "ulysses" else "auto").square().sum()
        leaves = [x, *layers[0].parameters()]
        first, second = (torch.autograd.grad(out, leaves, retain_graph=True) for _ in range(2))
        found[kind] = off(first, second), min(float(gradient.abs().max()) for gradient in first)
    return found


def test_a_retained_graph_is_walked_twice():
    for found in run_ranks(retaining_worker, 2):
        assert all(difference == 0 and size > 0 for difference, size in found.values()), found


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_gain_that_changes_from_call_to_call_breaks_no_graph(dynamic):
    """A number is a symbol to the compiler at first, and then compiled for by itself; a tensor is one graph for all."""

    def attend(x, plan, gain):
        return ringattn.ring_attention(x, x, x, plan, selection=ringattn.Selection(gain=gain))

    backend, graphs = counting_backend()
    traced = torch.compile(attend, backend=backend, fullgraph=True, dynamic=dynamic)
    x, plan = payload()[0], ringattn.Plan(LENGTH, 1)
    for gain in (0.3, 0.4, 0.5):
        assert error(traced(x, plan, gain), attend(x, plan, gain)) <= 1e-12
    before = len(graphs)
    for gain in (0.3, 0.4, 0.5):
        gain = torch.tensor([gain])
        assert error(traced(x, plan, gain), attend(x, plan, gain)) <= 1e-12
    assert len(graphs) == before + 1
    with pytest.raises(ValueError, match="gain: expected a finite number"):
        attend(x, plan, float("inf"))


def ulysses_worker(rank, world_size):
    """Graphs and errors of layers that exchange heads, with other documents, lengths and by degree."""
    group, found = dist.group.WORLD, []
    made = ringattn.make_ulysses(group, 2)
    backend, graphs = counting_backend()
    layers = problem("ulysses", rank, world_size)[0]
    for length, documents, ulysses in (
        (LENGTH, None, made),
        (LENGTH, (0, 5, LENGTH), made),
        (30, None, made),
        (35, (0, 30, 35), made),
        (35, None, 2),
    ):
        plan = ringattn.Plan(length, world_size, documents=documents)
        torch.manual_seed(length)
        x = ringattn.shard(torch.randn(1, length, 16, dtype=torch.float64), plan, rank)
        expected = gradients(None, layers, x, plan, group, ulysses)
        modules = nn.ModuleList(compiled(layer, backend) for layer in layers)
        found.append((off(gradients(None, modules, x, plan, group, ulysses), expected), len(graphs)))
    errors = []
    for expand, degree in ((Hiding(torch.ones((), dtype=torch.float64, requires_grad=True)), 2), (None, 3)):
        plan = ringattn.Plan(LENGTH, world_size)
        q, k, v = (ringattn.shard(x, plan, rank) for x in payload())
        try:
            attention = functools.partial(ringattn.ring_attention, plan=plan, group=group, ulysses=degree)
            compiled(attention)(q, k if expand else q, v if expand else q, expand=expand)
        except ValueError as error:
            errors.append(str(error))
    return found, errors


@pytest.mark.slow
def test_heads_exchanged_for_tokens():
    for found, errors in run_ranks(ulysses_worker, 2, timeout=100):
        assert all(difference <= 1e-12 for difference, _ in found), found
        assert [count for _, count in found] == [1, 1, 2, 2, 3]
        assert "ring cannot see" in errors[0]
        assert "must divide the 2 ranks" in errors[1]
