"""Philox4x32-10 by logical position: the words that every backend draws."""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(10)


@triton.jit
def philox(seed, offset, row, group):
    """The four uint32 words of groups of columns; seed and offset are int64, all four broadcast."""
    zero = group.to(tl.uint32) * 0
    a = group.to(tl.uint32)
    b = row.to(tl.uint32) + zero
    c = offset.to(tl.uint32) + zero
    d = (offset >> 32).to(tl.uint32) + zero
    low = seed.to(tl.uint32) + zero
    high = (seed >> 32).to(tl.uint32) + zero
    for _ in tl.static_range(ROUNDS):
        a_high, a_low = tl.umulhi(a, zero + 0xD2511F53), a * 0xD2511F53
        c_high, c_low = tl.umulhi(c, zero + 0xCD9E8D57), c * 0xCD9E8D57
        a, b, c, d = c_high ^ b ^ low, c_low, a_high ^ d ^ high, a_low
        low += 0x9E3779B9
        high += 0xBB67AE85
    return a, b, c, d


@triton.jit
def philox_words(seed, offset, row, start, BLOCK: tl.constexpr):
    """The words of columns `start` to `start` + BLOCK - 1, both multiples of 4, of one row or of
    rows [rows, 1]."""
    group = start // 4 + tl.arange(0, BLOCK // 4)
    a, b, c, d = philox(seed, offset, row, group)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def uniform(word):
    """(word + 1/2) / 2^32 in fp32, rounded once and at most the number before 1."""
    upper = (word >> 8).to(tl.float32) * (1.0 / (1 << 24))
    lower = ((word & 255).to(tl.float32) + 0.5) * (1.0 / (1 << 32))
    return tl.minimum(upper + lower, 1.0 - 1.0 / (1 << 24))


@triton.jit
def keep(word, threshold):
    """Whether dropout keeps an element; the threshold is floor(p * 2^32), so 2^32 keeps none."""
    return word.to(tl.int64) >= threshold
