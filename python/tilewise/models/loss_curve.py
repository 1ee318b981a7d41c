"""The losses of a training run as a picture."""

from collections.abc import Sequence
from pathlib import Path

SMOOTHED_OVER = 20  # steps; the curve of single batches is mostly noise


def draw_loss_curve(
    file: str | Path, losses: Sequence[float], validation: Sequence[tuple[int, float]]
) -> None:
    """Write a PNG of training and validation loss by step; an older one stays until it is whole.

    Args:
        file: Where to.
        losses: Training loss of steps 1, 2, ...
        validation: Pairs of step and validation loss.

    Raises:
        OSError: If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9db4d6", linewidth=0.8, label="training, a batch")
    if len(losses) > SMOOTHED_OVER:
        axes.plot(steps, smoothed(losses), color="#2b5797", label="training, mean of 20 steps")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="#d1602b", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    file = Path(file)
    unfinished = file.with_name(f".{file.name}")
    figure.savefig(unfinished, format="png")
    unfinished.replace(file)


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and those just before it, `SMOOTHED_OVER` at most."""
    means = []
    total = 0.0
    for step, loss in enumerate(losses):
        total += loss - (losses[step - SMOOTHED_OVER] if step >= SMOOTHED_OVER else 0.0)
        means.append(total / min(step + 1, SMOOTHED_OVER))
    return means
