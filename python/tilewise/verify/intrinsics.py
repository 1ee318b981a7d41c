"""What the interpreter has no answer to: libdevice, inline assembly, special registers, autotuning.

A function that is not known here says so by name and line, when a kernel calls it.
"""

import math
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import autotuner, interpreter

from tilewise.verify import findings, session
from tilewise.verify.arithmetic import handle_of, numbers
from tilewise.verify.patching import replace

Handle = interpreter.TensorHandle


def _each(function: Callable[..., Any], kind: Any = np.float64) -> Callable[..., Any]:
    return np.vectorize(function, otypes=[kind])


def _count_bits(x: Any) -> Any:
    return np.bitwise_count(x.view(f"u{x.itemsize}")).astype(np.int32)


def _leading_zeros(x: Any) -> Any:
    width = 8 * x.itemsize
    return _each(lambda v: width - (int(v) & ((1 << width) - 1)).bit_length(), np.int32)(x)


LIBDEVICE: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in (
        "exp", "exp2", "log", "log2", "log10", "log1p", "expm1", "sqrt", "cbrt", "hypot", "sin",
        "cos", "tan", "sinh", "cosh", "tanh", "floor", "ceil", "trunc", "rint", "abs", "fmod",
        "copysign", "isnan", "isinf", "nextafter", "ldexp", "signbit",
    )},
    **{name: _each(getattr(math, name)) for name in ("erf", "erfc", "lgamma")},
    "tgamma": _each(math.gamma), "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan,
    "atan2": np.arctan2, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh,
    "pow": np.power, "rsqrt": lambda x: 1 / np.sqrt(x), "rcbrt": lambda x: 1 / np.cbrt(x),
    "exp10": lambda x: np.power(x.dtype.type(10), x), "finitef": np.isfinite,
    "isfinited": np.isfinite, "nearbyint": np.rint, "fdim": lambda x, y: np.fmax(x - y, 0),
    "round": lambda x: np.copysign(np.floor(np.abs(x) + x.dtype.type(0.5)), x),
    "llrint": lambda x: np.rint(x).astype(np.int64), "saturatef": lambda x: np.clip(x, 0, 1),
    "sinpi": lambda x: np.sin(np.pi * x), "cospi": lambda x: np.cos(np.pi * x),
    "fma": lambda x, y, z: x.astype(np.float64) * y + z, "fma_rn": lambda x, y, z:
    x.astype(np.float64) * y + z, "div_rn": np.divide, "add_rn": np.add, "sub_rn": np.subtract,
    "mul_rn": np.multiply, "sqrt_rn": np.sqrt, "rcp_rn": np.reciprocal, "fast_expf": np.exp,
    "fast_logf": np.log, "fast_log2f": np.log2, "fast_sinf": np.sin, "fast_cosf": np.cos,
    "fast_tanf": np.tan, "fast_tanhf": np.tanh, "fast_powf": np.power, "fast_dividef": np.divide,
    "fast_exp10f": lambda x: np.power(x.dtype.type(10), x), "popc": _count_bits,
    "clz": _leading_zeros,
}  # fmt: skip

ASSEMBLY: dict[str, Callable[..., Any]] = {
    "tanh.approx.f32 $0, $1;": np.tanh,
    "ex2.approx.f32 $0, $1;": np.exp2,
    "ex2.approx.ftz.f32 $0, $1;": np.exp2,
    "lg2.approx.f32 $0, $1;": np.log2,
    "rcp.approx.f32 $0, $1;": np.reciprocal,
    "rcp.approx.ftz.f32 $0, $1;": np.reciprocal,
    "rsqrt.approx.f32 $0, $1;": lambda x: 1 / np.sqrt(x),
    "rsqrt.approx.ftz.f32 $0, $1;": lambda x: 1 / np.sqrt(x),
}


def register_inline_assembly(text: str, function: Callable[..., Any]) -> None:
    """Say what `tl.inline_asm_elementwise(text, ...)` computes.

    Args:
        text: The assembly; only the amount of white space may differ.
        function: Of as many NumPy arrays as there are operands, bfloat16 and the 8-bit formats as
            fp32; its result, or tuple of results, is rounded to the declared dtype.
    """
    ASSEMBLY[_plain(text)] = function


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _here() -> str:
    code, line = findings.where()
    return f"{code.co_filename}:{line}: {findings.source(code, line)}"


