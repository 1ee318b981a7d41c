"""Others' attention is asked for what ours computes: PyTorch's own where a CPU has it, formulas of
ours in the place of the others, outputs and gradients. What is made for a size is made once."""

import inspect

import attention_libraries as stand_ins
import pytest
import torch
from torch.nn.attention import flex_attention, varlen

from tilewise import bench, libraries
from tilewise.check import outputs_and_grads
from tilewise.libraries import attention
from tilewise.op import OPS

BASE = {"batch": 2, "heads": 4, "kv_heads": 2, "seq_q": 21, "seq_k": 33, "dim": 8}
DENSE = {
    "plain": {},
    "causal": {"causal": True},
    "square": {"causal": True, "seq_q": 33},
    "more queries": {"causal": True, "seq_q": 40},  # the first see nothing
    "window": {"left": 7, "right": 2},
    "left": {"left": 7, "causal": True},
    "right": {"right": 3, "scale": 0.3},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi": "h", "causal": True},
    "alibi of each": {"alibi": "bh"},
    "bias": {"bias": "hqk"},
    "bias of each": {"bias": "bk"},
    "all": {"bias": "bhqk", "alibi": "bh", "softcap": 1.5, "left": 20, "right": 4, "scale": 0.2},
}
MIXED = ((2, 3), (1, 12), (0, 7), (33, 20), (5, 0), (17, 30))
PACKED_BASE = {"lengths": MIXED, "heads": 4, "kv_heads": 2, "dim": 8}
PACKED = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"left": 5, "right": 2},
    "left": {"left": 5, "causal": True, "scale": 0.3},
    "softcap": {"softcap": 0.7, "causal": True},
    "alibi": {"alibi": "bh"},
    "few heads": {"kv_heads": 4},
}
CACHE_BASE = {"lengths": (5, 9, 1), "heads": 8, "kv_heads": 2, "dim": 8}
CACHE = {
    "plain": {},
    "one": {"lengths": (6,)},
    "full": {"lengths": (6, 6), "capacity": 6},
    "scale": {"scale": 0.3},
    "pages": {"page_size": 4},
    "a page": {"lengths": (8,), "page_size": 4},
    "window": {"left": 3, "page_size": 4},
    "softcap": {"softcap": 0.7},
    "several new": {"q_len": 3, "lengths": (5, 9, 4)},
    "alibi": {"alibi": "bh", "page_size": 4},
    "few heads": {"kv_heads": 8, "page_size": 2},
}
TABLES = {
    "attention": (BASE, DENSE),
    "attention_varlen": (PACKED_BASE, PACKED),
    "attention_decode": (CACHE_BASE, CACHE),
}
# What a library has no argument for. Of the others those in UNLIKE mean something else.
WITHOUT = {
    ("attention", "cudnn"): {
        "window", "left", "right", "softcap", "alibi", "alibi of each", "all",
    },
    ("attention", "flex"): set(),
    ("attention", "flash"): {"bias", "bias of each", "all"},
    ("attention", "flash3"): {"alibi", "alibi of each", "bias", "bias of each", "all"},
    ("attention_varlen", "flex"): {"alibi"},
    ("attention_varlen", "varlen"): {"softcap", "alibi"},
    ("attention_varlen", "flash"): set(),
    ("attention_varlen", "flash3"): {"alibi"},
    ("attention_decode", "cudnn"): {
        "pages", "a page", "window", "softcap", "alibi", "few heads", "scale",
    },
    ("attention_decode", "flash"): set(),
    ("attention_decode", "flash3"): {"alibi"},
    ("attention_decode", "flashinfer"): {"several new", "alibi"},
    ("attention_decode", "recipe"): {
        "pages", "a page", "window", "softcap", "several new", "alibi", "few heads",
    },
}  # fmt: skip
UNLIKE = {
    "cudnn": {"causal", "more queries", "plain of attention_decode", "one", "several new"},
    "recipe": {"plain of attention_decode", "one", "scale"},
}


pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(attention, "compiled", lambda function: function)


def inputs(name, about, dtype=torch.float64):
    base, table = TABLES[name]
    torch.manual_seed(0)
    tensors, options = OPS[name].inputs(**base | table[about], device="cpu", dtype=dtype)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = options["alibi_slopes"].to(dtype)
    return tensors, options


def cases():
    for (name, library), without in WITHOUT.items():
        unlike = UNLIKE.get(library, set())
        for about in TABLES[name][1]:
            if not {about, f"{about} of {name}"} & unlike:
                case = (name, library, about)
                yield pytest.param(*case, about in without, id="-".join(case).replace(" ", "-"))


def test_every_adapter_is_tried():
    mine = {(op, library) for op, table in attention.ADAPTERS.items() for library in table}
    assert mine == set(WITHOUT)


@pytest.mark.parametrize("name, library, about, refused", [*cases()])
def test_it_computes_what_ours_does_or_refuses(name, library, about, refused):
    """Outputs and every gradient, in fp64: PyTorch's own tolerance is for the order of sums."""
    op, (tensors, options) = OPS[name], inputs(name, about)
    module = stand_ins.STAND_INS[library]
    _, adapter = attention.ADAPTERS[name][library]

    def call(*tensors, **options):
        return adapter(module, *tensors, **options)

    if refused:
        with pytest.raises(TypeError):
            call(*tensors, **options)
        return
    ours = outputs_and_grads(op, call, tensors, options)
    truth = outputs_and_grads(op, op.reference, tensors, options)
    assert len(ours) == len(truth)
    for mine, wanted in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("about", DENSE)
