"""Multi-head attention as a module."""

import torch
from torch import Tensor

from tilewise.heads.formula import averaged, scale_of, weights
from tilewise.ops.attention import attention
from tilewise.rng import seed_and_offset

_linear, _pad = torch.nn.functional.linear, torch.nn.functional.pad


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`, its arguments and its state_dict, by `tilewise.attention`.

    A query with nothing to attend to averages nothing: 0, where PyTorch may answer NaN.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Project, attend, and project back.

        Args:
            query: `[seq_q, batch, embed_dim]`, batch first if the module is `batch_first`, or
                `[seq_q, embed_dim]`.
            key: `[seq_k, batch, kdim]`, alike.
            value: `[seq_k, batch, vdim]`, alike.
            key_padding_mask: `[batch, seq_k]` or `[seq_k]`. Bool, True for keys to ignore, which
                may then be anything finite; or floating point, added to the scores.
            need_weights: Return the probabilities too: then the reference runs, for no kernel ever
                has them all. False is the fast way.
            attn_mask: `[seq_q, seq_k]` or `[batch * heads, seq_q, seq_k]`. Bool, True where a query
                may not attend; or floating point, added to the scores.
            average_attn_weights: Return the mean of the probabilities over the heads.
            is_causal: Say that `attn_mask`, which must be there, lets each query attend to no later
                key than itself; of as many queries as keys it is then not read.

        Returns:
            What `query` is like; and `[batch, seq_q, seq_k]`, or `[batch, heads, seq_q, seq_k]`, or
            either without a batch; or None.

        Raises:
            RuntimeError: If `is_causal` is without `attn_mask`.
            ValueError: If a mask has a wrong shape.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("MultiheadAttention: attn_mask must be given if is_causal, got None")
        q, k, v = self._projected(query, key, value)
        causal = is_causal and q.shape[2] == k.shape[2]
        if query.ndim == 2 and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        mask, bias = self._rules(q, k, key_padding_mask, None if causal else attn_mask)

        dropout_p, p = self.dropout if self.training else 0.0, None
        if need_weights:
            out, p = _with_weights(q, k, v, mask, bias, causal, dropout_p)
            p = p.mean(1) if average_attn_weights else p
        else:
            out = attention(q, k, v, bias, mask=mask, causal=causal, dropout_p=dropout_p)
        y = self.out_proj(out.transpose(1, 2).flatten(2))
        if query.ndim == 2:
            return y[0], None if p is None else p[0]
        return y if self.batch_first else y.transpose(0, 1), p

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the heads, `[batch, heads, seq, head_dim]`."""
        same = query is key, key is value
        query, key, value = (self._batch_first(x) for x in (query, key, value))
        weight, bias, dim = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is not None and all(same):
            q, k, v = _linear(query, weight, bias).chunk(3, -1)
        elif weight is not None and same[1]:
            first, rest = (None, None) if bias is None else (bias[:dim], bias[dim:])
            q = _linear(query, weight[:dim], first)
            k, v = _linear(key, weight[dim:], rest).chunk(2, -1)
        else:
            three = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            parts = three if weight is None else weight.chunk(3)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = map(_linear, (query, key, value), parts, biases)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([t, added.to(t.dtype).expand(t.shape[0], 1, dim)], 1)
                for t, added in ((k, self.bias_k), (v, self.bias_v))
            )
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = (_pad(t, (0, 0, 0, 1)) for t in (k, v))
        return q, k, v

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _rules(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What `tilewise.attention` calls mask and bias."""
        (batch, heads, seq_q, _), seq_k = q.shape, k.shape[2]
        added = int(self.add_zero_attn) + (self.bias_k is not None)
        mask = bias = None
        for name, given, shapes in (
            ("key_padding_mask", key_padding_mask, [(batch, seq_k - added)]),
            ("attn_mask", attn_mask,
             [(seq_q, seq_k - added), (batch * heads, seq_q, seq_k - added)]),
        ):  # fmt: skip
            if given is None:
                continue
            if given.shape not in shapes:
                wanted = " or ".join(str(list(shape)) for shape in shapes)
                raise ValueError(
                    f"MultiheadAttention: {name} must be {wanted}, got {list(given.shape)}"
                )
            rule = _pad(given, (0, added)) if added else given
            if name == "key_padding_mask":
                rule = rule[:, None, None]
            elif rule.ndim == 3:
                rule = rule.view(batch, heads, seq_q, seq_k)
            if rule.dtype == torch.bool:
                mask = ~rule if mask is None else mask & ~rule
            else:
                rule = rule if rule.dtype == torch.float32 else rule.to(q.dtype)
                bias = rule if bias is None else bias + rule
        return mask, bias


def _with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out, and the probabilities as dropout left them, dtype of `q`."""
    draw: tuple[Tensor | int, Tensor | int] = 0, 0
    if dropout_p:
        draw = seed_and_offset("MultiheadAttention", 1, q.device, None, None, None)
    with torch.autocast(q.device.type, enabled=False):
        p, _ = weights(
            q, k, mask, bias, None, None, -1, 0 if causal else -1, 0.0, scale_of(q, None),
            dropout_p, *draw,
        )  # fmt: skip
        return averaged(p, q, v, mask), p.to(q.dtype)
