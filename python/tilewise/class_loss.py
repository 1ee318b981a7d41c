"""The loss of logits and class indices, in plain PyTorch: what the ops that compute it share.

Label smoothing: Szegedy et al., 2015, https://arxiv.org/abs/1512.00567. The square of the
normaliser, which keeps it near 1: Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, section
5. Capped logits: Gemma 2, 2024, https://arxiv.org/abs/2408.00118, section 2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.op import wide_dtype

REDUCTIONS = ("mean", "sum", "none")
INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)

# torch splits longer sums among its threads, and their number would then show in the bits.
SUM_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class ClassLoss:
    """The numbers in the formula.

        s = softcap * tanh(logit_scale * logits / softcap)
        lse = log(sum_j exp(s_j))
        loss = (1 - label_smoothing) * weight_target * (lse - s_target)
             + label_smoothing * mean_j(weight_j * (lse - s_j)) + z_loss * lse^2

    Attributes:
        ignore_index: The target of rows that do not count.
        label_smoothing: From 0 to 1.
        z_loss: At least 0.
        softcap: Above 0, or 0 for none.
        logit_scale: Any finite number.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0

    def numbers(self) -> tuple[int, float, float, float, float]:
        """In the order in which ops and kernels take them."""
        return (
            self.ignore_index, self.label_smoothing, self.z_loss, self.softcap, self.logit_scale,
        )  # fmt: skip


def options_of(
    name: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> ClassLoss:
    """Check the numbers that op `name` was given.

    Raises:
        ValueError: If one is out of range.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{name}: z_loss must be at least 0 and finite, got {z_loss}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}: softcap must be above 0 and finite, or None, got {softcap}")
    if not -math.inf < logit_scale < math.inf:  # Dynamo cannot trace isfinite
        raise ValueError(f"{name}: logit_scale must be finite, got {logit_scale}")
    return ClassLoss(
        ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0), float(logit_scale)
    )


def check_target(name: str, target: Tensor, device: torch.device) -> None:
    """Refuse a target of another kind or on another device than the scores of its classes.

    Raises:
        TypeError, RuntimeError: As said.
    """
    if target.dtype not in INDEX_DTYPES:
        known = ", ".join(map(str, INDEX_DTYPES))
        raise TypeError(f"{name}: target must be one of {known}, got {target.dtype}")
    if target.device != device:
        raise RuntimeError(f"{name}: target must be on {device}, got {target.device}")


def check_weight(name: str, weight: Tensor | None, classes: int, device: torch.device) -> None:
    """Refuse class weights that do not fit.

    Raises:
        TypeError, ValueError, RuntimeError: For their dtype, shape or device.
    """
    if weight is None:
        return
    if not weight.is_floating_point():
        raise TypeError(f"{name}: weight must be floating point, got {weight.dtype}")
    if weight.shape != (classes,):
        raise ValueError(f"{name}: weight must be [{classes}], got {list(weight.shape)}")
    if weight.device != device:
        raise RuntimeError(f"{name}: weight must be on {device}, got {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: weight must be without gradient, got requires_grad=True")


def check_reduction(
    name: str, reduction: str, denom: Tensor | float | None, device: torch.device
) -> None:
    """Refuse an unknown reduction, or a denominator that is none.

    Raises:
        TypeError, ValueError, RuntimeError: As said.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    if denom is None:
        return
    if reduction != "mean":
        raise ValueError(f"{name}: denom must come with reduction 'mean', got {reduction!r}")
    if isinstance(denom, Tensor):
        if denom.numel() != 1:
            raise ValueError(f"{name}: denom must be one number, got {list(denom.shape)}")
        if denom.device != device:
            raise RuntimeError(f"{name}: denom must be on {device}, got {denom.device}")
    elif isinstance(denom, bool) or not isinstance(denom, int | float):
        raise TypeError(f"{name}: denom must be a tensor or a number, got {type(denom).__name__}")


def check_classes(name: str, target: Tensor, ignore_index: int, classes: int) -> None:
    """Refuse targets that are no class. Waits for the device.

    Raises:
        ValueError: With the first row that is wrong.
    """
    target = target.long()
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    rows = wrong.flatten().nonzero()
    if len(rows):
        row = int(rows[0])
        raise ValueError(
            f"{name}: target must be {ignore_index} or from 0 to {classes - 1}, "
            f"got {int(target.flatten()[row])} in row {row}"
        )


def check_logits(
    name: str,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: ClassLoss,
    reduction: str,
    denom: Tensor | float | None,
    check_inputs: bool,
) -> None:
    """Refuse what does not fit with `logits`, `[..., classes]`.

    Raises:
        TypeError, ValueError, RuntimeError: As said.
    """
    if not logits.is_floating_point():
        raise TypeError(f"{name}: logits must be floating point, got {logits.dtype}")
    if logits.ndim == 0:
        raise ValueError(f"{name}: logits must be [..., classes], got a scalar")
    if logits.shape[-1] == 0:
        raise ValueError(f"{name}: logits must have at least one class, got {list(logits.shape)}")
    check_target(name, target, logits.device)
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name}: logits must be [..., classes] and target [...], "
            f"got {list(logits.shape)} and {list(target.shape)}"
        )
    check_weight(name, weight, logits.shape[-1], logits.device)
    check_reduction(name, reduction, denom, logits.device)
    if check_inputs:
        check_classes(name, target, options.ignore_index, logits.shape[-1])


