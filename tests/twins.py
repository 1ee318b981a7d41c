"""The reference transformers once more, naively, from the papers, in plain torch.nn.

Each head is a set of linear maps of its own. Nothing here knows tilewise; `weights_of` says which
weights of a twin make up a weight of a model.
"""

import math

import torch
from torch import Tensor, nn


class NaiveAttention(nn.Module):
    """ "Attention Is All You Need", section 3.2: MultiHead(Q, K, V) = Concat(head_1, ...) W^O."""

    def __init__(self, dim, heads, kv_heads, bias):
        super().__init__()
        width = dim // heads
        self.queries = nn.ModuleList(nn.Linear(dim, width, bias) for _ in range(heads))
        self.keys = nn.ModuleList(nn.Linear(dim, width, bias) for _ in range(kv_heads))
        self.values = nn.ModuleList(nn.Linear(dim, width, bias) for _ in range(kv_heads))
        self.output = nn.Linear(heads * width, dim, bias)

    def forward(self, x, memory, forbidden, turn=lambda t: t):
        """`forbidden[b, i, j]`: in sequence b, position i must not read position j."""
        sharing = len(self.queries) // len(self.keys)
        heads = []
        for h, query in enumerate(self.queries):
            key, value = self.keys[h // sharing], self.values[h // sharing]
            scores = torch.einsum("bid,bjd->bij", turn(query(x)), turn(key(memory)))
            scores = scores / math.sqrt(query.out_features)
            probabilities = torch.softmax(scores.masked_fill(forbidden, -torch.inf), dim=-1)
            heads.append(torch.einsum("bij,bjd->bid", probabilities, value(memory)))
        return self.output(torch.cat(heads, dim=-1))


def forbidden(seq, memory_kept, causal):
    """What may not be read: padding, and the future."""
    batch, seq_k = memory_kept.shape
    rule = ~memory_kept[:, None, :].expand(batch, seq, seq_k)
    if causal:
        i, j = torch.arange(seq)[:, None], torch.arange(seq_k)
        rule = rule | (j > i)
    return rule


def turn_by_position(base):
    """RoFormer, equation 13: pairs (i, i + d / 2) as complex numbers, times exp(1j m theta_i)."""

    def turn(x):
        half = x.shape[-1] // 2
        pairs = torch.complex(x[..., :half], x[..., half:])
        theta = base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * theta
        turned = pairs * torch.polar(torch.ones_like(angle), angle).to(pairs.dtype)
        return torch.cat([turned.real, turned.imag], dim=-1)

    return turn


class NaiveFeedForward(nn.Module):
    """max(0, x W1 + b1) W2 + b2; with GELU (BERT, GPT); SwiGLU ("GLU Variants", equation 6)."""

    def __init__(self, dim, hidden, kind, bias):
        super().__init__()
        self.kind = kind
        self.w1 = nn.Linear(dim, hidden, bias)
        self.w2 = nn.Linear(hidden, dim, bias)
        if kind == "swiglu":
            self.v = nn.Linear(dim, hidden, bias)

    def forward(self, x):
        inner = self.w1(x)
        if self.kind == "relu":
            return self.w2(torch.clamp(inner, min=0))
        if self.kind == "gelu":
            return self.w2(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))))
        return self.w2(inner / (1 + torch.exp(-inner)) * self.v(x))


def naive_norm(kind, dim, eps, bias=True):
    return nn.RMSNorm(dim, eps) if kind == "rms_norm" else nn.LayerNorm(dim, eps, bias=bias)


