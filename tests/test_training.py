"""Training: exact to the bit, whatever interrupts it."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tilewise.models import text
from tilewise.models.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_training_state,
)
from tilewise.models.run import TrainingRun
from tilewise.models.settings import TrainingSettings
from tilewise.models.training import (
    Interrupted,
    Progress,
    advance,
    begin,
    evaluate,
    learning_rate_at,
    resume,
    train,
)

FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "training.json",
    "training.safetensors",
)
TINY: dict[str, Any] = {
    "vocab_size": 280,
    "context": 16,
    "dim": 16,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "dropout": 0.2,
    "batch": 2,
    "steps": 9,
    "warmup": 2,
    "learning_rate": 1e-2,
    "evaluate_every": 4,
    "save_every": 4,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
}


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """A file whose lines all differ, so that an order of windows can be told from another."""
    words = random.Random(7).choices(["the", "cat", "sat", "on", "a", "mat", "é", "🙂"], k=900)
    lines = [" ".join(words[i : i + 6]) for i in range(0, 900, 6)]
    file = tmp_path / "story.txt"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


@pytest.fixture
def tiny(story: Path) -> TrainingSettings:
    return TrainingSettings(data=(str(story),), **TINY)


def test_training_learns(story: Path, tmp_path: Path) -> None:
    story.write_text("the cat sat on the mat.\n" * 300)
    settings = TrainingSettings(
        data=(str(story),), **TINY | {"steps": 60, "dropout": 0.0, "evaluate_every": 60}
    )
    history = train(settings, tmp_path / "out").history
    assert [step for step, _ in history.validation] == [0, 60]
    assert len(history.losses) == 60
    assert history.validation[1][1] < history.validation[0][1] / 2
    assert history.losses[-1] < history.losses[0] / 2


def test_training_leaves_random_states_and_threads_alone(
    tiny: TrainingSettings, tmp_path: Path
) -> None:
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    train(tiny, tmp_path / "out")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), torch.get_num_threads())


def losses_of(run: TrainingRun) -> tuple[list[float], list[tuple[int, float]]]:
    return run.history.losses, run.history.validation


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES if name != "training.json"}


KILLED = """
import json, os, signal, sys
from tilewise.models.training import TrainingSettings, train
def die(progress):
    if progress.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
