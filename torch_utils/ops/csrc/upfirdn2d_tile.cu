// SPDX-License-Identifier: Apache-2.0
// upfirdn2d in NCHW through shared memory, alone, plus an ADDEND, or followed by the epilogue of a modulated
// convolution.
// A block of 32 x 8 threads makes a tile of one plane: every thread COLS units across (32 apart) and UNITS units
// down, so that each input it reads from shared memory serves all outputs that see it. SEPARABLE filters f [FW]
// run along the rows first, into a second buffer. Further macros: upfirdn2d.cuh, epilogue.cuh.
#include "upfirdn2d.cuh"

#ifndef COLS
#define COLS 2
#endif
#ifndef SEPARABLE
#define SEPARABLE 0
#endif
#define LANES 32
#define ROWS 8
#define THREADS 256

constexpr int across = LANES * COLS;                        // units
constexpr int tile_w = across * AxisX::unit, strip = UNITS * AxisY::unit, tile_h = ROWS * strip;
constexpr int in_w_tile = AxisX::span(tile_w), in_h_tile = AxisY::span(tile_h);
// Columns that are `step` apart lie side by side, so that the lanes of a warp read from different banks.
constexpr int pitch = (in_w_tile + AxisX::step - 1) / AxisX::step;
constexpr int row_size = pitch * AxisX::step;

__device__ __forceinline__ int slot(int col) { return col % AxisX::step * pitch + col / AxisX::step; }

__device__ __forceinline__ void load_tile(
    const scalar_t* __restrict__ plane, i64 top, i64 left, i64 in_h, i64 in_w, acc_t (&tile)[in_h_tile][row_size]
) {
#pragma unroll 8
    for (int i = threadIdx.y * LANES + threadIdx.x; i < in_h_tile * in_w_tile; i += THREADS) {
        const int row = i / in_w_tile, col = i % in_w_tile;
        const i64 y = top + row, x = left + col;
        const bool inside = y >= 0 && y < in_h && x >= 0 && x < in_w;
        tile[row][slot(col)] = inside ? widen(plane[y * in_w + x]) : acc_t(0);
    }
}

// One unit column and strip of outputs from the tile, both axes at once.
__device__ __forceinline__ void filter_strip(
    const acc_t (&tile)[in_h_tile][row_size], int unit, const acc_t (&taps)[FH][FW],
    acc_t (&sums)[strip][AxisX::unit]
) {
    const int first = threadIdx.y * UNITS * AxisY::step;
#pragma unroll
    for (int q = 0; q < AxisY::span(strip); q++)
#pragma unroll
        for (int p = 0; p < AxisX::span(AxisX::unit); p++) {
            const acc_t v = tile[first + q][p % AxisX::step * pitch + unit + p / AxisX::step];
#pragma unroll
            for (int o = 0; o < strip; o++)
#pragma unroll
                for (int u = 0; u < AxisX::unit; u++)
                    if (AxisY::has(q, o) && AxisX::has(p, u))
                        sums[o][u] += v * taps[AxisY::tap(q, o)][AxisX::tap(p, u)];
        }
}

#if SEPARABLE
typedef acc_t Rows[in_h_tile][AxisX::unit][across];

// The rows of the tile, filtered along x.
__device__ __forceinline__ void filter_rows(
    const acc_t (&tile)[in_h_tile][row_size], const acc_t (&taps)[FW], Rows& rows
) {
    for (int row = threadIdx.y; row < in_h_tile; row += ROWS)
#pragma unroll
        for (int j = 0; j < COLS; j++) {
            const int unit = threadIdx.x + LANES * j;
            acc_t sums[AxisX::unit];
            fill(sums, 0);
#pragma unroll
            for (int p = 0; p < AxisX::span(AxisX::unit); p++) {
                const acc_t v = tile[row][p % AxisX::step * pitch + unit + p / AxisX::step];
#pragma unroll
                for (int u = 0; u < AxisX::unit; u++)
                    if (AxisX::has(p, u)) sums[u] += v * taps[AxisX::tap(p, u)];
            }
#pragma unroll
            for (int u = 0; u < AxisX::unit; u++) rows[row][u][unit] = sums[u];
        }
}

__device__ __forceinline__ void filter_columns(
    const Rows& rows, int unit, const acc_t (&taps)[FH], acc_t (&sums)[strip][AxisX::unit]
) {
    const int first = threadIdx.y * UNITS * AxisY::step;
#pragma unroll
    for (int q = 0; q < AxisY::span(strip); q++)
#pragma unroll
        for (int u = 0; u < AxisX::unit; u++) {
            const acc_t v = rows[first + q][u][unit];
#pragma unroll
            for (int o = 0; o < strip; o++)
                if (AxisY::has(q, o)) sums[o][u] += v * taps[AxisY::tap(q, o)];
        }
}
#endif

