"""What a caller of a model can get wrong, and the sentence that says so."""

import torch
from torch import Tensor

from tilewise.models.cache import KVCache


def require_counts(model: str, **counts: int | None) -> None:
    """Refuse a size that is not a positive integer; None stands for a default."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool)):
            raise TypeError(f"{model}: {name} must be an int, got {count!r}")
        if count is not None and count < 1:
            raise ValueError(f"{model}: {name} must be at least 1, got {count}")


def require_multiple(model: str, **pair: int) -> None:
    """Refuse two sizes, given by name, of which the second does not divide the first."""
    (name, whole), (part_name, part) = pair.items()
    if whole % part:
        raise ValueError(
            f"{model}: {name} must be a multiple of {part_name}, got {whole} and {part}"
        )


def require_known(model: str, name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a name that is not in `known`."""
    if value not in known:
        raise ValueError(f"{model}: {name} must be one of {', '.join(known)}, got {value!r}")


def require_fraction(model: str, name: str, value: float) -> None:
    """Refuse a probability outside [0, 1)."""
    _require_float(model, name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{model}: {name} must be at least 0 and below 1, got {value}")


def require_positive(model: str, name: str, value: float) -> None:
    """Refuse a number that is not above 0."""
    _require_float(model, name, value)
    if not value > 0:
        raise ValueError(f"{model}: {name} must be positive, got {value}")


def _require_float(model: str, name: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{model}: {name} must be a float, got {value!r}")


def require_tokens(model: str, name: str, tokens: Tensor, context: int) -> None:
    """Refuse what is not a batch of token ids, at most `context` of them in a row."""
    if tokens.dtype != torch.int64:
        raise TypeError(f"{model}: {name} must be torch.int64, got {tokens.dtype}")
    if tokens.ndim != 2:
        raise ValueError(f"{model}: {name} must be [batch, seq], got {list(tokens.shape)}")
    if tokens.shape[1] > context:
        raise ValueError(
            f"{model}: {name} must have at most {context} positions, got {tokens.shape[1]}"
        )


def require_continuation(model: str, tokens: Tensor, context: int, cache: KVCache | None) -> None:
    """Refuse tokens that do not fit into the context behind those that the cache has seen."""
    if cache is None:
        require_tokens(model, "tokens", tokens, context)
        return
    capacity = min(context, cache.capacity)
    require_tokens(model, "tokens", tokens, capacity - cache.shortest)
    require_batch(model, tokens, "cache", cache.keys)


def require_batch(model: str, tokens: Tensor, name: str, other: Tensor) -> None:
    """Refuse tokens in another number of sequences than what they belong to."""
    if tokens.shape[0] != other.shape[0]:
        raise ValueError(
            f"{model}: tokens must have the batch of the {name}, {other.shape[0]}, "
            f"got {tokens.shape[0]}"
        )


def require_mask(model: str, name: str, mask: Tensor | None, tokens: Tensor) -> None:
    """Refuse what does not say of each token whether it is one."""
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{model}: {name} must be torch.bool, got {mask.dtype}")
        require_same_shape(model, name, mask, tokens)


def require_same_shape(model: str, name: str, value: Tensor, tokens: Tensor) -> None:
    """Refuse what does not have one entry a token."""
    if value.shape != tokens.shape:
        raise ValueError(
            f"{model}: {name} must have the shape of the tokens, {list(tokens.shape)}, "
            f"got {list(value.shape)}"
        )
