"""What the next step of a training run depends on beside weights and settings, as tensors."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewise.models.checkpoint import CheckpointError, require_shapes

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what torch.optim.AdamW keeps of each parameter


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name what the optimizer keeps after the parameters; nothing before its first step."""
    return {
        f"optimizer/{name}/{moment}": value
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], file: str
) -> None:
    """Give an optimizer of `model` what `optimizer_tensors` named, found in `file`.

    Raises:
        CheckpointError: If the tensors are not those of this model.
    """
    found = {name: value for name, value in tensors.items() if name.startswith("optimizer/")}
    if not found:
        return
    parameters = dict(model.named_parameters())
    needed = {
        f"optimizer/{name}/{moment}": parameter.new_empty(()) if moment == "step" else parameter
        for name, parameter in parameters.items()
        for moment in MOMENTS
    }
    require_shapes(file, found, needed)
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            moment: found[f"optimizer/{name}/{moment}"].to(parameter.device, copy=True)
            for moment in MOMENTS
        }


@dataclass(frozen=True)
class RandomStates:
    """The states of the random generators a step may draw from.

    Attributes:
        torch: Of the CPU.
        cuda: Of the device the run trains on; None on a CPU.
        python: Of the module `random`.
    """

    torch: Tensor
    cuda: Tensor | None
    python: Any

    def tensors(self) -> dict[str, Tensor]:
        """Name the states that are tensors."""
        states = {"random/torch": self.torch}
        return states if self.cuda is None else states | {"random/cuda": self.cuda}


def random_states(device: torch.device) -> RandomStates:
    """Read the states as they are now."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomStates(torch.get_rng_state(), cuda, random.getstate())


def restore_random(states: RandomStates, device: torch.device) -> None:
    """Bring the generators to `states`; a GPU that had no part in them keeps its own."""
    torch.set_rng_state(states.torch)
    if device.type == "cuda" and states.cuda is not None:
        torch.cuda.set_rng_state(states.cuda, device)
    random.setstate(_python_state(states.python))


def random_states_from(tensors: Mapping[str, Tensor], python: Any, file: str) -> RandomStates:
    """Find the states among the tensors of `file`.

    Raises:
        CheckpointError: If those of torch are absent or not of this torch.
    """
    found, needed = tensors.get("random/torch"), torch.get_rng_state()
    require_shapes(file, {} if found is None else {"random/torch": found}, {"random/torch": needed})
    states = RandomStates(tensors["random/torch"], tensors.get("random/cuda"), python)
    try:
        random.Random().setstate(_python_state(python))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint: the state of Python's random must be one, got: {error}"
        ) from error
    return states


def _python_state(stored: Any) -> tuple[Any, ...]:
    """What `random.getstate` gave, after JSON made lists of its tuples."""
    version, words, gauss = stored
    return version, tuple(words), gauss


@contextmanager
def own_random(device: torch.device) -> Iterator[None]:
    """Leave the generators of the process as they were, whatever is drawn within."""
    before = random_states(device)
    try:
        yield
    finally:
        restore_random(before, device)
