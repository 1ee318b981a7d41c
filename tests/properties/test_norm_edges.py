"""Where norms go wrong: all four, on every backend."""

import pytest
import torch
from cases import BACKENDS, DEVICE, case_or_skip
from layouts import laid_out, sliced, straight
from torch.nn import functional as F

import tilewise
from tilewise.check import Result, compare, outputs_and_grads, standard_of
from tilewise.rng import keep_mask

ADDING = ("add_rms_norm", "add_layer_norm")
NORMS = ("rms_norm", "layer_norm", *ADDING)
MINE = [p for p in BACKENDS if p.values[0].name in NORMS]
ADDERS = [p for p in BACKENDS if p.values[0].name in ADDING]
PLAIN = [p for p in MINE if p not in ADDERS]

COLS = 24
WEIGHT, BIAS = torch.randn(COLS, device=DEVICE), torch.randn(COLS, device=DEVICE)


def normed(op, backend, x, weight=None, bias=None, **options):
    """What is normalised, of `x`: of `x` in two parts where the op adds."""
    case_or_skip(op, backend)
    if op.name in ADDING:
        return op.call(0 * x, x, weight, bias, **options, backend=backend)[0]
    return op.call(x, weight, bias, **options, backend=backend)


def torchs(op, x, weight=None, bias=None, eps=0.1):
    """PyTorch's own."""
    cols = x.shape[-1:]
    if op.name.endswith("layer_norm"):
        return F.layer_norm(x, cols, weight, bias, eps)
    y = F.rms_norm(x, cols, weight, eps)
    return y if bias is None else y + bias


def held(op, backend, *tensors, **options):
    """Hold outputs and gradients to the rule."""
    case_or_skip(op, backend)
    standard = standard_of(op, tensors, options)
    ours = outputs_and_grads(op, op.call, tensors, options | {"backend": backend})
    results = standard.judge(ours, Result(op.name, backend, DEVICE, "", {}))
    assert all(r.ok for r in results), [(r.output, r.error, r.allowed) for r in results]


@pytest.mark.parametrize("op, backend", MINE)
def test_as_pytorch_has_it(op, backend):
    x = torch.randn(40, COLS, device=DEVICE)
    y = normed(op, backend, x, WEIGHT, BIAS, eps=0.1)
    torch.testing.assert_close(y, torchs(op, x, WEIGHT, BIAS))


@pytest.mark.parametrize("op, backend", MINE)
def test_a_constant_row(op, backend):
    """Nothing is left of it but the bias, or all of it is at 1."""
    x = torch.full((2, COLS), 3.0, device=DEVICE)
    y = normed(op, backend, x, WEIGHT, BIAS, eps=0.0 if "rms" in op.name else 0.1)
    torch.testing.assert_close(y, (BIAS + ("rms" in op.name) * WEIGHT).expand(2, COLS))


@pytest.mark.parametrize("cols", [1000, 16400])
@pytest.mark.parametrize("op, backend", MINE)
def test_a_large_mean_with_little_beside_it(op, backend, cols):
    x = 1e4 + 1e-2 * torch.randn(3, cols, dtype=torch.float64, device=DEVICE)
    truth, theirs = (torchs(op, t, eps=1e-6) for t in (x.float().double(), x.float()))
    error, allowed = compare(normed(op, backend, x.float(), eps=1e-6), theirs, truth)
    assert error <= allowed


@pytest.mark.parametrize("cols", [1000, 16400])
@pytest.mark.parametrize("op, backend", [p for p in MINE if "layer_norm-numba" in p.id])
def test_a_mean_that_is_no_number(op, backend, cols):
    """It is between the only two numbers of a row: these are two deviations apart all the same."""
    one, other = 8192.0, 8192.0 + 2**-10
    x = torch.tensor([one, other], device=DEVICE).repeat(3, cols // 2)
    y = normed(op, backend, x, eps=0.0)
    torch.testing.assert_close(y[:, 1::2] - y[:, ::2], torch.full_like(y[:, ::2], 2.0))


@pytest.mark.parametrize("op, backend", MINE)
def test_fp16_does_not_overflow_on_the_way(op, backend):
    x = torch.full((2, COLS), 6e4, device=DEVICE, dtype=torch.float16)
    x[:, ::2] *= -1
    assert torch.equal(normed(op, backend, x, eps=0.0), x.sign())


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
@pytest.mark.parametrize("op, backend", MINE)
def test_a_whole_row_that_is_spoilt_spoils_no_other(op, backend, spoil):
    x = torch.randn(5, COLS, device=DEVICE)
    clean = normed(op, backend, x, WEIGHT)
    x[1] = spoil
    y = normed(op, backend, x, WEIGHT)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])


