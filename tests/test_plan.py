"""A call by plan is the call as written: the same bits, layouts and errors, and its own memory."""

from itertools import pairwise
from threading import Thread

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise
from tilewise import native, plan, plan_source
from tilewise.op import OPS

if torch.cuda.is_available():
    pytest.skip("a plan is for tensors on a CPU", allow_module_level=True)
pytest.importorskip("numba")

PLANNED = {
    name: op
    for name, op in OPS.items()
    if hasattr(getattr(tilewise, name), "plans")
}  # fmt: skip


# Those whose launches a plan can note down; emulated they are slow, and have the small sizes.
LAUNCHED = ("numba", "cuda") if native.EMULATED and native.missing() is None else ("numba",)
EMULATED_ELEMENTS = 1 << 12


def planned_on(names):
    return [
        pytest.param(name, backend, id=f"{name}-{backend}")
        for backend in LAUNCHED
        for name in names
        if backend in OPS[name].backends
    ]


def sizes_of(op, backend):
    """The op's tensors and options, size by size."""
    for size in op.sizes:
        torch.manual_seed(0)
        tensors, options = op.inputs(**size, device="cpu", dtype=torch.float32)
        elements = max(t.numel() for t in tensors if t is not None)
        if backend == "numba" or elements <= EMULATED_ELEMENTS:
            yield tensors, options


class _Seen(TorchDispatchMode):
    """What is looked at runs as written."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


def as_written(function, *args, **options):
    with _Seen():
        return tuple_of(function(*args, **options))


def tuple_of(result):
    return result if isinstance(result, tuple) else (result,)


def same(ours, expected):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def by_plan(function, *args, **options):
    """The result of a call that is known to go by plan."""
    before = [p for p in function.plans.values() if p is not None]
    for _ in range(2):
        function(*args, **options)
    plans = [p for p in function.plans.values() if p is not None]
    assert len(plans) > len(before), "no plan"
    return tuple_of(function(*args, **options))


def again(t, shift):
    """The same metadata, other values, where the memory begins otherwise."""
    if not isinstance(t, torch.Tensor):
        return t
    size = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
    memory = torch.empty(size + shift, dtype=t.dtype)[shift:]
    values = t if not t.is_floating_point() else -0.75 * t
    return memory.as_strided(t.shape, t.stride(), shift).copy_(values)


@pytest.fixture(autouse=True)
def no_plans():
    for name in PLANNED:
        function = getattr(tilewise, name)
        function.plans.clear()
        function.seen.clear()


@pytest.mark.parametrize(("name", "backend"), planned_on(PLANNED))
def test_a_plan_does_what_the_function_does(name, backend):
    op, function = OPS[name], getattr(tilewise, name)
    planned = False
    for tensors, options in sizes_of(op, backend):
        with tilewise.backend(backend):
            for _ in range(2):
                op.call(*tensors, **options)
            planned |= any(function.plans.values())
            for shift in (0, 3):
                others = [again(t, shift) for t in tensors]
                same(tuple_of(op.call(*others, **options)), as_written(op.call, *others, **options))
        function.plans.clear()
        function.seen.clear()
    assert planned, "no size has a plan"


@pytest.mark.skipif("cuda" not in LAUNCHED, reason="CUDA's kernels are not emulated here")
def test_on_a_gpu_a_plan_has_its_memory_and_stream(monkeypatch):
    """As it is written down there, with a CPU in the GPU's place."""
    asked = []
    names = {"device": torch.device("cpu"), "stream": lambda i: asked.append(i) or 0}
    monkeypatch.setattr(
        plan_source, "_where", lambda device: (", device=device", "stream(3)", names)
    )
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    with tilewise.backend("cuda", strict=True):
        (y,) = by_plan(tilewise.layer_norm, x, weight)
        assert asked == [3]
        gradients = torch.autograd.grad(y, (x, weight), torch.ones(3, 8))
        assert asked == [3, 3]
        expected = as_written(tilewise.layer_norm, x, weight)
    same((y,), expected)
    same(gradients, torch.autograd.grad(expected[0], (x, weight), torch.ones(3, 8)))


def test_the_third_call_is_by_plan(monkeypatch):
    x, weight = torch.randn(3, 8), torch.randn(8)
    for _ in range(2):
        y = tilewise.rms_norm(x, weight)
    monkeypatch.setattr(tilewise.ops.rms_norm, "normalise", None)
    assert torch.equal(tilewise.rms_norm(x, weight), y)
    with pytest.raises(TypeError, match="not callable"):
        tilewise.rms_norm(x, weight, 1e-3)


