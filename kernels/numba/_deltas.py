"""What attention sums along its rows for the backward pass, and gradients of sinks made of it."""

import numpy as np

from tilewise.kernels.numba._parallel import Kernel
from tilewise.kernels.numba._rules import place_of
from tilewise.kernels.numba._simd import load, offset, pointer, real, store
from tilewise.kernels.numba._tiles import span_of


@Kernel
def sum_products(
    part, parts, delta_at, dout_at, dlse_at, out_at, kinds, sizes, strides, row_strides, ends
):
    """delta = sum(dout * out) - dlse of every row, in fp64: what is wrong there is wrong for all
    keys alike."""
    kind, wide = kinds
    batches, heads, max_q, v_dim = sizes
    dout_strides, out_strides = strides
    deltas = pointer(delta_at, wide)
    for unit in range(part * batches * heads // parts, (part + 1) * batches * heads // parts):
        batch, head = unit // heads, unit % heads
        first, rows = span_of(ends, batch, max_q)
        for i in range(rows):
            x = offset(pointer(dout_at, kind), place_of(dout_strides, batch, head, first + i))
            y = offset(pointer(out_at, kind), place_of(out_strides, batch, head, first + i))
            dot = 0.0
            for j in range(v_dim):
                dot += np.float64(load(x, j)) * np.float64(load(y, j))
            place = place_of(row_strides, batch, head, first + i)
            if dlse_at:
                dot -= np.float64(load(pointer(dlse_at, wide), place))
            store(deltas, place, real(deltas, dot))


@Kernel
def differentiate_sinks(head, dsinks_at, sinks_at, ins, kinds, sizes, row_strides, ends, factors):
    """dsink = -sum(exp(sink - lse) delta) over the rows of a head."""
    highest_at, total_at, delta_at = ins
    wide, sink_kind = kinds
    batches, max_q = sizes
    sink = np.float64(load(pointer(sinks_at, sink_kind), head))
    main, rest = factors
    found = 0.0
    for batch in range(batches):
        first, rows = span_of(ends, batch, max_q)
        for i in range(rows):
            place = place_of(row_strides, batch, head, first + i)
            total = np.float64(load(pointer(total_at, wide), place))
            if total != 0.0:
                highest = np.float64(load(pointer(highest_at, wide), place))
                delta = np.float64(load(pointer(delta_at, wide), place))
                found -= 2.0 ** (sink * main + sink * rest - highest) / total * delta
    store(pointer(dsinks_at, sink_kind), head, real(wide, found))
