// SPDX-License-Identifier: Apache-2.0
// Demodulation coefficients and per-sample weights of a modulated convolution.
// Macros: SCALAR_T (of weight, styles, d), OUT_T (of the modulated weight), TAPS (weights of a channel pair).
#include "common.cuh"

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
