from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from cases import DEVICE

from tilewise.op import INTERPRETED


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:
        from tilewise.verify.interpreter import repair

        repair()


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
