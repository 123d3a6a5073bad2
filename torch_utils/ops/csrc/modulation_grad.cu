// SPDX-License-Identifier: Apache-2.0
// Gradients of what modulated_weight.cu makes of a layer's weight and styles, in one launch.
// Macros: SCALAR_T (of weight, styles and results), OUT_T (of the gradients of scaled weight and styles), D_T (of that
// of d), TAPS, CHANNELS_LAST (of the weight [O, I, k, k]).
#include "common.cuh"

#ifndef CHANNELS_LAST
#define CHANNELS_LAST 0
#endif
#ifndef OUT_T
#define OUT_T SCALAR_T
#endif
#ifndef D_T
#define D_T SCALAR_T
#endif
#ifndef TAPS
#define TAPS 9
#endif
#define THREADS 256
#define WARPS (THREADS / 32)

struct Layer {
    const scalar_t *weight, *styles, *d, *energy, *a, *b;  // a and b may be null, which are factors of 1
    const OUT_T *to_scaled, *to_styles;                    // gradients; each may be null
    const D_T* to_d;
    const scalar_t* to_energy;
    int samples, out_channels, in_channels;

    // Gradient of the squared norm of d[n, o].
    __device__ __forceinline__ acc_t to_square(int n, int o) const {
        const i64 at = i64(n) * out_channels + o;
        const acc_t v = widen(d[at]);
        return acc_t(-0.5) * widen(to_d[at]) * v * v * v;
    }
};

// One output channel of the weight's gradient: to_scaled * a + weight * 2 a^2 (to_energy + sum_n to_square * styles^2).
__device__ __forceinline__ void weight_row(const Layer& layer, int o, scalar_t* __restrict__ result) {
    __shared__ acc_t factors[THREADS];
    const int in_channels = layer.in_channels;
    const acc_t scale = layer.a ? widen(layer.a[o]) : acc_t(1);
    const i64 row = i64(o) * in_channels * TAPS;
    const auto put = [&](i64 at, acc_t factor) {
        const acc_t before = layer.to_scaled ? widen(layer.to_scaled[at]) * scale : acc_t(0);
        result[at] = Narrow<scalar_t>::from(before + widen(layer.weight[at]) * factor);
    };
    for (int first = 0; first < in_channels; first += THREADS) {
        const int left = in_channels - first, count = left < THREADS ? left : THREADS, own = threadIdx.x;
        acc_t sum = 0;
        if (own < count) {
            const int i = first + own;
            if (layer.to_energy) sum = widen(layer.to_energy[i64(o) * in_channels + i]);
            if (layer.to_d) {
#pragma unroll 4
                for (int n = 0; n < layer.samples; n++) {
                    const acc_t own_scale = layer.b ? widen(layer.b[n]) : acc_t(1);
                    const acc_t s = widen(layer.styles[i64(n) * in_channels + i]) * own_scale;
                    sum += layer.to_square(n, o) * (s * s);
                }
            }
        }
        factors[own] = 2 * sum * scale * scale;
        __syncthreads();
        if (CHANNELS_LAST) {
#pragma unroll
            for (int k = 0; k < TAPS; k++)
                if (own < count) put(row + i64(k) * in_channels + first + own, factors[own]);
        } else {
#pragma unroll 3
            for (int e = own; e < count * TAPS; e += THREADS) put(row + i64(first) * TAPS + e, factors[e / TAPS]);
        }
        __syncthreads();
    }
}

// WARPS samples and 32 input channels of the styles' gradient: b * (to_styles + 2 styles * b * sum_o to_square * energy).
// Each warp sums over its share of the output channels, for all of the samples.
__device__ __forceinline__ void styles_tile(const Layer& layer, int first_n, int first_i, scalar_t* __restrict__ result) {
    __shared__ acc_t squares[WARPS][THREADS], parts[WARPS][WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = first_i + lane, n = first_n + warp;
    acc_t sums[WARPS];
    fill(sums, 0);
    for (int first = 0; layer.to_d && first < layer.out_channels; first += THREADS) {
        const int left = layer.out_channels - first, count = left < THREADS ? left : THREADS, own = threadIdx.x;
#pragma unroll
        for (int j = 0; j < WARPS; j++) {
            const bool here = own < count && first_n + j < layer.samples;
            squares[j][own] = here ? layer.to_square(first_n + j, first + own) : acc_t(0);
        }
        __syncthreads();
        if (i < layer.in_channels) {
#pragma unroll 8
            for (int o = warp; o < count; o += WARPS) {
                const acc_t e = widen(layer.energy[i64(first + o) * layer.in_channels + i]);
#pragma unroll
                for (int j = 0; j < WARPS; j++) sums[j] += squares[j][o] * e;
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < WARPS; j++) parts[j][warp][lane] = sums[j];
    __syncthreads();
    if (n >= layer.samples || i >= layer.in_channels) return;
    acc_t total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += parts[warp][w][lane];
    const i64 at = i64(n) * layer.in_channels + i;
    const acc_t scale = layer.b ? widen(layer.b[n]) : acc_t(1);
    const acc_t before = layer.to_styles ? widen(layer.to_styles[at]) : acc_t(0);
    result[at] = Narrow<scalar_t>::from((before + 2 * widen(layer.styles[at]) * scale * total) * scale);
}

// The first `weight_blocks` blocks make a row of the weight's gradient each, the others tiles of that of the styles.
extern "C" __global__ void __launch_bounds__(THREADS) modulation_grad(
    const scalar_t* __restrict__ weight, const scalar_t* __restrict__ styles, const scalar_t* __restrict__ d,
    const scalar_t* __restrict__ energy, const scalar_t* __restrict__ a, const scalar_t* __restrict__ b,
    const OUT_T* __restrict__ to_scaled, const OUT_T* __restrict__ to_styles, const D_T* __restrict__ to_d,
    const scalar_t* __restrict__ to_energy, scalar_t* __restrict__ weight_result,
    scalar_t* __restrict__ styles_result, i64 samples, i64 out_channels, i64 in_channels, i64 weight_blocks
) {
    const Layer layer = {weight, styles, d, energy, a, b, to_scaled, to_styles, to_d, to_energy,
                         int(samples), int(out_channels), int(in_channels)};
    if (blockIdx.x < weight_blocks) {
        weight_row(layer, blockIdx.x, weight_result);
    } else {
        const int tile = blockIdx.x - weight_blocks, across = (in_channels + 31) / 32;
        styles_tile(layer, tile / across * WARPS, tile % across * 32, styles_result);
    }
}
