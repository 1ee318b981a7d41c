"""A decoder that predicts the next token: the GPT and Llama kind.

Radford et al., 2019 (https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)
with learned positions, LayerNorm and GELU; Touvron et al., 2023 (https://arxiv.org/abs/2302.13971)
with rotary positions, RMSNorm and SwiGLU; grouped heads as in https://arxiv.org/abs/2305.13245.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

import tilewise.nn
from tilewise.models.blocks import (
    FEED_FORWARDS,
    NORMS,
    Attention,
    FeedForward,
    default_hidden,
    initialise,
    make_add_norm,
    make_norm,
)
from tilewise.models.cache import KVCache, make_caches
from tilewise.models.refusals import (
    require_continuation,
    require_counts,
    require_fraction,
    require_known,
    require_multiple,
    require_positive,
    require_same_shape,
)
from tilewise.ops.embed import embed
from tilewise.ops.linear_cross_entropy import linear_cross_entropy

POSITIONS = ("rotary", "learned")


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a `Decoder`. The defaults are a small Llama.

    Attributes:
        vocab_size: How many tokens there are.
        context: The longest sequence.
        dim: Width of the residual stream.
        layers: How many blocks.
        heads: Query heads, of `dim / heads` dimensions each.
        kv_heads: Key and value heads; None is as many as query heads.
        hidden: Width of the feed-forward layers; None is one that makes `8 dim^2` weights.
        norm: "rms_norm" or "layer_norm", before each branch and at the end.
        feed_forward: "swiglu", "gelu" or "relu".
        positions: "rotary" or "learned".
        tied: Whether the head is the token embedding.
        bias: Whether linear maps and LayerNorm have one.
        dropout: Probability with which embeddings and what a branch adds are dropped in training.
        eps: Of the norms.
        rotary_base: Of the rotary positions.
    """

    vocab_size: int
    context: int = 256
    dim: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    hidden: int | None = None
    norm: str = "rms_norm"
    feed_forward: str = "swiglu"
    positions: str = "rotary"
    tied: bool = True
    bias: bool = False
    dropout: float = 0.0
    eps: float = 1e-5
    rotary_base: float = 10000.0

    def __post_init__(self) -> None:
        require_counts(
            "decoder",
            vocab_size=self.vocab_size,
            context=self.context,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            hidden=self.hidden,
        )
        require_multiple("decoder", dim=self.dim, heads=self.heads)
        require_multiple("decoder", heads=self.heads, kv_heads=self.kv_heads or self.heads)
        require_known("decoder", "norm", self.norm, NORMS)
        require_known("decoder", "feed_forward", self.feed_forward, FEED_FORWARDS)
        require_known("decoder", "positions", self.positions, POSITIONS)
        require_fraction("decoder", "dropout", self.dropout)
        require_positive("decoder", "eps", self.eps)
        require_positive("decoder", "rotary_base", self.rotary_base)
        if self.positions == "rotary" and self.dim // self.heads % 2:
            raise ValueError(
                "decoder: dim / heads must be even for rotary positions, "
                f"got {self.dim} / {self.heads}"
            )


