"""`tilewise generate`: a prompt, and what a trained decoder makes of it, as it is drawn."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from io import TextIOWrapper
from typing import Any

import torch
from torch import Tensor

import tilewise
from tilewise.choice import BACKENDS
from tilewise.cli import Refusal
from tilewise.models.checkpoint import Checkpoint, load_checkpoint
from tilewise.models.generation import generate
from tilewise.models.requests import bias_of
from tilewise.models.settings import require_device
from tilewise.models.text import encode, end_token, stream_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="folder that `tilewise train` wrote"
    )
    parser.add_argument(
        "--prompt",
        default="",
        metavar="TEXT",
        help="what the text begins with; nothing lets the decoder begin a document of its own",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=200,
        metavar="N",
        help="tokens to draw, at most; fewer if the document ends or the context is full "
        "(default: %(default)s)",
    )
    _add_drawing(parser)
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text before which to end; again for another one",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--backend", choices=BACKENDS, help="preferred for every op that it can serve"
    )


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    """The options of `tilewise.sample`."""
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="divides the logits; 0 takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="N", help="draw only from the N likeliest tokens"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="X", help="draw only from the likeliest that make up X"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="X", help="only those X times as likely as the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="divides logits above 0 of tokens that are there already, and multiplies the others",
    )
    parser.add_argument(
        "--presence-penalty", type=float, metavar="X", help="taken off their logits"
    )
    parser.add_argument(
        "--frequency-penalty",
        type=float,
        metavar="X",
        help="taken off their logits as often as they are there",
    )
    parser.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        type=_token_and_bias,
        metavar="TOKEN=X",
        help="added to the logit of a token, by its number; -inf forbids it; again for another one",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same text")


def run(args: argparse.Namespace) -> int:
    """Write the prompt and its continuation to standard output."""
    with nullcontext() if args.backend is None else tilewise.backend(args.backend):
        tokens: list[int] = []
        try:
            checkpoint, drawn = _begin(args)
            pieces = stream_text(checkpoint.tokenizer, _kept(drawn, tokens), args.stop)
            first = next(pieces, "")  # what is out of range is refused before anything is written
        except ValueError as error:
            raise Refusal(str(error)) from error
        _write(args.prompt + first)
        for piece in pieces:
            _write(piece)
        _write("\n")
    if len(tokens) < args.max_tokens and not _is_over(tokens, args.stop, checkpoint):
        context = checkpoint.config.context
        print(
            f"tilewise generate: stopped, for the context of {context} tokens is full",
            file=sys.stderr,
        )
    return 0


def _is_over(tokens: list[int], stop: list[str], checkpoint: Checkpoint) -> bool:
    """Whether the text ended by itself: its document, or before a text to stop at."""
    if tokens[-1:] in ([end_token(checkpoint.tokenizer)], [-1]):
        return True
    text = checkpoint.tokenizer.decode(tokens)
    return any(end in text for end in stop)


def _begin(args: argparse.Namespace) -> tuple[Checkpoint, Iterator[Tensor]]:
    require_device(args.device)
    if any("\ud800" <= letter <= "\udfff" for letter in args.prompt):  # how Python keeps them
        raise ValueError("prompt: must be text, got bytes that are not UTF-8")
    checkpoint = load_checkpoint(args.checkpoint, args.device)
    end = end_token(checkpoint.tokenizer)
    prompt = encode(checkpoint.tokenizer, args.prompt) or [end]
    drawn = generate(
        checkpoint.model,
        torch.tensor([prompt], device=args.device),
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        **_penalties(args),
        logit_bias=_bias(args, checkpoint),
        seed=args.seed,
        stop_token=end,
    )
    return checkpoint, drawn


def _penalties(args: argparse.Namespace) -> dict[str, Any]:
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _bias(args: argparse.Namespace, checkpoint: Checkpoint) -> Tensor | None:
    if not args.logit_bias:
        return None
    return bias_of(args.logit_bias, checkpoint.config.vocab_size).to(args.device)


def _token_and_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be TOKEN=X, got {text!r}") from None


def _kept(drawn: Iterable[Tensor], tokens: list[int]) -> Iterator[int]:
    """Hand the tokens on one by one, and keep them."""
    for batch in drawn:
        tokens.append(int(batch))
        yield tokens[-1]


def _write(piece: str) -> None:
    """Write at once, with "?" for what the terminal's encoding lacks."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.stdout.write(piece)
    sys.stdout.flush()
