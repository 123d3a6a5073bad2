// SPDX-License-Identifier: Apache-2.0
// How a block walks over a sample that is a matrix [rows, cols], dense by rows: channels x pixels in NCHW, pixels x
// channels in NHWC (CHANNELS_LAST). A block of 256 threads holds `lanes` vectors of columns side by side and goes
// down `chunk_rows` rows, 256 / lanes at a time. So what belongs to a column stays in registers and nothing is
// divided in the loop. Offsets within a sample are of 32 bits.
#pragma once
#include "epilogue.cuh"

#ifndef CHANNELS_LAST
#define CHANNELS_LAST 0
#endif
#define THREADS 256

struct Place {  // of a thread: its columns, its rows, and which part of the matrix the block has
    i64 n;
    int col, row, row_end, row_step, col_chunk, row_chunk;  // a sample has less than 2^31 elements
    int lane;
    bool has_columns;

    __device__ __forceinline__ Place(
        i64 rows, i64 cols, i64 lanes, i64 chunk_rows, i64 col_chunks, i64 row_chunks
    ) {
        lane = threadIdx.x % unsigned(lanes);
        col_chunk = blockIdx.x % unsigned(col_chunks);
        const unsigned rest = blockIdx.x / unsigned(col_chunks);
        row_chunk = rest % unsigned(row_chunks);
        n = rest / unsigned(row_chunks);
        col = (col_chunk * int(lanes) + lane) * VEC;
        row = row_chunk * int(chunk_rows);
        row_end = rows - row < chunk_rows ? rows : row + chunk_rows;
        row_step = THREADS / unsigned(lanes);
        has_columns = col < cols;
    }
    __device__ __forceinline__ int own_row() const { return threadIdx.x / unsigned(THREADS / row_step); }
};

constexpr unsigned all_lanes = 0xffffffffu;

// Sum over the rows of the block for each of its columns, in a fixed order: within a warp first, then over the warps,
// one thread per column. Column c is stored at out[c * step].
__device__ __forceinline__ void store_column_sums(
    acc_t (&sums)[VEC], acc_t* __restrict__ out, const Place& at, int lanes, int cols, int step
) {
    __shared__ acc_t shared[THREADS / 32][32 * VEC];
    for (int offset = 16; offset >= lanes; offset /= 2)
#pragma unroll
        for (int k = 0; k < VEC; k++) sums[k] += __shfl_xor_sync(all_lanes, sums[k], offset);
    __syncthreads();  // the buffer may still be read for the sums before
    if (threadIdx.x % 32 < lanes) {
#pragma unroll
        for (int k = 0; k < VEC; k++) shared[threadIdx.x / 32][at.lane * VEC + k] = sums[k];
    }
    __syncthreads();
    const int own = threadIdx.x, col = at.col_chunk * lanes * VEC + own;
    if (own >= lanes * VEC || col >= cols) return;
    acc_t total = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) total += shared[w][own];
    out[col * step] = total;
}
