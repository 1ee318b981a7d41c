"""Generation: the cache changes nothing, the seed decides, and the options do what they say."""

import copy

import pytest
import torch
from test_models import DECODERS, decoder, encoder_decoder, kept_of, tokens_of
from yardsticks import assert_right, nudged_copy

from tilewise.models import blocks, generate, translate

pytestmark = pytest.mark.usefixtures("on_the_device")

GREEDY = {"temperature": 0.0}


def perturbed(model):
    """Weights far enough from their small start for the tokens to depend on all of them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return model.eval()


@torch.no_grad()
def assert_same_logits(model, ours, whole):
    """`whole(model)` in fp64 is the truth, and in fp32 the yardstick."""
    models = [copy.deepcopy(model).double(), model, *(nudged_copy(model) for _ in range(4))]
    assert_right({"logits": [ours, *map(whole, models)]})


@torch.no_grad()
@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)
def test_decoder_with_a_cache(options):
    model, tokens = perturbed(decoder(**options)), tokens_of(1, 3, 20)
    cache = model.make_cache(3)
    pieces = [model(piece, cache=cache) for piece in tokens.split([7, 1, 1, 5, 6], 1)]
    assert [layer.length for layer in cache] == [20] * model.config.layers
    assert_same_logits(model, torch.cat(pieces, 1), lambda m: m(tokens))


@torch.no_grad()
@pytest.mark.parametrize("piece", [1, 2, 20], ids="by {}".format)
@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)
def test_sequences_of_different_lengths(options, piece, monkeypatch):
    """Whether a kernel reads the cache, or a mask is made of the lengths."""
    stale = torch.nan  # what is forgotten is never read
    if piece == 20:
        monkeypatch.setattr(blocks, "can_decode", lambda q, cache: False)
        piece, stale = 3, 1e3  # or has no weight
    model, lengths = perturbed(decoder(**options)), [7, 1, 12]
    tokens, start = tokens_of(1, 3, 24), torch.tensor(lengths)
    cache = model.make_cache(3)
    model(tokens[:, :12], cache=cache)
    for layer in cache:
        layer.keep(start)
        for row, length in enumerate(lengths):
            layer.keys[row, :, length:] = layer.values[row, :, length:] = stale
    rows = torch.arange(3)[:, None]
    places = start[:, None] + torch.arange(12)
    pieces = [model(p, cache=cache) for p in tokens[rows, places].split(piece, 1)]
    assert [layer.lengths.tolist() for layer in cache] == [[19, 13, 24]] * model.config.layers
    assert (cache[0].length, cache[0].shortest) == (24, 13)
    assert_same_logits(model, torch.cat(pieces, 1), lambda m: m(tokens)[rows, places])


@torch.no_grad()
def test_a_sequence_that_has_no_room_leaves_the_others_alone():
    model, tokens = perturbed(decoder()), tokens_of(1, 2, 24)
    cache, start = model.make_cache(2), torch.tensor([23, 4])
    model(tokens[:, :23], cache=cache)
    for layer in cache:
        layer.keep(start)
    for step in range(20):
        logits = model(tokens[[0, 1], [23, 4 + step]][:, None], cache=cache)
    assert_same_logits(model, logits[1], lambda m: m(tokens[1:])[0, -1:])
    assert cache[0].lengths.tolist() == [24, 24]


@torch.no_grad()
def test_encoder_decoder_with_a_cache():
    model = perturbed(encoder_decoder())
    source, tokens, mask = tokens_of(1, 3, 17), tokens_of(2, 3, 20), kept_of(17, 9, 4, seq=17)
    memory = model.encode(source, mask)
    cache = model.make_cache(memory)
    pieces = [
        model.head(model.decode(piece, memory, source_mask=mask, cache=cache))
        for piece in tokens.split([7, 1, 1, 5, 6], 1)
    ]
    whole = lambda m: m(source, tokens, source_mask=mask)  # noqa: E731
    assert_same_logits(model, torch.cat(pieces, 1), whole)


def written(stream):
    return torch.stack(list(stream), 1)


def test_greedy_is_the_argmax_of_the_whole_sequence():
    model, prompt = perturbed(decoder(kv_heads=2)), tokens_of(1, 3, 5)
    sequence = torch.cat([prompt, written(generate(model, prompt, max_tokens=12, **GREEDY))], 1)
    assert torch.equal(model(sequence).argmax(-1)[:, 4:-1], sequence[:, 5:])


def test_prompts_of_different_lengths_are_continued_as_if_alone():
    model, prompt = perturbed(decoder(kv_heads=2)), tokens_of(1, 4, 9)
    lengths = torch.tensor([3, 9, 1, 7])
    options = {
        "temperature": torch.tensor([0.0, 1.0, 2.0, 0.7]),
        "frequency_penalty": torch.tensor([0.5, 0.0, 2.0, -0.5]),
        "seed": torch.tensor([1, 2, 3, 2**40]),
    }
    together = written(
        generate(model, prompt, max_tokens=99, prompt_lengths=lengths, stop_token=5, **options)
    )
    unstopped = written(generate(model, prompt, max_tokens=99, prompt_lengths=lengths, **options))
    for i, length in enumerate(lengths.tolist()):
        mine = {name: value[i : i + 1] for name, value in options.items()}
        alone = prompt[i : i + 1, :length]
        free = written(generate(model, alone, max_tokens=99, **mine))[0]
        assert len(free) == 25 - length
        assert unstopped[i].tolist() == free.tolist() + [-1] * (24 - len(free))
        ended = written(generate(model, alone, max_tokens=99, stop_token=5, **mine))[0].tolist()
        assert together[i].tolist() == ended + [5] * (together.shape[1] - len(ended))


def test_no_prompts_have_no_continuation():
    none = torch.zeros(0, dtype=torch.int64)
    for options in ({}, {"prompt_lengths": none}, {"frequency_penalty": 0.5}):
        stream = generate(decoder(), tokens_of(1, 0, 5), max_tokens=3, **options)
        assert all(tokens.shape == (0,) for tokens in stream)


@pytest.mark.parametrize(
    ("lengths", "error", "sentence"),
    [
        ([1, 2], ValueError, r"\[batch\] = \[3\], got \[2\]"),
        ([1, 0, 2], ValueError, r"from 1 to 5, got \[1, 0, 2\]"),
        ([1, 6, 2], ValueError, r"from 1 to 5, got \[1, 6, 2\]"),
        ([1.0, 1.0, 2.0], TypeError, "torch.int64, got torch.float32"),
    ],
)
def test_lengths_that_are_none_are_refused(lengths, error, sentence):
    with pytest.raises(error, match=f"^generate: prompt_lengths must be {sentence}$"):
        generate(decoder(), tokens_of(1, 3, 5), max_tokens=2, prompt_lengths=torch.tensor(lengths))


def test_translation_is_the_argmax_of_the_whole_sequence():
    model, source = perturbed(encoder_decoder()), tokens_of(1, 3, 17)
    start, mask = torch.ones(3, 1, dtype=torch.int64), kept_of(17, 9, 4, seq=17)
    stream = translate(model, source, start, max_tokens=12, source_mask=mask)
    sequence = torch.cat([start, written(stream)], 1)
    logits = model(source, sequence, source_mask=mask)
    assert torch.equal(logits.argmax(-1)[:, :-1], sequence[:, 1:])


def test_the_seed_decides():
    model, prompt = perturbed(decoder()), tokens_of(1, 3, 5)
    runs = [written(generate(model, prompt, max_tokens=15, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    torch.manual_seed(5)
    first = written(generate(model, prompt, max_tokens=15))
    other = written(generate(model, prompt, max_tokens=15))
    torch.manual_seed(5)
    assert torch.equal(first, written(generate(model, prompt, max_tokens=15)))
    assert not torch.equal(first, other)


def test_each_step_draws_anew():
    """A model that knows nothing: the same numbers at each step would give the same token."""
    model = decoder()
    torch.nn.init.zeros_(model.head.weight)
    tokens = written(generate(model, tokens_of(1, 2, 1), max_tokens=20, seed=3))
    assert all(len(row.unique()) > 5 for row in tokens)
    assert not torch.equal(tokens[0], tokens[1])


def test_options_reach_the_sampler():
    model, prompt = perturbed(decoder()), tokens_of(1, 3, 5)
    greedy = written(generate(model, prompt, max_tokens=10, **GREEDY))
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert torch.equal(greedy, written(generate(model, prompt, max_tokens=10, **options)))
    source, start = tokens_of(1, 3, 9), prompt[:, :1]
    model = perturbed(encoder_decoder())
    greedy = written(translate(model, source, start, max_tokens=10))
    hot = {"temperature": 2.0, "seed": 1}
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        stream = translate(model, source, start, max_tokens=10, **hot | options)
        assert torch.equal(greedy, written(stream))
    assert not torch.equal(greedy, written(translate(model, source, start, max_tokens=10, **hot)))


def test_stop_token_ends_a_sequence_and_the_last_one_ends_the_stream():
    model, prompt = perturbed(decoder()), tokens_of(1, 3, 5)
    free = written(generate(model, prompt, max_tokens=15, seed=1))
    stop = int(free[1, 2])
    ended = written(generate(model, prompt, max_tokens=15, seed=1, stop_token=stop))
    for row, other in zip(free.tolist(), ended.tolist(), strict=True):
        end = row.index(stop) + 1 if stop in row else len(row)
        assert other[:end] == row[: min(end, len(other))]
        assert set(other[end:]) <= {stop}
    alone = written(generate(model, prompt[1:2], max_tokens=15, **GREEDY))[0].tolist()
    stop = alone[3]
    ended = written(generate(model, prompt[1:2], max_tokens=15, stop_token=stop, **GREEDY))[0]
    assert ended.tolist() == alone[: alone.index(stop) + 1]


def test_generation_ends_where_the_context_does():
    model = perturbed(decoder())
    for length in (1, 23, 24):
        tokens = written(generate(model, tokens_of(1, 2, length), max_tokens=100, seed=1))
        assert tokens.shape == (2, 24 - length + 1)
    assert list(generate(model, tokens_of(1, 2, 3), max_tokens=0)) == []


def test_no_dropout_while_generating_and_training_goes_on_after():
    torch.manual_seed(0)
    model, prompt = decoder(dropout=0.5).train(), tokens_of(1, 2, 3)
    runs = [written(generate(model, prompt, max_tokens=9, **GREEDY)) for _ in range(2)]
    assert torch.equal(*runs)
    assert model.training
    stream = generate(model, prompt, max_tokens=9)
    next(stream)
    stream.close()
    assert model.training


def test_tokens_can_be_trained_on():
    model, prompt = decoder(), tokens_of(1, 2, 3)
    tokens = written(generate(model, prompt, max_tokens=9, seed=1))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert model.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "prompt, options, error, sentence",
    [
        (torch.zeros(1, 25, dtype=torch.int64), {}, ValueError,
         "prompt_tokens must have at most 24 positions, the context of the model, got 25"),
        (torch.zeros(1, 0, dtype=torch.int64), {}, ValueError,
         r"prompt_tokens must be \[batch, seq\] with at least one token, got \[1, 0\]"),
        (torch.zeros(3, dtype=torch.int64), {}, ValueError,
         r"prompt_tokens must be \[batch, seq\] with at least one token, got \[3\]"),
        (torch.zeros(1, 3), {}, TypeError,
         "prompt_tokens must be torch.int64, got torch.float32"),
        (torch.zeros(1, 3, dtype=torch.int64), {"max_tokens": -1}, ValueError,
         "max_tokens must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_generate_refuses_before_the_first_token(prompt, options, error, sentence):
    with pytest.raises(error, match=f"^generate: {sentence}$"):
        generate(decoder(), prompt, **{"max_tokens": 5} | options)


def test_translate_refuses():
    model, source = encoder_decoder(), tokens_of(1, 2, 5)
    with pytest.raises(
        TypeError, match="^translate: start_tokens must be torch.int64, got torch.f"
    ):
        translate(model, source, torch.zeros(2, 1), max_tokens=3)
    stream = translate(model, tokens_of(1, 2, 25), tokens_of(2, 2, 1), max_tokens=3)
    with pytest.raises(ValueError, match="^encoder_decoder: source must have at most 24 positions"):
        next(stream)
