"""flash-attn 3 and 4: what the adapters give and take, on stand-ins for the packages, and what they refuse."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ringattn
from ringattn.attention import attend_on
from ringattn.errors import RingAttnError
from ringattn.kernels import KERNELS, check_kernel, flash_packages, pick_kernel
from ringattn.kernels.flash_packages import PackageKernel, load_flash3, load_flash4
from ringattn.testing import error
from ringattn.transport.loopback import attend_in_turns
from tests.ringattn import flash_packages_stand_ins as stand_ins
from tests.ringattn.test_kernels import dense, tensors
from tests.ringattn.test_ring import Case, oracle, problem

LOADS = {"flash3": load_flash3, "flash4": load_flash4}
PACKAGES = {"flash3": stand_ins.flash3, "flash4": stand_ins.flash4}


class OnCpu(PackageKernel):
    """Takes the tensors of the stand-ins; all else is as it is."""

    def unsupported(self, q, k, v, masked):
        found = self._find()
        return "it knows no general mask" if masked else found if isinstance(found, str) else None


def on_cpu(name):
    return OnCpu(name, LOADS[name], majors=(9,))


@pytest.fixture(params=LOADS)
def name(request):
    return request.param


@pytest.mark.parametrize("causal", [False, True])
def test_forward_and_backward(name, causal):
    q, k, v, dout = tensors(n=7, m=7 if causal else 9, heads=6, groups=2)
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = dense(*leaves, visible.tril() if causal else visible, 0.3)
    broadcast = dout[:, :, :1].expand(dout.shape)  # the kernels cannot read it as it is, nor v as it comes below
    expected.backward(broadcast)
    with PACKAGES[name]():
        kernel, options = on_cpu(name), {"causal": causal, "mask": None, "scale": 0.3}
        out, lse = kernel.forward(q, k, v.transpose(2, 3).contiguous().transpose(2, 3), **options)
        turned = lse.transpose(1, 2).contiguous().transpose(1, 2)
        gradients = kernel.backward(broadcast, q, k, v, out, turned, **options)
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse.detach(), rtol=0, atol=1e-12)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_rings_equal_the_dense_oracle(name, cp_size, monkeypatch):
    calls = []
    with PACKAGES[name](calls):
        monkeypatch.setitem(KERNELS, name, on_cpu(name))
        for layout, mask in (("zigzag", {}), ("contiguous", {"causal": False}), ("striped", {"documents": (0, 9, 31)})):
            case = Case(31, layout, tuple(mask.items()), heads=(6, 2))
            plan = ringattn.Plan(31, cp_size, layout=layout, **mask)

            def attend(q, k, v, rank, transport, plan=plan):
                return attend_on(q, k, v, plan, rank, transport, kernel=name)

            found = attend_in_turns(*problem(case), plan, attend)
            for label, actual, expected in zip(("out", "dq", "dk", "dv"), found, oracle(case), strict=True):
                assert error(actual, expected) <= 1e-10, (case, label)
    assert {call["causal"] for call in calls} == {False, True}


def test_deterministic_algorithms_are_asked_for(name):
    q, k, v, dout = tensors(torch.bfloat16, n=5, m=5)
    calls, options = [], {"causal": True, "mask": None, "scale": 0.3}
    with PACKAGES[name](calls):
        kernel = on_cpu(name)
        result = kernel.forward(q, k, v, **options)
        assert result[1].dtype == torch.float32
        kernel.backward(dout, q, k, v, *result, **options)
        torch.use_deterministic_algorithms(True)
        try:
            kernel.backward(dout, q, k, v, *result, **options)
        finally:
            torch.use_deterministic_algorithms(False)
    assert [call.get("deterministic") for call in calls] == [None, False, True]
    assert calls[0].get("num_splits", 1) == 1  # more of them would be merged once more


def refusal(name):
    try:
        LOADS[name]()
    except flash_packages.UnfitError as reason:
        return str(reason)
    return None


def broken(error):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.startswith("flash_attn"):
                raise error

    return Finder


def test_a_package_that_is_missing_or_broken_is_told(name, monkeypatch):
    module = {"flash3": "flash_attn_interface", "flash4": "flash_attn.cute.interface"}[name]
    title = f"flash-attn {name[-1]} (module {module})"
    monkeypatch.setattr(sys, "meta_path", [broken(ModuleNotFoundError("nothing there", name=module)), *sys.meta_path])
    assert refusal(name) == f"{title} is not installed"
    inner = ModuleNotFoundError("No module named 'cutlass'", name="cutlass")
    monkeypatch.setattr(sys, "meta_path", [broken(inner), *sys.meta_path])
    assert refusal(name) == f"{title} cannot be imported: No module named 'cutlass'"
    monkeypatch.setattr(sys, "meta_path", [broken(OSError("undefined symbol: x")), *sys.meta_path])
    assert refusal(name) == f"{title} cannot be imported: OSError: undefined symbol: x"


def test_other_versions_of_flash_attn_3_are_refused():
    with stand_ins.flash3():
        assert refusal("flash3") is None
    cases = {
        "registered no operator flash_attn_3::bwd": {"bwd": None},
        "flash_attn_3::fwd lacks softmax_scale:": {"fwd": stand_ins.FWD.replace("softmax_scale", "scale")},
        "flash_attn_3::bwd also wants seqused_k:": {"bwd": stand_ins.BWD.replace("seqused_k=None", "seqused_k")},
        "flash_attn_3::fwd returns no lse": {"fwd": stand_ins.FWD.split("->")[0] + "-> Tensor"},
    }
    for expected, schemas in cases.items():
        if "also wants" in expected:  # a schema has no default before an argument without one
            schemas = {"bwd": schemas["bwd"].replace("dq=None", "dq").replace("dk=None", "dk").replace("dv=None", "dv")}
        with stand_ins.flash3(**schemas):
            assert expected in refusal("flash3")


def test_other_versions_of_flash_attn_4_are_refused():
    with stand_ins.flash4():
        assert refusal("flash4") is None

    def without_lse(q, k, v, softmax_scale=None, causal=False):
        return q

    def with_more(q, k, v, out, dout, lse, seeds, softmax_scale=None, causal=False, deterministic=False):
        return q, k, v

    cases = {
        "has no function _flash_attn_bwd": {"_flash_attn_bwd": None},
        "interface._flash_attn_fwd lacks return_lse:": {"_flash_attn_fwd": without_lse},
        "interface._flash_attn_bwd also wants seeds:": {"_flash_attn_bwd": with_more},
    }
    for expected, functions in cases.items():
        with stand_ins.flash4(**functions):
            assert expected in refusal("flash4")


def test_a_forward_pass_without_a_usable_lse_ends_with_the_reason():
    q, k, v, _ = tensors(torch.bfloat16, n=5, m=5, heads=4)
    for lse, got in ((None, "got none"), (torch.zeros(2, 5, 4), r"got \(2, 5, 4\) in torch.float32")):

        def forward(q, k, v, softmax_scale=None, causal=False, return_lse=False, lse=lse):
            return q, lse

        with (
            stand_ins.flash4(_flash_attn_fwd=forward),
            pytest.raises(RingAttnError, match=rf"'flash4'.*\(2, 4, 5\) in fp32.*{got}.*use kernel='auto'"),
        ):
            on_cpu("flash4").forward(q, k, v, causal=False, mask=None, scale=0.3)


def test_tensors_that_they_cannot_take_are_told_without_an_import(name, monkeypatch):
    """On tensors without memory, which may be on a device that is not there."""
    place, kernel = [(9, 0)], PackageKernel(name, lambda: pytest.fail("imported"), majors=(9,))
    monkeypatch.setattr(flash_packages, "capability", lambda device: place[0])

    def reason(device="cuda", dtype=torch.bfloat16, widths=(128, 128), masked=False):
        with FakeTensorMode():
            q, v = (torch.empty(1, 4, 2, width, dtype=dtype, device=device) for width in widths)
            return kernel.unsupported(q, q, v, masked)

    assert reason(device="cpu") == "it runs on CUDA, the tensors are on cpu"
    assert reason(dtype=torch.float32) == "it has no torch.float32, only bf16 and fp16"
    assert reason(widths=(128, 64)) == "it needs one head width, a multiple of 8 up to 128, got 128 and 64"
    assert reason(widths=(256, 256)).endswith("got 256 and 256")
    assert reason(masked=True) == "it knows no general mask"
    place[0] = (8, 6)
    assert reason() == "it is used on compute capability 9.x, this is 8.6"
    place[0], kernel = (9, 0), PackageKernel(name, LOADS[name], majors=(9,))
    with PACKAGES[name]():
        assert reason() is None
        assert "general mask" in reason(masked=True)


def test_a_package_is_looked_for_once(name, monkeypatch):
    monkeypatch.setattr(flash_packages, "capability", lambda device: (9, 0))
    searches = []

    def load():
        searches.append(name)
        raise flash_packages.UnfitError("it is not there")

    kernel = PackageKernel(name, load, majors=(9,))
    with FakeTensorMode():
        q = torch.empty(1, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
        assert [kernel.unsupported(q, q, q, masked=False) for _ in range(3)] == ["it is not there"] * 3
    assert searches == [name]


def test_named_without_the_package_is_an_error_and_auto_never_looks(name, monkeypatch):
    q, k, v, _ = tensors(torch.bfloat16)
    with pytest.raises(ValueError, match=f"kernel: '{name}' cannot do this: it runs on CUDA.*use kernel='auto'"):
        check_kernel(name, q, k, v)

    class Untouched:
        def unsupported(self, *_):
            pytest.fail("auto has looked at a kernel that was never measured here")

    monkeypatch.setitem(KERNELS, name, Untouched())
    for masked, backward in ((False, False), (True, True)):
        assert pick_kernel("auto", q, k, v, masked, backward=backward).name == "cpu"
