"""Where the rows of heads stand, for the launchers that turn them."""

from torch import Tensor

from tilewise.kernels.cuda._shared import address


def places(position_ids: Tensor | None, cu_seqlens: Tensor | None, offset: int) -> tuple[int, ...]:
    """What a launcher takes: ids and their strides, beginnings and how many sequences, offset."""
    strides = (0, 0) if position_ids is None else position_ids.stride()
    sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    return address(position_ids), *strides, address(cu_seqlens), sequences, offset
