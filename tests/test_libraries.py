"""Other libraries are asked for what an op computes: held to the references, with the formulas of
their own in the place of the kernels, which need a GPU. Where Liger is installed its kernels that
Triton's interpreter can run are held to it too."""

import inspect
from types import SimpleNamespace

import attention_libraries
import pytest
import torch
import torch.nn.functional as F

from tilewise import bench, libraries
from tilewise.libraries import rows
from tilewise.op import INTERPRETED, OPS


def rms(x, weight, eps, offset):
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight + offset)


def rope(q, k, cos, sin):
    def turned(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return turned(q), turned(k)


def casting_is(wanted, given):
    assert given == wanted


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    casting_is("gemma", casting_mode)
    assert not in_place
    return rms(X, W, eps, offset)


def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    casting_is("gemma", casting_mode)
    assert not in_place
    return rms(X + R, W, eps, offset), X + R


def liger_fused_linear_cross_entropy(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
    label_smoothing=0.0, reduction="mean",
):  # fmt: skip
    return F.cross_entropy(F.linear(input, weight, bias), target, reduction=reduction)


LIGER = SimpleNamespace(
    liger_rms_norm=liger_rms_norm,
    liger_fused_add_rms_norm=liger_fused_add_rms_norm,
    liger_layer_norm=lambda X, W, B, eps: F.layer_norm(X, W.shape, W, B, eps),
    liger_softmax=lambda x: x.softmax(-1),
    liger_cross_entropy=lambda input, target, lse_square_scale=0.0, reduction="mean": (
        F.cross_entropy(input, target, reduction=reduction)
    ),
    liger_fused_linear_cross_entropy=liger_fused_linear_cross_entropy,
    liger_swiglu=lambda a, b: F.silu(a) * b,
    liger_geglu=lambda a, b: F.gelu(a, approximate="tanh") * b,
    liger_rope=rope,
)


def rmsnorm(
    x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6,
    prenorm=False, weight_offset=0.0,
):  # fmt: skip
    total = x if residual is None else x + residual
    y = rms(total, weight, eps, weight_offset)
    return (y, total) if prenorm else y


def linear_cross_entropy_func(x, weight, bias, target, ignore_index=-100, reduction="mean"):
    return F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)


def chunked_linear_cross_entropy(x, weight, target, chunk_size=4096, ignore_index=-100,
                                 reduction="mean"):  # fmt: skip
    return F.cross_entropy(x @ weight.T, target, reduction=reduction)


QUACK = SimpleNamespace(
    rmsnorm=rmsnorm,
    softmax=lambda x: x.softmax(-1),
    cross_entropy=lambda x, target, reduction="mean": F.cross_entropy(
        x, target, reduction=reduction
    ),
    linear_cross_entropy_func=linear_cross_entropy_func,
    chunked_linear_cross_entropy=chunked_linear_cross_entropy,
)
STAND_INS = {"liger": LIGER, "quack": QUACK, **attention_libraries.STAND_INS}
PAIRS = [(op, library) for op, table in libraries.ADAPTERS.items() for library in table]


MOST = {
    "rows": 5, "cols": 32, "tokens": 6, "dim": 16, "classes": 40, "seq": 7, "heads": 4,
    "kv_heads": 2, "seq_q": 9, "seq_k": 9, "left": 3, "page_size": 4,
}  # fmt: skip


def small(workload):
    """A workload in the size of a test; lengths are still different, and full caches full."""

    def length(value):
        return tuple(map(length, value[:5])) if isinstance(value, tuple) else value % 11 + 2

    short = {n: length(v) for n, v in workload.items() if n in ("lengths", "capacity")}
    return workload | {n: min(v, MOST[n]) for n, v in workload.items() if n in MOST} | short


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(libraries.attention, "compiled", lambda function: function)


