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

// Whether a number is above or below 0, which NaN is not. Of bf16 by its bits: comparing in lanes of 16 bits is what
// makes vector loops of it.
HPCTRAIN_ALWAYS_INLINE bool above_zero(float value) { return value > 0; }
HPCTRAIN_ALWAYS_INLINE bool above_zero(double value) { return value > 0; }
HPCTRAIN_ALWAYS_INLINE bool above_zero(bf16 value) { return std::uint16_t(value.bits - 1) < 0x7f80; }
HPCTRAIN_ALWAYS_INLINE bool below_zero(float value) { return value < 0; }
HPCTRAIN_ALWAYS_INLINE bool below_zero(double value) { return value < 0; }
HPCTRAIN_ALWAYS_INLINE bool below_zero(bf16 value) { return std::uint16_t(value.bits - 0x8001) < 0x7f80; }

// value, or 0
HPCTRAIN_ALWAYS_INLINE float keep(bool kept, float value) { return kept ? value : 0; }
HPCTRAIN_ALWAYS_INLINE double keep(bool kept, double value) { return kept ? value : 0; }
HPCTRAIN_ALWAYS_INLINE bf16 keep(bool kept, bf16 value) { return {std::uint16_t(kept ? value.bits : 0)}; }

// Rounded to T, to even where halfway; NaN stays NaN.
template <class T>
HPCTRAIN_ALWAYS_INLINE T store(Real<T> value) {
    if constexpr (std::is_same_v<T, bf16>) {
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        const std::uint32_t nan = value != value ? 0x7fc00000 : 0;
        return {std::uint16_t(((bits + 0x7fff + (bits >> 16 & 1)) | nan) >> 16)};
    } else {
        return value;
    }
}

}  // namespace hpctrain
