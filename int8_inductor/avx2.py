"""Exact int8 products on x86 CPUs with AVX2 and nothing faster for int8: a kernel in C++, which Inductor's machinery compiles (2 s, once a cache).

AVX2's vpmaddwd multiplies 16 pairs of int16 and adds neighbours in int32, which is exact for every int8, at as many multiply-adds an instruction as
two of float32's. The activation is widened to int16 once, the weight as it is read: few rows move a quarter of a float32 weight's bytes. vpmaddubsw,
which oneDNN takes there, multiplies twice as many, but saturates sums of two products at 16 bits.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import torch
from torch import Tensor

from .ops import define_operator

__all__ = ["has_kernel", "int_mm", "is_x86"]


def is_x86() -> bool:
    """Whether this process runs on an x86-64 CPU."""
    return platform.machine().lower() in ("x86_64", "amd64")


# A tile of 4 x 2 sums stays in registers; blocks of 48 x 16 keep the widened rows in the L2 and the weight's in the L1.
_SOURCE = r"""
#include <immintrin.h>
#include <algorithm>
#include <cstdint>

static const int64_t BLOCK_M = 48, BLOCK_N = 16;

// Sums over k of ROWS rows of a and COLUMNS rows of b, both contiguous.
template <int ROWS, int COLUMNS>
__attribute__((target("avx2"))) static void tile(const int16_t* a, const int8_t* b, int32_t* out, int64_t n, int64_t k) {
    __m256i sums[ROWS][COLUMNS];
    for (int m = 0; m < ROWS; ++m)
        for (int j = 0; j < COLUMNS; ++j) sums[m][j] = _mm256_setzero_si256();
    const int64_t whole = k / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16) {
        __m256i w[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) w[j] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(b + j * k + i)));
        for (int m = 0; m < ROWS; ++m) {
            const __m256i x = _mm256_loadu_si256((const __m256i*)(a + m * k + i));
            for (int j = 0; j < COLUMNS; ++j) sums[m][j] = _mm256_add_epi32(sums[m][j], _mm256_madd_epi16(x, w[j]));
        }
    }
    for (int m = 0; m < ROWS; ++m)
        for (int j = 0; j < COLUMNS; ++j) {
            __m128i t = _mm_add_epi32(_mm256_castsi256_si128(sums[m][j]), _mm256_extracti128_si256(sums[m][j], 1));
            t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4E));
            t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0xB1));
            int32_t sum = _mm_cvtsi128_si32(t);
            for (int64_t i = whole; i < k; ++i) sum += int32_t(a[m * k + i]) * b[j * k + i];
            out[m * n + j] = sum;
        }
}

template <int COLUMNS>
static void all_rows(const int16_t* a, const int8_t* b, int32_t* out, int64_t rows, int64_t n, int64_t k) {
    for (; rows >= 4; rows -= 4, a += 4 * k, out += 4 * n) tile<4, COLUMNS>(a, b, out, n, k);
    if (rows == 3) tile<3, COLUMNS>(a, b, out, n, k);
    if (rows == 2) tile<2, COLUMNS>(a, b, out, n, k);
    if (rows == 1) tile<1, COLUMNS>(a, b, out, n, k);
}

// out [m, n] = a [m, k] times b [n, k] transposed; wide [m, k] is room for a as int16.
extern "C" void int_mm(const int8_t* a, const int8_t* b, int32_t* out, int16_t* wide, int64_t m, int64_t n, int64_t k, int32_t threads) {
    const int64_t down = (m + BLOCK_M - 1) / BLOCK_M, across = (n + BLOCK_N - 1) / BLOCK_N;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < k; ++j) wide[i * k + j] = a[i * k + j];
        #pragma omp for collapse(2)
        for (int64_t x = 0; x < down; ++x)
            for (int64_t y = 0; y < across; ++y) {
                const int64_t row = x * BLOCK_M, rows = std::min(BLOCK_M, m - row), end = std::min(n, (y + 1) * BLOCK_N);
                int64_t j = y * BLOCK_N;
                for (; j + 2 <= end; j += 2) all_rows<2>(wide + row * k, b + j * k, out + row * n + j, rows, n, k);
                if (j < end) all_rows<1>(wide + row * k, b + j * k, out + row * n + j, rows, n, k);
            }
    }
}
"""
WORK_OF_A_THREAD = 2**17
"""Multiply-adds for which another thread is worth its start: about 8 us."""


@functools.cache
def has_kernel() -> bool:
    """Whether the kernel runs on this machine: its CPU has AVX2, and the compiler that Inductor calls knows what the source asks of it."""
    return platform.system() == "Linux" and is_x86() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


@functools.cache
def _kernel() -> Any:
    from torch._inductor.codecache import CppCodeCache

    function = CppCodeCache.load(_SOURCE).int_mm
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3 + [ctypes.c_int32]
    function.restype = None
    return function


def _check(a: Tensor, b: Tensor) -> None:
    for name, each in (("a", a), ("b", b)):
        if each.dtype != torch.int8 or each.dim() != 2 or each.device.type != "cpu":
            raise TypeError(f"avx2_int_mm: {name} must be an int8 matrix on the CPU, got {each.dtype} {list(each.shape)} on {each.device}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"avx2_int_mm: b must have K = {a.shape[1]} like a, got {list(b.shape)}")


def _eager(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] of int8 a [M, K] times int8 b [N, K] transposed."""
    _check(a, b)
    if not has_kernel():
        raise RuntimeError(f"avx2_int_mm: needs Linux on an x86 CPU with AVX2, got {torch.backends.cpu.get_cpu_capability()} on {platform.machine()}")
    (m, k), n = a.shape, b.shape[0]
    a, b, out, wide = a.contiguous(), b.contiguous(), a.new_empty((m, n), dtype=torch.int32), a.new_empty((m, k), dtype=torch.int16)
    threads = max(1, min(torch.get_num_threads(), m * n * k // WORK_OF_A_THREAD))
    _kernel()(a.data_ptr(), b.data_ptr(), out.data_ptr(), wide.data_ptr(), m, n, k, threads)
    return out


def _fake(a: Tensor, b: Tensor) -> Tensor:
    _check(a, b)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


define_operator("avx2_int_mm", "(Tensor a, Tensor b) -> Tensor", _eager, _fake)


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] of int8 a [M, K] times int8 b [N, K] transposed, exactly, where `has_kernel`; both on the CPU, with any strides."""
    product: Tensor = torch.ops.int8_inductor.avx2_int_mm(a, b)
    return product
