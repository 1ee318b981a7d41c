"""The reference transformers against their naive twins, and against the references of the ops."""

import copy
from collections import Counter

import pytest
import torch
from cases import DEVICE
from test_ops import ops_called
from torch.nn.functional import cross_entropy
from twins import NAMES, NaiveBert, NaiveDecoder, NaiveTransformer, weights_of
from yardsticks import assert_right, by_matrix, nudged_copy

import tilewise
from tilewise.models import (
    Classifier,
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    MaskedLanguageModel,
)

pytestmark = pytest.mark.usefixtures("on_the_device")

VOCAB, BATCH, SEQ = 37, 3, 20


def tokens_of(seed, *shape, high=VOCAB):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(high, shape, generator=generator, device="cpu").to(DEVICE)


def kept_of(*lengths, seq):
    """A padding mask, as True where there is a token."""
    return torch.arange(seq, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]


def twins(model, naive, *names):
    """Give the model weights that are nowhere 0 or 1, and its twin the same.

    Returns:
        Which weights of a twin are which of the model, and the twins: in fp64, the truth; in fp32,
        and again in fp32 with weights a rounding away, the yardsticks.
    """
    table = {ours: theirs for name in names for ours, theirs in NAMES[name].items()}
    parts = {n: weights_of(n, naive, table) for n, _ in model.named_parameters()}
    used = {id(part) for group in parts.values() for part in group}
    assert used == {id(p) for p in naive.parameters()}, "a weight of the twin is not accounted for"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += 0.1 * torch.randn_like(weight)
            for part, own in zip(parts[name], weight.chunk(len(parts[name])), strict=True):
                part.copy_(own)
    exact = copy.deepcopy(naive).double()
    return table, exact, naive, *(nudged_copy(naive) for _ in range(4))


def hold(model, twin, run_model, run_twin):
    """Hold outputs, and the gradients of their last, a loss, to the rule of tilewise.check."""
    table, *naives = twin
    outputs = [run_model(), *map(run_twin, naives)]
    for group in outputs:
        group[-1].backward()
    rows = {f"out{i}": group for i, group in enumerate(zip(*outputs, strict=True))}
    names = [name for name, _ in model.named_parameters()]
    grads = [by_matrix({name: weight.grad for name, weight in model.named_parameters()})]
    for naive in naives:
        parts = {name: weights_of(name, naive, table) for name in names}
        grads.append(by_matrix({n: torch.cat([p.grad for p in ps]) for n, ps in parts.items()}))
    assert_right(rows | {name: [group[name] for group in grads] for name in grads[0]})


def decoder(**options):
    size = {"vocab_size": VOCAB, "context": 24, "dim": 32, "layers": 2, "heads": 4}
    return Decoder(DecoderConfig(**size | options))


LLAMA = {}
GPT = {"positions": "learned", "norm": "layer_norm", "feed_forward": "gelu", "bias": True}
DECODERS = {
    "llama": LLAMA,
    "llama, grouped heads, own head": {"kv_heads": 2, "tied": False},
    "llama, one kv head, another base": {"kv_heads": 1, "rotary_base": 100.0, "hidden": 40},
    "llama with biases": {"bias": True, "norm": "layer_norm"},
    "gpt": GPT,
    "gpt, own head, no biases": GPT | {"tied": False, "bias": False},
    "learned positions, grouped heads": {"positions": "learned", "kv_heads": 2},
    "rotary, gelu": {"feed_forward": "gelu", "norm": "layer_norm"},
    "relu, one layer": {"feed_forward": "relu", "layers": 1, "positions": "learned"},
}


@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)
def test_decoder_is_its_twin(options):
    torch.manual_seed(0)
    model = decoder(**options)
    hidden = model.blocks[0].feed_forward.up.out_features
    twin = twins(model, NaiveDecoder(model.config, hidden), "decoder")
    tokens, targets = tokens_of(1, BATCH, SEQ), tokens_of(2, BATCH, SEQ)
    targets[0, :5] = -100

    def run(naive):
        logits = naive(tokens)
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten())

    hold(model, twin, lambda: (model(tokens), model.loss(tokens, targets)), run)


