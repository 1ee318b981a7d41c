"""embed: what equality with the reference cannot say."""

import pytest
import torch
from cases import BACKENDS, DEVICE, case_or_skip
from layouts import laid_out, sliced, straight
from test_ops import ops_called

import tilewise
from tilewise.check import compare, outputs_and_grads
from tilewise.rng import keep_mask

pytestmark = pytest.mark.usefixtures("on_the_device")

F = torch.nn.functional
MINE = [p for p in BACKENDS if p.values[0].name == "embed"]
IDS = torch.tensor([[3, 0, 4], [4, 4, 1]], device=DEVICE)
SEGMENTS = torch.tensor([[0, 0, 1], [1, 0, 1]], device=DEVICE)
TABLE = torch.randn(5, 24, device=DEVICE)
POSITIONS = torch.randn(3, 24, device=DEVICE)
KINDS = torch.randn(2, 24, device=DEVICE)
WEIGHT, BIAS = torch.randn(24, device=DEVICE), torch.randn(24, device=DEVICE)


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("op, backend", MINE)
def test_one_table_is_the_embedding_of_torch_to_the_bit(op, backend):
    """Also with ids of 32 bits, of any shape, and none."""
    case_or_skip(op, backend)
    for ids in (IDS, IDS.int(), IDS[0], IDS[0, 0], IDS.expand(2, 2, 3), IDS[:0]):
        expected = F.embedding(ids, TABLE)
        assert torch.equal(tilewise.embed(ids, TABLE, backend=backend), expected)


@pytest.mark.parametrize("norm", [(WEIGHT, BIAS), (WEIGHT,)], ids=["bias", "no bias"])
@pytest.mark.parametrize("op, backend", MINE)
def test_it_is_the_layers_of_torch_one_after_the_other(op, backend, norm):
    case_or_skip(op, backend)

    def theirs(table, positions, kinds, *norm):
        x = F.embedding(IDS, table) + positions + F.embedding(SEGMENTS, kinds)
        return F.layer_norm(x, (24,), *norm, eps=1e-12)

    def ours(table, positions, kinds, *norm):
        return tilewise.embed(
            IDS, table, None, positions, SEGMENTS, kinds, *norm, eps=1e-12, backend=backend
        )

    tensors, dy = (TABLE, POSITIONS, KINDS, *norm), torch.randn(2, 3, 24)
    runs = []
    for function, dtype in (
        (ours, torch.float32),
        (theirs, torch.float32),
        (theirs, torch.float64),
    ):
        given = leaves(*(t.to(dtype) for t in tensors))
        y = function(*given)
        runs.append([y.detach(), *torch.autograd.grad(y, given, dy.to(dtype))])
    for mine, single, truth in zip(*runs, strict=True):
        error, allowed = compare(mine, single, truth)
        assert error <= allowed


@pytest.mark.parametrize("op, backend", MINE)
def test_positions_by_default_and_by_id_are_one(op, backend):
    """Turns need no sort, a row of ids is sorted alone, a matrix of them whole: the same sums."""
    case_or_skip(op, backend)
    whole = torch.arange(3).expand(2, 3)
    found = []
    for ids in (None, whole[0], whole[:1], whole, whole.int()):
        (positions,) = leaves(POSITIONS)
        y = tilewise.embed(IDS, TABLE, ids, positions, backend=backend)
        y.square().sum().backward()
        found.append((y.detach(), positions.grad))
    for y, grad in found[1:]:
        assert torch.equal(y, found[0][0])
        torch.testing.assert_close(grad, found[0][1])
    one = tilewise.embed(IDS, TABLE, torch.tensor(2), POSITIONS, backend=backend)
    assert torch.equal(one, TABLE[IDS] + POSITIONS[2])
    columns = torch.tensor([[1], [0]])  # one position for each row of ids
    y = tilewise.embed(IDS, TABLE, columns, POSITIONS, backend=backend)
    assert torch.equal(y, TABLE[IDS] + POSITIONS[columns])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("op, backend", MINE)
def test_an_id_of_no_row_is_nan_and_has_no_gradient(op, backend, normed, monkeypatch):
    """Whichever of the three it is, and however far off; nothing outside the tables is read."""
    case_or_skip(op, backend)
    ids, positions, segments = IDS.clone(), torch.arange(3).repeat(2, 1), SEGMENTS.clone()
    ids[0, 0], ids[0, 2], positions[1, 0], segments[1, 2] = -1, 2**40, 3, -(2**40)
    good = torch.tensor([[False, True, False], [False, True, False]])
    norm = (WEIGHT, BIAS) if normed else ()
    given = leaves(TABLE, POSITIONS, KINDS, *norm)

    def run(rows):
        table, places, kinds, *rest = given
        y = tilewise.embed(
            ids[rows], table, positions[rows], places, segments[rows], kinds, *rest, backend=backend
        )
        return y.detach(), torch.autograd.grad(torch.where(y.isnan(), 0, y.cos()).sum(), given)

    y, grads = run(slice(None))
    empty = torch.Tensor.new_empty  # in which NaN may lie already
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(7))
    y = run(slice(None))[0]
    assert torch.equal(y.isnan().all(-1), ~good)
    assert not y[good].isnan().any()
    clean, wanted = run(good)
    assert torch.equal(clean, y[good])
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("op, backend", MINE)
def test_a_run_across_many_chunks_is_summed_whole(op, backend):
    """Ids that end at, before and behind borders of chunks, and one that fills several."""
    case_or_skip(op, backend)
    for count in (1, 3, 16, 97):
        ids = torch.arange(130) // count
        (table,) = leaves(torch.zeros(131, 5))
        dy = torch.randint(-8, 9, (130, 5)).float()  # sums that are exact
        tilewise.embed(ids, table, backend=backend).backward(dy)
        expected = torch.zeros(131, 5, dtype=torch.float64).index_add_(0, ids, dy.double())
        assert torch.equal(table.grad, expected.float())


