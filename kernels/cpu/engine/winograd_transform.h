// Winograd's transforms for one dim, and their application to both dims of a tile.
//
// M outputs y of a kernel g of K taps over EDGE = M + K - 1 inputs d are y = A^T [(G g) * (B^T d)] (Lavin & Gray 2016),
// with matrices that follow from EDGE points: 0, pairs +-p and infinity (Toom-Cook). F(M, K) are F(4, 3) and F(2, 5)
// with 6 points, F(4, 5) with 8, and F(2, 3) with 4 for small images. Gradients are the adjoints:
// dd = B [(G g) * (A dy)] and dg = G^T [(B^T d) * (A dy)].
//
// Accuracy. What is summed up in a tile is larger than in a direct convolution, and cancels. With random d and g the
// squares of its terms sum up to A times those of a direct one, per dim. With the usual points 0, +-1, +-2, F(4, 3) has
// A = 31 for y, 17 and 24 for the gradients by d and g. 11/16 and 23/16 have the least of all sixteenths: 7.2, 6.5 and
// 6.0, and 5.5, 9.1 and 9.7 for F(2, 5). They take as many operations, and their powers in A and B are exact. F(2, 3)
// has 1.7, 1.3 and 2.0 with +-1; F(4, 5) has 30, 24 and 36 with +-1/2, +-1, +-2, and no sixteenths have less.
// Each operation rounds by at most eps / 2, and by chance in either direction, so that of n operations in sequence
// remains eps / 2 sqrt(n) of the largest intermediate. In two dims the root of A counts twice: max|error| / max|y|
// should stay below A eps / 2 sqrt(32 + n + m) for m runs of n terms, summed up run by run (n: RUN terms, or the tiles
// of a block for dw); 32 is for the transforms. The tests hold that; with many channels and F(4, 3) it is 4e-6, and
// 1e-6 to 2e-6 are measured.
#pragma once

#include "simd.h"

// The transforms are worth their time only where all of them becomes one sequence of instructions.
#define HPCTRAIN_INLINE inline __attribute__((always_inline))

namespace hpctrain::HPCTRAIN_ISA::winograd {

constexpr int outputs_of(int kernel, int edge) { return edge - kernel + 1; }

// The finite points of tiles with EDGE points per dim: 0 and pairs +-p.
template <int EDGE>
struct Pairs;
template <>
struct Pairs<4> {
    static constexpr int COUNT = 1;
    static constexpr double P[] = {1};
};
template <>
struct Pairs<6> {
    static constexpr int COUNT = 2;
    static constexpr double P[] = {11.0 / 16, 23.0 / 16};
};
template <>
struct Pairs<8> {
    static constexpr int COUNT = 3;
    static constexpr double P[] = {0.5, 1, 2};
};

constexpr double power_of(double p, int n) { return n == 0 ? 1 : p * power_of(p, n - 1); }

// Coefficient n of the product of (t - p^2) over all pairs, from pair `from` on, without pair `without`.
template <int EDGE>
constexpr double coefficient(int n, int without, int from = 0) {
    if (from == Pairs<EDGE>::COUNT) return n == 0;
    if (n < 0) return 0;
    if (from == without) return coefficient<EDGE>(n, without, from + 1);
    const double p = Pairs<EDGE>::P[from];
    return coefficient<EDGE>(n - 1, without, from + 1) - p * p * coefficient<EDGE>(n, without, from + 1);
}

// Denominators of G: products of the differences of a point from all others; of 0 where there is no such pair.
template <int EDGE>
constexpr double denominator(int pair, int other = 0) {
    if (other == Pairs<EDGE>::COUNT) return 1;
    const double p = pair < Pairs<EDGE>::COUNT ? Pairs<EDGE>::P[pair] : 0, q = Pairs<EDGE>::P[other];
    return (other == pair ? 2 * p * p : p * p - q * q) * denominator<EDGE>(pair, other + 1);
}

// The constants of an EDGE in float, as tables for loops that the compiler unrolls.
template <int EDGE>
struct Table {
    static constexpr int COUNT = Pairs<EDGE>::COUNT;
    float power[COUNT][EDGE] = {}, rest[COUNT][COUNT] = {}, full[COUNT + 1] = {}, over[COUNT + 1] = {};

