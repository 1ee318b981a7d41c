"""What an installation holds, and whether it compiles: wheel, source distribution, no compiler."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import Distribution, Extension
from setuptools.errors import CompileError

from tilewise import toolchain

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-c"]
BUILD_WHEEL = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
BUILD_SDIST = BUILD_WHEEL.replace("wheel", "sdist")


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("tilewise_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "policy, lacks, gpu, reason",
    [
        ("ON", "nvcc", False, None),
        ("OFF", None, True, "TILEWISE_CUDA=OFF"),
        ("AUTO", None, True, None),
        ("AUTO", None, False, "no GPU is visible"),
        ("AUTO", "nvcc", True, "this machine lacks nvcc"),
        ("auto", "cmake", True, "this machine lacks cmake"),
    ],
)
def test_whether_to_compile_at_installation(setup, monkeypatch, policy, lacks, gpu, reason):
    monkeypatch.setenv("TILEWISE_CUDA", policy)
    monkeypatch.setattr(setup, "gpu_is_visible", lambda: gpu)
    monkeypatch.setattr(setup, "toolchain", lambda: type("", (), {"missing": lambda: lacks}))
    assert setup.reason_against() == reason


def test_an_unknown_policy_is_refused(setup, monkeypatch):
    monkeypatch.setenv("TILEWISE_CUDA", "MAYBE")
    with pytest.raises(SystemExit, match="TILEWISE_CUDA: must be ON, OFF or AUTO, got 'MAYBE'"):
        setup.policy()


def test_a_hidden_gpu_is_not_visible(setup, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not setup.gpu_is_visible()


@pytest.mark.parametrize("policy", ["AUTO", "ON"])
def test_a_compiler_that_fails_costs_the_extension_alone(setup, monkeypatch, tmp_path, policy):
    def compile_module(*arguments):
        raise RuntimeError("build: the compiler gave up")

    monkeypatch.setenv("TILEWISE_CUDA", policy)
    failing = type("", (), {"ARCHS": "", "compile_module": compile_module})
    monkeypatch.setattr(setup, "toolchain", lambda: failing)
    extensions = Distribution({"ext_modules": [Extension("tilewise._cuda", [])]})
    command = setup.BuildExtension(extensions)
    command.build_lib, command.build_temp = str(tmp_path), str(tmp_path)
    command.ensure_finalized()
    if policy == "ON":
        with pytest.raises(CompileError, match="the compiler gave up"):
            command.run()
    else:
        with pytest.warns(UserWarning, match="without its CUDA kernels: .*gave up") as warned:
            command.run()
        assert len(warned) == 1
        assert command.get_outputs() == []


def run(command, where, **environment):
    done = subprocess.run(
        command, cwd=where, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout, for setuptools leaves things behind."""
    folder = tmp_path_factory.mktemp("checkout") / "tilewise"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.so", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    return names


def sources():
    """What a build needs, as the wheel names it."""
    files = [ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    return {f"tilewise/_source/{p.relative_to(ROOT).as_posix()}" for p in files}


def test_a_wheel_without_cuda_carries_the_sources(tree, tmp_path):
    said = run([*PYTHON, BUILD_WHEEL, tmp_path], tree, TILEWISE_CUDA="OFF")
    assert "without its CUDA kernels" not in said
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = contents(wheel)
    assert sources() <= names
    kernels = {f"tilewise/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    package = {str(p.relative_to(ROOT / "python")) for p in (ROOT / "python").rglob("*.py")}
    assert kernels | package <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    where = run(
        [*PYTHON, "import tilewise; from tilewise import toolchain as n; f = n.source(); "
         "print(f, n.digest(f))"],
        tmp_path, PYTHONPATH=str(tmp_path / "site"),
    )  # fmt: skip
    assert where.split() == [
        str(tmp_path / "site" / "tilewise" / "_source"),
        toolchain.digest(ROOT),
    ]


@pytest.mark.slow
def test_a_source_distribution_makes_the_same_wheel(tree, tmp_path):
    run([*PYTHON, BUILD_WHEEL, tmp_path / "direct"], tree, TILEWISE_CUDA="OFF")
    run([*PYTHON, BUILD_SDIST, tmp_path], tree, TILEWISE_CUDA="OFF")
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    run([*PYTHON, BUILD_WHEEL, tmp_path / "via"], unpacked, TILEWISE_CUDA="OFF")
    direct, via = (next((tmp_path / way).glob("*.whl")) for way in ("direct", "via"))
    assert contents(via) == contents(direct)


@pytest.mark.slow
def test_an_editable_installation_builds_from_the_checkout(tree, tmp_path):
    """Not by pip, which would first uninstall the tilewise that runs this test."""
    run([*PYTHON, BUILD_WHEEL.replace("wheel", "editable"), tmp_path], tree, TILEWISE_CUDA="OFF")
    (wheel,) = tmp_path.glob("*.whl")
    assert not sources() & contents(wheel)
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Without `site` at the start: the editable tilewise that runs this test would come first.
    places = [str(site), *(p for p in sys.path if p.endswith("site-packages"))]
    code = (
        f"import site; [site.addsitedir(place) for place in {places!r}];"
        "import tilewise.kernels.numba.rms_norm as kernel; from tilewise import toolchain;"
        "print(toolchain.source()); print(kernel.__file__)"
    )
    said = run([sys.executable, "-S", "-c", code], tmp_path).split()
    assert said == [str(tree), str(tree / "kernels" / "numba" / "rms_norm.py")]


@pytest.mark.slow
def test_auto_without_a_compiler_installs_with_one_warning(tree, tmp_path):
    nothing = tmp_path / "bin"
    nothing.mkdir()
    said = run(
        [*PYTHON, BUILD_WHEEL, tmp_path], tree,
        TILEWISE_CUDA="AUTO", PATH=str(nothing), CUDACXX="", CUDA_HOME="", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert said.count("tilewise is installed without its CUDA kernels") == 1
    assert len(list(tmp_path.glob("*-py3-none-any.whl"))) == 1
