// The types that arrays hold, and those that kernels compute with: bf16 arrays are computed with in float.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__GNUC__)
#define HPCTRAIN_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define HPCTRAIN_ALWAYS_INLINE inline
#endif

namespace hpctrain {

// The upper half of a float.
struct bf16 {
    std::uint16_t bits;
};

// What a kernel for arrays of T computes with, and what vectors beside them hold (gamma, beta, bias).
template <class T>
using Real = std::conditional_t<std::is_same_v<T, bf16>, float, T>;

HPCTRAIN_ALWAYS_INLINE float load(float value) { return value; }
HPCTRAIN_ALWAYS_INLINE double load(double value) { return value; }
HPCTRAIN_ALWAYS_INLINE float load(bf16 value) {
    const std::uint32_t bits = std::uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// Rounded to T, to even where halfway; NaN stays NaN.
template <class T>
HPCTRAIN_ALWAYS_INLINE T store(Real<T> value) {
    if constexpr (std::is_same_v<T, bf16>) {
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        const std::uint32_t even = bits + 0x7fff + (bits >> 16 & 1), quiet = bits | 0x400000;
        return {std::uint16_t((value != value ? quiet : even) >> 16)};
    } else {
        return value;
    }
}

}  // namespace hpctrain
