"""What every launch of a Triton kernel says, whatever a version of Triton takes for granted."""

import pytest
from cases import as_list, case_or_skip, leaves

from tilewise.op import INTERPRETED, OPS


@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if "triton" in op.backends], ids=lambda op: op.name
)
def test_every_launch_says_how_it_is_compiled(op, monkeypatch):
    from triton.runtime import interpreter, jit

    said = []
    kernel = interpreter.InterpretedFunction if INTERPRETED else jit.JITFunction
    monkeypatch.setattr(kernel, "run", lambda kernel, *args, **options: said.append(options))
    for size in op.sizes:
        call, _, tensors = case_or_skip(op, "triton", size=size)
        floating = [out for out in as_list(call(*leaves(op, tensors))) if out.requires_grad]
        if floating:
            sum(out.sum() for out in floating).backward()
    assert said
    assert all(options.get("enable_fp_fusion") is True for options in said)
    assert all(options["maxnreg"] * 32 * options["num_warps"] <= 65536 for options in said)
