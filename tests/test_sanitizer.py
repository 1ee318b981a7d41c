"""The sanitizer: every seeded bug is found on its line, and nothing where there is none."""

import inspect
import math
import re

import pytest
import torch
import triton
import triton.language as tl
from cases import MAIN_DTYPES, label, leaves, unless

from tilewise.check import cases
from tilewise.choice import refusal
from tilewise.op import INTERPRETED, OPS
from tilewise.verify import SanitizerError, sanitize
from tilewise.verify.findings import near

if not INTERPRETED:
    pytest.skip("Triton compiles in this process", allow_module_level=True)

import seeded_bugs
from seeded_bugs import SEEDED

NAMES = [seeded.kernel.fn.__name__ for seeded in SEEDED]


def line_of_the_bug(kernel):
    lines, first = inspect.getsourcelines(kernel.fn)
    marked = [first + i for i, line in enumerate(lines) if line.rstrip().endswith("# bug")]
    assert len(marked) == 1
    return marked[0]


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("seeded", SEEDED, ids=NAMES)
def test_a_seeded_bug_is_found_on_its_line(seeded, order):
    with sanitize(order, seed=1) as report:
        seeded.run(True)
        found = list(report.findings)
        report.clear()
    lines = [
        {f.line} | ({f.other[1]} if f.other else set())  # a race has two
        for f in found
        if (f.kind, f.argument) == (seeded.kind, seeded.argument)
    ]
    assert line_of_the_bug(seeded.kernel) in set().union(*lines), found
    assert {f.kernel for f in found} == {seeded.kernel.fn.__name__}
    assert {f.file for f in found} == {inspect.getsourcefile(seeded.kernel.fn)}


@pytest.mark.parametrize("seeded", SEEDED, ids=NAMES)
def test_its_clean_twin_has_no_finding_in_20_orders(seeded):
    for seed in range(20):
        with sanitize("random", seed):
            seeded.run(False)


def is_something(lengths):
    """Whether any number in a tuple, or a tuple of tuples, is above 0."""
    return any(map(is_something, lengths)) if isinstance(lengths, tuple) else lengths > 0


def smallest_cases():
    """Each op with a Triton kernel, in each dtype, at the sizes that take few programs.

    Those whose last number is no power of two come first: else no block has an end to respect.
    """
    found = []
    for op in (op for op in OPS.values() if "triton" in op.backends):
        numbers = [[v for v in s.values() if type(v) is int] for s in op.sizes]
        tuples = [[v for v in s.values() if isinstance(v, tuple)] for s in op.sizes]
        some = [
            i for i, n in enumerate(numbers) if 0 not in n and all(map(is_something, tuples[i]))
        ]
        some.sort(key=lambda i: (numbers[i][-1].bit_count() == 1, math.prod(numbers[i])))
        for backend, dtype, size in cases(op):
            sizes = [op.sizes[i] for i in some[:2]]
            if backend == "triton" and size in sizes:
                name = label(op, backend, dtype, size)
                marks = unless((dtype, size) in zip(MAIN_DTYPES, sizes, strict=False))
                found.append(pytest.param(op, dtype, size, id=name, marks=marks))
    return found


SMALLEST = smallest_cases()


def run_without_a_finding(op, dtype, size, seeds):
    torch.manual_seed(0)
    tensors, options = op.inputs(**size, device="cpu", dtype=dtype)
    if refused := refusal(op.backends["triton"], *tensors, **options):
        pytest.skip(f"triton: {refused[1]}")
    for seed in seeds:
        with sanitize("random", seed) as report:
            outs = op.call(*leaves(op, tensors), **options, backend="triton")
            outs = outs if isinstance(outs, tuple) else (outs,)
            loss = [out.float().sum() for out in outs if out.requires_grad]
            if loss:
                sum(loss).backward()
            assert report.launches > 0


@pytest.mark.parametrize("op, dtype, size", SMALLEST)
def test_a_shipped_kernel_has_no_finding_in_3_orders(op, dtype, size):
    run_without_a_finding(op, dtype, size, range(3))


@pytest.mark.slow
@pytest.mark.parametrize("op, dtype, size", SMALLEST)
def test_a_shipped_kernel_has_no_finding_in_20_orders(op, dtype, size):
    run_without_a_finding(op, dtype, size, range(20))


def findings_of(seeded_kernel, order="forward", seed=0):
    seeded = next(s for s in SEEDED if s.kernel is seeded_kernel)
    with sanitize(order, seed) as report:
        seeded.run(True)
        found = list(report.findings)
        report.clear()
    return found


def test_a_finding_says_where_and_what():
    [found] = findings_of(seeded_bugs.past_the_row)
    assert (found.kernel, found.program, found.lane) == ("past_the_row", (0, 0, 0), (50,))
    assert (found.argument, found.offset, found.address) == ("x_ptr", 50, 200)
    assert found.what == (
        "load of 4 bytes by 1 lane outside x_ptr, float32 [4, 50], strides (64, 1)"
    )
    assert str(found).splitlines() == [
        f"out of bounds: {found.what}",
        f"    {near(found.file)}:{found.line}: {found.text}",
        "    in past_the_row, program (0, 0, 0), lane (50,), x_ptr +50 elements (+200 bytes)",
    ]
    assert found.text.startswith("x = tl.load(x_ptr + row * x_stride + col")


def test_a_race_names_both_sides():
    [found] = findings_of(seeded_bugs.overlapping_blocks)
    assert (found.program, found.lane, found.offset) == (((1, 0, 0), (0,), 63))
    assert re.fullmatch(
        r"y_ptr is also written by program \(0, 0, 0\) at seeded_bugs.py:\d+, "
        r"in no order with this",
        found.what,
    )
    assert found.other == (found.file, found.line)