// Where the results go, and what becomes of them on the way.
struct Target {
    scalar_t* plane;
    const scalar_t* noise;
    i64 out_h, out_w;
    acc_t scale, bias;
    Shape shape;
    bool in_pairs;  // rows start at even addresses, so that two outputs can be stored at once
#if NEXT
    scalar_t* unscaled;  // null if nobody asks for it
    acc_t next;
#endif
#if ADDEND
    const scalar_t* addend;
#endif

    template <int N> __device__ __forceinline__ void keep(i64 pixel, acc_t (&values)[N]) const {
#if NEXT
        if (unscaled) store(unscaled + pixel, values);
#pragma unroll
        for (int k = 0; k < N; k++) values[k] *= next;
#endif
        store(plane + pixel, values);
    }

    __device__ __forceinline__ acc_t finished(acc_t v, i64 pixel) const {
#if ADDEND
        return v + widen(addend[pixel]);
#endif
        if constexpr (!EPILOGUE) return v;
        return shape.value(v * scale + bias + (NOISE ? widen(noise[pixel]) : acc_t(0)));
    }

    __device__ __forceinline__ void put(i64 y, i64 x, const acc_t (&values)[AxisX::unit]) const {
        const i64 pixel = y * out_w + x;
        if constexpr (AxisX::unit == 2) {
            if (in_pairs) {
                if (x >= out_w) return;
                acc_t pair[2] = {finished(values[0], pixel), finished(values[1], pixel + 1)};
                return keep(pixel, pair);
            }
        }
#pragma unroll
        for (int u = 0; u < AxisX::unit; u++) {
            if (x + u >= out_w) return;
            acc_t one[1] = {finished(values[u], pixel + u)};
            keep(pixel + u, one);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) upfirdn2d_tile(
    const scalar_t* __restrict__ x, const float* __restrict__ f, scalar_t* __restrict__ y,
    const scalar_t* __restrict__ d, const scalar_t* __restrict__ noise, const scalar_t* __restrict__ b,
    i64 channels, i64 in_h, i64 in_w, i64 out_h, i64 out_w, i64 pad_x, i64 pad_y, i64 flip, i64 noise_step,
    double filter_gain, double alpha, double gain, double clamp
#if NEXT
    , const scalar_t* __restrict__ next_scale, scalar_t* __restrict__ unscaled
#endif
#if ADDEND
    , const scalar_t* __restrict__ addend
#endif
) {
    __shared__ acc_t tile[in_h_tile][row_size];
    const i64 tiles_x = (out_w + tile_w - 1) / tile_w, tiles_y = (out_h + tile_h - 1) / tile_h;
    const i64 left = blockIdx.x % tiles_x * tile_w, top = blockIdx.x / tiles_x % tiles_y * tile_h;
    const i64 plane = blockIdx.x / (tiles_x * tiles_y), n = plane / channels, c = plane % channels;
    load_tile(x + plane * in_h * in_w, AxisY::first_input(top, pad_y), AxisX::first_input(left, pad_x),
              in_h, in_w, tile);
    const Target target = {
        y + plane * out_h * out_w, NOISE ? noise + n * noise_step : nullptr, out_h, out_w,
        EPILOGUE ? widen(d[plane]) : acc_t(1), BIAS ? widen(b[c]) : acc_t(0), Shape(alpha, gain, clamp),
        out_w % 2 == 0,
#if NEXT
        unscaled ? unscaled + plane * out_h * out_w : nullptr, widen(next_scale[plane])
#endif
#if ADDEND
        addend + plane * out_h * out_w
#endif
    };
#if SEPARABLE
    __shared__ Rows rows;
    acc_t taps_x[FW], taps_y[FH];
    load_taps(f, flip, float(filter_gain), taps_x);
    load_taps(f, flip, 1.f, taps_y);
    __syncthreads();
    filter_rows(tile, taps_x, rows);
#else
    acc_t taps[FH][FW];
    load_filter(f, flip, float(filter_gain), taps);
#endif
    __syncthreads();
    const i64 first = top + threadIdx.y * strip;
#pragma unroll
    for (int j = 0; j < COLS; j++) {
        const int unit = threadIdx.x + LANES * j;
        acc_t sums[strip][AxisX::unit];
#pragma unroll
        for (int o = 0; o < strip; o++) fill(sums[o], 0);
#if SEPARABLE
        filter_columns(rows, unit, taps_y, sums);
#else
        filter_strip(tile, unit, taps, sums);
#endif
#pragma unroll
        for (int o = 0; o < strip; o++)
            if (first + o < out_h) target.put(first + o, left + unit * AxisX::unit, sums[o]);
    }
}