@pytest.mark.parametrize("op, backend", MINE)
def test_wide_tables_anywhere(op, backend):
    """Each with a stride of its own, wider than a block; by id and dropped out of."""
    size = {"batch": 2, "seq": 2, "vocab": 3, "cols": 8195, "positions": 5, "segments": 4}
    size |= {"norm": "like x", "given": True, "dropout": 0.1}
    call, _, tensors = case_or_skip(op, backend, size=size)
    torch.testing.assert_close(
        laid_out(op, call, tensors, sliced), laid_out(op, call, tensors, straight)
    )


@pytest.mark.parametrize("seed, offset", [([5, 6], 3), (5, [3, 4])], ids=["seeds", "offsets"])
@pytest.mark.parametrize("op, backend", MINE)
def test_wide_rows_with_a_seed_or_an_offset_each(op, backend, seed, offset):
    size = {"batch": 1, "seq": 2, "vocab": 3, "cols": 8195, "norm": "like x"}
    call, _, tensors = case_or_skip(op, backend, size=size)
    numbers = {n: torch.tensor(v, device=DEVICE) for n, v in (("seed", seed), ("offset", offset))}
    options = {"dropout_p": 0.3, **numbers}
    expected = outputs_and_grads(op, call, tensors, options | {"backend": "reference"})
    torch.testing.assert_close(outputs_and_grads(op, call, tensors, options), expected)


@pytest.mark.parametrize("op, backend", MINE)
def test_one_row(op, backend):
    case_or_skip(op, backend)
    (table,) = leaves(TABLE)
    tilewise.embed(torch.tensor([2], device=DEVICE), table, backend=backend).sum().backward()
    assert torch.equal(table.grad, torch.eye(5, device=DEVICE)[2, :, None].expand(5, 24))


@pytest.mark.parametrize("op, backend", MINE)
def test_padding_sends_nothing_to_its_row(op, backend):
    case_or_skip(op, backend)
    for padding in (4, -1):
        given, other = leaves(TABLE, POSITIONS), leaves(TABLE, POSITIONS)
        tilewise.embed(
            IDS, given[0], None, given[1], padding_idx=padding, backend=backend
        ).sum().backward()
        (F.embedding(IDS, other[0], padding) + other[1]).sum().backward()
        assert torch.equal(given[0].grad, other[0].grad)
        assert torch.equal(given[1].grad, other[1].grad)
        assert not given[0].grad[4].any()


@pytest.mark.parametrize("op, backend", MINE)
def test_dropout_is_the_mask_of_the_seed_in_both_directions(op, backend):
    """Bit for bit that of `keep_mask`, so of every backend; replayed by the gradients."""
    case_or_skip(op, backend)
    ids = torch.arange(6).view(2, 3)
    for seed, offset in ((11, 3), (torch.tensor(2**40 + 1), 0), (torch.arange(6) * 2**33, 1)):
        table, places = leaves(torch.rand(6, 13) + 1, torch.zeros(3, 13))
        one_a_row = isinstance(seed, torch.Tensor) and seed.ndim > 0
        rows = 0 if one_a_row else torch.arange(6, device=DEVICE)
        kept = keep_mask(0.4, seed, offset, rows, 13)
        options = {"dropout_p": 0.4, "seed": seed, "offset": offset, "backend": backend}
        y = tilewise.embed(ids, table, None, places, **options)
        assert torch.equal(y.view(6, 13) != 0, kept)
        torch.testing.assert_close(y.view(6, 13), torch.where(kept, table / 0.6, 0))
        y.sum().backward()
        assert torch.equal(table.grad != 0, kept)
        torch.testing.assert_close(
            places.grad, torch.where(kept, 1 / 0.6, 0.0).view(2, 3, 13).sum(0)
        )


@pytest.mark.parametrize("op, backend", MINE)
def test_dropping_all_leaves_nothing(op, backend):
    case_or_skip(op, backend)
    (table,) = leaves(TABLE)
    y = tilewise.embed(IDS, table, dropout_p=1.0, backend=backend)
    y.sum().backward()
    assert not y.any()
    assert not table.grad.any()


def test_without_a_seed_each_call_draws_another_mask():
    generator = torch.Generator(DEVICE).manual_seed(3)
    options = {"dropout_p": 0.5, "generator": generator}
    one, other = (tilewise.embed(IDS, TABLE, **options) for _ in range(2))
    assert not torch.equal(one == 0, other == 0)


