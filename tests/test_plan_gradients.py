"""A gradient by plan is that of the function as written: the same bits, however it comes."""

import pytest
import torch
from test_plan import (
    PLANNED,
    _Seen,
    again,
    by_plan,
    no_plans,
    planned_on,
    same,
    sizes_of,
    tuple_of,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import tilewise
from tilewise import plan
from tilewise.op import OPS

__all__ = ["no_plans"]

# They do more than launch kernels: sum up parts, make tables of a gradient, or copy.
WITHOUT = {"embed", "dropout_add", "qk_norm_rotary", "rotary"}
WITHOUT_GRADIENT = ("sample", "attention_decode", "append_kv_")
DIFFERENTIATED = [n for n in PLANNED if not n.startswith(WITHOUT_GRADIENT)]


def leaves_of(tensors):
    return [
        t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in tensors
    ]


def backward(function, tensors, options, incoming):
    """The results, and the gradients for what is `incoming`, a function of the results."""
    results = tuple_of(function(*tensors, **options))
    dys = incoming(results)
    pairs = [(y, dy) for y, dy in zip(results, dys, strict=True) if dy is not None]
    wanted = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
    outputs, given = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, wanted, given, allow_unused=True)
    return [y.detach() for y in results], found


def all_of(results):
    return [torch.randn_like(y) for y in results]


def expanded(results):
    return [torch.tensor(0.5).expand(y.shape) for y in results]


def transposed(results):
    return [torch.randn(y.shape[::-1]).permute(*reversed(range(y.ndim))) for y in results]


def the_last(results):
    return [None] * (len(results) - 1) + [torch.randn_like(results[-1])]


def the_first(results):
    return [torch.randn_like(results[0])] + [None] * (len(results) - 1)


INCOMING = (all_of, expanded, transposed, the_last, the_first)


def compare(function, tensors, options, incoming):
    torch.manual_seed(1)
    ours, found = backward(function, tensors, options, incoming)
    torch.manual_seed(1)
    with _Seen():
        expected, exact = backward(function, tensors, options, incoming)
    same(ours, expected)
    assert [g is None for g in found] == [g is None for g in exact]
    for a, b in zip(found, exact, strict=True):
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize(("name", "backend"), planned_on(DIFFERENTIATED))
def test_a_gradient_by_plan_is_that_of_the_function(name, backend):
    op, function = OPS[name], getattr(tilewise, name)
    planned = 0
    for tensors, options in sizes_of(op, backend):
        with tilewise.backend(backend):
            for _ in range(2):
                op.call(*leaves_of(tensors), **options)
            planned += any(function.plans.values())
            for incoming in INCOMING:
                others = leaves_of([again(t, 3) for t in tensors])
                compare(op.call, others, options, incoming)
        function.plans.clear()
        function.seen.clear()
    assert (planned == 0) == (name in WITHOUT)


def plan_with_gradient(function, *tensors, **options):
    by_plan(function, *tensors, **options)
    y = function(*tensors, **options)
    y = y if isinstance(y, torch.Tensor) else y[0]
    assert type(y.grad_fn).__name__ == "PlannedBackward"
    return y


def test_only_some_may_want_one():
    x, w = torch.randn(4, 8), torch.randn(8)
    for wanted in ((True, False), (False, True), (True, True)):
        tensors = [t.clone().requires_grad_(r) for t, r in zip((x, w), wanted, strict=True)]
        plan_with_gradient(tilewise.rms_norm, *tensors)
        compare(tilewise.rms_norm, tensors, {}, all_of)
    with torch.no_grad():
        assert not tilewise.rms_norm(x.requires_grad_(), w).requires_grad


def test_one_tensor_may_come_twice():
    x, y = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    plan_with_gradient(tilewise.glu, x, y)
    dy = torch.randn(4, 8)
    (ours,) = torch.autograd.grad(tilewise.glu(x, x), x, dy)
    with _Seen():
        (expected,) = torch.autograd.grad(tilewise.glu(x, x), x, dy)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["layer_norm", "glu", "add_rms_norm"])
