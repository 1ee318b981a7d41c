"""Rotary position embedding as a module (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from tilewise.op import wide_dtype
from tilewise.ops.qk_norm_rotary import qk_norm_rotary
from tilewise.ops.rotary import rotary, rotary_tables


class Rotary(torch.nn.Module):
    """Turn queries and keys by their positions, with tables made once.

    The tables are not in the state_dict, and stay fp32 (fp64 in an fp64 model) whatever dtype the
    model is brought to: the cosines of late positions are all alike in bf16.

    Args:
        dim: How many dimensions of a head are turned, even; those past them are left alone.
        positions: How many positions the tables hold.
        base: The slowest pair of dimensions turns once in about `2 pi * base` positions.
        interleaved: Pair neighbours, rather than the first half with the second.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, dim: int, positions: int, *, base: float = 10000.0, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.positions, self.base, self.interleaved = dim, positions, base, interleaved
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._make_tables()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        offset: int = 0,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Turn `q` and `k`.

        Args:
            q: `[batch, heads, seq, head_dim]`, or packed, `[total, heads, head_dim]`.
            k: `[batch, kv_heads, seq, head_dim]` or `[total, kv_heads, head_dim]`.
            offset: The position of the first row.
            position_ids: `[batch, seq]`, int64; None counts from 0.
            cu_seqlens: `[batch + 1]`, int32: the beginnings and the end of packed sequences.
        """
        return rotary(
            q,
            k,
            self.cos,
            self.sin,
            interleaved=self.interleaved,
            position_ids=position_ids,
            offset=offset,
            cu_seqlens=cu_seqlens,
        )

    def extra_repr(self) -> str:
        return f"{self.dim}, positions={self.positions}, base={self.base}"

    def _make_tables(self) -> None:
        self.cos, self.sin = rotary_tables(
            self.positions, self.dim, self.base, self.cos.device, wide_dtype(self.cos.dtype)
        )

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.half()` and the like call: move, then make the tables anew."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._make_tables()
        return self


class QKNormRotary(Rotary):
    """Normalise each head of queries and keys by its root mean square, then turn it, in one pass.

    Args:
        dim: As in `Rotary`.
        positions: As in `Rotary`.
        head_dim: Width of a head, and of both weights; None is `dim`.
        eps: Added to the mean square.
        base: As in `Rotary`.
        interleaved: As in `Rotary`.
        weight_offset: Added to both weights, which begin at 1 less that.
    """

    def __init__(
        self,
        dim: int,
        positions: int,
        head_dim: int | None = None,
        eps: float = 1e-6,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        weight_offset: float = 0.0,
    ) -> None:
        super().__init__(dim, positions, base=base, interleaved=interleaved)
        self.eps, self.weight_offset = eps, weight_offset
        width = dim if head_dim is None else head_dim
        self.q_weight = torch.nn.Parameter(torch.full((width,), 1 - weight_offset))
        self.k_weight = torch.nn.Parameter(torch.full((width,), 1 - weight_offset))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        offset: int = 0,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Normalise and turn `q` and `k`; the arguments are those of `Rotary`."""
        return qk_norm_rotary(
            q,
            k,
            self.q_weight,
            self.k_weight,
            self.cos,
            self.sin,
            eps=self.eps,
            interleaved=self.interleaved,
            position_ids=position_ids,
            offset=offset,
            cu_seqlens=cu_seqlens,
            weight_offset=self.weight_offset,
        )
