// SPDX-License-Identifier: Apache-2.0
// Affine sampling of an image that is continued by reflection and up-sampled by 2, of which nothing is stored: each
// sample weighs TAPS / 2 + 1 pixels along each axis, by the low-pass filter interpolated linearly between its taps.
// Macros: SCALAR_T, TAPS (even), CHUNK (channels that a thread sums at once).
#include "common.cuh"

#ifndef TAPS
#define TAPS 12
#endif
#ifndef CHUNK
#define CHUNK 3
#endif
#define TILE_X 32
#define TILE_Y 8
constexpr int R = TAPS / 2, COUNT = R + 1;

// Taps by their distance from a pixel in the up-sampled grid, -R - 1 ... R + 1, with zeros at both ends.
struct Taps {
    acc_t at[2 * R + 3];

    __device__ __forceinline__ void load(const float* f) {
        const int thread = threadIdx.y * TILE_X + threadIdx.x;
        if (thread < 2 * R + 3) {
            const int tap = thread - 2;
            at[thread] = tap >= 0 && tap < TAPS ? 2 * acc_t(f[tap]) : acc_t(0);
        }
        __syncthreads();
    }
};

// One axis of the image: `size` pixels, `before` more of them in front of the first, `total` with all.
struct Axis {
    int size, before, total;

    // The position `u` in the up-sampled image, as the place to its left and how far it is beyond that.
    __device__ __forceinline__ int place(acc_t u, acc_t& beyond) const {
        const acc_t least = -2, most = 2 * total + 1;  // further out all is zero
        u = u < least ? least : u > most ? most : u;
        int k = int(u);
        if (acc_t(k) > u) k--;
        beyond = u - acc_t(k);
        return k;
    }

    // How much the pixel that is t places to the left of k counts.
    __device__ __forceinline__ acc_t weight(const Taps& taps, int k, acc_t beyond, int t) const {
        const acc_t left = k >= 0 && k < 2 * total ? taps.at[t + R + 1] : acc_t(0);
        const acc_t right = k >= -1 && k < 2 * total - 1 ? taps.at[t + R + 2] : acc_t(0);
        return left + (right - left) * beyond;
    }

    __device__ __forceinline__ int reflected(int i) const {
        i -= before;
        if (i < 0) i = -i;
        return i < size ? i : 2 * (size - 1) - i;
    }

    // Where pixel i is in the continued image: itself, its reflection about the first or the last; -1 if nowhere.
    __device__ __forceinline__ int copy(int i, int which) const {
        const int end = size - 1;
        if (which > 0 && i == (which == 1 ? 0 : end)) return -1;
        const int at = before + (which == 0 ? i : which == 1 ? -i : 2 * end - i);
        return at < total ? at : -1;
    }
};

// Where a result's pixel lies in the up-sampled image: (u, v) of the centre, and what half a column and half a row add.
// Distances from the centre are small numbers, which keeps the rounding low.
struct Affine {
    acc_t u, v, across_u, across_v, down_u, down_v;
    int width, height;
    Axis columns, rows;

    __device__ __forceinline__ Affine(
        const acc_t* m, int in_h, int in_w, int height, int width, int pad_x, int pad_y, int total_w, int total_h
    ) : width(width), height(height), columns{in_w, pad_x, total_w}, rows{in_h, pad_y, total_h} {
        u = (m[2] + 1) * total_w - acc_t(0.5);
        v = (m[5] + 1) * total_h - acc_t(0.5);
        across_u = m[0] * total_w / width;
        across_v = m[3] * total_h / width;
        down_u = m[1] * total_w / height;
        down_v = m[4] * total_h / height;
    }

    // Of a column and of a row, in halves of one.
    __device__ __forceinline__ int from_middle(int c) const { return 2 * c + 1 - width; }
    __device__ __forceinline__ int from_centre(int r) const { return 2 * r + 1 - height; }
};

struct Tile {  // the thread's pixel of a [height, width] image, and its sample
    i64 n;
    int r, c;

    __device__ __forceinline__ Tile(int height, int width) {
        const unsigned across = (width + TILE_X - 1) / TILE_X, down = (height + TILE_Y - 1) / TILE_Y;
        const unsigned row = blockIdx.x / across;
        n = row / down;
        r = int(row % down) * TILE_Y + threadIdx.y;
        c = int(blockIdx.x % across) * TILE_X + threadIdx.x;
    }
};

#define GEOMETRY i64 channels, i64 in_h, i64 in_w, i64 height, i64 width, i64 pad_x, i64 pad_y, i64 total_w, i64 total_h

