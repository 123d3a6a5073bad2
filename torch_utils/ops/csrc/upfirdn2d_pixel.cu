// SPDX-License-Identifier: Apache-2.0
// upfirdn2d in NHWC, alone, plus an ADDEND, or followed by the epilogue of a modulated convolution: a thread makes ACROSS units
// across and goes down a strip of units, for VEC channels that travel as one word. Every row of inputs is read once,
// while the one before is computed with; outputs that still lack inputs stay in registers. Offsets within a sample are
// of 32 bits. Neighbouring threads have neighbouring channels (threadIdx.x), then neighbouring columns (threadIdx.y),
// whose common inputs they find in the cache. Further macros: upfirdn2d.cuh, epilogue.cuh.
// PRELUDE: the image that is filtered is act(x + b) within +-clamp.
// GRADIENT: the filtered image is a gradient, and goes on through an operation whose input is `beside`. Its parameter's
// gradient is summed up, over the pixels of a block. OF_ACTIVATION: act(beside + b) * gain, within +-clamp; OF_SCALING:
// beside * d.
#include "upfirdn2d.cuh"

#ifndef ACROSS
#define ACROSS 1
#endif
#ifndef PRELUDE
#define PRELUDE 0
#endif
#define OF_ACTIVATION 1
#define OF_SCALING 2
#ifndef GRADIENT
#define GRADIENT 0
#endif
#define THREADS 128

constexpr int wide = ACROSS * AxisX::unit, columns = AxisX::span(wide);  // outputs and inputs of a row
// Units down the strip that see a row, the oldest of which is complete after it.
constexpr int pending = (AxisY::span(AxisY::unit) + AxisY::step - 1) / AxisY::step;
typedef acc_t Line[wide][VEC];  // of outputs
// Before the sums are added to; the compiler for Blackwell has no registers left for that and would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool loads_early = false;
#else
constexpr bool loads_early = true;
#endif

struct Taps {  // of f as it is correlated; of an outer product, `rows` and `cols` with f[i][j] = rows[i] * cols[j]
    acc_t all[FH][FW], rows[FH], cols[FW];
    bool is_outer;

    // The middle tap, the largest of a low-pass filter, must account for all others without rounding, as with binomial
    // filters; any other filter is taken as it is.
    __device__ __forceinline__ Taps(const float* __restrict__ f, bool flip, float gain) {
        constexpr int r = FH / 2, c = FW / 2;
        load_filter(f, flip, 1.f, all);
        is_outer = all[r][c] != 0;
#pragma unroll
        for (int i = 0; i < FH; i++)
#pragma unroll
            for (int j = 0; j < FW; j++)
                if (i != r && j != c) is_outer &= all[i][j] * all[r][c] == all[i][c] * all[r][j];
        const acc_t factor = gain / all[r][c];
#pragma unroll
        for (int i = 0; i < FH; i++) rows[i] = all[i][c] * factor;
#pragma unroll
        for (int j = 0; j < FW; j++) cols[j] = all[r][j];
#pragma unroll
        for (int i = 0; i < FH; i++)
#pragma unroll
            for (int j = 0; j < FW; j++) all[i][j] *= gain;
    }
};

struct Window {  // the columns of inputs that a thread sees, in one row
    const scalar_t* at;  // the first of them; outside the image it is not read
    int row, left, in_h, in_w, channels;
    bool is_inside;  // all columns are
#if PRELUDE
    Raw<VEC> b;
    acc_t alpha, limit;

    // Outside the image, -b: the activation makes zero of it.
    __device__ __forceinline__ void clear(Raw<VEC>& value) const {
        value = b;
        value.negate();
    }

    __device__ __forceinline__ void activate_all(acc_t (&v)[VEC]) const {
        acc_t bias[VEC];
        b.unpack(bias);
#pragma unroll
        for (int k = 0; k < VEC; k++) v[k] = limited(activate_flat(v[k] + bias[k], alpha), limit);
    }
#else
    static __device__ __forceinline__ void clear(Raw<VEC>& value) { value.clear(); }
    static __device__ __forceinline__ void activate_all(acc_t (&)[VEC]) {}
#endif

