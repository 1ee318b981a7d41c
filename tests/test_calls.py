"""A call that nobody looks at goes straight to its kernel; whoever does look sees the op."""

import pytest
import torch
from test_ops import ops_called

import tilewise
from tilewise.op import OPS

X, WEIGHT = torch.randn(3, 8), torch.randn(8)
OP = "tilewise::rms_norm_forward"


def call(x=X, weight=WEIGHT, **options):
    return tilewise.rms_norm(x, weight, **options)


class Watched(torch.Tensor):
    """A subclass that keeps the names of the ops it is given to."""

    seen = []

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.name())
        plain = [a.inner if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


def test_the_dispatcher_is_not_asked(monkeypatch):
    def refuse(op, *args, **options):
        assert op.namespace != "tilewise", "the dispatcher was asked"
        return op._op(*args, **options)

    expected = call()
    forward = torch.ops.tilewise.rms_norm_forward.default
    monkeypatch.setattr(type(forward), "__call__", refuse)
    assert torch.equal(call(), expected)
    assert torch.equal(call(weight=torch.nn.Parameter(WEIGHT, requires_grad=False)), expected)


@pytest.mark.parametrize("which", [0, 1])
def test_a_subclass_of_a_tensor_sees_the_op(which):
    tensors = [X, WEIGHT]
    expected = call(*tensors)
    tensors[which] = Watched(tensors[which])
    Watched.seen.clear()
    y = call(*tensors)
    assert OP in Watched.seen
    assert torch.equal(y, expected)


def test_a_dispatch_mode_sees_the_op():
    assert [func.name() for func, _ in ops_called(call)] == [OP]


def test_a_function_mode_sees_the_op():
    seen = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        call()
    assert any("rms_norm_forward" in name for name in seen)


def test_the_profiler_sees_the_op():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    assert OP in {event.key for event in profile.key_averages()}


@pytest.mark.filterwarnings("ignore")
def test_a_trace_contains_the_op():
    traced = torch.jit.trace(lambda x: call(x), X)
    assert OP in {node.kind() for node in traced.graph.nodes()}
    torch.testing.assert_close(traced(2 * X), call(2 * X))


def test_numbers_are_what_the_schema_says():
    """An int for a float would have a kernel of its own compiled."""
    assert torch.equal(call(eps=1), call(eps=1.0))
    assert torch.equal(call(eps=True), call(eps=1.0))


def test_written_arguments_are_counted():
    """So that autograd knows when what it has saved was written over."""
    logits, target = torch.randn(3, 8), torch.tensor([1, 2, 3])
    leaf = torch.ones(8, requires_grad=True)
    y = leaf * logits
    tilewise.cross_entropy_(logits, target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.inference_mode():
        tilewise.cross_entropy_(torch.randn(3, 8), target)


def test_choosing_is_kept_only_while_the_backends_are_the_same():
    op = OPS["rms_norm"]
    before = tilewise.choice.choose(op, None, X, WEIGHT)
    present = op.backends
    object.__setattr__(op, "backends", {"triton": present["triton"]})
    try:
        assert tilewise.choice.choose(op, None, X, WEIGHT) == "reference"
    finally:
        object.__setattr__(op, "backends", present)
    assert tilewise.choice.choose(op, None, X, WEIGHT) == before != "reference"
