"""Multi-head attention against that of torch.nn."""

import pytest
import torch
from cases import DEVICE
from test_nn import hold, same_weights
from test_ops import ops_called
from torch import nn

import tilewise.nn
from tilewise.check import compare

pytestmark = pytest.mark.usefixtures("on_the_device")

BATCH, SEQ_Q, SEQ_K, DIM, HEADS = 3, 5, 7, 12, 4


class Called(nn.Module):
    """A module called with some arguments, and its results side by side."""

    def __init__(self, module, same, options):
        super().__init__()
        self.module, self.same, self.options = module, same, options

    def forward(self, query, key=None, value=None):
        key = query if key is None else key
        value = key if value is None else value
        out, p = self.module(query, key, value, **self.options)
        return out if p is None else torch.cat([out.flatten(), p.flatten()])[None]


def inputs(same, batch_first, kdim=DIM, vdim=DIM, batch=BATCH):
    def normal(seq, dim):
        shape = (seq, dim) if batch is None else (seq, batch, dim)
        x = torch.randn(shape)
        return x.transpose(0, 1) if batch_first and batch is not None else x

    return [normal(SEQ_Q, DIM), normal(SEQ_K, kdim), normal(SEQ_K, vdim)][: 1 if same else 3]


def compared(arguments, options, same=False, batch=BATCH):
    torch.manual_seed(0)
    arguments = {"num_heads": HEADS} | arguments
    ours, theirs = (room.MultiheadAttention(DIM, **arguments).eval() for room in (tilewise.nn, nn))
    assert isinstance(ours, nn.MultiheadAttention)
    assert repr(ours) == repr(theirs)
    pair = same_weights(ours, theirs)
    tensors = inputs(same, ours.batch_first, ours.kdim, ours.vdim, batch)
    hold(*(Called(module, same, options) for module in pair), *tensors)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("same", [False, True], ids=["three inputs", "one input"])
@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True}, {"num_heads": 1},
    ],
    ids=str,
)  # fmt: skip
def test_every_argument(arguments, same, need_weights):
    compared(arguments, {"need_weights": need_weights}, same)


@pytest.mark.parametrize("bias", [False, True])
def test_keys_and_values_of_other_dims(bias):
    arguments = {"kdim": 9, "vdim": 10, "bias": bias, "batch_first": True}
    compared(arguments, {"need_weights": False})


@pytest.mark.parametrize("need_weights", [False, True])
def test_without_a_batch(need_weights):
    options = {"need_weights": need_weights, "key_padding_mask": hidden(SEQ_K)}
    compared({"batch_first": True}, options, batch=None)
    compared({}, options | {"average_attn_weights": False}, batch=None)