    __device__ __forceinline__ void load(Raw<VEC> (&values)[columns]) const {
        const bool has_row = unsigned(row) < unsigned(in_h);
        if (has_row && is_inside) {
#pragma unroll
            for (int p = 0; p < columns; p++) values[p].load(at + p * channels);
        } else {
#pragma unroll
            for (int p = 0; p < columns; p++) {
                clear(values[p]);
                if (has_row && unsigned(left + p) < unsigned(in_w)) values[p].load(at + p * channels);
            }
        }
    }

    __device__ __forceinline__ void go_down() {
        row++;
        at += in_w * channels;
    }
};

typedef Raw<VEC> Besides[AxisY::unit][wide];  // what the outputs of a unit of rows are combined with

struct Target {  // where the outputs of one row go, and what becomes of them on the way
    scalar_t* at;  // the first of them
    const scalar_t* noise;
    int columns, pitch, channels;  // columns up to the edge of the image, and from row to row
    Raw<VEC> d, b;
    Shape shape;
#if NEXT
    Raw<VEC> next;
    i64 to_unscaled;  // elements from y to where the unscaled result goes; 0 if nobody asks for that
#endif
#if ADDEND || GRADIENT
    i64 to_beside;  // elements from y to it

    __device__ __forceinline__ void load(Besides& besides, int rows) const {
#pragma unroll
        for (int o = 0; o < AxisY::unit; o++)
#pragma unroll
            for (int u = 0; u < wide; u++)
                if (o < rows && u < columns) besides[o][u].load(at + (o * pitch + u) * channels + to_beside);
    }
#endif
#if GRADIENT
    acc_t sums[VEC];

    __device__ __forceinline__ void differentiate(Line& line, const Raw<VEC> (&besides)[wide]) {
#pragma unroll
        for (int u = 0; u < wide; u++) {
            if (u >= columns) return;
            acc_t v[VEC], factor[VEC];
            besides[u].unpack(v);
            (GRADIENT == OF_SCALING ? d : b).unpack(factor);
#pragma unroll
            for (int k = 0; k < VEC; k++) {
                acc_t& g = line[u][k];
                if constexpr (GRADIENT == OF_SCALING) {
                    sums[k] += g * v[k];
                    g *= factor[k];
                } else {
                    g = shape.gradient(g, v[k] + factor[k], false);
                    sums[k] += g;
                }
            }
        }
    }
#endif
#if ADDEND
    static __device__ __forceinline__ void add(Line& line, const Raw<VEC> (&besides)[wide]) {
#pragma unroll
        for (int u = 0; u < wide; u++) {
            acc_t more[VEC];
            besides[u].unpack(more);
#pragma unroll
            for (int k = 0; k < VEC; k++) line[u][k] += more[k];
        }
    }
#endif

    __device__ __forceinline__ void put(Line& line) const {
        acc_t scale[VEC], bias[VEC];
        if constexpr (EPILOGUE) d.unpack(scale);
        if constexpr (BIAS) b.unpack(bias);
        else fill(bias, 0);
#pragma unroll
        for (int u = 0; u < wide; u++) {
            if (u >= columns) return;
            if constexpr (EPILOGUE) {
                const acc_t extra = NOISE ? widen(noise[u]) : acc_t(0);
#pragma unroll
                for (int k = 0; k < VEC; k++) line[u][k] = shape.value(line[u][k] * scale[k] + (bias[k] + extra));
            }
#if NEXT
            if (to_unscaled) store(at + u * channels + to_unscaled, line[u]);
            acc_t factor[VEC];
            next.unpack(factor);
#pragma unroll
            for (int k = 0; k < VEC; k++) line[u][k] *= factor[k];
#endif
            store(at + u * channels, line[u]);
        }
    }

    __device__ __forceinline__ void go_down() {
        at += pitch * channels;
        if constexpr (NOISE) noise += pitch;
    }
};

__device__ __forceinline__ void clear(Line& line) {
#pragma unroll
    for (int u = 0; u < wide; u++) fill(line[u], 0);
}