class NaiveDecoder(nn.Module):
    """GPT-2 or Llama: norms before, a last norm, then the vocabulary."""

    def __init__(self, c, hidden):
        super().__init__()
        self.c = c
        self.tokens = nn.Embedding(c.vocab_size, c.dim)
        if c.positions == "learned":
            self.places = nn.Embedding(c.context, c.dim)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": naive_norm(c.norm, c.dim, c.eps, c.bias),
                    "attention": NaiveAttention(c.dim, c.heads, c.kv_heads or c.heads, c.bias),
                    "norm2": naive_norm(c.norm, c.dim, c.eps, c.bias),
                    "feed": NaiveFeedForward(c.dim, hidden, c.feed_forward, c.bias),
                }
            )
            for _ in range(c.layers)
        )
        self.last_norm = naive_norm(c.norm, c.dim, c.eps, c.bias)
        if not c.tied:
            self.vocabulary = nn.Linear(c.dim, c.vocab_size, bias=False)

    def forward(self, tokens):
        batch, seq = tokens.shape
        rule = forbidden(seq, torch.ones(batch, seq, dtype=torch.bool), causal=True)
        h = self.tokens(tokens)
        turn = turn_by_position(self.c.rotary_base)
        if self.c.positions == "learned":
            h = h + self.places(torch.arange(seq))
            turn = lambda t: t  # noqa: E731
        for layer in self.layers:
            normed = layer["norm1"](h)
            h = h + layer["attention"](normed, normed, rule, turn)
            h = h + layer["feed"](layer["norm2"](h))
        h = self.last_norm(h)
        return h @ self.tokens.weight.T if self.c.tied else self.vocabulary(h)


def post_norm_layer(dim, heads, hidden, kind, eps, cross=False):
    """LayerNorm(x + Sublayer(x)) for each sublayer."""
    parts = {
        "attention": NaiveAttention(dim, heads, heads, True),
        "norm1": nn.LayerNorm(dim, eps),
        "feed": NaiveFeedForward(dim, hidden, kind, True),
        "norm2": nn.LayerNorm(dim, eps),
    }
    if cross:
        parts |= {"cross": NaiveAttention(dim, heads, heads, True), "norm3": nn.LayerNorm(dim, eps)}
    return nn.ModuleDict(parts)


class NaiveBert(nn.Module):
    """BERT, section 3, with both heads."""

    def __init__(self, c, classes):
        super().__init__()
        self.tokens = nn.Embedding(c.vocab_size, c.dim)
        self.places = nn.Embedding(c.context, c.dim)
        self.sentences = nn.Embedding(c.segments, c.dim)
        self.first_norm = nn.LayerNorm(c.dim, c.eps)
        hidden = c.hidden or 4 * c.dim
        self.layers = nn.ModuleList(
            post_norm_layer(c.dim, c.heads, hidden, "gelu", c.eps) for _ in range(c.layers)
        )
        self.before_words = nn.Linear(c.dim, c.dim)
        self.words_norm = nn.LayerNorm(c.dim, c.eps)
        self.words_bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.pooler = nn.Linear(c.dim, c.dim)
        self.classes = nn.Linear(c.dim, classes)

    def read(self, tokens, segments, kept):
        seq = tokens.shape[1]
        h = self.tokens(tokens) + self.places(torch.arange(seq)) + self.sentences(segments)
        h = self.first_norm(h)
        rule = forbidden(seq, kept, causal=False)
        for layer in self.layers:
            h = layer["norm1"](h + layer["attention"](h, h, rule))
            h = layer["norm2"](h + layer["feed"](h))
        return h

    def words(self, *args):
        inner = self.before_words(self.read(*args))
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        return self.words_norm(inner) @ self.tokens.weight.T + self.words_bias

    def sorts(self, *args):
        return self.classes(torch.tanh(self.pooler(self.read(*args)[:, 0])))


