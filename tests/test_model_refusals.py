"""What the models refuse, and in which words."""

import re

import pytest
import torch
from test_models import decoder, encoder_decoder, tokens_of

from tilewise.models import (
    Classifier,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    EncoderDecoderConfig,
    MaskedLanguageModel,
)

pytestmark = pytest.mark.usefixtures("on_the_device")

CONFIGS = [
    (DecoderConfig, {"vocab_size": 0}, ValueError, "decoder: vocab_size must be at least 1, got 0"),
    (DecoderConfig, {"layers": 1.5}, TypeError, "decoder: layers must be an int, got 1.5"),
    (DecoderConfig, {"layers": True}, TypeError, "decoder: layers must be an int, got True"),
    (DecoderConfig, {"hidden": -2}, ValueError, "decoder: hidden must be at least 1, got -2"),
    (DecoderConfig, {"dim": 30}, ValueError,
     "decoder: dim must be a multiple of heads, got 30 and 4"),
    (DecoderConfig, {"kv_heads": 3}, ValueError,
     "decoder: heads must be a multiple of kv_heads, got 4 and 3"),
    (DecoderConfig, {"dim": 12}, ValueError,
     "decoder: dim / heads must be even for rotary positions, got 12 / 4"),
    (DecoderConfig, {"norm": "batch_norm"}, ValueError,
     "decoder: norm must be one of rms_norm, layer_norm, got 'batch_norm'"),
    (DecoderConfig, {"feed_forward": "tanh"}, ValueError,
     "decoder: feed_forward must be one of swiglu, gelu, relu, got 'tanh'"),
    (DecoderConfig, {"positions": "alibi"}, ValueError,
     "decoder: positions must be one of rotary, learned, got 'alibi'"),
    (DecoderConfig, {"dropout": 1.0}, ValueError,
     "decoder: dropout must be at least 0 and below 1, got 1.0"),
    (DecoderConfig, {"dropout": "some"}, TypeError, "decoder: dropout must be a float, got 'some'"),
    (DecoderConfig, {"eps": -1e-5}, ValueError, "decoder: eps must be positive, got -1e-05"),
    (DecoderConfig, {"rotary_base": 0}, ValueError, "decoder: rotary_base must be positive, got 0"),
    (EncoderConfig, {"segments": 0}, ValueError, "encoder: segments must be at least 1, got 0"),
    (EncoderConfig, {"dim": 30}, ValueError,
     "encoder: dim must be a multiple of heads, got 30 and 4"),
    (EncoderConfig, {"dropout": -0.1}, ValueError,
     "encoder: dropout must be at least 0 and below 1, got -0.1"),
    (EncoderConfig, {"eps": "tiny"}, TypeError, "encoder: eps must be a float, got 'tiny'"),
    (EncoderDecoderConfig, {"heads": 3}, ValueError,
     "encoder_decoder: dim must be a multiple of heads, got 512 and 3"),
    (EncoderDecoderConfig, {"dim": 9, "heads": 3}, ValueError,
     "encoder_decoder: dim must be even, got 9"),
    (EncoderDecoderConfig, {"source_vocab_size": 9}, ValueError,
     "encoder_decoder: source_vocab_size must be vocab_size where the embedding is shared, "
     "got 9 and 37"),
    (EncoderDecoderConfig, {"dropout": 2}, ValueError,
     "encoder_decoder: dropout must be at least 0 and below 1, got 2"),
    (EncoderDecoderConfig, {"eps": 0.0}, ValueError,
     "encoder_decoder: eps must be positive, got 0.0"),
]  # fmt: skip


