"""CUDA kernels on the CPU: what the emulator finds, what it leaves alone, and who builds it.

The kernels of tests/emulation/ have a bug each, put in by a template argument, beside the same
kernel without it. The comment "found: NAME" is where the report must point.
"""

import os
import re
import subprocess
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch
from commands import assert_selftest_is_right, selftested

import tilewise
from tilewise import emulation, native, toolchain
from tilewise.check import outputs_and_grads
from tilewise.choice import EMULATED_ELEMENTS, refusal
from tilewise.op import OPS

ROOT = Path(__file__).parent.parent
SEEDED = sorted((ROOT / "tests" / "emulation").glob("*.cu"))
ORDERS = ("forward", "reverse", "2", "3")
CLUSTERED = ("layer_norm", "rms_norm", "softmax", "scored_softmax")  # where rows are wide
CLEAN_ORDERS = "21"  # 0 to 20, each the seed of another order

# The build that finds a bug, and what it says. "wrong" is a number that came out wrong: no line.
FOUND_PLAIN = {
    "missing_barrier_before_read": "wrong: element 0 is -?nan",
    "divergent_barrier": r"__syncthreads: divergent, 7 of 64 threads wait for the others",
    "return_before_barrier": "(?s)deadlock.*14 of 64 threads returned: 50-63"
    ".*50 of 64 threads wait in __syncthreads for 64 threads at .*: 0-49",
    "named_barrier_of_other_count": "bar.sync: barrier 3 is asked for 32 threads, and .* for 64",
    "wait_for_nobody": "atomicAdd: spins, and nothing else happens",
    "reduction_without_a_step": "wrong: element 0 is 120 and must be 496",
    "shuffle_in_a_branch": "__shfl_xor_sync: lane 15 reads lane 31, which is not in the mask",
    "shuffle_outside_of_the_mask": "__shfl_xor_sync: lane 31 is not in its mask 7fffffff",
    "shuffle_with_a_lane_that_returned": "__shfl_xor_sync: lane 15 reads lane 31, .* has returned",
    "missing_warp_barrier": "wrong: element 0 is -?nan",
    "index_outside_of_a_shared_array": r"out of bounds: 'float \[64\]' has no element 64",
    "write_past_dynamic_shared_memory": "byte 0 after the end of dynamic shared memory was written",
    "misaligned_vector_load": "misaligned address: .* must be a multiple of 16",
    "uninitialised_shared_memory": "wrong: element 32 is -?nan",
    "too_much_shared_memory": "failed: invalid argument",
    "flag_that_nobody_sets": "hangs: has let no other thread run for 0.3 seconds",
    "flags_of_each_other": "hangs: has let no other thread run for 0.3 seconds",
}
FOUND_ADDRESS = {
    "global_one_past_the_end": "AddressSanitizer: heap-buffer-overflow",
    "write_past_dynamic_shared_memory": "AddressSanitizer: use-after-poison",
    "index_outside_of_a_shared_array": "index 64 out of bounds for type 'float",
    "misaligned_vector_load": "misaligned address .* which requires 16 byte alignment",
}
FOUND_THREAD = dict.fromkeys(
    [
        "missing_barrier_before_read",
        "missing_barrier_before_reuse",
        "overlapping_named_barriers",
        "missing_warp_barrier",
        "shuffle_as_a_barrier",
        "sum_without_an_atomic",
        "missing_fence",
        "block_fence",
        "read_of_another_block",
    ],
    "ThreadSanitizer: data race",
)
FOUND_MEMORY = {
    "uninitialised_shared_memory": "4 bytes, and byte 252 of held was never written",
    "uninitialised_dynamic_shared_memory": "4 bytes, and byte 508 of dynamic shared memory was ne",
    "uninitialised_part_of_a_vector": "bytes, and byte 1004 of held was never written",
    "uninitialised_part_of_a_struct": "48 bytes, and byte 92 of held was never written",
    "uninitialised_counter": "atomicAdd: uninitialised memory, byte 0 of count was never written",
    "uninitialised_after_a_short_copy": "4 bytes, and byte 508 of dynamic shared memory was never",
    "uninitialised_shared_memory_of_a_peer": "byte 0 of held in block 1 of the cluster was never",
    "uninitialised_global_memory": "4 bytes, and byte 28 of 256 from cudaMalloc was never written",
    "read_before_the_copy_came": "4 bytes, and byte 0 of held is still on its way",
    "missing_barrier_before_read": "4 bytes, and byte 252 of held was never written",
    "missing_warp_barrier": "4 bytes, and byte 124 of held was never written",
    "index_outside_of_a_shared_array": r"out of bounds: 'float \[64\]' has no element 64",
    "misaligned_vector_load": "misaligned address: .* must be a multiple of 16",
    "flag_that_nobody_sets": "spins: reads the same again and again, and nothing else happens",
    "flags_of_each_other": "spins: reads the same again and again, and nothing else happens",
    "loop_without_an_end": "spins: reads the same again and again, and nothing else happens",
}
SPINS = ("flag_that_nobody_sets", "flags_of_each_other", "loop_without_an_end")
WITHOUT_A_LINE = {  # found before the kernel begins, and after it ended
    ("plain", "too_much_shared_memory"),
    ("plain", "write_past_dynamic_shared_memory"),
}


