"""The reference transformers in one graph, with our ops in it, forward and backward."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from test_models import decoder, encoder_decoder, tokens_of
from torch._dynamo.backends.common import aot_autograd
from yardsticks import assert_right, by_matrix, nudged_copy

from tilewise.models import Classifier, Encoder, EncoderConfig, MaskedLanguageModel

pytestmark = pytest.mark.usefixtures("on_the_device")

GPT = {"positions": "learned", "norm": "layer_norm", "feed_forward": "gelu", "bias": True}
LLAMA_OPS = {"rms_norm", "add_rms_norm", "rotary", "attention", "glu"}
GPT_OPS = {"layer_norm", "add_layer_norm", "attention", "gelu"}


def bert():
    return Encoder(EncoderConfig(37, context=24, dim=32, layers=2, heads=4, dropout=0.0))


def tokens():
    return tokens_of(1, 3, 12)


MODELS = {
    "llama": (lambda: decoder(kv_heads=2), 1, LLAMA_OPS),
    "gpt": (lambda: decoder(**GPT), 1, GPT_OPS),
    "bert": (lambda: MaskedLanguageModel(bert()), 1, GPT_OPS),
    "classifier": (lambda: Classifier(bert(), 5), 1, GPT_OPS),
    "2017": (encoder_decoder, 2, {"add_layer_norm", "attention"}),
}


@pytest.mark.parametrize("build, sequences, ops", MODELS.values(), ids=MODELS)
def test_compiled_graphs_contain_our_ops(build, sequences, ops):
    graphs = []

    def record(graph, _):
        graphs.append(sorted(str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    recorder = aot_autograd(fw_compiler=record, bw_compiler=record, inference_compiler=record)
    model = torch.compile(build(), fullgraph=True, backend=recorder)
    model(*[tokens()] * sequences).sum().backward()
    forward, backward = graphs
    for op in ops:
        assert any(name.startswith(f"tilewise.{op}_forward") for name in forward), op
        assert any(name.startswith(f"tilewise.{op}_backward") for name in backward), op


def test_loss_in_one_graph():
    """The loss calls the model: both may be compiled, and linear_cross_entropy is ours too."""
    graphs = []

    def record(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    recorder = aot_autograd(fw_compiler=record, bw_compiler=record, inference_compiler=record)
    model = decoder()
    torch.compile(model.loss, fullgraph=True, backend=recorder)(tokens(), tokens()).backward()
    for op in LLAMA_OPS | {"linear_cross_entropy"}:
        assert any(name.startswith(f"tilewise.{op}_") for name in graphs[0]), op


def test_a_decoder_compiled_by_inductor():
    torch.manual_seed(0)
    model = decoder(kv_heads=2)

    def run(model):
        out = model(tokens())
        out.square().sum().backward()
        grads = {name: weight.grad for name, weight in model.named_parameters()}
        return {"out": out} | by_matrix(grads)

    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True)
    yardsticks = [nudged_copy(model) for _ in range(4)]
    runs = [run(m) for m in (compiled, copy.deepcopy(model).double(), model, *yardsticks)]
    assert_right({name: [group[name] for group in runs] for name in runs[0]})


def test_a_decoder_compiled_with_any_length():
    model = decoder(kv_heads=2)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9, 24):
        text = tokens_of(1, 2, length)
        torch.testing.assert_close(compiled(text), model(text), rtol=0, atol=0)
