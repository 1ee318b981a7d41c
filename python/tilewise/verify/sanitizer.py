"""Run Triton kernels in an interpreter that computes as the GPU does and watches their memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random

from tilewise.verify import session
from tilewise.verify.findings import Report, SanitizerError
from tilewise.verify.session import ORDERS, Session


@contextmanager
def sanitize(order: str = "forward", seed: int = 0) -> Iterator[Report]:
    """Watch every Triton kernel that is launched in the block.

    A wrong access is noted and not made, and the kernel goes on. Memory of `torch.empty` counts as
    unwritten until something is written to it. Blocks may be nested: the inner one watches.

    Args:
        order: In which order the programs of a launch run: "forward", "reverse" or "random".
        seed: Of the random order; it also chooses the configuration of an autotuned kernel.

    Yields:
        The report, to look at or to `clear`.

    Raises:
        SanitizerError: At the end of the block, if it ends by itself and the report is not empty.
        ValueError: For an order of another name.
        TypeError: For a seed that is no int.
        RuntimeError: If Triton compiles in this process: `TRITON_INTERPRET=1` must be set before
            the kernels are defined.
    """
    if order not in ORDERS:
        raise ValueError(f"sanitize: order must be one of {', '.join(ORDERS)}, got {order!r}")
    if not isinstance(seed, int):
        raise TypeError(f"sanitize: seed must be an int, got {type(seed).__name__}")
    import triton
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("sanitize: TRITON_INTERPRET must be 1, got a process that compiles")
    from tilewise.verify.interpreter import repair
    from tilewise.verify.poison import poisoned_empties

    repair()
    report, builder = Report(), interpreter.interpreter_builder
    outer, options = session.active, builder.options
    session.active = Session(order, seed, report, Random(seed))
    builder.options = replace(options, debug=True)  # turns tl.device_assert on
    try:
        with poisoned_empties():
            yield report
    except BaseException as error:
        if report.findings:
            error.add_note(f"The sanitizer had found:\n{report}")
        raise
    finally:
        session.active, builder.options = outer, options
    if report.findings:
        raise SanitizerError(report)
