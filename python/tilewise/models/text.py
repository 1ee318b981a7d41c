"""Text to tokens and back: byte-level BPE (Sennrich et al., 2016, https://arxiv.org/abs/1508.07909).

Documents are joined by the token `END`. The validation part is the last tenth of all documents
together, cut at a line; the tokenizer is trained on the rest. Training draws windows of
`context + 1` tokens in an order that is a pure function of seed and position, so a run can go on
from any position exactly.
"""

import codecs
import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = "<|end|>"  # closes a document; a prompt of nothing starts from it
SMALLEST_VOCAB = 257  # the 256 bytes and END


def embedded_documents() -> list[str]:
    """Return the language reference that ships inside Python, one document a topic.

    Raises:
        ValueError: If this Python came without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as missing:
        raise ValueError(
            "data: must be given as files, for this Python came without pydoc_data.topics"
        ) from missing
    return [text for text in topics.values() if text]


def read_documents(files: Sequence[str | Path]) -> list[str]:
    """Read text files, one document each; no file at all means `embedded_documents()`.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is empty or is not UTF-8 text.
    """
    if not files:
        return embedded_documents()
    return [_read(Path(file)) for file in files]


def _read(file: Path) -> str:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: must be UTF-8 text, got byte {raw[error.start]:#04x} at {error.start} in {file}"
        ) from None
    if "\0" in text:
        raise ValueError(f"data: must be text, got a NUL byte at {raw.index(0)} in {file}")
    if not text.strip():
        raise ValueError(f"data: must hold text, got nothing in {file}")
    return text.replace("\r\n", "\n")


def fingerprint(documents: Sequence[str]) -> str:
    """Return the SHA-256 of the documents and of where each one ends."""
    digest = hashlib.sha256()
    for document in documents:
        encoded = document.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cut the documents in two: what to train on, and the last tenth to validate with."""
    left = sum(map(len, documents)) * 9 // 10
    training, validation = [], []
    for document in documents:
        if left >= len(document):
            training.append(document)
        elif left > 0:
            line = document.find("\n", left) + 1
            cut = line if 0 < line < len(document) else left
            training.append(document[:cut])
            validation.append(document[cut:])
        else:
            validation.append(document)
        left -= len(document)
    return training, validation


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE; the same documents always give the same one.

    Args:
        documents: What to learn the merges from.
        vocab_size: At least 257. A short text may give fewer tokens.

    Raises:
        ValueError: If `vocab_size` is too small.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size: must be at least {SMALLEST_VOCAB}, one token a byte and the end, "
            f"got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of `text`, in which the letters of `END` are letters like others."""
    tokenizer.encode_special_tokens = True
    tokens: list[int] = tokenizer.encode(text).ids
    return tokens


def end_token(tokenizer: Tokenizer) -> int:
    """Return the token that closes a document."""
    token: int | None = tokenizer.token_to_id(END)
    if token is None:
        raise ValueError(f"tokenizer: must have the token {END}, got none")
    return token


@dataclass(frozen=True)
class Corpus:
    """Documents as tokens.

    Attributes:
        training, validation: `[tokens]` int32, every document closed by `END`.
        fingerprint: Of the documents.
    """

    training: Tensor
    validation: Tensor
    fingerprint: str


def encode_corpus(tokenizer: Tokenizer, documents: Sequence[str], context: int) -> Corpus:
    """Turn documents into the tokens of both parts.

    Raises:
        ValueError: If a part is too short for one window of `context + 1` tokens.
    """
    training, validation = (_encode_part(tokenizer, part) for part in split(documents))
    if min(len(training), len(validation)) <= context:
        raise ValueError(
            f"data: must give more than {context} tokens, the context, to train on and to validate "
            f"with, got {len(training)} and {len(validation)}"
        )
    return Corpus(training, validation, fingerprint(documents))


def _encode_part(tokenizer: Tokenizer, documents: Sequence[str]) -> Tensor:
    end = end_token(tokenizer)
    tokens: list[int] = []
    for document in documents:
        tokens += encode(tokenizer, document)
        tokens.append(end)
    return torch.tensor(tokens, dtype=torch.int32)


