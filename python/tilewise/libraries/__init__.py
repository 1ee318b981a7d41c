"""Other libraries' kernels for the same work, as an op is called: benchmarks time what is there.

Liger (https://github.com/linkedin/Liger-Kernel), QuACK (https://github.com/Dao-AILab/quack),
FlashAttention 2 and 3 (https://github.com/Dao-AILab/flash-attention), FlashInfer
(https://github.com/flashinfer-ai/flashinfer), and PyTorch's own that it does not choose by itself;
all for GPUs. An adapter takes an op's tensors and the options that the library has too; any other
is a TypeError, which the benchmark reports in the place of a time. Some write over their inputs,
and must be given copies.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from tilewise.libraries import attention, rows
from tilewise.libraries.adapters import Adapters

# By library, or by recipe in plain PyTorch, what must be there.
MODULES = {
    "liger": "liger_kernel",
    "quack": "quack",
    "cudnn": "torch.nn.attention",
    "flex": "torch.nn.attention.flex_attention",
    "varlen": "torch.nn.attention.varlen",
    "flash": "flash_attn",
    "flash3": "flash_attn_interface",
    "flashinfer": "flashinfer",
    "recipe": "torch",
}
ANYWHERE = {"recipe"}  # on a CPU too
ADAPTERS: Adapters = {**rows.ADAPTERS, **attention.ADAPTERS}


def calls(op: str, device: str) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """The libraries' functions for an op, by library; and of those that are missing, why."""
    found: dict[str, Callable[..., Any]] = {}
    absent: dict[str, str] = {}
    for library, (module, adapter) in ADAPTERS.get(op, {}).items():
        if device != "cuda" and library not in ANYWHERE:
            continue
        if find_spec(MODULES[library]) is None:
            absent[library] = f"needs {MODULES[library]}, which is not installed"
            continue
        try:
            found[library] = partial(adapter, import_module(module))
        except Exception as error:  # whatever a library of others does when it is imported
            absent[library] = f"cannot be imported: {type(error).__name__}: {error}"
    return found, absent
