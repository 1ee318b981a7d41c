"""What `embed` is given, below the op: ids, the rows that they name, and what is refused."""

import torch
from torch import Tensor

from tilewise.op import wide_dtype


def in_turn(
    ids: Tensor | None, shape: torch.Size, default: torch.Size
) -> tuple[Tensor | None, int]:
    """Ids that rows take in turn, from the first again after the last, and how many they are."""
    if ids is None:
        return None, default.numel()
    while ids.ndim and ids.shape[0] == 1:
        ids = ids[0]
    if ids.shape != shape[len(shape) - ids.ndim :]:
        ids = ids.expand(shape)
    return ids.reshape(-1).to(torch.int64).contiguous(), ids.numel()


def looked_up(ids: Tensor, table: Tensor, padding: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows of the table, some row where there is none, and whether there is."""
    rows = len(table)
    wide = table.to(wide_dtype(table.dtype))
    found = torch.nn.functional.embedding(ids.long().clamp(0, rows - 1), wide, padding)
    return found, (ids >= 0) & (ids < rows)


# --- What is refused.


def check_tables(token_table: Tensor, *others: Tensor | None) -> None:
    """Refuse tables that do not fit together."""
    if not token_table.is_floating_point():
        raise TypeError(f"embed: token_table must be floating point, got {token_table.dtype}")
    tables = zip(("token", "position", "segment"), (token_table, *others), strict=True)
    for word, table in tables:
        if table is None:
            continue
        if table.ndim != 2 or len(table) == 0:
            raise ValueError(
                f"embed: {word}_table must be [{word}s, cols] with at least one row, "
                f"got {list(table.shape)}"
            )
        if table.dtype != token_table.dtype:
            raise TypeError(
                f"embed: {word}_table must be {token_table.dtype}, as token_table, "
                f"got {table.dtype}"
            )
        if table.shape[1] != token_table.shape[1]:
            raise ValueError(
                f"embed: {word}_table must have the {token_table.shape[1]} columns of "
                f"token_table, got {table.shape[1]}"
            )
        if table.device != token_table.device:
            raise RuntimeError(
                f"embed: {word}_table must be on {token_table.device}, got {table.device}"
            )


def check_ids(token_ids: Tensor, token_table: Tensor, *others: Tensor | None) -> None:
    """Refuse ids without a table, or of a wrong dtype or shape."""
    position_ids, position_table, segment_ids, segment_table = others
    pairs = (
        ("token", token_ids, token_table),
        ("position", position_ids, position_table),
        ("segment", segment_ids, segment_table),
    )
    for word, ids, table in pairs:
        if ids is None:
            continue
        if table is None:
            raise ValueError(f"embed: {word}_ids must come with a {word}_table, got None")
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"embed: {word}_ids must be torch.int64 or torch.int32, got {ids.dtype}"
            )
        if ids.device != token_table.device:
            raise RuntimeError(
                f"embed: {word}_ids must be on {token_table.device}, got {ids.device}"
            )
        fits = ids.ndim <= token_ids.ndim and all(
            size in (1, whole)
            for size, whole in zip(reversed(ids.shape), reversed(token_ids.shape), strict=False)
        )
        if not fits:
            raise ValueError(
                f"embed: {word}_ids must broadcast to token_ids, {list(token_ids.shape)}, "
                f"got {list(ids.shape)}"
            )
    seq = token_ids.shape[-1] if token_ids.ndim else 1
    if position_table is not None and position_ids is None and seq > len(position_table):
        raise ValueError(
            f"embed: position_table must have a row for each of {seq} positions, "
            f"got {len(position_table)}"
        )


def check_norm(token_table: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Refuse a weight or a bias of the norm that does not fit the tables."""
    if weight is None:
        if bias is not None:
            raise ValueError("embed: norm_bias must come with a norm_weight, got None")
        return
    for name, tensor in (("norm_weight", weight), ("norm_bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in (token_table.dtype, torch.float32):
            raise TypeError(
                f"embed: {name} must be {token_table.dtype} or torch.float32, got {tensor.dtype}"
            )
        if tensor.shape != token_table.shape[1:]:
            raise ValueError(
                f"embed: {name} must be [cols], {list(token_table.shape[1:])}, "
                f"got {list(tensor.shape)}"
            )
        if tensor.device != token_table.device:
            raise RuntimeError(
                f"embed: {name} must be on {token_table.device}, got {tensor.device}"
            )
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(
            f"embed: norm_bias must have the dtype of norm_weight, {weight.dtype}, got {bias.dtype}"
        )


def padding_row(padding_idx: int | None, tokens: int) -> int:
    """The row that gets no gradient, -1 if none."""
    if padding_idx is None:
        return -1
    if not -tokens <= padding_idx < tokens:
        raise ValueError(
            f"embed: padding_idx must be a row of token_table, {-tokens} to {tokens - 1}, "
            f"got {padding_idx}"
        )
    return padding_idx % tokens


def check_range(ids: Tensor | None, table: Tensor | None, word: str) -> None:
    """Refuse ids that are no row of their table; waits for the device."""
    if ids is None or table is None:
        return
    wrong = ((ids < 0) | (ids >= len(table))).flatten().nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"embed: {word}_ids must be from 0 to {len(table) - 1}, "
            f"got {int(ids.flatten()[row])} in row {row}"
        )
