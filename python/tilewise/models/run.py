"""A training run between two steps: in memory, and in the folder of its checkpoint."""

import dataclasses
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from tilewise.models import checkpoint, text
from tilewise.models.checkpoint import CheckpointError, TrainingState
from tilewise.models.decoder import Decoder
from tilewise.models.settings import TrainingSettings
from tilewise.models.state import (
    RandomStates,
    optimizer_tensors,
    own_random,
    random_states,
    random_states_from,
    restore_optimizer,
)
from tilewise.models.text import Corpus

STATE_FILE = "training.safetensors"


@dataclass
class History:
    """What a run has measured so far.

    Attributes:
        losses: Training loss of each step, in nats a token, with dropout.
        validation: Pairs of step and validation loss; the first is of step 0, before training.
        seconds: Spent in steps.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class TrainingRun:
    """A run in memory, between two steps.

    Attributes:
        settings: With nothing left to choose: device, threads and precision are decided.
        folder: Where its checkpoints go.
        model: On the device of the settings.
        optimizer: Of the model.
        tokenizer: Learned from the training part.
        corpus: What to train on and to validate with, on the CPU.
        random: What the random generators are brought to when training goes on.
        step: How many are done.
        history: Of the steps done.
    """

    settings: TrainingSettings
    folder: Path
    model: Decoder
    optimizer: torch.optim.Optimizer
    tokenizer: Tokenizer
    corpus: Corpus
    random: RandomStates
    step: int = 0
    history: History = field(default_factory=History)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embedding.weight.device


def begin(settings: TrainingSettings, folder: str | Path) -> TrainingRun:
    """Prepare a run: read the data, learn the tokenizer, draw the weights. Writes nothing.

    Args:
        settings: What to train, on what, and how.
        folder: A new or empty one.

    Raises:
        OSError: If the data cannot be read.
        ValueError: If the folder holds something, the data is not text or too little of it, or a
            setting is impossible here.
    """
    folder = Path(folder)
    if checkpoint.is_checkpoint(folder):
        raise ValueError(
            f"out: must be a new or empty folder, got {folder}, which holds a checkpoint to resume"
        )
    if not checkpoint.is_vacant(folder):
        raise ValueError(f"out: must be a new or empty folder, got {folder}")
    settings = settings.decided()
    documents = text.read_documents(settings.data)
    tokenizer = text.train_tokenizer(text.split(documents)[0], settings.vocab_size)
    corpus = text.encode_corpus(tokenizer, documents, settings.context)
    device = torch.device(settings.device or "cpu")
    with own_random(device):
        torch.manual_seed(settings.seed)
        random.seed(settings.seed)
        model = Decoder(settings.decoder(tokenizer.get_vocab_size())).to(device)
        drawn = random_states(device)
    optimizer = _make_optimizer(model, settings)
    return TrainingRun(settings, folder, model, optimizer, tokenizer, corpus, drawn)


def resume(folder: str | Path, **changes: Any) -> TrainingRun:
    """Take up the run whose checkpoint is in `folder`. Writes nothing.

    Without changes, or with changes of nothing but how often to evaluate and save, the losses to
    come on a CPU are bit for bit those of a run that was never interrupted.

    Args:
        folder: Written by `save`.
        changes: Settings to change, of those in `settings.CHANGEABLE`.

    Raises:
        CheckpointError: If the checkpoint is truncated or of another shape.
        OSError: If the data cannot be read.
        ValueError: If a change is not allowed, or the data is not what it was.
    """
    folder = Path(folder)
    state = checkpoint.load_training_state(folder)
    try:
        stored = TrainingSettings.from_record(state.record["settings"])
        step, history = int(state.record["step"]), History(**state.record["history"])
        history.validation = [(at, loss) for at, loss in history.validation]
        fingerprint, python = state.record["data"], state.record["random"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint: training.json must describe a run, got: {error!r}"
        ) from error
    settings = stored.changed(changes, step).decided()
    documents = text.read_documents(settings.data)
    if text.fingerprint(documents) != fingerprint:
        raise ValueError("data: must be the text the checkpoint was trained on, got another")
    found = checkpoint.load_checkpoint(folder, settings.device or "cpu")
    corpus = text.encode_corpus(found.tokenizer, documents, settings.context)
    optimizer = _make_optimizer(found.model, settings)
    restore_optimizer(found.model, optimizer, state.tensors, STATE_FILE)
    drawn = random_states_from(state.tensors, python, STATE_FILE)
    return TrainingRun(
        settings, folder, found.model, optimizer, found.tokenizer, corpus, drawn, step, history
    )


def save(run: TrainingRun) -> None:
    """Write the run to its folder, all of it or nothing.

    Raises:
        OSError: If the folder cannot be written.
    """
    record = {
        "step": run.step,
        "settings": dataclasses.asdict(run.settings),
        "data": run.corpus.fingerprint,
        "random": run.random.python,
        "history": dataclasses.asdict(run.history),
    }
    tensors = optimizer_tensors(run.model, run.optimizer) | run.random.tensors()
    checkpoint.save_checkpoint(run.folder, run.model, run.tokenizer, TrainingState(tensors, record))


def _make_optimizer(model: Decoder, settings: TrainingSettings) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
