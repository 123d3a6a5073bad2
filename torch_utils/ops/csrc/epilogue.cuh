// SPDX-License-Identifier: Apache-2.0
// What follows a modulated convolution: act(x * d[n, c] + noise[n, pixel] + b[c]) * gain within +-clamp.
// NOISE and BIAS (0 or 1) say which of the summands there are. NEXT (0 or 1): the result, times a number for each
// channel, is what the next layer convolves.
#pragma once
#include "activation.cuh"

#ifndef NOISE
#define NOISE 0
#endif
#ifndef BIAS
#define BIAS 0
#endif
#ifndef NEXT
#define NEXT 0
#endif
