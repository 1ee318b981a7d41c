"""Modules: parameters and one op call each, state_dict-compatible with torch.nn."""

from tilewise.nn.attention import MultiheadAttention
from tilewise.nn.cross_entropy import CrossEntropyLoss
from tilewise.nn.dropout_add import DropoutAdd
from tilewise.nn.embed import Embedding, InputEmbedding
from tilewise.nn.gelu import GELU, BiasGELU
from tilewise.nn.glu import GLU, PackedGLU
from tilewise.nn.layer_norm import AddLayerNorm, LayerNorm
from tilewise.nn.linear_cross_entropy import LinearCrossEntropyLoss
from tilewise.nn.rms_norm import AddRMSNorm, RMSNorm
from tilewise.nn.rotary import QKNormRotary, Rotary
from tilewise.nn.sampler import LogitsFilter, LogitsSampler, SampledGeneration, Sampler
from tilewise.nn.softmax import LogSoftmax, Softmax

__all__ = [
    "GELU",
    "GLU",
    "AddLayerNorm",
    "AddRMSNorm",
    "BiasGELU",
    "CrossEntropyLoss",
    "DropoutAdd",
    "Embedding",
    "InputEmbedding",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "LogitsFilter",
    "LogitsSampler",
    "MultiheadAttention",
    "PackedGLU",
    "QKNormRotary",
    "RMSNorm",
    "Rotary",
    "SampledGeneration",
    "Sampler",
    "Softmax",
]
