"""How `tilewise._cuda` comes to be: the cache, and who may build when."""

import os
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tilewise
from tilewise import native, toolchain
from tilewise.op import CUDA

REMEMBERED = (
    toolchain.nvcc, toolchain.missing, toolchain.pybind11, native.mention_unbuilt, native._find
)  # fmt: skip


def forget():
    for function in REMEMBERED:
        function.cache_clear()


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A tiny checkout, an empty cache, no GPU, and tools that are all there."""
    monkeypatch.setattr(native, "EMULATED", False)
    monkeypatch.setattr(toolchain, "PACKAGE", tmp_path / "python" / "tilewise")
    monkeypatch.setattr(toolchain, "version", lambda compiler: f"version of {compiler}")
    monkeypatch.setattr(native, "_capabilities", list)
    for tool in ("nvcc", "missing"):
        monkeypatch.setattr(
            toolchain, tool, {"nvcc": lambda: "nvcc", "missing": lambda: None}[tool]
        )
    monkeypatch.setenv("TILEWISE_CACHE", str(tmp_path / "cache"))
    for name in ("TILEWISE_JIT", "TILEWISE_CUDA_ARCHS", *toolchain.FLAGS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(toolchain.sys.modules, native.MODULE, raising=False)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "CMakeLists.txt").write_text("project(tiny)")
    (tmp_path / "csrc" / "tiny.cu").write_text("int tiny;")
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


@pytest.fixture
def compiled(checkout, monkeypatch):
    """The `archs` of every compilation, which here is the writing of a file."""
    calls = []

    def compile_module(folder, into, archs, log, also):
        calls.append(archs)
        log.write_text("compiling")
        for name in (toolchain.FILE, *also):
            (into / name).write_text("half")
        time.sleep(0.1)
        (into / toolchain.FILE).write_text(f"{archs} {len(calls)}")
        return into / toolchain.FILE

    monkeypatch.setattr(toolchain, "compile_module", compile_module)
    return calls


# --- The cache.


def test_a_build_is_kept_under_the_hash_of_what_went_in(checkout, compiled):
    assert not native.is_built()
    module = native.build()
    assert module.name == toolchain.FILE
    assert module.parents[2] == checkout / "cache" / "cuda"
    assert module.parent.name == "80-real+90a-real+90-virtual"
    assert sorted(p.name for p in module.parent.iterdir() if p.name != "lock") == sorted(
        [toolchain.FILE, "build.log", "selftest"]
    )
    assert native.is_built()
    assert native.build() == module
    assert len(compiled) == 1


def test_force_builds_again(checkout, compiled):
    module = native.build()
    assert native.build(archs="75-real").parents[1] == module.parents[1]
    assert native.build(force=True).read_text() == f"{native.ARCHS} 3"
    assert compiled == [native.ARCHS, "75-real", native.ARCHS]


@pytest.mark.parametrize(
    "change, builds",
    [
        (lambda checkout, patch: (checkout / "csrc" / "tiny.cu").write_text("int other;"), 2),
        (lambda checkout, patch: (checkout / "csrc" / "new.cuh").write_text(""), 2),
        (lambda checkout, patch: (checkout / "CMakeLists.txt").write_text("-O1"), 2),
        (lambda checkout, patch: patch.setattr(toolchain, "version", lambda name: "13.1"), 2),
        (lambda checkout, patch: patch.setattr(toolchain, "SUFFIX", ".other.so"), 2),
        (lambda checkout, patch: patch.setenv("CUDAFLAGS", "-g"), 2),
        (lambda checkout, patch: os.utime(checkout / "csrc" / "tiny.cu", (1, 1)), 1),
        (lambda checkout, patch: (checkout / "csrc" / ".tiny.cu.swp").write_text("draft"), 1),
    ],
    ids=["source", "new file", "recipe", "nvcc", "python", "flags", "time", "draft"],
)
def test_only_what_matters_makes_another_build(checkout, compiled, monkeypatch, change, builds):
    native.build()
    change(checkout, monkeypatch)
    native._find.cache_clear()
    assert native.is_built() == (builds == 1)
    native.build()
    assert len(compiled) == builds


def test_two_at_once_compile_once(checkout, compiled):
    threads = [threading.Thread(target=native.build) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        seen |= {p.read_text() for p in checkout.glob(f"cache/cuda/*/*/{toolchain.FILE}")}
    assert len(compiled) == 1
    assert seen <= {f"{native.ARCHS} 1"}, "half a module was visible"


def test_a_lock_that_stays_taken_is_an_error(checkout, compiled, monkeypatch):
    from filelock import FileLock

    place = native.build().parent
    monkeypatch.setattr(toolchain, "LOCK_SECONDS", 0.1)
    with FileLock(place / "lock"), pytest.raises(RuntimeError, match="build: .*lock must be free"):
        native.build(force=True)


def test_what_a_killed_build_left_is_no_module(checkout, compiled):
    place = native.build().parent
    (place / toolchain.FILE).rename(place / "unfinished-of-the-killed")
    left = place / "unfinished-directory"
    left.mkdir()
    (left / toolchain.FILE).write_text("half")
    native._find.cache_clear()
    assert not native.is_built()
    native.build()
    assert not left.exists()


def test_a_failed_build_names_its_log_and_leaves_nothing(checkout, monkeypatch):
    cmake = checkout / "cmake"
    cmake.write_text("#!/bin/sh\necho tiny.cu: error: no such thing\nexit 1\n")
    cmake.chmod(0o755)
    monkeypatch.setattr(toolchain, "_program", lambda name: str(cmake) if name == "cmake" else None)
    monkeypatch.setattr(toolchain, "pybind11", lambda: checkout)
    with pytest.raises(RuntimeError, match=r"build: .* see .*build\.log") as raised:
        native.build()
    (log,) = checkout.rglob("build.log")
    assert str(log) in str(raised.value)
    assert "tiny.cu: error: no such thing" in str(raised.value)
    assert log.read_text().startswith(f"$ {cmake} -S {checkout} ")
    assert {p.name for p in log.parent.iterdir()} <= {"build.log", "lock"}
    assert not native.is_built()


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWISE_CACHE", str(tmp_path))
    assert toolchain.cache_folder() == tmp_path / "cuda"
    monkeypatch.delenv("TILEWISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert toolchain.cache_folder() == tmp_path / "tilewise" / "cuda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert toolchain.cache_folder() == Path.home() / ".cache" / "tilewise" / "cuda"


# --- Which GPUs a build serves.


@pytest.mark.parametrize(
    "archs, capability, answer",
    [
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("90a-virtual", (10, 0), False),
        ("80-real", (8, 6), True),
        ("86-real", (8, 0), False),
        ("80-real", (9, 0), False),
        ("80-virtual", (12, 0), True),
        ("80", (9, 0), True),
        ("90", (8, 9), False),
        ("100f-real", (10, 3), True),
        ("100f-real", (12, 0), False),
        ("120-real", (12, 1), True),
        ("75-real;90-virtual", (10, 3), True),
        ("native", (9, 0), False),
    ],
)
def test_serves(archs, capability, answer):
    assert native.serves(archs, capability) is answer


def test_architectures_are_those_of_the_gpus(monkeypatch):
    monkeypatch.delenv("TILEWISE_CUDA_ARCHS", raising=False)
    assert native.architectures([]) == native.ARCHS
    assert native.architectures([(8, 6), (9, 0), (12, 0)]) == "86-real;90a-real;120a-real"
    monkeypatch.setenv("TILEWISE_CUDA_ARCHS", "80-real")
    assert native.architectures([(9, 0)]) == "80-real"


@pytest.mark.parametrize(
    "archs, found", [("90a-real", True), (native.ARCHS, True), ("80-real", False)]
)
def test_a_build_for_other_gpus_is_none(checkout, compiled, monkeypatch, archs, found):
    native.build(archs=archs)
    monkeypatch.setattr(native, "_capabilities", lambda: [(9, 0)])
    native._find.cache_clear()
    assert native.is_built() is found


# --- What may build, and when.


def test_jit_0_forbids_to_build_but_not_to_use(checkout, compiled, monkeypatch):
    monkeypatch.setenv("TILEWISE_JIT", "0")
    assert not native.can_build()
    for ask in (native.build, native.load):
        with pytest.raises(RuntimeError, match="build: .* TILEWISE_JIT=0 forbids"):
            ask()
    monkeypatch.delenv("TILEWISE_JIT")
    native.build()
    monkeypatch.setenv("TILEWISE_JIT", "0")
    assert native.is_built()


def test_nothing_is_built_while_a_stream_is_captured(checkout, compiled, monkeypatch):
    assert native.can_build()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not native.can_build()
    with pytest.raises(RuntimeError, match="during CUDA stream capture, run `tilewise build`"):
        native.build()
    assert not compiled


def test_automatic_choice_never_builds(checkout, compiled, monkeypatch):
    backends = tilewise.OPS["rms_norm"].backends
    monkeypatch.setitem(backends, "cuda", replace(backends["cuda"], devices=CUDA))
    with FakeTensorMode():
        x = torch.empty(2, 8, device="cuda")
    answer = tilewise.explain("rms_norm", x, None)
    assert answer["cuda"] == "is not built, run `tilewise build`"
    assert "chosen" in answer.values()
    assert not compiled


def test_unbuilt_kernels_are_mentioned_once(checkout, compiled):
    with pytest.warns(UserWarning, match="not built.* run `tilewise build`"):
        native.mention_unbuilt()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.mention_unbuilt()
        native.build()
        native.mention_unbuilt.cache_clear()
        native.mention_unbuilt()


def test_an_installed_module_of_other_sources_is_none(checkout):
    toolchain.PACKAGE.mkdir(parents=True)
    installed = toolchain.PACKAGE / toolchain.FILE
    installed.write_text(f"... {toolchain.digest(checkout)} ...")
    assert native.is_built()
    (checkout / "csrc" / "tiny.cu").write_text("int moved_on;")
    native._find.cache_clear()
    assert not native.is_built()


@pytest.mark.parametrize("tool", ["nvcc", "cmake"])
def test_a_missing_tool_is_named(monkeypatch, tmp_path, tool):
    (tmp_path / ("cmake" if tool == "nvcc" else "nvcc")).touch(mode=0o755)
    (tmp_path / "c++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native, "EMULATED", False)
    monkeypatch.setattr(toolchain.sys, "executable", str(tmp_path / "python"))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, "")
    forget()
    if tool == "nvcc":
        monkeypatch.setattr(toolchain, "nvcc", lambda: None)
    try:
        assert tool in native.missing()
        assert not native.can_build()
        with pytest.raises(RuntimeError, match=f"build: {native.MODULE} needs {tool}"):
            native.build()
    finally:
        monkeypatch.undo()
        forget()
