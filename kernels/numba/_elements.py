"""How element ops are shared out among tasks."""

from torch import Tensor

CHUNK = 4096  # elements: long enough to hide the launch, short enough to stay in L1


def chunks(*tensors: Tensor, keep_rows: bool = False) -> tuple[int, ...]:
    """How an element op cuts [rows, cols] tensors into tasks of about CHUNK elements.

    Returns:
        tasks, rows, cols, rows of a task, cols of a task: one long row where there are no gaps,
        unless it matters to which row an element belongs. Tasks begin at multiples of 4 columns.
    """
    rows, cols = tensors[0].shape
    if keep_rows:
        pass
    elif rows == 1 or all(t.stride(0) == cols for t in tensors):
        rows, cols = 1, rows * cols
    row_step, col_step = max(CHUNK // cols, 1), min(CHUNK, cols)
    return -(-rows // row_step) * -(-cols // col_step), rows, cols, row_step, col_step
