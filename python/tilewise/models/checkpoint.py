"""A decoder in a folder: weights, shape and tokenizer, and what training needs to go on.

    model.safetensors       weights
    config.json             the fields of `DecoderConfig`
    tokenizer.json          the byte-level BPE
    training.safetensors    optimizer and random states        (only where training can go on)
    training.json           step, settings, history

All files change together. The new ones are written to `.writing` inside the folder, which is then
renamed to `.written`: from that instant they are the checkpoint, and a reader prefers them. Only
then are they moved to their places, one rename each; whoever saves next completes what a kill
interrupted. Files of other names in the folder are never touched, and nothing is ever pickled.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from tilewise.models.decoder import Decoder, DecoderConfig

FORMAT = 1
LOCK = ".lock"  # held by whoever trains into the folder
_WRITING, _WRITTEN = ".writing", ".written"

T = TypeVar("T")


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, in one sentence."""


@dataclass(frozen=True)
class TrainingState:
    """What a training run needs to go on exactly.

    Attributes:
        tensors: Optimizer and random states by name.
        record: Everything else, as JSON holds it.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` found in a folder.

    Attributes:
        model: In evaluation mode.
        tokenizer: With as many tokens as the model.
        config: The shape of the model.
    """

    model: Decoder
    tokenizer: Tokenizer
    config: DecoderConfig


def save_checkpoint(
    folder: str | Path, model: Decoder, tokenizer: Tokenizer, training: TrainingState | None = None
) -> None:
    """Write a checkpoint; whatever interrupts it, the folder holds the old one or the new one.

    Args:
        folder: Made if need be.
        model: The decoder.
        tokenizer: Its tokenizer.
        training: What training needs to go on, if it is to go on.

    Raises:
        OSError: If the folder cannot be written.
    """
    about = {
        "format": FORMAT,
        "can_resume": training is not None,  # what an earlier save left of it no longer counts
        "decoder": dataclasses.asdict(model.config),
    }

    def write(staging: Path) -> None:
        (staging / "config.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
        (staging / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
        _write_tensors(staging / "model.safetensors", _named_tensors(model))
        if training is not None:
            _write_tensors(staging / "training.safetensors", training.tensors)
            (staging / "training.json").write_text(json.dumps(training.record), "utf-8")

    _commit(Path(folder), write)


def load_checkpoint(folder: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a decoder and its tokenizer.

    Args:
        folder: Written by `save_checkpoint`.
        device: Where the weights go.

    Raises:
        CheckpointError: If the folder holds no checkpoint, a truncated one, or weights of another
            shape than its configuration says.
    """
    folder = Path(folder)
    about = _read_about(folder)
    try:
        config = DecoderConfig(**about["decoder"])
        with torch.device("meta"):  # shapes alone: the configuration may ask for terabytes
            shapes = _named_tensors(Decoder(config))
    except (KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"checkpoint: config.json must describe a decoder, got: {_line(error)}"
        ) from error
    tokenizer = _read(folder, "tokenizer.json", lambda path: Tokenizer.from_str(_text(path)))
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise CheckpointError(
            f"checkpoint: tokenizer.json must have the {config.vocab_size} tokens of config.json, "
            f"got {tokenizer.get_vocab_size()}"
        )
    weights = _read(folder, "model.safetensors", load_file)
    require_shapes("model.safetensors", weights, shapes)
    with torch.random.fork_rng(devices=[]):  # what fills a new model is drawn
        model = Decoder(config).to(device).eval()
    with torch.no_grad():
        for name, tensor in _named_tensors(model).items():
            tensor.copy_(weights[name])
    return Checkpoint(model, tokenizer, config)


def load_training_state(folder: str | Path) -> TrainingState:
    """Read what `save_checkpoint` was given as `training`.

    Raises:
        CheckpointError: If it is absent or truncated.
    """
    folder = Path(folder)
    if not _read_about(folder).get("can_resume"):
        raise CheckpointError(
            f"checkpoint: must hold the state of its training, got weights alone in {folder}"
        )
    record = _read(folder, "training.json", _json)
    return TrainingState(_read(folder, "training.safetensors", load_file), record)


def require_shapes(file: str, found: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    """Refuse tensors that differ from the needed ones in name, shape or dtype."""
    for name in sorted(found.keys() | needed.keys()):
        ours, theirs = (_shape(tensors.get(name)) for tensors in (needed, found))
        if ours != theirs:
            raise CheckpointError(
                f"checkpoint: {name} in {file} must be {ours} for config.json, got {theirs}"
            )


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder holds a checkpoint, if only by its configuration."""
    return any((Path(folder) / place / "config.json").is_file() for place in (_WRITTEN, ""))


def is_vacant(folder: str | Path) -> bool:
    """Whether the folder is absent, or empty but for what an interrupted first save left."""
    folder = Path(folder)
    return not folder.exists() or (
        folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {_WRITING, LOCK}
    )


# --- All files or none.


def _commit(folder: Path, write: Callable[[Path], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _complete(folder)
    staging = folder / _WRITING
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    write(staging)
    for file in staging.iterdir():
        _flush(file)
    _flush(staging)
    staging.rename(folder / _WRITTEN)  # from here on the new checkpoint is the checkpoint
    _flush(folder)
    _complete(folder)


def _complete(folder: Path) -> None:
    """Move the files of a committed save to their places."""
    written = folder / _WRITTEN
    if not written.exists():
        return
    for file in sorted(written.iterdir()):
        file.replace(folder / file.name)
    _flush(folder)
    written.rmdir()


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"cannot write {file}: {error}") from error
    shutil.copymode(file.with_name("config.json"), file)  # not for the owner alone


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt":  # opens no folders, and flushes only what was opened to write
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- Reading with suspicion.


def _read(folder: Path, name: str, reader: Callable[[Path], T]) -> T:
    """Read one file; whatever its reader finds wrong becomes a sentence."""
    for path in (folder / _WRITTEN / name, folder / name):
        try:
            return reader(path)
        except (FileNotFoundError, NotADirectoryError):
            continue  # the first: moved to its place, perhaps just now by a run that saves
        except Exception as error:  # tokenizers raises Exception itself
            raise CheckpointError(
                f"checkpoint: {name} must be readable and whole, got: {_line(error)}"
            ) from error
    raise CheckpointError(f"checkpoint: must be a folder with a {name}, got {folder}")


def _read_about(folder: Path) -> dict[str, Any]:
    about = _read(folder, "config.json", _json)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else about
        raise CheckpointError(
            f"checkpoint: config.json must have format {FORMAT}, got {str(found)[:60]}"
        )
    return about


def _text(path: Path) -> str:
    return path.read_text("utf-8")


def _json(path: Path) -> Any:
    return json.loads(_text(path))


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _shape(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _named_tensors(model: Decoder) -> dict[str, Tensor]:
    """What the state_dict holds, with a weight that has two names under the first alone."""
    named: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), (name, tensor))
    return {name: tensor.detach() for name, tensor in named.values()}