class NaiveTransformer(nn.Module):
    """ "Attention Is All You Need", figure 1."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        hidden = c.hidden or 4 * c.dim
        self.targets = nn.Embedding(c.vocab_size, c.dim)
        if not c.shared:
            self.sources = nn.Embedding(c.source_vocab_size or c.vocab_size, c.dim)
            self.vocabulary = nn.Linear(c.dim, c.vocab_size, bias=False)
        size = c.dim, c.heads, hidden, "relu", c.eps
        self.left = nn.ModuleList(post_norm_layer(*size) for _ in range(c.layers))
        self.right = nn.ModuleList(post_norm_layer(*size, cross=True) for _ in range(c.layers))

    def embed(self, table, tokens):
        """Times sqrt(d_model), plus PE(pos, 2i) = sin, PE(pos, 2i + 1) = cos."""
        dim = self.c.dim
        places = torch.zeros(tokens.shape[1], dim, dtype=torch.float64)
        for place in range(tokens.shape[1]):
            for i in range(0, dim, 2):
                places[place, i] = math.sin(place / 10000 ** (i / dim))
                places[place, i + 1] = math.cos(place / 10000 ** (i / dim))
        return table(tokens) * math.sqrt(dim) + places.to(table.weight.dtype)

    def forward(self, source, target, source_kept, target_kept):
        x = self.embed(self.targets if self.c.shared else self.sources, source)
        rule = forbidden(source.shape[1], source_kept, causal=False)
        for layer in self.left:
            x = layer["norm1"](x + layer["attention"](x, x, rule))
            x = layer["norm2"](x + layer["feed"](x))
        y = self.embed(self.targets, target)
        past = forbidden(target.shape[1], target_kept, causal=True)
        across = forbidden(target.shape[1], source_kept, causal=False)
        for layer in self.right:
            y = layer["norm1"](y + layer["attention"](y, y, past))
            y = layer["norm3"](y + layer["cross"](y, x, across))
            y = layer["norm2"](y + layer["feed"](y))
        return y @ self.targets.weight.T if self.c.shared else self.vocabulary(y)


# --- Which weights of a twin make up a weight of a model.

NAMES = {
    "decoder": {
        "positions": "places",
        "embedding": "tokens",
        "head": "vocabulary",
        "norm": "last_norm",
        "blocks": "layers",
    },
    "encoder": {
        "encoder.embedding": "tokens",
        "encoder.positions": "places",
        "encoder.segments": "sentences",
        "encoder.embedding_norm": "first_norm",
        "encoder.blocks": "layers",
    },
    "words": {
        "transform": "before_words",
        "norm": "words_norm",
        "head.bias": "words_bias",
        "head.weight": "tokens.weight",
    },
    "sorts": {"transform": "pooler", "head": "classes"},
    "encoder_decoder": {
        "source_embedding": "sources",
        "target_embedding": "targets",
        "head": "vocabulary",
        "encoder": "left",
        "decoder": "right",
    },
    "shared": {"source_embedding": "targets"},
}
PARTS = {
    "attention_norm": "norm1",
    "feed_forward_norm": "norm2",
    "cross_attention_norm": "norm3",
    "cross_attention": "cross",
    "feed_forward.gate": "feed.w1",
    "feed_forward.up": "feed.w1",
    "feed_forward.down": "feed.w2",
    "query": "queries",
    "key": "keys",
    "value": "values",
}


def weights_of(name: str, twin: nn.Module, names: dict[str, str]) -> list[Tensor]:
    """The weights of `twin` that, one below the other, are the weight called `name`."""
    swiglu = any(".feed.v." in own for own, _ in twin.named_parameters())
    parts = PARTS | ({"feed_forward.up": "feed.v"} if swiglu else {})
    first = max((p for p in names if f"{name}.".startswith(f"{p}.")), key=len)
    name = f".{names[first]}{name.removeprefix(first)}."
    for ours, theirs in parts.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    name = name.strip(".")
    stem, _, leaf = name.rpartition(".")
    own = dict(twin.named_parameters())
    if stem.endswith(("queries", "keys", "values")):
        heads = len(twin.get_submodule(stem))
        return [own[f"{stem}.{head}.{leaf}"] for head in range(heads)]
    return [own[name]]
