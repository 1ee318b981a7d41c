"""`tilewise train`: a decoder, a tokenizer and a picture of the losses, in one folder."""

import argparse
import dataclasses
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tilewise.choice import BACKENDS
from tilewise.cli import Refusal
from tilewise.cli.console import CONSOLE
from tilewise.models.run import TrainingRun
from tilewise.models.settings import PRECISIONS, TrainingSettings
from tilewise.models.training import (
    Interrupted,
    Progress,
    Report,
    advance,
    begin,
    resume,
)

SECONDS_BETWEEN_LINES = 10.0  # in a pipe

NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("steps", int, "steps of the optimizer"),
    ("batch", int, "sequences in a batch"),
    ("accumulate", int, "batches in a step"),
    ("context", int, "tokens in a sequence"),
    ("vocab_size", int, "tokens to learn"),
    ("dim", int, "width of the decoder"),
    ("layers", int, "its blocks"),
    ("heads", int, "query heads"),
    ("kv_heads", int, "key and value heads"),
    ("dropout", float, "probability to drop"),
    ("learning_rate", float, "after the warm-up, before the cosine"),
    ("warmup", int, "steps of warm-up"),
    ("weight_decay", float, "of matrices"),
    ("clip", float, "largest norm of all gradients"),
    ("evaluate_every", int, "steps between two validation losses"),
    ("save_every", int, "steps between two checkpoints"),
    ("seed", int, "of weights, data order and dropout"),
    ("threads", int, "on a CPU; as many as torch uses unless given"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options. None stands for what the settings, or the checkpoint, say."""
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text; without it, the language reference inside Python. The last tenth "
        "validates",
    )
    parser.add_argument(
        "--out",
        default="tilewise-decoder",
        metavar="DIR",
        help="new or empty folder for the checkpoint and loss.png (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the checkpoint in --out, exactly; steps, evaluate-every, save-every, "
        "threads, device, backend and compile may change, but only the first three "
        "leave the arithmetic as it was",
    )
    defaults = TrainingSettings()
    for name, kind, meaning in NUMBERS:
        default = getattr(defaults, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            *(("--lr",) if name == "learning_rate" else ()),
            type=kind,
            metavar="N" if kind is int else "X",
            help=meaning if default is None else f"{meaning} (default: {default})",
        )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="bf16 is autocast over fp32 weights; auto takes it where the device multiplies it "
        "natively (default: auto)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--backend", choices=BACKENDS, help="preferred for every op that it can serve"
    )
    parser.add_argument(
        "--compile", action="store_true", default=None, help="put the model through torch.compile"
    )


def run(args: argparse.Namespace) -> int:
    """Train, and say how it goes."""
    given = {
        field.name: value
        for field in dataclasses.fields(TrainingSettings)
        if (value := getattr(args, field.name)) is not None
    }
    if "data" in given:
        given["data"] = tuple(given["data"])
    try:
        if args.resume:
            training = resume(args.out, **given)
        else:
            training = begin(TrainingSettings(**given), args.out)
    except ValueError as error:
        raise Refusal(str(error)) from error
    except OSError as error:
        raise Refusal(_sentence(error)) from error
    _introduce(training)
    return _advance(training)


def _advance(training: TrainingRun) -> int:
    began, first = time.perf_counter(), training.step
    folder = training.folder
    try:
        with ExitStack() as stack:
            if CONSOLE.is_terminal:
                advance(training, _bar(training, stack))
            else:
                advance(training, _lines())
    except BrokenPipeError:
        raise  # whoever read the lines has left
    except FloatingPointError as error:
        raise Refusal(f"{error}; the last checkpoint is in {folder}") from error
    except OSError as error:
        raise Refusal(_sentence(error)) from error
    except Interrupted:
        _say(
            f"tilewise train: stopped after step {training.step} of {training.settings.steps}; "
            f"go on with: tilewise train --resume --out {folder}",
            sys.stderr,
        )
        return 130
    except KeyboardInterrupt:
        _say(f"tilewise train: stopped; the last checkpoint is in {folder}", sys.stderr)
        return 130
    seconds = time.perf_counter() - began
    losses = training.history.validation
    _say(
        f"{training.step - first} steps in {seconds:.0f} s: validation loss "
        f"{losses[0][1]:.3f} at first, now {losses[-1][1]:.3f}"
    )
    _say(f"checkpoint and loss.png in {folder}; try: tilewise generate --checkpoint {folder}")
    return 0


def _introduce(training: TrainingRun) -> None:
    settings, corpus = training.settings, training.corpus
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    threads = "1 thread" if settings.threads == 1 else f"{settings.threads} threads"
    _say(
        f"decoder of {parameters:,} parameters and {training.model.config.vocab_size:,} tokens, "
        f"{settings.precision} on {settings.device}, {threads}"
    )
    _say(
        f"{', '.join(Path(file).name for file in settings.data) or 'pydoc_data.topics'}: "
        f"{len(corpus.training):,} tokens to train on, {len(corpus.validation):,} to validate with"
    )
    if training.step:
        _say(f"going on after step {training.step} of {settings.steps}")


def _lines() -> Report:
    """Report in lines, for a pipe: with each validation loss, and when a while has passed."""
    printed = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal printed
        now = time.monotonic()
        if progress.validation_loss is None and now - printed < SECONDS_BETWEEN_LINES:
            return
        printed = now
        validation = (
            ""
            if progress.validation_loss is None
            else f"validation {progress.validation_loss:.3f}  "
        )
        _say(
            f"step {progress.step}/{progress.steps}  loss {progress.loss:.3f}  {validation}"
            f"{progress.tokens_per_second:,.0f} tokens/s  {progress.seconds_left:.0f} s left"
        )

    return report


def _bar(training: TrainingRun, stack: ExitStack) -> Report:
    """Report on one line that moves, and print each validation loss above it."""
    bar = stack.enter_context(
        Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=CONSOLE,
        )
    )
    task = bar.add_task("preparing kernels", total=training.settings.steps, completed=training.step)

    def report(progress: Progress) -> None:
        if progress.validation_loss is not None:
            bar.print(f"step {progress.step}: validation loss {progress.validation_loss:.3f}")
        bar.update(
            task,
            completed=progress.step,
            description=f"loss {progress.loss:.3f}  {progress.tokens_per_second:,.0f} tokens/s",
        )

    return report


def _say(line: str, stream: TextIO | None = None) -> None:
    print(line, file=stream, flush=True)


def _sentence(error: OSError) -> str:
    if error.strerror is None:
        return " ".join(str(error).split())
    return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
