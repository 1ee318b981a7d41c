"""`tilewise.functional` against `torch.nn.functional`: signatures, values, gradients, dtypes."""

import inspect
from functools import partial

import pytest
import torch
from cases import DEVICE
from test_ops import ops_called

import tilewise
from tilewise import explain, functional
from tilewise.check import compare

F = torch.nn.functional
MASK = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) > 0.4
MASK[2] = False  # a query with nothing to attend to

# name, shapes of the floating-point tensors (None: none given), options, whether our op runs
CASES = [
    ("rms_norm", [(4, 6), (6,)], {"normalized_shape": (6,), "eps": 0.1}, True),
    ("rms_norm", [(4, 6), None], {"normalized_shape": (6,)}, True),
    ("rms_norm", [(2, 3, 4, 6), (4, 6)], {"normalized_shape": [4, 6]}, True),
    ("layer_norm", [(4, 6), (6,), (6,)], {"normalized_shape": (6,), "eps": 0.1}, True),
    ("layer_norm", [(4, 6), (6,), None], {"normalized_shape": (6,)}, True),
    ("layer_norm", [(4, 6), None, (6,)], {"normalized_shape": (6,)}, True),
    ("layer_norm", [(2, 3, 4, 6), (4, 6), (4, 6)], {"normalized_shape": [4, 6]}, True),
    *(
        case
        for name in ("softmax", "log_softmax")
        for case in [
            (name, [(3, 4, 5)], {"dim": -1}, True),
            (name, [(3, 4, 5)], {"dim": 1}, True),
            (name, [(3, 4, 5)], {"dim": 0, "dtype": torch.float64}, True),
            (name, [()], {"dim": 0}, False),
        ]
    ),
    ("cross_entropy", [(4, 6)], {"target": (4,), "ignore_index": 2}, True),
    ("cross_entropy", [(6,)], {"target": ()}, True),
    ("cross_entropy", [(3, 6, 2, 5)], {"target": (3, 2, 5), "label_smoothing": 0.1}, True),
    ("cross_entropy", [(3, 6, 7)], {"target": (3, 7), "reduction": "none"}, True),
    ("cross_entropy", [(4, 6)], {"target": (4,), "reduction": "sum"}, True),
    ("cross_entropy", [(4, 6)], {"target": (4,), "weight": 6}, True),
    ("cross_entropy", [(4, 6)], {"target": (4,), "weight": 6, "label_smoothing": 0.1}, True),
    *(
        ("linear_cross_entropy", shapes, options, ours)
        for shapes, options, ours in [
            ([(4, 8), (6, 8)], {"target": (4,), "label_smoothing": 0.1}, True),
            ([(4, 8), (6, 8)], {"target": (4,), "weight": 6, "ignore_index": 2}, True),
            ([(8,), (6, 8)], {"target": (), "reduction": "none"}, True),
            ([(4, 8), (6, 3, 8)], {"target": (4, 3)}, True),
        ]
        if hasattr(F, "linear_cross_entropy")  # from PyTorch 2.13 on
    ),
    ("cross_entropy", [(3, 6, 2)], {"target": (3, 6, 2), "label_smoothing": 0.1}, False),
    ("embedding", [(6, 5)], {"ids": (3, 4)}, True),
    ("embedding", [(6, 5)], {"ids": (), "padding_idx": -1}, True),
    ("embedding", [(6, 5)], {"ids": (0, 2)}, False),
    ("embedding", [(6, 5)], {"ids": (3, 4), "scale_grad_by_freq": True}, False),
    ("gelu", [(3, 7)], {}, True),
    ("gelu", [(3, 7)], {"approximate": "tanh"}, True),
    ("glu", [(3, 8)], {}, True),
    ("glu", [(4, 3, 5)], {"dim": 0}, True),
    *(
        ("scaled_dot_product_attention", shapes, options, ours)
        for shapes, options, ours in [
            ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)], {}, True),
            ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)], {"scale": 0.3}, True),
            ([(2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 5, 8)], {"is_causal": True}, True),
            ([(2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)], {"is_causal": True}, True),
            ([(2, 4, 7, 8), (2, 4, 5, 8), (2, 4, 5, 8)], {"is_causal": True}, True),
            ([(2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8)], {"enable_gqa": True}, True),
            ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)], {"attn_mask": MASK}, True),
            ([(3, 5, 8), (3, 6, 8), (3, 6, 8)], {"attn_mask": MASK}, True),
            ([(2, 3, 2, 5, 8), (2, 3, 2, 6, 8), (2, 3, 2, 6, 8)], {}, True),
            ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), (5, 6)], {}, "bias"),
            ([(3, 5, 8), (3, 6, 8), (3, 6, 8), (3, 5, 6)], {}, "bias"),
            ([(3, 5, 8), (3, 6, 8), (3, 6, 8), (1, 6)], {}, "bias"),
            ([(2, 3, 2, 5, 8), (2, 3, 2, 6, 8), (2, 3, 2, 6, 8), (3, 1, 5, 6)], {}, "bias"),
            ([(2, 3, 2, 5, 8), (2, 3, 2, 6, 8), (2, 3, 2, 6, 8), (2, 1, 1, 1, 6)], {}, "bias"),
            ([(2, 3, 2, 5, 8), (2, 3, 2, 6, 8), (2, 3, 2, 6, 8), (1, 1, 2, 5, 6)], {}, "bias"),
            ([(2, 4, 5, 8), (1, 4, 6, 8), (1, 4, 6, 8)], {}, False),  # a batch to be broadcast
        ]
    ),
]