def as_planes(logits: Tensor) -> Tensor:
    """View `[..., classes]` as `[batch, seq, classes]`, the strides of the first two kept.

    So the logits of all tokens but the last of each sequence, which are no matrix, are not copied.
    """
    rows = logits if logits.ndim > 1 else logits.unsqueeze(0)
    planes = rows.reshape(math.prod(rows.shape[:-2]), *rows.shape[-2:])
    return planes if planes.stride(-1) == 1 else planes.contiguous()


def row_losses(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: ClassLoss
) -> tuple[Tensor, Tensor]:
    """The formula: losses and lse of rows `[..., classes]`, both in the shape of `target`."""
    smoothing, classes = options.label_smoothing, logits.shape[-1]
    counted = target != options.ignore_index
    valid = (target >= 0) & (target < classes)
    true = target.where(valid, 0)
    scores = logits.to(wide_dtype(logits.dtype)).where(counted.unsqueeze(-1), 0.0)
    if options.logit_scale != 1:
        scores = scores * options.logit_scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    logprobs = torch.log_softmax(scores, -1)
    lse = torch.logsumexp(scores, -1)

    losses = -logprobs.gather(-1, true.unsqueeze(-1)).squeeze(-1)
    if weight is not None:
        weight = weight.detach().to(scores.dtype)
        losses = losses * weight[true]
    if smoothing:
        weighted = logprobs if weight is None else logprobs * weight
        losses = (1 - smoothing) * losses - smoothing * weighted.mean(-1)
    if options.z_loss:
        losses = losses + options.z_loss * lse * lse
    # A factor, so that the gradient is NaN as well.
    losses = losses * torch.ones_like(losses).masked_fill(~valid & counted, math.nan)
    return losses.where(counted, 0.0), lse.where(counted, 0.0)


def with_sum(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What kernels of logits of `dtype` read: the weights of all classes, then their sum."""
    if weight is None:
        return None
    weight, dtype = weight.detach(), wide_dtype(dtype)
    total = sum_in_order(weight.double()).to(dtype)
    return torch.cat([weight.to(dtype), total.view(1)])


def divisor_of(
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    denom: Tensor | float | None,
) -> Tensor | float | None:
    """By what the sum of the losses is divided: for a mean `denom`, or what the rows weigh."""
    if reduction != "mean":
        return None
    if denom is not None:
        return denom.reshape(()) if isinstance(denom, Tensor) else denom
    counted = target != ignore_index
    if weight is None:
        return counted.sum()
    valid = (target >= 0) & (target < len(weight))
    weights = weight.detach()[target.where(valid, 0)].double()
    return sum_in_order(weights.where(counted, 0.0).flatten())


def factor_of(divisor: Tensor | float | None, like: Tensor) -> Tensor | None:
    """What the gradient of each loss is multiplied by for that of their mean; None is 1."""
    if divisor is None:
        return None
    one = torch.ones((), dtype=torch.float64, device=like.device)
    return (one / divisor).to(wide_dtype(like.dtype))


def reduced(losses: Tensor, reduction: str, divisor: Tensor | float | None) -> Tensor:
    """In fp64: the loss of a batch, and of a whole model with it, is then wrong by one rounding."""
    if reduction == "none":
        return losses
    total = sum_in_order(losses.flatten().double())
    if divisor is not None:
        total = total / divisor
    return total.to(losses.dtype)


def sum_in_order(values: Tensor) -> Tensor:
    """The sum, its order the same whatever the number of threads."""
    while values.numel() > SUM_AT_ONCE:
        values = torch.nn.functional.pad(values, (0, -values.numel() % 128)).view(-1, 128).sum(1)
    return values.sum()
