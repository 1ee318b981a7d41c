"""What a training run may be asked to do."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tilewise.models.run import begin
from tilewise.models.settings import TrainingSettings


@pytest.mark.parametrize(
    ("has", "precision"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")],
)
def test_bf16_is_chosen_where_the_cpu_multiplies_it(
    has: dict[str, bool], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert TrainingSettings(device="cpu").decided().precision == precision
    assert TrainingSettings(device="cpu", precision="fp32").decided().precision == "fp32"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"batch": -2}, "batch: must be at least 1, got -2"),
        ({"threads": 0}, "threads: must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: must be positive and finite, got nan"),
        ({"clip": 0.0}, "clip: must be positive and finite, got 0.0"),
        ({"warmup": -1}, "warmup: must be at least 0"),
        ({"seed": 2**63}, "seed: must be at least 0, and below"),
        ({"precision": "fp8"}, "precision: must be one of auto, fp32, bf16, got 'fp8'"),
        ({"backend": "mps"}, "backend: must be one of cuda, numba, triton, reference, got 'mps'"),
        ({"heads": 5}, "decoder: dim must be a multiple of heads, got 16 and 5"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainingSettings(**{"dim": 16, "heads": 2} | changes)


def test_a_device_that_is_not_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: must be cpu, or cuda where there is one, got 'x"):
        begin(TrainingSettings(device="xpu"), tmp_path / "out")