def made(shapes, options, dtype):
    """Tensors and options; a size or a shape among the options stands for a tensor as well."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        None if shape is None else torch.randn(shape, generator=generator).to(DEVICE, dtype)
        for shape in shapes
    ]
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if "target" in options:
        size, indexed = options["target"], options["target"] != shapes[0]
        target = torch.randint(6, size, generator=generator)
        probabilities = torch.rand(size, generator=generator).softmax(1) if not indexed else None
        options["target"] = (target if indexed else probabilities).to(DEVICE)
        if not indexed:
            options["target"] = options["target"].to(dtype)
    if "ids" in options:
        options["ids"] = torch.randint(6, options["ids"], generator=generator).to(DEVICE)
    if "weight" in options:
        weight = torch.rand(options["weight"], generator=generator)
        options["weight"] = weight.to(DEVICE, dtype)
    return tensors, options


def called(name, module, tensors, options):
    """Value and gradients."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    options = dict(options)
    first, *rest = leaves
    if name in ("rms_norm", "layer_norm", "cross_entropy"):
        positional = options.pop("normalized_shape" if "norm" in name else "target")
        out = getattr(module, name)(first, positional, *rest, **options)
    elif name == "embedding":
        out = module.embedding(options.pop("ids"), first, **options)
    else:
        out = getattr(module, name)(first, *rest, **options)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator).to(out)
    wanted = [t for t in leaves if t is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, cotangent)]


def as_double(value):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name, shapes, options, ours", CASES, ids=lambda v: str(v).replace(" ", "")[:60]
)
def test_values_and_gradients(name, shapes, options, ours, dtype):
    tensors, options = made(shapes, options, dtype)
    got = called(name, functional, tensors, options)
    plain = called(name, F, tensors, options)
    assert [t.dtype for t in got] == [t.dtype for t in plain]
    assert [t.shape for t in got] == [t.shape for t in plain]
    double = {k: as_double(v) for k, v in options.items()}
    truth = called(name, F, [t if t is None else t.double() for t in tensors], double)
    for mine, theirs, true in zip(got, plain, truth, strict=True):
        error, allowed = compare(mine, theirs, true)
        assert error <= allowed


@pytest.mark.parametrize(
    "name, shapes, options, ours", CASES, ids=lambda v: str(v).replace(" ", "")[:60]
)
def test_our_op_runs_where_it_can(name, shapes, options, ours):
    tensors, options = made(shapes, options, torch.float32)
    seen = ops_called(lambda: called(name, functional, tensors, options))
    if ours == "bias":  # if one of our kernels takes any
        ones = torch.ones(4, 1, 1, 1, 1, device=DEVICE)
        ours = explain("attention", *ones)["reference"] != "chosen"
    assert bool(seen) == ours


def parameters(function):
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(
    "name",
    ["rms_norm", "layer_norm", "softmax", "log_softmax", "cross_entropy", "embedding"]
    + ["linear_cross_entropy"] * hasattr(F, "linear_cross_entropy"),
)
def test_signatures_are_those_of_torch(name):
    assert parameters(getattr(functional, name)) == parameters(getattr(F, name))


