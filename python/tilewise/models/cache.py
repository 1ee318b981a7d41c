"""The keys and values of positions that a model has seen."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tilewise.ops.attention_decode import append_kv_


@dataclass
class KVCache:
    """The keys and values of one layer, for the positions seen so far, in memory taken once.

    Attributes:
        keys: `[batch, kv_heads, capacity, head_dim]`, written up to the length of each sequence.
        values: The same.
        length: How many positions have been seen, of the longest sequence.
        shortest: And of the shortest.
        lengths: And of each, `[batch]`, int32, on the device of the keys.
    """

    keys: Tensor
    values: Tensor
    length: int = field(init=False, default=0)
    shortest: int = field(init=False, default=0)
    lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = self.keys.new_zeros(self.keys.shape[0], dtype=torch.int32)

    @property
    def capacity(self) -> int:
        """How many positions there is room for."""
        return self.keys.shape[2]

    def keep(self, lengths: Tensor) -> None:
        """Forget of each sequence what lies behind its first so many positions, `[batch]`."""
        given = lengths.tolist()
        self.length, self.shortest = max(given, default=0), min(given, default=0)
        self.lengths.copy_(lengths)

    def positions(self, seq: int) -> Tensor | None:
        """Those of the next tokens, `[batch, seq]`, int64; None where they are the same for all."""
        if self.shortest == self.length:
            return None
        return self.lengths[:, None] + torch.arange(seq, device=self.lengths.device)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next positions, for which there is room in the shortest sequence at least, and
        return those of all positions so far, as views."""
        new = keys.shape[2]
        if self.shortest == self.length:
            self.keys[:, :, self.length : self.length + new] = keys
            self.values[:, :, self.length : self.length + new] = values
            self.lengths.fill_(self.length + new)
        else:
            append_kv_(self.keys, self.values, keys, values, self.lengths)
            self.lengths.add_(new).clamp_(max=self.capacity)
        self.length = min(self.length + new, self.capacity)
        self.shortest += new
        return self.seen()

    def seen(self) -> tuple[Tensor, Tensor]:
        """The keys and values of all positions so far, as views."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def make_caches(like: Tensor, count: int, *shape: int) -> list[KVCache]:
    """Take the room for `count` layers, zeros of `shape` in the dtype and on the device given."""
    return [KVCache(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(count)]
