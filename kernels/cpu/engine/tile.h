// The register tile of the engine, and the packed factor that it reads.
#pragma once

#include "plan.h"
#include "simd.h"

namespace hpctrain::HPCTRAIN_ISA {

// Terms of a block of a sum: the packed rows stay in the second-level cache. Products of pairs take half as long, and
// their panels should rather stay close to the first level.
#ifdef HPCTRAIN_PAIRS
constexpr Index TERMS = BLOCK_TERMS / 4;
#else
constexpr Index TERMS = BLOCK_TERMS;
#endif

// A packed factor B of `width` columns: panels of at most TILE_VECTORS vectors, of nearly equal width, one after the
// other; a panel holds its rows one after the other, zeros beyond the last column.
struct Panels {
    Index width, vectors, count;

    explicit Panels(Index columns, int widest = TILE_VECTORS)
        : width(columns), vectors((columns + W - 1) / W), count((vectors + widest - 1) / widest) {}

    int size(Index panel) const { return int(vectors / count + (panel < vectors % count)); }
    Index first(Index panel) const {  // its first vector
        const Index longer = vectors % count;
        return panel * (vectors / count) + (panel < longer ? panel : longer);
    }
    // Columns that the last vector of a panel really has.
    int tail(Index panel) const { return panel + 1 < count ? W : int(width - (vectors - 1) * W); }
};

template <int N>
struct Vectors {
    static constexpr int count = N;
};

// Calls work(Vectors<n>()).
template <class Work>
inline void with_vectors(int n, Work work) {
    if (n == 1) return work(Vectors<1>());
    if (n == 2) return work(Vectors<2>());
    if constexpr (TILE_VECTORS > 2) {
        if (n == 3) return work(Vectors<3>());
        return work(Vectors<4>());
    }
}

// How the sums of a tile go into C: the rows that count, the columns of the last vector, what is added.
struct Target {
    int rows, tail;
    bool add;           // to what stands there
    const float* bias;  // of the first column; may be null
    float slope = 1;    // of what is <= 0

    Target of(int some_rows, int some_columns) const { return {some_rows, some_columns, add, bias, slope}; }
};

// How block `block` of `blocks` of the terms goes into columns from `column` on: the first one adds the bias, the last
// one is rectified. Rows and columns are left open.
inline Target target_of(const Epilogue& e, Index column, Index block, Index blocks) {
    return {0, 0, e.accumulate || block > 0, e.bias && block == 0 ? e.bias + column : nullptr,
            block + 1 == blocks ? e.slope : 1};
}

// What else a tile does, a little per term, while its multiplications keep the processor waiting for nothing: nothing,
// or to pack a column of vectors of the next block, row by row, from memory that no cache holds yet.
struct Nothing {
    void step() {}
};

struct Copy {
    const float* from;
    Index from_step;
    float* to;
    Index to_step, left;
    int columns;

    void step() {
        constexpr int EARLY = 40;  // terms: more than the time that memory takes
        if (left == 0) return;
        --left;
        __builtin_prefetch(from + EARLY * from_step, 0, 2);
        __builtin_prefetch(from + EARLY * from_step + W - 1, 0, 2);  // rows may lie across two cache lines
        store(to, columns == W ? load(from) : load(from, columns));
        from += from_step;
        to += to_step;
    }
};

// c[r][0 ..] = sum over all runs and their n terms i of a[r][run.a + i * step] * panel[run.b + i]
template <int N, class Aside = Nothing>
inline void tile(const float* const* a, float* const* c, Index column, Runs runs, Index step, const float* panel,
                 const Target& target, Aside&& aside = {}) {
    constexpr int M = tile_rows(N);
    const float* rows[M];
    V sums[M][N] = {};
    for (int r = 0; r < M; ++r) rows[r] = a[r];
    for (const Run* run = runs.list; run != runs.list + runs.count; ++run) {
        const float* b = panel + run->b * (N * W);
        Index at = run->a;
        for (Index left = run->n; left > 0; --left, at += step, b += N * W) {
            aside.step();
            V columns[N];
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) columns[j] = load(b + j * W);
#pragma GCC unroll 8
            for (int r = 0; r < M; ++r) {
                const V factor = broadcast(rows[r] + at);
#pragma GCC unroll 8
                for (int j = 0; j < N; ++j) sums[r][j] = fma(factor, columns[j], sums[r][j]);
            }
        }
    }
    // nearly always: no question asked in between
    if (target.rows == M && target.tail == W && !target.bias && target.slope == 1) {
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r) {
            float* place = c[r] + column;
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j)
                store(place + j * W, target.add ? sums[r][j] + load(place + j * W) : sums[r][j]);
        }
        return;
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
        if (r >= target.rows) break;
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
            const int n = j + 1 < N ? W : target.tail;
            float* place = c[r] + column + j * W;
            V sum = sums[r][j];
            if (target.bias) sum += n == W ? load(target.bias + j * W) : load(target.bias + j * W, n);
            if (target.add) sum += n == W ? load(place) : load(place, n);
            sum = rectified(sum, target.slope);
            n == W ? store(place, sum) : store(place, sum, n);
        }
    }
}

}  // namespace hpctrain::HPCTRAIN_ISA
