// Vectors of floats of the instruction set that a file is compiled for: the compilers' vector types, which also know
// Arm and others, and intrinsics only where these cannot say it.
//
// The files of the engine that include this are compiled once per instruction set, as namespace hpctrain::HPCTRAIN_ISA.
// They must not instantiate templates of the standard library that the compiler may leave out of line: the linker keeps
// one copy of such a function for all files, and that may be the one with instructions that the machine lacks.
#pragma once

#include "../layout.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef HPCTRAIN_ISA
#error "compiled without -DHPCTRAIN_ISA=<namespace>"
#endif

namespace hpctrain::HPCTRAIN_ISA {

// W: floats per vector. A register tile of the matrix kernel is tile_rows(n) rows of n <= TILE_VECTORS vectors: its
// sums fill most registers, and leave some for what is multiplied.
#if defined(__AVX512F__)
constexpr int W = 16, TILE_VECTORS = 4;
constexpr int tile_rows(int vectors) { return vectors == 4 ? 6 : 8; }
#elif defined(__AVX2__)
constexpr int W = 8, TILE_VECTORS = 2;
constexpr int tile_rows(int vectors) { return vectors == 2 ? 6 : 8; }
#else
constexpr int W = 4, TILE_VECTORS = 2;
constexpr int tile_rows(int vectors) { return vectors == 2 ? 4 : 8; }
#endif
constexpr int MAX_TILE_ROWS = 8;

typedef float V __attribute__((vector_size(4 * W)));

#ifdef HPCTRAIN_PAIRS
// Here what stands for a float in either factor is a pair of bfloat16, and products are those of pairs, summed.
inline V set(float value) { return _mm512_set1_ps(value); }
#else
inline V set(float value) { return value - V{}; }
#endif

inline V load(const float* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }

// The number at p, in all places. Pairs lie at any even address.
inline V broadcast(const float* p) {
    float value;
    __builtin_memcpy(&value, p, sizeof value);
    return set(value);
}

#ifdef HPCTRAIN_PAIRS
inline V fma(V a, V b, V c) { return _mm512_dpbf16_ps(c, __m512bh(a), __m512bh(b)); }
#else
// Contracted to one instruction where there is one (-ffp-contract=fast).
inline V fma(V a, V b, V c) { return a * b + c; }
#endif

// slope * v where v <= 0, NaN staying; of slope 0 there comes 0 even from -infinity.
inline V rectified(V v, float slope) {
    if (slope == 1) return v;
    const V below = slope == 0 ? V{} : slope * v;
    return v <= 0 ? below : v;
}

// The first n <= W floats, zeros beyond. Touches no other memory.
inline V load(const float* p, int n) {
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#else
    V v{};
    for (int i = 0; i < W; ++i) {
        if (i < n) v[i] = p[i];
    }
    return v;
#endif
}

// Stores the first n <= W floats. Touches no other memory.
inline void store(float* p, V v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
#else
    for (int i = 0; i < W; ++i) {
        if (i < n) p[i] = v[i];
    }
#endif
}

#if defined(__clang__) || __GNUC__ >= 12
#define HPCTRAIN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int Places __attribute__((vector_size(4 * W)));
#define HPCTRAIN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

// a0 b0 a1 b1 ..., of the first and of the second half of a and b.
#if defined(__AVX512F__)
inline V interleave_low(V a, V b) {
    return HPCTRAIN_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline V interleave_high(V a, V b) {
    return HPCTRAIN_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
inline V interleave_low(V a, V b) { return HPCTRAIN_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline V interleave_high(V a, V b) { return HPCTRAIN_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
inline V interleave_low(V a, V b) { return HPCTRAIN_SHUFFLE(a, b, 0, 4, 1, 5); }
inline V interleave_high(V a, V b) { return HPCTRAIN_SHUFFLE(a, b, 2, 6, 3, 7); }
#endif

// The rows of a W x W block become its columns: each round turns the bits of (row, column) by one place.
inline void transpose(V (&rows)[W]) {
    for (int round = 1; round < W; round *= 2) {
        V turned[W];
        for (int i = 0; i < W / 2; ++i) {
            turned[2 * i] = interleave_low(rows[i], rows[i + W / 2]);
            turned[2 * i + 1] = interleave_high(rows[i], rows[i + W / 2]);
        }
        for (int i = 0; i < W; ++i) rows[i] = turned[i];
    }
}

}  // namespace hpctrain::HPCTRAIN_ISA