@pytest.mark.parametrize(("name", "library"), PAIRS)
def test_an_adapter_asks_for_what_the_op_computes(name, library):
    op = OPS[name]
    _, adapter = libraries.ADAPTERS[name][library]
    for i, workload in enumerate(op.timed_on("cuda")):
        torch.manual_seed(0)
        tensors, options = op.inputs(**small(workload), device="cpu", dtype=torch.float32)
        try:
            ours = adapter(STAND_INS[library], *bench._copies(tensors), **options)
        except TypeError:  # it has no such option; the first workload of all has none
            assert i > 0
        else:
            torch.testing.assert_close(ours, op.reference(*tensors, **options))


def test_what_a_library_has_not_is_refused():
    x, weight = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(TypeError, match="has no bias"):
        rows._liger_rms_norm(LIGER, x, weight, weight, eps=1e-6)
    with pytest.raises(TypeError, match="has no activation 'relu'"):
        rows._liger_glu(LIGER, x, x, activation="relu")
    with pytest.raises(TypeError, match="softcap"):
        rows._liger_softmax(LIGER, x, softcap=3.0)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    found, absent = libraries.calls("softmax", "cuda")
    assert not found
    assert absent["liger"] == "needs liger_kernel, which is not installed"
    assert libraries.calls("embed", "cuda") == ({}, {})

    def broken(name):
        raise OSError("no libcuda.so")

    monkeypatch.setattr(libraries, "find_spec", lambda name: name)
    monkeypatch.setattr(libraries, "import_module", broken)
    found, absent = libraries.calls("softmax", "cuda")
    assert not found and absent["quack"] == "cannot be imported: OSError: no libcuda.so"


def test_a_library_is_timed_beside_the_others(monkeypatch):
    """It writes over its inputs, and the others do not see it."""

    def softmax(x, bias):
        y = x.softmax(-1)
        x.detach().fill_(7.0)
        return y

    class OnGpu:
        device = torch.device("cuda")

    monkeypatch.setattr(
        libraries, "calls", lambda op, device: ({"liger": softmax}, {"quack": "is away"})
    )
    op = OPS["softmax"]
    calls, absent = bench.providers(op, (OnGpu(),), {}, 1, "reference", False)
    assert calls["liger"] is softmax and absent["quack"] == "is away"
    monkeypatch.setattr(
        bench, "providers", lambda *args: ({"liger": softmax, "reference": op.reference}, {})
    )
    monkeypatch.setattr(bench, "interleaved", lambda calls, *args: {n: [] for n in calls})
    monkeypatch.setattr(
        bench,
        "summary",
        lambda samples: dict.fromkeys(("seconds", "host_seconds", "p10", "p90"), 1.0),
    )
    monkeypatch.setattr(bench, "peak_bytes", lambda call, device: 0)
    work = bench.Work(op, {"rows": 2, "cols": 8}, torch.float32)
    found = list(bench._measure(work, "cpu", 1, None, False, 0.0))
    assert {(row.provider, row.error < 1e-6) for row in found} == {
        ("liger", True), ("reference", True),
    }  # fmt: skip


@pytest.mark.skipif(not INTERPRETED, reason="Triton does not interpret here")
@pytest.mark.parametrize("name", ["softmax", "cross_entropy", "linear_cross_entropy", "rotary"])
def test_with_liger_itself(name):
    pytest.importorskip("liger_kernel")
    calls, absent = libraries.calls(name, "cuda")
    assert "liger" in calls and "liger" not in absent
    op = OPS[name]
    tensors, options = op.inputs(**small(op.workloads[0]), device="cpu", dtype=torch.float32)
    ours = calls["liger"](*bench._copies(tensors), **options)
    torch.testing.assert_close(ours, op.reference(*tensors, **options), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", vars(LIGER))
def test_the_stand_ins_take_what_liger_takes(name):
    pytest.importorskip("liger_kernel")
    real = getattr(pytest.importorskip("liger_kernel.transformers.functional"), name)
    known = [*inspect.signature(real).parameters]
    ours = [*inspect.signature(getattr(LIGER, name)).parameters]
    assert [p for p in ours if p not in known] == []
