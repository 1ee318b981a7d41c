"""Every module against its counterpart in torch.nn."""

import copy

import pytest
import torch
from cases import DEVICE
from torch import nn
from yardsticks import assert_right

import tilewise.nn
from tilewise.check import compare, nudged

pytestmark = pytest.mark.usefixtures("on_the_device")

EPS64 = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def run(module, dtype, inputs, nudge=lambda x: x):
    """The output, the gradients of the inputs and those of the parameters."""
    module = copy.deepcopy(module).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(nudge(parameter))
    leaves = [
        nudge(x).to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x
        for x in inputs
    ]
    out = module(*leaves)
    generator = torch.Generator(DEVICE).manual_seed(1)
    out.backward(nudge(torch.randn(out.shape, generator=generator)).to(dtype))
    grads = [x.grad for x in leaves if x.is_floating_point()]
    return [out.detach(), *grads, *(p.grad for p in module.parameters())]


def hold(ours, theirs, *inputs):
    """Hold ours to the rule, with theirs in fp64 as truth and in fp32 as yardstick."""
    runs = [run(ours, torch.float32, inputs), run(theirs, torch.float64, inputs)]
    runs += [run(theirs, torch.float32, inputs)]
    runs += [run(theirs, torch.float32, inputs, nudged) for _ in range(4)]
    assert runs[0][0].shape == runs[1][0].shape
    assert_right(dict(enumerate(zip(*runs, strict=True))))


