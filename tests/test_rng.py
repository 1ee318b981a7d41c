"""One file of vectors, four implementations: reference, Numba, Triton, and the C++ header."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

from tilewise import rng

ROOT = Path(__file__).parent.parent
VECTORS = json.loads((ROOT / "tests/philox_vectors.json").read_text())

# The first three are those published with the algorithm: all zeros, all ones, digits of pi.
PUBLISHED = [
    [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
    [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
]
WORDS = [vector["words"] for vector in VECTORS["philox"]]
UNIFORM_BITS = [vector["bits"] for vector in VECTORS["uniform"]]
KEPT = [
    [vector["word"] >= dropout["threshold"] for vector in VECTORS["uniform"]]
    for dropout in VECTORS["keep"]
]


def counters():
    names = "seed", "offset", "row", "group"
    return [torch.tensor([vector[name] for vector in VECTORS["philox"]]) for name in names]


def uniform_words():
    return torch.tensor([vector["word"] for vector in VECTORS["uniform"]])


def bits(values):
    return [struct.unpack("<I", struct.pack("<f", value))[0] for value in values]


def test_vectors_begin_with_the_published_ones():
    assert WORDS[:3] == PUBLISHED


def test_reference():
    assert rng.philox(*counters()).tolist() == WORDS
    assert bits(rng._as_uniform(uniform_words(), torch.float32).tolist()) == UNIFORM_BITS
    thresholds = [rng.keep_threshold(vector["p"]) for vector in VECTORS["keep"]]
    assert thresholds == [vector["threshold"] for vector in VECTORS["keep"]]


def test_numba():
    numba = pytest.importorskip("numba", reason="numba is not installed")
    import numpy as np

    from tilewise.kernels.numba._philox import keep, philox, uniform

    draw = numba.njit(lambda seed, offset, row, group: philox(seed, offset, row, group))
    as_uniform = numba.njit(lambda word: uniform(word))
    kept = numba.njit(lambda word, threshold: keep(word, threshold))
    places = zip(*(t.tolist() for t in counters()), strict=True)
    assert [list(draw(*place)) for place in places] == WORDS
    words = [np.uint32(word) for word in uniform_words().tolist()]
    assert bits(map(as_uniform, words)) == UNIFORM_BITS
    assert [[kept(w, v["threshold"]) for w in words] for v in VECTORS["keep"]] == KEPT


TRITON = """
import json, os, torch, triton, triton.language as tl
from tilewise.kernels.triton._philox import keep, philox, philox_words, uniform
from test_rng import VECTORS, counters, uniform_words

@triton.jit
def draw(out, seed, offset, row, group, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    key, place = tl.load(seed + i), tl.load(offset + i)
    a, b, c, d = philox(key, place, tl.load(row + i), tl.load(group + i))
    tl.store(out + 4 * i, a)
    tl.store(out + 4 * i + 1, b)
    tl.store(out + 4 * i + 2, c)
    tl.store(out + 4 * i + 3, d)

@triton.jit
def draw_row(out, seed, offset, row, BLOCK: tl.constexpr):
    words = philox_words(tl.load(seed), tl.load(offset), tl.load(row), 8, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), words)

