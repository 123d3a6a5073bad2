// SPDX-License-Identifier: Apache-2.0
// Products with a small matrix for each sample, between FEW channels and many: 1x1 convolutions of and to images.
// The many lie in NHWC and are moved by vectors; the few are dense in any layout. Macros: SCALAR_T, VEC, FEW, CHUNKS,
// FINISH (0 or 1: activation, gain and clamp of the result), ACT. w[n, few, many] has any strides; b may be null.
#define CHANNELS_LAST 1
#include "walk.cuh"

#ifndef FEW
#define FEW 3
#endif
#ifndef CHUNKS
#define CHUNKS 1  // of the columns, all in one thread
#endif
#ifndef FINISH
#define FINISH 0
#endif
#define BLOCKS (FEW * CHUNKS * VEC > 32 ? 2 : 3)  // on a multiprocessor: the matrix stays in registers

constexpr int rows_at_once = FEW > 4 ? 1 : 4;  // whose loads are in flight together

struct Few {  // where the few channels of a sample's pixels are
    int channel, pixel;

    __device__ __forceinline__ Few(i64 channel, i64 pixel) : channel(channel), pixel(pixel) {}
    __device__ __forceinline__ void load(const scalar_t* p, int row, scalar_t (&values)[FEW]) const {
#pragma unroll
        for (int f = 0; f < FEW; f++) values[f] = p[row * pixel + f * channel];
    }
};

__device__ __forceinline__ acc_t finished(acc_t u, const Shape& shape) { return FINISH ? shape.value(u) : u; }

// y[n, pixel, many] = sum of w * x[n, few, pixel], + b[many]
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) few_to_many(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ w, const scalar_t* __restrict__ b,
    scalar_t* __restrict__ y, i64 channel_step, i64 pixel_step, i64 w_sample, i64 w_few, i64 w_many, i64 rows, i64 cols,
    i64 lanes, i64 chunk_rows, i64 col_chunks, i64 row_chunks, double alpha, double gain, double clamp
) {
    const Place at(rows, cols, lanes, chunk_rows, col_chunks, row_chunks);
    if (!at.has_columns) return;
    const Shape shape(alpha, gain, clamp);
    const Few few(channel_step, pixel_step);
    acc_t weight[FEW][VEC], bias[VEC];
    fill(bias, 0);
#pragma unroll
    for (int k = 0; k < VEC; k++) {
        if (b) bias[k] = widen(b[at.col + k]);
#pragma unroll
        for (int f = 0; f < FEW; f++) weight[f][k] = widen(w[at.n * w_sample + f * w_few + (at.col + k) * w_many]);
    }
    x += at.n * rows * FEW, y += at.n * rows * cols + at.col;
    const int pitch = cols;
#pragma unroll 1
    for (int first = at.row + at.own_row(); first < at.row_end; first += rows_at_once * at.row_step) {
        scalar_t inputs[rows_at_once][FEW];
#pragma unroll
        for (int j = 0; j < rows_at_once; j++) {
            const int r = first + j * at.row_step;
            if (r < at.row_end) few.load(x, r, inputs[j]);
        }
#pragma unroll
        for (int j = 0; j < rows_at_once; j++) {
            const int r = first + j * at.row_step;
            if (r >= at.row_end) return;
            acc_t u[VEC];
#pragma unroll
            for (int k = 0; k < VEC; k++) u[k] = bias[k];
#pragma unroll
            for (int f = 0; f < FEW; f++) {
                const acc_t value = widen(inputs[j][f]);
#pragma unroll
                for (int k = 0; k < VEC; k++) u[k] += weight[f][k] * value;
            }
#pragma unroll
            for (int k = 0; k < VEC; k++) u[k] = finished(u[k], shape);
            store(y + r * pitch, u);
        }
    }
}

// y[n, few, pixel] = sum of w * x[n, pixel, many], + b[few]. The lanes of a row have all its columns, in CHUNKS.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) many_to_few(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ w, const scalar_t* __restrict__ b,
    scalar_t* __restrict__ y, i64 channel_step, i64 pixel_step, i64 w_sample, i64 w_few, i64 w_many, i64 rows, i64 cols,
    i64 lanes, i64 chunk_rows, i64 row_chunks, double alpha, double gain, double clamp
) {
    constexpr int at_once = FEW > 4 || CHUNKS > 4 ? 1 : 4 / CHUNKS;
    const Place at(rows, cols, lanes, chunk_rows, 1, row_chunks);
    const Shape shape(alpha, gain, clamp);
    const Few few(channel_step, pixel_step);
    const int pitch = cols, own_row = at.own_row(), chunk = int(lanes) * VEC;
    acc_t weight[CHUNKS][FEW][VEC], bias[FEW];
#pragma unroll
    for (int f = 0; f < FEW; f++) bias[f] = b ? widen(b[f]) : acc_t(0);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int f = 0; f < FEW; f++)