train(TrainingSettings(**json.loads(sys.argv[1])), "killed", die)
"""
WHOLE_AND_RESUMED = """
import json, sys
from tilewise.models.training import TrainingSettings, advance, resume, train
train(TrainingSettings(**json.loads(sys.argv[1])), "whole")
run = resume("killed")
assert run.step == 4, run.step  # the last multiple of save_every
advance(run)
"""


def test_a_killed_run_goes_on_to_the_same_bits(story: Path, tmp_path: Path) -> None:
    """Numba, fp32, dropout, two threads, two batches a step; in processes of their own."""
    settings = TINY | {"data": [str(story)], "backend": "numba", "threads": 2, "accumulate": 2}
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # leave the cores to other tests
    codes = []
    for script in (KILLED, WHOLE_AND_RESUMED):
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(settings)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        codes.append((done.returncode, done.stderr))
    assert codes == [(-signal.SIGKILL, ""), (0, "")]
    whole, resumed = (load_training_state(tmp_path / name) for name in ("whole", "killed"))
    for name in ("losses", "validation"):
        assert whole.record["history"][name] == resumed.record["history"][name]
    assert len(whole.record["history"]["losses"]) == 9
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "whole")


def test_the_loss_curve_is_that_of_the_reference(tiny: TrainingSettings, tmp_path: Path) -> None:
    """One weight is head and embedding: its gradient is the sum of both."""
    ours, reference = (
        train(dataclasses.replace(tiny, backend=name), tmp_path / str(name))
        for name in (None, "reference")
    )
    torch.testing.assert_close(ours.history.losses, reference.history.losses)


def test_dropout_and_order_depend_on_the_seed(tiny: TrainingSettings, tmp_path: Path) -> None:
    runs = [
        train(dataclasses.replace(tiny, **changes), tmp_path / str(i)).history.losses
        for i, changes in enumerate([{}, {}, {"seed": 1}, {"dropout": 0.0}])
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0] != runs[3]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupt_is_saved_and_goes_on_to_the_same_bits(
    precision: str, tiny: TrainingSettings, tmp_path: Path
) -> None:
    tiny = dataclasses.replace(tiny, precision=precision)
    draws: dict[str, list[float]] = {"stopped": [], "whole": []}

    def draw(progress: Progress) -> None:
        draws["whole"] += [random.random(), torch.rand(()).item()]

    def draw_and_interrupt(progress: Progress) -> None:
        draws["stopped"] += [random.random(), torch.rand(()).item()]
        if progress.step == 3:  # no multiple of save_every
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        train(tiny, tmp_path / "stopped", draw_and_interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    random.seed(99)
    torch.manual_seed(99)
    run = resume(tmp_path / "stopped")
    assert run.step == 3
    advance(run, draw_and_interrupt)
    assert losses_of(run) == losses_of(train(tiny, tmp_path / "whole", draw))
    assert draws["stopped"] == draws["whole"]  # generators of torch and of Python


def test_every_step_draws_the_next_windows(
    tiny: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, windows = [], text.windows

    def noted(tokens: torch.Tensor, **place: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn.extend(range(place["first"], place["first"] + place["count"]))
        return windows(tokens, **place)

    monkeypatch.setattr(text, "windows", noted)
    settings = dataclasses.replace(tiny, accumulate=3, steps=4)
    train(settings, tmp_path / "out")
    advance(resume(tmp_path / "out", steps=6))
    assert drawn == list(range(6 * 3 * 2))


def test_a_second_interrupt_stops_at_once(tiny: TrainingSettings, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        train(tiny, tmp_path / "out", interrupt)
    assert caught.type is KeyboardInterrupt
    assert resume(tmp_path / "out").step == 0


def test_batches_of_a_step_are_averaged(tiny: TrainingSettings, tmp_path: Path) -> None:
    settings = dataclasses.replace(tiny, accumulate=2, dropout=0.0, steps=1, clip=1e-3)
    reports: list[Progress] = []
    run = begin(settings, tmp_path / "out")
    parts = [
        run.model.loss(*text.windows(run.corpus.training, context=16, seed=0, first=2 * i, count=2))
        / 2
        for i in range(2)
    ]
    for part in parts:
        part.backward()
    gradients = [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
    run.model.zero_grad()
    advance(run, reports.append)
    assert reports[0].loss == parts[0].item() + parts[1].item()
    assert reports[0].gradient_norm == float(torch.nn.utils.get_total_norm(gradients))
    moments = [run.optimizer.state[p]["exp_avg"] for p in run.model.parameters()]
    clipped = torch.nn.utils.get_total_norm(moments) / (1 - 0.9)
    assert 0.99e-3 < float(clipped) < 1.01e-3  # what the optimizer saw has the norm `clip`


def test_only_matrices_decay(tiny: TrainingSettings, tmp_path: Path) -> None:
    run = begin(tiny, tmp_path / "out")
    decay = {
        p: group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]
    }
    names = dict(run.model.named_parameters())
    assert decay.keys() == set(names.values())
    assert all(decay[p] == (0.1 if p.ndim == 2 else 0.0) for p in names.values())
    assert {p.ndim for p in names.values()} == {1, 2}


def test_the_learning_rate_warms_up_then_falls_to_a_tenth() -> None:
    settings = TrainingSettings(steps=100, warmup=10, learning_rate=1.0)
    rates = [learning_rate_at(settings, step) for step in range(101)]
    assert rates[:11] == [(step + 1) / 10 for step in range(10)] + [1.0]
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55)  # half way down
    assert rates[100] == pytest.approx(0.1)


def test_validation_has_no_dropout_and_sees_every_window(
    tiny: TrainingSettings, tmp_path: Path
) -> None:
    run = begin(tiny, tmp_path / "out")
    count = (len(run.corpus.validation) - 1) // 16
    assert count > 2
    starts = [16 * i for i in range(count)]
    run.model.eval()
    with torch.no_grad():
        parts = [
            float(run.model.loss(*text.pick(run.corpus.validation, starts[i : i + 2], 16)))
            * len(starts[i : i + 2])
            for i in range(0, count, 2)
        ]
    run.model.train()
    assert evaluate(run) == sum(parts) / count
    assert run.model.training


def test_bf16_is_autocast_over_fp32_weights(tiny: TrainingSettings, tmp_path: Path) -> None:
    run = begin(dataclasses.replace(tiny, precision="bf16"), tmp_path / "out")
    seen = set()
    for module in run.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    advance(run)
    assert seen == {torch.bfloat16}
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    assert {x.dtype for x in (*run.model.parameters(), *moments)} == {torch.float32}
    assert run.history.losses[-1] < run.history.losses[0]


def test_two_runs_cannot_share_a_folder(tiny: TrainingSettings, tmp_path: Path) -> None:
    second = begin(tiny, tmp_path / "out")

    def intrude(progress: Progress) -> None:
        with pytest.raises(BlockingIOError, match="another run is training into it"):
            advance(second)

    train(tiny, tmp_path / "out", intrude)


def test_a_loss_that_is_not_finite_stops_the_run(tiny: TrainingSettings, tmp_path: Path) -> None:
    settings = dataclasses.replace(tiny, learning_rate=1e30, warmup=0)
    with pytest.raises(FloatingPointError, match="must stay finite, got .* a lower learning rate"):
        train(settings, tmp_path / "out")
    weights = load_checkpoint(tmp_path / "out").model.parameters()
    assert all(bool(p.isfinite().all()) for p in weights)


@pytest.mark.slow
def test_a_compiled_model_trains_and_resumes(tiny: TrainingSettings, tmp_path: Path) -> None:
    settings = dataclasses.replace(tiny, compile=True, steps=30)
    losses = train(settings, tmp_path / "out").history.losses
    assert losses[-1] < losses[0]
    run = resume(tmp_path / "out", steps=31, compile=False)
    advance(run)
    assert run.history.losses[:30] == losses
    assert run.history.losses[30] < losses[0]


# --- What a caller can get wrong.


def test_another_text_cannot_be_gone_on_with(
    tiny: TrainingSettings, story: Path, tmp_path: Path
) -> None:
    train(tiny, tmp_path / "out")
    story.write_text(story.read_text("utf-8") + "more\n", "utf-8")
    with pytest.raises(ValueError, match="data: must be the text the checkpoint was trained on"):
        resume(tmp_path / "out", steps=20)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ({"settings": {}}, r"training\.json must describe a run"),
        ({"step": None}, r"training\.json must describe a run"),
        ({"random": [3, [1, 2], None]}, "the state of Python's random must be one"),
    ],
)
def test_a_record_that_describes_no_run_is_refused(
    tiny: TrainingSettings, tmp_path: Path, damage: dict[str, Any], sentence: str
) -> None:
    train(tiny, tmp_path / "out")
    file = tmp_path / "out" / "training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(CheckpointError, match=sentence):
        resume(tmp_path / "out", steps=20)


@pytest.mark.parametrize("absent", ["optimizer/norm.weight/exp_avg", "random/torch"])
def test_a_state_with_a_tensor_missing_is_refused(
    tiny: TrainingSettings, tmp_path: Path, absent: str
) -> None:
    train(tiny, tmp_path / "out")
    file = tmp_path / "out" / "training.safetensors"
    tensors = load_file(file)
    del tensors[absent]
    save_file(tensors, file)
    with pytest.raises(
        CheckpointError, match=f"{absent} in training.safetensors must be .* absent"
    ):
        resume(tmp_path / "out", steps=20)
