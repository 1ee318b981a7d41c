"""Triton kernels with one thing wrong each, and their clean twins; compiled, never run."""

import torch
import triton
import triton.language as tl


@triton.jit
def copy_kernel(y_ptr, x_ptr, cols, BLOCK: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + col, tl.load(x_ptr + col, mask=col < cols), mask=col < cols)


@triton.jit
def sum_kernel(y_ptr, x_ptr, cols, MORE: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        x = tl.load(x_ptr + start + tl.arange(0, BLOCK)).to(tl.float32)
        for i in tl.static_range(MORE):
            x = x * x + i
        total += x
    tl.store(y_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def product_kernel(
    y_ptr, a_ptr, b_ptr, depth, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr
):
    row, col, k = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, depth, DEPTH):
        a = tl.load(a_ptr + row[:, None] * depth + start + k[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * COLS + col[None, :])
        total = tl.dot(a, b, total)
    tl.store(y_ptr + row[:, None] * COLS + col[None, :], total.to(y_ptr.dtype.element_ty))


def tensors(number):
    return [torch.empty(4096, dtype=torch.bfloat16, device="meta") for _ in range(number)]


SUM = torch.empty(1, device="meta"), *tensors(1)


def product(rows, cols, depth, warps, stages):
    sizes = {"ROWS": rows, "COLS": cols, "DEPTH": depth}
    return product_kernel, (*tensors(3), 4096), sizes | {"num_warps": warps, "num_stages": stages}


# By what is wrong with it: the kernel, its arguments, its options.
KERNELS = {
    "clean copy": (copy_kernel, (*tensors(2), 4096), {"BLOCK": 1024}),
    "2-byte loads": (copy_kernel, (*tensors(2), 1000), {"BLOCK": 1024}),
    "clean loop": (sum_kernel, (*SUM, 4096), {"MORE": 2, "BLOCK": 1024}),
    "longer loop": (sum_kernel, (*SUM, 4096), {"MORE": 8, "BLOCK": 1024}),
    "clean product": product(128, 128, 64, 8, 3),
    "spill": product(256, 256, 64, 4, 2),
    "too much shared memory": product(128, 256, 64, 8, 6),
    "does not compile": product(100, 64, 64, 4, 2),
}


def compiled(asked):
    """What the report says of one of them on one architecture."""
    from tilewise.verify import compile_report

    name, architecture = asked
    kernel, args, options = KERNELS[name]
    return compile_report(kernel, *args, architecture=architecture, **options)
