"""Functions of `torch.nn.functional`, run by our kernels: names, order and defaults are PyTorch's.

Values, gradients and result dtypes are PyTorch's too. Under autocast the dtypes are those of our
ops; wrong shapes and dtypes that PyTorch's own function does not see first raise our errors.
`with tilewise.backend(...)` says which kernels run.
"""

from tilewise.functional.attention import scaled_dot_product_attention
from tilewise.functional.elements import embedding, gelu, glu
from tilewise.functional.losses import cross_entropy, linear_cross_entropy
from tilewise.functional.norm import layer_norm, rms_norm
from tilewise.functional.softmax import log_softmax, softmax

__all__ = [
    "cross_entropy",
    "embedding",
    "gelu",
    "glu",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
]