def test_it_may_be_differentiated_again(name):
    function = getattr(tilewise, name)
    tensors = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
    if name == "layer_norm":
        tensors[1] = torch.randn(8, requires_grad=True)
    plan_with_gradient(function, *tensors)

    def second(tensors):
        y = tuple_of(function(*[2 * t for t in tensors]))[0]
        first = torch.autograd.grad(y, tensors, torch.ones_like(y), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    ours = second(tensors)
    with _Seen():
        expected = second(tensors)
    torch.testing.assert_close(ours, expected)


def test_a_gradient_that_is_looked_at_runs_as_written():
    x = torch.randn(4, 8, requires_grad=True)
    y = plan_with_gradient(tilewise.gelu, x)
    with _Seen() as seen:
        (ours,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert "tilewise::gelu_backward" in seen.names
    (expected,) = torch.autograd.grad(tilewise.gelu(x), x, torch.ones_like(y))
    assert torch.equal(ours, expected)
    (batched,) = torch.autograd.grad(
        tilewise.gelu(x), x, torch.ones(3, 4, 8), is_grads_batched=True
    )
    torch.testing.assert_close(batched, expected.expand(3, 4, 8))


def test_what_was_saved_and_written_over_is_an_error():
    x = torch.randn(4, 8)
    leaf = torch.zeros(4, 8, requires_grad=True)
    plan_with_gradient(tilewise.gelu, leaf + x)
    inside = leaf + x
    y = tilewise.gelu(inside)
    inside.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_backward_needs_the_graph():
    x = torch.randn(4, 8, requires_grad=True)
    y = plan_with_gradient(tilewise.gelu, x)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes(reentrant):
    w = torch.randn(8, requires_grad=True)

    def layers(x):
        for _ in range(4):
            x = tilewise.rms_norm(x + 1, w)
        return x

    x = torch.randn(4, 8, requires_grad=True)
    for _ in range(4):
        y = checkpoint(layers, x, use_reentrant=reentrant)
        ours = torch.autograd.grad(y.sum(), w, retain_graph=True) if not reentrant else None
    with _Seen():
        expected = torch.autograd.grad(layers(x).sum(), w)
    if reentrant:
        w.grad = None
        y.sum().backward()
        ours = (w.grad,)
    assert torch.equal(ours[0], expected[0])


def test_what_only_a_second_derivative_needs_is_not_kept(monkeypatch):
    """The backward of add_rms_norm needs the sum; what was added is saved where it is small."""
    monkeypatch.setattr(plan, "SAVED_BYTES", 2 * 4 * 8 * 4)
    for rows, kept in ((4, True), (5, False)):
        leaf = torch.randn(rows, 8, requires_grad=True)
        for _ in range(2):
            tilewise.add_rms_norm(leaf, leaf)
        x = leaf * 1
        y, _ = tilewise.add_rms_norm(x, leaf)
        memory = StorageWeakRef(x.untyped_storage())
        del x
        assert memory.expired() != kept
        assert y.requires_grad


def test_a_plan_keeps_no_tensor_of_a_call():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    y = plan_with_gradient(tilewise.rms_norm, x, w)
    y.backward(torch.ones(()).expand(4, 8))
    memories = [StorageWeakRef(t.untyped_storage()) for t in (x, w, y)]
    del x, w, y
    assert all(memory.expired() for memory in memories)


def test_one_result_in_two_shapes_has_no_plan():
    def function(x):
        y = tilewise.gelu(x)
        return y, y.view(-1)

    twice, x = plan.planned(function), torch.randn(4, 8)
    for leaf in (x, x.clone().requires_grad_()):
        for _ in range(3):
            assert [y.shape for y in twice(leaf)] == [(4, 8), (32,)]
    assert list(twice.plans.values()) == [None, None]


@pytest.mark.parametrize("incoming", INCOMING)
def test_gradients_that_come_in_no_way_of_its_own(incoming, monkeypatch):
    """A backward that copies what comes has no plan of its own, and takes the usual one."""
    monkeypatch.setattr(plan._Differentiated, "_backward_plan_of", lambda *arguments: None)
    tensors = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
    plan_with_gradient(tilewise.add_rms_norm, *tensors)
    compare(tilewise.add_rms_norm, tensors, {}, incoming)
