"""Tilewise: fused transformer kernels for PyTorch, with one public function per op."""

from tilewise import functional, nn
from tilewise.allocator import tune_allocator
from tilewise.choice import backend, explain
from tilewise.op import OPS
from tilewise.ops.attention import attention, attention_with_lse, merge_attention
from tilewise.ops.attention_decode import (
    append_kv_,
    attention_decode,
    attention_decode_with_lse,
)
from tilewise.ops.attention_varlen import attention_varlen, attention_varlen_with_lse
from tilewise.ops.cross_entropy import cross_entropy, cross_entropy_, cross_entropy_with_lse
from tilewise.ops.dropout_add import dropout_add
from tilewise.ops.embed import embed
from tilewise.ops.filter_logits import filter_logits, filtered_probs
from tilewise.ops.gelu import bias_gelu, gelu
from tilewise.ops.glu import glu, glu_packed
from tilewise.ops.layer_norm import add_layer_norm, layer_norm
from tilewise.ops.linear_cross_entropy import linear_cross_entropy
from tilewise.ops.linear_sample import linear_sample
from tilewise.ops.multinomial import gumbel_argmax, multinomial
from tilewise.ops.qk_norm_rotary import qk_norm_rotary
from tilewise.ops.rms_norm import add_rms_norm, rms_norm
from tilewise.ops.rotary import rotary, rotary_tables
from tilewise.ops.sample import sample, sample_with_logprobs
from tilewise.ops.softmax import log_softmax, softmax
from tilewise.ops.top_k import top_k
from tilewise.ops.verify_draft import verify_draft

__version__ = "0.1.0"

__all__ = [
    "OPS",
    "add_layer_norm",
    "add_rms_norm",
    "append_kv_",
    "attention",
    "attention_decode",
    "attention_decode_with_lse",
    "attention_varlen",
    "attention_varlen_with_lse",
    "attention_with_lse",
    "backend",
    "bias_gelu",
    "cross_entropy",
    "cross_entropy_",
    "cross_entropy_with_lse",
    "dropout_add",
    "embed",
    "explain",
    "filter_logits",
    "filtered_probs",
    "functional",
    "gelu",
    "glu",
    "glu_packed",
    "gumbel_argmax",
    "layer_norm",
    "linear_cross_entropy",
    "linear_sample",
    "log_softmax",
    "merge_attention",
    "multinomial",
    "nn",
    "qk_norm_rotary",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "sample",
    "sample_with_logprobs",
    "softmax",
    "top_k",
    "tune_allocator",
    "verify_draft",
]