@cache
def built(sanitizer):
    try:
        return emulation.build_program(SEEDED, sanitizer)
    except RuntimeError as error:
        return error


def program(sanitizer):
    if lacks := toolchain.lacking(module=False):
        pytest.skip(f"emulation: needs {lacks}")
    made = built(sanitizer)
    assert isinstance(made, Path), made
    return made


def run(command, **options):
    # A launch that fails leaves threads where they are, and what these own.
    quiet = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"}
    quiet["TILEWISE_EMULATION_PATIENCE"] = "0.3"
    environment = {k: v for k, v in os.environ.items() if k != "TILEWISE_EMULATION_ORDER"}
    return subprocess.run(
        [str(word) for word in command], env=environment | quiet, capture_output=True,
        timeout=500, **options,
    )  # fmt: skip


def lines_marked(name):
    return {
        f"{file.name}:{number}"
        for file in SEEDED
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(rf"// found: .*\b{name}\b", line)
    }


def kinds(found):
    return [pytest.param(name, said, id=name) for name, said in found.items()]


def must_find(sanitizer, name, said):
    done = run([program(sanitizer), name, "bug", "1" if sanitizer != "thread" else "4"], text=True)
    told = done.stdout + done.stderr
    assert done.returncode not in (0, 2), told
    assert re.search(said, told), told
    if "wrong:" not in said and (sanitizer, name) not in WITHOUT_A_LINE:
        places = lines_marked(name)
        assert places
        assert any(re.search(rf"/{place}\b", told) for place in places), told


@pytest.mark.parametrize("name, said", kinds(FOUND_PLAIN))
def test_plain_finds(name, said):
    must_find("plain", name, said)


@pytest.mark.slow
@pytest.mark.parametrize("name, said", kinds(FOUND_ADDRESS))
def test_address_sanitizer_finds(name, said):
    must_find("address", name, said)


@pytest.mark.parametrize("name, said", kinds(FOUND_MEMORY))
def test_every_access_is_checked(name, said):
    must_find("memory", name, said)


@pytest.mark.slow
@pytest.mark.parametrize("name, said", kinds(FOUND_THREAD))
def test_thread_sanitizer_finds(name, said):
    must_find("thread", name, said)


def test_every_seeded_bug_is_found_by_some_build():
    seeds = set(re.findall(r'^    \{"(\w+)",', "".join(f.read_text() for f in SEEDED), re.M))
    assert seeds == {*FOUND_PLAIN, *FOUND_ADDRESS, *FOUND_THREAD, *FOUND_MEMORY}
    assert len(seeds) >= 15