def test_a_wild_pointer_names_the_argument_it_came_from():
    """It lands in the middle of another one, where reading is allowed."""
    [found] = findings_of(seeded_bugs.into_another)
    assert (found.argument, found.offset) == ("x_ptr", 64)


def test_the_first_of_a_kind_is_kept_and_the_others_counted():
    seeded = next(s for s in SEEDED if s.kernel is seeded_bugs.past_the_row)
    with sanitize() as report:
        seeded.run(True)
        [found] = report.findings
        assert report.times(found) == 4
        assert str(report).endswith("(+200 bytes), seen 4 times")
        report.clear()
        assert str(report) == ""


def test_a_wrong_store_is_not_made():
    whole = torch.zeros(256)
    with pytest.raises(SanitizerError, match="^1 finding\nout of bounds: store"), sanitize():
        seeded_bugs.unmasked_store[(4,)](whole[:200], torch.ones(200), 200, True)
    assert torch.equal(whole, (torch.arange(256) < 200).float())


def test_a_wrong_load_yields_zeros_and_the_kernel_goes_on():
    both, y = torch.ones(128), torch.empty(64)
    with sanitize() as report:
        seeded_bugs.into_another[(1,)](y, both[:64], both[64:], True)
        assert len(report.findings) == 1
        report.clear()
    assert torch.equal(y, torch.ones(64))


def test_the_block_raises_at_its_end_with_the_report():
    with pytest.raises(SanitizerError, match="^1 finding\nlanes: ") as raised, sanitize() as report:
        seeded_bugs.two_values[(1,)](torch.zeros(16, dtype=torch.int32), True)
        assert report.launches == 1
    assert raised.value.report is report
    assert isinstance(raised.value, AssertionError)


def test_an_error_of_the_block_itself_is_not_hidden():
    with pytest.raises(KeyError) as raised, sanitize():
        seeded_bugs.two_values[(1,)](torch.zeros(16, dtype=torch.int32), True)
        raise KeyError("mine")
    assert raised.value.__notes__[0].startswith("The sanitizer had found:\nlanes: ")


def test_the_inner_of_two_blocks_watches():
    with sanitize() as outer:
        with pytest.raises(SanitizerError), sanitize():
            seeded_bugs.two_values[(1,)](torch.zeros(16, dtype=torch.int32), True)
        seeded_bugs.two_values[(1,)](torch.zeros(16, dtype=torch.int32), False)
        assert (outer.launches, outer.findings) == (1, [])


@triton.jit
def note_the_turn(turn_ptr, count_ptr):
    place = tl.program_id(0) * 6 + tl.program_id(1) * 3 + tl.program_id(2)
    tl.store(turn_ptr + place, tl.atomic_add(count_ptr, 1))


def turns(order, seed=0):
    turn, count = torch.zeros(24, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with sanitize(order, seed):
        note_the_turn[(4, 2, 3)](turn, count)
    return turn.tolist()


def test_programs_run_in_the_order_asked_for():
    assert turns("forward") == list(range(24))
    assert turns("reverse") == list(range(24))[::-1]
    assert sorted(turns("random")) == list(range(24))
    assert turns("random", 1) == turns("random", 1) != turns("random", 2)


def test_a_program_that_waits_for_a_later_one_is_stopped():
    kernel, flags = seeded_bugs.waits_for_the_next, torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    with sanitize("reverse"):
        kernel[(3,)](torch.empty(3), flags.clone())
    with sanitize("forward") as report:
        with pytest.raises(Exception, match="waits for another that has not run yet"):
            kernel[(3,)](torch.empty(3), flags.clone())
        [found] = report.findings
        report.clear()
    assert (found.kind, found.line) == ("waiting", line_of_the_bug(kernel))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("sorted",), ValueError, "sanitize: order must be one of forward, reverse, random, got"),
        (("random", 1.5), TypeError, "sanitize: seed must be an int, got float"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message), sanitize(*arguments):
        pass


@triton.jit
def two_runs(y_ptr, x_ptr, index_ptr):
    col = tl.multiple_of(tl.load(index_ptr + tl.arange(0, 16)), 8)
    tl.store(y_ptr + tl.arange(0, 16), tl.load(x_ptr + col))


@pytest.mark.parametrize("second, lane", [(40, None), (41, (8,))])
def test_a_multiple_is_where_a_rising_run_starts(second, lane):
    index = torch.cat([torch.arange(16, 24), torch.arange(second, second + 8)])
    with sanitize() as report:
        two_runs[(1,)](torch.empty(16), torch.zeros(64), index)
        found = [(f.kind, f.lane) for f in report.findings]
        report.clear()
    assert found == ([("hint", lane)] if lane else [])


def test_a_version_that_is_not_tested_is_said_with_what_is_not():
    from tilewise.verify.interpreter import untested

    assert untested("3.6.0", []) is untested("3.9.1", []) is None
    assert untested("4.0.0", []) == (
        "sanitize: triton must be 3.6 to 3.9, got 4.0.0; untested: arithmetic, reductions, "
        "memory checks, descriptors, atomics"
    )
    assert untested("3.9.0", ["ReduceOps.sum"]).endswith("got 3.9.0; untested: ReduceOps.sum")


def test_a_process_that_compiles_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with (
        pytest.raises(RuntimeError, match="sanitize: TRITON_INTERPRET must be 1, got a process"),
        sanitize(),
    ):
        pass
