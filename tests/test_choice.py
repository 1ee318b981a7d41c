"""Which backend runs, who decides, and what is said when it cannot."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from cases import DEVICE

import tilewise
from tilewise.choice import choose
from tilewise.op import OPS

X, WEIGHT = torch.randn(2, 8, device=DEVICE), torch.randn(8, device=DEVICE)
RMS_NORM = OPS["rms_norm"]


def python(code, **environment):
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    return run.stdout.strip()


def test_import_loads_no_compiler():
    loaded = python("import tilewise, sys; print(*sys.modules)").split()
    assert "tilewise.ops.rms_norm" in loaded
    assert not {"triton", "numba", "torch._dynamo", "tilewise._cuda"} & set(loaded)


def test_import_is_quick():
    """Less than 0.1 s beyond torch: the best of three, since the machine may be busy. Without the
    collector, which looks through all that torch has made whenever its turn happens to come."""
    code = (
        "import torch, time, gc; gc.disable(); start = time.process_time();"
        "import tilewise; print(time.process_time() - start)"
    )
    kept = {"PYTHONDONTWRITEBYTECODE": ""}  # or all the sources are compiled anew each time
    assert min(float(python(code, **kept)) for _ in range(3)) < 0.1


CHOICES = """
import tilewise, torch
from tilewise.choice import choose
from tilewise.op import OPS
def chosen(backend=None):
    return choose(OPS["rms_norm"], backend, torch.ones(1, 1), torch.ones(1))
print(chosen())
with tilewise.backend("numba"):
    print(chosen(), chosen("reference"))
with tilewise.backend("cuda", "numba"):
    print(chosen())
with tilewise.backend():
    print(chosen())
print(chosen())
"""


def test_argument_beats_block_beats_environment():
    printed = python(CHOICES, TILEWISE_BACKEND="reference", TILEWISE_EMULATE="0").split()
    assert printed == ["reference", "numba", "reference", "numba", "numba", "reference"]


def test_environment_with_an_unknown_name_is_refused_at_import():
    with pytest.raises(AssertionError, match="TILEWISE_BACKEND: must be among .* got 'metal'"):
        python("import tilewise", TILEWISE_BACKEND="metal")


def test_interpreted_triton_is_never_chosen():
    code = (
        "import tilewise, torch; from tilewise.choice import choose; from tilewise.op import OPS;"
        "from dataclasses import replace; op = OPS['rms_norm'];"
        "op = replace(op, backends={'triton': op.backends['triton']});"
        "x = torch.ones(1, 1);"
        "print(choose(op, None, x, None), choose(op, 'triton', x, None))"
    )
    assert python(code, TRITON_INTERPRET="1").split() == ["reference", "triton"]


def test_strict_preference_raises_where_nothing_can():
    tensors = (X.to("meta"), WEIGHT.to("meta"))
    with tilewise.backend("numba"):
        assert choose(RMS_NORM, None, *tensors) == "reference"
    with tilewise.backend("numba", strict=True), pytest.raises(RuntimeError, match="runs on cpu"):
        choose(RMS_NORM, None, *tensors)


def test_block_ends_even_by_an_error():
    before = tilewise.explain("rms_norm", X, WEIGHT)
    with pytest.raises(ZeroDivisionError), tilewise.backend("reference"):
        assert tilewise.explain("rms_norm", X, WEIGHT) != before
        raise ZeroDivisionError
    assert tilewise.explain("rms_norm", X, WEIGHT) == before


def test_block_with_an_unknown_name_is_refused_on_entry():
    with (
        pytest.raises(ValueError, match="backend: must be among cuda, .* got 'metal'"),
        tilewise.backend("metal"),
    ):
        pass


def test_compiled_code_follows_the_block():
    compiled = torch.compile(tilewise.rms_norm, fullgraph=True, backend="eager")
    compiled(X, WEIGHT)
    with tilewise.backend("reference"):
        assert torch.equal(compiled(X, WEIGHT), RMS_NORM.reference(X, WEIGHT))


def test_explain_marks_the_chosen_and_says_why_not():
    answer = tilewise.explain("rms_norm", X, WEIGHT)
    assert list(answer) == ["cuda", "numba", "triton", "reference"]
    assert answer[choose(RMS_NORM, None, X, WEIGHT)] == "chosen"
    assert tilewise.explain("rms_norm", X.long(), WEIGHT)["reference"] == "chosen"


def test_explain_says_that_a_transform_takes_the_reference():
    answers = []
    torch.vmap(lambda x: answers.append(tilewise.explain("rms_norm", x, WEIGHT)) or x)(X)
    assert answers[0]["reference"].startswith("chosen")
    assert "chosen" not in [answers[0][n] for n in ("cuda", "numba", "triton")]


def test_explain_of_an_unknown_op():
    with pytest.raises(ValueError, match="explain: op must be one of .*, got 'convolution'"):
        tilewise.explain("convolution", X)


@pytest.mark.parametrize(
    "error, message, x, backend",
    [
        (ValueError, "must be one of cuda, numba, triton, reference, got 'metal'", X, "metal"),
        (RuntimeError, "runs on (cuda|cpu), got meta", X.to("meta"), "cuda"),
        (RuntimeError, "runs on cpu, got meta; 'reference' can", X.to("meta"), "numba"),
        (TypeError, "takes .*, got torch.int64", X.to("cpu").long(), "numba"),
    ],
    ids=["name", "absent", "device", "dtype"],
)
def test_named_backend_that_cannot_run_says_why(error, message, x, backend):
    with pytest.raises(error, match=f"rms_norm: backend .*{message}"):
        choose(RMS_NORM, backend, x, WEIGHT)


def test_named_backend_that_lacks_an_option_names_one_that_has_it():
    narrow = replace(RMS_NORM.backends["numba"], refuses=lambda *t, **o: "takes one column")
    op = replace(RMS_NORM, backends={"numba": narrow})
    with pytest.raises(NotImplementedError, match="takes one column; 'reference' can run this"):
        choose(op, "numba", X.cpu(), WEIGHT.cpu())


def test_automatic_choice_steps_past_what_declines():
    slow = replace(RMS_NORM.backends["numba"], declines=lambda *t, **o: "is slower here")
    op = replace(RMS_NORM, backends={"numba": slow})
    assert choose(op, None, X.cpu(), WEIGHT.cpu()) == "reference"
    assert choose(op, "numba", X.cpu(), WEIGHT.cpu()) == "numba"


def test_choosing_costs_microseconds():
    choose(RMS_NORM, None, X, WEIGHT, eps=1e-6)
    start = time.thread_time()
    for _ in range(2000):
        choose(RMS_NORM, None, X, WEIGHT, eps=1e-6)
    assert (time.thread_time() - start) / 2000 < 100e-6
