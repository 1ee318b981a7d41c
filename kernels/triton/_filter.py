"""What is left of rows of logits after all filters, as logits or as probabilities, on the GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._options import COUNT, adjusted, filters, filters_of
from tilewise.kernels.triton._ranks import (
    DIGITS,
    ONE,
    first_of,
    is_before,
    key_of,
    load,
    masses_before,
    prefix,
    row_block,
)
from tilewise.kernels.triton._shared import launch_options


@triton.jit(do_not_specialize=["k"])
def _filter_kernel(
    out_ptr, x_ptr, k_ptr, t_ptr, p_ptr, m_ptr, vocab, x_stride, k, t, p, m,
    PROBABILITIES: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    x_ptr += row * x_stride
    t, k, p, m, can = filters_of(row, k_ptr, t_ptr, p_ptr, m_ptr, k, t, p, m)

    first, top = first_of(x_ptr, 0, vocab, BLOCK)
    least, stop = tl.cast(0, tl.uint32), tl.cast(0, tl.int32)
    there = can & (top > float("-inf"))
    if there:
        least, stop = prefix(x_ptr, vocab, first, top, t, k, p, m, DIGITS, BLOCK)
    if top == float("inf"):  # beside it nothing else is left
        least = tl.maximum(least, key_of(top) - 1)
    t = tl.where(t > 0, t, 1.0)
    whole = 1.0
    if PROBABILITIES:
        total, _ = masses_before(
            x_ptr, vocab, tl.where(there, top, 0.0), 1.0 / t, least, stop, least, stop, BLOCK
        )  # fmt: skip
        whole = total.to(tl.float32) / ONE

    for start in range(0, vocab, BLOCK):
        x, col = load(x_ptr, start, vocab, BLOCK)
        left = is_before(key_of(x), col, least, stop)
        if PROBABILITIES:
            gap = tl.where(x == top, 0.0, x - top)
            mass = tl.exp(tl.div_rn(gap, tl.zeros_like(gap) + t))
            value = tl.where(left, tl.div_rn(mass, tl.zeros_like(gap) + whole), 0.0)
            value = tl.where(there, value, float("nan"))
        else:
            value = tl.where(left, tl.div_rn(x, tl.zeros_like(x) + t), float("-inf"))
            value = tl.where(can & (top == top), value, float("nan"))
        value = value.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * vocab + col, value, mask=col < vocab)


def filter_logits_forward(logits: Tensor, *arguments) -> Tensor:
    """logits [batch, vocab], OPTIONS, whether probabilities are wanted -> [batch, vocab], of the
    dtype of the logits; probabilities in fp32."""
    rows, as_probabilities = adjusted(logits, arguments), arguments[COUNT]
    dtype = torch.float32 if as_probabilities else logits.dtype
    out = logits.new_empty(logits.shape, dtype=dtype)
    (batch, vocab), options, block = rows.shape, filters(arguments), row_block(rows.shape[1])
    _filter_kernel[(batch,)](
        out, rows, *options[:4], vocab, rows.stride(0), *options[4:],
        PROBABILITIES=as_probabilities, DIGITS=DIGITS[rows.dtype], BLOCK=block,
        **launch_options(max(block // 128, 1)),
    )  # fmt: skip
    return out
