// SPDX-License-Identifier: Apache-2.0
// What the partial sums of epilogue_grad.cu add up to, up to three tensors of them in one launch and always in the same
// order. Macro: SCALAR_T (of the results).
#include "common.cuh"

#define THREADS 512

struct Job {  // partial sums [groups, rows, length] to sums [groups, length], `lanes` rows side by side
    const acc_t* parts;
    scalar_t* sums;
    int rows, length, lanes, block;
};

extern "C" __global__ void __launch_bounds__(THREADS) partial_sums(
    const acc_t* __restrict__ parts0, scalar_t* __restrict__ sums0, i64 rows0, i64 length0, i64 lanes0, i64 blocks0,
    const acc_t* __restrict__ parts1, scalar_t* __restrict__ sums1, i64 rows1, i64 length1, i64 lanes1, i64 blocks1,
    const acc_t* __restrict__ parts2, scalar_t* __restrict__ sums2, i64 rows2, i64 length2, i64 lanes2
) {
    Job job = {parts0, sums0, int(rows0), int(length0), int(lanes0), int(blockIdx.x)};
    if (blockIdx.x >= blocks0 + blocks1)
        job = {parts2, sums2, int(rows2), int(length2), int(lanes2), int(blockIdx.x - blocks0 - blocks1)};
    else if (blockIdx.x >= blocks0)
        job = {parts1, sums1, int(rows1), int(length1), int(lanes1), int(blockIdx.x - blocks0)};
    const int cols = THREADS / job.lanes, across = (job.length + cols - 1) / cols;
    const int col = job.block % across * cols + threadIdx.x % unsigned(cols), lane = threadIdx.x / unsigned(cols);
    const i64 group = job.block / across;
    acc_t sum = 0;
    if (col < job.length) {
        const acc_t* const first = job.parts + group * job.rows * job.length + col;
#pragma unroll 8
        for (int r = lane; r < job.rows; r += job.lanes) sum += first[i64(r) * job.length];
    }
    __shared__ acc_t shared[THREADS];
    shared[threadIdx.x] = sum;
    for (int half = job.lanes / 2; half > 0; half /= 2) {
        __syncthreads();
        if (lane < half) shared[threadIdx.x] += shared[threadIdx.x + half * cols];
    }
    if (lane == 0 && col < job.length)
        job.sums[group * job.length + col] = Narrow<scalar_t>::from(shared[threadIdx.x]);
}