def randomised(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def same_weights(ours, theirs):
    """Round trip: what each saves, the other loads, strictly."""
    randomised(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    return ours, theirs


@pytest.mark.parametrize(
    "arguments, options",
    [
        ((33,), {}),
        ((33, 0.1), {}),
        (([4, 33],), {"eps": 1e-3}),
        ((33,), {"elementwise_affine": False}),
    ],
)
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norms(name, arguments, options):
    torch.manual_seed(0)
    modules = (getattr(room, name)(*arguments, **options) for room in (tilewise.nn, nn))
    hold(*same_weights(*modules), torch.randn(70, 4, 33))


def test_layer_norm_without_bias():
    torch.manual_seed(0)
    modules = (room.LayerNorm(33, bias=False) for room in (tilewise.nn, nn))
    hold(*same_weights(*modules), torch.randn(70, 33))


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norms_start_as_those_of_torch(name):
    ours, theirs = (getattr(room, name)(8, dtype=torch.bfloat16) for room in (tilewise.nn, nn))
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


class Sum(nn.Module):
    """What an adding norm does, of torch's own modules: both results side by side."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, residual):
        total = x + residual
        return torch.cat([self.norm(total), total], -1)


class Ours(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, residual):
        return torch.cat(self.norm(x, residual), -1)


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norms_that_add(name):
    torch.manual_seed(0)
    ours = Ours(getattr(tilewise.nn, f"Add{name}")((4, 33), 0.1, dropout_p=0.5).eval())
    theirs = Sum(getattr(nn, name)((4, 33), 0.1))
    hold(*same_weights(ours, theirs), torch.randn(70, 4, 33), torch.randn(70, 4, 33))


@pytest.mark.parametrize("name", ["AddRMSNorm", "AddLayerNorm"])
def test_norms_that_add_drop_only_in_training(name):
    module = getattr(tilewise.nn, name)(64, dropout_p=0.5)
    x, zero = torch.ones(100, 64), torch.zeros(100, 64)
    assert torch.equal(module.eval()(x, zero)[1], x)
    total = module.train()(x, zero)[1]
    assert set(total.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norms_with_an_offset_start_as_those_without(name):
    x = torch.randn(3, 16)
    plain = getattr(tilewise.nn, name)(16)
    offset = getattr(tilewise.nn, name)(16, bias=True, weight_offset=1.0)
    assert torch.equal(offset.weight, torch.zeros(16))
    assert torch.equal(offset.bias, torch.zeros(16))
    assert torch.equal(offset(x), plain(x))


@pytest.mark.parametrize("name, word", [("RMSNorm", "rms_norm"), ("LayerNorm", "layer_norm")])
def test_norms_refuse_another_shape(name, word):
    module = getattr(tilewise.nn, name)((3, 8))
    for shape in ([8], [2, 8, 3], [3, 9]):
        with pytest.raises(ValueError, match=rf"{word}: x must be \[\.\.\., 3, 8\], got \[.*\]"):
            module(torch.zeros(shape))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    torch.manual_seed(0)
    ours, theirs = (room.GELU(approximate) for room in (tilewise.nn, nn))
    assert repr(ours) == repr(theirs)
    hold(ours, theirs, 3 * torch.randn(70, 33))


@pytest.mark.parametrize("dim", [-1, None, 0, 1, -2])
@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_softmax(name, dim):
    torch.manual_seed(0)
    theirs = getattr(nn, name)(-1 if dim is None else dim)
    hold(getattr(tilewise.nn, name)(dim), theirs, 3 * torch.randn(40, 5, 33))


def test_glu_is_the_two_maps_in_one_of_torch():
    """torch.nn.GLU has up first, and then the gate, in one tensor, and only the sigmoid."""
    torch.manual_seed(0)

    class Packed(nn.Module):
        def forward(self, gate, up):
            return nn.functional.glu(torch.cat([up, gate], -1))

    hold(tilewise.nn.GLU("sigmoid"), Packed(), torch.randn(70, 33), torch.randn(70, 33))


@pytest.mark.parametrize(
    "activation, formula",
    [
        ("silu", nn.SiLU()),
        ("gelu", nn.GELU()),
        ("gelu_tanh", nn.GELU("tanh")),
        ("relu", nn.ReLU()),
    ],
)
def test_glu(activation, formula):
    torch.manual_seed(0)

    class Gate(nn.Module):
        def forward(self, gate, up):
            return formula(gate) * up

    ours = tilewise.nn.GLU(activation)
    assert repr(ours) == f"GLU('{activation}')"
    hold(ours, Gate(), torch.randn(70, 33), torch.randn(70, 33))


def test_glu_is_swiglu_unless_told():
    gate, up = torch.randn(2, 5, 8).unbind()
    assert torch.equal(tilewise.nn.GLU()(gate, up), tilewise.glu(gate, up, "silu"))


def test_glu_of_gpt_oss_packed_or_not():
    gate, up = torch.randn(2, 70, 33).unbind()
    options = {"limit": 7.0, "alpha": 1.702, "up_offset": 1.0}
    packed = tilewise.nn.PackedGLU(**options)
    assert repr(packed) == "PackedGLU('silu', limit=7.0, alpha=1.702, up_offset=1.0)"
    y = packed(4 * torch.cat([gate, up], -1))
    assert torch.equal(y, tilewise.nn.GLU(**options)(4 * gate, 4 * up))
    assert torch.equal(y, tilewise.glu(4 * gate, 4 * up, **options))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu(approximate):
    torch.manual_seed(0)
    ours = tilewise.nn.BiasGELU(33, approximate, dropout_p=0.5).eval()
    assert repr(ours) == f"BiasGELU(33, approximate={approximate!r}, dropout_p=0.5)"
    torch.nn.init.normal_(ours.bias)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(ours.bias.detach().clone())

        def forward(self, x):
            return nn.functional.gelu(x + self.bias, approximate=approximate)

    hold(ours, Plain(), torch.randn(70, 33))
    x = torch.randn(70, 33)
    dropped = ours.train()(x) == 0
    assert 0.4 < dropped.float().mean() < 0.6
    assert not torch.equal(ours(x) == 0, dropped)


def test_dropout_add_drops_in_training_only():
    module, (x, residual) = tilewise.nn.DropoutAdd(0.5), torch.randn(2, 70, 33).unbind()
    kept = module(x, residual) != residual
    assert 0.4 < kept.float().mean() < 0.6
    assert torch.equal(module.eval()(x, residual), x + residual)
    assert repr(module) == "DropoutAdd(p=0.5)"


def test_qk_norm_rotary_is_the_norm_and_then_the_turn():
    torch.manual_seed(0)
    module = tilewise.nn.QKNormRotary(8, 50, 12, weight_offset=1.0)
    assert not module.q_weight.any()
    assert set(module.state_dict()) == {"q_weight", "k_weight"}
    q, k = torch.randn(2, 3, 20, 12), torch.randn(2, 1, 20, 12)
    norm, rotary = tilewise.nn.RMSNorm(12, 1e-6), tilewise.nn.Rotary(8, 50)
    expected = rotary(norm(q), norm(k), offset=3)
    for ours, theirs in zip(module(q, k, offset=3), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(70, 9), (9,), (6, 9, 5, 3)], ids=str)
def test_cross_entropy_loss(shape, reduction):
    torch.manual_seed(0)
    options = {"reduction": reduction, "ignore_index": 3, "label_smoothing": 0.1}
    ours, theirs = (room.CrossEntropyLoss(**options) for room in (tilewise.nn, nn))
    target = torch.randint(9, (shape[0], *shape[2:]) if len(shape) > 1 else ())
    target.view(-1)[0] = 3 if len(shape) > 1 else 4
    hold(ours, theirs, torch.randn(shape), target)


@pytest.mark.parametrize("options", [{}, {"padding_idx": -2}, {"scale_grad_by_freq": True}])
def test_embedding(options):
    torch.manual_seed(0)
    ours, theirs = (room.Embedding(9, 33, **options) for room in (tilewise.nn, nn))
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, nn.Embedding)
    hold(*same_weights(ours, theirs), torch.randint(9, (6, 5)))


class Layers(nn.Module):
    """What `InputEmbedding` is, one layer after the other."""

    def __init__(self, dim):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, dim, 3), nn.Embedding(7, dim)
        self.segments, self.norm = nn.Embedding(2, dim), nn.LayerNorm(dim, 1e-12)

    def forward(self, tokens, segments):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.norm(x + self.segments(segments))


def test_input_embedding():
    class Positional(tilewise.nn.InputEmbedding):
        def forward(self, tokens, segments):
            return super().forward(tokens, segment_ids=segments)

    options = {"positions": 7, "segments": 2, "norm": True, "eps": 1e-12, "padding_idx": 3}
    pair = same_weights(Positional(9, 33, **options), Layers(33))
    hold(*pair, torch.randint(9, (6, 5)), torch.randint(2, (6, 5)))


def test_input_embedding_drops_only_in_training():
    module = tilewise.nn.InputEmbedding(9, 33, dropout=0.5)
    assert list(module.state_dict()) == ["tokens.weight"]
    tokens = torch.randint(9, (6, 5))
    dropped = module(tokens) == 0
    assert 0.3 < dropped.float().mean() < 0.7
    assert torch.equal(module.eval()(tokens), module.tokens(tokens))
    with pytest.raises(ValueError, match="embed: dropout must be from 0 to 1, got 2"):
        tilewise.nn.InputEmbedding(9, 33, dropout=2)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_by_the_position(interleaved):
    """Against complex numbers; a score knows only how far apart query and key are."""
    torch.manual_seed(0)
    module = tilewise.nn.Rotary(8, 50, base=100.0, interleaved=interleaved).double()
    q, k = torch.randn(2, 2, 3, 20, 12, dtype=torch.float64).unbind()

    def turned(x, first):
        pairs = x[..., :8].unflatten(-1, (4, 2) if interleaved else (2, 4))
        pairs = pairs if interleaved else pairs.mT
        position = torch.arange(first, first + 20, dtype=torch.float64)
        angle = torch.outer(position, 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4))
        number = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angle)
        pairs = torch.view_as_real(number)
        return torch.cat([(pairs if interleaved else pairs.mT).flatten(-2), x[..., 8:]], -1)

    for offset in (0, 30):
        ours = module(q, k, offset=offset)
        for mine, x in zip(ours, (q, k), strict=True):
            single = turned(x.float(), offset).double()  # an error of fp32, scaled down
            error, allowed = compare(mine, single, turned(x, offset), EPS64)
            assert error <= allowed
    positions = torch.stack([torch.arange(20), torch.arange(30, 50)])
    one, other = module(q, k, position_ids=positions)
    assert torch.equal(one[0], module(q, k)[0][0])
    assert torch.equal(other[1], module(q, k, offset=30)[1][1])


def test_rotary_tables_are_not_saved_and_stay_exact():
    module = tilewise.nn.Rotary(8, 50)
    first = module.cos.clone()
    assert not module.state_dict()
    assert first.dtype == torch.float32
    assert torch.equal(module.bfloat16().cos, first)
    assert torch.equal(module.half().sin.square() + module.cos.square(), module.sin**2 + first**2)
    assert module.double().cos.dtype == torch.float64
    assert torch.equal(module.float().cos, first)
    with torch.device("meta"):
        ghost = tilewise.nn.Rotary(8, 50)
    assert ghost.cos.is_meta
    assert torch.equal(ghost.to_empty(device="cpu").cos, first)


def test_rotary_refuses_an_odd_dim():
    with pytest.raises(ValueError, match="^rotary_tables: dim must be even and at least 2, got 7$"):
        tilewise.nn.Rotary(7, 50)