#pragma unroll
            for (int k = 0; k < VEC; k++) {
                const int col = at.col + c * chunk + k;
                weight[c][f][k] = col < pitch ? widen(w[at.n * w_sample + f * w_few + col * w_many]) : acc_t(0);
            }
    x += at.n * rows * cols + at.col, y += at.n * rows * FEW;
    // All threads go round equally often, since the sums need every lane.
#pragma unroll 1
    for (int first = at.row; first < at.row_end; first += at_once * at.row_step) {
        Raw<VEC> inputs[at_once][CHUNKS];
#pragma unroll
        for (int j = 0; j < at_once; j++)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                const int r = first + j * at.row_step + own_row;
                inputs[j][c].clear();
                if (r < at.row_end && at.col + c * chunk < pitch) inputs[j][c].load(x + r * pitch + c * chunk);
            }
        acc_t sums[at_once][FEW];
#pragma unroll
        for (int j = 0; j < at_once; j++) {
            fill(sums[j], 0);
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                acc_t v[VEC];
                inputs[j][c].unpack(v);
#pragma unroll
                for (int f = 0; f < FEW; f++)
#pragma unroll
                    for (int k = 0; k < VEC; k++) sums[j][f] += weight[c][f][k] * v[k];
            }
        }
#pragma unroll 1
        for (int offset = int(lanes) / 2; offset > 0; offset /= 2)
#pragma unroll
            for (int j = 0; j < at_once; j++)
#pragma unroll
                for (int f = 0; f < FEW; f++) sums[j][f] += __shfl_xor_sync(all_lanes, sums[j][f], offset);
        if (at.lane > 0) continue;
#pragma unroll
        for (int j = 0; j < at_once; j++) {
            const int r = first + j * at.row_step + own_row;
            if (r >= at.row_end) break;
#pragma unroll
            for (int f = 0; f < FEW; f++) {
                const acc_t u = finished(sums[j][f] + bias[f], shape);
                y[r * few.pixel + f * few.channel] = Narrow<scalar_t>::from(u);
            }
        }
    }
}

// Sums over the pixels of a block of x[n, few, pixel] * many[n, pixel, many]: [n, row_chunks, matrix], the steps of
// whose elements are few_step and many_step.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) few_by_many(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ many, acc_t* __restrict__ sums, i64 channel_step,
    i64 pixel_step, i64 few_step, i64 many_step, i64 rows, i64 cols, i64 lanes, i64 chunk_rows, i64 col_chunks,
    i64 row_chunks
) {
    const Place at(rows, cols, lanes, chunk_rows, col_chunks, row_chunks);
    const Few few(channel_step, pixel_step);
    acc_t total[FEW][VEC];
#pragma unroll
    for (int f = 0; f < FEW; f++) fill(total[f], 0);
    x += at.n * rows * FEW, many += at.n * rows * cols + at.col;
    const int pitch = cols, own_row = at.own_row();
#pragma unroll 1
    for (int first = at.row + own_row; at.has_columns && first < at.row_end; first += rows_at_once * at.row_step) {
        scalar_t inputs[rows_at_once][FEW];
        Raw<VEC> others[rows_at_once];
#pragma unroll
        for (int j = 0; j < rows_at_once; j++) {
            const int r = first + j * at.row_step;
            if (r >= at.row_end) break;
            few.load(x, r, inputs[j]);
            others[j].load(many + r * pitch);
        }
#pragma unroll
        for (int j = 0; j < rows_at_once; j++) {
            if (first + j * at.row_step >= at.row_end) break;
            acc_t v[VEC];
            others[j].unpack(v);
#pragma unroll
            for (int f = 0; f < FEW; f++) {
                const acc_t value = widen(inputs[j][f]);
#pragma unroll
                for (int k = 0; k < VEC; k++) total[f][k] += value * v[k];
            }
        }
    }
    sums += (at.n * row_chunks + at.row_chunk) * cols * FEW;
#pragma unroll
    for (int f = 0; f < FEW; f++) store_column_sums(total[f], sums + f * few_step, at, lanes, pitch, many_step);
}