@pytest.mark.parametrize("op, backend", MINE)
def test_a_row_of_zeros_without_eps_is_nan_and_alone(op, backend):
    x = torch.randn(3, COLS, device=DEVICE)
    x[1] = 0
    y = normed(op, backend, x, eps=0.0)
    assert y.isnan().any(-1).tolist() == torchs(op, x, eps=0.0).isnan().any(-1).tolist()


@pytest.mark.parametrize("rows, cols", [(3, 1), (3, 2), (5, 7), (2, 1021)])
@pytest.mark.parametrize("op, backend", MINE)
def test_odd_widths(op, backend, rows, cols):
    extra = [torch.randn(rows, cols, device=DEVICE)] * (op.name in ADDING)
    x, bias = torch.randn(rows, cols, device=DEVICE), torch.randn(cols, device=DEVICE)
    weight = None if cols == 1 else bias.flip(0)  # of a single column nothing is left: dx is 0
    held(op, backend, x, *extra, weight, bias, eps=0.1)


@pytest.mark.parametrize("cols", [1025, 8000, 8200])
@pytest.mark.parametrize("op, backend", [p for p in MINE if p.values[1] == "triton"])
def test_more_tiles_of_rows_than_programs(op, backend, cols, monkeypatch):
    from tilewise.kernels.triton import _norm

    monkeypatch.setattr(_norm, "MAX_PARTS", 2)
    extra = [torch.randn(5, cols, device=DEVICE)] * (op.name in ADDING)
    x, weight = torch.randn(5, cols, device=DEVICE), torch.randn(cols, device=DEVICE)
    held(op, backend, x, *extra, weight, weight.flip(0), eps=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("op, backend", MINE)
def test_262144_columns(op, backend):
    """In the dtype in which the most is at stake: what is summed has 8 bits each."""
    extra = [torch.randn(2, 1 << 18, device=DEVICE)] * (op.name in ADDING)
    x = torch.randn(2, 1 << 18, device=DEVICE)
    weight = torch.randn(1 << 18, device=DEVICE)
    tensors = (t.bfloat16() for t in (x, *extra, weight))
    held(op, backend, *tensors, eps=0.1)


@pytest.mark.parametrize("op, backend", MINE)
def test_expanded_inputs_and_gradients(op, backend):
    case_or_skip(op, backend)
    row = torch.randn(1, COLS, device=DEVICE)
    grads = []
    for x in (row.expand(6, COLS), row.repeat(6, 1)):
        x = x.detach().requires_grad_()
        y = normed(op, backend, x, WEIGHT, eps=0.1)
        grads.append(torch.autograd.grad(y, x, torch.ones((), device=DEVICE).expand(6, COLS))[0])
    assert torch.equal(*grads)


LAYOUTS = {
    "heads": lambda t: t.view(2, 3, 4, -1),
    "heads of a packed projection": lambda t: (
        torch.cat([t, t], -1).view(2, 4, 2, 3, t.shape[-1])[:, :, 1].transpose(1, 2)
    ),
    "three dims": lambda t: torch.cat([t, t], -1).view(4, 6, -1)[..., : t.shape[-1]],
    "swapped": lambda t: t.view(4, 6, -1).transpose(0, 1),
    "pairs": lambda t: torch.cat([t.view(12, 2, -1)] * 2, 1)[:, :2],
    "five dims": lambda t: t.view(2, 3, 2, 2, -1).transpose(0, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("op, backend", MINE)
def test_rows_anywhere(op, backend, layout):
    case_or_skip(op, backend)
    x = layout(torch.randn(24, COLS, device=DEVICE))
    results = []
    for t in (x, x.contiguous()):
        t = t.detach().requires_grad_()
        y = normed(op, backend, t, WEIGHT, BIAS, eps=0.1)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        results.append((y, *torch.autograd.grad(y, t, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].is_contiguous()


@pytest.mark.parametrize("op, backend", MINE)
def test_all_that_a_block_has(op, backend):
    """Of halves the most columns that a GPU gives to one block."""
    extra = [torch.randn(3, 8192, device=DEVICE)] * (op.name in ADDING)
    x, weight = torch.randn(3, 8192, device=DEVICE), torch.randn(8192, device=DEVICE)
    tensors = (t.bfloat16() for t in (x, *extra, weight, weight.flip(0)))
    held(op, backend, *tensors, eps=0.1)


@pytest.mark.parametrize("op, backend", MINE)
def test_wide_rows_anywhere(op, backend):
    call, _, tensors = case_or_skip(op, backend, size={"rows": 3, "cols": 16400, "bias": True})
    torch.testing.assert_close(
        laid_out(op, call, tensors, sliced), laid_out(op, call, tensors, straight)
    )


@pytest.mark.parametrize("op, backend", PLAIN)
def test_heads_of_a_packed_projection_are_not_copied(op, backend):
    case_or_skip(op, backend)
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, args))
            return func(*args, **(kwargs or {}))

    packed = torch.randn(2, 5, 3 * 4 * 16, device=DEVICE)
    q = packed.view(2, 5, 3, 4, 16)[:, :, 0].transpose(1, 2)
    with Recorder():
        op.call(q, backend=backend)
    launched = [args[0] for func, args in seen if func.namespace == "tilewise"]
    assert [t.data_ptr() for t in launched] == [packed.data_ptr()]
    assert not [func for func, _ in seen if "copy" in func.name() or "clone" in func.name()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op, backend", MINE)
def test_llama_rounds_the_row_before_the_weight(op, backend, dtype):
    """Bit for bit what those models write, where the row is not at the edge of two roundings."""
    case_or_skip(op, backend)
    x = torch.randn(50, COLS, device=DEVICE).to(dtype)
    weight, bias = WEIGHT.to(dtype), BIAS.to(dtype)
    options = {"eps": 0.1, "casting": "llama", "weight_offset": 1.0}
    y = normed(op, backend, x, weight, bias, **options)
    xhat = torchs(op, x.double())
    row, least, most = (((1 + e) * xhat).to(dtype) for e in (0, -1e-5, 1e-5))
    sure = least == most
    assert sure.float().mean() > 0.9
    expected = row * (weight + 1) + bias
    assert torch.equal(y[sure], expected[sure])
    once = normed(op, backend, x, weight, bias, eps=0.1, weight_offset=1.0)
    assert not torch.equal(once[sure], expected[sure])


@pytest.mark.parametrize("op, backend", ADDERS)
def test_dropout_draws_the_mask_of_the_specification(op, backend):
    case_or_skip(op, backend)
    ones, zeros = torch.ones(7, 1030, device=DEVICE), torch.zeros(7, 1030, device=DEVICE)
    for seed, offset in ((5, 0), (torch.tensor(2**40 + 1), torch.tensor(9)), (-3, 2**33)):
        seed, offset = (n.to(DEVICE) if isinstance(n, torch.Tensor) else n for n in (seed, offset))
        options = {"dropout_p": 0.25, "seed": seed, "offset": offset}
        total = op.call(ones, zeros, **options, backend=backend)[1]
        kept = keep_mask(0.25, seed, offset, torch.arange(7, device=DEVICE), 1030)
        assert torch.equal(total, torch.where(kept, ones / 0.75, zeros))


@pytest.mark.parametrize("op, backend", ADDERS)
def test_a_seed_for_each_row_does_not_know_its_place(op, backend):
    case_or_skip(op, backend)
    x, zeros = torch.ones(6, COLS, device=DEVICE), torch.zeros(6, COLS, device=DEVICE)
    seeds, offsets = torch.arange(6, device=DEVICE), torch.arange(6, device=DEVICE) % 2

    def total(order):
        options = {"dropout_p": 0.5, "seed": seeds[order], "offset": offsets[order]}
        return op.call(x, zeros, **options, backend=backend)[1]

    kept = keep_mask(0.5, seeds, offsets, 0, COLS)
    assert torch.equal(total(seeds), 2 * kept.float())
    assert torch.equal(total(seeds.flip(0)), 2 * kept.float().flip(0))


@pytest.mark.parametrize("op, backend", ADDERS)
def test_the_backward_pass_draws_the_same_mask(op, backend):
    case_or_skip(op, backend)
    x = torch.randn(9, COLS, device=DEVICE, requires_grad=True)
    _, total = op.call(x, torch.zeros_like(x), dropout_p=0.5, backend=backend)
    (dx,) = torch.autograd.grad(total, x, torch.ones_like(total))
    assert torch.equal(dx, 2 * (total != 0).float())


@pytest.mark.parametrize("op, backend", ADDERS)
def test_dropout_of_nothing_and_of_everything(op, backend):
    case_or_skip(op, backend)
    x = torch.randn(5, COLS, device=DEVICE)
    x[0, 0] = x[1, -1] = float("nan")
    residual = torch.randn(5, COLS, device=DEVICE)
    none, every = (op.call(x, residual, dropout_p=p, backend=backend)[1] for p in (0.0, 1.0))
    torch.testing.assert_close(none, x + residual, equal_nan=True)
    assert torch.equal(every, residual)


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("op, backend", ADDERS)
def test_either_output_may_be_left_unused(op, backend, used):
    case_or_skip(op, backend)
    grads = []
    for call in (lambda *t: op.call(*t, backend=backend), op.reference):
        torch.manual_seed(0)
        inputs = [torch.randn(5, COLS, device=DEVICE, requires_grad=True) for _ in range(2)]
        inputs.append(WEIGHT.clone().requires_grad_())
        outs = [out.cos().sum() for out, wanted in zip(call(*inputs), used, strict=True) if wanted]
        grads.append(torch.autograd.grad(sum(outs), inputs, materialize_grads=True))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("op, backend", ADDERS)
def test_a_stream_in_fp32_loses_nothing_small(op, backend):
    case_or_skip(op, backend)
    x = torch.full((3, COLS), 2.0**-10, device=DEVICE, dtype=torch.bfloat16)
    residual = torch.ones(3, COLS, device=DEVICE)
    y, total = op.call(x, residual, backend=backend)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, residual + 2.0**-10)
    assert torch.equal(op.call(x, residual.bfloat16(), backend=backend)[1], residual.bfloat16())


def wanted_by(op, backend, frozen):
    """What the backward kernel is asked for, by position."""
    case_or_skip(op, backend)
    count = 4 if op.name in ADDING else 3
    shapes = [(5, COLS)] * (count - 2) + [(COLS,)] * 2
    inputs = [
        torch.randn(s, device=DEVICE).requires_grad_(i != frozen) for i, s in enumerate(shapes)
    ]
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().endswith("_norm_backward"):
                seen.append([a for a in args if isinstance(a, bool)])
            return func(*args, **(kwargs or {}))

    outs = op.call(*inputs, backend=backend)
    outs = outs if isinstance(outs, tuple) else (outs,)
    with Recorder():
        sum(out.sum() for out in outs).backward()
    assert [t.grad is None for t in inputs] == [i == frozen for i in range(count)]
    return seen[0]


@pytest.mark.parametrize("op, backend", PLAIN)
def test_frozen_inputs_are_not_asked_for(op, backend):
    for frozen in range(3):
        assert wanted_by(op, backend, frozen) == [i != frozen for i in range(3)]


@pytest.mark.parametrize("op, backend", ADDERS)
def test_without_dropout_both_gradients_of_a_sum_are_one(op, backend):
    """So only one is written; and frozen parameters are not asked for."""
    for frozen in range(4):
        expected = [False, True, frozen != 2, frozen != 3]
        assert wanted_by(op, backend, frozen) == expected


X = torch.randn(4, COLS)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "weight_offset must come with a weight, got 1.0",
         lambda op: op.call(*[X] * (1 + (op.name in ADDING)), weight_offset=1.0)),
        (ValueError, "casting must be one of torch, llama, got 'gemma'",
         lambda op: op.call(*[X] * (1 + (op.name in ADDING)), casting="gemma")),
    ],
    ids=["weight_offset", "casting"],
)  # fmt: skip
@pytest.mark.parametrize("name", NORMS)
def test_wrong_options_are_refused(name, error, message, call):
    with pytest.raises(error, match=f"{name}: {message}"):
        call(tilewise.OPS[name])


