"""Softmax and its logarithm over the last dimension.

The running maximum and sum of rows that no block can hold are those of Milakov and Gimelshein,
2018, https://arxiv.org/abs/1805.02867.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tilewise.choice import choose
from tilewise.op import (
    Inputs,
    Op,
    Size,
    as_rows,
    autocast_dtype,
    backends_of,
    declare,
    differentiable_gradients,
    needs_gradient,
    register,
    shaped,
    takes_all,
    transforming,
    wide_dtype,
)
from tilewise.plan import planned
from tilewise.scores import check_scores, spread


@planned
def softmax(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    causal: bool = False,
    fully_masked: str = "nan",
    backend: str | None = None,
) -> Tensor:
    """Divide the exponentials of each row of scores by their sum.

        s_j = scale * x_j, or softcap * tanh(scale * x_j / softcap); then + bias_j,
              and -inf where mask or causal hides it
        y_j = exp(s_j) / sum_k exp(s_k)

    Computed in fp32 (fp64 for fp64 `x`), free of overflow, and rounded once; mask and bias are
    never widened to the size of `x`. As in PyTorch, a row is NaN throughout where it holds NaN
    among what is not hidden, or where its scores are -inf throughout or +inf somewhere. The
    gradient comes from `y` as rounded; what is hidden has none.

    Args:
        x: `[..., cols]`, floating point. Under autocast fp16 and bf16 are cast to fp32.
        bias: Added to the scores; broadcastable to `x`, dtype of `x` or fp32.
        mask: Bool, True for what counts; broadcastable to `x`.
        scale: Multiplies `x`; an inverse temperature.
        softcap: Positive bound that the scores approach, before the bias. None is no bound.
        causal: In `x` of `[..., queries, cols]` hide column j from query i unless
            j <= i + cols - queries: the last query sees all.
        fully_masked: What a row becomes whose scores are all -inf: "nan" throughout, or "zero"
            throughout, without a gradient.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[..., cols]`, dtype of `x`; fp32 for fp16 and bf16 under autocast.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or an option is wrong, or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
        NotImplementedError: If `backend` lacks an option.
    """
    return _run(SOFTMAX, x, bias, mask, scale, softcap, causal, fully_masked, backend)


def softmax_reference(x: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """The formula of `softmax`, in plain PyTorch."""
    return _reference(False, x, bias, **options)


@planned
def log_softmax(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    causal: bool = False,
    fully_masked: str = "nan",
    backend: str | None = None,
) -> Tensor:
    """Take the logarithm of `softmax`, with the digits that the softmax itself would lose.

        y_j = s_j - log(sum_k exp(s_k)), with the scores s of `softmax`

    Computed in fp32 (fp64 for fp64 `x`), free of overflow, and rounded once. Rows with NaN or
    infinities are those of PyTorch, as in `softmax`. The gradient comes from `y` as rounded.

    Args:
        x: `[..., cols]`, floating point. Under autocast fp16 and bf16 are cast to fp32.
        bias: Added to the scores; broadcastable to `x`, dtype of `x` or fp32.
        mask: Bool, True for what counts; broadcastable to `x`. The rest is -inf.
        scale: Multiplies `x`; an inverse temperature.
        softcap: Positive bound that the scores approach, before the bias. None is no bound.
        causal: In `x` of `[..., queries, cols]` hide column j from query i unless
            j <= i + cols - queries: the last query sees all.
        fully_masked: What a row becomes whose scores are all -inf: "nan" throughout; or with "zero"
            -inf throughout, the logarithm of 0, without a gradient.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[..., cols]`, dtype of `x`; fp32 for fp16 and bf16 under autocast.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or an option is wrong, or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
        NotImplementedError: If `backend` lacks an option.
    """
    return _run(LOG_SOFTMAX, x, bias, mask, scale, softcap, causal, fully_masked, backend)


def log_softmax_reference(x: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """The formula of `log_softmax`, in plain PyTorch."""
    return _reference(True, x, bias, **options)


def _reference(
    log: bool,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    causal: bool = False,
    fully_masked: str = "nan",
) -> Tensor:
    s = scale * x.to(wide_dtype(x.dtype))
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    if causal:
        seen = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device)
        seen = seen.tril(x.shape[-1] - x.shape[-2])
        mask = seen if mask is None else mask & seen
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf"))
    run, empty = (torch.log_softmax, float("-inf")) if log else (torch.softmax, 0.0)
    if fully_masked == "zero":
        nothing = (s == float("-inf")).all(-1, keepdim=True)
        return run(s.masked_fill(nothing, 0.0), -1).masked_fill(nothing, empty).to(x.dtype)
    return run(s, -1).to(x.dtype)


def _run(
    op: Op,
    x: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    causal: bool,
    fully_masked: str,
    backend: str | None,
) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"{op.name}: x must be floating point, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError(f"{op.name}: x must be [..., cols], got a scalar")
    options: dict[str, Any] = {"scale": scale}
    scored = not (bias is None and mask is None and softcap is None) or causal
    if scored or fully_masked != "nan":  # each costs the others nothing
        check_scores(op.name, x, bias, mask, softcap, causal, fully_masked)
        options |= {"mask": mask, "softcap": softcap, "causal": causal}
        options["fully_masked"] = fully_masked
    if autocast_dtype(x) is not None:
        x = x.to(wide_dtype(x.dtype))
    chosen = choose(op, backend, x, bias, **options)
    log = op is LOG_SOFTMAX
    if chosen == "reference" or x.numel() == 0 or transforming():
        return _reference(log, x, bias, **options)

    y: Tensor
    if len(options) == 1:
        if needs_gradient(x):
            y = _Softmax.apply(as_rows(x), scale, log, chosen)  # type: ignore[no-untyped-call]
        else:
            y = _forward(as_rows(x), scale, log, chosen)
        return shaped(y, x)
    bias, mask = (None if t is None else spread(t, x) for t in (bias, mask))
    heads, queries = (1, 1, *x.shape)[-3:-1]
    zero = fully_masked == "zero"
    arguments = (heads, queries, scale, softcap or 0.0, causal, zero, log, chosen)
    if needs_gradient(x, bias):
        y = _ScoredSoftmax.apply(as_rows(x), bias, mask, *arguments)  # type: ignore[no-untyped-call]
    else:
        y = _scored_forward(as_rows(x), bias, mask, *arguments)
    return shaped(y, x)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, log: bool, chosen: str) -> Tensor:
        y: Tensor = _forward(x, scale, log, chosen)
        ctx.save_for_backward(x, y)
        ctx.scale, ctx.log, ctx.chosen = scale, log, chosen
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            reference = partial(_reference, ctx.log, scale=ctx.scale)
            (dx,) = differentiable_gradients(reference, dy, (x,))
            return dx, None, None, None
        return _backward(as_rows(dy), y, ctx.scale, ctx.log, ctx.chosen), None, None, None


class _ScoredSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, mask: Tensor | None, *options: Any
    ) -> Tensor:
        y: Tensor = _scored_forward(x, bias, mask, *options)
        ctx.save_for_backward(x, bias, mask, y)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, mask, y = ctx.saved_tensors
        heads, queries, scale, softcap, causal, zero, log, chosen = ctx.options
        rest = (None,) * 9
        if torch.is_grad_enabled():  # create_graph=True
            shape = (-1, heads, queries, x.shape[1])
            reference = partial(
                _reference, log, mask=mask, scale=scale, softcap=softcap or None, causal=causal,
                fully_masked="zero" if zero else "nan",
            )  # fmt: skip
            dx, dbias = differentiable_gradients(
                lambda x, bias: reference(x.view(shape), bias).view(x.shape), dy, (x, bias)
            )
            return dx, dbias, *rest
        wanted = ctx.needs_input_grad[1]
        dx, dbias = _scored_backward(
            as_rows(dy), y, x if softcap else None, bias, mask,
            heads, queries, scale, softcap, causal, zero, log, wanted, chosen,
        )  # fmt: skip
        return dx, dbias if wanted else None, *rest


BACKENDS = backends_of("softmax", cuda=takes_all, numba=takes_all, triton=takes_all)

_forward = register(
    "softmax_forward(Tensor x, float scale, bool log, str backend) -> Tensor",
    BACKENDS,
    fake=lambda x, scale, log, backend: x.new_empty(x.shape),
)
_backward = register(
    "softmax_backward(Tensor dy, Tensor y, float scale, bool log, str backend) -> Tensor",
    BACKENDS,
    fake=lambda dy, y, scale, log, backend: y.new_empty(y.shape),
)
# The rows of x are those of a [batch, heads, queries, cols]; bias and mask have each of the first
# three sizes, or 1 in its place. A softcap of 0 is none.
_scored_forward = register(
    "scored_softmax_forward(Tensor x, Tensor? bias, Tensor? mask, SymInt heads, SymInt queries,"
    " float scale, float softcap, bool causal, bool zero, bool log, str backend) -> Tensor",
    BACKENDS,
    fake=lambda x, *options: x.new_empty(x.shape),
)
_scored_backward = register(
    "scored_softmax_backward(Tensor dy, Tensor y, Tensor? x, Tensor? bias, Tensor? mask,"
    " SymInt heads, SymInt queries, float scale, float softcap, bool causal, bool zero, bool log,"
    " bool want_dbias, str backend) -> (Tensor dx, Tensor dbias)",
    BACKENDS,
    fake=lambda dy, y, x, bias, *options: (
        y.new_empty(y.shape),
        bias.new_empty(bias.shape) if options[-2] else y.new_empty(0),
    ),
)


def _inputs(
    rows: int,
    cols: int,
    batch: int = 1,
    heads: int = 1,
    bias: str | None = None,
    mask: str | None = None,
    bias_dtype: str = "like x",
    *,
    device: str,
    dtype: torch.dtype,
    **options: Any,
) -> Inputs:
    """`bias` and `mask` name the dims along which they vary, of "bhqk"; where it varies along the
    queries, the first row of the mask hides everything."""
    full = {"b": batch, "h": heads, "q": rows, "k": cols}
    if batch * heads == 1:
        full = {"q": rows, "k": cols}
    x = torch.randn(*full.values(), device=device, dtype=dtype)
    added = None
    if bias is not None:
        size = [n if name in bias else 1 for name, n in full.items()]
        wanted = dtype if bias_dtype == "like x" else getattr(torch, bias_dtype)
        added = torch.randn(size, device=device, dtype=wanted)
    if mask is not None:
        size = [n if name in mask else 1 for name, n in full.items()]
        options["mask"] = torch.rand(size, device=device) < 0.7
        options["mask"].flatten(0, -2)[0] = "q" not in mask
    return (x, added), options


def _eager(run: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """What one writes without us, in the dtype of `x`."""

    def call(
        x: Tensor, bias: Tensor | None, mask: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        s = x if scale == 1 else scale * x
        s = s if bias is None else s + bias
        return run(s if mask is None else s.masked_fill(~mask, float("-inf")), -1)

    return call


_TINY = {"batch": 2, "heads": 3, "rows": 5, "cols": 33}

SIZES: list[Size] = [
    {"rows": 3, "cols": 8, "scale": 0.7},
    {"rows": 0, "cols": 64},  # empty batch
    {"rows": 3, "cols": 0},  # empty rows
    {"rows": 1, "cols": 1},
    {"rows": 3, "cols": 127, "scale": -1.3},  # one short of a block; the least is the peak
    {"rows": 5, "cols": 64, "scale": 0.0},  # all the same
    {"rows": 33, "cols": 1024, "scale": 2.5},  # several parts in parallel
    {"rows": 300, "cols": 16},  # several rows in a part
    {"rows": 3, "cols": 8200, "scale": 0.5},  # wider than one block of registers
    _TINY | {"mask": "bk", "scale": 0.3},  # padding
    _TINY | {"mask": "hq", "fully_masked": "zero"},  # whole rows, so one bool for all columns
    _TINY | {"rows": 20, "causal": True, "softcap": 0.7},
    _TINY | {"rows": 40, "causal": True, "mask": "qk", "fully_masked": "zero"},  # first see nothing
    _TINY | {"bias": "hqk", "bias_dtype": "float32", "softcap": 2.0},  # its sum is over the batch
    _TINY | {"bias": "bk", "mask": "bhqk", "fully_masked": "zero", "scale": -1.5},
    _TINY | {"batch": 10, "bias": "k", "causal": True},  # its sum has several parts
    {"rows": 4, "cols": 8200, "bias": "qk", "mask": "k", "softcap": 1.5, "causal": True},
]
WORKLOADS: list[Size] = [
    *({"rows": 4096, "cols": cols} for cols in (1024, 4096)),
    {"batch": 8, "heads": 12, "rows": 512, "cols": 512, "mask": "bk", "scale": 0.125},
]

SOFTMAX = declare(
    Op(
        name="softmax",
        call=softmax,
        reference=softmax_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=SIZES,
        workloads=WORKLOADS,
        bytes_moved=lambda x, bias, **options: 2 * x.nbytes,
        native=_eager(torch.softmax),
    )
)

LOG_SOFTMAX = declare(
    Op(
        name="log_softmax",
        call=log_softmax,
        reference=log_softmax_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=SIZES,
        workloads=WORKLOADS,
        bytes_moved=lambda x, bias, **options: 2 * x.nbytes,
        native=_eager(torch.log_softmax),
    )
)
