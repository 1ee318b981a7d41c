"""Each reference transformer learns a small task, and is asked about strings it never saw."""

import pytest
import torch

from tilewise.models import (
    Classifier,
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    MaskedLanguageModel,
    generate,
    translate,
)

BLANK, MARK, FIRST, LETTERS = 0, 1, 2, 8
VOCAB = FIRST + LETTERS
HELD_OUT = 10_240
SMALL = {"dim": 64, "heads": 4}


pytestmark = pytest.mark.usefixtures("on_the_device")


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)


def words(length):
    """Every word of so many letters once, in a random order: `[8^length, length]`."""
    number = torch.randperm(LETTERS**length)[:, None]
    return FIRST + number // LETTERS ** torch.arange(length) % LETTERS


def split(strings):
    """Strings to train on, and others to ask about."""
    held_out, rest = strings[:HELD_OUT], strings[HELD_OUT:]
    assert len(held_out.unique(dim=0)) == HELD_OUT >= 10_000
    assert len(strings.unique(dim=0)) == len(strings), "the two have a string in common"
    return held_out, rest


def train(model, loss, strings, steps, rate=3e-3):
    """AdamW, its rate rising for 40 steps and then falling to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98))
    shape = lambda step: min((step + 1) / 40, 1 - step / steps)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(strings[torch.randint(len(strings), (128,))]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def right(said, truth):
    """The part of the strings that are right in every place."""
    return (said == truth).all(-1).float().mean().item()


@pytest.mark.parametrize(
    "options",
    [
        {"kv_heads": 2},
        {"norm": "layer_norm", "feed_forward": "gelu", "positions": "learned", "bias": True},
    ],
    ids=["llama", "gpt"],
)
def test_decoder_learns_what_the_prefix_determines(options):
    """Read a word and a mark, and spell the word backwards."""
    length = 6
    model = Decoder(DecoderConfig(VOCAB, 2 * length + 1, layers=2, **SMALL, **options))

    def loss(word):
        text = torch.cat([word, torch.full_like(word[:, :1], MARK), word.flip(1)], 1)
        targets = text[:, 1:].clone()
        targets[:, :length] = -100  # the word itself follows from nothing
        return model.loss(text[:, :-1], targets)

    held_out, rest = split(words(length))
    train(model, loss, rest, steps=240)
    prompt = torch.cat([held_out, torch.full_like(held_out[:, :1], MARK)], 1)
    said = torch.stack(list(generate(model, prompt, max_tokens=length, temperature=0.0)), 1)
    assert right(said, held_out.flip(1)) >= 0.95


def test_encoder_learns_what_its_neighbours_determine():
    """Read a word and its mirror image, where one of two equal letters may be hidden."""
    length = 6
    config = EncoderConfig(VOCAB, 2 * length + 2, layers=2, dropout=0.0, **SMALL)
    model = MaskedLanguageModel(Encoder(config))

    def hidden(word):
        """A palindrome and two blanks; what was hidden; and where there is no blank."""
        text = torch.cat([word, word.flip(1)], 1)
        pair, left = torch.rand(word.shape) < 0.3, torch.rand(word.shape) < 0.5
        pair[:, 0] = True  # at least one
        hide = torch.cat([pair & left, (pair & ~left).flip(1)], 1)
        padded = lambda t, value: torch.nn.functional.pad(t, (0, 2), value=value)  # noqa: E731
        tokens = padded(text.masked_fill(hide, MARK), BLANK)
        return tokens, padded(text.masked_fill(~hide, -100), -100), tokens != BLANK

    def loss(word):
        tokens, targets, mask = hidden(word)
        return model.loss(tokens, targets, mask=mask)

    held_out, rest = split(words(length))
    train(model, loss, rest, steps=240)
    tokens, targets, mask = hidden(held_out)
    with torch.no_grad():
        said = model(tokens, mask=mask).argmax(-1)
    assert right(said.masked_fill(targets < 0, -100), targets) >= 0.95


def test_classifier_learns_to_look_up():
    """Which letter comes after the mark, wherever that is."""
    length = 6
    encoder = Encoder(EncoderConfig(VOCAB, length + 1, layers=2, dropout=0.0, **SMALL))
    model = Classifier(encoder, LETTERS)

    def marked(word):
        place = torch.randint(length, (len(word), 1))
        after = torch.arange(length + 1)
        letters = word.gather(1, (after - (after > place).long()).clamp(max=length - 1))
        return letters.masked_fill(after == place, MARK), word.gather(1, place)[:, 0] - FIRST

    held_out, rest = split(words(length))
    train(model, lambda word: model.loss(*marked(word)), rest, steps=240)
    tokens, classes = marked(held_out)
    with torch.no_grad():
        said = model(tokens).argmax(-1)
    assert right(said[:, None], classes[:, None]) >= 0.95


def test_encoder_decoder_learns_to_reverse():
    """Words of four to six letters, written backwards from a start mark to an end mark."""
    length = 6
    config = EncoderDecoderConfig(VOCAB, context=length + 1, layers=1, dropout=0.0, **SMALL)
    model = EncoderDecoder(config)

    def reversed_of(word):
        """The mark, and the word backwards, and the mark, and blanks."""
        size = (word != BLANK).sum(1, keepdim=True)
        place = torch.arange(length + 1)
        letters = word.gather(1, (size - 1 - place).clamp(min=0))
        return letters.masked_fill(place == size, MARK).masked_fill(place > size, BLANK)

    def loss(word):
        answer = reversed_of(word)
        tokens = torch.cat([torch.full_like(answer[:, :1], MARK), answer[:, :-1]], 1)
        targets = answer.masked_fill(answer == BLANK, -100)
        return model.loss(word, tokens, targets, source_mask=word != BLANK)

    every = [torch.nn.functional.pad(words(n), (0, length - n), value=BLANK) for n in (4, 5, 6)]
    every = torch.cat(every)[torch.randperm(sum(map(len, every)))]
    held_out, rest = split(every)
    train(model, loss, rest, steps=320)
    start = torch.full((HELD_OUT, 1), MARK)
    options = {"source_mask": held_out != BLANK, "max_tokens": length + 1, "stop_token": MARK}
    said = torch.stack(list(translate(model, held_out, start, **options)), 1)
    answer = reversed_of(held_out)
    assert right(said.masked_fill(answer == BLANK, BLANK), answer) >= 0.95