def hidden(*shape):
    """True at some keys, never at the first."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[..., 0] = False
    return mask.to(DEVICE)


def floats(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(6)).double().to(DEVICE)


class Rules(Called):
    """Whose floating-point masks take the dtype of the module."""

    def forward(self, *tensors):
        dtype = tensors[0].dtype
        given = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in self.options.items()
        }
        return Called(self.module, self.same, given)(*tensors)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("added", [False, True], ids=["", "added keys"])
@pytest.mark.parametrize(
    "padding, rule",
    [
        (hidden(BATCH, SEQ_K), None),
        (None, hidden(SEQ_Q, SEQ_K)),
        (None, hidden(BATCH * HEADS, SEQ_Q, SEQ_K)),
        (None, floats(SEQ_Q, SEQ_K)),
        (floats(BATCH, SEQ_K), floats(BATCH * HEADS, SEQ_Q, SEQ_K)),
        (hidden(BATCH, SEQ_K), hidden(SEQ_Q, SEQ_K)),
    ],
    ids=["padding", "mask", "mask of heads", "bias", "two biases", "both"],
)
def test_masks(padding, rule, added, need_weights):
    torch.manual_seed(0)
    arguments = {"add_bias_kv": added, "add_zero_attn": added}
    pair = (room.MultiheadAttention(DIM, HEADS, **arguments).eval() for room in (tilewise.nn, nn))
    options = {"key_padding_mask": padding, "attn_mask": rule, "need_weights": need_weights}
    options["average_attn_weights"] = not added
    pair = [Rules(module, False, options) for module in same_weights(*pair)]
    hold(*pair, *inputs(False, False))


@pytest.mark.parametrize("padding", [None, hidden(BATCH, SEQ_Q)], ids=["", "padding"])
def test_a_causal_mask_need_not_be_read(padding):
    rule = nn.Transformer.generate_square_subsequent_mask(SEQ_Q, device=DEVICE) < 0
    options = {"need_weights": False, "attn_mask": rule, "key_padding_mask": padding}
    ours, theirs = (room.MultiheadAttention(DIM, HEADS).eval() for room in (tilewise.nn, nn))
    same_weights(ours, theirs)
    (x,) = inputs(True, False)
    expected = theirs(x, x, x, **options)[0]
    told = options | {"is_causal": True, "attn_mask": torch.full_like(rule, False)}
    torch.testing.assert_close(ours(x, x, x, **told)[0], expected)
    torch.testing.assert_close(ours(x, x, x, **options)[0], expected)


def test_a_query_with_nothing_to_attend_to_averages_nothing():
    ours = tilewise.nn.MultiheadAttention(DIM, HEADS).eval()
    (x,) = inputs(True, False)
    everything = torch.ones(BATCH, SEQ_Q, dtype=torch.bool)
    for need_weights in (False, True):
        y, p = ours(x, x, x, everything, need_weights)
        assert torch.equal(y, ours.out_proj.bias.expand(SEQ_Q, BATCH, DIM))
    assert not p.any()


def test_padding_may_hold_anything_that_is_projected():
    ours = tilewise.nn.MultiheadAttention(DIM, HEADS, batch_first=True).eval()
    x, k, v = inputs(False, True)
    padding = torch.zeros(BATCH, SEQ_K, dtype=torch.bool)
    padding[:, 4:] = True
    expected = ours(x, k, v, padding, need_weights=False)[0]
    k[:, 4:], v[:, 4:] = float("nan"), float("inf")
    assert torch.equal(ours(x, k, v, padding, need_weights=False)[0], expected)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_in_training_only_by_the_generator_of_torch(need_weights):
    ours = tilewise.nn.MultiheadAttention(DIM, HEADS, dropout=0.5)
    (x,) = inputs(True, False)
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(ours(x, x, x, need_weights=need_weights))
    assert torch.equal(answers[0][0], answers[1][0])
    assert not torch.equal(answers[0][0], answers[2][0])
    if need_weights:
        kept = ours.eval()(x, x, x, average_attn_weights=False)[1]
        torch.manual_seed(1)
        p = ours.train()(x, x, x, average_attn_weights=False)[1]
        torch.testing.assert_close(p, torch.where(p != 0, 2 * kept, 0))
        assert 0.3 < float((p != 0).float().mean()) < 0.7
        torch.manual_seed(1)
        fast = ours(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(fast, answers[0][0])
    plain = ours.eval()(x, x, x, need_weights=need_weights)[0]
    assert torch.equal(plain, ours(x, x, x, need_weights=need_weights)[0])


def test_our_op_runs_unless_the_weights_are_needed():
    ours = tilewise.nn.MultiheadAttention(DIM, HEADS)
    (x,) = inputs(True, False)
    assert ops_called(lambda: ours(x, x, x, need_weights=False))
    assert not ops_called(lambda: ours(x, x, x))


def test_under_autocast():
    ours = tilewise.nn.MultiheadAttention(DIM, HEADS)
    (x,) = inputs(True, False)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        fast, (whole, p) = (ours(x, x, x, need_weights=n)[:2] for n in (False, True))
    assert fast[0].dtype == whole.dtype == p.dtype == torch.bfloat16
    truth = ours.double()(x.double(), x.double(), x.double())[0]
    error, allowed = compare(fast[0].detach(), whole.detach(), truth.detach())
    assert error <= allowed


@pytest.mark.parametrize(
    "error, message, options",
    [
        (RuntimeError, "attn_mask must be given if is_causal, got None", {"is_causal": True}),
        (ValueError, r"key_padding_mask must be \[3, 5\], got \[5, 3\]",
         {"key_padding_mask": torch.zeros(5, 3).bool()}),
        (ValueError, r"attn_mask must be \[5, 5\] or \[12, 5, 5\], got \[4, 5\]",
         {"attn_mask": torch.zeros(4, 5)}),
    ],
)  # fmt: skip
def test_wrong_masks_are_refused(error, message, options):
    ours = tilewise.nn.MultiheadAttention(DIM, HEADS)
    (x,) = inputs(True, False)
    with pytest.raises(error, match=f"^MultiheadAttention: {message}$"):
        ours(x, x, x, **options)
