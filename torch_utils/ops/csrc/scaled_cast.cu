// SPDX-License-Identifier: Apache-2.0
// y = x * gain in another element type: a layer's weight as a convolution in 16 bits takes it, and back.
// Macros: SCALAR_T, OUT_T, VEC (elements a thread, moved as one word of each type).
#include "common.cuh"

#ifndef OUT_T
#define OUT_T SCALAR_T
#endif

// `size` is a multiple of VEC. The product is rounded to the accumulator's type first, as by two operations.
extern "C" __global__ void __launch_bounds__(256) scaled_cast(
    const scalar_t* __restrict__ x, OUT_T* __restrict__ y, i64 size, double gain
) {
    const i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * VEC;
    if (i >= size) return;
    using word = typename Word<VEC * sizeof(OUT_T)>::type;
    acc_t values[VEC];
    OUT_T results[VEC];
    load(x + i, values);
#pragma unroll
    for (int k = 0; k < VEC; k++) results[k] = Narrow<OUT_T>::from(values[k] * acc_t(gain));
    word raw;
    memcpy(&raw, results, sizeof(word));
    *reinterpret_cast<word*>(y + i) = raw;
}
