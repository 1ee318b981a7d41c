"""The reference transformers in one graph, with our ops in it, forward and backward."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from test_models import GPT, MODELS, decoder, loss_arguments, tokens_of
from torch._dynamo.backends.common import aot_autograd
from yardsticks import assert_right, by_matrix, nudged_copy

pytestmark = pytest.mark.usefixtures("on_the_device")


def tokens():
    return tokens_of(1, 3, 12)


def called_by(node):
    """The name of an op, also of one that writes in place, which a graph wraps."""
    wrapped = getattr(node.target, "__name__", "").startswith("auto_functionalized")
    return str(node.args[0] if wrapped else node.target)


@pytest.mark.parametrize("build, sequences, ops", MODELS.values(), ids=MODELS)
def test_compiled_graphs_contain_our_ops(build, sequences, ops):
    """The loss calls the model: both may be compiled."""
    graphs = []

    def record(graph, _):
        graphs.append([called_by(node) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    recorder = aot_autograd(fw_compiler=record, bw_compiler=record, inference_compiler=record)
    model = build()
    loss = torch.compile(model.loss, fullgraph=True, backend=recorder)
    loss(*loss_arguments(model, sequences)).backward()
    forward, backward = graphs
    for op, count in ops.items():
        assert sum(name.startswith(f"tilewise.{op}_forward") for name in forward) == count, op
        ours = [name for name in backward if name.startswith(f"tilewise.{op}_")]
        assert any(name.split(".")[1].endswith("_backward") for name in ours), op


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


@pytest.mark.parametrize(
    "options, learning", [({"kv_heads": 2}, True), (GPT, False)], ids=["llama", "gpt, not learning"]
)
def test_a_decoder_compiled_once_for_any_length(options, learning):
    model = decoder(**options, layers=1)
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=True, backend="aot_eager")

    def run(loss_of, text):
        with torch.set_grad_enabled(learning):
            loss = loss_of(text, text)
        return loss, *(torch.autograd.grad(loss, list(model.parameters())) if learning else ())

    for length in (5, 9, 24):
        text = tokens_of(1, 2, length)
        with torch._dynamo.config.patch(error_on_recompile=length > 5):
            ours = run(compiled, text)
        torch.testing.assert_close(ours, run(model.loss, text), rtol=0, atol=0)