@pytest.mark.parametrize(
    "error, message, residual, options",
    [
        (TypeError, "residual must be torch.float32 or torch.float32, got torch.float16",
         X.half(), {}),
        (ValueError, r"residual must have the shape of x, \[4, 24\], got \[3, 24\]", X[:3], {}),
        (RuntimeError, "residual must be on cpu, got meta", X.to("meta"), {}),
        (ValueError, "dropout_p must be from 0 to 1, got 1.5", X, {"dropout_p": 1.5}),
        (ValueError, "must be given seed or generator, got both", X,
         {"dropout_p": 0.5, "seed": 1, "generator": torch.Generator()}),
    ],
    ids=["dtype", "shape", "device", "dropout_p", "seed"],
)  # fmt: skip
@pytest.mark.parametrize("name", ADDING)
def test_wrong_sums_are_refused(name, error, message, residual, options):
    with pytest.raises(error, match=f"{name}: {message}"):
        getattr(tilewise, name)(X, residual, **options)


@pytest.mark.parametrize("op, backend", PLAIN)
def test_fp32_weights_beside_fp64_are_what_they_are_in_fp64(op, backend):
    case_or_skip(op, backend)
    if torch.float64 not in op.backends[backend].dtypes:
        pytest.skip(f"{backend} takes no float64")
    x = torch.randn(3, COLS, dtype=torch.float64, device=DEVICE)
    mixed = op.call(x, WEIGHT, BIAS, backend=backend)
    assert torch.equal(mixed, op.call(x, WEIGHT.double(), BIAS.double(), backend=backend))
