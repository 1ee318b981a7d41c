"""What the reference transformers are made of: attention, feed-forward, norms.

Each block is written to be read beside its formula; the ops of tilewise do the work in between.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import tilewise.nn
from tilewise.choice import choose
from tilewise.heads.cache import LONGEST
from tilewise.models.cache import KVCache
from tilewise.op import needs_gradient
from tilewise.ops.attention import attention
from tilewise.ops.attention_decode import DECODE, attention_decode

NORMS = ("rms_norm", "layer_norm")


class Attention(nn.Module):
    """Attention between linear maps, over `x` itself or over another sequence, `memory`.

    Args:
        dim: Width of `x` and of what is returned.
        heads: Query heads, of `dim / heads` dimensions each.
        kv_heads: Key and value heads, each read by `heads / kv_heads` query heads.
        bias: Whether the linear maps have one.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int | None = None, bias: bool = True):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        kv_dim = dim // heads * self.kv_heads
        self.query = nn.Linear(dim, dim, bias)
        self.key = nn.Linear(dim, kv_dim, bias)
        self.value = nn.Linear(dim, kv_dim, bias)
        self.output = nn.Linear(dim, dim, bias)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotary: tilewise.nn.Rotary | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Let each position of `x` read the positions of `memory`.

        Args:
            x: `[batch, seq, dim]`.
            memory: `[batch, seq_k, dim]`; None is `x`.
            mask: bool, True = attend, broadcastable to `[batch, heads, seq, seq_k]`.
            causal: Read no later position than one's own, the last of both being the same.
            rotary: Turns queries and keys by their positions.
            cache: Keys and values of earlier positions, to which those of `x` are appended. Those
                of a memory are computed once, when the cache is empty.

        Returns:
            `[batch, seq, dim]`.
        """
        q = _split(self.query(x), self.heads)
        positions = None if cache is None else cache.positions(x.shape[1])
        if memory is not None and cache is not None and cache.length:
            k, v = cache.seen()
        else:
            memory = x if memory is None else memory
            k = _split(self.key(memory), self.kv_heads)
            v = _split(self.value(memory), self.kv_heads)
            if rotary is not None and positions is not None:
                q, k = rotary(q, k, position_ids=positions)
            elif rotary is not None:
                q, k = rotary(q, k, offset=cache.length if cache else 0)
            if cache is not None:
                k, v = cache.append(k, v)
        if cache is not None and causal and mask is None and can_decode(q, cache):
            read = attention_decode(q, cache.keys, cache.values, cache.lengths)
        elif causal and positions is not None:
            there = torch.arange(k.shape[2], device=k.device) <= positions[:, None, :, None]
            read = attention(q, k, v, mask=there if mask is None else there & mask)
        else:
            read = attention(q, k, v, mask=mask, causal=causal)
        y: Tensor = self.output(read.transpose(1, 2).flatten(2))
        return y


def can_decode(q: Tensor, cache: KVCache) -> bool:
    """Whether a kernel is there for few queries, `[batch, heads, seq, head_dim]`, to a cache whose
    last positions are theirs."""
    few = q.shape[2] <= LONGEST and not needs_gradient(q, cache.keys)
    tensors = (q, cache.keys, cache.values, cache.lengths)
    return few and choose(DECODE, None, *tensors) != "reference"


def _split(x: Tensor, heads: int) -> Tensor:
    """`[batch, seq, heads * head_dim]` as `[batch, heads, seq, head_dim]`."""
    return x.view(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "swiglu": tilewise.nn.GLU,
    "gelu": tilewise.nn.GELU,
    "relu": nn.ReLU,
}
FEED_FORWARDS = tuple(_ACTIVATIONS)


class FeedForward(nn.Module):
    """Two linear maps with something in between, at each position on its own.

        "swiglu": down(silu(gate(x)) * up(x))
        "gelu", "relu": down(gelu(up(x))), down(relu(up(x)))

    Args:
        dim: Width of `x` and of what is returned.
        hidden: Width in between.
        kind: One of the above.
        bias: Whether the linear maps have one.
    """

    def __init__(self, dim: int, hidden: int, kind: str = "gelu", bias: bool = True):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias) if kind == "swiglu" else None
        self.up = nn.Linear(dim, hidden, bias)
        self.down = nn.Linear(hidden, dim, bias)
        self.activation: nn.Module = _ACTIVATIONS[kind]()

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, dim]` to `[batch, seq, dim]`."""
        branches = [self.up(x)] if self.gate is None else [self.gate(x), self.up(x)]
        y: Tensor = self.down(self.activation(*branches))
        return y


