// SPDX-License-Identifier: Apache-2.0
// upfirdn2d in NHWC, alone or followed by the epilogue of a modulated convolution: a thread makes one unit across
// and UNITS units down, for VEC channels that travel as one word. Neighbouring threads have neighbouring channels,
// then neighbouring pixels, whose common inputs they find in the cache.
// Further macros: upfirdn2d.cuh, epilogue.cuh.
#include "upfirdn2d.cuh"

#define THREADS 256
constexpr int strip = UNITS * AxisY::unit;
typedef acc_t Sums[strip][AxisX::unit][VEC];

// Add what one vector of inputs, at (q, p) of the thread's own window, gives to all outputs that see it.
template <int Q_SPAN, int P_SPAN>
__device__ __forceinline__ void gather(
    const scalar_t* __restrict__ sample, i64 top, i64 left, i64 in_h, i64 in_w, i64 channels,
    const acc_t (&taps)[FH][FW], Sums& sums
) {
#pragma unroll
    for (int q = 0; q < Q_SPAN; q++)
#pragma unroll
        for (int p = 0; p < P_SPAN; p++) {
            const i64 y = top + q, x = left + p;
            if (y < 0 || y >= in_h || x < 0 || x >= in_w) continue;
            acc_t v[VEC];
            load(sample + (y * in_w + x) * channels, v);
#pragma unroll
            for (int o = 0; o < strip; o++)
#pragma unroll
                for (int u = 0; u < AxisX::unit; u++)
                    if (AxisY::has(q, o) && AxisX::has(p, u)) {
#pragma unroll
                        for (int k = 0; k < VEC; k++)
                            sums[o][u][k] += v[k] * taps[AxisY::tap(q, o)][AxisX::tap(p, u)];
                    }
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) upfirdn2d_pixel(
    const scalar_t* __restrict__ x, const float* __restrict__ f, scalar_t* __restrict__ y,
    const scalar_t* __restrict__ d, const scalar_t* __restrict__ noise, const scalar_t* __restrict__ b,
    i64 samples, i64 channels, i64 in_h, i64 in_w, i64 out_h, i64 out_w, i64 pad_x, i64 pad_y, i64 flip,
    i64 noise_step, double filter_gain, double alpha, double gain, double clamp
) {
    const i64 vectors = channels / VEC, units_x = (out_w + AxisX::unit - 1) / AxisX::unit;
    const i64 strips = (out_h + strip - 1) / strip;
    i64 rest = i64(blockIdx.x) * THREADS + threadIdx.x;
    const i64 c = rest % vectors * VEC;
    rest /= vectors;
    const i64 left = rest % units_x * AxisX::unit;
    rest /= units_x;
    const i64 top = rest % strips * strip, n = rest / strips;
    if (n >= samples) return;
    acc_t taps[FH][FW];
    load_filter(f, flip, float(filter_gain), taps);
    Sums sums;
#pragma unroll
    for (int o = 0; o < strip; o++)
#pragma unroll
        for (int u = 0; u < AxisX::unit; u++) fill(sums[o][u], 0);
    gather<AxisY::span(strip), AxisX::span(AxisX::unit)>(
        x + n * in_h * in_w * channels + c, AxisY::first_input(top, pad_y), AxisX::first_input(left, pad_x),
        in_h, in_w, channels, taps, sums);
    const Shape shape(alpha, gain, clamp);
    acc_t scale[VEC], bias[VEC];
    fill(bias, 0);
    if constexpr (EPILOGUE) load(d + n * channels + c, scale);
    if constexpr (BIAS) load(b + c, bias);
#pragma unroll
    for (int o = 0; o < strip; o++)
#pragma unroll
        for (int u = 0; u < AxisX::unit; u++) {
            if (top + o >= out_h || left + u >= out_w) continue;
            const i64 pixel = (top + o) * out_w + left + u;
            if constexpr (EPILOGUE) {
                const acc_t extra = NOISE ? widen(noise[n * noise_step + pixel]) : acc_t(0);
#pragma unroll
                for (int k = 0; k < VEC; k++)
                    sums[o][u][k] = shape.value(sums[o][u][k] * scale[k] + bias[k] + extra);
            }
            store(y + (n * out_h * out_w + pixel) * channels + c, sums[o][u]);
        }
}
