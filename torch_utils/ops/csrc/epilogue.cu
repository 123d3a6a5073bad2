// SPDX-License-Identifier: Apache-2.0
// Scaling of channels, alone or with noise, bias and activation. Macros: SCALAR_T, VEC, CHANNELS_LAST, ACT, NOISE,
// BIAS (0 or 1).
#include "walk.cuh"

#define ROWS 4  // whose loads are in flight together

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
    x += base, y += base, d += at.n * channels, noise += at.n * noise_step;
    const int pitch = cols;
#pragma unroll 1
    for (int first = at.row + at.own_row(); first < at.row_end; first += ROWS * at.row_step) {
        Raw<VEC> inputs[ROWS];
        scalar_t of_row[ROWS], bias_of_row[ROWS];
#pragma unroll
        for (int j = 0; j < ROWS; j++) {
            const int r = first + j * at.row_step;
            if (r >= at.row_end) continue;
            inputs[j].load(x + r * pitch);
            if constexpr (!CHANNELS_LAST) of_row[j] = d[r];
            if constexpr (!CHANNELS_LAST && BIAS) bias_of_row[j] = b[r];
            if constexpr (CHANNELS_LAST && NOISE) of_row[j] = noise[r];
        }
#pragma unroll
        for (int j = 0; j < ROWS; j++) {
            const int r = first + j * at.row_step;
            if (r >= at.row_end) return;
            acc_t u[VEC];
            inputs[j].unpack(u);
            if constexpr (!CHANNELS_LAST) fill(scale, widen(of_row[j]));
            if constexpr (!CHANNELS_LAST && BIAS) fill(bias, widen(bias_of_row[j]));
            if constexpr (CHANNELS_LAST && NOISE) fill(extra, widen(of_row[j]));
#pragma unroll
            for (int k = 0; k < VEC; k++) u[k] = shape.value(u[k] * scale[k] + (bias[k] + extra[k]));
            store(y + r * pitch, u);
        }
    }
}
