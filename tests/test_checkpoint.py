"""A checkpoint is whole, whatever interrupts its writing, or it is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tilewise.models import checkpoint, text
from tilewise.models.checkpoint import (
    CheckpointError,
    TrainingState,
    load_checkpoint,
    load_training_state,
    save_checkpoint,
)
from tilewise.models.decoder import Decoder, DecoderConfig

FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "training.json",
    "training.safetensors",
)


def tokenizer_of(vocab_size: int = 270) -> Tokenizer:
    return text.train_tokenizer(["the cat sat on the mat, the cat sat é🙂漢\n" * 5], vocab_size)


def decoder(seed: int, **shape: Any) -> Decoder:
    config = DecoderConfig(270, **{"context": 8, "dim": 8, "layers": 1, "heads": 1, **shape})
    torch.manual_seed(seed)
    return Decoder(config)


def save_numbered(folder: Path, number: int) -> None:
    """Save a checkpoint in which every file knows the number."""
    state = TrainingState({"number": torch.tensor(number)}, {"number": number})
    save_checkpoint(folder, decoder(number), tokenizer_of(), state)


def number_of(folder: Path) -> int:
    """The number of a checkpoint, if all its files agree about it."""
    state = load_training_state(folder)
    number: int = state.record["number"]
    assert int(state.tensors["number"]) == number
    model = load_checkpoint(folder).model
    for ours, theirs in zip(decoder(number).parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    return number


@pytest.mark.parametrize(
    "shape",
    [{}, {"tied": False, "positions": "learned", "norm": "layer_norm", "bias": True}],
    ids=["tied", "untied"],
)
def test_a_checkpoint_gives_the_decoder_back(tmp_path: Path, shape: dict[str, Any]) -> None:
    model, tokenizer = decoder(3, **shape), tokenizer_of()
    before = torch.get_rng_state()
    save_checkpoint(tmp_path / "new" / "folder", model, tokenizer)
    found = load_checkpoint(tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), before)
    assert found.config == model.config
    assert found.tokenizer.to_str() == tokenizer.to_str()
    tokens = torch.arange(16).view(2, 8)
    assert torch.equal(found.model(tokens), model.eval()(tokens))
    assert (found.model.head.weight is found.model.embedding.weight) == model.config.tied


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it, and no clean-up of ours runs after it."""


def kill_at(operation: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Die just before the operation of that number on the disk; return how many there were."""
    done = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal done
            if done == operation:
                raise Killed
            done += 1
            return function(*args, **options)

        return call

    for name in ("mkdir", "rename", "replace", "rmdir", "unlink", "write_text"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(checkpoint, "save_file", counted(save_file))
    return lambda: done


def test_a_kill_at_any_operation_leaves_one_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_numbered(tmp_path / "0", 1)
    (tmp_path / "0" / "notes.txt").write_text("mine")
    seen = []
    for operation in range(100):
        folder = tmp_path / str(operation + 1)
        shutil.copytree(tmp_path / "0", folder)
        with monkeypatch.context() as patch:
            performed = kill_at(operation, patch)
            try:
                save_numbered(folder, 2)
            except Killed:
                pass
        seen.append(number_of(folder))
        save_numbered(folder, 3)  # whoever comes next is not in the way of what was left
        assert number_of(folder) == 3
        assert {file.name for file in folder.iterdir()} == {*FILES, "notes.txt"}
        if performed() < operation:
            break
    assert 20 < len(seen) < 100
    assert seen == sorted(seen)  # the old one up to the instant of commitment, then the new one
    assert set(seen) == {1, 2}


def test_a_first_save_cut_short_leaves_a_vacant_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(5, patch)
        save_numbered(folder, 1)
    assert folder.exists()
    assert checkpoint.is_vacant(folder)
    assert not checkpoint.is_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"must be a folder with a config\.json, got"):
        load_checkpoint(folder)


def test_weights_alone_cannot_be_resumed_whatever_lay_there(tmp_path: Path) -> None:
    save_numbered(tmp_path, 1)
    save_checkpoint(tmp_path, decoder(2), tokenizer_of())
    assert load_checkpoint(tmp_path).config == decoder(2).config
    with pytest.raises(CheckpointError, match="must hold the state of its training, got weights"):
        load_training_state(tmp_path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    save_numbered(tmp_path, 1)
    file = tmp_path / name
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-7] if damage == "truncated" else b"")
    load = load_training_state if name.startswith("training") else load_checkpoint
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dim": 16}, r"attention\.key\.weight in model\.safetensors must be float32 \[16, 16\] "),
        ({"layers": 2}, r"blocks\.1\..* must be float32 .*, got absent"),
        ({"tied": False}, r"head\.weight in model\.safetensors must be .*, got absent"),
        ({"vocab_size": 300}, r"tokenizer\.json must have the 300 tokens of config\.json, got 270"),
        ({"dim": -1}, r"config\.json must describe a decoder, got: ValueError"),
        ({"dim": "wide"}, r"config\.json must describe a decoder, got: TypeError"),
        ({"depth": 3}, r"config\.json must describe a decoder, got: TypeError"),
        ({"hidden": 10**12}, r"must be float32 \[8, 1000000000000\] for config\.json, got float32"),
    ],
)
def test_a_shape_of_another_kind_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    save_numbered(tmp_path, 1)
    about = json.loads((tmp_path / "config.json").read_text())
    about["decoder"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("about", [[], {"format": 2}, {"architectures": ["GPT2"]}, "x"])
def test_a_configuration_of_others_is_refused(tmp_path: Path, about: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"config\.json must have format 1, got"):
        load_checkpoint(tmp_path)


def test_weights_of_another_dtype_are_refused(tmp_path: Path) -> None:
    save_numbered(tmp_path, 1)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: w.half() for name, w in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"must be float32 \[.*\] .*, got float16"):
        load_checkpoint(tmp_path)