@pytest.mark.parametrize("config, options, error, sentence", CONFIGS)
def test_configs(config, options, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        config(**{"vocab_size": 37} | options)


def encoder():
    return Encoder(EncoderConfig(37, context=24, dim=32, layers=1, heads=4))


T = tokens_of(1, 2, 5)  # good tokens
LONG = tokens_of(1, 2, 25)
INT = "must be torch.int64, got torch.float32"
BATCH = "must be [batch, seq], got [5]"
ROOM = "must have at most 24 positions, got 25"
SHAPE = "must have the shape of the tokens, [2, 5], got [2, 4]"

CALLS = [
    (decoder, (T.float(),), {}, TypeError, f"decoder: tokens {INT}"),
    (decoder, (T[0],), {}, ValueError, f"decoder: tokens {BATCH}"),
    (decoder, (LONG,), {}, ValueError, f"decoder: tokens {ROOM}"),
    (lambda: decoder().loss, (T, T[:, :4]), {}, ValueError, f"decoder: targets {SHAPE}"),
    (encoder, (T.float(),), {}, TypeError, f"encoder: tokens {INT}"),
    (encoder, (T[0],), {}, ValueError, f"encoder: tokens {BATCH}"),
    (encoder, (LONG,), {}, ValueError, f"encoder: tokens {ROOM}"),
    (encoder, (T,), {"segments": T.float()}, TypeError, f"encoder: segments {INT}"),
    (encoder, (T,), {"segments": T[:, :4]}, ValueError, f"encoder: segments {SHAPE}"),
    (encoder, (T,), {"mask": T}, TypeError,
     "encoder: mask must be torch.bool, got torch.int64"),
    (encoder, (T,), {"mask": T[:, :4] > 3}, ValueError, f"encoder: mask {SHAPE}"),
    (lambda: MaskedLanguageModel(encoder()).loss, (T, T[:, :4]), {}, ValueError,
     f"encoder: targets {SHAPE}"),
    (lambda: Classifier(encoder(), 3).loss, (T, T), {}, ValueError,
     "classifier: targets must be [2], got [2, 5]"),
    (lambda: Classifier, (encoder(), 0), {}, ValueError,
     "classifier: classes must be at least 1, got 0"),
    (encoder_decoder, (T.float(), T), {}, TypeError, f"encoder_decoder: source {INT}"),
    (encoder_decoder, (T, T.float()), {}, TypeError, f"encoder_decoder: tokens {INT}"),
    (encoder_decoder, (T[0], T), {}, ValueError, f"encoder_decoder: source {BATCH}"),
    (encoder_decoder, (LONG, T), {}, ValueError, f"encoder_decoder: source {ROOM}"),
    (encoder_decoder, (T, LONG), {}, ValueError, f"encoder_decoder: tokens {ROOM}"),
    (encoder_decoder, (T, T[:1]), {}, ValueError,
     "encoder_decoder: tokens must have the batch of the source, 2, got 1"),
    (encoder_decoder, (T, T), {"source_mask": T[:, :4] > 3}, ValueError,
     f"encoder_decoder: source_mask {SHAPE}"),
    (encoder_decoder, (T, T), {"mask": T}, TypeError,
     "encoder_decoder: mask must be torch.bool, got torch.int64"),
    (lambda: encoder_decoder().loss, (T, T, T[:, :4]), {}, ValueError,
     f"encoder_decoder: targets {SHAPE}"),
]  # fmt: skip


@pytest.mark.parametrize("model, arguments, options, error, sentence", CALLS)
def test_calls(model, arguments, options, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        model()(*arguments, **options)


def test_a_full_cache():
    model = decoder()
    cache = model.make_cache(2, capacity=6)
    model(T, cache=cache)
    with pytest.raises(ValueError, match="^decoder: tokens must have at most 1 positions, got 5$"):
        model(T, cache=cache)
    assert cache[0].length == 5, "refused before anything was written"
    model = encoder_decoder()
    memory = model.encode(T)
    cache = model.make_cache(memory, capacity=6)
    model.decode(T, memory, cache=cache)
    with pytest.raises(ValueError, match="^encoder_decoder: tokens must have at most 1 positions"):
        model.decode(T, memory, cache=cache)


def test_a_cache_of_another_batch():
    model = decoder()
    with pytest.raises(ValueError, match="^decoder: tokens must have the batch of the cache, 3"):
        model(T, cache=model.make_cache(3))


def test_a_refused_sequence_leaves_no_trace():
    """Nothing is launched: a token out of range in a refused batch is never looked up."""
    with pytest.raises(ValueError, match="decoder: tokens must have at most 24"):
        decoder()(torch.full((2, 25), 10**9))
