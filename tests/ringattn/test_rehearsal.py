"""A rehearsal makes all launches of the self-check: in Triton's interpreter; tests/gpu has the compiled kernels."""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

import ringattn
from ringattn import merge
from ringattn.kernels import selective
from ringattn.kernels.selective.triton_kernel import TritonSelective
from ringattn.kernels.selective.triton_tools import Tiles
from ringattn.scoring import simulated_layers
from ringattn.selfcheck_case import Parts, compare, make_case, rehearse
from ringattn.triton_compiling import compiling, rehearsal

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu tests this where there is CUDA")

SIZES = dict.fromkeys(("rows", "keys", "back_rows", "back_keys", "query_rows", "query_keys"), 16)
SIZES |= {"vote_rows": 16, "vote_keys": 16, "span": 16, "span_all": 32, "descriptors": False, "hold": False}
SAS = {"heads": 2, "simulated_heads": 4, "head_dim": 16, "simulated_dim": 16}
KINDS = {
    "plain": {},
    "exact": {"selection": ringattn.Selection(gain=torch.zeros(1))},
    "lag": {"selection": ringattn.Selection(lag=16), "guided": True},
    "SAS": {"expand": lambda: ringattn.SimulatedScore(**SAS).key_value},
}


@pytest.fixture
def launches(monkeypatch):
    """(in a rehearsal?, what is compiled) of each launch; all is left to Triton that can be."""
    monkeypatch.setattr(merge, "_fused", lambda device, dtype: dtype == torch.float32)
    monkeypatch.setattr(selective, "_kernel_problem", lambda *arguments: None)
    monkeypatch.setattr(selective, "_make", lambda name: TritonSelective(Tiles(**SIZES), interpreted=True))
    monkeypatch.setattr(
        simulated_layers, "_unfusable", lambda x, *layers: "not fp64" if x.dtype == torch.float64 else None
    )
    run, found = InterpretedFunction.run, []

    def noting(self, *arguments, grid, warmup, **options):
        found.append((warmup, compiled_for(self, arguments, options)))
        return run(self, *arguments, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(InterpretedFunction, "run", noting)
    return found


def compiled_for(kernel, arguments, options):
    """Triton compiles one kernel for all launches of which this is the same."""
    anything, anywhere = (kernel.kwargs.get(f"do_not_specialize{how}") or () for how in ("", "_on_alignment"))
    seen = []
    for name, x in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(x, torch.Tensor):
            seen.append((x.dtype, name in anywhere or x.data_ptr() % 16 == 0))
        elif name in anything or isinstance(x, float):
            seen.append(type(x))
        else:
            seen.append((x == 1, x % 16 == 0) if isinstance(x, int) else x)
    return kernel.__name__, *seen, *sorted(options.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_launches_what_the_check_launches(launches, kind):
    fields = dict.fromkeys(("group", "scale", "selection", "expand"))
    fields |= {"device": torch.device("cpu"), "dtype": torch.float32, "kernel": "auto", "transport": "auto"}
    parts = Parts(**{**fields, "ulysses": 1, "guided": False, **KINDS[kind]})
    plan = ringattn.Plan(33, 1, documents=(0, 11, 12, 33))
    heads, payload = ((4, 4), ((2, 16), (2, 16))) if kind == "SAS" else ((2, 1), None)
    case = make_case(plan, parts, heads, (16, 16), payload)
    with compiling() as took, rehearsal(took):
        rehearse(case, parts)
    errors = compare(case, parts)
    assert not errors.wrong().any()
    rehearsed, run = ({launch for only, launch in launches if only is wanted} for wanted in (True, False))
    assert run
    assert run - rehearsed == set()
