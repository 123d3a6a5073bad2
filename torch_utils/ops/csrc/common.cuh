// SPDX-License-Identifier: Apache-2.0
// Types and memory access that all kernels share. SCALAR_T is the element type: float, double, half_t or
// bfloat16_t; sums are kept in acc_t, which is float except for double. No header of CUDA or PyTorch is needed:
// reading those of CUDA's 16-bit types would take longer than compiling a kernel.
#pragma once

struct half_t { unsigned short bits; };
struct bfloat16_t { unsigned short bits; };

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
#ifdef __CUDACC__
__device__ __forceinline__ float widen(half_t v) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v.bits));
    return result;
}
__device__ __forceinline__ half_t to_half(float v) {
    half_t result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
    return result;
}
__device__ __forceinline__ unsigned int bits_of(float v) { return __float_as_uint(v); }
__device__ __forceinline__ float float_of(unsigned int bits) { return __uint_as_float(bits); }
#else
#include "host_types.h"
#endif
__device__ __forceinline__ float widen(bfloat16_t v) { return float_of((unsigned int)v.bits << 16); }

__device__ __forceinline__ bfloat16_t to_bfloat16(float v) {
    bfloat16_t result;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
#else
    const unsigned int bits = bits_of(v);  // to nearest, ties to even
    result.bits = v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#endif
    return result;
}

#ifndef SCALAR_T
#define SCALAR_T float
#endif
#ifndef VEC
#define VEC 1
#endif

// Kernels with much to hold are compiled for two or three blocks of 256 threads a multiprocessor: left to itself, the
// compiler aims at more and spills registers for it.
typedef long long i64;
using scalar_t = SCALAR_T;
template <class S> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
using acc_t = Accumulator<scalar_t>::type;

template <class S> struct Narrow {
    static __device__ __forceinline__ S from(acc_t v) { return v; }
};
template <> struct Narrow<half_t> {
    static __device__ __forceinline__ half_t from(float v) { return to_half(v); }
};
template <> struct Narrow<bfloat16_t> {
    static __device__ __forceinline__ bfloat16_t from(float v) { return to_bfloat16(v); }
};

// The word that moves BYTES bytes in one instruction.
template <int BYTES> struct Word;
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned int; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

// N neighbours of an array as they lie in memory, in whole registers.
template <int N> struct Raw {
    using word = typename Word<N * sizeof(scalar_t)>::type;
    unsigned int parts[(sizeof(word) + 3) / 4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (unsigned int& part : parts) part = 0;
    }
    __device__ __forceinline__ void negate() {
        constexpr unsigned int signs = sizeof(scalar_t) == 2 ? 0x80008000u : 0x80000000u;
#pragma unroll
        for (int i = 0; i < int(sizeof(parts) / 4); i++)
            if (sizeof(scalar_t) < 8 || i % 2 == 1) parts[i] ^= signs;
    }
    __device__ __forceinline__ void load(const scalar_t* p) {  // aligned to N elements
        const word value = *reinterpret_cast<const word*>(p);
        memcpy(parts, &value, sizeof(word));
    }
    __device__ __forceinline__ void unpack(acc_t (&values)[N]) const {
        scalar_t packed[N];
        memcpy(packed, parts, sizeof(word));
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = widen(packed[i]);
    }
};

// N neighbours of an array as accumulators; p is aligned to N elements.
template <int N>
__device__ __forceinline__ void load(const scalar_t* p, acc_t (&values)[N]) {
    Raw<N> raw;
    raw.load(p);
    raw.unpack(values);
}

template <int N>
__device__ __forceinline__ void store(scalar_t* p, const acc_t (&values)[N]) {
    using word = typename Word<N * sizeof(scalar_t)>::type;
    scalar_t packed[N];
#pragma unroll
    for (int i = 0; i < N; i++) packed[i] = Narrow<scalar_t>::from(values[i]);
    word raw;
    memcpy(&raw, packed, sizeof(word));
    *reinterpret_cast<word*>(p) = raw;
}

template <int N>
__device__ __forceinline__ void fill(acc_t (&values)[N], acc_t value) {
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = value;
}

// The value that an element of type scalar_t would keep: comparisons see what the stored tensor holds.
__device__ __forceinline__ acc_t rounded(acc_t v) { return widen(Narrow<scalar_t>::from(v)); }

__device__ __forceinline__ float magnitude(float v) { return fabsf(v); }
__device__ __forceinline__ double magnitude(double v) { return fabs(v); }

// v within +-limit; not a number stays that.
__device__ __forceinline__ acc_t limited(acc_t v, acc_t limit) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (sizeof(acc_t) == 4) {
        float result = v;
        asm("max.NaN.f32 %0, %0, %1;" : "+f"(result) : "f"(float(-limit)));
        asm("min.NaN.f32 %0, %0, %1;" : "+f"(result) : "f"(float(limit)));
        return result;
    }
#endif
    return v > limit ? limit : v < -limit ? -limit : v;
}