    constexpr Table() {
        for (int i = 0; i < COUNT; ++i) {
            for (int n = 0; n < EDGE; ++n) power[i][n] = float(power_of(Pairs<EDGE>::P[i], n));
            for (int n = 0; n < COUNT; ++n) rest[i][n] = float(coefficient<EDGE>(n, i));
        }
        for (int i = 0; i <= COUNT; ++i) {
            full[i] = float(coefficient<EDGE>(i, COUNT));
            over[i] = float(1 / denominator<EDGE>(i));
        }
    }
};
template <int EDGE>
constexpr Table<EDGE> TABLE{};

// The sums of what belongs to +p and -p, by the parity of the power of p that they are multiplied with.
template <int EDGE>
struct Parities {
    static constexpr int COUNT = Pairs<EDGE>::COUNT;
    V pair[COUNT][2];

    HPCTRAIN_INLINE explicit Parities(const V (&m)[EDGE]) {
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            pair[i][0] = m[2 * i + 1] + m[2 * i + 2];
            pair[i][1] = m[2 * i + 1] - m[2 * i + 2];
        }
    }
    HPCTRAIN_INLINE V power(int n) const {
        V sum = n == 0 ? pair[0][0] : TABLE<EDGE>.power[0][n] * pair[0][n % 2];
#pragma GCC unroll 4
        for (int i = 1; i < COUNT; ++i) {
            if (n == 0)
                sum += pair[i][0];
            else
                sum += TABLE<EDGE>.power[i][n] * pair[i][n % 2];
        }
        return sum;
    }
};

// The values of the polynomial with these coefficients at the points; over their denominators for weights.
template <int EDGE, bool WEIGHTS, int N>
HPCTRAIN_INLINE void evaluate(const V (&c)[N], V (&to)[EDGE]) {
    constexpr Table<EDGE> T{};
    constexpr int COUNT = Pairs<EDGE>::COUNT;
    to[0] = WEIGHTS ? T.over[COUNT] * c[0] : c[0];
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) {
        const float over = WEIGHTS ? T.over[i] : 1;
        V even = over * c[0], odd = (over * T.power[i][1]) * c[1];
#pragma GCC unroll 8
        for (int n = 2; n < N; ++n) {
            V& sum = n % 2 ? odd : even;
            sum += (over * T.power[i][n]) * c[n];
        }
        to[2 * i + 1] = even + odd;
        to[2 * i + 2] = even - odd;
    }
    to[EDGE - 1] = c[N - 1];
}

// B^T d: a tile of inputs.
template <int EDGE>
struct Input {
    static constexpr int FROM = EDGE, TO = EDGE, COUNT = Pairs<EDGE>::COUNT;
    static HPCTRAIN_INLINE void apply(const V (&d)[FROM], V (&to)[TO]) {
        constexpr Table<EDGE> T{};
        V first = d[2 * COUNT], last = d[2 * COUNT + 1];
#pragma GCC unroll 4
        for (int n = COUNT - 1; n >= 0; --n) first += T.full[n] * d[2 * n], last += T.full[n] * d[2 * n + 1];
        to[0] = first;
        to[EDGE - 1] = last;
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            V even = d[2 * COUNT], odd = d[2 * COUNT - 1];
#pragma GCC unroll 4
            for (int n = COUNT - 2; n >= 0; --n)
                even += T.rest[i][n] * d[2 * n + 2], odd += T.rest[i][n] * d[2 * n + 1];
            to[2 * i + 1] = even + T.power[i][1] * odd;
            to[2 * i + 2] = even - T.power[i][1] * odd;
        }
    }
};

