// SPDX-License-Identifier: Apache-2.0
// Demodulation coefficients and per-sample weights of a modulated convolution.
// Macros: SCALAR_T (of weight, styles, d), OUT_T (of the modulated weight), TAPS (weights of a channel pair),
// CHANNELS_LAST (of the weight [O, I, k, k], for the entry `modulation`).
#include "common.cuh"

#ifndef CHANNELS_LAST
#define CHANNELS_LAST 0
#endif

#ifndef OUT_T
#define OUT_T SCALAR_T
#endif
#ifndef TAPS
#define TAPS 9
#endif
#define THREADS 256

// d[n, o] = (eps + sum_i styles[n, i]^2 * energy[o, i])^-1/2 with energy[o, i] = sum of weight[o, i, taps]^2.
// A block an output channel, a warp a sample. `energy` is scratch space of the block's own row.
extern "C" __global__ void __launch_bounds__(THREADS) demodulation(
    const scalar_t* __restrict__ weight, const scalar_t* __restrict__ styles, acc_t* energy,
    scalar_t* __restrict__ d, i64 samples, i64 out_channels, i64 in_channels, double eps
) {
    const i64 o = blockIdx.x;
    acc_t* const row = energy + o * in_channels;
    for (i64 i = threadIdx.x; i < in_channels; i += THREADS) {
        const scalar_t* const w = weight + (o * in_channels + i) * TAPS;
        acc_t sum = 0;
#pragma unroll
        for (int k = 0; k < TAPS; k++) sum += widen(w[k]) * widen(w[k]);
        row[i] = sum;
    }
    __syncthreads();
    const unsigned lane = threadIdx.x % 32;
    for (i64 n = threadIdx.x / 32; n < samples; n += THREADS / 32) {
        acc_t sum = 0;
        for (i64 i = lane; i < in_channels; i += 32) {
            const acc_t s = widen(styles[n * in_channels + i]);
            sum += s * s * row[i];
        }
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (lane == 0) d[n * out_channels + o] = Narrow<scalar_t>::from(acc_t(1) / sqrt(sum + acc_t(eps)));
    }
}

// result[n, o, i, taps] = weight[o, i, taps] * styles[n, i] * d[n, o]; d may be null. A block a row (n, o).
extern "C" __global__ void __launch_bounds__(THREADS) modulated_weight(
    const scalar_t* __restrict__ weight, const scalar_t* __restrict__ styles, const scalar_t* __restrict__ d,
    OUT_T* __restrict__ result, i64 out_channels, i64 in_channels
) {
    const i64 pair = blockIdx.x, n = pair / out_channels, o = pair % out_channels;
    const acc_t scale = d ? widen(d[pair]) : acc_t(1);
    const unsigned size = in_channels * TAPS;
    for (unsigned e = threadIdx.x; e < size; e += THREADS) {
        const acc_t s = widen(styles[n * in_channels + e / TAPS]) * scale;
        result[pair * size + e] = Narrow<OUT_T>::from(widen(weight[o * size + e]) * s);
    }
}

__device__ __forceinline__ acc_t larger(acc_t peak, acc_t v) { return v > peak ? v : -v > peak ? -v : peak; }

__device__ __forceinline__ acc_t largest_of_warp(acc_t v) {
    for (int offset = 16; offset > 0; offset /= 2) v = larger(v, __shfl_xor_sync(0xffffffffu, v, offset));
    return v;
}

// What a layer of 16 bits needs of its weight and styles, in one launch: w * a[o], s * b[n] and d[n, o] of these
// products, all three as OUT_T. The factors bring weights and styles to a size that 16 bits hold; where a is null, they
// are 1. d and energy[o, i] also as they are, for the gradient. A block an output channel.
extern "C" __global__ void __launch_bounds__(THREADS) modulation(
    const scalar_t* __restrict__ weight, const scalar_t* __restrict__ styles, OUT_T* __restrict__ w_out,
    OUT_T* __restrict__ s_out, OUT_T* __restrict__ d_out, scalar_t* __restrict__ d, scalar_t* energy,
    scalar_t* __restrict__ a, scalar_t* __restrict__ b, i64 samples, i64 out_channels, i64 in_channels, double eps
) {
    const i64 o = blockIdx.x;
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, size = in_channels * TAPS;
    const scalar_t* const w = weight + o * size;
    acc_t scale = 1;
    if (a) {
        __shared__ acc_t peaks[THREADS / 32];
        acc_t peak = 0;
        for (unsigned e = threadIdx.x; e < size; e += THREADS) peak = larger(peak, widen(w[e]));
        peak = largest_of_warp(peak);
        if (lane == 0) peaks[warp] = peak;
        __syncthreads();
        peak = peaks[0];
        for (int i = 1; i < THREADS / 32; i++) peak = larger(peak, peaks[i]);
        scale = 1 / (peak * sqrt(acc_t(size)));
        if (threadIdx.x == 0) a[o] = Narrow<scalar_t>::from(scale);
    }
    scalar_t* const row = energy + o * in_channels;
    for (unsigned i = threadIdx.x; i < in_channels; i += THREADS) {
        acc_t sum = 0;
#pragma unroll
        for (int k = 0; k < TAPS; k++) {
            const unsigned e = CHANNELS_LAST ? k * unsigned(in_channels) + i : i * TAPS + k;
            const acc_t v = widen(w[e]) * scale;
            sum += v * v;
            w_out[o * size + e] = Narrow<OUT_T>::from(v);
        }
        row[i] = Narrow<scalar_t>::from(sum);
    }
    __syncthreads();
    for (i64 n = warp; n < samples; n += THREADS / 32) {
        const scalar_t* const s = styles + n * in_channels;
        acc_t own = 1, sum = 0;
        if (a) {
            acc_t peak = 0;
            for (unsigned i = lane; i < in_channels; i += 32) peak = larger(peak, widen(s[i]));
            own = 1 / largest_of_warp(peak);
            if (o == 0 && lane == 0) b[n] = Narrow<scalar_t>::from(own);
        }
        for (unsigned i = lane; i < in_channels; i += 32) {
            const acc_t v = widen(s[i]) * own;
            sum += v * v * widen(row[i]);
            if (o == 0) s_out[n * in_channels + i] = Narrow<OUT_T>::from(v);
        }
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (lane != 0) continue;
        const acc_t value = acc_t(1) / sqrt(sum + acc_t(eps));
        d[n * out_channels + o] = Narrow<scalar_t>::from(value);
        d_out[n * out_channels + o] = Narrow<OUT_T>::from(value);
    }
}