def test_tensors_that_share_memory_are_told_apart():
    packed = torch.randn(2, 3, 3, 2, 8)
    cos, sin = tilewise.rotary_tables(8, 8)

    def halves(packed):
        q, k, _ = packed.unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), cos, sin

    by_plan(tilewise.rotary, *halves(packed))
    swapped = packed.flip(2).contiguous()
    same(tilewise.rotary(*halves(swapped)), as_written(tilewise.rotary, *halves(swapped)))
    # one and the same tensor, after a plan of two
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    by_plan(tilewise.glu, x, y)
    same(tuple_of(tilewise.glu(x, x)), as_written(tilewise.glu, x, x))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: ((x[:, :4], w[:4]), {}),
        lambda x, w: ((x.t().contiguous().t(), w), {}),
        lambda x, w: ((torch.randn(4, 16)[:, 1:9], w), {}),
        lambda x, w: ((x.double(), w.double()), {}),
        lambda x, w: ((x, None), {}),
        lambda x, w: ((x, w), {"eps": 0.5}),
        lambda x, w: ((x, w, 0.5), {}),
        lambda x, w: ((x, w), {"bias": w}),
        lambda x, w: ((x, w), {"weight_offset": 1.0}),
        lambda x, w: ((x[None], w), {}),
    ],
)
def test_what_is_called_otherwise_has_another_plan(change):
    x, w = torch.randn(4, 8), torch.randn(8)
    by_plan(tilewise.rms_norm, x, w)
    args, options = change(x, w)
    expected = as_written(tilewise.rms_norm, *args, **options)
    for _ in range(3):
        same(tuple_of(tilewise.rms_norm(*args, **options)), expected)


def test_a_result_is_not_written_again():
    x = torch.randn(4, 8)
    (first,) = by_plan(tilewise.softmax, x)
    kept = first.clone()
    (second,) = tuple_of(tilewise.softmax(-x))
    assert torch.equal(first, kept) and not torch.equal(first, second)


def test_a_seed_that_is_drawn_is_drawn_anew():
    x, residual = torch.randn(4, 64), torch.zeros(4, 64)
    masks = [tilewise.dropout_add(x, residual, 0.5) == 0 for _ in range(4)]
    assert not any(torch.equal(a, b) for a, b in pairwise(masks))
    seed = torch.tensor(3)
    by_plan(tilewise.dropout_add, x, residual, 0.5, seed=seed)
    seed.fill_(4)
    expected = as_written(tilewise.dropout_add, x, residual, 0.5, seed=4)
    same(tuple_of(tilewise.dropout_add(x, residual, 0.5, seed=seed)), expected)


def test_what_is_preferred_counts():
    x = torch.randn(4, 8)
    by_plan(tilewise.gelu, x)
    with tilewise.backend("reference", strict=True):
        expected = torch.nn.functional.gelu(x)
        assert all(torch.equal(tilewise.gelu(x), expected) for _ in range(3))
    with pytest.raises(ValueError, match="backend must be one of"):
        tilewise.gelu(x, backend="abacus")


def test_a_transform_and_autocast_have_none():
    x = torch.randn(4, 8)
    by_plan(tilewise.softmax, x)
    leaf = x.clone().requires_grad_()
    for _ in range(3):
        assert tilewise.softmax(leaf).requires_grad
    with torch.no_grad():
        assert not tilewise.softmax(leaf).requires_grad
    by_plan(tilewise.softmax, x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(tilewise.softmax(x.bfloat16()).dtype == torch.float32 for _ in range(3))
    by_plan(tilewise.softmax, x[0])
    torch.testing.assert_close(torch.func.vmap(tilewise.softmax)(x), torch.softmax(x, -1))
    with _Seen() as seen:
        tilewise.softmax(x)
    assert "tilewise::softmax_forward" in seen.names
    with torch.inference_mode():
        assert tilewise.softmax(x).is_inference()
    assert not tilewise.softmax(x).is_inference()


def test_threads_do_not_share_scratch():
    """Each row of softmax waits in scratch, which is kept from call to call."""
    rows = [torch.randn(2, 4096).half() for _ in range(2)]
    expected = [by_plan(tilewise.softmax, x)[0] if i == 0 else tilewise.softmax(x)
                for i, x in enumerate(rows)]  # fmt: skip
    wrong = []

    def run(i):
        for _ in range(300):
            if not torch.equal(tilewise.softmax(rows[i]), expected[i]):
                wrong.append(i)

    (made,) = (p for p in tilewise.softmax.plans.values() if p)
    kept = []

    def keep():
        made(rows[0])
        kept.append(next(iter(made.__globals__["scratch"].kept.values())))

    for _ in range(2):
        thread = Thread(target=keep)
        thread.start()
        thread.join()
    assert kept[0].data_ptr() != kept[1].data_ptr()

    threads = [Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_plans_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(plan, "KEPT", 4)
    for n in range(1, 20):
        x = torch.randn(2, n)
        expected = as_written(tilewise.gelu, x)
        for _ in range(3):
            same(tuple_of(tilewise.gelu(x)), expected)
    assert len(tilewise.gelu.plans) <= 4 and len(tilewise.gelu.seen) <= 4


def test_options_go_by_their_names():
    x, w = torch.randn(4, 8), torch.randn(8)
    by_plan(tilewise.rms_norm, x, w, eps=0.5)
    expected = as_written(tilewise.rms_norm, x, w, weight_offset=0.5)
    same(tuple_of(tilewise.rms_norm(x, w, weight_offset=0.5)), expected)


def test_an_option_may_be_some_numbers():
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 40, 16)
    lengths = torch.tensor([40], dtype=torch.int32)
    for window in ((5, None), (20, None), (5, None)):
        by_plan(tilewise.attention_decode, q, k, k, lengths, window=window)
        expected = as_written(tilewise.attention_decode, 2 * q, k, k, lengths, window=window)
        same(tuple_of(tilewise.attention_decode(2 * q, k, k, lengths, window=window)), expected)
        tilewise.attention_decode.plans.clear()
        tilewise.attention_decode.seen.clear()


def test_the_numbers_of_tokens_are_not_in_a_plan():
    """As they grow, the same plan serves: what it allocates is by the room of the cache."""
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1100, 16)
    by_plan(tilewise.attention_decode, q, k, k, torch.tensor([40], dtype=torch.int32))
    for n in (0, 41, 512, 513, 1100):
        lengths = torch.tensor([n], dtype=torch.int32)
        expected = as_written(tilewise.attention_decode, q, k, k, lengths)
        same(tuple_of(tilewise.attention_decode(q, k, k, lengths)), expected)
    assert len(tilewise.attention_decode.plans) == 1


