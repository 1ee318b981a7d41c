"""The transformer of 2017, which reads one sequence and writes another (Vaswani et al.,
https://arxiv.org/abs/1706.03762)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tilewise.nn
from tilewise.models.blocks import (
    Attention,
    EncoderBlock,
    FeedForward,
    add_and_norm,
    initialise,
    padding_mask,
)
from tilewise.models.cache import KVCache, make_caches
from tilewise.models.refusals import (
    require_batch,
    require_continuation,
    require_counts,
    require_fraction,
    require_mask,
    require_multiple,
    require_positive,
    require_same_shape,
    require_tokens,
)
from tilewise.ops.embed import embed
from tilewise.ops.linear_cross_entropy import linear_cross_entropy
from tilewise.ops.rotary import rotary_tables

LayerCache = tuple[KVCache, KVCache]  # of the attention to the past, and of that to the source


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """The shape of an `EncoderDecoder`. The defaults are the base model of the paper.

    Attributes:
        vocab_size: How many tokens there are on the target side.
        source_vocab_size: How many on the source side; None is as many.
        context: The longest sequence, on either side.
        dim: Width of the residual stream.
        layers: How many blocks, on either side.
        heads: Heads, of `dim / heads` dimensions each.
        hidden: Width of the feed-forward layers; None is `4 dim`.
        shared: Whether one matrix embeds both sides and is the head.
        dropout: Probability with which embeddings and what a branch adds are dropped in training.
        eps: Of the norms.
    """

    vocab_size: int
    source_vocab_size: int | None = None
    context: int = 512
    dim: int = 512
    layers: int = 6
    heads: int = 8
    hidden: int | None = None
    shared: bool = True
    dropout: float = 0.1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        require_counts(
            "encoder_decoder",
            vocab_size=self.vocab_size,
            source_vocab_size=self.source_vocab_size,
            context=self.context,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            hidden=self.hidden,
        )
        require_multiple("encoder_decoder", dim=self.dim, heads=self.heads)
        require_fraction("encoder_decoder", "dropout", self.dropout)
        require_positive("encoder_decoder", "eps", self.eps)
        if self.dim % 2:
            raise ValueError(f"encoder_decoder: dim must be even, got {self.dim}")
        if self.shared and self.source_vocab_size not in (None, self.vocab_size):
            raise ValueError(
                "encoder_decoder: source_vocab_size must be vocab_size where the embedding is "
                f"shared, got {self.source_vocab_size} and {self.vocab_size}"
            )


class EncoderDecoder(nn.Module):
    """A source and the beginning of a target in, logits of the target's next token out.

        x = sqrt(dim) * embedding(source) + sinusoids
        x = layer_norm(x + attention(x))                      in each block of the encoder
        x = layer_norm(x + relu_feed_forward(x))

        y = sqrt(dim) * embedding(tokens) + sinusoids
        y = layer_norm(y + attention(y, the past of y))       in each block of the decoder
        y = layer_norm(y + attention(y, x))
        y = layer_norm(y + relu_feed_forward(y))
        logits = head(y)

    Weights start as `initialise` says; the scale makes the variance of the embeddings 1. What reads
    a token outside its vocabulary is NaN.
    """

    position_table: Tensor

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        dim, hidden = config.dim, config.hidden or 4 * config.dim
        size = dim, config.heads, hidden, "relu", config.dropout, config.eps
        source_vocab_size = config.source_vocab_size or config.vocab_size
        self.source_embedding = nn.Embedding(source_vocab_size, dim)
        self.target_embedding = nn.Embedding(config.vocab_size, dim)
        position_table = sinusoids(config.context, dim) * dim**-0.5  # as `_embed` takes it
        self.register_buffer("position_table", position_table, persistent=False)
        self.encoder = nn.ModuleList(EncoderBlock(*size) for _ in range(config.layers))
        self.decoder = nn.ModuleList(DecoderBlock(*size) for _ in range(config.layers))
        self.head = nn.Linear(dim, config.vocab_size, bias=False)
        initialise(self)
        if config.shared:
            self.source_embedding.weight = self.target_embedding.weight
            self.head.weight = self.target_embedding.weight

    def forward(
        self,
        source: Tensor,
        tokens: Tensor,
        *,
        source_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the logits of the token after each of `tokens`.

        Args:
            source: `[batch, source_seq]`, int64.
            tokens: `[batch, seq]`, int64, the target from its start token on.
            source_mask: `[batch, source_seq]`, bool, False where there is only padding.
            mask: `[batch, seq]`, bool, likewise. Padding at the end needs none: no token reads
                what comes after it.

        Returns:
            `[batch, seq, vocab_size]`.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a shape is wrong, or a sequence is longer than the context.
        """
        memory = self.encode(source, source_mask)
        logits: Tensor = self.head(self.decode(tokens, memory, source_mask=source_mask, mask=mask))
        return logits

    def loss(
        self,
        source: Tensor,
        tokens: Tensor,
        targets: Tensor,
        *,
        source_mask: Tensor | None = None,
        mask: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Compute the mean cross-entropy of the next tokens, in nats.

        Args:
            source: As in `forward`.
            tokens: As in `forward`.
            targets: `[batch, seq]`, int64: the token after each of `tokens`; -100 does not count.
            source_mask: As in `forward`.
            mask: As in `forward`.
            label_smoothing: The part of the probability spread over all tokens; 0.1 in the paper.
        """
        require_same_shape("encoder_decoder", "targets", targets, tokens)
        memory = self.encode(source, source_mask)
        features = self.decode(tokens, memory, source_mask=source_mask, mask=mask)
        return linear_cross_entropy(
            features, self.head.weight, targets, label_smoothing=label_smoothing
        )

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Read the source: `[batch, source_seq, dim]`, the memory of `decode`."""
        require_tokens("encoder_decoder", "source", source, self.config.context)
        require_mask("encoder_decoder", "source_mask", source_mask, source)
        x = self._embed(self.source_embedding, source, 0)
        for block in self.encoder:
            x = block(x, padding_mask(source_mask))
        return x

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor,
        *,
        source_mask: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Read the memory and the target so far: `[batch, seq, dim]`, which the head reads.

        Args:
            tokens: `[batch, seq]`, int64.
            memory: `[batch, source_seq, dim]`, from `encode`.
            source_mask: As in `forward`.
            mask: As in `forward`; not with a cache.
            cache: From `make_cache`: the tokens continue those it has seen, and are added to it.
        """
        past = cache[0][0] if cache else None
        require_continuation("encoder_decoder", tokens, self.config.context, past)
        require_batch("encoder_decoder", tokens, "source", memory)
        require_mask("encoder_decoder", "mask", mask, tokens)
        x = self._embed(self.target_embedding, tokens, past.length if past else 0)
        for i, block in enumerate(self.decoder):
            layer_cache = cache[i] if cache else None
            x = block(x, memory, padding_mask(mask), padding_mask(source_mask), layer_cache)
        return x

    def make_cache(self, memory: Tensor, capacity: int | None = None) -> list[LayerCache]:
        """Take the room for the keys and values of each layer.

        Args:
            memory: `[batch, source_seq, dim]`, from `encode`.
            capacity: How many positions of the target; None is the whole context.
        """
        config, (batch, source_seq, _) = self.config, memory.shape
        capacity = config.context if capacity is None else capacity
        head_dim, weight = config.dim // config.heads, self.head.weight
        past, source = (
            make_caches(weight, config.layers, batch, config.heads, length, head_dim)
            for length in (capacity, source_seq)
        )
        return list(zip(past, source, strict=True))

    def _embed(self, embedding: nn.Embedding, tokens: Tensor, start: int) -> Tensor:
        """sqrt(dim) * dropout(embedding + sinusoids / sqrt(dim)): a scaled copy of the embedding,
        of the whole vocabulary, would cost more than to scale the sum."""
        x = embed(
            tokens, embedding.weight, None, self.position_table[start:],
            dropout_p=self.config.dropout if self.training else 0.0,
        )  # fmt: skip
        return x * math.sqrt(self.config.dim)


class DecoderBlock(nn.Module):
    """Attention to the past, attention to the memory, feed-forward; normalised after each is added.

    The arguments are those of `EncoderBlock`.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, feed_forward: str, dropout: float, eps: float
    ) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.attention_norm = tilewise.nn.AddLayerNorm(dim, eps, dropout_p=dropout)
        self.cross_attention = Attention(dim, heads)
        self.cross_attention_norm = tilewise.nn.AddLayerNorm(dim, eps, dropout_p=dropout)
        self.feed_forward = FeedForward(dim, hidden, feed_forward)
        self.feed_forward_norm = tilewise.nn.AddLayerNorm(dim, eps, dropout_p=dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        memory_mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """`[batch, seq, dim]` to the same; `memory` is `[batch, source_seq, dim]`."""
        past, source = cache if cache else (None, None)
        y = self.attention(x, mask=mask, causal=True, cache=past)
        x = add_and_norm(self.attention_norm, y, x)
        y = self.cross_attention(x, memory, mask=memory_mask, cache=source)
        x = add_and_norm(self.cross_attention_norm, y, x)
        return add_and_norm(self.feed_forward_norm, self.feed_forward(x), x)


def sinusoids(positions: int, dim: int) -> Tensor:
    """Sines and cosines of `position * 10000^(-2 i / dim)`, in turns: `[positions, dim]`."""
    cos, sin = rotary_tables(positions, dim, dtype=torch.get_default_dtype())
    return torch.stack([sin, cos], -1).flatten(1)
