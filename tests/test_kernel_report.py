"""The kernel report sees what it claims to see: seeded kernels beside clean ones."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import seeded_kernels

from tilewise import toolchain
from tilewise.verify import baseline, cuda_kernels, kernel_report
from tilewise.verify.architectures import ARCHITECTURES, occupancy
from tilewise.verify.disassembly import disassemble, flops, hot_loop, parse, tool
from tilewise.verify.kernel import Kernel
from tilewise.verify.promises import broken, gone

HOPPER = ARCHITECTURES["sm_90"]

# As nvdisasm prints it: a loop of 18 instructions, a wait within it, a jump back from behind the
# end, and the jump to itself that ends every kernel.
CODE = """
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/              @!PT LDS RZ, [RZ] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R4.64], P2 ;
        /*0040*/                   LDSM.16.M88.4 R4, [R8] ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0070*/                   MUFU.EX2 R5, R5 ;
        /*0080*/                   FFMA R5, R5, R6, R7 ;
.L_x_2:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*00a0*/              @!P0 BRA `(.L_x_2) ;
        /*00b0*/                   FADD R5, R5, R6 ;
        /*00c0*/                   FADD R5, R5, R6 ;
        /*00d0*/                   SHFL.BFLY PT, R5, R5, 0x1, 0x1f ;
        /*00e0*/                   STS.64 [R5], R6 ;
        /*00f0*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0100*/                   ISETP.GE.AND P0, PT, R0, R1, PT ;
        /*0110*/                   NOP ;
        /*0120*/              @!P0 BRA `(.L_x_1) ;
        /*0130*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0140*/                   STL [R1], R4 ;
        /*0150*/                   LDL.LU R4, [R1] ;
        /*0160*/                   EXIT ;