@triton.jit
def judge(u, kept, words, threshold, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    word = tl.load(words + i).to(tl.uint32)
    tl.store(u + i, uniform(word))
    tl.store(kept + i, keep(word, tl.load(threshold)))

device = "cuda" if torch.cuda.is_available() else "cpu"
def padded(t):
    return torch.cat([t, t.new_zeros(64 - len(t))]).to(device)

places = [padded(t) for t in counters()]
words = torch.zeros(64, 4, dtype=torch.int64, device=device)
draw[(1,)](words, *places, BLOCK=64)
row = torch.zeros(16, dtype=torch.int64, device=device)
draw_row[(1,)](row, *(t[2:3].contiguous() for t in places[:3]), BLOCK=16)
values = padded(uniform_words())
u, kept = torch.zeros(64, device=device), torch.zeros(64, dtype=torch.bool, device=device)
flags = []
for vector in VECTORS["keep"]:
    threshold = torch.tensor([vector["threshold"]], device=device)
    judge[(1,)](u, kept, values, threshold, BLOCK=64)
    flags.append(kept[: len(uniform_words())].tolist())
print(json.dumps({"words": words[: len(VECTORS["philox"])].tolist(), "row": row.tolist(),
                  "bits": u[: len(uniform_words())].view(torch.int32).tolist(), "kept": flags}))
"""


def test_triton(tmp_path):
    """In a process of its own: whether Triton is interpreted is settled at its first import."""
    pytest.importorskip("triton", reason="triton is not installed")
    script = tmp_path / "script.py"
    script.write_text(TRITON)
    interpret = "0" if torch.cuda.is_available() else "1"
    places = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": places}
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    drawn = json.loads(run.stdout)
    assert drawn["words"] == WORDS
    place = VECTORS["philox"][2]
    expected = rng.philox_words(place["seed"], place["offset"], place["row"], 24)[8:]
    assert drawn["row"] == expected.tolist()
    assert drawn["bits"] == UNIFORM_BITS
    assert drawn["kept"] == KEPT


CPP = """
#include <cstdio>
#include <cstring>
#include "cuda/philox.cuh"

int main() {
  char kind[16];
  while (std::scanf("%15s", kind) == 1) {
    if (!std::strcmp(kind, "philox")) {
      long long seed, offset;
      unsigned row, group;
      if (std::scanf("%lld %lld %u %u", &seed, &offset, &row, &group) != 4) return 1;
      const auto words = tilewise::philox(seed, offset, row, group);
      for (const auto word : words.at) std::printf("%u ", word);
    } else {
      unsigned word, bits;
      unsigned long long threshold;
      if (std::scanf("%u %llu", &word, &threshold) != 2) return 1;
      const float u = tilewise::uniform(word);
      std::memcpy(&bits, &u, sizeof(bits));
      std::printf("%u %d ", bits, tilewise::keep(word, threshold));
    }
  }
}
"""


def test_cpp_header(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(CPP)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run([compiler, *flags, "-I", ROOT / "csrc", source, "-o", program], check=True)

    def ask(*lines):
        run = subprocess.run(
            [program], input="\n".join(lines), capture_output=True, text=True, check=True
        )
        return list(map(int, run.stdout.split()))

    places = zip(*(t.tolist() for t in counters()), strict=True)
    drawn = ask(*(f"philox {seed} {offset} {row} {group}" for seed, offset, row, group in places))
    assert drawn == [word for words in WORDS for word in words]
    for dropout, kept in zip(VECTORS["keep"], KEPT, strict=True):
        answers = ask(*(f"keep {w} {dropout['threshold']}" for w in uniform_words().tolist()))
        assert answers[::2] == UNIFORM_BITS
        assert answers[1::2] == kept


def test_words_are_by_position():
    """Row and column name a word, whatever else is drawn with it."""
    whole = rng.philox_words(7, 3, torch.arange(5), 11)
    assert whole.shape == (5, 11)
    assert torch.equal(rng.philox_words(7, 3, 4, 6), whole[4, :6])
    group = rng.philox(7, 3, 2, 2)
    assert torch.equal(whole[2, 8:], group[:3])


@pytest.mark.parametrize("seed", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_compiled_draws_are_the_same_bits(seed):
    """And Philox is one call in the graph: inlined it would take Inductor minutes."""
    graphs = []

    def keep(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    def draw():
        return rng.philox_words(seed, 3, torch.arange(5), 11)

    compiled = torch.compile(draw, backend=keep, fullgraph=True)
    assert torch.equal(compiled(), draw())
    assert ["tilewise.philox" in targets for targets in graphs] == [True]
    assert torch.equal(torch.compile(draw, fullgraph=True)(), draw())


def test_one_seed_and_offset_a_row():
    seeds, offsets = torch.tensor([5, -9, 5]), torch.tensor([0, 1 << 40, 1])
    words = rng.philox_words(seeds, offsets, 0, 9)
    for i in range(3):
        assert torch.equal(words[i], rng.philox_words(int(seeds[i]), int(offsets[i]), 0, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_uniform_and_never_at_its_ends(dtype):
    u = rng.uniform(1, 0, torch.arange(64), 4096, dtype)
    assert u.dtype == dtype
    assert 0 < u.min() < u.max() < 1
    assert stats.kstest(u.flatten().double().numpy(), "uniform").pvalue > 1e-6
    correlation = torch.corrcoef(u.double())[~torch.eye(64, dtype=torch.bool)]
    assert correlation.abs().max() < 6 / 4096**0.5  # six standard deviations


def test_gumbel_follows_its_distribution():
    g = rng.gumbel(2, 0, torch.arange(16), 4096)
    assert stats.kstest(g.flatten().double().numpy(), "gumbel_r").pvalue > 1e-6
    ends = -(-rng._as_uniform(torch.tensor([0, rng.WORDS - 1]), torch.float64).log()).log()
    assert -3.2 < ends[0] < ends[1] < 22.9


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_keep_mask_drops_this_share(p):
    keep = rng.keep_mask(p, 3, 0, torch.arange(64), 4096)
    drops = int((~keep).sum())
    assert stats.binomtest(drops, keep.numel(), p).pvalue > 1e-6


CPU = torch.device("cpu")


def test_seed_is_drawn_by_the_generator():
    def draw(state):
        return rng.seed_and_offset("op", 2, CPU, None, None, torch.Generator().manual_seed(state))

    (seed, offset), (again, _), (other, _) = draw(1), draw(1), draw(2)
    assert (seed.shape, seed.dtype, offset) == ((), torch.int64, 0)
    assert seed == again != other


def test_seed_is_drawn_by_the_default_generator():
    torch.manual_seed(5)
    first, second = (rng.seed_and_offset("op", 2, CPU, None, None, None)[0] for _ in range(2))
    torch.manual_seed(5)
    assert rng.seed_and_offset("op", 2, CPU, None, None, None)[0] == first != second


def test_counter_rows_are_places_unless_each_row_has_its_seed():
    assert rng.counter_rows(7, 3, CPU).tolist() == [0, 1, 2]
    assert rng.counter_rows(torch.tensor(7), 3, CPU).tolist() == [0, 1, 2]
    assert rng.counter_rows(torch.tensor([7, 7, 7]), 3, CPU) == 0


@pytest.mark.parametrize(
    "error, message, seed, offset",
    [
        (TypeError, "seed must be an int or a tensor, got float", 1.0, None),
        (TypeError, "offset must be an int or a tensor, got bool", 1, True),
        (TypeError, r"seed must be torch.int64, got torch.int32", torch.ones(2).int(), None),
        (ValueError, r"seed must be \[\] or \[2\], got \[3\]", torch.ones(3).long(), None),
        (ValueError, "offset must fit in 64 bits with a sign, got", 1, 1 << 63),
        (RuntimeError, "seed must be on cpu, got meta", torch.ones(2, device="meta").long(), None),
    ],
    ids=["kind", "bool", "dtype", "shape", "range", "device"],
)
def test_wrong_seed_is_refused(error, message, seed, offset):
    with pytest.raises(error, match="op: " + message):
        rng.seed_and_offset("op", 2, CPU, seed, offset, None)


def test_seed_and_generator_are_refused():
    with pytest.raises(ValueError, match="op: must be given seed or generator, got both"):
        rng.seed_and_offset("op", 2, CPU, 1, None, torch.Generator())
