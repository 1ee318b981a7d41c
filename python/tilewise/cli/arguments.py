"""Arguments that several commands take, and what is said of a wrong one."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from json import dumps
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from tilewise.cli import Refusal
from tilewise.op import OPS, Op

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}


def positive(text: str) -> int:
    """The positive whole number that `text` says."""
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def add_case_arguments(parser: ArgumentParser) -> None:
    """Add what names the cases: ops, a backend, a device, a dtype."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="an op, such as rms_norm (all)")
    parser.add_argument("--backend", help="only this backend (every one that the op has)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--dtype", help="only this dtype, such as bfloat16")
    parser.add_argument("--json", metavar="FILE", help="write the results there")


def named_ops(names: Sequence[str]) -> list[Op]:
    """The ops of these names, or all of them if there are none.

    Raises:
        Refusal: If a name is unknown.
    """
    import tilewise  # noqa: F401  (declares the ops)

    for name in names:
        if name not in OPS:
            raise Refusal(f"OP: must be one of {', '.join(OPS)}, got {name!r}")
    return [op for op in OPS.values() if not names or op.name in names]


def named_backend(name: str | None, ops: Sequence[Op]) -> str | None:
    """`name`, if one of `ops` has such a backend.

    Raises:
        Refusal: If none has.
    """
    known = dict.fromkeys(backend for op in ops for backend in op.backends)
    if name is not None and name not in known:
        raise Refusal(f"--backend: must be one of {', '.join(known)}, got {name!r}")
    return name


def named_device(name: str | None) -> str:
    """`name`, if such a device is here; with none, "cuda" where there is one, else "cpu".

    Raises:
        Refusal: If it is unknown or absent.
    """
    present = torch.cuda.is_available()
    if name is None:
        return "cuda" if present else "cpu"
    if name not in ("cpu", "cuda"):
        raise Refusal(f"--device: must be cpu or cuda, got {name!r}")
    if name == "cuda" and not present:
        raise Refusal("--device: there is no CUDA device that PyTorch can use here, got 'cuda'")
    return name


def named_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of this name, or None without one.

    Raises:
        Refusal: If the name is unknown.
    """
    if name is None:
        return None
    full = SHORT_DTYPES.get(name, name)
    if full not in DTYPES:
        raise Refusal(f"--dtype: must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[full]


def dtype_name(dtype: torch.dtype) -> str:
    """The word for a dtype in tables and JSON."""
    return str(dtype).removeprefix("torch.")


def size_name(size: Any) -> str:
    """A size in a table: rows=3 cols=8."""
    return " ".join(f"{name}={value}" for name, value in size.items())


def writable(path: str | None) -> Path | None:
    """`path`, if a file can be written there; asked before hours of work, not after.

    Raises:
        Refusal: If its folder is missing, or it is itself a folder.
    """
    if path is None:
        return None
    file = Path(path)
    if file.is_dir() or not file.resolve().parent.is_dir():
        raise Refusal(f"{path}: must be a file in a folder that exists")
    return file


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, whole or not at all; a number that JSON lacks becomes null."""
    part = path.with_name(path.name + ".part")
    part.write_text(dumps(_finite(value), indent=1, allow_nan=False) + "\n")
    part.replace(path)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
