// Parts of strided arrays, dealt out to threads, and sums whose order depends on the number of terms alone.
#pragma once

#include <algorithm>

#include "functions.h"
#include "layout.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace hpctrain {

// Calls work(task) for each task, in OpenMP's threads where there are several of both. Nothing may be thrown in there,
// and no result may depend on who does what.
template <class Work>
void in_parallel(Index tasks, Work work) {
#ifdef _OPENMP
    if (tasks > 1 && omp_get_max_threads() > 1) {
#pragma omp parallel for schedule(static)
        for (Index task = 0; task < tasks; ++task) work(task);
        return;
    }
#endif
    for (Index task = 0; task < tasks; ++task) work(task);
}

// How many parts of `size` elements there are in n.
inline Index parts(Index n, Index size) { return (n + size - 1) / size; }

// Calls work(count, offsets) for pieces of the positions [begin, end) of a layout, in C order: `count` of them along
// its last dim.
template <int N, class Work>
void by_span(const Layout<N>& layout, Index begin, Index end, Work work) {
    const int inner = layout.dims - 1;
    std::array<Index, MAX_DIMS> at{};
    std::array<Index, N> offset{};
    const auto advance = [&](int dim, Index steps) {
        at[size_t(dim)] += steps;
        for (size_t i = 0; i < N; ++i) offset[i] += steps * layout.stride[size_t(dim)][i];
    };
    if (begin < end) {
        Index rest = begin;
        for (int d = inner; d >= 0; rest /= layout.extent[size_t(d)], --d) advance(d, rest % layout.extent[size_t(d)]);
    }
    while (begin < end) {
        const Index count = std::min(end - begin, layout.extent[size_t(inner)] - at[size_t(inner)]);
        work(count, offset);
        begin += count;
        advance(inner, count);
        for (int d = inner; d > 0 && at[size_t(d)] == layout.extent[size_t(d)]; --d) {
            advance(d, -at[size_t(d)]);
            advance(d - 1, 1);
        }
    }
}

constexpr int SUM_LANES = 16;

// value(0) + ... + value(n - 1): term i is added in lane i % SUM_LANES, so that lanes fill vectors; then these pairwise.
template <class Value>
HPCTRAIN_INLINE double sum_of(Index n, Value value) {
    double lane[SUM_LANES] = {};
    Index i = 0;
    for (; i + SUM_LANES <= n; i += SUM_LANES) {
        for (int j = 0; j < SUM_LANES; ++j) lane[j] += value(i + j);
    }
    for (int j = 0; i + j < n; ++j) lane[j] += value(i + j);
    for (int half = SUM_LANES / 2; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    return lane[0];
}

}  // namespace hpctrain