@pytest.mark.parametrize(
    "name, signature",
    [
        ("gelu", "(input, approximate='none')"),
        ("glu", "(input, dim=-1)"),
        (
            "scaled_dot_product_attention",
            "(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, "
            "enable_gqa=False)",
        ),
    ],
)
def test_signatures_are_those_that_torch_writes_down(name, signature):
    """Of these `inspect` sees nothing in torch: they are in the first lines of the docstring."""
    written = " ".join(getattr(F, name).__doc__.split()).replace(" = ", "=")
    assert f"{name}{signature}" in written
    mine = inspect.signature(getattr(functional, name))
    bare = mine.replace(
        parameters=[p.replace(annotation=p.empty) for p in mine.parameters.values()],
        return_annotation=mine.empty,
    )
    assert str(bare) == signature


def test_dim_none_warns_and_answers_as_torch():
    x = torch.randn(3, 4, device=DEVICE)
    for name in ("softmax", "log_softmax"):
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            assert torch.equal(getattr(functional, name)(x), getattr(F, name)(x, 1))


def test_integers_are_cast_first():
    x = torch.arange(12, device=DEVICE).view(3, 4)
    y = functional.softmax(x, 0, dtype=torch.float32)
    torch.testing.assert_close(y, F.softmax(x, 0, dtype=torch.float32))


@pytest.mark.parametrize("shapes", [((2, 2, 5, 8), (5, 6)), ((3, 5, 8), (3, 1, 6))], ids=str)
def test_dropout_is_ours_by_the_generator_of_torch(shapes):
    shape, wide = shapes
    q, bias = torch.randn(shape, device=DEVICE), torch.randn(wide, device=DEVICE)
    k = torch.randn(*shape[:-2], 6, 8, device=DEVICE)
    heads = (t.unsqueeze(1) if len(shape) == 3 else t for t in (q, k, k))
    added = bias.unsqueeze(1) if len(shape) == 3 else bias
    torch.manual_seed(0)
    ours = functional.scaled_dot_product_attention(q, k, k, bias, 0.5)
    torch.manual_seed(0)
    assert torch.equal(ours, tilewise.attention(*heads, added, dropout_p=0.5).view(shape))
    assert not torch.equal(ours, functional.scaled_dot_product_attention(q, k, k, bias, 0.5))


def test_what_torch_refuses_is_refused():
    q = torch.randn(2, 2, 5, 8, device=DEVICE)
    attend, rule = functional.scaled_dot_product_attention, torch.ones(5, 5, device=DEVICE)
    for wrong in (rule, rule.bool()):
        with pytest.raises(RuntimeError, match="attn_mask must be None if is_causal, got both"):
            attend(q, q, q, wrong, is_causal=True)
    with pytest.raises(RuntimeError, match="attn_mask dtype"):
        attend(q, q, q, rule.double())
    with pytest.raises(RuntimeError, match="dropout"):
        attend(q, q, q, dropout_p=1.5)


def test_grouped_heads_must_be_asked_for():
    q, k = torch.randn(1, 4, 5, 8, device=DEVICE), torch.randn(1, 2, 5, 8, device=DEVICE)
    for module in (functional, F):
        with pytest.raises(RuntimeError):
            module.scaled_dot_product_attention(q, k, k)


X = torch.randn(3, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (partial(functional.rms_norm, X, (3,)), r"rms_norm: input .* got \[3, 4\] and \[3\]"),
        (partial(functional.rms_norm, X, ()), r"rms_norm: input .* got \[3, 4\] and \[\]"),
        (
            partial(functional.rms_norm, X, (3, 4), torch.ones(12)),
            r"rms_norm: weight must be normalized_shape, got \[12\] and \[3, 4\]",
        ),
        (partial(functional.layer_norm, X, (3,)), r"layer_norm: input .* got \[3, 4\] and \[3\]"),
        (
            partial(functional.layer_norm, X, (4,), torch.ones(4), torch.ones(3)),
            r"layer_norm: bias must be normalized_shape, got \[3\] and \[4\]",
        ),
    ],
)
def test_wrong_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
