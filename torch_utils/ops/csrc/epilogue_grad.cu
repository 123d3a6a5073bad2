// SPDX-License-Identifier: Apache-2.0
// Gradients of epilogue.cu in one pass: sums along rows and columns leave it as partial sums of fixed order.
// Macros: SCALAR_T, VEC, CHANNELS_LAST, ACT, NEXT, INPUT (0 or 1).
#include "walk.cuh"

#ifndef INPUT
#define INPUT 0
#endif

// What goes with the columns of a thread; nothing is read beyond the last.
__device__ __forceinline__ void load_columns(const scalar_t* p, const Place& at, acc_t (&values)[VEC]) {
    if (at.has_columns) load(p, values);
    else fill(values, 0);
}

// Sum over the neighbours that share a row.
__device__ __forceinline__ acc_t sum_of_lanes(acc_t v, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(all_lanes, v, offset);
    return v;
}

struct Vectors {  // what a thread reads of one row
    Raw<VEC> dy, y, x;
};

// With g = dy * slope(y):  dx = g * d,  row and column sums of g, and sums of g * x along the pixels.
// sum_g: per channel, sum_gx: per channel, sum_noise: per pixel; each may be null. x is null if sum_gx is.
// NEXT: dy is the gradient of y * d; that of y itself is x, which may be null. g = (dy * d + x) * slope(y), dx = g, and
// sum_gx is of dy * y.
// INPUT: y is the input of the activation, but for a bias d [C]: g = dy * slope(y + d), dx = g.
// Partial sums: [n, col_chunks, rows] along a row, [n, row_chunks, cols] along a column.
extern "C" __global__ void __launch_bounds__(THREADS, 3) epilogue_grad(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const scalar_t* __restrict__ y,
    const scalar_t* __restrict__ d, scalar_t* __restrict__ dx, acc_t* __restrict__ sum_g,
    acc_t* __restrict__ sum_gx, acc_t* __restrict__ sum_noise, i64 rows, i64 cols, i64 lanes, i64 chunk_rows,
    i64 col_chunks, i64 row_chunks, double alpha, double gain, double clamp
) {
    const Place at(rows, cols, lanes, chunk_rows, col_chunks, row_chunks);
    const Shape shape(alpha, gain, clamp);
    const i64 channels = CHANNELS_LAST ? cols : rows;
    acc_t scale[VEC], column_g[VEC], column_gx[VEC];
    fill(scale, 1);
    fill(column_g, 0);
    fill(column_gx, 0);
    if (CHANNELS_LAST && d) load_columns(d + (INPUT ? 0 : at.n * channels) + at.col, at, scale);
    const i64 base = at.n * rows * cols + at.col;
    const int pitch = cols, own_row = at.own_row();
    acc_t* const row_target = CHANNELS_LAST ? sum_noise : sum_g;
    const i64 row_sums = (at.n * col_chunks + at.col_chunk) * rows;
    Vectors next;
    const auto read = [&](int r) {
        next.dy.clear(), next.y.clear(), next.x.clear();
        if (!at.has_columns || r >= at.row_end) return;
        const i64 i = base + r * pitch;
        next.dy.load(dy + i);
        if (y) next.y.load(y + i);
        if (NEXT ? x != nullptr : sum_gx != nullptr) next.x.load(x + i);
    };
    read(at.row + own_row);
    // All threads go round equally often, since the sums along a row need every lane.
#pragma unroll 1
    for (int first = at.row; first < at.row_end; first += at.row_step) {
        const int r = first + own_row;
        const bool here = at.has_columns && r < at.row_end;
        acc_t g[VEC], v[VEC], row_g = 0, row_gx = 0;
        next.dy.unpack(g);
        next.y.unpack(v);
#if NEXT
        acc_t of_y[VEC];
        next.x.unpack(of_y);
        if (!CHANNELS_LAST && here) fill(scale, widen(d[at.n * channels + r]));
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            const acc_t scaled = g[k];
            g[k] = shape.gradient(scaled * scale[k] + of_y[k], v[k], true);
            v[k] *= scaled;
        }
        read(r + at.row_step);
        if (dx && here) store(dx + base + r * pitch, g);
#elif INPUT
        if (!CHANNELS_LAST && here) fill(scale, widen(d[r]));
#pragma unroll
        for (int k = 0; k < VEC; k++) g[k] = here ? shape.gradient(g[k], v[k] + scale[k], false) : acc_t(0);
        read(r + at.row_step);
        if (dx && here) store(dx + base + r * pitch, g);
#else
        if (y) {
#pragma unroll
            for (int k = 0; k < VEC; k++) g[k] = shape.gradient(g[k], v[k], true);
        }
        next.x.unpack(v);
        read(r + at.row_step);
        if (dx && here) {
            if (!CHANNELS_LAST && d) fill(scale, widen(d[at.n * channels + r]));
            acc_t scaled[VEC];
#pragma unroll
            for (int k = 0; k < VEC; k++) scaled[k] = g[k] * scale[k];
            store(dx + base + r * pitch, scaled);
        }
#endif
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            row_g += g[k];
            const acc_t gx = NEXT ? v[k] : g[k] * v[k];
            row_gx += gx;
            column_g[k] += g[k];
            column_gx[k] += gx;
        }
        if (row_target) {
            row_g = sum_of_lanes(row_g, lanes);
            if (at.lane == 0 && r < at.row_end) row_target[row_sums + r] = row_g;
        }
        if (!CHANNELS_LAST && sum_gx) {
            row_gx = sum_of_lanes(row_gx, lanes);
            if (at.lane == 0 && r < at.row_end) sum_gx[row_sums + r] = row_gx;
        }
    }
    const i64 column_sums = (at.n * row_chunks + at.row_chunk) * cols;
    acc_t* const column_target = CHANNELS_LAST ? sum_g : sum_noise;
    if (column_target) store_column_sums(column_g, column_target + column_sums, at, lanes, pitch, 1);
    if (CHANNELS_LAST && sum_gx) store_column_sums(column_gx, sum_gx + column_sums, at, lanes, pitch, 1);
}
