// Vectors of bfloat16 as vectors of floats.
#pragma once

#include "engine.h"
#include "simd.h"

namespace hpctrain::HPCTRAIN_ISA {

typedef std::uint32_t Bits __attribute__((vector_size(4 * W)));
typedef std::uint16_t HalfBits __attribute__((vector_size(2 * W)));

inline V load(const Bf16* p) {
    HalfBits half;
    __builtin_memcpy(&half, p, sizeof half);
    return V(__builtin_convertvector(half, Bits) << 16);
}

inline V load(const Bf16* p, int n) {
    HalfBits half{};
    __builtin_memcpy(&half, p, size_t(n) * sizeof(Bf16));
    return V(__builtin_convertvector(half, Bits) << 16);
}

// Half a unit of what remains is added, less one bit where the remaining last bit is even: ties go to even, and what
// carries over makes the next power of two, or infinity. A NaN would become another number: its quiet bit is set.
inline HalfBits rounded(V v) {
    const Bits bits = Bits(v), up = bits + 0x7fff + (bits >> 16 & 1);
    return __builtin_convertvector((v == v ? up : bits | 0x400000) >> 16, HalfBits);
}

inline void store(Bf16* p, V v) {
    const HalfBits half = rounded(v);
    __builtin_memcpy(p, &half, sizeof half);
}

inline void store(Bf16* p, V v, int n) {
    const HalfBits half = rounded(v);
    __builtin_memcpy(p, &half, size_t(n) * sizeof(Bf16));
}

// The first n <= W pairs of what stands at `low` and at `high`, zeros beyond; `high` may be null, which is zeros.
inline V paired(const Bf16* low, const Bf16* high, int n) {
    const auto bits = [n](const Bf16* p) { return n == W ? load(p) : load(p, n); };
    return V((Bits(bits(low)) >> 16) | (high ? Bits(bits(high)) : Bits{}));
}

}  // namespace hpctrain::HPCTRAIN_ISA
