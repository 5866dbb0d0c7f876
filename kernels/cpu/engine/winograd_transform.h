// The transforms of F(4, 3) for one dim, and their application to both dims of a tile.
//
// Four outputs y of a kernel g over six inputs d are y = A^T [(G g) * (B^T d)] (Lavin & Gray 2016), with matrices that
// follow from the points 0, +-P, +-Q and infinity (Toom-Cook). Gradients are the adjoints: dd = B [(G g) * (A dy)] and
// dg = G^T [(B^T d) * (A dy)].
//
// Accuracy. The usual points 0, +-1, +-2 lose accuracy: with random d and g the squares of the terms of y sum up to 31^2
// times those of a direct convolution in a tile. P = 11/16 and Q = 23/16 lose least of all sixteenths (7^2; the gradients
// by d and g: 6.5^2 and 6^2), cost as many operations, and all their powers that are needed are exact in float. So if a
// direct convolution has an error of about e, this has one of AMPLIFICATION * e, e being eps times the root of the
// longest run of sums, plus the few roundings of the transforms: max|error| / max|y| stays below
// AMPLIFICATION * eps * (8 + sqrt(terms per sum)), where a sum has at most the terms of one block of the contraction
// (winograd_product.h), to which the number of blocks is added.
#pragma once

#include "simd.h"

namespace hpctrain::HPCTRAIN_ISA::winograd {

constexpr int OUTPUTS = 4, INPUTS = 6, TAPS = 3, POINTS = INPUTS * INPUTS;

constexpr float P = 11.0f / 16, Q = 23.0f / 16;
constexpr float P2 = P * P, P3 = P2 * P, Q2 = Q * Q, Q3 = Q2 * Q;
// Denominators of G: products of the differences of a point from all others.
constexpr float AT_0 = 1 / (P2 * Q2), AT_P = 1 / (2 * P2 * (P2 - Q2)), AT_Q = 1 / (2 * Q2 * (Q2 - P2));

// B^T d: a tile of inputs.
struct Input {
    static constexpr int FROM = INPUTS, TO = INPUTS;
    static inline void apply(const V (&d)[FROM], V (&to)[TO]) {
        const V even_p = d[4] - Q2 * d[2], odd_p = d[3] - Q2 * d[1];
        const V even_q = d[4] - P2 * d[2], odd_q = d[3] - P2 * d[1];
        to[0] = P2 * Q2 * d[0] + (d[4] - (P2 + Q2) * d[2]);
        to[1] = even_p + P * odd_p;
        to[2] = even_p - P * odd_p;
        to[3] = even_q + Q * odd_q;
        to[4] = even_q - Q * odd_q;
        to[5] = P2 * Q2 * d[1] + (d[5] - (P2 + Q2) * d[3]);
    }
};

// B m, its adjoint: what a tile adds to the gradient by its inputs.
struct InputAdjoint {
    static constexpr int FROM = INPUTS, TO = INPUTS;
    static inline void apply(const V (&m)[FROM], V (&to)[TO]) {
        const V even_p = m[1] + m[2], odd_p = P * (m[1] - m[2]);
        const V even_q = m[3] + m[4], odd_q = Q * (m[3] - m[4]);
        to[0] = P2 * Q2 * m[0];
        to[1] = P2 * Q2 * m[5] - Q2 * odd_p - P2 * odd_q;
        to[2] = -(P2 + Q2) * m[0] - Q2 * even_p - P2 * even_q;
        to[3] = (odd_p + odd_q) - (P2 + Q2) * m[5];
        to[4] = (even_p + even_q) + m[0];
        to[5] = m[5];
    }
};

// A^T m: a tile of outputs.
struct Output {
    static constexpr int FROM = INPUTS, TO = OUTPUTS;
    static inline void apply(const V (&m)[FROM], V (&to)[TO]) {
        const V even_p = m[1] + m[2], odd_p = m[1] - m[2];
        const V even_q = m[3] + m[4], odd_q = m[3] - m[4];
        to[0] = (even_p + even_q) + m[0];
        to[1] = P * odd_p + Q * odd_q;
        to[2] = P2 * even_p + Q2 * even_q;
        to[3] = P3 * odd_p + (Q3 * odd_q + m[5]);
    }
};

// A dy, its adjoint: a tile of gradients by the outputs.
struct OutputAdjoint {
    static constexpr int FROM = OUTPUTS, TO = INPUTS;
    static inline void apply(const V (&dy)[FROM], V (&to)[TO]) {
        const V even_p = dy[0] + P2 * dy[2], odd_p = P * dy[1] + P3 * dy[3];
        const V even_q = dy[0] + Q2 * dy[2], odd_q = Q * dy[1] + Q3 * dy[3];
        to[0] = dy[0];
        to[1] = even_p + odd_p;
        to[2] = even_p - odd_p;
        to[3] = even_q + odd_q;
        to[4] = even_q - odd_q;
        to[5] = dy[3];
    }
};

// G g: the weights.
struct Weights {
    static constexpr int FROM = TAPS, TO = INPUTS;
    static inline void apply(const V (&g)[FROM], V (&to)[TO]) {
        const V even_p = AT_P * g[0] + (AT_P * P2) * g[2], odd_p = (AT_P * P) * g[1];
        const V even_q = AT_Q * g[0] + (AT_Q * Q2) * g[2], odd_q = (AT_Q * Q) * g[1];
        to[0] = AT_0 * g[0];
        to[1] = even_p + odd_p;
        to[2] = even_p - odd_p;
        to[3] = even_q + odd_q;
        to[4] = even_q - odd_q;
        to[5] = g[2];
    }
};

// G^T u, its adjoint: the gradient by the weights.
struct WeightsAdjoint {
    static constexpr int FROM = INPUTS, TO = TAPS;
    static inline void apply(const V (&u)[FROM], V (&to)[TO]) {
        const V even_p = u[1] + u[2], odd_p = u[1] - u[2];
        const V even_q = u[3] + u[4], odd_q = u[3] - u[4];
        to[0] = AT_0 * u[0] + AT_P * even_p + AT_Q * even_q;
        to[1] = (AT_P * P) * odd_p + (AT_Q * Q) * odd_q;
        to[2] = (AT_P * P2) * even_p + (AT_Q * Q2) * even_q + u[5];
    }
};

// The transform of both dims: write(i, j, value) of what read(i, j) gives.
template <class Transform, class Read, class Write>
inline void both_dims(Read read, Write write) {
    constexpr int FROM = Transform::FROM, TO = Transform::TO;
    V half[TO][FROM];
#pragma GCC unroll 6
    for (int j = 0; j < FROM; ++j) {
        V column[FROM], turned[TO];
#pragma GCC unroll 6
        for (int i = 0; i < FROM; ++i) column[i] = read(i, j);
        Transform::apply(column, turned);
#pragma GCC unroll 6
        for (int i = 0; i < TO; ++i) half[i][j] = turned[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < TO; ++i) {
        V turned[TO];
        Transform::apply(half[i], turned);
#pragma GCC unroll 6
        for (int j = 0; j < TO; ++j) write(i, j, turned[j]);
    }
}

}  // namespace hpctrain::HPCTRAIN_ISA::winograd
