"""What every op promises: right values and gradients, the same bits, any layout, one graph."""

import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    DEVICE,
    FIRST_SIZES,
    as_list,
    case_or_skip,
    differentiable_or_skip,
    interpreted,
    label,
    leaves,
    own_backend,
    unless,
)
from functorch.compile import make_boxed_func
from layouts import laid_out, misaligned, ragged, sliced, straight, strided
from torch._dynamo.backends.common import aot_autograd

from tilewise.check import check, compare, failures, outputs_and_grads


@pytest.mark.parametrize("op, backend, dtype, size", CASES)
def test_matches_reference(op, backend, dtype, size):
    case_or_skip(op, backend, dtype, size)
    results = check(op, backend, dtype, size, DEVICE)
    assert all(r.ok and not r.skipped for r in results), failures(results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("start", [0, 35, 224])
def test_the_rule_sees_32_rows_off_by_three_per_cent(dtype, start):
    torch.manual_seed(0)
    truth = torch.randn(256, 33, dtype=torch.float64)
    ours = truth.to(dtype, copy=True)
    error, allowed = compare(ours, ours, truth)
    assert error <= allowed
    ours[start : start + 32] *= 0.97
    error, allowed = compare(ours, truth.to(dtype), truth)
    assert error > allowed


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 0.0])
def test_the_rule_sees_one_wrong_element(spoil):
    truth = torch.randn(64, 8, dtype=torch.float64) + 3
    ours = truth.float()
    ours[5, 5] = spoil
    error, allowed = compare(ours, truth.float(), truth)
    assert error > allowed


def test_the_rule_wants_nan_where_the_truth_is_nan():
    truth = torch.tensor([[1.0, float("nan")]], dtype=torch.float64)
    error, allowed = compare(truth.float(), truth.float(), truth)
    assert error <= allowed
    error, allowed = compare(torch.ones(1, 2), truth.float(), truth)
    assert error > allowed


# The interpreter runs one program after the other, so there the orders are few.
REPEATED = [
    pytest.param(
        *p.values, id=p.id,
        marks=p.marks or unless(not interpreted(backend) or size in op.sizes[:2]),
    )
    for p in CASES
    for op, backend, _, size in [p.values]
]  # fmt: skip


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(t):
    """As integers: NaN is not equal to itself."""
    return t.contiguous().view(INTEGERS[t.itemsize]) if t.is_floating_point() else t


@pytest.mark.parametrize("op, backend, dtype, size", REPEATED)
def test_same_input_same_bits(op, backend, dtype, size):
    call, _, tensors = case_or_skip(op, backend, dtype, size)
    first, second = (outputs_and_grads(op, call, tensors, {}) for _ in range(2))
    assert all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(first, second, strict=True))


LAYOUTS = [
    pytest.param(
        *p.values, size, layout, id=f"{label(*p.values, '', size)}-{layout.__name__}",
        marks=unless(number <= FIRST_SIZES),
    )
    for p in BACKENDS
    for number, size in enumerate(p.values[0].sizes)
    for layout in ((strided, sliced, misaligned, ragged) if number == 0 else (sliced,))
]  # fmt: skip


@pytest.mark.parametrize("op, backend, size, layout", LAYOUTS)
def test_any_layout(op, backend, size, layout):
    call, _, tensors = case_or_skip(op, backend, size=size)
    torch.testing.assert_close(
        laid_out(op, call, tensors, layout), laid_out(op, call, tensors, straight), equal_nan=True
    )


@pytest.mark.parametrize("layout", [misaligned, ragged])
@pytest.mark.parametrize("op, backend", BACKENDS)
def test_any_layout_of_one_operand(op, backend, layout):
    """Vectors are for operands that can all be read by them: each may be the one that cannot."""
    call, _, tensors = case_or_skip(op, backend)
    expected = laid_out(op, call, tensors, straight)
    for bent in range(len(tensors) + len(expected)):
        got = laid_out(op, call, tensors, lambda t, i, bent=bent: layout(t, i) if i == bent else t)
        torch.testing.assert_close(got, expected)


ROWS = [p for p in BACKENDS if {"rows", "cols"} <= p.values[0].sizes[0].keys()]