class Decoder(nn.Module):
    """Tokens in, logits of the next token out.

        x = embedding(tokens)
        x = x + attention(norm(x))          in each block
        x = x + feed_forward(norm(x))
        logits = head(norm(x))

    Weights start as `initialise` says. What reads a token outside the vocabulary is NaN.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        head_dim = config.dim // config.heads
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = None
        self.rotary = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.context, config.dim)
        else:
            self.rotary = tilewise.nn.Rotary(head_dim, config.context, base=config.rotary_base)
        self.blocks = nn.ModuleList(DecoderBlock(config, i == 0) for i in range(config.layers))
        norm = config.norm, config.dim, config.eps, config.bias
        self.norm = make_add_norm(*norm, config.dropout)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        initialise(self, branches=2 * config.layers)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, *, cache: Sequence[KVCache] | None = None) -> Tensor:
        """Compute the logits of the token after each of `tokens`.

        Args:
            tokens: `[batch, seq]`, int64.
            cache: From `make_cache`: the tokens continue those it has seen, and are added to it.
                Of sequences of different lengths it is told by its `keep`; tokens of one that has
                no room are lost, and give NaN.

        Returns:
            `[batch, seq, vocab_size]`.

        Raises:
            TypeError: If the tokens are not int64.
            ValueError: If they are not `[batch, seq]`, or more than the context holds.
        """
        logits: Tensor = self.head(self.features(tokens, cache=cache))
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean cross-entropy of the next tokens.

        Args:
            tokens: `[batch, seq]`, int64.
            targets: `[batch, seq]`, int64: the token after each; -100 does not count.

        Returns:
            A scalar, in nats.

        Raises:
            TypeError, ValueError: As `forward`.
        """
        require_same_shape("decoder", "targets", targets, tokens)
        return linear_cross_entropy(self.features(tokens), self.head.weight, targets)

    def features(self, tokens: Tensor, *, cache: Sequence[KVCache] | None = None) -> Tensor:
        """What the head reads: `[batch, seq, dim]`. The arguments are those of `forward`."""
        first = cache[0] if cache else None
        require_continuation("decoder", tokens, self.config.context, first)
        x = self._embed(tokens, first)
        branch = None  # what is added, together with the norm that follows
        for i, block in enumerate(self.blocks):
            branch, x = block(branch, x, self.rotary, cache[i] if cache else None)
        y: Tensor = self.norm(branch, x)[0]
        return y

    def _embed(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        dropout_p = self.config.dropout if self.training else 0.0
        places: tuple[Tensor | None, ...] = ()
        if self.positions is not None:
            table, positions = self.positions.weight, None
            if cache is not None and cache.length:
                positions = cache.positions(tokens.shape[1])
                table = table if positions is not None else table[cache.length :]
            places = positions, table
        return embed(tokens, self.embedding.weight, *places, dropout_p=dropout_p)

    def make_cache(self, batch: int, capacity: int | None = None) -> list[KVCache]:
        """Take the room for the keys and values of `batch` sequences.

        Args:
            batch: How many sequences.
            capacity: How many positions; None is the whole context.

        Returns:
            A cache for each layer, in the dtype and on the device of the weights.
        """
        config, weight = self.config, self.embedding.weight
        kv_heads, head_dim = config.kv_heads or config.heads, config.dim // config.heads
        capacity = config.context if capacity is None else capacity
        return make_caches(weight, config.layers, batch, kv_heads, capacity, head_dim)


class DecoderBlock(nn.Module):
    """Attention to the past, then feed-forward, each normalised before and added to the stream.

    A sum and the norm that follows are one op: a block takes and leaves the last branch unadded.
    """

    def __init__(self, config: DecoderConfig, first: bool) -> None:
        super().__init__()
        hidden = config.hidden or default_hidden(config.dim, config.feed_forward)
        norm = config.norm, config.dim, config.eps, config.bias
        self.attention_norm = make_norm(*norm) if first else make_add_norm(*norm, config.dropout)
        self.attention = Attention(config.dim, config.heads, config.kv_heads, config.bias)
        self.feed_forward_norm = make_add_norm(*norm, config.dropout)
        self.feed_forward = FeedForward(config.dim, hidden, config.feed_forward, config.bias)

    def forward(
        self,
        branch: Tensor | None,
        x: Tensor,
        rotary: tilewise.nn.Rotary | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """The branch to add, None in the first block, and the stream, `[batch, seq, dim]`; again
        the same."""
        if branch is None:
            y = self.attention_norm(x)
        else:
            y, x = self.attention_norm(branch, x)
        y = self.attention(y, causal=True, rotary=rotary, cache=cache)
        y, x = self.feed_forward_norm(y, x)
        return self.feed_forward(y), x
