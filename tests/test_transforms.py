"""torch.func, forward-mode AD and higher derivatives: right to any order, eager and compiled."""

import pytest
import torch
from cases import (
    BACKENDS,
    as_list,
    case_or_skip,
    differentiable_or_skip,
    leaves,
    own_backend,
    unless,
)
from test_ops import ops_called
from torch.fx.experimental.proxy_tensor import make_fx

from tilewise.check import NUDGES, compare, nudged


def functions(op, backend):
    """The op and its reference as functions of only those tensors that have a gradient."""
    call, reference, tensors = case_or_skip(op, backend)
    wanted = differentiable_or_skip(op, tensors)

    def of(function):
        def loss(*free):
            full = list(tensors)
            for i, t in zip(wanted, free, strict=True):
                full[i] = t
            return sum(out.square().sum() for out in as_list(function(*full)))

        return loss

    return of(call), of(reference), tuple(tensors[i] for i in wanted)


TRANSFORMS = {
    "vmap": lambda f, t: torch.vmap(f)(*[torch.stack([a, 2 * a]) for a in t]),
    "grad": lambda f, t: torch.func.grad(f, tuple(range(len(t))))(*t),
    "jvp": lambda f, t: torch.func.jvp(f, t, tuple(a.cos() for a in t)),
    "hessian": lambda f, t: torch.func.hessian(f)(*t),
    "per-sample gradients": lambda f, t: torch.vmap(torch.func.grad(f))(
        *[torch.stack([a, 2 * a]) for a in t]
    ),
}


# What a graph is made of does not depend on the backend: `make test` has one of each op.
FIRST_BACKENDS = [
    pytest.param(*p.values, id=p.id, marks=unless(backend == own_backend(op)))
    for p in BACKENDS
    for op, backend in [p.values]
]
# What is transformed is the reference, whatever the backend: compiled, one will do as well.
TRANSFORMED = [
    pytest.param(*p.values, compiled, id=f"{p.id}-{'compiled' if compiled else 'eager'}",
                 marks=unless(not compiled or backend == own_backend(op)))
    for p in BACKENDS
    for op, backend in [p.values]
    for compiled in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("op, backend, compiled", TRANSFORMED)
def test_transforms(op, backend, compiled, transform):
    call, reference, tensors = functions(op, backend)

    def run(*tensors):
        return transform(call, tensors)

    if compiled:
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(*tensors), transform(reference, tensors))


class Called(torch.nn.Module):
    """An op as `torch.export` wants it."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *tensors):
        return self.call(*tensors)


def ops_in(graph):
    return {str(n.target).removesuffix(".default") for n in graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("op, backend", FIRST_BACKENDS)
def test_an_exported_program_contains_our_ops(op, backend):
    call, _, tensors = case_or_skip(op, backend)
    ours = {func.name().replace("::", ".") for func, _ in ops_called(lambda: call(*tensors))}
    program = torch.export.export(Called(call), tuple(tensors))
    assert ours and ours <= ops_in(program.graph)
    torch.testing.assert_close(program.module()(*tensors), call(*tensors))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("op, backend", FIRST_BACKENDS)
def test_what_make_fx_records_contains_our_ops(op, backend, mode):
    """Forward and backward in one graph."""
    call, _, tensors = case_or_skip(op, backend)
    ours = {func.name().replace("::", ".") for func, _ in ops_called(lambda: call(*tensors))}

    def run(*tensors):
        inputs = leaves(op, tensors)
        outs = as_list(call(*inputs))
        loss = [out.square().sum() for out in outs if out.requires_grad]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        grads = torch.autograd.grad(loss, wanted) if loss else ()
        return [*(out.detach() for out in outs), *grads]

    recorded = make_fx(run, tracing_mode=mode)(*tensors)
    assert ours and ours <= ops_in(recorded.graph)
    torch.testing.assert_close(recorded(*tensors), run(*tensors))


@pytest.mark.parametrize("op, backend", BACKENDS)
def test_forward_mode_keeps_the_tangent(op, backend):
    call, reference, tensors = functions(op, backend)

    def tangent(f):
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(t, t.cos()) for t in tensors]
            return torch.autograd.forward_ad.unpack_dual(f(*duals)).tangent

    torch.testing.assert_close(tangent(call), tangent(reference))


@pytest.mark.parametrize("op, backend", BACKENDS)
def test_second_derivative(op, backend):
    call, reference, tensors = functions(op, backend)

    def penalty_gradient(f, change=torch.clone):
        inputs = [change(t.detach()).requires_grad_() for t in tensors]
        first = torch.autograd.grad(f(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    truth = penalty_gradient(reference, torch.Tensor.double)
    runs = [penalty_gradient(reference, change) for change in (torch.clone, *[nudged] * NUDGES)]
    for i, ours in enumerate(penalty_gradient(call)):
        error, allowed = compare(ours, [run[i] for run in runs], truth[i])
        assert error <= allowed


@pytest.mark.parametrize("op, backend", BACKENDS)
def test_frozen_inputs_get_no_gradient(op, backend):
    call, _, tensors = case_or_skip(op, backend)
    wanted = differentiable_or_skip(op, tensors)
    for kept in wanted:
        inputs = [t if t is None else t.detach().clone() for t in tensors]
        inputs[kept].requires_grad_()
        full = leaves(op, tensors)
        loss = sum(out.sum() for out in as_list(call(*inputs)))
        for func, arguments in ops_called(loss.backward):  # what is not wanted takes no memory
            plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
            torch.library.opcheck(func, plain, test_utils="test_faketensor")
        sum(out.sum() for out in as_list(call(*full))).backward()
        if backend == "numba":  # what is wanted is compiled by itself, and may add otherwise
            torch.testing.assert_close(inputs[kept].grad, full[kept].grad)
        else:
            assert torch.equal(inputs[kept].grad, full[kept].grad)
        assert all(t is None or i == kept or t.grad is None for i, t in enumerate(inputs))
