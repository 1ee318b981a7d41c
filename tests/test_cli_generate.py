"""`tilewise generate`, from the outside."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from commands import PROGRAM, refused

from tilewise.cli import main
from tilewise.models.checkpoint import load_checkpoint
from tilewise.models.generation import generate
from tilewise.models.text import encode, stream_text


def generated(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    capfd.readouterr()
    assert main(["generate", "--backend", "reference", *arguments]) == 0
    return capfd.readouterr().out


def test_the_same_seed_gives_the_same_text(
    trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", str(trained / "out"), "--prompt", "the cat", "--max-tokens", "12"]
    first, again = (generated(capfd, *options, "--seed", "5") for _ in range(2))
    assert first == again
    assert first.startswith("the cat")
    assert first.endswith("\n")
    assert len(first) > len("the cat\n")
    others = {generated(capfd, *options, "--seed", str(seed)) for seed in range(4)}
    assert len(others) > 1
    drawn = {generated(capfd, *options) for _ in range(4)}  # a seed of its own each time
    assert len(drawn) > 1


def test_options_reach_the_drawing(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint", str(trained / "out"), "--prompt", "the", "--max-tokens", "9"]
    greedy = generated(capfd, *options, "--temperature", "0")
    assert generated(capfd, *options, "--top-k", "1", "--seed", "1") == greedy
    assert generated(capfd, *options, "--top-p", "1e-6", "--seed", "2") == greedy
    assert generated(capfd, *options, "--temperature", "5", "--seed", "3") != greedy


def test_every_option_reaches_the_drawing(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = load_checkpoint(trained / "out")
    prompt = torch.tensor([encode(found.tokenizer, "the")])
    fixed = ["--checkpoint", str(trained / "out"), "--prompt", "the", "--max-tokens", "12"]
    fixed += ["--seed", "3", "--temperature", "2"]
    plain = generated(capfd, *fixed)
    bias = torch.zeros(found.config.vocab_size)
    bias[[65, 30]] = torch.tensor([50.0, -float("inf")])
    for arguments, options in (
        (["--min-p", "0.9"], {"min_p": 0.9}),
        (["--repetition-penalty", "9"], {"repetition_penalty": 9.0}),
        (["--presence-penalty", "7"], {"presence_penalty": 7.0}),
        (["--frequency-penalty", "-7"], {"frequency_penalty": -7.0}),
        (["--logit-bias", "65=50", "--logit-bias", "30=-inf"], {"logit_bias": bias}),
    ):
        drawn = generate(found.model, prompt, max_tokens=12, seed=3, temperature=2.0, **options)
        text = "".join(stream_text(found.tokenizer, map(int, drawn)))
        assert generated(capfd, *fixed, *arguments) == f"the{text}\n" != plain


def test_a_text_ends_before_a_text(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint", str(trained / "out"), "--prompt", "the cat", "--seed", "3"]
    whole = generated(capfd, *options, "--temperature", "2").removeprefix("the cat")[:-1]
    cut = whole[3:5]
    assert main(["generate", *options, "--temperature", "2", "--stop", cut, "--stop", "#"]) == 0
    said = capfd.readouterr()
    assert said.out == f"the cat{whole.split(cut)[0].split('#')[0]}\n"
    assert said.err == ""


def test_no_prompt_begins_a_document(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint", str(trained / "out"), "--max-tokens", "5", "--temperature", "0"]
    found = load_checkpoint(trained / "out")
    tokens = [found.tokenizer.token_to_id("<|end|>")]
    with torch.no_grad():
        for _ in range(5):
            tokens.append(int(found.model(torch.tensor([tokens]))[0, -1].argmax()))
    assert generated(capfd, *options) == found.tokenizer.decode(tokens) + "\n"


def test_generate_stops_where_the_context_ends(
    trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = load_checkpoint(trained / "out")
    prompt = encode(found.tokenizer, "the cat")
    options = ["--checkpoint", str(trained / "out"), "--prompt", "the cat", "--temperature", "0"]
    assert main(["generate", *options]) == 0
    said = capfd.readouterr()
    assert said.err == "tilewise generate: stopped, for the context of 16 tokens is full\n"
    read = torch.tensor([prompt])
    drawn = [int(t) for t in generate(found.model, read, max_tokens=99, temperature=0.0)]
    assert len(prompt) + len(drawn) == 17  # the last one need not be read
    assert said.out == "".join(["the cat", *stream_text(found.tokenizer, iter(drawn)), "\n"])


def test_nothing_to_draw_is_the_prompt(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint", str(trained / "out"), "--prompt", "é", "--max-tokens", "0"]
    assert generated(capfd, *options) == "é\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--prompt", "the cat " * 40],
            "generate: prompt_tokens must have at most 16 positions, the context of the model, ",
        ),
        (["--prompt", "\udcff"], "prompt: must be text, got bytes that are not UTF-8"),
        (["--max-tokens", "-1"], "generate: max_tokens must be at least 0, got -1"),
        (["--temperature", "-1"], "sample: temperature must be "),
        (["--top-k", "-1"], "sample: top_k must be "),
        (["--top-p", "2"], "sample: top_p must be "),
        (["--min-p", "2"], "sample: min_p must be "),
        (["--repetition-penalty", "0"], "sample: repetition_penalty must be "),
        (["--logit-bias", "99999=1"], "logit_bias: must be of tokens from 0 to 27"),
        (["--stop", ""], "stop: must be texts of a letter at least, got an empty one"),
        (["--device", "xpu"], "device: must be cpu, or cuda where there is one, got 'xpu'"),
    ],
)
def test_generate_refuses(
    arguments: list[str], sentence: str, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refused(capfd, "generate", "--checkpoint", str(trained / "out"), *arguments)
    assert line.startswith(sentence)


def test_a_bias_is_of_a_token(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--checkpoint", "x", "--logit-bias", "cat=1"])
    assert "--logit-bias: must be TOKEN=X, got 'cat=1'" in capfd.readouterr().err


def test_generate_refuses_what_is_no_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refused(capfd, "generate", "--checkpoint", str(tmp_path))
    assert line == f"checkpoint: must be a folder with a config.json, got {tmp_path}"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_generate_refuses_a_truncated_checkpoint(
    name: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(trained / "out", copied)
    (copied / name).write_bytes((copied / name).read_bytes()[:-9])
    line = refused(capfd, "generate", "--checkpoint", str(copied))
    assert line.startswith(f"checkpoint: {name} must be readable and whole, got: ")


def test_generate_ends_quietly_when_its_reader_leaves(trained: Path) -> None:
    command_line = [
        *PROGRAM,
        "generate",
        "--checkpoint",
        str(trained / "out"),
        "--temperature",
        "0",
    ]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command_line, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(write)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