.L_x_3:
        /*0170*/                   WARPSYNC.ALL ;
        /*0180*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*0190*/                   BRA `(.L_x_4);
        /*01a0*/                   NOP;
"""


OTHERS = [("clean product", name) for name in ("sm_80", "sm_100", "sm_120", "gfx942")]


@pytest.fixture(scope="module")
def seeded():
    """The report of each seeded kernel on Hopper, and of a clean one on the others."""
    names = list(seeded_kernels.KERNELS)
    asked = [*((name, "sm_90") for name in names), *OTHERS]
    with kernel_report.processes() as pool:
        futures = [pool.submit(seeded_kernels.compiled, one) for one in asked]
        outcomes = [future.exception() or future.result() for future in futures]
    return dict(zip([*names, *OTHERS], outcomes, strict=True))


def as_shipped(kernel):
    """As if it were a row kernel of ours, on a size for which 16-byte accesses are promised."""
    size = {"rows": 1, "cols": 1024}
    return replace(kernel, op="rms_norm", kernel="_forward_kernel", dtype="bfloat16", size=size)


def figures(kernel):
    return [kernel.loop_instructions, kernel.warps, baseline.work(kernel), 0, 0]


def test_machine_code_is_read():
    (code,) = parse(CODE)
    assert code.kernel == "some_kernel"
    assert code.instructions[-1].name == "BRA"  # not the jump to itself, nor what pads it
    assert [i.name for i in code.instructions].count("NOP") == 0
    assert flops(code, 5) == 2 * 64 * 128 * 16 / 4
    loop = hot_loop(code, HOPPER, warps=4)
    assert loop.looped
    assert loop.instructions == 16
    assert loop.bound == "tensor"
    assert dict(loop.cycles) == {
        "tensor": 2 * (2 * 64 * 128 * 16) / 4096,
        "issue": 16 * 4 / 4,
        "fp32": 3 * 4 * 32 / 128,
        "special": 4 * 32 / 16,
        # Two operands of 128 rows, one of 64; LDSM, LDGSTS, STS.64, SHFL.
        "shared": (2 * 128 * 32 + 64 * 32) / 128 + 4 * (4 + 4 + 2 + 1),
        "memory": round(4 * 32 * 16 / HOPPER.cached, 1),
    }


def test_matrix_instructions_are_weighed():
    text = """.text.k:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R6, R4 ;
        /*0010*/                   HMMA.1688.F32.TF32 R4, R8, R6, R4 ;
        /*0020*/                   IMMA.16832.S8.S8 R4, R8.ROW, R6.COL, R4 ;
        /*0030*/                   UMOV UR25, 0x8100490 ;
        /*0040*/                   UTCHMMA gdesc[UR4], gdesc[UR8], tmem[UR28], tmem[UR24], idesc[UR25], !UPT ;
"""  # noqa: E501
    (code,) = parse(text)
    dense = 2 * 16 * 8
    assert [flops(code, i) for i in range(5)] == [
        dense * 16, dense * 8 * 2, dense * 32 / 2, 0, 2 * 128 * 64 * 16,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "registers, shared, warps, blocks, limit",
    [
        (32, 0, 8, 8, "registers"),  # all 64 warps: as many as there may be, and as fit
        (168, 80 * 1024, 4, 2, "shared memory"),
        (168, 0, 4, 3, "registers"),
        (16, 0, 1, 32, "blocks"),
        (16, 0, 16, 4, "warps"),
        (255, 228 * 1024, 8, 0, "shared memory"),
    ],
)
def test_occupancy(registers, shared, warps, blocks, limit):
    found = occupancy(HOPPER, registers, shared, warps)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == blocks * warps / 64


def test_a_clean_kernel_breaks_nothing(seeded):
    for name in ("clean copy", "clean loop", "clean product"):
        assert broken(as_shipped(seeded[name])) == [], name
    assert seeded["clean copy"].loads == {"16": 1}
    assert seeded["clean product"].matrix["HGMMA"] > 0
    assert seeded["clean product"].loop


def test_every_architecture_has_its_matrix_instruction(seeded):
    words = dict(zip(OTHERS, ("HMMA", "UTCHMMA", "HMMA", "mfma"), strict=True))
    for asked, word in words.items():
        kernel = seeded[asked]
        assert kernel.architecture == asked[1]
        assert kernel.registers > 0
        assert kernel.matrix[word] > 0, asked
        assert broken(as_shipped(kernel)) == [], asked
        if rate := ARCHITECTURES[asked[1]].tensor:  # the model counts what the source multiplies
            assert kernel.cycles["tensor"] == 2 * 128 * 128 * 64 / rate, asked


def test_2_byte_loads_are_seen(seeded):
    kernel = as_shipped(seeded["2-byte loads"])
    assert kernel.loads == {"2": 8}
    assert broken(kernel) == ["must move 16 bytes at a time, got 16 narrower than 4"]
    assert broken(replace(kernel, size={"rows": 1, "cols": 1000})) == []  # nothing is promised


def test_a_spill_is_seen(seeded):
    kernel = seeded["spill"]
    assert kernel.registers == 255
    assert kernel.spill_loads > 0 and kernel.spill_stores > 0
    assert any("must not spill" in problem for problem in broken(kernel))


def test_too_much_shared_memory_is_seen(seeded):
    kernel = seeded["too much shared memory"]
    assert (kernel.blocks, kernel.limit) == (0, "shared memory")
    assert f"must have at most {227 * 1024} bytes" in broken(kernel)[0]


def test_a_missing_matrix_instruction_is_seen(seeded):
    size = {"seq_q": 64, "dim": 64}
    about = {"op": "attention", "kernel": "_forward_kernel", "dtype": "bfloat16", "size": size}
    assert broken(replace(seeded["clean product"], **about)) == []
    assert "must have HGMMA, got none" in broken(replace(seeded["clean copy"], **about))


def test_a_promised_kernel_that_is_gone_is_seen(seeded):
    narrow = replace(seeded["clean copy"], op="rms_norm", dtype="bfloat16", backend="cuda")
    rows = [replace(narrow, kernel="forward_kernel<4, bf16>"), narrow]
    assert gone(rows) == [
        "sm_90 rms_norm bfloat16: must have a cuda kernel *, true>, got none",
    ]
    assert gone([*rows, replace(narrow, kernel="forward_kernel<bf16, 8, true>")]) == []
    assert gone([replace(narrow, op="sample", dtype="float32")]) == []


def test_a_loop_that_grew_is_seen(seeded):
    before, after = as_shipped(seeded["clean loop"]), as_shipped(seeded["longer loop"])
    known = {before.name: figures(before)}
    assert before.loop and after.loop
    assert baseline.grown(before, known) is None
    assert baseline.grown(after, known).startswith("must keep its loop within 10% of ")
    assert baseline.grown(after, {}) is None
    known = {before.name: figures(replace(before, loop_instructions=100))}
    assert baseline.grown(replace(before, loop_instructions=110), known) is None
    assert baseline.grown(replace(before, loop_instructions=111), known)


def test_a_loop_that_was_unrolled_has_not_grown(seeded):
    kernel = as_shipped(seeded["clean loop"])
    twice = {unit: 2 * cycles for unit, cycles in kernel.cycles.items()}
    instructions = 2 * kernel.loop_instructions
    unrolled = replace(kernel, loop_instructions=instructions, cycles=twice)
    assert baseline.grown(unrolled, {kernel.name: figures(kernel)}) is None
    assert baseline.grown(replace(unrolled, cycles=kernel.cycles), {kernel.name: figures(kernel)})


def test_what_does_not_compile_is_an_error(seeded):
    assert "CompilationError" in type(seeded["does not compile"]).__name__
    failed = Kernel("rms_norm", "k", "triton", "sm_90", "bfloat16", error="CompilationError: no")
    assert broken(failed) == ["must compile, got CompilationError: no"]


SERIALISED = """
#include <cstdint>
extern "C" __global__ void __launch_bounds__(128) seeded(float* out, uint64_t a, uint64_t b) {
  float d[4] = {0.f, 0.f, 0.f, 0.f};
  for (int i = 0; i < 4; ++i) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;\\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a + i), "l"(b + i));
    d[0] *= 2.f;  // before it is waited for
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}
"""
needs_nvcc = pytest.mark.skipif(
    cuda_kernels.missing() is not None, reason=f"needs {cuda_kernels.missing()}"
)


@needs_nvcc
def test_serialised_matrix_instructions_are_seen(tmp_path):
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (folder / "seeded.cu").write_text(SERIALISED)
    (kernel,) = cuda_kernels.kernels_of((str(folder / "seeded.cu"), "sm_90"))
    assert (kernel.op, kernel.warps, kernel.matrix) == ("seeded", 4, {"HGMMA": 4})
    assert broken(kernel) == ["must keep wgmma in flight, got C7511 of ptxas"]
    (failed,) = cuda_kernels.kernels_of((str(folder / "seeded.cu"), "sm_80"))
    assert "not supported on .target 'sm_80'" in failed.error


@needs_nvcc
def test_what_is_built_is_read_and_not_compiled_again():
    (task, *others) = cuda_kernels.tasks([], ["sm_90"])
    if others:
        pytest.skip("the module is not built for sm_90 as it is")
    (file, *others) = cuda_kernels.tasks(["linear_cross_entropy"], ["sm_90"])
    assert (Path(task[0]).suffix, Path(file[0]).name) == (".so", "linear_cross_entropy.cu")
    read = [k for k in cuda_kernels.kernels_of(task) if k.op == "linear_cross_entropy"]
    assert not others and sorted(read, key=str) == sorted(cuda_kernels.kernels_of(file), key=str)


@needs_nvcc
def test_cuda_kernels_are_named(tmp_path):
    folder = tmp_path / "csrc" / "cuda" / "some_op"
    folder.mkdir(parents=True)
    (folder / "part.cu").write_text(
        "#include <cuda_bf16.h>\nnamespace tilewise { namespace {\n"
        "template <int kWidth, typename T> __global__ void twice(T* y) { y[kWidth] += y[0]; }\n"
        "} void* use() { return (void*)twice<8, __nv_bfloat16>; } }\n"
    )
    (kernel,) = cuda_kernels.kernels_of((str(folder / "part.cu"), "sm_90"))
    assert (kernel.op, kernel.kernel, kernel.dtype) == ("some_op", "twice<8, bf16>", "bfloat16")
    assert kernel.warps == cuda_kernels.UNBOUNDED / 32


@needs_nvcc
def test_a_file_for_another_architecture_has_no_kernels():
    (file,) = (toolchain.source() / "csrc").rglob("hopper_forward.cu")
    assert cuda_kernels.kernels_of((str(file), "sm_80")) == []


LOOPS = """
template <int kWidth> __global__ void twice(float* y, int n) {
  for (int i = 0; i < n; ++i) y[i * kWidth] += y[i] / y[n];
}
void* use() { return (void*)((char*)twice<2> - (char*)twice<3>); }
"""


@needs_nvcc
def test_code_that_is_read_together_is_read_as_it_is_alone(tmp_path):
    source, cubin = tmp_path / "loops.cu", tmp_path / "loops.cubin"
    source.write_text(LOOPS)
    command = [str(toolchain.nvcc()), "-cubin", "-arch=sm_90a", str(source), "-o", str(cubin)]
    subprocess.run(command, check=True)
    alone = subprocess.run([tool("nvdisasm"), "-c", cubin], capture_output=True, text=True)
    wanted = {code.kernel: code for code in parse(alone.stdout)}
    assert len(wanted) == 2 and all(code.loops for code in wanted.values())
    for codes in disassemble([cubin.read_bytes()] * 3, HOPPER):
        assert {code.kernel for code in codes} == set(wanted)
        for code in codes:
            same = wanted[code.kernel]
            assert list(code.loops) == list(same.loops)
            assert [i.name for i in code.instructions] == [i.name for i in same.instructions]


def test_of_kernels_compiled_together_the_one_that_kills_the_compiler_is_named(monkeypatch):
    def spread(pool, function, groups):
        for place, group in enumerate(groups):
            dies = any(task.kernel == "fatal" for task in group)
            yield place, None if dies else [task.failed("was compiled") for task in group]

    monkeypatch.setattr(kernel_report, "spread", spread)
    names = ["one", "fatal", "other"]
    tasks = [kernel_report.Task("glu", "float32", "sm_90", {}, 0, n, {}, n) for n in names]
    found = {kernel.kernel: kernel.error for _, kernel in kernel_report.report(None, tasks)}
    assert found == {
        "one": "was compiled", "fatal": "the compiler ended its process", "other": "was compiled",
    }  # fmt: skip


def test_a_compiler_that_dies_is_said_to_have():
    with kernel_report.processes(1) as pool:
        found = dict(kernel_report.spread(pool, _die_at_1, [1, 2]))
    assert found == {0: None, 1: 2}


def _die_at_1(item):
    if item == 1:
        import os

        os._exit(1)
    return item