// Add one vector of a line of inputs, or a filtered line, times a tap.
__device__ __forceinline__ void add(acc_t (&sums)[VEC], const acc_t (&v)[VEC], acc_t tap) {
#pragma unroll
    for (int k = 0; k < VEC; k++) sums[k] += v[k] * tap;
}

#define FOR_OUTPUTS(s) \
    _Pragma("unroll") for (int k = 0; k < pending; k++) \
    _Pragma("unroll") for (int o = 0; o < AxisY::unit; o++) { \
        const int q = (pending - 1 - k) * AxisY::step + s; \
        if (!AxisY::has(q, o)) continue;
template <bool IS_OUTER>
__device__ __forceinline__ void filter_strip(Window window, const Taps& taps, Target& target, int rows) {
    Line sums[pending][AxisY::unit];
#pragma unroll
    for (int k = 0; k < pending; k++)
#pragma unroll
        for (int o = 0; o < AxisY::unit; o++) clear(sums[k][o]);
    Raw<VEC> raw[columns];
    window.load(raw);
    // A round completes the outputs from `row` on; those above the strip are not stored.
#pragma unroll 1
    for (int row = (1 - pending) * AxisY::unit; row < rows; row += AxisY::unit) {
#if ADDEND || GRADIENT
        Besides besides;  // read while the outputs are computed
        if (row >= 0) target.load(besides, rows - row);
#endif
#pragma unroll
        for (int s = 0; s < AxisY::step; s++) {
            if constexpr (IS_OUTER) {
                Line line;
                clear(line);
#pragma unroll
                for (int p = 0; p < columns; p++) {
                    acc_t v[VEC];
                    raw[p].unpack(v);
                    window.activate_all(v);
#pragma unroll
                    for (int u = 0; u < wide; u++)
                        if (AxisX::has(p, u)) add(line[u], v, taps.cols[AxisX::tap(p, u)]);
                }
                window.go_down();
                if (loads_early) window.load(raw);
                FOR_OUTPUTS(s)
#pragma unroll
                    for (int u = 0; u < wide; u++) add(sums[k][o][u], line[u], taps.rows[AxisY::tap(q, o)]);
                }
                if (!loads_early) window.load(raw);
            } else {
#pragma unroll
                for (int p = 0; p < columns; p++) {
                    acc_t v[VEC];
                    raw[p].unpack(v);
                    window.activate_all(v);
                    FOR_OUTPUTS(s)
#pragma unroll
                        for (int u = 0; u < wide; u++)
                            if (AxisX::has(p, u))
                                add(sums[k][o][u], v, taps.all[AxisY::tap(q, o)][AxisX::tap(p, u)]);
                    }
                }
                window.go_down();
                window.load(raw);
            }
        }
        if (row >= 0) {
#pragma unroll
            for (int o = 0; o < AxisY::unit; o++) {
#if ADDEND
                target.add(sums[0][o], besides[o]);
#endif
                if (o == 0 || row + o < rows) {
#if GRADIENT
                    target.differentiate(sums[0][o], besides[o]);
#endif
                    target.put(sums[0][o]);
                }
                target.go_down();
            }
        }
#pragma unroll
        for (int o = 0; o < AxisY::unit; o++) {
#pragma unroll
            for (int k = 1; k < pending; k++)
#pragma unroll
                for (int u = 0; u < wide; u++)
#pragma unroll
                    for (int c = 0; c < VEC; c++) sums[k - 1][o][u][c] = sums[k][o][u][c];
            clear(sums[pending - 1][o]);
        }
    }
}

#if GRADIENT
// Sum over the columns of the block for each of its channels, in a fixed order. blockDim.y is a power of two.
__device__ __forceinline__ void add_up_columns(acc_t (&sums)[VEC]) {
    __shared__ acc_t shared[THREADS][VEC];
    const int own = threadIdx.y * blockDim.x + threadIdx.x;
    for (int half = blockDim.y / 2; half > 0; half /= 2) {
#pragma unroll
        for (int k = 0; k < VEC; k++) shared[own][k] = sums[k];
        __syncthreads();
        if (threadIdx.y < half)
#pragma unroll
            for (int k = 0; k < VEC; k++) sums[k] += shared[own + half * blockDim.x][k];
        __syncthreads();
    }
}
#endif