@pytest.mark.parametrize("segmented", [False, True], ids=["one segment", "two segments"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("head", ["words", "sorts"])
def test_encoder_is_its_twin(head, padded, segmented):
    torch.manual_seed(0)
    model = MaskedLanguageModel(encoder()) if head == "words" else Classifier(encoder(), 5)
    naive = NaiveBert(model.encoder.config, 5)
    for unused in ("pooler", "classes") if head == "words" else ("before_words", "words_norm"):
        delattr(naive, unused)
    if head == "sorts":
        del naive.words_bias
    twin = twins(model, naive, "encoder", head)
    tokens = tokens_of(1, BATCH, SEQ)
    kept = kept_of(20, 13, 7, seq=SEQ) if padded else torch.ones(BATCH, SEQ, dtype=torch.bool)
    segments = tokens_of(3, BATCH, SEQ, high=2) if segmented else torch.zeros_like(tokens)
    targets = tokens_of(2, BATCH, SEQ).masked_fill(~kept, -100)
    targets = targets if head == "words" else tokens_of(2, BATCH, high=5)

    def run(naive):
        logits = getattr(naive, head)(tokens, segments, kept)
        flat = logits.flatten(0, 1) if head == "words" else logits
        return logits, cross_entropy(flat, targets.flatten())

    options = {"mask": kept if padded else None, "segments": segments if segmented else None}
    hold(
        model, twin, lambda: (model(tokens, **options), model.loss(tokens, targets, **options)), run
    )


def encoder(**options):
    size = {"vocab_size": VOCAB, "context": 24, "dim": 32, "layers": 2, "heads": 4, "dropout": 0.0}
    return Encoder(EncoderConfig(**size | options))


TRANSFORMERS = {
    "shared": {},
    "of two vocabularies": {"shared": False, "source_vocab_size": 29},
    "three layers, one head": {"layers": 3, "heads": 1, "hidden": 50, "shared": False},
}


def encoder_decoder(**options):
    size = {"vocab_size": VOCAB, "context": 24, "dim": 32, "layers": 2, "heads": 4, "dropout": 0.0}
    return EncoderDecoder(EncoderDecoderConfig(**size | options))


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("options", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_encoder_decoder_is_its_twin(options, padded):
    torch.manual_seed(0)
    model = encoder_decoder(**options)
    names = ["encoder_decoder", "shared"] if model.config.shared else ["encoder_decoder"]
    twin = twins(model, NaiveTransformer(model.config), *names)
    source, tokens = tokens_of(1, BATCH, 17, high=29), tokens_of(2, BATCH, SEQ)
    masks = kept_of(17, 9, 4, seq=17), kept_of(20, 11, 1, seq=SEQ)
    if not padded:
        masks = torch.ones_like(masks[0]), torch.ones_like(masks[1])
    targets = tokens_of(3, BATCH, SEQ).masked_fill(~masks[1], -100)

    def run(naive):
        logits = naive(source, tokens, *masks)
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten())

    given = dict(zip(("source_mask", "mask"), masks, strict=True)) if padded else {}
    hold(
        model,
        twin,
        lambda: (model(source, tokens, **given), model.loss(source, tokens, targets, **given)),
        run,
    )


@pytest.mark.parametrize("way", ["bfloat16", "half", "autocast"])
@pytest.mark.parametrize("options", [LLAMA | {"kv_heads": 2}, GPT], ids=["llama", "gpt"])
def test_decoder_in_lower_precision(options, way):
    """The yardstick is the same model on the references: that it is wired right is shown above."""
    torch.manual_seed(0)
    model, tokens = decoder(**options), tokens_of(1, BATCH, SEQ)
    model = model if way == "autocast" else getattr(model, way)()

    def run(model, *names, autocast=way == "autocast"):
        lower = torch.autocast(DEVICE, torch.bfloat16, enabled=autocast)
        with tilewise.backend(*names), lower:
            logits = model(tokens)
            loss = cross_entropy(logits.double().flatten(0, 1), tokens.flatten())
        loss.backward()
        grads = {name: weight.grad for name, weight in model.named_parameters()}
        return {"logits": logits} | by_matrix(grads)

    exact = copy.deepcopy(model).double()
    lower = torch.bfloat16 if way == "autocast" else None
    plain = [copy.deepcopy(model), *(nudged_copy(model, lower) for _ in range(4))]
    runs = [run(model), run(exact, "reference", autocast=False)]
    runs += [run(each, "reference") for each in plain]
    assert runs[0]["logits"].dtype == (torch.float16 if way == "half" else torch.bfloat16)
    assert_right({name: [group[name] for group in runs] for name in runs[0]})


# How to build each model, how many sequences it reads, and how often it calls each of our ops.
MODELS = {
    "llama": (lambda **options: decoder(kv_heads=2, **options), 1, {
        "embed": 1, "rms_norm": 1, "add_rms_norm": 4, "rotary": 2, "attention": 2, "glu": 2,
        "linear_cross_entropy": 1,
    }),
    "gpt": (lambda **options: decoder(**GPT, **options), 1, {
        "embed": 1, "layer_norm": 1, "add_layer_norm": 4, "attention": 2, "gelu": 2,
        "linear_cross_entropy": 1,
    }),
    "bert": (lambda **options: MaskedLanguageModel(encoder(**options)), 1, {
        "embed": 1, "layer_norm": 1, "add_layer_norm": 4, "attention": 2, "gelu": 3,
        "linear_cross_entropy": 1,
    }),
    "classifier": (lambda **options: Classifier(encoder(**options), VOCAB), 1, {
        "embed": 1, "add_layer_norm": 4, "attention": 2, "gelu": 2, "cross_entropy": 1,
    }),
    "2017": (encoder_decoder, 2, {
        "embed": 2, "add_layer_norm": 10, "attention": 6, "linear_cross_entropy": 1,
    }),
}  # fmt: skip


def loss_arguments(model, sequences, seed=0):
    """Sequences to read, and targets."""
    targets = tokens_of(seed + sequences, BATCH, 12)
    targets = targets[:, 0] if isinstance(model, Classifier) else targets
    return *[tokens_of(seed + i, BATCH, 12) for i in range(sequences)], targets


@pytest.mark.parametrize("build, sequences, ops", MODELS.values(), ids=MODELS)
def test_loss_curve_is_that_of_the_reference(build, sequences, ops):
    """With dropout, whose masks are the same on every backend and in every dtype."""
    torch.manual_seed(0)
    model = build(dropout=0.2).train()
    called = Counter()

    def run(model, *names):
        optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []

        def step(number):
            losses.append(model.loss(*loss_arguments(model, sequences, 10 * number)))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()

        torch.manual_seed(1)
        with tilewise.backend(*names):
            seen = ops_called(lambda: step(0))
            for number in range(1, 4):
                step(number)
        called.update(str(function).split(".")[1] for function, _ in seen)
        return {"losses": torch.stack(losses)}

    copies = [copy.deepcopy(model).double(), copy.deepcopy(model)]
    copies += [nudged_copy(model) for _ in range(4)]
    runs = [run(each, "reference") for each in copies]
    assert not called
    runs.insert(0, run(model))
    assert {op: called[f"{op}_forward"] for op in ops} == ops
    assert_right({name: [group[name] for group in runs] for name in runs[0]})


@pytest.mark.parametrize("build, sequences, ops", MODELS.values(), ids=MODELS)
def test_every_dropout_of_ours_is_that_of_training(build, sequences, ops):
    model = build(dropout=0.5)
    for expected, mode in ((0.5, model.train), (0.0, model.eval)):
        mode()
        seen = ops_called(lambda: model.loss(*loss_arguments(model, sequences)))
        given = [
            dict(zip((a.name for a in function._schema.arguments), arguments, strict=True))
            for function, arguments in seen
            if "attention" not in function.name()  # of which the models drop nothing
        ]
        rates = [each["dropout_p"] for each in given if "dropout_p" in each]
        dropping = sum(count for op, count in ops.items() if op == "embed" or "add_" in op)
        assert rates == [expected] * dropping
