"""Gated linear units in CUDA C++: one access a thread, of 16 bytes where the rows are aligned."""

from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import DTYPES, address, stream


def _launch_backward(
    dgate: Tensor | None, dup: Tensor | None, dy: Tensor, gate: Tensor, up: Tensor,
    activation: str, *numbers: float,
) -> None:  # fmt: skip
    """Of the first two, None is not wanted."""
    strides = [(gate.shape[1] if t is None else t.stride(0)) for t in (dgate, dup)]
    _cuda.glu_backward(
        address(dgate), address(dup), address(dy), address(gate), address(up),
        *gate.shape, *strides, dy.stride(0), gate.stride(0), up.stride(0),
        getattr(_cuda, activation), *numbers, DTYPES[gate.dtype], stream(gate),
    )  # fmt: skip


def glu_forward(
    gate: Tensor, up: Tensor, activation: str, limit: float, alpha: float, up_offset: float
) -> Tensor:
    """gate, up [rows, cols] -> y [rows, cols]."""
    y = gate.new_empty(gate.shape)
    _cuda.glu_forward(
        address(y), address(gate), address(up), *gate.shape, gate.stride(0), up.stride(0),
        getattr(_cuda, activation), limit, alpha, up_offset, DTYPES[gate.dtype], stream(gate),
    )  # fmt: skip
    return y


def glu_backward(
    dy: Tensor, gate: Tensor, up: Tensor,
    activation: str, limit: float, alpha: float, up_offset: float, want_dgate: bool, want_dup: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dy, gate, up [rows, cols] -> dgate, dup [rows, cols], or empty where not wanted."""
    dgate, dup = (gate.new_empty(gate.shape) if want else None for want in (want_dgate, want_dup))
    _launch_backward(dgate, dup, dy, gate, up, activation, limit, alpha, up_offset)
    none = gate.new_empty(0)
    return none if dgate is None else dgate, none if dup is None else dup


def glu_packed_forward(
    x: Tensor, activation: str, limit: float, alpha: float, up_offset: float
) -> Tensor:
    """x [rows, 2 cols], the gate first -> y [rows, cols]."""
    return glu_forward(*x.chunk(2, 1), activation, limit, alpha, up_offset)


def glu_packed_backward(
    dy: Tensor, x: Tensor, activation: str, limit: float, alpha: float, up_offset: float
) -> Tensor:
    """dy [rows, cols], x [rows, 2 cols] -> dx [rows, 2 cols]."""
    dx = x.new_empty(x.shape)
    _launch_backward(*dx.chunk(2, 1), dy, *x.chunk(2, 1), activation, limit, alpha, up_offset)
    return dx