// With a second image to read, three blocks have as much memory on its way as four without, and need not spill.
extern "C" __global__ void __launch_bounds__(THREADS, ADDEND || GRADIENT ? 3 : 4) upfirdn2d_pixel(
    const scalar_t* __restrict__ x, const float* __restrict__ f, scalar_t* __restrict__ y,
    const scalar_t* __restrict__ d, const scalar_t* __restrict__ noise, const scalar_t* __restrict__ b,
    i64 channels, i64 in_h, i64 in_w, i64 out_h, i64 out_w, i64 pad_x, i64 pad_y, i64 flip, i64 noise_step,
    i64 chunks, i64 blocks_across, i64 strips, i64 strip_units, double filter_gain, double alpha, double gain,
    double clamp
#if NEXT
    , const scalar_t* __restrict__ next_scale, scalar_t* __restrict__ unscaled
#endif
#if ADDEND || GRADIENT
    , const scalar_t* __restrict__ beside
#endif
#if GRADIENT
    , acc_t* __restrict__ partial_sums  // [N, strips * blocks_across, C], or null
#endif
) {
    unsigned rest = blockIdx.x;
    const int c = (rest % unsigned(chunks) * blockDim.x + threadIdx.x) * VEC;
    rest /= unsigned(chunks);
    const int part = rest % unsigned(blocks_across), left = (part * blockDim.y + threadIdx.y) * wide;
    rest /= unsigned(blocks_across);
    const int strip_index = rest % unsigned(strips), top = strip_index * int(strip_units) * AxisY::unit;
    const i64 n = rest / unsigned(strips);
    const bool is_idle = c >= channels || left >= out_w;
#if GRADIENT
    acc_t sums[VEC];
    fill(sums, 0);
#else
    if (is_idle) return;
#endif
    if (!is_idle) {
        const int in_top = AxisY::first_input(top, pad_y), in_left = AxisX::first_input(left, pad_x);
        Window window = {
            x + n * in_h * in_w * channels + c + (i64(in_top) * in_w + in_left) * channels, in_top, in_left, int(in_h),
            int(in_w), int(channels), in_left >= 0 && in_left + columns <= in_w};
#if PRELUDE
        window.b.load(b + c);
        window.alpha = alpha, window.limit = Shape(alpha, gain, clamp).limit;
#endif
        const i64 pixel = i64(top) * out_w + left;
        Target target = {
            y + (n * out_h * out_w + pixel) * channels + c, NOISE ? noise + n * noise_step + pixel : nullptr,
            int(out_w) - left, int(out_w), int(channels), {}, {}, Shape(alpha, gain, clamp)};
        if constexpr (EPILOGUE || GRADIENT == OF_SCALING) target.d.load(d + n * channels + c);
        if constexpr (BIAS) target.b.load(b + c);
#if NEXT
        target.next.load(next_scale + n * channels + c);
        target.to_unscaled = unscaled ? unscaled - y : 0;
#endif
#if ADDEND || GRADIENT
        target.to_beside = beside - y;
#endif
#if GRADIENT
        fill(target.sums, 0);
#endif
        const int rows_left = int(out_h) - top, strip = int(strip_units) * AxisY::unit;
        const int rows = rows_left < strip ? rows_left : strip;
        const Taps taps(f, flip, float(filter_gain));
        if (taps.is_outer) filter_strip<true>(window, taps, target, rows);
        else filter_strip<false>(window, taps, target, rows);
#if GRADIENT
#pragma unroll
        for (int k = 0; k < VEC; k++) sums[k] = target.sums[k];
#endif
    }
#if GRADIENT
    if (!partial_sums) return;
    add_up_columns(sums);
    if (threadIdx.y > 0 || c >= channels) return;
    acc_t* const own = partial_sums + ((n * strips + strip_index) * blocks_across + part) * channels + c;
#pragma unroll
    for (int k = 0; k < VEC; k++) own[k] = sums[k];
#endif
}
