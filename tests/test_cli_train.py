"""`tilewise train`, from the outside."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from commands import PROGRAM, TINY, refused

from tilewise.cli import main
from tilewise.models.checkpoint import load_training_state


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The trained decoder, to be damaged."""
    shutil.copytree(trained / "out", tmp_path / "copied")
    return tmp_path / "copied"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- Training.


def test_train_says_what_it_does_in_plain_lines(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", str(trained / "story.txt")
    assert main(["train", *TINY, "--steps", "4", "--data", data, "--out", str(out)]) == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert "\x1b" not in said.out
    lines = said.out.splitlines()
    assert re.fullmatch(
        r"decoder of [\d,]+ parameters and 280 tokens, fp32 on cpu, 1 thread", lines[0]
    )
    assert re.fullmatch(r"story\.txt: [\d,]+ tokens to train on, \d+ to validate with", lines[1])
    pattern = r"step (\d)/4  loss \d\.\d{3}  validation \d\.\d{3}  [\d,]+ tokens/s  \d+ s left"
    found = [re.fullmatch(pattern, line) for line in lines[2:4]]
    assert [match and match[1] for match in found] == ["2", "4"]
    assert re.fullmatch(
        r"4 steps in \d+ s: validation loss \d\.\d+ at first, now \d\.\d+", lines[4]
    )
    assert lines[5].endswith(f"tilewise generate --checkpoint {out}")
    assert len(lines) == 6
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert load_training_state(out).record["step"] == 4


@pytest.mark.parametrize("color", [True, False], ids=["color", "NO_COLOR"])
def test_train_draws_a_bar_on_a_terminal(trained: Path, tmp_path: Path, color: bool) -> None:
    """On a real pseudo-terminal, in a process of its own."""
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    environment |= {} if color else {"NO_COLOR": "1"}
    data = ["--data", str(trained / "story.txt"), "--out", str(tmp_path / "out")]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "train", *TINY, "--steps", "4", *data],
        stdout=theirs,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:
        pass  # how Linux says that the other end is closed
    os.close(ours)
    assert process.wait(60) == 0, said
    written = said.decode()
    assert "4/4" in written
    assert "tokens/s" in written
    assert "step 2: validation loss" in written
    assert bool(re.search(r"\x1b\[[\d;]*3[0-9]", written)) == color


