"""The clock and what is timed by it: order, sums, green first, budget."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from tilewise import bench, clock, machine
from tilewise.check import converted, outputs_and_grads, standard_of
from tilewise.native import EMULATED
from tilewise.op import INTERPRETED, OPS
from tilewise.verify import ahead_of_time

ROW_KEYS = [
    "op", "direction", "device", "dtype", "size", "provider", "threads", "seconds", "host_seconds",
    "p10", "p90", "ratio", "bytes", "flops", "error", "peak_bytes",
]  # fmt: skip
SIZE = {"rows": 64, "cols": 32}
SMALL = replace(OPS["rms_norm"], workloads=[SIZE, {"rows": 2, "cols": 8}])


def run(*works, threads=(1,), **options):
    options = {"compiled": False, "seconds_each": 0.001, "backend": "numba"} | options
    return list(bench.run(works, "cpu", threads, **options))[-1]


def work(op=SMALL, dtype=torch.float32):
    return bench.Work(op, SIZE, dtype)


@pytest.fixture(autouse=True)
def quick_roof(monkeypatch):
    """The real one takes a second, and has a test of its own."""
    monkeypatch.setattr(
        bench, "measure_roof", lambda device, dtype: clock.Roof(device, 1, "float32", 1e9, 1e9)
    )


@pytest.mark.parametrize("part, value", [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.1, 1.3)])
def test_quantile(part, value):
    assert clock.quantile([4.0, 1.0, 3.0, 2.0], part) == pytest.approx(value)


def test_calls_are_interleaved_and_nobody_always_follows_the_same(monkeypatch):
    monkeypatch.setattr(clock, "SHORTEST", 0.0)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = clock.interleaved(calls, "cpu", 1e-9)
    assert [len(s.seconds) for s in samples.values()] == [clock.FEWEST] * 3
    timed = "".join(order[-3 * clock.FEWEST :])
    assert [timed[i : i + 3] for i in range(0, len(timed), 3)] == [
        "abc",
        "bca",
        "cab",
        "abc",
        "bca",
    ]


def test_the_clock_tells_slow_from_fast():
    x = torch.ones(1 << 16)
    samples = clock.interleaved({"one": lambda: x + 1, "none": lambda: None}, "cpu", 0.01)
    one, none = (clock.summary(samples[name]) for name in ("one", "none"))
    assert one["p10"] <= one["seconds"] <= one["p90"]
    assert one["host_seconds"] > 3 * none["host_seconds"] > 0


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.ones(1 << 18)

    def held_and_freed():
        twice = (x + 1) * 2
        return twice + 1

    assert clock.peak_bytes(lambda: x + 1, "cpu") == pytest.approx(x.nbytes, rel=1e-3)
    assert clock.peak_bytes(held_and_freed, "cpu") == pytest.approx(2 * x.nbytes, rel=1e-3)


def test_the_share_of_the_roof_is_that_of_the_nearer_one():
    roof = clock.Roof("cpu", 1, "float32", copy_bytes_per_second=1e9, matmul_flops_per_second=1e12)
    assert roof.share(2.0, 10**9, None) == pytest.approx(0.5)
    assert roof.share(2.0, 10**9, 15 * 10**11) == pytest.approx(0.75)
    assert roof.share(2.0, None, None) is None


def test_the_roof_is_measured():
    roof = clock.measure_roof("cpu", torch.float32)
    assert roof.threads == torch.get_num_threads()
    assert 1e8 < roof.copy_bytes_per_second < 1e13
    assert 1e8 < roof.matmul_flops_per_second < 1e15


def test_rows_have_exactly_the_promised_keys():
    report = run(work(), backend=None)
    assert [list(asdict(row)) for row in report.rows] == [ROW_KEYS] * 6
    assert {(row.provider, row.direction) for row in report.rows} == {
        (provider, direction)
        for provider in ("reference", "torch", "numba")
        for direction in bench.DIRECTIONS
    }
    document = json.loads(json.dumps(report.as_json({"cpu": "one"})))
    assert document["machine"]["cpu"] == "one"
    assert document["machine"]["roofs"][0]["copy_bytes_per_second"] == 1e9
    interpreted = "is interpreted, not worth the clock"
    assert {entry["provider"]: entry["reason"] for entry in document["untimed"]} == {
        "cuda": "is emulated, not worth the clock" if EMULATED else "runs on cuda, got cpu",
        "triton": interpreted if INTERPRETED else "runs on cuda, got cpu",
    }


def test_the_ratio_is_pytorch_over_the_provider():
    rows = {(r.provider, r.direction): r for r in run(work()).rows}
    for direction in bench.DIRECTIONS:
        peer, ours = rows["torch", direction], rows["numba", direction]
        assert peer.ratio == 1.0
        assert ours.ratio == pytest.approx(peer.host_seconds / ours.host_seconds)
    without = {r.provider: r for r in run(work(replace(SMALL, native=None))).rows}
    assert "torch" not in without
    assert without["reference"].ratio == 1.0


def test_torch_compile_is_a_provider():
    report = run(work(), compiled=True)
    assert [r.direction for r in report.rows if r.provider == "torch.compile"] == [
        *bench.DIRECTIONS
    ]


def test_what_is_wrong_is_not_timed():
    def wrong(x, *tensors, backend, **options):
        return OPS["rms_norm"].reference(x, *tensors, **options) * 1.01

    report = run(work(replace(SMALL, call=wrong)))
    assert "numba" not in {row.provider for row in report.rows}
    said = {entry.direction: entry.reason for entry in report.untimed}
    assert said["forward"].startswith("out: error ")
    assert "dx: error " in said["forward+backward"]


def test_what_raises_is_not_timed_and_stops_nobody():
    def broken(*tensors, backend, **options):
        raise ZeroDivisionError("no such kernel\nand more")

    report = run(work(replace(SMALL, call=broken)))
    assert {row.provider for row in report.rows} == {"reference", "torch"}
    assert {entry.reason for entry in report.untimed} == {"ZeroDivisionError: no such kernel"}


def test_without_gradients_the_forward_pass_is_timed():
    def forward_only(x, *tensors, backend, **options):
        if x.requires_grad:
            raise NotImplementedError("has no backward")
        return OPS["rms_norm"].reference(x, *tensors, **options)

    report = run(work(replace(SMALL, call=forward_only)))
    assert [r.direction for r in report.rows if r.provider == "numba"] == ["forward"]
    said = [(u.provider, u.direction, u.reason) for u in report.untimed]
    assert said == [("numba", "forward+backward", "NotImplementedError: has no backward")]


def test_a_peer_outside_the_rule_is_timed_and_named():
    def rough(*tensors, **options):
        return OPS["rms_norm"].reference(*tensors, **options) * 1.01

    report = run(work(replace(SMALL, native=rough)))
    assert {entry.provider for entry in report.inexact} == {"torch"}
    assert {row.provider for row in report.rows} == {"reference", "torch", "numba"}
    assert not report.untimed


def test_without_a_gradient_there_is_one_direction():
    report = run(work(replace(SMALL, constants=frozenset({0, 1}))))
    assert {row.direction for row in report.rows} == {"forward"}


@pytest.mark.parametrize(
    "name, size, cold",
    [
        ("rms_norm", SIZE, True),
        ("attention_decode", {"lengths": (64,), "heads": 8, "kv_heads": 2, "dim": 16}, True),
        ("attention", {"batch": 1, "heads": 1, "kv_heads": 1, "seq_q": 64, "seq_k": 64, "dim": 16},
         False),
    ],
)  # fmt: skip
def test_what_the_memory_bounds_is_cold_on_a_gpu(name, size, cold, monkeypatch):
    """Decoding too, for all its products."""
    asked = []
    monkeypatch.setattr(bench, "_timed", lambda *arguments: asked.append(arguments[-1]) or {})
    inputs = OPS[name].inputs
    op = replace(OPS[name], inputs=lambda device, **size: inputs(device="cpu", **size))
    for device in ("cuda", "cpu"):
        list(bench._measure(bench.Work(op, size, torch.bfloat16), device, 1, "numba", False, 0.0))
    half = len(asked) // 2
    assert half and set(asked[:half]) == {cold} and not any(asked[half:])


def test_an_input_that_does_not_fit_is_said():
    def inputs(**size):
        raise RuntimeError("not enough memory")

    report = run(work(replace(SMALL, inputs=inputs)))
    assert not report.rows
    assert [entry.reason for entry in report.untimed] == ["RuntimeError: not enough memory"]


def test_bytes_and_flops():
    op = replace(SMALL, flops=lambda *tensors, **options: 7)
    tensors, options = op.inputs(**SIZE, device="cpu", dtype=torch.float32)
    standard = standard_of(op, tensors, options)
    x, weight = tensors[:2]
    forward, both = (
        bench.cost_of(op, tensors, options, standard, direction) for direction in bench.DIRECTIONS
    )
    assert forward == {"bytes": 2 * x.nbytes, "flops": 7}
    assert both == {"bytes": 2 * x.nbytes + 2 * x.nbytes + weight.nbytes, "flops": 21}


def test_the_most_important_work_comes_first():
    other = replace(SMALL, name="other", workloads=[SIZE])
    order = [str(w) for w in bench.works([SMALL, other], "cpu")]
    assert order == [
        "rms_norm float32 rows=64 cols=32",
        "other float32 rows=64 cols=32",
        "rms_norm bfloat16 rows=64 cols=32",
        "other bfloat16 rows=64 cols=32",
        "rms_norm float32 rows=2 cols=8",
        "rms_norm bfloat16 rows=2 cols=8",
    ]
    assert [str(w) for w in bench.works([SMALL, other], "cpu", quick=True)] == order[:2]
    product = replace(SMALL, flops=lambda *tensors, **options: 1)
    assert [w.op for w in bench.works([product, other], "cpu", quick=True)] == [other, product]
    assert all(w.dtype == torch.float64 for w in bench.works([SMALL], "cpu", torch.float64))


def test_a_gpu_has_workloads_of_its_own_before_the_others(monkeypatch):
    own = replace(SMALL, workloads=[SIZE], gpu_workloads=[{"rows": 8, "cols": 8}])
    others = ["rms_norm float32 rows=64 cols=32", "rms_norm bfloat16 rows=64 cols=32"]
    assert [str(w) for w in bench.works([own], "cpu")] == others
    first = "rms_norm bfloat16 rows=8 cols=8"
    assert [str(w) for w in bench.works([own], "cuda")] == [first, *others[::-1]]
    assert [str(w) for w in bench.works([own], "cuda", quick=True)] == [first]
    asked = [str(w) for w in bench.works([own], "cuda", torch.float32)]
    assert asked == [first.replace("bfloat16", "float32"), others[0]]


def test_workloads_of_a_gpu_are_compiled_ahead_of_time():
    own = replace(SMALL, gpu_workloads=[{"rows": 8, "cols": 8}])
    for sizes in (ahead_of_time.sizes_to_launch, ahead_of_time.few_sizes):
        assert sizes(own) == [*sizes(SMALL), {"rows": 8, "cols": 8}]


# By what lengths are divided, and by what the bytes are then: scores by the square.
SHRUNK = {"attention": (16, 256), "attention_varlen": (16, 256), "attention_decode": (64, 64)}


def scores(size):
    """How many the reference has: it pads sequences to the longest."""
    if "seq_q" in size:
        return size["heads"] * size["seq_q"] * size["seq_k"]
    return size["heads"] * len(size["lengths"]) * torch.tensor(size["lengths"]).max()


def shrunk(value, by):
    if isinstance(value, tuple):
        return tuple(shrunk(each, by) for each in value)
    return value // by or 1


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.gpu_workloads])
def test_the_references_of_a_gpus_own_workloads_fit_there(name):
    """In fp64 with gradients beside all else, on an H200: foretold by the same in small."""
    op, (by, growth) = OPS[name], SHRUNK[name]
    size = max(op.gpu_workloads, key=scores)
    long = {n: shrunk(v, by) for n, v in size.items() if n in ("seq_q", "seq_k", "lengths")}
    long |= {n: max(long["lengths"]) for n in ("capacity",) if n in size}
    tensors, options = op.inputs(**size | long, device="cpu", dtype=torch.bfloat16)
    double = converted(tensors, torch.float64)
    most = sum(t.nbytes for t in (*double, *tensors) if t is not None)
    most += clock.peak_bytes(partial(outputs_and_grads, op, op.reference, double, options), "cpu")
    assert 20 * 2**30 < most * growth < 100 * 2**30


def test_the_budget_is_kept_and_what_is_dropped_is_said():
    report = run(work(), work(dtype=torch.bfloat16), work(dtype=torch.float16), budget=1e-6)
    assert {row.dtype for row in report.rows} == set()
    assert report.dropped == [
        f"rms_norm {dtype} rows=64 cols=32" for dtype in ("float32", "bfloat16", "float16")
    ]


def test_a_costly_op_does_not_drop_the_cheap_ones(monkeypatch):
    now = [0.0]
    seconds = {"a": 60.0, "b": 1.0}

    def measure(work, *rest):
        now[0] += seconds[work.op.name]
        return iter(())

    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(bench, "_measure", measure)
    a, b = (work(replace(SMALL, name=name)) for name in "ab")
    assert run(b, a, b, b, a, budget=90).dropped == [str(a)]
    assert run(a, b, a, budget=90).dropped == [str(b), str(a)]


def test_what_a_stopped_run_has_not_reached_is_dropped():
    steps = bench.run(
        [work(), work(dtype=torch.bfloat16), work(dtype=torch.float16)], "cpu", (1,),
        compiled=False, seconds_each=0.001, backend="numba",
    )  # fmt: skip
    document = next(steps).as_json({})
    assert {row["dtype"] for row in document["rows"]} == {"float32"}
    assert document["dropped"] == [
        f"rms_norm {dtype} rows=64 cols=32" for dtype in ("bfloat16", "float16")
    ]


def test_each_number_of_threads_is_timed_and_the_callers_restored():
    before = torch.get_num_threads()
    report = run(work(), threads=(2, 1))
    assert [row.threads for row in report.rows[:: len(report.rows) // 2]] == [2, 1]
    assert torch.get_num_threads() == before


def test_largest_error():
    truth = torch.tensor([1.0, float("inf"), 3.0], dtype=torch.float64)
    assert bench.largest_error(truth.float(), truth) == 0.0
    assert bench.largest_error(truth.float() + 0.5, truth) == 0.5
    assert bench.largest_error(truth[:2].float(), truth) == float("inf")
    assert bench.largest_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == 1.0


def test_the_machine_is_described(monkeypatch):
    monkeypatch.setenv("TILEWISE_COMMIT", "abc123")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    here = json.loads(json.dumps(machine.describe()))
    assert here["commit"] == "abc123"
    assert "MALLOC_ARENA_MAX=1" in here["allocator"]
    assert here["versions"]["torch"] == torch.__version__
    assert here["cpu_cores"] >= 1
    name = machine.device_name("cpu")
    assert name
    assert all(word.isalnum() for word in name.split("-"))


def test_the_commit_is_that_of_the_checkout(monkeypatch, tmp_path):
    monkeypatch.delenv("TILEWISE_COMMIT", raising=False)
    head = machine.commit()
    assert head == "unknown" or len(head.removesuffix("-changed")) == 12
    monkeypatch.setattr(machine, "SOURCE_ROOT", tmp_path)
    assert machine.commit() == "unknown"