def test_with_flex_attention_itself(about):
    tensors, options = inputs("attention", about)
    ours = attention._flex(flex_attention, *tensors, **options)
    torch.testing.assert_close(ours, OPS["attention"].reference(*tensors, **options))


@pytest.mark.parametrize("about", [about for about in PACKED if about != "alibi"])
def test_with_flex_attention_itself_packed(about):
    tensors, options = inputs("attention_varlen", about)
    ours = attention._flex_packed(flex_attention, *tensors, **options)
    torch.testing.assert_close(ours, OPS["attention_varlen"].reference(*tensors, **options))


def test_rows_past_the_last_sequence_see_nothing():
    size = PACKED_BASE | {"past": 4, "causal": True}
    tensors, options = OPS["attention_varlen"].inputs(**size, device="cpu", dtype=torch.float64)
    ours = attention._flex_packed(flex_attention, *tensors, **options)
    torch.testing.assert_close(ours, OPS["attention_varlen"].reference(*tensors, **options))
    assert not ours[-4:].any()


@pytest.mark.slow
@pytest.mark.parametrize("name, about", [("attention", "all"), ("attention_varlen", "left")])
def test_with_flex_attention_compiled(name, about, monkeypatch):
    """As it is timed; another call of the same size compiles nothing."""
    monkeypatch.undo()
    tensors, options = inputs(name, about, torch.float32)
    call = libraries.calls(name, "cuda")[0]["flex"]
    ours = call(*tensors, **options)
    torch.testing.assert_close(ours, OPS[name].reference(*tensors, **options))
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(call(*tensors, **options), ours)


def test_cudnn_is_asked_for():
    asked = []

    class Backends:
        SDPBackend = torch.nn.attention.SDPBackend

        @staticmethod
        def sdpa_kernel(backend):
            asked.append(backend)
            return stand_ins.CUDNN.sdpa_kernel(Backends.SDPBackend.MATH)

    tensors, options = inputs("attention", "plain")
    libraries.ADAPTERS["attention"]["cudnn"][1](Backends, *tensors, **options)
    assert asked == [Backends.SDPBackend.CUDNN_ATTENTION]


def test_a_plan_and_a_mask_are_made_once(monkeypatch):
    made = []

    def create_block_mask(*arguments, **options):
        made.append(arguments)
        return stand_ins.create_block_mask(*arguments, **options)

    monkeypatch.setattr(stand_ins.FLEX, "create_block_mask", create_block_mask)
    for name, adapter in (
        ("attention", attention._flex),
        ("attention_varlen", attention._flex_packed),
    ):
        tensors, options = inputs(name, "left")
        for _ in range(3):
            adapter(stand_ins.FLEX, *tensors, **options)
        assert len(made) == 1
        made.clear()
    wrapper = stand_ins.BatchDecodeWithPagedKVCacheWrapper
    before = wrapper.plans
    tensors, options = inputs("attention_decode", "pages")
    for _ in range(3):
        attention._flashinfer_decode(stand_ins.FLASHINFER, *tensors, **options)
    assert wrapper.plans == before + 1


@pytest.mark.parametrize("name, library", WITHOUT)
def test_what_none_of_them_has_is_refused(name, library):
    (*tensors, _), options = inputs(name, "full" if name == "attention_decode" else "plain")
    adapter = attention.ADAPTERS[name][library][1]
    module = stand_ins.STAND_INS[library]
    with pytest.raises((TypeError, AssertionError)):
        adapter(module, *tensors, torch.randn(tensors[0].shape[1]), **options)
    with pytest.raises(TypeError, match="dropout_p"):
        adapter(module, *tensors, None, dropout_p=0.1, **options)


def test_pytorch_takes_what_is_said_to_it():
    """Where a stand-in takes its place."""
    known = inspect.signature(varlen.varlen_attn).parameters
    assert {"window_size", "scale", "enable_gqa"} <= known.keys()
    ours = inspect.signature(stand_ins.varlen_attn).parameters
    assert list(ours)[:7] == list(known)[:7]
    for name in ("flex_attention", "create_block_mask"):
        known = inspect.signature(getattr(flex_attention, name)).parameters
        ours = inspect.signature(getattr(stand_ins, name)).parameters
        assert [parameter for parameter in ours if parameter not in known] == []


@pytest.mark.parametrize(
    "module, stand_in",
    [("flash_attn", "flash"), ("flash_attn_interface", "flash3"), ("flashinfer", "flashinfer")],
)
def test_a_library_takes_what_its_stand_in_takes(module, stand_in):
    real = pytest.importorskip(module)
    for name, function in vars(stand_ins.STAND_INS[stand_in]).items():
        known = inspect.signature(getattr(real, name)).parameters
        assert [p for p in inspect.signature(function).parameters if p not in known] == []


def test_on_a_cpu_there_is_the_recipe():
    found, absent = libraries.calls("attention_decode", "cpu")
    assert list(found) == ["recipe"] and not absent
    assert libraries.calls("attention", "cpu") == ({}, {})
    tensors, options = inputs("attention_decode", "full")
    calls, _ = bench.providers(OPS["attention_decode"], tensors, options, 1, "numba", False)
    assert list(calls) == ["reference", "torch", "recipe", "numba"]
    assert set(attention.ADAPTERS["attention"]) < set(libraries.MODULES) & set(bench.PEERS)
