"""Reference transformers, assembled from the ops."""

from tilewise.models.blocks import KVCache
from tilewise.models.decoder import Decoder, DecoderConfig
from tilewise.models.generation import generate

__all__ = ["Decoder", "DecoderConfig", "KVCache", "generate"]
