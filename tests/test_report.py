"""Which sources a kernel is made of, and which results still hold for them."""

import json
import shutil
from pathlib import Path

import pytest

from tilewise import report
from tilewise.op import OPS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A copy of what kernels are made of."""
    for folder in ("csrc", "kernels"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    return tmp_path


def changed_by(root, file, old, new):
    """Which kernels have another hash once `old` is `new` in `file`."""
    before, path = report.kernel_hashes(root), root / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    after = report.kernel_hashes(root)
    return {name for name in before if before[name] != after[name]}


def of(room):
    return {f"{op.name}/{room}" for op in OPS.values() if room in op.backends}


def test_every_kernel_that_needs_a_gpu_has_a_hash():
    hashes = report.kernel_hashes(ROOT)
    assert set(hashes) == of("cuda") | of("triton")
    modules = {
        op.backends[r].module for op in OPS.values() for r in report.ROOMS if r in op.backends
    }
    assert len(set(hashes.values())) == len(modules)  # a family shares its sources
    assert hashes == report.kernel_hashes(ROOT)


@pytest.mark.parametrize(
    "file, room",
    [
        ("kernels/triton/rms_norm.py", "triton"),
        ("kernels/cuda/rms_norm.py", "cuda"),
        ("csrc/cuda/rms_norm.cu", "cuda"),
    ],
)
def test_a_kernels_own_file_counts_for_its_family_alone(checkout, file, room):
    family = {f"rms_norm/{room}", f"add_rms_norm/{room}"}
    assert changed_by(checkout, file, "eps", "epsilon") == family


@pytest.mark.parametrize(
    "file, old, room",
    [
        ("kernels/triton/_shared.py", "MAX_PARTS = 256", "triton"),
        ("kernels/cuda/_shared.py", "DTYPES", "cuda"),
        ("csrc/cuda/dtype.cuh", "#pragma once", "cuda"),
    ],
)
def test_shared_sources_count_for_those_who_use_them(checkout, file, old, room):
    changed = changed_by(checkout, file, old, old + " ")
    assert f"rms_norm/{room}" in changed
    assert changed <= of(room)


def test_a_file_of_another_name_counts_for_those_who_launch_it(checkout):
    changed = changed_by(checkout, "csrc/cuda/scored_softmax.cu", "softcap", "softcup")
    assert changed == {"softmax/cuda", "log_softmax/cuda"}


def test_flags_count_for_every_cuda_kernel(checkout):
    assert changed_by(checkout, "CMakeLists.txt", "CMAKE_CUDA_STANDARD 17", "X") == of("cuda")


def test_only_its_own_launcher_counts(checkout):
    foreign = (
        "// A comment.\ncudaError_t other_forward(void* y,\n                          int n);\n\n"
    )
    end = "}  // namespace tilewise"
    assert changed_by(checkout, "csrc/launchers.h", end, foreign + end) == set()
    mine = "cudaError_t rms_norm_forward("
    assert changed_by(checkout, "csrc/launchers.h", mine, mine + "int more, ") == {
        "rms_norm/cuda", "add_rms_norm/cuda"
    }  # fmt: skip


def results(root, name, **kernels):
    file = root / report.RESULTS / "gpu" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rows": [], "kernels": kernels}))


def test_a_kernel_is_pending_until_its_present_source_has_a_result(checkout):
    def known():
        return {kernel.name: kernel for kernel in report.kernels(checkout)}

    assert all(kernel.pending for kernel in known().values())
    digest = report.kernel_hashes(checkout)["rms_norm/triton"]
    entry = {"hash": digest, "verified": True, "timed": False}
    results(checkout, "2030-01-01-a.json", **{"rms_norm/triton": entry})
    kernel = known()["rms_norm/triton"]
    assert (kernel.verified, kernel.timed) == ("gpu/2030-01-01-a.json", "")
    assert kernel.pending

    results(checkout, "2030-01-02-b.json", **{"rms_norm/triton": entry | {"timed": True}})
    kernel = known()["rms_norm/triton"]
    assert kernel.verified == kernel.timed == "gpu/2030-01-02-b.json"
    assert not kernel.pending
    assert known()["rms_norm/cuda"].pending

    changed_by(checkout, "kernels/triton/rms_norm.py", "eps", "epsilon")
    assert known()["rms_norm/triton"].pending


def test_a_measurement_on_a_cpu_says_nothing_of_a_gpu(checkout):
    file = checkout / report.RESULTS / "cpu" / "2030-01-01-a.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"machine": {}, "rows": []}))
    assert all(kernel.pending for kernel in report.kernels(checkout))


def test_the_sources_are_found_in_a_checkout_only(monkeypatch, tmp_path, checkout):
    monkeypatch.setattr(report, "__file__", str(tmp_path / "site" / "tilewise" / "report.py"))
    assert report.sources_root(checkout) == checkout
    (checkout / "csrc" / "launchers.h").unlink()
    assert report.sources_root(checkout) is None


def test_committed_results_can_be_read():
    for file in (ROOT / report.RESULTS).rglob("*.json"):
        document = json.loads(file.read_text())
        assert document["machine"]["commit"] not in ("", "unknown"), file
        assert document["rows"], file