@pytest.mark.parametrize(
    "sanitizer",
    [
        "plain", "memory",
        pytest.param("address", marks=pytest.mark.slow),
        pytest.param("thread", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_clean_kernels_give_no_finding_in_any_order(sanitizer):
    done = run([program(sanitizer), "every", "clean", CLEAN_ORDERS], text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", SPINS)
def test_who_spins_lets_others_run_where_every_access_is_seen(name):
    done = run([program("memory"), name, "clean", CLEAN_ORDERS], text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_impossible_patience_is_refused(monkeypatch):
    emulated()
    module, x = native.load(), torch.zeros(64)
    monkeypatch.setenv("TILEWISE_EMULATION_PATIENCE", "long")
    with pytest.raises(RuntimeError, match="PATIENCE: must be a number of seconds, got long"):
        module.softmax_forward(x.data_ptr(), x.data_ptr(), 1, 8, 8, 1.0, False, module.f32, 0)


# --- The kernels of the library, without Python.


@pytest.mark.parametrize(
    "sanitizer, orders, widths",
    [
        ("plain", 2, "--cols 4096"),
        pytest.param("plain", 4, "--cols 4096", marks=pytest.mark.slow),
        pytest.param("address", 1, "--cols 4096", marks=pytest.mark.slow),  # minutes to compile
        pytest.param("plain", 2, "--over 4096", marks=pytest.mark.slow),  # clusters
        pytest.param("address", 1, "--over 4096", marks=pytest.mark.slow),
        # 0.4 ms a thread: one op after the other, and one width that a cluster shares.
        *(
            pytest.param("thread", 1, f"--aligned {widths} {op}", marks=pytest.mark.slow)
            for widths, ops in (
                ("--cols 65", selftested()),
                ("--over 4096 --cols 16400", CLUSTERED),
            )
            for op in ops
        ),
        pytest.param("memory", 4, "--cols 4096", marks=pytest.mark.slow),  # half a minute
    ],
)
def test_selftest(sanitizer, orders, widths):
    if lacks := toolchain.lacking(module=False):
        pytest.skip(f"emulation: needs {lacks}")
    command = [emulation.build_selftest(sanitizer), "--orders", orders, *widths.split()]
    named = [word for word in widths.split() if word in selftested()]
    ops = named or (selftested() if "--over" not in widths else ())
    assert_selftest_is_right(run(command, text=True), ops)


@pytest.mark.slow
def test_selftest_where_there_are_no_clusters(monkeypatch):
    """A long row is a block's own, and longer ones are read again."""
    if lacks := toolchain.lacking(module=False):
        pytest.skip(f"emulation: needs {lacks}")
    monkeypatch.setenv("TILEWISE_EMULATION_MAJOR", "8")
    command = [emulation.build_selftest(), "--orders", 1, "--over", 4096]
    assert_selftest_is_right(run(command, text=True), ())


# --- Its numbers.


def test_conversions_round_as_pytorch_does():
    edges = [0.0, 5.9604645e-08, 2.9802322e-08, 6.1035156e-05, 65504, 65519.996, 65520, 3.4e38]
    edges += [1e-45, 1.00048828125, 1.0009765625, float("inf"), float("nan"), 1.00390625]
    bits = numpy.random.default_rng(0).integers(0, 2**32, 20000, dtype=numpy.uint32)
    every_half = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    halves = every_half.view(torch.float16).float().numpy()
    edges = numpy.array(edges, numpy.float32)
    values = numpy.concatenate([edges, -edges, bits.view(numpy.float32), halves])
    done = run([program("plain"), "conversions"], input=values.tobytes())
    kinds = [("half", "u2"), ("bfloat", "u2"), ("from_half", "f4"), ("from_bfloat", "f4")]
    got = numpy.frombuffer(done.stdout, kinds)
    assert len(got) == len(values)
    for name, dtype in (("half", torch.float16), ("bfloat", torch.bfloat16)):
        wanted = torch.from_numpy(values).to(dtype)
        known = ~torch.isnan(wanted).numpy()
        assert (got[name] == wanted.view(torch.uint16).numpy())[known].all()
        numpy.testing.assert_array_equal(got[f"from_{name}"], wanted.float().numpy())


# --- The CUDA backend on CPU tensors.


def emulated():
    if not native.EMULATED:
        pytest.skip("cuda: is emulated only under TILEWISE_EMULATE=1")
    if reason := native.obstacle():
        pytest.skip(f"cuda: {reason}")


IN_CUDA = [
    pytest.param(op, dtype, id=f"{op.name}-{dtype}")
    for op in OPS.values()
    if "cuda" in op.backends
    for dtype in sorted(op.backends["cuda"].dtypes, key=str)
]


@pytest.mark.parametrize("op, dtype", IN_CUDA)
def test_bits_do_not_depend_on_the_order(monkeypatch, op, dtype):
    emulated()

    def elements(size):
        tensors, _ = op.inputs(**size, device="cpu", dtype=dtype)
        return sum(t.numel() for t in tensors if t is not None)

    size = max(op.sizes, key=elements)
    torch.manual_seed(0)
    tensors, options = op.inputs(**size, device="cpu", dtype=dtype)
    first = None
    for order in ORDERS:
        monkeypatch.setenv("TILEWISE_EMULATION_ORDER", order)
        got = outputs_and_grads(op, op.call, tensors, options | {"backend": "cuda"})
        first = first or got
        torch.testing.assert_close(got, first, rtol=0, atol=0, equal_nan=True)


def test_a_kernel_that_fails_raises_where_it_was_called():
    emulated()
    module, x = native.load(), torch.zeros(64)
    odd = x.data_ptr() + 1
    with pytest.raises(RuntimeError, match="softmax_forward: misaligned address") as raised:
        module.softmax_forward(odd, odd, 1, 8, 8, 1.0, False, module.f32, 0)
    assert re.search(r"csrc/cuda/span\.cuh:\d+", str(raised.value))
    assert re.search(r"kernel void tilewise::.*forward_kernel<", str(raised.value))
    module.softmax_forward(x.data_ptr() + 128, x.data_ptr(), 1, 8, 8, 1.0, False, module.f32, 0)
    assert x[32:40].tolist() == [0.125] * 8


def test_an_unknown_order_is_refused(monkeypatch):
    emulated()
    module, x = native.load(), torch.zeros(64)
    monkeypatch.setenv("TILEWISE_EMULATION_ORDER", "sideways")
    with pytest.raises(RuntimeError, match="must be forward, reverse or a number, got sideways"):
        module.softmax_forward(x.data_ptr(), x.data_ptr(), 1, 8, 8, 1.0, False, module.f32, 0)


def test_emulated_kernels_are_never_chosen_unasked():
    emulated()
    native.load()
    x = torch.ones(2, 8)
    answer = tilewise.explain("softmax", x, dim=-1)
    assert answer["cuda"] == "is emulated, never chosen automatically"
    with tilewise.backend("cuda"):
        assert tilewise.explain("softmax", x, dim=-1)["cuda"] == "chosen"


def test_emulated_kernels_refuse_what_would_take_too_long(monkeypatch):
    emulated()
    softmax = OPS["softmax"]
    for elements, refused in ((EMULATED_ELEMENTS, False), (EMULATED_ELEMENTS + 1, True)):
        x = torch.empty(1, device="meta").expand(elements)
        with monkeypatch.context() as patch:
            patch.setattr(type(x), "device", torch.device("cpu"), raising=False)
            reason = refusal(softmax.backends["cuda"], x, dim=-1)
        assert bool(reason) == refused
    assert reason[1].startswith(f"is emulated, for inputs of at most {EMULATED_ELEMENTS} elements")


def test_a_missing_compiler_is_the_reason(monkeypatch):
    monkeypatch.setattr(native, "EMULATED", True)
    monkeypatch.setattr(emulation, "missing", lambda: "a C++ compiler")
    monkeypatch.setattr(native, "is_built", lambda: False)
    assert native.obstacle() == "needs a C++ compiler"
    with pytest.raises(RuntimeError, match=f"build: {emulation.MODULE} needs a C"):
        native.build()


# --- What it does not know is named when it is compiled.


@pytest.mark.parametrize(
    "statement, said",
    [
        ("float v = __tanhf_of_tomorrow(1.f);", "__tanhf_of_tomorrow"),
        ('asm volatile("bar.sync 0;" ::: "memory");', 'asm volatile("bar.sync 0;"'),
    ],
    ids=["intrinsic", "ptx"],
)
def test_what_the_emulator_lacks_is_named_with_its_line(tmp_path, statement, said):
    if toolchain.compiler() is None:
        pytest.skip("emulation: needs a C++ compiler")
    kernel = tmp_path / "kernel.cu"
    kernel.write_text(f"#include <cuda_runtime.h>\n__global__ void kernel() {{\n{statement}\n}}\n")
    include = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/emulation/include")]
    command = [toolchain.compiler(), "-std=c++17", "-fsyntax-only", *include, "-x", "c++", kernel]
    done = run(command, text=True)
    assert done.returncode != 0
    assert re.search(r"kernel\.cu:3:\d+: error: ", done.stderr)
    assert said in done.stderr


def test_an_unknown_sanitizer_is_refused():
    with pytest.raises(ValueError, match="must be one of plain, address, thread, memory, got"):
        emulation.build_program(SEEDED, "undefined")
