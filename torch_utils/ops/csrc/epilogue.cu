// SPDX-License-Identifier: Apache-2.0
// Scaling of channels, alone or with noise, bias and activation. Macros: SCALAR_T, VEC, CHANNELS_LAST, ACT, NOISE,
// BIAS (0 or 1).
#include "walk.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 3) epilogue(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ d, const scalar_t* __restrict__ noise,
    const scalar_t* __restrict__ b, scalar_t* __restrict__ y, i64 rows, i64 cols, i64 lanes, i64 chunk_rows,
    i64 col_chunks, i64 row_chunks, i64 noise_step, double alpha, double gain, double clamp
) {
    const Place at(rows, cols, lanes, chunk_rows, col_chunks, row_chunks);
    if (!at.has_columns) return;
    const Shape shape(alpha, gain, clamp);
    const i64 channels = CHANNELS_LAST ? cols : rows;
    acc_t scale[VEC], bias[VEC], extra[VEC];
    fill(bias, 0);
    fill(extra, 0);
    if constexpr (CHANNELS_LAST) {
        load(d + at.n * channels + at.col, scale);
        if constexpr (BIAS) load(b + at.col, bias);
    } else if constexpr (NOISE) {
        load(noise + at.n * noise_step + at.col, extra);
    }
    const i64 base = at.n * rows * cols + at.col;
#pragma unroll 4
    for (i64 r = at.row + at.own_row(); r < at.row_end; r += at.row_step) {
        acc_t u[VEC];
        load(x + base + r * cols, u);
        if constexpr (!CHANNELS_LAST) {
            fill(scale, widen(d[at.n * channels + r]));
            if constexpr (BIAS) fill(bias, widen(b[r]));
        } else if constexpr (NOISE) {
            fill(extra, widen(noise[at.n * noise_step + r]));
        }
#pragma unroll
        for (int k = 0; k < VEC; k++) u[k] = shape.value(u[k] * scale[k] + bias[k] + extra[k]);
        store(y + base + r * cols, u);
    }
}
