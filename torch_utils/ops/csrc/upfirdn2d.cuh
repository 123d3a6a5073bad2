// SPDX-License-Identifier: Apache-2.0
// Compile-time geometry of upfirdn2d. The output at o is a sum over taps t of f[t] * z[o * down - pad + t], and
// z[u] is input u / up where up divides u, else zero. `phase` = (-pad) mod up makes all of that known at
// compile time for a unit: the fewest outputs after which the pattern of taps repeats.
// Macros: UPX UPY DOWNX DOWNY FW FH PHASEX PHASEY; ADDEND, a tensor like the result that is added to it; of the tile kernel also UNITS, the units down a
// column that a thread computes.
#pragma once
#include "epilogue.cuh"

#ifndef UPX
#define UPX 1
#define UPY 1
#define DOWNX 1
#define DOWNY 1
#define FW 4
#define FH 4
#define PHASEX 0
#define PHASEY 0
#define UNITS 4
#endif
#ifndef ADDEND
#define ADDEND 0
#endif
#ifndef EPILOGUE
#define EPILOGUE 0
#endif

__host__ __device__ constexpr int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

template <int UP, int DOWN, int TAPS, int PHASE> struct Axis {
    static constexpr int unit = UP / common_divisor(UP, DOWN);  // outputs
    static constexpr int step = unit * DOWN / UP;               // inputs from one unit to the next
    // Inputs that `outputs` neighbours see, the first of which starts a unit.
    static __host__ __device__ constexpr int span(int outputs) { return ((outputs - 1) * DOWN + PHASE + TAPS - 1) / UP + 1; }
    // The tap that output `out` of a unit has for input `in`; outside [0, TAPS) there is none.
    static __host__ __device__ constexpr int tap(int in, int out) { return in * UP - PHASE - out * DOWN; }
    static __host__ __device__ constexpr bool has(int in, int out) { return tap(in, out) >= 0 && tap(in, out) < TAPS; }
    // The first input of the unit that starts with output `out`.
    static __device__ __forceinline__ int first_input(int out, int pad) {
        return (out * DOWN - pad - PHASE) / UP;  // without remainder, by the choice of the phase
    }
};
using AxisX = Axis<UPX, DOWNX, FW, PHASEX>;
using AxisY = Axis<UPY, DOWNY, FH, PHASEY>;

// Taps of one row of f [size] as they are correlated, times a factor.
template <int SIZE>
__device__ __forceinline__ void load_taps(
    const float* __restrict__ f, bool flip, float factor, acc_t (&taps)[SIZE]
) {
#pragma unroll
    for (int t = 0; t < SIZE; t++) taps[t] = f[flip ? t : SIZE - 1 - t] * factor;
}

__device__ __forceinline__ void load_filter(
    const float* __restrict__ f, bool flip, float gain, acc_t (&taps)[FH][FW]
) {
    float given[FH * FW];  // all at fixed addresses
#pragma unroll
    for (int t = 0; t < FH * FW; t++) given[t] = f[t];
#pragma unroll
    for (int t = 0; t < FH * FW; t++) taps[t / FW][t % FW] = (flip ? given[t] : given[FH * FW - 1 - t]) * gain;
}