// The gradient of few_to_many with FINISH in one pass over dy and y: with g = dy * slope(y),
// dx[n, few, pixel] = sum of w * g (where wanted: then the lanes have all columns), and sums over the pixels of a block
// of x * g, [n, row_chunks, many, few], and of g, [n, row_chunks, many]; each may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 2) few_to_many_grad(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ y, const scalar_t* __restrict__ x,
    const scalar_t* __restrict__ w, scalar_t* __restrict__ dx, acc_t* __restrict__ sum_gx, acc_t* __restrict__ sum_g,
    i64 channel_step, i64 pixel_step, i64 w_sample, i64 w_few, i64 w_many, i64 rows, i64 cols, i64 lanes,
    i64 chunk_rows, i64 col_chunks, i64 row_chunks, double alpha, double gain, double clamp
) {
    constexpr int at_once = FEW > 4 ? 1 : 2;  // a matrix and its gradient are in registers
    const Place at(rows, cols, lanes, chunk_rows, col_chunks, row_chunks);
    const Shape shape(alpha, gain, clamp);
    const Few few(channel_step, pixel_step);
    const int pitch = cols, own_row = at.own_row();
    acc_t weight[FEW][VEC], total[FEW][VEC], total_g[VEC];
    fill(total_g, 0);
#pragma unroll
    for (int f = 0; f < FEW; f++) {
        fill(total[f], 0);
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            const bool here = dx && at.has_columns;
            weight[f][k] = here ? widen(w[at.n * w_sample + f * w_few + (at.col + k) * w_many]) : acc_t(0);
        }
    }
    const i64 base = at.n * rows * cols + at.col;
    dy += base, y += base, x += at.n * rows * FEW;
    // All threads go round equally often, since dx needs every lane.
#pragma unroll 1
    for (int first = at.row; first < at.row_end; first += at_once * at.row_step) {
        Raw<VEC> gradients[at_once], results[at_once];
        scalar_t inputs[at_once][FEW];
#pragma unroll
        for (int j = 0; j < at_once; j++) {
            const int r = first + j * at.row_step + own_row;
            gradients[j].clear(), results[j].clear();
#pragma unroll
            for (int f = 0; f < FEW; f++) inputs[j][f] = Narrow<scalar_t>::from(0);
            if (!at.has_columns || r >= at.row_end) continue;
            gradients[j].load(dy + r * pitch);
            results[j].load(y + r * pitch);
            if (sum_gx) few.load(x, r, inputs[j]);
        }
#pragma unroll
        for (int j = 0; j < at_once; j++) {
            const int r = first + j * at.row_step + own_row;
            acc_t g[VEC], v[VEC];
            gradients[j].unpack(g);
            results[j].unpack(v);
#pragma unroll
            for (int k = 0; k < VEC; k++) {
                g[k] = shape.gradient(g[k], v[k], true);
                total_g[k] += g[k];
            }
#pragma unroll
            for (int f = 0; f < FEW; f++) {
                const acc_t value = widen(inputs[j][f]);
#pragma unroll
                for (int k = 0; k < VEC; k++) total[f][k] += value * g[k];
            }
            if (!dx) continue;
            acc_t sums[FEW];
            fill(sums, 0);
#pragma unroll
            for (int f = 0; f < FEW; f++)
#pragma unroll
                for (int k = 0; k < VEC; k++) sums[f] += weight[f][k] * g[k];
#pragma unroll 1
            for (int offset = int(lanes) / 2; offset > 0; offset /= 2)
#pragma unroll
                for (int f = 0; f < FEW; f++) sums[f] += __shfl_xor_sync(all_lanes, sums[f], offset);
            if (at.lane > 0 || r >= at.row_end) continue;
            scalar_t* const target = dx + at.n * rows * FEW + r * few.pixel;
#pragma unroll
            for (int f = 0; f < FEW; f++) target[f * few.channel] = Narrow<scalar_t>::from(sums[f]);
        }
    }
    const i64 sums = (at.n * row_chunks + at.row_chunk) * cols;
    if (sum_gx)
#pragma unroll
        for (int f = 0; f < FEW; f++) store_column_sums(total[f], sum_gx + sums * FEW + f, at, lanes, pitch, FEW);
    if (sum_g) store_column_sums(total_g, sum_g + sums, at, lanes, pitch, 1);
}
