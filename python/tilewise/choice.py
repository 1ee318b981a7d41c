"""Which backend runs: `backend=` > `with tilewise.backend(...)` > TILEWISE_BACKEND > automatic."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tilewise import native
from tilewise.op import OPS, Backend, Op, stand_in, takes_all

BACKENDS = ("cuda", "numba", "triton", "reference")

# Of the first tensor, above which emulated CUDA kernels would take longer than anybody waits.
EMULATED_ELEMENTS = 2**20

Refusal = tuple[type[Exception], str]


def _known(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"{where}: must be among {', '.join(BACKENDS)}, got {name!r}")
    return names


class Preference:
    """Attributes of a module-level object: Dynamo guards on them, but not on a ContextVar."""

    names: tuple[str, ...] = _known(
        tuple(filter(None, os.environ.get("TILEWISE_BACKEND", "").split(","))), "TILEWISE_BACKEND"
    )
    strict: bool = False


preference = Preference()


@contextmanager
def backend(*names: str, strict: bool = False) -> Iterator[None]:
    """Prefer the backends `names`, in this order, for every op within the block.

    Args:
        names: Of "cuda", "numba", "triton", "reference". None at all restores the automatic choice.
        strict: Raise where none of them can run, rather than go on with the automatic order.

    Raises:
        ValueError: If a name is unknown.
    """
    names = _known(names, "backend")
    before = preference.names, preference.strict
    preference.names, preference.strict = names, strict
    try:
        yield
    finally:
        preference.names, preference.strict = before


_PRESENT: dict[str, bool] = {}


def _present(needs: str) -> bool:
    if needs == native.MODULE:
        return native.is_built()
    if needs not in _PRESENT:
        _PRESENT[needs] = find_spec(needs) is not None
    return _PRESENT[needs]


_present._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see op.transforming


def refusal(candidate: Backend, *tensors: Tensor | None, **options: Any) -> Refusal | None:
    """Say why `candidate` cannot take these inputs, and as which error, or None if it can."""
    first = tensors[candidate.leading]
    assert first is not None
    device, dtype = first.device.type, first.dtype
    if device not in candidate.devices:
        return RuntimeError, f"runs on {' and '.join(sorted(candidate.devices))}, got {device}"
    emulated = native.EMULATED and candidate.needs == native.MODULE
    if not (_present(candidate.needs) or (candidate.needs == native.MODULE and native.can_build())):
        lacks = f"is emulated, and {native.obstacle()}" if emulated else ""
        return RuntimeError, lacks or f"needs {candidate.needs}, which is not installed"
    if dtype not in candidate.dtypes:
        return TypeError, f"takes {', '.join(sorted(map(str, candidate.dtypes)))}, got {dtype}"
    if reason := candidate.refuses(*tensors, **options):
        return NotImplementedError, reason
    if emulated and first.numel() > EMULATED_ELEMENTS:
        most = f"for inputs of at most {EMULATED_ELEMENTS} elements"
        return NotImplementedError, f"is emulated, {most}, got {first.numel()}"
    return None


def _passed_over(name: str, candidate: Backend, *tensors: Any, **options: Any) -> str | None:
    """Why the automatic choice steps past a backend that may well be able to run."""
    if refused := refusal(candidate, *tensors, **options):
        return refused[1]
    if not _present(candidate.needs):
        return "is not built, run `tilewise build`"
    if how := stand_in(name):
        return f"is {how}, never chosen automatically"
    return candidate.declines(*tensors, **options)


def choose(op: Op, backend: str | None, *tensors: Tensor | None, **options: Any) -> str:
    """Name the backend that will run: the one asked for, else the first that can, else reference.

    Raises:
        ValueError: If the backend asked for is unknown.
        RuntimeError, TypeError, NotImplementedError: If it cannot take these inputs.
    """
    if backend is not None:
        return _strictly(op, backend, *tensors, **options)
    for name in preference.names:
        if name == "reference":
            return name
        if name in op.backends and refusal(op.backends[name], *tensors, **options) is None:
            return name
    if preference.strict:
        return _strictly(op, preference.names[0], *tensors, **options)
    return _automatic(op, *tensors, **options)


def _strictly(op: Op, name: str, *tensors: Tensor | None, **options: Any) -> str:
    if name == "reference":
        return name
    if name not in op.backends:
        known = ", ".join([*op.backends, "reference"])
        raise ValueError(f"{op.name}: backend must be one of {known}, got {name!r}")
    if refused := refusal(op.backends[name], *tensors, **options):
        error, reason = refused
        able = _automatic(op, *tensors, **options)
        raise error(f"{op.name}: backend {name!r} {reason}; {able!r} can run this")
    return name


def _automatic(op: Op, *tensors: Tensor | None, **options: Any) -> str:
    first = tensors[op.leading]
    assert first is not None
    for name in _able(op.name, first.device, first.dtype):
        candidate = op.backends.get(name)
        if candidate is None:
            continue
        for ask in (candidate.refuses, candidate.declines):
            if ask is not takes_all and ask(*tensors, **options):
                break
        else:
            return name
    return "reference"


_ABLE: dict[
    tuple[str, torch.device, torch.dtype, bool], tuple[Mapping[str, Backend], list[str]]
] = {}


def _able(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends that the automatic choice has to ask about tensors of this device and dtype.

    Kept, as long as the op has the same backends, and as many are built: 0.4 us, not 3.
    """
    backends, key = OPS[op].backends, (op, device, dtype, native.is_built())
    known = _ABLE.get(key)
    if known is None or known[0] is not backends:
        names = [
            name
            for name, candidate in backends.items()
            if device.type in candidate.devices
            and dtype in candidate.dtypes
            and _present(candidate.needs)
            and stand_in(name) is None
        ]
        known = _ABLE[key] = backends, names
    return known[1]


_able._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see op.transforming


def explain(name: str, *tensors: Tensor | None, **options: Any) -> dict[str, str]:
    """Say for each backend of the op `name` whether it can take these inputs, or why it cannot.

    Args:
        name: An op, such as "rms_norm".
        tensors: Its tensors, in the order of its signature.
        options: Its keyword arguments.

    Returns:
        A sentence by backend. The one that would run without `backend=` is marked "chosen".

    Raises:
        ValueError: If there is no such op.
    """
    if name not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {name!r}")
    op = OPS[name]
    answer = {
        n: _passed_over(n, b, *tensors, **options) or "can run" for n, b in op.backends.items()
    }
    answer["reference"] = "can run"
    first = next(t for t in tensors if t is not None)
    if torch._C._functorch.is_functorch_wrapped_tensor(first):
        return answer | {"reference": "chosen, for torch.func transforms it"}
    return answer | {choose(op, None, *tensors, **options): "chosen"}
