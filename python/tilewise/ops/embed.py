"""The input layer of BERT and GPT: rows of tables added, normalised and dropped out in one pass.

Devlin et al., 2018, https://arxiv.org/abs/1810.04805; the norm is https://arxiv.org/abs/1607.06450.
"""

from typing import Any

import torch
from torch import Generator, Tensor

from tilewise.choice import choose
from tilewise.lookup import (
    check_ids,
    check_norm,
    check_range,
    check_tables,
    in_turn,
    looked_up,
    padding_row,
)
from tilewise.op import (
    Inputs,
    Op,
    as_rows,
    backends_of,
    declare,
    differentiable_gradients,
    needs_gradient,
    register,
    takes_all,
    transforming,
    wide_dtype,
)
from tilewise.plan import planned
from tilewise.rng import counter_rows, keep_mask, seed_and_offset


@planned
def embed(
    token_ids: Tensor,
    token_table: Tensor,
    position_ids: Tensor | None = None,
    position_table: Tensor | None = None,
    segment_ids: Tensor | None = None,
    segment_table: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Look up tokens, positions and segments, add their rows, normalise the sum, drop out of it.

        x = token_table[token_ids] + position_table[position_ids] + segment_table[segment_ids]
        y = dropout((x - mean(x)) * rsqrt(var(x) + eps) * norm_weight + norm_bias)

    What is not given is left out: without a `norm_weight` y = dropout(x). Computed in fp32 (fp64
    for fp64 tables) and rounded once. Nothing is kept for the gradients but the ids and, of each
    row, the mean and 1 / sqrt(var + eps); they are the same bits every time. Dropout zeroes an
    element with probability `dropout_p` and divides the others by 1 - `dropout_p`; which, the seed
    says (`tilewise.rng.keep_mask` at the row and column of `[rows, cols]`), the same on every
    backend.

    Where an id is no row of its table, the row of y is NaN (0 where dropped out), and has no part
    in any gradient.

    Args:
        token_ids: `[..., seq]`, int64 or int32; the latter are widened first.
        token_table: `[tokens, cols]`, floating point.
        position_ids: As `token_ids`, or of a shape that broadcasts to theirs. None is 0 to seq - 1.
        position_table: `[positions, cols]`, dtype of `token_table`. None adds nothing.
        segment_ids: As `position_ids`, but None is all 0.
        segment_table: `[segments, cols]`, dtype of `token_table`. None adds nothing.
        norm_weight: `[cols]`; fp32, or the dtype of `token_table`. None does not normalise.
        norm_bias: As `norm_weight`, and of its dtype. None is all zeros.
        eps: Added to the variance. The default is that of layer_norm and GPT-2; BERT has 1e-12.
        padding_idx: A row of `token_table`, from the end if negative, that gets no gradient.
        dropout_p: Probability of dropping an element, from 0 to 1.
        seed: int64; or a tensor `[]` or, one a row, `[rows]`. None draws one on the device.
        offset: int64, counts the draws from one seed; or a tensor like that of `seed`. None is 0.
        generator: Draws the seed, where none is given. None is PyTorch's own.
        check_inputs: Raise where an id is no row of its table. Waits for the device.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[..., seq, cols]`, dtype of `token_table`, also under autocast.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, something comes without what it belongs to, seed
            and generator are both given, or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    check_tables(token_table, position_table, segment_table)
    check_ids(token_ids, token_table, position_ids, position_table, segment_ids, segment_table)
    check_norm(token_table, norm_weight, norm_bias)
    padding = padding_row(padding_idx, len(token_table))
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"embed: dropout_p must be from 0 to 1, got {dropout_p}")
    if check_inputs:
        check_range(token_ids, token_table, "token")
        check_range(position_ids, position_table, "position")
        check_range(segment_ids, segment_table, "segment")
    rows, device = token_ids.numel(), token_table.device
    if dropout_p:
        seed, offset = seed_and_offset("embed", rows, device, seed, offset, generator)
    else:
        seed, offset = 0, 0

    tensors = (
        token_ids, token_table, position_ids, position_table, segment_ids, segment_table,
        norm_weight, norm_bias,
    )  # fmt: skip
    options: dict[str, Any] = {
        "eps": eps, "padding_idx": padding_idx,
        "dropout_p": float(dropout_p), "seed": seed, "offset": offset,
    }  # fmt: skip
    chosen = choose(EMBED, backend, *tensors, **options)
    cols = token_table.shape[1]
    if chosen == "reference" or rows == 0 or cols == 0 or transforming():
        return embed_reference(*tensors, **options)

    seeds, offsets = (
        n.contiguous() if isinstance(n, Tensor) else None for n in (seed, offset)
    )  # fmt: skip
    numbers = (0 if isinstance(n, Tensor) else n for n in (seed, offset))
    positions, position_period = in_turn(position_ids, token_ids.shape, token_ids.shape[-1:])
    segments, segment_period = in_turn(segment_ids, token_ids.shape, torch.Size())
    arguments = (
        token_ids.reshape(-1).to(torch.int64).contiguous(), as_rows(token_table),
        *_pair(positions, position_table), *_pair(segments, segment_table),
        position_period, segment_period,
        *(None if t is None else t.contiguous() for t in (norm_weight, norm_bias)),
        eps, float(dropout_p), seeds, offsets, *numbers,
    )  # fmt: skip
    y: Tensor
    if needs_gradient(token_table, position_table, segment_table, norm_weight, norm_bias):
        y = _Embed.apply(*arguments, padding, chosen)  # type: ignore[no-untyped-call]
    else:
        y, _, _ = _forward(*arguments, chosen)
    return y.view(*token_ids.shape, cols)


def _pair(ids: Tensor | None, table: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return ids, None if table is None else as_rows(table)


def embed_reference(
    token_ids: Tensor,
    token_table: Tensor,
    position_ids: Tensor | None = None,
    position_table: Tensor | None = None,
    segment_ids: Tensor | None = None,
    segment_table: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int = 0,
    offset: Tensor | int = 0,
) -> Tensor:
    """The formula of `embed`, in plain PyTorch."""
    shape, device = token_ids.shape, token_ids.device
    if position_ids is None:
        position_ids = torch.arange(shape[-1] if shape else 1, device=device)
    if segment_ids is None:
        segment_ids = token_ids.new_zeros(())
    x, there = looked_up(token_ids, token_table, padding_idx)
    for ids, table in ((position_ids, position_table), (segment_ids, segment_table)):
        if table is not None:
            added, inside = looked_up(ids, table)
            x, there = x + added, there & inside
    x = x.reshape(*shape, x.shape[-1])
    if norm_weight is not None:
        centred = x - x.mean(-1, keepdim=True)
        x = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * norm_weight
        x = x if norm_bias is None else x + norm_bias
    x = torch.where(there.reshape(*shape, 1), x, torch.nan)
    if dropout_p:
        rows = token_ids.numel()
        places = counter_rows(seed, rows, device)
        kept = keep_mask(dropout_p, seed, offset, places, x.shape[-1]).expand(rows, -1)
        scale = 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)
        x = torch.where(kept.reshape(x.shape), x * scale, 0)
    return x.to(token_table.dtype)


class _Embed(torch.autograd.Function):
    """Tables, then what is added, then the norm, as `embed_forward`; the rows in turn."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *given, padding, chosen = arguments
        y: Tensor
        y, mean, rstd = _forward(*given, chosen)
        ids_and_tables, periods = given[:6], given[6:8]
        weight, bias, eps, dropout_p, seeds, offsets, seed, offset = given[8:]
        ctx.save_for_backward(*ids_and_tables, weight, bias, seeds, offsets, mean, rstd)
        ctx.periods, ctx.eps, ctx.dropout = periods, eps, (dropout_p, seed, offset)
        ctx.padding, ctx.chosen = padding, chosen
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, seeds, offsets, mean, rstd = ctx.saved_tensors
        *tables, weight, _ = tensors
        p, seed, offset = ctx.dropout
        rest = (None,) * 8
        if torch.is_grad_enabled():  # create_graph=True
            numbers = (seed if seeds is None else seeds, offset if offsets is None else offsets)
            found = differentiable_gradients(
                _flat_reference, dy, tensors, ctx.periods, ctx.eps, ctx.padding, p, *numbers
            )
            return *found[:6], None, None, *found[6:], *rest
        needed = ctx.needs_input_grad
        wanted, want_weight, want_bias = needed[1:6:2], needed[8], needed[9]
        dx, where, dropout = as_rows(dy), (*tables, *ctx.periods), (p, seeds, offsets, seed, offset)
        dweight = dbias = None
        if weight is not None or p:
            dx, dweight, dbias = _rows_backward(
                dx, *where, weight, mean, rstd, *dropout, any(wanted), want_weight, want_bias,
                ctx.chosen,
            )  # fmt: skip
        grads: list[Tensor | None] = [None] * 6
        turns = zip(tables[::2], (dy.shape[0], *ctx.periods), (ctx.padding, -1, -1), strict=True)
        for which, (ids, period, padding) in enumerate(turns):
            if wanted[which]:
                keys, order = (None, None) if ids is None else torch.sort(ids, stable=True)
                grads[2 * which + 1] = _table_backward(
                    dx, keys, order, period, which, padding, *where, ctx.chosen
                )
        dweight, dbias = dweight if want_weight else None, dbias if want_bias else None
        return *grads, None, None, dweight, dbias, *rest


def _flat_reference(*arguments: Any) -> Tensor:
    """The reference on rows, whose ids are taken in turn."""
    *tensors, periods, eps, padding, dropout_p, seed, offset = arguments
    row = torch.arange(len(tensors[0]), device=tensors[0].device)
    for i, period in zip((2, 4), periods, strict=True):
        tensors[i] = row % period if tensors[i] is None else tensors[i][row % period]
    return embed_reference(
        *tensors, eps=eps, padding_idx=None if padding < 0 else padding,
        dropout_p=dropout_p, seed=seed, offset=offset,
    )  # fmt: skip


BACKENDS = backends_of("embed", cuda=takes_all, numba=takes_all, triton=takes_all, leading=1)

_WHERE = (
    "Tensor token_ids, Tensor token_table, Tensor? position_ids, Tensor? position_table,"
    " Tensor? segment_ids, Tensor? segment_table, SymInt position_period, SymInt segment_period"
)
_DROPOUT = "float dropout_p, Tensor? seeds, Tensor? offsets, SymInt seed, SymInt offset"


def _statistics(table: Tensor, rows: int) -> Tensor:
    return table.new_empty(rows, dtype=wide_dtype(table.dtype))


_forward = register(
    f"embed_forward({_WHERE}, Tensor? norm_weight, Tensor? norm_bias, float eps, {_DROPOUT},"
    " str backend) -> (Tensor y, Tensor mean, Tensor rstd)",
    BACKENDS,
    fake=lambda ids, table, *rest: (
        table.new_empty(ids.shape[0], table.shape[1]),
        _statistics(table, 0 if rest[6] is None else ids.shape[0]),
        _statistics(table, 0 if rest[6] is None else ids.shape[0]),
    ),
)
_rows_backward = register(
    f"embed_rows_backward(Tensor dy, {_WHERE}, Tensor? norm_weight, Tensor mean, Tensor rstd,"
    f" {_DROPOUT}, bool want_dx, bool want_dweight, bool want_dbias, str backend)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    BACKENDS,
    fake=lambda dy, *rest: (
        dy.new_empty(dy.shape if rest[-4] else 0, dtype=wide_dtype(dy.dtype)),
        (dy if rest[8] is None else rest[8]).new_empty(dy.shape[1] if rest[-3] else 0),
        (dy if rest[8] is None else rest[8]).new_empty(dy.shape[1] if rest[-2] else 0),
    ),
)
_table_backward = register(
    "embed_table_backward(Tensor dx, Tensor? keys, Tensor? order, SymInt period, int which,"
    f" SymInt padding, {_WHERE}, str backend) -> Tensor",
    BACKENDS,
    fake=lambda dx, keys, order, period, which, padding, *where: torch.empty_like(
        where[2 * which + 1], memory_format=torch.contiguous_format
    ),
)


def _inputs(
    batch: int,
    seq: int,
    vocab: int,
    cols: int,
    positions: int = 0,
    segments: int = 0,
    norm: str | None = None,
    given: bool = False,
    padding: int | None = None,
    dropout: float = 0.0,
    *,
    device: str,
    dtype: torch.dtype,
) -> Inputs:
    """Tables of so many rows, 0 for none; `given`: positions and segments are by id."""

    def table(rows: int) -> Tensor | None:
        return torch.randn(rows, cols, device=device, dtype=dtype) if rows else None

    def ids(rows: int, *shape: int) -> Tensor | None:
        return torch.randint(rows, shape, device=device) if rows and given else None

    tensors = [torch.randint(vocab, (batch, seq), device=device), table(vocab)]
    tensors += [ids(positions, 1, seq), table(positions), ids(segments, batch, seq)]
    tensors += [table(segments), None, None]
    if norm is not None:
        kind = torch.float32 if norm == "float32" else dtype
        tensors[6:] = [torch.randn(cols, device=device, dtype=kind) for _ in range(2)]
    options = {"eps": 0.1, "padding_idx": padding, "dropout_p": dropout}
    return tuple(tensors), options | ({"seed": 7} if dropout else {})


def _native(
    token_ids: Tensor,
    token_table: Tensor,
    *rest: Tensor | None,
    eps: float,
    padding_idx: int | None,
    dropout_p: float,
) -> Tensor:
    function = torch.nn.functional
    *pairs, norm_weight, norm_bias = rest
    x = function.embedding(token_ids, token_table, padding_idx)
    defaults = torch.arange(token_ids.shape[-1], device=x.device), torch.zeros_like(token_ids)
    for ids, table, default in zip(pairs[::2], pairs[1::2], defaults, strict=True):
        if table is not None:
            x = x + function.embedding(default if ids is None else ids, table)
    if norm_weight is not None:
        x = function.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    return function.dropout(x, dropout_p)


_BERT = {"vocab": 30522, "cols": 768, "positions": 512, "segments": 2, "norm": "like x"}

EMBED = declare(
    Op(
        name="embed",
        call=embed,
        reference=embed_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {
                "batch": 2, "seq": 3, "vocab": 5, "cols": 8, "positions": 4, "segments": 2,
                "norm": "like x",
            },
            {"batch": 0, "seq": 3, "vocab": 5, "cols": 8},  # empty batch
            {"batch": 5, "seq": 17, "vocab": 1, "cols": 40},  # one run over all chunks
            {
                "batch": 4, "seq": 19, "vocab": 7, "cols": 127, "positions": 19, "norm": "like x",
                "padding": 3,
            },  # rows misaligned; positions by turns; a row of no gradient
            {
                "batch": 3, "seq": 9, "vocab": 400, "cols": 65, "segments": 3, "given": True,
                "dropout": 0.3,
            },  # most rows named by nobody; part of a group of four
            {
                "batch": 2, "seq": 9, "vocab": 11, "cols": 200, "positions": 50, "segments": 2,
                "norm": "float32", "given": True, "dropout": 0.2,
            },
            {
                "batch": 2, "seq": 2, "vocab": 3, "cols": 8195, "segments": 1, "norm": "like x",
                "dropout": 0.1,
            },  # wider than one block of registers
        ],
        workloads=[
            {"batch": 8, "seq": 512, **_BERT},
            {"batch": 8, "seq": 512, "vocab": 32000, "cols": 1024},
        ],
        bytes_moved=lambda ids, table, *rest, **options: (
            ids.nbytes + 2 * ids.numel() * table.shape[1] * table.itemsize
        ),
        native=_native,
    )
)  # fmt: skip