class EncoderBlock(nn.Module):
    """Attention to the whole sequence, then feed-forward, normalised after each is added.

        x = layer_norm(x + attention(x))
        x = layer_norm(x + feed_forward(x))

    Args:
        dim: Width of `x` and of what is returned.
        heads: Heads of the attention.
        hidden: Width of the feed-forward layer.
        feed_forward: Its kind.
        dropout: Probability with which what is added is dropped in training.
        eps: Of the norms.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, feed_forward: str, dropout: float, eps: float
    ) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.attention_norm = tilewise.nn.AddLayerNorm(dim, eps, dropout_p=dropout)
        self.feed_forward = FeedForward(dim, hidden, feed_forward)
        self.feed_forward_norm = tilewise.nn.AddLayerNorm(dim, eps, dropout_p=dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[batch, seq, dim]` to the same, reading only the positions that `mask` allows."""
        x = add_and_norm(self.attention_norm, self.attention(x, mask=mask), x)
        return add_and_norm(self.feed_forward_norm, self.feed_forward(x), x)


def add_and_norm(norm: nn.Module, branch: Tensor, x: Tensor) -> Tensor:
    """norm(dropout(branch) + x), in the dtype of `x`: under autocast the branch has a lower one."""
    y: Tensor = norm(branch.to(x.dtype), x)[0]
    return y


def padding_mask(kept: Tensor | None) -> Tensor | None:
    """A mask of the positions, `[batch, seq]`, as the mask of the keys that attention takes."""
    return None if kept is None else kept[:, None, None, :]


def default_hidden(dim: int, kind: str) -> int:
    """Width of a feed-forward layer of about `8 dim^2` weights: SwiGLU has three maps, not two."""
    return -(-8 * dim // 3 // 16) * 16 if kind == "swiglu" else 4 * dim


def make_norm(kind: str, dim: int, eps: float, bias: bool = True) -> nn.Module:
    """The norm called `kind`; RMSNorm never has a bias."""
    if kind == "rms_norm":
        return tilewise.nn.RMSNorm(dim, eps)
    return tilewise.nn.LayerNorm(dim, eps, bias=bias)


def make_add_norm(kind: str, dim: int, eps: float, bias: bool, dropout: float) -> nn.Module:
    """As `make_norm`, of the sum of a branch, that `dropout` thins out, and the stream."""
    if kind == "rms_norm":
        return tilewise.nn.AddRMSNorm(dim, eps, dropout_p=dropout)
    return tilewise.nn.AddLayerNorm(dim, eps, bias=bias, dropout_p=dropout)


@torch.no_grad()
def initialise(model: nn.Module, branches: int = 1) -> None:
    """Draw every linear map and embedding of `model`, before any weights are shared.

    Linear maps are normal with variance `1 / inputs`, those that end a branch with `1 / branches`
    of that, so that a residual stream of so many is no larger than one; biases are 0. Embeddings
    have variance `1 / dim`, as a head that shares them: with GPT-2's 0.02 beside these linear maps
    the branches drown the token, and 150 steps of the demo end at 5.3 nats rather than 4.6.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Attention):
            module.output.weight *= branches**-0.5
        elif isinstance(module, FeedForward):
            module.down.weight *= branches**-0.5