@pytest.mark.parametrize("backend", LAUNCHED)
def test_autograd_sees_what_a_plan_writes_over(backend):
    k, lengths = torch.randn(1, 2, 1, 16).bfloat16(), torch.tensor([3], dtype=torch.int32)
    caches = [torch.zeros(1, 2, 8, 16).bfloat16() for _ in range(2)]
    with tilewise.backend(backend, strict=True):
        for call in range(1, 5):
            versions = [x._version for x in (*caches, k)]
            tilewise.append_kv_(*caches, call * k, k, lengths)
            assert [x._version for x in (*caches, k)] == [versions[0] + 1, versions[1] + 1, 0]
            assert torch.equal(caches[0][:, :, 3:4], call * k)
        assert list(map(bool, tilewise.append_kv_.plans.values())) == [True]
    with torch.inference_mode():
        caches = [x.clone() for x in caches]
        for _ in range(3):
            tilewise.append_kv_(*caches, k, k, lengths, backend=backend)
    assert torch.equal(caches[0][:, :, 3:4], k)


def test_what_writes_to_what_a_kernel_wrote_has_no_plan():
    function = plan.planned(lambda x: tilewise.gelu(x).add_(1))
    x = torch.randn(4, 8)
    for _ in range(3):
        assert torch.equal(function(x), tilewise.gelu(x) + 1)
    assert list(function.plans.values()) == [None]


def test_what_does_more_than_launch_has_no_plan():
    x = torch.randn(8, 4).t()  # its rows have to be copied
    for _ in range(3):
        assert torch.equal(tilewise.gelu(x), tilewise.gelu(x.contiguous()))
    assert list(tilewise.gelu.plans.values()).count(None) == 1


def test_compiled_code_sees_the_op():
    x = torch.randn(4, 8)
    by_plan(tilewise.gelu, x)
    seen = []

    def backend(module, inputs):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: tilewise.gelu(x), backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), tilewise.gelu(x))
    assert any("tilewise.gelu_forward" in target for target in seen)


def test_one_plan_is_for_all_seeds_and_offsets():
    """And for all there are in memory, those of calls without a seed among them."""
    logits, places = torch.zeros(2, 500), [(0, 0), (1, 0), (-1, 5), (2**63 - 1, -(2**63)), (3, 3)]
    expected = [as_written(tilewise.sample, logits, seed=s, offset=o) for s, o in places]
    assert len({tuple(tokens.tolist()) for (tokens,) in expected}) == len(places)
    for (seed, offset), tokens in zip(places, expected, strict=True):
        same(tuple_of(tilewise.sample(logits, seed=seed, offset=offset)), tokens)
    assert len(tilewise.sample.plans) == 1 and all(tilewise.sample.plans.values())
    for wrong in (2**63, -(2**63) - 1, True, 1.0):
        with pytest.raises((TypeError, ValueError), match="sample: seed must"):
            tilewise.sample(logits, seed=wrong, offset=0)

    tilewise.sample.plans.clear()
    drawn = [tuple(tilewise.sample(logits).tolist()) for _ in range(6)]
    assert len({*drawn}) == len(drawn)
    assert len(tilewise.sample.plans) == 1 and all(tilewise.sample.plans.values())
    for row in range(4):
        generator = torch.Generator().manual_seed(row)
        seed = torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(row))
        assert torch.equal(
            tilewise.sample(logits, generator=generator), tilewise.sample(logits, seed=seed)
        )
    with pytest.raises(ValueError, match="seed or generator, got both"):
        tilewise.sample(logits, seed=1, generator=generator)
