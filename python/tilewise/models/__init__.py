"""Reference transformers, assembled from the ops."""

from tilewise.models.cache import KVCache
from tilewise.models.decoder import Decoder, DecoderConfig
from tilewise.models.encoder import Classifier, Encoder, EncoderConfig, MaskedLanguageModel
from tilewise.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from tilewise.models.generation import generate, translate
from tilewise.models.requests import Request, complete

__all__ = [
    "Classifier",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "KVCache",
    "MaskedLanguageModel",
    "Request",
    "complete",
    "generate",
    "translate",
]
