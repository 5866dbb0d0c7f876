// The matrices of transformed tiles or weights, and their products.
#pragma once

#include "simd.h"
#include "winograd_transform.h"

namespace hpctrain::HPCTRAIN_ISA::winograd {

// Terms of a product that are summed up in registers; such sums are then added to each other. Shorter runs round less,
// and a panel of so many rows stays in the first-level cache while it serves several tiles of registers.
constexpr Index RUN = 64;

inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// `points` matrices of `rows` rows and `vectors` vectors, in panels of at most `most` vectors; panels lie one after the
// other, each with its rows one after the other.
struct Matrices {
    float* data = nullptr;
    int points;
    Index rows, vectors, panels, point;  // point: floats from one matrix to the next

    Matrices(int points, Index rows, Index columns, int most)
        : points(points),
          rows(rows),
          vectors(ceil_div(columns, W)),
          panels(ceil_div(vectors, most)),
          point(rows * vectors * W) {
        // An odd number of cache lines: a power of two would map the matrices to the same few sets of the cache.
        point = (ceil_div(point, 16) | 1) * 16;
    }
    Index floats() const { return points * point; }
    Index first(Index panel) const { return panel * vectors / panels; }  // its first vector
    int width(Index panel) const { return int(first(panel + 1) - first(panel)); }
    Index offset(Index panel) const { return first(panel) * rows * W; }
    float* panel(Index panel) const { return data + offset(panel); }
};

// Rows of a register tile that is n vectors wide: as many sums as leave registers for their factors.
#if defined(__AVX512F__)
constexpr int sum_rows(int n) { return n == 4 ? 6 : n == 3 ? 8 : 12; }
#elif defined(__AVX2__)
constexpr int sum_rows(int n) { return n == 2 ? 6 : 12; }
#else
constexpr int sum_rows(int n) { return n == 2 ? 4 : 8; }
#endif

// The left factor of a product: term i of row r is data[r * ROW + (i / W) * block + (i % W) * STEP], all again for
// each of `taps`, `tap` floats further.
struct Left {
    const float* data;
    Index block, tap;
    int taps;
    Index terms;
};

// to[r][0 .. N) = sum over the terms of left[r][i] * right[i][0 .. N), for R rows; added to what is there if `add`.
template <int R, int N, int ROW, int STEP>
__attribute__((noinline)) void sum_tile(const Left& left, const float* right, float* to, bool add) {
    V sums[R][N] = {};
    for (int tap = 0; tap < left.taps; ++tap) {
        const float* block = left.data + tap * left.tap;
        for (Index rest = left.terms; rest > 0; rest -= W, block += left.block) {
            const float* a = block;
#pragma GCC unroll 2
            for (Index i = rest < W ? rest : W; i > 0; --i, a += STEP, right += N * W) {
                V b[N];
#pragma GCC unroll 4
                for (int j = 0; j < N; ++j) b[j] = load(right + j * W);
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    const V factor = set(a[r * ROW]);
#pragma GCC unroll 4
                    for (int j = 0; j < N; ++j) sums[r][j] = fma(factor, b[j], sums[r][j]);
                }
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            float* place = to + (r * N + j) * W;
            store(place, add ? load(place) + sums[r][j] : sums[r][j]);
        }
    }
}

template <int R, int N, int ROW, int STEP>
inline void sum_rows_of(int rows, const Left& left, const float* right, float* to, bool add) {
    if (rows == R) return sum_tile<R, N, ROW, STEP>(left, right, to, add);
    if constexpr (R > 1) sum_rows_of<R - 1, N, ROW, STEP>(rows, left, right, to, add);
}

template <int N, int ROW, int STEP>
inline void product_of(Left left, Index rows, const float* right, float* to, bool add) {
    // register tiles of nearly equal heights
    for (Index tiles = ceil_div(rows, sum_rows(N)); tiles > 0; --tiles) {
        const int r = int(rows / tiles);
        sum_rows_of<sum_rows(N), N, ROW, STEP>(r, left, right, to, add);
        rows -= r, left.data += r * ROW, to += r * N * W;
    }
}

// to (rows, width vectors) [+]= left * right, where right and `to` are panels.
template <int ROW, int STEP>
inline void product(int width, const Left& left, Index rows, const float* right, float* to, bool add) {
    if (width == 1) return product_of<1, ROW, STEP>(left, rows, right, to, add);
    if (width == 2) return product_of<2, ROW, STEP>(left, rows, right, to, add);
    if constexpr (TILE_VECTORS > 2) {
        if (width == 3) return product_of<3, ROW, STEP>(left, rows, right, to, add);
        return product_of<4, ROW, STEP>(left, rows, right, to, add);
    }
}

}  // namespace hpctrain::HPCTRAIN_ISA::winograd
