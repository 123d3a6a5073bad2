// SPDX-License-Identifier: Apache-2.0
// upfirdn2d for any filter, factors and padding: one output a thread, taps on inserted zeros skipped.
// Macros: SCALAR_T, CHANNELS_LAST.
#include "common.cuh"

#ifndef CHANNELS_LAST
#define CHANNELS_LAST 0
#endif

struct Taps {  // along one axis: the taps first, first + up, ... below `size` meet the inputs `in`, in + 1, ...
    i64 first, in;

    __device__ __forceinline__ Taps(i64 out, i64 up, i64 down, i64 pad, i64 size, i64 in_size) {
        const i64 start = out * down - pad;  // may be negative
        first = start > 0 ? (up - start % up) % up : -start % up;
        in = (start + first) / up;
        if (in < 0) {
            first -= in * up;
            in = 0;
        }
    }
};

extern "C" __global__ void __launch_bounds__(256) upfirdn2d(
    const scalar_t* __restrict__ x, const float* __restrict__ f, scalar_t* __restrict__ y, i64 size,
    i64 channels, i64 in_h, i64 in_w, i64 out_h, i64 out_w, i64 up_x, i64 up_y, i64 down_x, i64 down_y,
    i64 pad_x, i64 pad_y, i64 fw, i64 fh, i64 flip, double gain
) {
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= size) return;
    i64 rest = index, c = 0;
    if (CHANNELS_LAST) { c = rest % channels; rest /= channels; }
    const i64 out_x = rest % out_w;
    rest /= out_w;
    const i64 out_y = rest % out_h, plane = rest / out_h;  // NCHW: of sample and channel; NHWC: of the sample
    const i64 pixel_step = CHANNELS_LAST ? channels : 1;
    const scalar_t* const source = x + plane * in_h * in_w * pixel_step + c;
    const Taps down_rows(out_y, up_y, down_y, pad_y, fh, in_h), along(out_x, up_x, down_x, pad_x, fw, in_w);
    acc_t sum = 0;
    for (i64 ty = down_rows.first, iy = down_rows.in; ty < fh && iy < in_h; ty += up_y, iy++)
        for (i64 tx = along.first, ix = along.in; tx < fw && ix < in_w; tx += up_x, ix++) {
            const float tap = f[(flip ? ty : fh - 1 - ty) * fw + (flip ? tx : fw - 1 - tx)] * float(gain);
            sum += widen(source[(iy * in_w + ix) * pixel_step]) * acc_t(tap);
        }
    y[index] = Narrow<scalar_t>::from(sum);
}
