// SPDX-License-Identifier: Apache-2.0
// y = act(x + b) * gain within +-clamp over a dense tensor of any layout, and its first two derivatives.
// Macros: SCALAR_T, ACT, VEC (elements a thread, moved as one word), BIAS: 0 none, 1 one value for a whole
// vector, 2 consecutive values along the vector; ADDEND (0 or 1), a tensor like y that bias_act adds to it.
#include "activation.cuh"

#ifndef BIAS
#define BIAS 0
#endif
#ifndef ADDEND
#define ADDEND 0
#endif

// One vector a thread; `size` is a multiple of VEC.
__device__ __forceinline__ i64 first_element() { return (i64(blockIdx.x) * blockDim.x + threadIdx.x) * VEC; }

// The bias index of element i, i / step % count. Divisions of 64 bits cost a hundred instructions.
__device__ __forceinline__ i64 bias_index(i64 i, i64 size, i64 step, i64 count) {
    if (size >> 32) return BIAS == 2 ? i % count : i / step % count;
    return (BIAS == 2 ? unsigned(i) : unsigned(i) / unsigned(step)) % unsigned(count);
}

extern "C" __global__ void __launch_bounds__(256) bias_act(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ b, scalar_t* __restrict__ y, i64 size,
    i64 step, i64 count, double alpha, double gain, double clamp
#if ADDEND
    , const scalar_t* __restrict__ addend
#endif
) {
    const i64 i = first_element();
    if (i >= size) return;
    const Shape shape(alpha, gain, clamp);
    acc_t u[VEC], bias[VEC];
#if ADDEND
    acc_t more[VEC];
    load(addend + i, more);
#endif
    load(x + i, u);
    fill(bias, 0);
    if constexpr (BIAS == 1) fill(bias, widen(b[bias_index(i, size, step, count)]));
    if constexpr (BIAS == 2) load(b + bias_index(i, size, step, count), bias);
#pragma unroll
    for (int k = 0; k < VEC; k++) u[k] = shape.value(u[k] + bias[k]);
#if ADDEND
#pragma unroll
    for (int k = 0; k < VEC; k++) u[k] += more[k];
#endif
    store(y + i, u);
}

// dx = dy * dy/dx; `saved` is the output where from_output is set, else the input with its bias.
extern "C" __global__ void __launch_bounds__(256) bias_act_grad(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ saved, scalar_t* __restrict__ dx, i64 size,
    i64 from_output, double alpha, double gain, double clamp
) {
    const i64 i = first_element();
    if (i >= size) return;
    const Shape shape(alpha, gain, clamp);
    acc_t g[VEC], s[VEC];
    load(dy + i, g);
    load(saved + i, s);
    if (from_output) {
#pragma unroll
        for (int k = 0; k < VEC; k++) g[k] = shape.gradient(g[k], s[k], true);
    } else {
#pragma unroll
        for (int k = 0; k < VEC; k++) g[k] = shape.gradient(g[k], s[k], false);
    }
    store(dx + i, g);
}

// dy * ddx * gain * act''(u): what the gradient's own gradient owes to the input u of a smooth activation.
extern "C" __global__ void __launch_bounds__(256) bias_act_curvature(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ ddx, const scalar_t* __restrict__ u,
    scalar_t* __restrict__ result, i64 size, double alpha, double gain, double clamp
) {
    const i64 i = first_element();
    if (i >= size) return;
    const Shape shape(alpha, gain, clamp);
    acc_t a[VEC], c[VEC], s[VEC];
    load(dy + i, a);
    load(ddx + i, c);
    load(u + i, s);
#pragma unroll
    for (int k = 0; k < VEC; k++)
        a[k] = shape.passes(s[k], false) ? a[k] * c[k] * curvature(s[k]) * shape.gain : acc_t(0);
    store(result + i, a);
}
