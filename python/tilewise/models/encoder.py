"""An encoder that reads a whole sequence at once: BERT (Devlin et al., 2018,
https://arxiv.org/abs/1810.04805), with its masked-language head and a classification head."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tilewise.nn
from tilewise.models.blocks import (
    EncoderBlock,
    initialise,
    padding_mask,
)
from tilewise.models.refusals import (
    require_counts,
    require_fraction,
    require_mask,
    require_multiple,
    require_positive,
    require_same_shape,
    require_tokens,
)
from tilewise.ops.cross_entropy import cross_entropy
from tilewise.ops.embed import embed
from tilewise.ops.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an `Encoder`. The defaults are a small BERT.

    Attributes:
        vocab_size: How many tokens there are.
        context: The longest sequence.
        segments: How many kinds of segment, such as question and answer.
        dim: Width of the residual stream.
        layers: How many blocks.
        heads: Heads, of `dim / heads` dimensions each.
        hidden: Width of the feed-forward layers; None is `4 dim`.
        dropout: Probability with which embeddings and what a branch adds are dropped in training.
        eps: Of the norms.
    """

    vocab_size: int
    context: int = 512
    segments: int = 2
    dim: int = 256
    layers: int = 4
    heads: int = 4
    hidden: int | None = None
    dropout: float = 0.1
    eps: float = 1e-12

    def __post_init__(self) -> None:
        require_counts(
            "encoder",
            vocab_size=self.vocab_size,
            context=self.context,
            segments=self.segments,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            hidden=self.hidden,
        )
        require_multiple("encoder", dim=self.dim, heads=self.heads)
        require_fraction("encoder", "dropout", self.dropout)
        require_positive("encoder", "eps", self.eps)


class Encoder(nn.Module):
    """Tokens in, a vector for each of them out.

        x = layer_norm(token(tokens) + position + segment(segments))
        x = layer_norm(x + attention(x))          in each block
        x = layer_norm(x + feed_forward(x))

    Weights start as `initialise` says. What reads a token or a segment that is none is NaN.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        dim, hidden = config.dim, config.hidden or 4 * config.dim
        self.embedding = nn.Embedding(config.vocab_size, dim)
        self.positions = nn.Embedding(config.context, dim)
        self.segments = nn.Embedding(config.segments, dim)
        self.embedding_norm = tilewise.nn.LayerNorm(dim, config.eps)
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, config.heads, hidden, "gelu", config.dropout, config.eps)
            for _ in range(config.layers)
        )
        initialise(self)

    def forward(
        self, tokens: Tensor, *, segments: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Read the tokens.

        Args:
            tokens: `[batch, seq]`, int64.
            segments: `[batch, seq]`, int64; None is all 0.
            mask: `[batch, seq]`, bool, False where there is only padding; None is all True.

        Returns:
            `[batch, seq, dim]`; what stands at padding means nothing.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a shape is wrong, or the tokens are more than the context holds.
        """
        require_tokens("encoder", "tokens", tokens, self.config.context)
        require_mask("encoder", "mask", mask, tokens)
        if segments is not None:
            require_tokens("encoder", "segments", segments, self.config.context)
            require_same_shape("encoder", "segments", segments, tokens)
        norm = self.embedding_norm
        x = embed(
            tokens, self.embedding.weight, None, self.positions.weight, segments,
            self.segments.weight, norm.weight, norm.bias, eps=norm.eps,
            dropout_p=self.config.dropout if self.training else 0.0,
        )  # fmt: skip
        for block in self.blocks:
            x = block(x, padding_mask(mask))
        return x


class MaskedLanguageModel(nn.Module):
    """An encoder and the head that names the tokens hidden from it; the embedding is its last map.

    logits = layer_norm(gelu(linear(x))) @ embedding^T + bias
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        dim, vocab_size = encoder.config.dim, encoder.config.vocab_size
        self.transform = nn.Linear(dim, dim)
        self.activation = tilewise.nn.GELU()
        self.norm = tilewise.nn.LayerNorm(dim, encoder.config.eps)
        self.head = nn.Linear(dim, vocab_size)
        initialise(self)  # not the encoder, which may have learned something already
        self.encoder = encoder
        self.head.weight = encoder.embedding.weight

    def forward(
        self, tokens: Tensor, *, segments: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the logits of the token at each place, `[batch, seq, vocab_size]`.

        The arguments are those of `Encoder.forward`.
        """
        logits: Tensor = self.head(self.features(tokens, segments=segments, mask=mask))
        return logits

    def features(
        self, tokens: Tensor, *, segments: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """What the head reads: `[batch, seq, dim]`. The arguments are those of `forward`."""
        x = self.encoder(tokens, segments=segments, mask=mask)
        y: Tensor = self.norm(self.activation(self.transform(x)))
        return y

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean cross-entropy of the hidden tokens, in nats.

        Args:
            tokens: `[batch, seq]`, int64, some of them replaced by a mask token.
            targets: `[batch, seq]`, int64: what was there, and -100 where nothing was hidden.
            segments: As in `Encoder.forward`.
            mask: As in `Encoder.forward`.
        """
        require_same_shape("encoder", "targets", targets, tokens)
        features = self.features(tokens, segments=segments, mask=mask)
        return linear_cross_entropy(features, self.head.weight, targets, linear_bias=self.head.bias)


class Classifier(nn.Module):
    """An encoder and the head that sorts whole sequences by the vector of their first token.

    logits = linear(tanh(linear(x[0])))
    """

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        require_counts("classifier", classes=classes)
        self.transform = nn.Linear(encoder.config.dim, encoder.config.dim)
        self.dropout = nn.Dropout(encoder.config.dropout)
        self.head = nn.Linear(encoder.config.dim, classes)
        initialise(self)  # not the encoder, which may have learned something already
        self.encoder = encoder

    def forward(
        self, tokens: Tensor, *, segments: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the logits of the classes, `[batch, classes]`.

        The arguments are those of `Encoder.forward`.
        """
        x = self.encoder(tokens, segments=segments, mask=mask)[:, 0]
        logits: Tensor = self.head(self.dropout(torch.tanh(self.transform(x))))
        return logits

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean cross-entropy of the classes `targets`, `[batch]`, int64, in nats."""
        if targets.shape != tokens.shape[:1]:
            raise ValueError(
                f"classifier: targets must be [{tokens.shape[0]}], got {list(targets.shape)}"
            )
        return cross_entropy(self(tokens, segments=segments, mask=mask), targets)