def create_inline_asm(
    self: Any, text: str, constraints: str, values: Any, dtypes: Any, pure: bool, pack: int
) -> Any:
    function = ASSEMBLY.get(_plain(text))
    if function is None:
        raise NotImplementedError(
            "inline assembly must be known by register_inline_assembly, "
            f"got {_plain(text)!r} at {_here()}"
        )
    with np.errstate(all="ignore"):
        results = function(*map(numbers, values))
    results = results if isinstance(results, tuple) else (results,)
    handles = [handle_of(r, t) for r, t in zip(results, dtypes, strict=True)]

    class Call:
        def get_result(self, i: int) -> Any:
            return handles[i]

    return Call()


def _emulated(name: str, function: Callable[..., Any] | None) -> Callable[..., Any]:
    """A function of libdevice, for tensors of the interpreter."""

    def call(*operands: Any, _semantic: Any = None, **_: Any) -> Any:
        if function is None:
            raise NotImplementedError(
                f"libdevice.{name} must be emulated, but is not, at {_here()}"
            )
        first = next(x for x in operands if isinstance(x, tl.tensor))
        with np.errstate(all="ignore"):
            result = np.asarray(
                function(*[numbers(x.handle) if isinstance(x, tl.tensor) else x for x in operands])
            )
        scalar = first.type.scalar
        if result.dtype == np.bool_ or result.dtype.kind != numbers(first.handle).dtype.kind:
            scalar = tl.int64 if result.dtype == np.int64 else tl.int32
        block = first.type.is_block()
        kind = tl.block_type(scalar, list(result.shape)) if block else scalar
        return tl.core.tensor(handle_of(result, scalar), kind)

    return call


def _constant(value: int, scalar: Any) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        return tl.core.tensor(handle_of(np.array([value]), scalar), scalar)

    return call


def _nothing(*_: Any, **__: Any) -> None:
    """A hint about launches that overlap: they never do here."""


SPECIAL: dict[str, Callable[..., Any]] = {
    "gdc_wait": _nothing,
    "gdc_launch_dependents": _nothing,
    "globaltimer": _constant(0, tl.int64),
    "smid": _constant(0, tl.int32),
}

_REPLACED: dict[Any, Callable[..., Any]] = {}


def rebind(function: Any) -> None:
    """Give a kernel what its module imported by name before this one was loaded."""
    names = function.__globals__
    for name, value in list(names.items()):
        if callable(value) and getattr(value, "__module__", "").startswith("triton.language.extra"):
            names[name] = _REPLACED.get(value, value)


def _replace_all(module: ModuleType, table: dict[str, Any], wrap: Any) -> None:
    for name in dir(module):
        value = getattr(module, name)
        if name in table or (wrap and _is_public_function(module, name, value)):
            _REPLACED[value] = wrap(name, table.get(name)) if wrap else table[name]
            setattr(module, name, _REPLACED[value])


def _is_public_function(module: ModuleType, name: str, value: Any) -> bool:
    return callable(value) and not name.startswith("_") and value.__module__ == module.__name__


def run_autotuned(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Launch one configuration: the first, or under a random order the seed's."""
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    configs = self.configs
    if self.early_config_prune:
        configs = self.early_config_prune(configs, self.nargs, **kwargs) or configs
    now = session.active
    chosen = configs[now.seed % len(configs) if now and now.order == "random" else 0]
    self.best_config = chosen
    everything = {**self.nargs, **kwargs, **chosen.all_kwargs()}
    for name in self.reset_to_zero or ():
        everything[name].zero_()
    if chosen.pre_hook is not None:
        chosen.pre_hook(everything)
    return self.fn.run(*args, **kwargs, **chosen.all_kwargs())


def install() -> None:
    """Put the emulations where kernels find them, for all of this process."""
    from triton.language.extra import libdevice

    replace(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
    replace(autotuner.Autotuner, "run", run_autotuned)
    # The package of CUDA's extras is loaded twice: as the attribute and as the module of the name.
    packages = {id(p): p for p in (tl.extra.cuda, sys.modules["triton.language.extra.cuda"])}
    _replace_all(libdevice, LIBDEVICE, _emulated)
    for package in packages.values():
        _replace_all(package, SPECIAL, None)
        _replace_all(package.libdevice, LIBDEVICE, _emulated)