def windows(
    tokens: Tensor, *, context: int, seed: int, first: int, count: int
) -> tuple[Tensor, Tensor]:
    """Draw the windows number `first` to `first + count` of an endless shuffled order.

    Each epoch lays windows of `context` tokens side by side from a start of its own, and visits
    them in an order of its own.

    Args:
        tokens: `[tokens]`, more than `context`.
        context: Tokens in a window.
        seed: Of the order.
        first: How many windows were drawn before.
        count: How many to draw.

    Returns:
        Inputs and targets, both `[count, context]` int64, the targets one token ahead.
    """
    laid = max(1, (len(tokens) - 1) // context - 1)
    room = len(tokens) - 1 - laid * context
    starts = []
    for number in range(first, first + count):
        shift, order = _epoch(seed, number // laid, laid, room)
        starts.append(shift + int(order[number % laid]) * context)
    return pick(tokens, starts, context)


def pick(tokens: Tensor, starts: Sequence[int], context: int) -> tuple[Tensor, Tensor]:
    """Return the windows that begin at `starts`: inputs and targets, as `windows` does."""
    picked = torch.stack([tokens[start : start + context + 1] for start in starts]).long()
    return picked[:, :-1], picked[:, 1:]


@lru_cache(maxsize=8)
def _epoch(seed: int, epoch: int, laid: int, room: int) -> tuple[int, Tensor]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    shift = int(torch.randint(room + 1, (), generator=generator))
    return shift, torch.randperm(laid, generator=generator)


def stream_text(
    tokenizer: Tokenizer, tokens: Iterable[int], stop: Sequence[str] = ()
) -> Iterator[str]:
    """Turn tokens into text as they come, never splitting a character between two pieces.

    Joined, the pieces are the UTF-8 decoding of all bytes, U+FFFD in place of broken characters.
    The stream ends at `END`, or before the first of the texts in `stop`; what may be the beginning
    of one is held back until it is known not to be.
    """
    writer = text_writer(tokenizer, stop)
    next(writer)
    for token in tokens:
        try:
            if piece := writer.send(token):
                yield piece
        except StopIteration as over:
            if over.value:
                yield over.value
            return
    if piece := last_piece(writer):
        yield piece


def text_writer(tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Generator[str, int | None, str]:
    """`stream_text` the other way around: takes a token by `send`, and gives the text that is sure.

    It returns, with the last of the text, at `END`, before a text in `stop`, and when sent None or
    the -1 of a draw from nothing.
    """
    if "" in stop:
        raise ValueError("stop: must be texts of a letter at least, got an empty one")
    end = end_token(tokenizer)
    spelled = {letter: byte for byte, letter in enumerate(_letters())}
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held, piece = "", ""
    while True:
        token = yield piece
        is_last = token is None or token in (end, -1)
        letters = "" if token is None or is_last else _letters_of(tokenizer, token)
        held += decoder.decode(bytes(spelled[letter] for letter in letters), final=is_last)
        places = [place for text in stop if (place := held.find(text)) >= 0]
        if places:
            return held[: min(places)]
        if is_last:
            return held
        sure = len(held) - _begun(held, stop)
        piece, held = held[:sure], held[sure:]


def _letters_of(tokenizer: Tokenizer, token: int) -> str:
    """None of a token that the model alone knows, whose vocabulary may be larger."""
    return tokenizer.id_to_token(token) or ""


def last_piece(writer: Generator[str, int | None, str]) -> str:
    """What a `text_writer` has held back."""
    try:
        writer.send(None)
    except StopIteration as over:
        piece: str = over.value
        return piece
    raise AssertionError("a writer ends when sent None")


def _begun(held: str, stop: Sequence[str]) -> int:
    """How long the end of `held` is that may be the beginning of one of the texts."""
    lengths = (n for text in stop for n in range(len(text) - 1, 0, -1) if held.endswith(text[:n]))
    return max(lengths, default=0)


@lru_cache(maxsize=1)
def _letters() -> tuple[str, ...]:
    """The letter that stands for each byte in a byte-level vocabulary.

    Visible Latin-1 characters stand for themselves, the 68 others for U+0100 and onwards.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in visible else next(others)) for byte in range(256))
