"""Rotary position embedding as a module (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from tilewise.op import wide_dtype
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
        self, q: Tensor, k: Tensor, *, offset: int = 0, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Turn `q` and `k`.

        Args:
            q: `[batch, heads, seq, head_dim]`.
            k: `[batch, kv_heads, seq, head_dim]`.
            offset: The position of the first row.
            position_ids: `[batch, seq]`, int64; None counts from 0.
        """
        return rotary(
            q,
            k,
            self.cos,
            self.sin,
            interleaved=self.interleaved,
            position_ids=position_ids,
            offset=offset,
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
