"""Training a decoder on text, in a way that can be stopped anywhere and gone on with exactly.

AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101), linear warm-up, then a cosine
down to a tenth (https://arxiv.org/abs/1608.03983). Everything a step depends on is in the
checkpoint: weights, moments, step, random states and settings. The learning rate and the order of
the data are pure functions of the step.
"""

import errno
import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
from torch import Tensor

import tilewise
from tilewise.models import text
from tilewise.models.checkpoint import LOCK
from tilewise.models.loss_curve import draw_loss_curve
from tilewise.models.run import TrainingRun, begin, resume, save
from tilewise.models.settings import TrainingSettings
from tilewise.models.state import own_random, random_states, restore_random

__all__ = [
    "Interrupted",
    "Progress",
    "TrainingSettings",
    "advance",
    "begin",
    "evaluate",
    "resume",
    "train",
]

EVALUATED_WINDOWS = 256  # of the validation part, evenly spaced, where there are more


@dataclass(frozen=True)
class Progress:
    """What is reported after each step; the validation loss only where it was measured."""

    step: int
    steps: int
    loss: float
    validation_loss: float | None
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    seconds_left: float


Report = Callable[[Progress], None]
LossOf = Callable[[Tensor, Tensor], Tensor]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the step was finished and a checkpoint written."""


def train(
    settings: TrainingSettings, folder: str | Path, report: Report | None = None
) -> TrainingRun:
    """Train a decoder from nothing: `begin`, then `advance`."""
    run = begin(settings, folder)
    advance(run, report)
    return run


def advance(run: TrainingRun, report: Report | None = None) -> None:
    """Train until all steps are done, with a checkpoint now and then, and a picture at the end.

    The checkpoint is there from before the first step, and is replaced every `save_every` steps,
    at the end, and on Ctrl-C. The random states of the process are as before afterwards.

    Args:
        run: From `begin` or `resume`; changed in place.
        report: Called after each step.

    Raises:
        Interrupted: After Ctrl-C, once the step is finished and saved. A second Ctrl-C is a
            KeyboardInterrupt at once; what was saved before then remains.
        FloatingPointError: If the loss is no longer finite; the last checkpoint remains.
        OSError: If the folder cannot be written, or another run writes there.
    """
    settings = run.settings
    with _environment(run) as interrupts:
        loss_of = torch.compile(run.model.loss) if settings.compile else run.model.loss
        if run.step == 0:
            run.history.validation = [(0, evaluate(run, loss_of))]
            _save(run)
        pace: deque[float] = deque(maxlen=20)  # seconds of the last steps
        while run.step < settings.steps:
            progress = _step_and_measure(run, loss_of, pace)
            if report is not None:
                report(progress)
            finished, stopping = run.step == settings.steps, bool(interrupts)
            if finished or stopping or run.step % settings.save_every == 0:
                _save(run)
            if finished or stopping:
                draw_loss_curve(run.folder / "loss.png", run.history.losses, run.history.validation)
            if stopping and not finished:
                raise Interrupted


def evaluate(run: TrainingRun, loss_of: LossOf | None = None) -> float:
    """Compute the mean loss over the validation part, without dropout."""
    settings, tokens = run.settings, run.corpus.validation
    loss_of = loss_of or run.model.loss
    count = (len(tokens) - 1) // settings.context
    used = min(count, EVALUATED_WINDOWS)
    starts = [number * count // used * settings.context for number in range(used)]
    was_training = run.model.training
    run.model.eval()
    total = 0.0
    with torch.no_grad():
        for first in range(0, used, settings.batch):
            part = starts[first : first + settings.batch]
            picked = text.pick(tokens, part, settings.context)
            total += float(_loss(run, loss_of, *picked)) * len(part)
    run.model.train(was_training)
    return total / used


# --- One step.


def _step_and_measure(run: TrainingRun, loss_of: LossOf, pace: deque[float]) -> Progress:
    settings, history = run.settings, run.history
    began = time.perf_counter()
    learning_rate = learning_rate_at(settings, run.step)
    loss, norm = _step(run, loss_of, learning_rate)
    run.step += 1
    pace.append(time.perf_counter() - began)
    history.losses.append(loss)
    history.seconds += pace[-1]
    validation_loss = None
    if run.step % settings.evaluate_every == 0 or run.step == settings.steps:
        validation_loss = evaluate(run, loss_of)
        history.validation.append((run.step, validation_loss))
    seconds = statistics.median(pace)  # the first step may have waited for a compiler
    return Progress(
        step=run.step,
        steps=settings.steps,
        loss=loss,
        validation_loss=validation_loss,
        learning_rate=learning_rate,
        gradient_norm=norm,
        tokens_per_second=settings.accumulate * settings.batch * settings.context / seconds,
        seconds_left=(settings.steps - run.step) * seconds,
    )


def _step(run: TrainingRun, loss_of: LossOf, learning_rate: float) -> tuple[float, float]:
    """Take one step of the optimizer; return the loss and the norm of the gradients."""
    settings = run.settings
    run.model.train()
    total = 0.0
    for part in range(settings.accumulate):
        inputs, targets = text.windows(
            run.corpus.training,
            context=settings.context,
            seed=settings.seed,
            first=(run.step * settings.accumulate + part) * settings.batch,
            count=settings.batch,
        )
        loss = _loss(run, loss_of, inputs, targets) / settings.accumulate
        loss.backward()
        total += float(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip))
    if not math.isfinite(total + norm):
        raise FloatingPointError(
            f"train: loss and gradients must stay finite, got {total} and {norm} in step "
            f"{run.step + 1}; a lower learning rate may help"
        )
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return total, norm


def _loss(run: TrainingRun, loss_of: LossOf, inputs: Tensor, targets: Tensor) -> Tensor:
    bf16 = run.settings.precision == "bf16"
    with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
        return loss_of(inputs.to(run.device), targets.to(run.device))


def learning_rate_at(settings: TrainingSettings, step: int) -> float:
    """The learning rate of the step after `step` steps."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


# --- Around the steps.


def _save(run: TrainingRun) -> None:
    run.random = random_states(run.device)
    save(run)


@contextmanager
def _environment(run: TrainingRun) -> Iterator[list[int]]:
    """Hold the folder, the threads, the random states and Ctrl-C; yield the interrupts so far."""
    threads, device = torch.get_num_threads(), run.device
    with ExitStack() as stack:
        stack.enter_context(_locked(run.folder))
        torch.set_num_threads(run.settings.threads or threads)
        stack.callback(torch.set_num_threads, threads)
        stack.enter_context(own_random(device))
        restore_random(run.random, device)
        if run.settings.backend is not None:
            stack.enter_context(tilewise.backend(run.settings.backend))
        yield stack.enter_context(_deferred_interrupt())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep two runs from writing into one folder; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            yield
    except filelock.Timeout:
        raise BlockingIOError(
            errno.EAGAIN, "another run is training into it", str(folder)
        ) from None


@contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Note Ctrl-C rather than stop in the middle of a step; the second one stops at once."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted  # only the main thread may handle signals, or gets them
        return

    def note(number: int, frame: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