// B m, its adjoint: what a tile adds to the gradient by its inputs.
template <int EDGE>
struct InputAdjoint {
    static constexpr int FROM = EDGE, TO = EDGE, COUNT = Pairs<EDGE>::COUNT;
    static HPCTRAIN_INLINE void apply(const V (&m)[FROM], V (&to)[TO]) {
        constexpr Table<EDGE> T{};
        const Parities<EDGE> pairs(m);
        V odd[COUNT];
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) odd[i] = T.power[i][1] * pairs.pair[i][1];
#pragma GCC unroll 8
        for (int n = 0; n <= COUNT; ++n) {
            V at_even = n < COUNT ? T.full[n] * m[0] : m[0], at_odd = n < COUNT ? T.full[n] * m[EDGE - 1] : m[EDGE - 1];
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i) {
                if (n > 0) at_even += n < COUNT ? T.rest[i][n - 1] * pairs.pair[i][0] : pairs.pair[i][0];
                if (n < COUNT) at_odd += n + 1 < COUNT ? T.rest[i][n] * odd[i] : odd[i];
            }
            to[2 * n] = at_even;
            to[2 * n + 1] = at_odd;
        }
    }
};

// A^T m: a tile of outputs.
template <int KERNEL, int EDGE>
struct Output {
    static constexpr int FROM = EDGE, TO = outputs_of(KERNEL, EDGE);
    static HPCTRAIN_INLINE void apply(const V (&m)[FROM], V (&to)[TO]) {
        const Parities<EDGE> pairs(m);
        to[0] = pairs.power(0) + m[0];
#pragma GCC unroll 8
        for (int n = 1; n < TO; ++n) to[n] = pairs.power(n);
        to[TO - 1] += m[EDGE - 1];
    }
};

// A dy, its adjoint: a tile of gradients by the outputs.
template <int KERNEL, int EDGE>
struct OutputAdjoint {
    static constexpr int FROM = outputs_of(KERNEL, EDGE), TO = EDGE;
    static HPCTRAIN_INLINE void apply(const V (&dy)[FROM], V (&to)[TO]) { evaluate<EDGE, false>(dy, to); }
};

// G g: the weights.
template <int KERNEL, int EDGE>
struct Weights {
    static constexpr int FROM = KERNEL, TO = EDGE;
    static HPCTRAIN_INLINE void apply(const V (&g)[FROM], V (&to)[TO]) { evaluate<EDGE, true>(g, to); }
};

// G^T u, its adjoint: the gradient by the weights.
template <int KERNEL, int EDGE>
struct WeightsAdjoint {
    static constexpr int FROM = EDGE, TO = KERNEL, COUNT = Pairs<EDGE>::COUNT;
    static HPCTRAIN_INLINE void apply(const V (&u)[FROM], V (&to)[TO]) {
        Parities<EDGE> pairs(u);
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            for (V& v : pairs.pair[i]) v *= TABLE<EDGE>.over[i];
        }
        to[0] = TABLE<EDGE>.over[COUNT] * u[0] + pairs.power(0);
#pragma GCC unroll 8
        for (int n = 1; n < TO; ++n) to[n] = pairs.power(n);
        to[TO - 1] += u[EDGE - 1];
    }
};

// The transform of both dims: write(i, j, value) of what read(i, j) gives.
template <class Transform, class Read, class Write>
inline void both_dims(Read read, Write write) {
    constexpr int FROM = Transform::FROM, TO = Transform::TO;
    V half[TO][FROM];
#pragma GCC unroll 8
    for (int j = 0; j < FROM; ++j) {
        V column[FROM], turned[TO];
#pragma GCC unroll 8
        for (int i = 0; i < FROM; ++i) column[i] = read(i, j);
        Transform::apply(column, turned);
#pragma GCC unroll 8
        for (int i = 0; i < TO; ++i) half[i][j] = turned[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < TO; ++i) {
        V turned[TO];
        Transform::apply(half[i], turned);
#pragma GCC unroll 8
        for (int j = 0; j < TO; ++j) write(i, j, turned[j]);
    }
}

}  // namespace hpctrain::HPCTRAIN_ISA::winograd
