"""What each kernel's machine code must show, and what it may never do.

No kernel may spill, exceed the shared memory of a block, or have its matrix instructions serialised
by ptxas. What else is promised is declared here, once; docs/kernel_report.md lists what is not yet.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tilewise.verify.architectures import ARCHITECTURES
from tilewise.verify.kernel import Kernel

HALVES = frozenset({"bfloat16", "float16"})
NVIDIA = frozenset(name for name, a in ARCHITECTURES.items() if a.backend == "cuda")
ACCESS = 16  # bytes
# Of ptxas, on wgmma and setmaxnreg.
SERIALISED = frozenset({"C7508", "C7510", "C7511", "C7512", "C7514", "C7515"})


@dataclass(frozen=True)
class Promise:
    """What some kernels show.

    Attributes:
        ops: Whose kernels.
        kernel: A pattern of their functions' names.
        backend: Theirs.
        architectures: Where.
        dtypes: In which.
        sizes: For which sizes, given the kernel.
        wide: They read global memory 16 bytes at a time, and move no 16-bit element alone.
        narrow: But for this many scalars of a row.
        instruction: A matrix instruction that they have.
        copy: A bulk copy that they have.
    """

    ops: Sequence[str]
    kernel: str = "*"
    backend: str = "triton"
    architectures: frozenset[str] = NVIDIA
    dtypes: frozenset[str] = HALVES | {"float32"}
    sizes: Callable[[Kernel], bool] = lambda kernel: True
    wide: bool = False
    narrow: int = 0
    instruction: str = ""
    copy: str = ""

    def covers(self, kernel: Kernel) -> bool:
        """Whether this is promised of `kernel`."""
        return (
            self.concerns(kernel) and fnmatchcase(kernel.kernel, self.kernel) and self.sizes(kernel)
        )

    def concerns(self, kernel: Kernel) -> bool:
        """Whether this is promised of some kernel beside `kernel`, by its op, backend and so on."""
        return (
            kernel.op in self.ops
            and kernel.backend == self.backend
            and kernel.architecture in self.architectures
            and kernel.dtype in self.dtypes
        )


def _aligned(*names: str) -> Callable[[Kernel], bool]:
    """Rows that Triton knows to be aligned, and wide enough for every lane to have 16 bytes."""
    return lambda kernel: all(
        kernel.size.get(name, 0) % 16 == 0 and kernel.size.get(name, 0) >= 512 for name in names
    )


def _whole_heads(kernel: Kernel) -> bool:
    """A tile that fills the tensor cores: 64 queries, heads as wide as the tile, no mask."""
    size = kernel.size
    longest = size["seq_q"] if "seq_q" in size else max((q for q, _ in size["lengths"]), default=0)
    return longest >= 64 and size["dim"] in (64, 128) and "mask" not in size


def _long(kernel: Kernel) -> bool:
    """Whole heads, of so many queries and keys that tiles come by tensor descriptors."""
    size = kernel.size
    seen = size.get("batch", 1) * size.get("heads", 1) * size.get("seq_q", 0) * size.get("seq_k", 0)
    return _whole_heads(kernel) and 2 * seen * size["dim"] >= 2**33


_NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
_ROWS = (*_NORMS, "softmax", "log_softmax")
_ELEMENTS = ("gelu", "glu", "glu_packed")
_ATTENTION = ("attention", "attention_varlen")
PROMISES: Sequence[Promise] = (
    Promise(_ROWS, sizes=_aligned("cols"), wide=True),
    Promise(_ELEMENTS, sizes=_aligned("cols"), wide=True),
    Promise(("cross_entropy",), "_losses_kernel", sizes=_aligned("classes"), wide=True, narrow=1),
    Promise(("cross_entropy",), "_gradients_kernel", sizes=_aligned("classes"), wide=True),
    Promise(_ATTENTION, dtypes=HALVES, sizes=_whole_heads, wide=True),
    *(
        Promise(
            _ATTENTION, kernel, dtypes=HALVES, sizes=_whole_heads,
            architectures=frozenset({architecture}), instruction=instruction,
        )
        for architecture, instruction, kernel in (
            ("sm_80", "HMMA", "*"),
            ("sm_90", "HGMMA", "_forward_kernel"),
            ("sm_90", "HGMMA", "_queries_backward_kernel"),
            ("sm_90", "HGMMA", "_keys_backward_kernel"),
            ("sm_100", "UTCHMMA", "_forward_kernel"),
            ("sm_100", "UTCHMMA", "_queries_backward_kernel"),
            ("sm_100", "UTCHMMA", "_keys_backward_kernel"),
            ("sm_120", "HMMA", "*"),
        )
    ),
    *(
        Promise(
            ("attention",), kernel, architectures=frozenset({"sm_90", "sm_100"}), dtypes=HALVES,
            sizes=_long, copy="UTMALDG",
        )
        for kernel in ("_forward_kernel", "_queries_backward_kernel", "_keys_backward_kernel")
    ),
    Promise(("attention",), "*ward_kernel<*>", "cuda", dtypes=HALVES, instruction="HMMA"),
    Promise(("attention",), "decode_kernel<*>", "cuda", dtypes=HALVES, instruction="HMMA"),
    *(
        Promise(
            ("attention",), f"{kernel}<*>", "cuda", dtypes=HALVES,
            architectures=frozenset({"sm_90"}), instruction="HGMMA",
        )
        for kernel in ("*hopper_kernel", "hopper_keys_kernel", "hopper_queries_kernel")
    ),
    Promise(("sample",), "tile_kernel<*>", "cuda", dtypes=HALVES, instruction="HMMA"),
    Promise(("attention",), "append_kernel<8, *", "cuda", dtypes=HALVES, wide=True),
    Promise(_ROWS, "*, true>", "cuda", wide=True),  # rows that are whole 16-byte accesses
    Promise(("cross_entropy",), "*, true>", "cuda", wide=True, narrow=1),  # the true class
    *(
        Promise((op,), f"*<{first},*", "cuda", dtypes=frozenset({dtype}), wide=True)
        for dtype, width in (("bfloat16", 8), ("float16", 8), ("float32", 4))
        for op, first in (
            ("embed", width), ("glu", width), ("gelu", width), ("gelu", "true"),
            ("dropout_add", "true"), ("rotary", width), ("qk_norm_rotary", width),
        )
    ),
    *(
        Promise(("embed",), kernel, sizes=_aligned("cols"), wide=True)
        for kernel in ("_forward_kernel", "_rows_backward_kernel", "_table_backward_kernel")
    ),
)  # fmt: skip


def broken(kernel: Kernel) -> list[str]:
    """What `kernel` may not do and does, and what is promised of it and is not so."""
    if kernel.error:
        return [f"must compile, got {kernel.error}"]
    found = []
    if kernel.spill_loads or kernel.spill_stores:
        found.append(
            f"must not spill, got {kernel.spill_loads} loads, {kernel.spill_stores} stores"
        )
    limit = ARCHITECTURES[kernel.architecture].shared
    if kernel.shared > limit:
        found.append(f"must have at most {limit} bytes of shared memory, got {kernel.shared}")
    if serialised := sorted(SERIALISED & set(kernel.warnings)):
        found.append(f"must keep wgmma in flight, got {', '.join(serialised)} of ptxas")
    for promise in PROMISES:
        if promise.covers(kernel):
            found += _unkept(promise, kernel)
    return found


def gone(kernels: Iterable[Kernel]) -> list[str]:
    """What is promised of kernels that are no longer there: renamed, or never instantiated."""
    found = []
    for promise in PROMISES:
        each: dict[tuple[str, str, str], bool] = {}
        for kernel in filter(promise.concerns, kernels):
            key = kernel.architecture, kernel.op, kernel.dtype
            each[key] = each.get(key, False) or fnmatchcase(kernel.kernel, promise.kernel)
        found += [
            f"{' '.join(key)}: must have a {promise.backend} kernel {promise.kernel}, got none"
            for key, there in each.items()
            if not there
        ]
    return found


def _unkept(promise: Promise, kernel: Kernel) -> list[str]:
    found = []
    if promise.wide:
        single = _below(kernel.loads, 4) + _below(kernel.stores, 4)
        if kernel.dtype in HALVES and single > promise.narrow:
            found.append(f"must move {ACCESS} bytes at a time, got {single} narrower than 4")
        elif not any(int(width) >= ACCESS for width in kernel.loads):
            found.append(f"must load {ACCESS} bytes at a time, got {dict(kernel.loads)}")
    if promise.instruction and not kernel.matrix.get(promise.instruction):
        found.append(f"must have {promise.instruction}, got {dict(kernel.matrix) or 'none'}")
    if promise.copy and not kernel.bulk.get(promise.copy):
        found.append(f"must have {promise.copy}, got {dict(kernel.bulk) or 'none'}")
    return found


def _below(found: Mapping[str, int], width: int) -> int:
    return sum(number for bytes_, number in found.items() if int(bytes_) < width)
