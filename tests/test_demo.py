"""`tilewise demo`, with little training and nothing timed at length."""

import pytest

from tilewise import cli, clock
from tilewise.check import Result
from tilewise.cli import demo

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def hurried(monkeypatch):
    """Check one op, and time none."""
    monkeypatch.setattr(demo, "FALL", 0.05)
    ops = demo.named_ops(["rms_norm"])
    monkeypatch.setattr(demo, "named_ops", lambda names: ops)
    monkeypatch.setattr(demo, "race", lambda training, device, seconds: (["a", "b"], [2.0, 0.5]))


def test_it_shows_everything_and_leaves_a_picture(hurried, capsys, tmp_path):
    folder = tmp_path / "demo"
    status = cli.main(["demo", "--out", str(folder), "--steps", "8", "--device", "cpu"])
    out = capsys.readouterr().out
    assert status == 0, out
    headlines = [line for line in out.splitlines() if line.startswith("== ")]
    assert len(headlines) == 5
    assert "every op checked: all right" in out
    assert out.count("validation loss ") == 8
    assert demo.PROMPT in out
    assert (folder / "demo.png").read_bytes()[:8] == PNG
    assert (folder / "decoder" / "loss.png").exists()


def test_an_old_folder_is_refused(capsys, tmp_path):
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("tilewise demo: --out: must be a new folder, got ")


def test_a_wrong_op_is_counted(monkeypatch):
    wrong = Result("a", "b", "cpu", "float32", {}, "out", 2.0, 1.0, ok=False)
    monkeypatch.setattr(demo, "chosen_cases", lambda *case, quick: [])
    assert demo.check("cpu") == 0
    monkeypatch.setattr(demo, "with_progress", lambda items, what, total: [None, None])
    monkeypatch.setattr(demo, "one", lambda case, device: [wrong])
    assert demo.check("cpu") == 2


def test_as_many_steps_as_there_is_time(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(demo, "advance", lambda training, report: taken.append(training.settings))
    for seconds, steps in ((1e-3, demo.MOST_STEPS), (1.0, 75), (1e3, demo.FEWEST_STEPS)):
        monkeypatch.setattr(demo, "step_seconds", lambda training, seconds=seconds: seconds)
        demo.train(tmp_path / str(steps), None, "cpu")
        assert taken[-1].steps == taken[-1].save_every == steps


def test_the_race_is_fused_against_plain(monkeypatch):
    preferred = []
    monkeypatch.setattr(demo, "batch_step", lambda training, *backends: preferred.append(backends))
    samples = {
        "plain": clock.Samples([4.0], [4.0]),
        "fused": clock.Samples([2.0], [2.0]),
    }

    def interleaved(calls, device, seconds):
        for call in calls.values():
            call()
        return samples

    monkeypatch.setattr(clock, "interleaved", interleaved)
    assert demo.step_ratio(None, "cpu") == 2.0
    assert preferred == [("reference",), ()]
