// exp(x - largest) of rows of classes, the common part of softmax and of cross-entropy.
#pragma once

#include <limits>

#include "kernels.h"
#include "spans.h"

namespace hpctrain {

// Up to NARROW classes, the same class of many positions fills a vector; beyond, the classes of a position do.
constexpr Index NARROW = 16, ROWS = 128;
constexpr Index WIDE_BLOCK = NARROW * ROWS;  // up to 16 KiB

// Of up to ROWS rows of up to NARROW classes: out = exp(x - top) / total, with top the largest, total the sum.
template <class S, class A>
HPCTRAIN_CLONES void softmax_narrow(Index rows, Index classes, const S* x, Index x_step, A* out, Index out_step,
                                    double* top, double* total) {
    using E = Real<S>;
    alignas(64) E e[NARROW][ROWS], largest[ROWS], inverse[ROWS];
    for (Index k = 0; k < classes; ++k) {
        for (Index r = 0; r < rows; ++r) e[k][r] = load(x[r * x_step + k]);
    }
    for (Index r = 0; r < rows; ++r) largest[r] = e[0][r];
    for (Index k = 1; k < classes; ++k) {
        for (Index r = 0; r < rows; ++r) largest[r] = e[k][r] > largest[r] ? e[k][r] : largest[r];
    }
    for (Index r = 0; r < rows; ++r) top[r] = double(largest[r]), total[r] = 0;
    for (Index k = 0; k < classes; ++k) {
        for (Index r = 0; r < rows; ++r) e[k][r] = exp_negative(e[k][r] - largest[r]);
        for (Index r = 0; r < rows; ++r) total[r] += double(e[k][r]);
    }
    for (Index r = 0; r < rows; ++r) inverse[r] = E(1 / total[r]);
    for (Index k = 0; k < classes; ++k) {
        for (Index r = 0; r < rows; ++r) out[r * out_step + k] = store<A>(e[k][r] * inverse[r]);
    }
}

// The same of one row of any number of classes.
template <class S, class A>
HPCTRAIN_CLONES void softmax_wide(Index classes, const S* x, A* out, double* top, double* total) {
    using E = Real<S>;
    alignas(64) E e[WIDE_BLOCK], lane[SUM_LANES];
    for (E& value : lane) value = -std::numeric_limits<E>::infinity();
    Index i = 0;
    for (; i + SUM_LANES <= classes; i += SUM_LANES) {
        for (int j = 0; j < SUM_LANES; ++j) lane[j] = load(x[i + j]) > lane[j] ? load(x[i + j]) : lane[j];
    }
    for (int j = 0; i + j < classes; ++j) lane[j] = load(x[i + j]) > lane[j] ? load(x[i + j]) : lane[j];
    for (int j = 1; j < SUM_LANES; ++j) lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
    const E largest = lane[0];
    double sum = 0;
    for (Index begin = 0; begin < classes; begin += WIDE_BLOCK) {
        const Index n = std::min(classes - begin, WIDE_BLOCK);
        for (Index k = 0; k < n; ++k) e[k] = exp_negative(load(x[begin + k]) - largest);
        sum += sum_of(n, [&](Index k) { return double(e[k]); });
    }
    const E inverse = E(1 / sum);
    for (Index begin = 0; begin < classes; begin += WIDE_BLOCK) {
        const Index n = std::min(classes - begin, WIDE_BLOCK);
        for (Index k = 0; k < n && classes > WIDE_BLOCK; ++k) e[k] = exp_negative(load(x[begin + k]) - largest);
        for (Index k = 0; k < n; ++k) out[begin + k] = store<A>(e[k] * inverse);
    }
    *top = double(largest), *total = sum;
}

// Calls work(rows, row, top, total) after each few of `count` rows, from row `row` on, have got their softmax.
template <class S, class A, class Work>
void softmax_rows(Index count, Index classes, const S* x, Index x_step, A* out, Index out_step, Work work) {
    double top[ROWS], total[ROWS];
    for (Index row = 0; row < count; row += ROWS) {
        const Index rows = std::min(count - row, ROWS);
        const S* from = x + row * x_step;
        A* to = out + row * out_step;
        if (classes <= NARROW) {
            softmax_narrow(rows, classes, from, x_step, to, out_step, top, total);
        } else {
            for (Index r = 0; r < rows; ++r)
                softmax_wide(classes, from + r * x_step, to + r * out_step, top + r, total + r);
        }
        work(rows, row, top, total);
    }
}

}  // namespace hpctrain