extern "C" __global__ void __launch_bounds__(256) warp(
    const scalar_t* __restrict__ x, const float* __restrict__ f, const acc_t* __restrict__ matrix,
    scalar_t* __restrict__ y, GEOMETRY
) {
    __shared__ Taps taps;
    taps.load(f);
    const Tile tile(height, width);
    if (tile.r >= height || tile.c >= width) return;
    const Affine affine(matrix + tile.n * 9, in_h, in_w, height, width, pad_x, pad_y, total_w, total_h);
    const int across = affine.from_middle(tile.c), down = affine.from_centre(tile.r);
    const acc_t u = affine.u + (down * affine.down_u + across * affine.across_u);
    const acc_t v = affine.v + (down * affine.down_v + across * affine.across_v);
    acc_t beyond_u, beyond_v;
    const int ku = affine.columns.place(u, beyond_u), kv = affine.rows.place(v, beyond_v);
    const int first_u = (ku - R + 1) >> 1, first_v = (kv - R + 1) >> 1;
    acc_t weights[COUNT];
    int columns[COUNT];
#pragma unroll
    for (int b = 0; b < COUNT; b++) {
        const int i = first_u + b;
        const bool inside = i >= 0 && i < total_w;
        weights[b] = inside ? affine.columns.weight(taps, ku, beyond_u, ku - 2 * i) : acc_t(0);
        columns[b] = inside ? affine.columns.reflected(i) : 0;
    }
    const i64 plane = in_h * in_w, out_plane = height * width;
    const scalar_t* const image = x + tile.n * channels * plane;
    scalar_t* const result = y + tile.n * channels * out_plane + i64(tile.r) * width + tile.c;
    for (int first = 0; first < channels; first += CHUNK) {
        acc_t sums[CHUNK];
        fill<CHUNK>(sums, 0);
        for (int a = 0; a < COUNT; a++) {
            const int j = first_v + a;
            if (j < 0 || j >= total_h) continue;
            const acc_t weight = affine.rows.weight(taps, kv, beyond_v, kv - 2 * j);
            const scalar_t* const row = image + first * plane + affine.rows.reflected(j) * in_w;
#pragma unroll
            for (int c = 0; c < CHUNK; c++) {
                if (first + c >= channels) break;
                acc_t sum = 0;
#pragma unroll
                for (int b = 0; b < COUNT; b++) sum += weights[b] * widen(row[c * plane + columns[b]]);
                sums[c] += weight * sum;
            }
        }
#pragma unroll
        for (int c = 0; c < CHUNK; c++)
            if (first + c < channels) result[(first + c) * out_plane] = Narrow<scalar_t>::from(sums[c]);
    }
}

// The range of pixels within `reach` of a place, both in halves of a pixel from the centre of `size` pixels.
__device__ __forceinline__ void around(acc_t centre, acc_t reach, int size, int& first, int& last) {
    const acc_t lo = (centre - reach + size - 1) / 2, hi = (centre + reach + size - 1) / 2, end = size;
    first = lo > 0 ? lo < end ? int(lo) : size : 0;
    last = hi < end ? hi > -1 ? int(hi + 1) : -1 : size - 1;
    if (last > size - 1) last = size - 1;
}

// Adds to the sums what a pixel of the continued image gets back from the samples that it took part in.
__device__ __forceinline__ void gather(
    const scalar_t* dy, const Taps& taps, const Affine& affine, int i, int j, int channels, acc_t (&sums)[CHUNK]
) {
    const acc_t det = affine.across_u * affine.down_v - affine.down_u * affine.across_v;
    // From the left end of where the pixel counts, so that what counts has positions of 0 ... 2 * R + 1.
    const acc_t u0 = affine.u - (2 * i - R), v0 = affine.v - (2 * j - R), length = 2 * R + 1;
    int first_c = 0, last_c = affine.width - 1, first_r = 0, last_r = affine.height - 1;
    if (det > acc_t(1e-6) || det < acc_t(-1e-6)) {
        // The inverse takes the square of these positions to a parallelogram: columns and rows around it.
        const acc_t du = length / 2 - u0, dv = length / 2 - v0, half = length / 2 / magnitude(det);
        around((affine.down_v * du - affine.down_u * dv) / det,
               half * (magnitude(affine.down_v) + magnitude(affine.down_u)) + 2, affine.width, first_c, last_c);
        around((affine.across_u * dv - affine.across_v * du) / det,
               half * (magnitude(affine.across_v) + magnitude(affine.across_u)) + 2, affine.height, first_r, last_r);
    }
    const i64 plane = i64(affine.height) * affine.width;
    for (int r = first_r; r <= last_r; r++) {
        const scalar_t* const row = dy + i64(r) * affine.width;
        const acc_t row_u = affine.from_centre(r) * affine.down_u, row_v = affine.from_centre(r) * affine.down_v;
        for (int c = first_c; c <= last_c; c++) {
            const int across = affine.from_middle(c);
            const acc_t u = u0 + (row_u + across * affine.across_u), v = v0 + (row_v + across * affine.across_v);
            if (!(u > 0 && u < length && v > 0 && v < length)) continue;
            const int ku = int(u), kv = int(v);
            const acc_t weight = affine.columns.weight(taps, ku + 2 * i - R, u - ku, ku - R)
                * affine.rows.weight(taps, kv + 2 * j - R, v - kv, kv - R);
#pragma unroll
            for (int k = 0; k < CHUNK; k++)
                if (k < channels) sums[k] += weight * widen(row[k * plane + c]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) warp_adjoint(
    const scalar_t* __restrict__ dy, const float* __restrict__ f, const acc_t* __restrict__ matrix,
    scalar_t* __restrict__ dx, GEOMETRY
) {
    __shared__ Taps taps;
    taps.load(f);
    const Tile tile(in_h, in_w);
    if (tile.r >= in_h || tile.c >= in_w) return;
    const Affine affine(matrix + tile.n * 9, in_h, in_w, height, width, pad_x, pad_y, total_w, total_h);
    const i64 plane = in_h * in_w;
    for (int first = 0; first < channels; first += CHUNK) {
        acc_t sums[CHUNK];
        fill<CHUNK>(sums, 0);
        for (int b = 0; b < 3; b++) {
            const int j = affine.rows.copy(tile.r, b);
            for (int a = 0; j >= 0 && a < 3; a++) {
                const int i = affine.columns.copy(tile.c, a);
                if (i >= 0)
                    gather(dy + (tile.n * channels + first) * height * width, taps, affine, i, j,
                           int(channels) - first, sums);
            }
        }
#pragma unroll
        for (int c = 0; c < CHUNK; c++)
            if (first + c < channels)
                dx[(tile.n * channels + first + c) * plane + i64(tile.r) * in_w + tile.c] =
                    Narrow<scalar_t>::from(sums[c]);
    }
}
