// SPDX-License-Identifier: Apache-2.0
// The nine activations with their first two derivatives, chosen at compile time by ACT. Formulas and special
// cases are those of activations.py.
#pragma once
#include "common.cuh"

#define ACT_LINEAR 1
#define ACT_RELU 2
#define ACT_LRELU 3
#define ACT_TANH 4
#define ACT_SIGMOID 5
#define ACT_ELU 6
#define ACT_SELU 7
#define ACT_SOFTPLUS 8
#define ACT_SWISH 9
#ifndef ACT
#define ACT ACT_LINEAR
#endif

constexpr bool is_piecewise = ACT == ACT_LINEAR || ACT == ACT_RELU || ACT == ACT_LRELU;
constexpr double selu_scale = 1.0507009873554805, selu_alpha = 1.6732632423543772;
constexpr double softplus_limit = 20;  // beyond it softplus(x) is x to the last bit

__device__ __forceinline__ float exponential(float v) { return expf(v); }
__device__ __forceinline__ double exponential(double v) { return exp(v); }
__device__ __forceinline__ float less_one(float v) { return expm1f(v); }
__device__ __forceinline__ double less_one(double v) { return expm1(v); }
__device__ __forceinline__ float log_of_one_plus(float v) { return log1pf(v); }
__device__ __forceinline__ double log_of_one_plus(double v) { return log1p(v); }
__device__ __forceinline__ float hyperbolic(float v) { return tanhf(v); }
__device__ __forceinline__ double hyperbolic(double v) { return tanh(v); }

// No overflow on either side: exp only ever sees values of at most zero.
__device__ __forceinline__ acc_t logistic(acc_t u) {
    const acc_t e = exponential(u < 0 ? u : -u);
    return (u < 0 ? e : acc_t(1)) / (1 + e);
}
__device__ __forceinline__ acc_t logistic_slope(acc_t u) { return logistic(u) * logistic(-u); }

__device__ __forceinline__ acc_t activate(acc_t u, acc_t alpha) {
    if constexpr (ACT == ACT_RELU) return u > 0 ? u : u * 0;
    else if constexpr (ACT == ACT_LRELU) return u > 0 ? u : u * alpha;
    else if constexpr (ACT == ACT_TANH) return hyperbolic(u);
    else if constexpr (ACT == ACT_SIGMOID) return logistic(u);
    else if constexpr (ACT == ACT_ELU) return u > 0 ? u : less_one(u);
    else if constexpr (ACT == ACT_SELU) return acc_t(selu_scale) * (u > 0 ? u : acc_t(selu_alpha) * less_one(u));
    else if constexpr (ACT == ACT_SOFTPLUS) return u > acc_t(softplus_limit) ? u : log_of_one_plus(exponential(u));
    else if constexpr (ACT == ACT_SWISH) return u * logistic(u);
    else return u;
}

// act'(u). Of the piecewise linear ones the sign of u is all that counts, so u may be the output as well.
__device__ __forceinline__ acc_t slope(acc_t u, acc_t alpha) {
    if constexpr (ACT == ACT_RELU) return u > 0;
    else if constexpr (ACT == ACT_LRELU) return u > 0 ? acc_t(1) : alpha;
    else if constexpr (ACT == ACT_TANH) { const acc_t t = hyperbolic(u); return 1 - t * t; }
    else if constexpr (ACT == ACT_SIGMOID) return logistic_slope(u);
    else if constexpr (ACT == ACT_ELU) return u > 0 ? acc_t(1) : exponential(u);
    else if constexpr (ACT == ACT_SELU)
        return acc_t(selu_scale) * (u > 0 ? acc_t(1) : acc_t(selu_alpha) * exponential(u));
    else if constexpr (ACT == ACT_SOFTPLUS) return logistic(u);
    else if constexpr (ACT == ACT_SWISH) return logistic(u) + u * logistic_slope(u);
    else return 1;
}

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// The same for 0 <= alpha <= 1, in fewer instructions.
__device__ __forceinline__ acc_t activate_flat(acc_t u, acc_t alpha) {
    if constexpr (ACT == ACT_LRELU) return larger(u, u * alpha);
    else return activate(u, alpha);
}

// act''(u)
__device__ __forceinline__ acc_t curvature(acc_t u) {
    if constexpr (ACT == ACT_TANH) { const acc_t t = hyperbolic(u); return -2 * t * (1 - t * t); }
    else if constexpr (ACT == ACT_SIGMOID) return -logistic_slope(u) * hyperbolic(u / 2);
    else if constexpr (ACT == ACT_ELU) return u > 0 ? acc_t(0) : exponential(u);
    else if constexpr (ACT == ACT_SELU) return u > 0 ? acc_t(0) : acc_t(selu_scale * selu_alpha) * exponential(u);
    else if constexpr (ACT == ACT_SOFTPLUS) return logistic_slope(u);
    else if constexpr (ACT == ACT_SWISH) return logistic_slope(u) * (2 - u * hyperbolic(u / 2));
    else return 0;
}

struct Shape {  // of act(u) * gain limited to +-clamp; clamp < 0 is none
    acc_t alpha, gain, limit;
    acc_t blocked;  // magnitude of outputs from which on no gradient passes; not a number if all do

    __device__ __forceinline__ Shape(double alpha, double gain, double clamp)
        : alpha(alpha), gain(gain), limit(clamp < 0 ? acc_t(float_of(0x7f800000)) : acc_t(clamp)),
          blocked(clamp < 0 ? acc_t(float_of(0x7fffffff)) : rounded(acc_t(clamp))) {}

    __device__ __forceinline__ acc_t value(acc_t u) const { return limited(activate(u, alpha) * gain, limit); }

    // Whether the clamp lets a gradient through; `saved` is the output or the input, as for gradient().
    __device__ __forceinline__ bool passes(acc_t saved, bool from_output) const {
        const acc_t y = from_output ? saved : rounded(activate(saved, alpha) * gain);
        return !(magnitude(y) >= blocked);
    }

    // dy * d value / d u
    __device__ __forceinline__ acc_t gradient(acc_t dy, acc_t saved, bool from_output) const {
        return passes(saved, from_output) ? dy * slope(saved, alpha) * gain : acc_t(0);
    }
};
