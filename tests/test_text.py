"""Text to tokens and back, and the order in which training sees them."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models

from tilewise.models import text


def tokenizer_of(vocab_size: int = 270) -> Tokenizer:
    return text.train_tokenizer(["the cat sat on the mat, the cat sat é🙂漢\n" * 5], vocab_size)


def test_the_embedded_text_is_the_language_reference() -> None:
    documents = text.read_documents([])
    assert sum(map(len, documents)) > 300_000
    assert any('The "assert" statement' in document for document in documents)


def test_a_tokenizer_is_a_function_of_its_documents() -> None:
    first, second = (text.train_tokenizer(text.embedded_documents()[:9], 400) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 400


def test_every_text_comes_back_from_its_tokens() -> None:
    tokenizer = tokenizer_of()
    for written in ("", " \n\t ", "naïve 漢字 🙂\0\x7f", f"the letters {text.END} are letters"):
        tokens = text.encode(tokenizer, written)
        assert text.end_token(tokenizer) not in tokens
        assert "".join(text.stream_text(tokenizer, tokens)) == written


def test_a_stream_never_splits_a_character() -> None:
    tokenizer = text.train_tokenizer([], 257)  # a token a byte
    pieces = list(text.stream_text(tokenizer, text.encode(tokenizer, "é漢🙂!")))
    assert pieces == ["é", "漢", "🙂", "!"]


def test_a_stream_of_any_bytes_is_their_decoding() -> None:
    tokenizer = text.train_tokenizer([], 257)
    spelled = {tokenizer.id_to_token(token): token for token in range(257)}
    drawn = random.Random(3)
    for _ in range(200):
        raw = bytes(drawn.choices([0x41, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xF0, 0x9F, 0xFF], k=12))
        tokens = [spelled[text._letters()[byte]] for byte in raw]
        streamed = "".join(text.stream_text(tokenizer, tokens))
        assert streamed == raw.decode("utf-8", errors="replace") == tokenizer.decode(tokens)


def test_a_stream_ends_at_the_end_token() -> None:
    tokenizer = tokenizer_of()
    tokens = [*text.encode(tokenizer, "cat"), text.end_token(tokenizer), 65, 66]
    assert "".join(text.stream_text(tokenizer, tokens)) == "cat"


@pytest.mark.parametrize(
    "documents", [["a" * 95 + "\n" + "b" * 50], ["one\n" * 40, "two\n" * 40, "3"], ["x"], []]
)
def test_a_split_loses_nothing(documents: list[str]) -> None:
    training, validation = text.split(documents)
    assert "".join(training + validation) == "".join(documents)
    assert all(training + validation)


def test_a_split_is_at_a_line_near_nine_tenths() -> None:
    training, validation = text.split([f"line {i}\n" * 10 for i in range(30)])
    assert validation[0].startswith("line ")
    assert training[-1].endswith("\n")
    characters = [sum(map(len, part)) for part in (training, validation)]
    assert 0.89 < characters[0] / sum(characters) < 0.92


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order() -> None:
    tokens = torch.arange(10 * 16 + 5, dtype=torch.int32)
    epochs = [text.windows(tokens, context=16, seed=1, first=i, count=9) for i in (0, 9)]
    for inputs, targets in epochs:
        assert torch.equal(targets, inputs + 1)
        starts = inputs[:, 0].sort().values
        assert torch.equal(starts.diff(), torch.full((8,), 16))
    assert not torch.equal(epochs[0][0].argsort(0), epochs[1][0].argsort(0))


def test_windows_are_a_function_of_seed_and_position() -> None:
    tokens = torch.arange(100, dtype=torch.int32)
    whole, _ = text.windows(tokens, context=8, seed=5, first=0, count=30)
    text._epoch.cache_clear()
    later, _ = text.windows(tokens, context=8, seed=5, first=17, count=13)
    assert torch.equal(whole[17:], later)
    other, _ = text.windows(tokens, context=8, seed=6, first=0, count=30)
    assert not torch.equal(whole, other)


def test_the_fingerprint_sees_where_documents_end() -> None:
    assert text.fingerprint(["ab", "c"]) != text.fingerprint(["a", "bc"])
    assert text.fingerprint(["ab", "c"]) == text.fingerprint(["ab", "c"])


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size: must be at least 257, .* got 256"):
        text.train_tokenizer(["text"], 256)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer: must have the token"):
        text.end_token(Tokenizer(models.BPE()))


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        (["sat"], "the cat "),
        (["mat", "cat"], "the "),
        (["on the mat, on"], "the cat sat on the mat"),
        (["cat sat", "at"], "the c"),
        (["the cat"], ""),
        (["🙂"], "the cat sat on the mat"),
    ],
)
def test_a_stream_ends_before_a_text(stop: list[str], kept: str) -> None:
    tokenizer = tokenizer_of()
    tokens = text.encode(tokenizer, "the cat sat on the mat")
    assert "".join(text.stream_text(tokenizer, tokens, stop)) == kept


def test_what_may_begin_a_text_is_held_back_no_longer_than_it_may() -> None:
    tokenizer = text.train_tokenizer(["abc"], 257)  # a token a byte
    writer = text.text_writer(tokenizer, ["ababc"])
    next(writer)
    pieces = [writer.send(token) for token in text.encode(tokenizer, "xababab")]
    assert pieces == ["x", "", "", "", "", "ab", ""]
    with pytest.raises(StopIteration) as over:
        writer.send(*text.encode(tokenizer, "c"))
    assert over.value.value == ""

    held = text.encode(tokenizer, "xabab")
    assert list(text.stream_text(tokenizer, held, ["ababc"])) == ["x", "abab"]
    assert list(text.stream_text(tokenizer, [*held, -1, *held], ["ababc"])) == ["x", "abab"]


def test_a_text_to_stop_at_has_a_letter() -> None:
    with pytest.raises(ValueError, match="^stop: must be texts of a letter at least, got an empty"):
        list(text.stream_text(tokenizer_of(), [], [""]))
