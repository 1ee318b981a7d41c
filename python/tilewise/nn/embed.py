"""Embeddings as modules."""

from typing import Any

import torch
from torch import Tensor

from tilewise.ops.embed import embed


class Embedding(torch.nn.Embedding):
    """`torch.nn.Embedding`, its arguments and its state_dict, computed by `tilewise.embed`.

    Where PyTorch has more (`max_norm`, `scale_grad_by_freq`, `sparse`) its own function runs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Look up `input`, `[...]`, int64 or int32; `[..., embedding_dim]`."""
        if self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
            return super().forward(input)
        return embed(input, self.weight, padding_idx=self.padding_idx)


class InputEmbedding(torch.nn.Module):
    """The input layer of BERT and GPT, in one pass: tables added, normalised, dropped out of.

        y = dropout(layer_norm(tokens[token_ids] + positions[position_ids] + segments[segment_ids]))

    Its parameters are `tokens.weight`, `positions.weight`, `segments.weight`, `norm.weight` and
    `norm.bias`, of modules of torch.nn; what is left out has none.

    Args:
        tokens: How many tokens there are.
        dim: Width of a row.
        positions: How many positions there are. None: positions are not added.
        segments: How many kinds of segment there are. None: segments are not added.
        norm: Whether the sum is normalised, as in BERT.
        eps: Of the norm; BERT's, 1e-12, is smaller.
        bias: Whether the norm has a bias.
        padding_idx: A token whose row starts as zeros and gets no gradient.
        dropout: Probability with which an element is dropped in training.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        tokens: int,
        dim: int,
        *,
        positions: int | None = None,
        segments: int | None = None,
        norm: bool = False,
        eps: float = 1e-5,
        bias: bool = True,
        padding_idx: int | None = None,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if not 0 <= dropout <= 1:
            raise ValueError(f"embed: dropout must be from 0 to 1, got {dropout}")
        self.tokens = torch.nn.Embedding(tokens, dim, padding_idx, **place)
        self.positions = None if positions is None else torch.nn.Embedding(positions, dim, **place)
        self.segments = None if segments is None else torch.nn.Embedding(segments, dim, **place)
        self.norm = torch.nn.LayerNorm(dim, eps, bias=bias, **place) if norm else None
        self.dropout = dropout

    def forward(
        self,
        token_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Look up `token_ids`, `[..., seq]`, and add positions and segments.

        Args:
            token_ids: int64 or int32.
            position_ids: Of a shape that broadcasts to that of `token_ids`. None is 0 to seq - 1.
            segment_ids: As `position_ids`, but None is all 0.

        Returns:
            `[..., seq, dim]`.
        """
        return embed(
            token_ids,
            self.tokens.weight,
            position_ids,
            None if self.positions is None else self.positions.weight,
            segment_ids,
            None if self.segments is None else self.segments.weight,
            None if self.norm is None else self.norm.weight,
            None if self.norm is None else self.norm.bias,
            eps=1e-5 if self.norm is None else self.norm.eps,
            padding_idx=self.tokens.padding_idx,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"