def test_ctrl_c_leaves_a_checkpoint_to_go_on_with(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--steps", "100000", "--data", str(trained / "story.txt"), "--out", str(out)]
    process = subprocess.Popen(
        [*PROGRAM, "train", *TINY, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 4/"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    step = load_training_state(out).record["step"]
    assert said == (
        f"tilewise train: stopped after step {step} of 100000; "
        f"go on with: tilewise train --resume --out {out}\n"
    )
    assert step >= 4
    assert (out / "loss.png").exists()


def test_resume_goes_on_with_the_stored_settings(
    trained: Path, copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = load_training_state(copied).record["history"]["losses"]
    assert main(["train", "--resume", "--steps", "6", "--out", str(copied)]) == 0
    assert "going on after step 4 of 6" in capfd.readouterr().out
    losses = load_training_state(copied).record["history"]["losses"]
    assert losses[:4] == before
    assert len(losses) == 6


def test_train_reads_the_embedded_text_by_default(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *TINY, "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    assert "pydoc_data.topics: " in capfd.readouterr().out


# --- What cannot be trained on, or into.


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "data: must hold text, got nothing in "),
        (b" \n\n ", "data: must hold text, got nothing in "),
        (b"a", "data: must give more than 16 tokens, the context, to train on and to validate"),
        (b"the cat sat " * 9, "data: must give more than 16 tokens, the context, to train on"),
        (b"text\xff\xfe", "data: must be UTF-8 text, got byte 0xff at 4 in "),
        (b"\x7fELF\0\1", "data: must be text, got a NUL byte at 4 in "),
        (None, "No such file or directory: "),
    ],
    ids=["empty", "blank", "one token", "short", "undecodable", "binary", "missing"],
)
def test_train_refuses_data(
    content: bytes | None, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    if content is not None:
        data.write_bytes(content)
    line = refused(capfd, "train", *TINY, "--data", str(data), "--out", str(out))
    assert line.startswith(sentence)
    assert not out.exists()


def test_train_refuses_a_folder_as_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = refused(capfd, "train", "--data", str(tmp_path), "--out", str(tmp_path / "out"))
    assert line == f"Is a directory: {tmp_path}"


def test_train_refuses_a_folder_that_holds_something(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(trained / "story.txt")]
    (tmp_path / "thesis.txt").write_text("mine")
    line = refused(capfd, "train", *TINY, *data, "--out", str(tmp_path))
    assert line == f"out: must be a new or empty folder, got {tmp_path}"
    line = refused(capfd, "train", *TINY, *data, "--out", str(tmp_path / "thesis.txt"))
    assert line == f"out: must be a new or empty folder, got {tmp_path / 'thesis.txt'}"
    line = refused(capfd, "train", *TINY, *data, "--out", str(tmp_path / "thesis.txt" / "out"))
    assert line.startswith("Not a directory: ")
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_train_refuses_to_overwrite_a_checkpoint(
    trained: Path, copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(copied)
    data = ["--data", str(trained / "story.txt")]
    line = refused(capfd, "train", *TINY, *data, "--out", str(copied))
    assert line.endswith("which holds a checkpoint to resume")
    assert contents(copied) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_train_refuses_a_folder_it_may_not_write(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    data = ["--data", str(trained / "story.txt")]
    line = refused(capfd, "train", *TINY, *data, "--out", str(tmp_path / "out"))
    assert line == f"Permission denied: {tmp_path / 'out'}"


def test_train_refuses_a_disk_that_is_full(
    trained: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Path, *arguments: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    data = ["--data", str(trained / "story.txt")]
    line = refused(capfd, "train", *TINY, *data, "--out", str(tmp_path / "out"))
    assert line.startswith("No space left on device: ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--heads 3", "decoder: dim must be a multiple of heads, got 16 and 3"),
        ("--vocab-size 100", "vocab_size: must be at least 257, one token a byte and the end"),
        ("--lr -1", "learning_rate: must be positive and finite, got -1.0"),
        ("--dropout 1", "decoder: dropout must be at least 0 and below 1, got 1.0"),
        ("--device xpu", "device: must be cpu, or cuda where there is one, got 'xpu'"),
    ],
)
def test_train_refuses_settings(
    arguments: str, sentence: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(trained / "story.txt"), "--out", str(tmp_path / "out")]
    assert refused(capfd, "train", *TINY, *data, *arguments.split()).startswith(sentence)
    assert not (tmp_path / "out").exists()


def test_train_says_when_the_loss_is_lost(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(trained / "story.txt"), "--out", str(tmp_path / "out")]
    line = refused(capfd, "train", *TINY, *data, "--lr", "1e30", "--warmup", "0")
    assert "loss and gradients must stay finite" in line
    assert line.endswith(f"the last checkpoint is in {tmp_path / 'out'}")


# --- What cannot be gone on with.


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "steps: must be more than the 4 the checkpoint has done, got 4"),
        ("--steps 9 --dim 32", "dim: must be 16 as in the checkpoint, got 32"),
        ("--steps 9 --seed 1", "seed: must be 0 as in the checkpoint, got 1"),
        ("--steps 9 --data DIR/config.json", "data: must be the text the checkpoint was trained"),
    ],
)
def test_resume_refuses_changes(
    arguments: str, sentence: str, copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(copied)
    given = arguments.replace("DIR", str(copied)).split()
    assert refused(capfd, "train", "--resume", "--out", str(copied), *given).startswith(sentence)
    assert contents(copied) == before


def test_resume_refuses_a_folder_without_a_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        line = refused(capfd, "train", "--resume", "--out", str(folder))
        assert line == f"checkpoint: must be a folder with a config.json, got {folder}"
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "training.json"])
def test_resume_refuses_a_truncated_checkpoint(
    name: str, copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (copied / name).write_bytes((copied / name).read_bytes()[:-9])
    before = contents(copied)
    line = refused(capfd, "train", "--resume", "--steps", "9", "--out", str(copied))
    assert line.startswith(f"checkpoint: {name} must be readable and whole, got: ")
    assert contents(copied) == before


def test_resume_refuses_a_checkpoint_of_another_shape(
    copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    about = json.loads((copied / "config.json").read_text())
    about["decoder"]["dim"] = 32
    (copied / "config.json").write_text(json.dumps(about))
    before = contents(copied)
    line = refused(capfd, "train", "--resume", "--steps", "9", "--out", str(copied))
    assert re.match(r"checkpoint: .* in model\.safetensors must be float32 \[.*\] .*, got", line)
    assert contents(copied) == before
