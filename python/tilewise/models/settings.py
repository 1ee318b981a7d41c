"""What a training run is asked to do."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewise.choice import BACKENDS
from tilewise.models.decoder import DecoderConfig

PRECISIONS = ("auto", "fp32", "bf16")
CHANGEABLE = (
    "data",
    "steps",
    "evaluate_every",
    "save_every",
    "device",
    "threads",
    "backend",
    "compile",
)


@dataclass(frozen=True)
class TrainingSettings:
    """What to train, on what, and how. The defaults suit two CPU cores and two minutes.

    Attributes:
        data: Text files; none is the language reference inside Python.
        vocab_size: Tokens to learn, at least 257.
        context, dim, layers, heads, kv_heads, dropout: As in `DecoderConfig`.
        batch: Sequences of `context` tokens in a step.
        accumulate: Batches whose gradients are added up in a step.
        steps: Steps of the optimizer in all.
        learning_rate: Reached after `warmup` steps; a cosine brings it down to a tenth.
        warmup: Steps.
        weight_decay: Of matrices; vectors have none.
        clip: The norm all gradients together are held to.
        seed: Of the weights, the order of the data, and dropout.
        precision: "fp32", "bf16" (autocast over fp32 weights), or "auto": bf16 where the device
            multiplies it natively.
        device: None is "cuda" where there is one, else "cpu".
        threads: On a CPU; None is as many as torch uses.
        backend: The one to prefer for every op; None is the automatic choice.
        compile: Whether to put the model through torch.compile.
        evaluate_every: Steps between two validation losses.
        save_every: Steps between two checkpoints.

    Raises:
        ValueError: If a value is out of range.
    """

    data: tuple[str, ...] = ()
    vocab_size: int = 2048
    context: int = 128
    dim: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int | None = 2
    dropout: float = 0.1
    batch: int = 16
    accumulate: int = 1
    steps: int = 500
    learning_rate: float = 3e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    precision: str = "auto"
    device: str | None = None
    threads: int | None = None
    backend: str | None = None
    compile: bool = False
    evaluate_every: int = 50
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "steps", "threads", "evaluate_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: must be positive and finite, got {value}")
        for name in ("warmup", "seed", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < 2**63:
                raise ValueError(f"{name}: must be at least 0, and below 2^63, got {value}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision: must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"backend: must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        self.decoder(self.vocab_size)

    def decoder(self, vocab_size: int) -> DecoderConfig:
        """The shape of the decoder, with as many tokens as the text gave."""
        return DecoderConfig(
            vocab_size=vocab_size,
            context=self.context,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            dropout=self.dropout,
        )

    def decided(self) -> "TrainingSettings":
        """Decide what was left to this machine: device, precision, threads, paths.

        Raises:
            ValueError: If the device is not here.
        """
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = require_device(device)
        precision = self.precision
        if precision == "auto":
            precision = "bf16" if _bf16_pays(kind) else "fp32"
        return dataclasses.replace(
            self,
            device=device,
            precision=precision,
            threads=self.threads or torch.get_num_threads(),
            data=tuple(str(Path(file).absolute()) for file in self.data),
        )

    def changed(self, changes: Mapping[str, Any], step: int) -> "TrainingSettings":
        """Change what a run may change after `step` steps.

        Raises:
            ValueError: If something else would change, or no step is left.
        """
        for name, value in changes.items():
            if name not in CHANGEABLE and value != getattr(self, name):
                raise ValueError(
                    f"{name}: must be {getattr(self, name)} as in the checkpoint, got {value}"
                )
        settings = dataclasses.replace(self, **changes)
        if settings.steps <= step:
            raise ValueError(
                f"steps: must be more than the {step} the checkpoint has done, got {settings.steps}"
            )
        return settings

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "TrainingSettings":
        """The settings that `dataclasses.asdict` turned into JSON."""
        return cls(**{**record, "data": tuple(record["data"])})


def require_device(name: str) -> str:
    """Return "cpu" or "cuda" for a device that is here.

    Raises:
        ValueError: If it is not.
    """
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: must be cpu, or cuda where there is one, got {name!r}")
    return kind


def _bf16_pays(kind: str) -> bool:
    """Whether the device multiplies bf16 in instructions of its own.

    A step of the default settings took 0.25 s of one core against 0.40 s in fp32 (EPYC with
    avx512_bf16, torch 2.13, 2026-11-20).
    """
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not hasattr(torch.cpu, "get_capabilities"):  # younger than the oldest torch we take
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
