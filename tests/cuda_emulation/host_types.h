// SPDX-License-Identifier: Apache-2.0
// What common.cuh takes from the instruction set of a GPU.
#pragma once
#include <string.h>

template <class To, class From> To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "both of one size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}
static inline float widen(half_t v) { return same_bits<_Float16>(v.bits); }
static inline half_t to_half(float v) { return {same_bits<unsigned short>(static_cast<_Float16>(v))}; }
static inline unsigned int bits_of(float v) { return same_bits<unsigned int>(v); }
static inline float float_of(unsigned int bits) { return same_bits<float>(bits); }
