// Winograd's transforms for one dim, and their application to both dims of a tile.
//
// M outputs y of a kernel g of K taps over six inputs d, M + K = 7, are y = A^T [(G g) * (B^T d)] (Lavin & Gray 2016),
// with matrices that follow from the points 0, +-P, +-Q and infinity (Toom-Cook): F(4, 3) for K = 3, F(2, 5) for K = 5.
// Gradients are the adjoints: dd = B [(G g) * (A dy)] and dg = G^T [(B^T d) * (A dy)].
//
// Accuracy. What is summed up in a tile is larger than in a direct convolution, and cancels. With random d and g the
// squares of its terms sum up to A times those of a direct one, per dim. With the usual points 0, +-1, +-2, K = 3 has
// A = 31 for y, 17 and 24 for the gradients by d and g. P = 11/16 and Q = 23/16 have the least of all sixteenths: 7.2,
// 6.5 and 6.0, and 5.5, 9.1 and 9.7 for K = 5. They take as many operations, and their powers in A and B are exact.
// Each operation rounds by at most eps / 2, and by chance in either direction, so that of n operations in sequence
// remains eps / 2 sqrt(n) of the largest intermediate. In two dims the root of A counts twice: max|error| / max|y|
// should stay below A eps / 2 sqrt(32 + n + m) for m runs of n terms, summed up run by run (n: RUN terms, or the tiles
// of a block for dw); 32 is for the transforms. The tests hold that; with many channels it is 4e-6, and 1e-6 to 2e-6
// are measured.
#pragma once

#include "simd.h"

namespace hpctrain::HPCTRAIN_ISA::winograd {

constexpr int INPUTS = 6, POINTS = INPUTS * INPUTS;
constexpr int outputs_of(int kernel) { return INPUTS - kernel + 1; }

constexpr float P = 11.0f / 16, Q = 23.0f / 16, P2 = P * P, Q2 = Q * Q;
constexpr float POWERS_P[] = {1, P, P2, P2 * P, P2 * P2}, POWERS_Q[] = {1, Q, Q2, Q2 * Q, Q2 * Q2};
// Denominators of G: products of the differences of a point from all others.
constexpr float AT_0 = 1 / (P2 * Q2), AT_P = 1 / (2 * P2 * (P2 - Q2)), AT_Q = 1 / (2 * Q2 * (Q2 - P2));

// The sums of what belongs to +p and -p, by the parity of the power of p that they are multiplied with.
struct Parities {
    V p[2], q[2];
    explicit Parities(const V (&m)[INPUTS]) : p{m[1] + m[2], m[1] - m[2]}, q{m[3] + m[4], m[3] - m[4]} {}
    V power(int n) const { return POWERS_P[n] * p[n % 2] + POWERS_Q[n] * q[n % 2]; }
};

// The values of the polynomial with these coefficients at the points, times `at` for each pair of points.
template <int N>
inline void evaluate(const V (&c)[N], float at_0, float at_p, float at_q, V (&to)[INPUTS]) {
    V p[2] = {at_p * c[0], (at_p * P) * c[1]}, q[2] = {at_q * c[0], (at_q * Q) * c[1]};
#pragma GCC unroll 4
    for (int n = 2; n < N; ++n) {
        p[n % 2] += (at_p * POWERS_P[n]) * c[n];
        q[n % 2] += (at_q * POWERS_Q[n]) * c[n];
    }
    to[0] = at_0 * c[0];
    to[1] = p[0] + p[1];
    to[2] = p[0] - p[1];
    to[3] = q[0] + q[1];
    to[4] = q[0] - q[1];
    to[5] = c[N - 1];
}

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
template <int KERNEL>
struct Output {
    static constexpr int FROM = INPUTS, TO = outputs_of(KERNEL);
    static inline void apply(const V (&m)[FROM], V (&to)[TO]) {
        const Parities pairs(m);
        to[0] = (pairs.p[0] + pairs.q[0]) + m[0];
#pragma GCC unroll 4
        for (int n = 1; n < TO; ++n) to[n] = pairs.power(n);
        to[TO - 1] += m[5];
    }
};

// A dy, its adjoint: a tile of gradients by the outputs.
template <int KERNEL>
struct OutputAdjoint {
    static constexpr int FROM = outputs_of(KERNEL), TO = INPUTS;
    static inline void apply(const V (&dy)[FROM], V (&to)[TO]) { evaluate<FROM>(dy, 1, 1, 1, to); }
};

// G g: the weights.
template <int KERNEL>
struct Weights {
    static constexpr int FROM = KERNEL, TO = INPUTS;
    static inline void apply(const V (&g)[FROM], V (&to)[TO]) { evaluate<FROM>(g, AT_0, AT_P, AT_Q, to); }
};

// G^T u, its adjoint: the gradient by the weights.
template <int KERNEL>
struct WeightsAdjoint {
    static constexpr int FROM = INPUTS, TO = KERNEL;
    static inline void apply(const V (&u)[FROM], V (&to)[TO]) {
        Parities pairs(u);
        for (V& v : pairs.p) v *= AT_P;
        for (V& v : pairs.q) v *= AT_Q;
        to[0] = AT_0 * u[0] + (pairs.p[0] + pairs.q[0]);
#pragma GCC unroll 4
        for (int n = 1; n < TO; ++n) to[n] = pairs.power(n);
        to[TO - 1] += u[5];
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
