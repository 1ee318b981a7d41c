from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from cases import DEVICE, STAND_INS

from tilewise import native
from tilewise.choice import refusal
from tilewise.ops.attention import ATTENTION

# Where Triton is interpreted, every kernel that a test launches is watched.
pytest_plugins = ["tilewise.verify.plugin"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave most of what is marked `thinned` to `make check`, where a backend is stood in for."""
    counts: Counter[tuple[str, str]] = Counter()
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        mark = item.get_closest_marker("thinned")
        if mark is None or backend not in STAND_INS or item.get_closest_marker("slow"):
            continue
        key = item.nodeid.partition("[")[0], backend
        if counts[key] % mark.args[0]:
            item.add_marker(pytest.mark.slow)
        counts[key] += 1


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill torch.empty with NaN, so that an output element no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Forget compiled graphs, so that one test's sizes do not exhaust the next one's limit."""
    torch.compiler.reset()


@pytest.fixture
def on_the_device() -> Iterator[None]:
    """Make tensors on the GPU, where there is one, unless told otherwise."""
    with torch.device(DEVICE) if DEVICE != "cpu" else nullcontext():
        yield


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have launchers of attention in CUDA believe that the GPU is of this architecture."""
    some = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    if no := refusal(ATTENTION.backends["cuda"], some, some, some):
        pytest.skip(f"cuda: {no[1]}")

    def playing(major: str) -> None:
        if native.EMULATED:
            monkeypatch.setenv("TILEWISE_EMULATION_MAJOR", major)
        elif major != str(torch.cuda.get_device_capability()[0]):
            pytest.skip(f"cuda: the GPU is not of architecture {major}")

    return playing


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `story.txt` and, in `out`, a tiny decoder that the command trained on it."""
    from commands import TINY

    from tilewise.cli import main

    folder = tmp_path_factory.mktemp("trained")
    lines = [f"the cat {i} sat on the mat é 🙂 {i * 7 % 13}" for i in range(120)]
    (folder / "story.txt").write_text("\n".join(lines), "utf-8")
    arguments = ["--data", str(folder / "story.txt"), "--out", str(folder / "out")]
    assert main(["train", *TINY, "--steps", "4", *arguments]) == 0
    return folder
