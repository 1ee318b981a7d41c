"""The picture of the losses."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from tilewise.models.loss_curve import draw_loss_curve, smoothed


def test_the_loss_curve_is_a_picture(tmp_path: Path) -> None:
    draw_loss_curve(
        tmp_path / "loss.png", [3.0 / (i + 1) for i in range(50)], [(0, 3.0), (50, 1.0)]
    )
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
    picture = imread(tmp_path / "loss.png")
    assert picture.shape == (540, 960, 4)
    assert picture.std() > 0.05


def test_a_smoothed_curve_is_the_mean_of_the_last_twenty() -> None:
    losses = [float(i % 7) for i in range(50)]
    expected = [sum(losses[max(0, i - 19) : i + 1]) / min(i + 1, 20) for i in range(50)]
    assert smoothed(losses) == pytest.approx(expected)