@pytest.mark.parametrize("op, backend", ROWS)
def test_any_layout_of_more_rows_than_columns(op, backend):
    call, _, tensors = case_or_skip(op, backend, torch.float32, {"rows": 40, "cols": 16})
    torch.testing.assert_close(
        laid_out(op, call, tensors, sliced), laid_out(op, call, tensors, straight)
    )


def ops_called(run):
    """What of ours `run` calls, as (op, arguments)."""
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "tilewise":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        run()
    return seen


OPCHECKED = [
    pytest.param(*p.values, size, id=label(*p.values, "", size), marks=unless(number < 2))
    for p in BACKENDS
    for number, size in enumerate(p.values[0].sizes)
]


@pytest.mark.parametrize("op, backend, size", OPCHECKED)
def test_registered_properly(op, backend, size):
    call, _, tensors = case_or_skip(op, backend, size=size)
    inputs = leaves(op, tensors)

    def run():
        floating = [out for out in as_list(call(*inputs)) if out.requires_grad]
        if floating:
            sum(out.sum() for out in floating).backward()

    seen = ops_called(run)
    if not seen:
        longest = [call.keywords.get(f"max_seqlen_{side}", 1) for side in "qk"]
        assert 0 in [*longest, *(t.numel() for t in tensors if t is not None)]
        pytest.skip("nothing to launch")
    names = [func.name() for func, _ in seen]
    assert all("_forward" in n or "_backward" in n or n.endswith("_") for n in names)
    for func, args in seen:
        plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(func, plain)


# What a graph is made of does not depend on the backend: of any number of rows, one of each op.
COMPILED = [
    pytest.param(
        *p.values, dynamic, id=f"{p.id}-{'dynamic' if dynamic else 'static'}",
        marks=unless(not dynamic or backend == own_backend(op)),
    )
    for p in BACKENDS
    for op, backend in [p.values]
    for dynamic in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("op, backend, dynamic", COMPILED)
def test_compiled_graphs_contain_our_ops(op, backend, dynamic):
    """Numbers cannot tell: a compiled model that fell back to the reference is right, and slow."""
    call, _, tensors = case_or_skip(op, backend)
    inputs, graphs = leaves(op, tensors), []
    eager = {func.name().replace("::", ".") for func, _ in ops_called(lambda: call(*inputs))}

    def called(node):
        """What writes over its arguments is called by another op."""
        return node.args[0] if "auto_functionalized" in str(node.target) else node.target

    def record(graph, _):
        graphs.append({str(called(node)) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    recorder = aot_autograd(fw_compiler=record, bw_compiler=record, inference_compiler=record)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=recorder)
    floating = [out for out in as_list(compiled(*leaves(op, tensors))) if out.requires_grad]
    assert eager
    assert {f"{name}.default" for name in eager} <= graphs[0]
    if floating:
        sum(out.sum() for out in floating).backward()
        assert any(str(name).startswith("tilewise.") for name in graphs[1])
        assert {name for name in graphs[1] if "tilewise" in name and "_backward" in name}


@pytest.mark.parametrize("op, backend", BACKENDS)
def test_compiled_by_inductor(op, backend):
    call, _, tensors = case_or_skip(op, backend)
    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(
        outputs_and_grads(op, compiled, tensors, {}), outputs_and_grads(op, call, tensors, {})
    )


@pytest.mark.parametrize("op, backend", BACKENDS)
def test_inputs_are_left_alone(op, backend):
    call, _, tensors = case_or_skip(op, backend)
    before = [t if t is None else t.clone() for t in tensors]
    outs = as_list(call(*tensors))
    for t, was in zip(tensors, before, strict=True):
        if t is not None:
            assert torch.equal(t, was)
            assert all(out.data_ptr() != t.data_ptr() for out in outs if out.numel())


@pytest.mark.parametrize("op, backend", BACKENDS)
def test_gradcheck(op, backend):
    if torch.float64 not in op.backends[backend].dtypes:
        pytest.skip(f"{backend}: finite differences need float64")
    call, _, tensors = case_or_skip(op, backend, torch.float64)
    differentiable_or_skip(op, tensors)
    inputs = leaves(op, tensors)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