@pytest.mark.parametrize("op, backend", MINE)
def test_what_is_frozen_costs_nothing(op, backend):
    """A gradient of rows only if a table learns, a walk of them for each, and sums for the norm."""
    case_or_skip(op, backend)
    tensors = (TABLE, POSITIONS, KINDS, WEIGHT, BIAS)
    for learning in ((0,), (1, 2), (3,), (4,), (0, 1, 2, 3, 4)):
        given = [t.clone().requires_grad_(i in learning) for i, t in enumerate(tensors)]
        y = tilewise.embed(
            IDS, given[0], None, given[1], SEGMENTS, given[2], *given[3:], backend=backend
        )
        seen = ops_called(y.sum().backward)
        names = [func.name() for func, _ in seen]
        walks = sum(i in learning for i in range(3))
        assert names.count("tilewise::embed_table_backward") == walks
        (arguments,) = [args for func, args in seen if "rows_backward" in func.name()]
        assert arguments[-4:-1] == (walks > 0, 3 in learning, 4 in learning)
        assert [t.grad is not None for t in given] == [i in learning for i in range(5)]


def test_nothing_is_saved_but_ids_tables_and_statistics():
    given = leaves(TABLE, POSITIONS, WEIGHT)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tilewise.embed(IDS, given[0], None, given[1], norm_weight=given[2], dropout_p=0.1)
    theirs = {t.data_ptr() for t in given}
    rest = [t for t in saved if t.data_ptr() not in theirs]
    assert all(t.ndim <= 1 and t.numel() <= IDS.numel() for t in rest)


HALF = WEIGHT.half()
BOTH = {"dropout_p": 0.5, "seed": 1, "generator": torch.Generator()}
META = {name: t.to("meta") for name, t in (("ids", IDS), ("kinds", KINDS), ("weight", WEIGHT))}
REFUSED = [
    # kind and dtype
    (TypeError, "token_table must be floating point, got torch.int64", (IDS, TABLE.long()), {}),
    (TypeError, "position_table must be .*, got torch.float16", (IDS, TABLE),
     {"position_table": POSITIONS.half()}),
    (TypeError, "token_ids must be torch.int64 or torch.int32, got torch.uint8",
     (IDS.byte(), TABLE), {}),
    (TypeError, "norm_weight must be .*, got torch.float16", (IDS, TABLE), {"norm_weight": HALF}),
    (TypeError, "norm_bias must have the dtype of norm_weight, torch.float16",
     (IDS, TABLE.half()), {"norm_weight": HALF, "norm_bias": BIAS}),
    # shape and range
    (ValueError, r"segment_table must be \[segments, cols\] .*, got \[0, 24\]", (IDS, TABLE),
     {"segment_table": KINDS[:0]}),
    (ValueError, "position_table must have the 24 columns of token_table, got 3", (IDS, TABLE),
     {"position_table": POSITIONS[:, :3]}),
    (ValueError, "position_ids must come with a position_table, got None", (IDS, TABLE, IDS), {}),
    (ValueError, r"segment_ids must broadcast to token_ids, \[2, 3\], got \[2\]", (IDS, TABLE),
     {"segment_ids": IDS[:, 0], "segment_table": KINDS}),
    (ValueError, "position_table must have a row for each of 3 positions, got 2", (IDS, TABLE),
     {"position_table": POSITIONS[:2]}),
    (ValueError, "norm_bias must come with a norm_weight, got None", (IDS, TABLE),
     {"norm_bias": BIAS}),
    (ValueError, r"norm_weight must be \[cols\], \[24\], got \[23\]", (IDS, TABLE),
     {"norm_weight": WEIGHT[1:]}),
    (ValueError, "padding_idx must be a row of token_table, -5 to 4, got 5", (IDS, TABLE),
     {"padding_idx": 5}),
    (ValueError, "dropout_p must be from 0 to 1, got 1.5", (IDS, TABLE), {"dropout_p": 1.5}),
    (ValueError, "must be given seed or generator, got both", (IDS, TABLE), BOTH),
    (ValueError, "token_ids must be from 0 to 3, got 4 in row 2", (IDS, TABLE[:4]),
     {"check_inputs": True}),
    (ValueError, "segment_ids must be from 0 to 0, got 1 in row 2", (IDS, TABLE),
     {"segment_ids": SEGMENTS, "segment_table": KINDS[:1], "check_inputs": True}),
    # device
    (RuntimeError, "segment_table must be on .*, got meta", (IDS, TABLE),
     {"segment_table": META["kinds"]}),
    (RuntimeError, "token_ids must be on .*, got meta", (META["ids"], TABLE), {}),
    (RuntimeError, "norm_weight must be on .*, got meta", (IDS, TABLE),
     {"norm_weight": META["weight"]}),
]  # fmt: skip


@pytest.mark.parametrize(
    "error, message, arguments, options", REFUSED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_wrong_input_is_refused(error, message, arguments, options):
    with pytest.raises(error, match="embed: .*" + message):
        tilewise.embed(*arguments, **options)
