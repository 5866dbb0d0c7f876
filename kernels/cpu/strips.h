// Rows of arrays added to sums per channel, over runs of RUN rows in R. STRIP channels at a time, so that their sums
// stay in registers.
#pragma once

#include "kernels.h"
#include "sums.h"

namespace hpctrain {

constexpr int STRIP = 32;

// FULL channels, or as many as are left.
template <class R, int FULL, class T>
HPCTRAIN_ALWAYS_INLINE void add_strip(Index rows, Index left, const T* x, Index step, double* sum) {
    const Index width = FULL ? FULL : left;
    for (Index r = 0; r < rows; r += RUN) {
        R s[STRIP] = {};
        for (Index k = r; k < rows && k < r + RUN; ++k) {
            for (Index j = 0; j < width; ++j) s[j] += R(load(x[k * step + j]));
        }
        for (Index j = 0; j < width; ++j) sum[j] += double(s[j]);
    }
}

template <class R, int FULL, class T>
HPCTRAIN_ALWAYS_INLINE void add_squares_strip(Index rows, Index left, const T* x, Index step, const R* center,
                                              double* sum, double* square) {
    const Index width = FULL ? FULL : left;
    R c[STRIP];
    for (Index j = 0; j < width; ++j) c[j] = center[j];
    for (Index r = 0; r < rows; r += RUN) {
        R s[STRIP] = {}, q[STRIP] = {};
        for (Index k = r; k < rows && k < r + RUN; ++k) {
            for (Index j = 0; j < width; ++j) {
                const R d = R(load(x[k * step + j])) - c[j];
                s[j] += d, q[j] += d * d;
            }
        }
        for (Index j = 0; j < width; ++j) sum[j] += double(s[j]), square[j] += double(q[j]);
    }
}

template <class R, int FULL, class T>
HPCTRAIN_ALWAYS_INLINE void add_products_strip(Index rows, Index left, const T* dy, Index dy_step, const T* x,
                                               Index x_step, const R* center, double* sum, double* product) {
    const Index width = FULL ? FULL : left;
    R c[STRIP];
    for (Index j = 0; j < width; ++j) c[j] = center[j];
    for (Index r = 0; r < rows; r += RUN) {
        R s[STRIP] = {}, p[STRIP] = {};
        for (Index k = r; k < rows && k < r + RUN; ++k) {
            for (Index j = 0; j < width; ++j) {
                const R g = R(load(dy[k * dy_step + j]));
                s[j] += g, p[j] += g * (R(load(x[k * x_step + j])) - c[j]);
            }
        }
        for (Index j = 0; j < width; ++j) sum[j] += double(s[j]), product[j] += double(p[j]);
    }
}

// sum[i] += x[i] of each row
template <class R, class T>
HPCTRAIN_CLONES void add_rows(Index rows, Index width, const T* x, Index step, double* sum) {
    Index i = 0;
    for (; i + STRIP <= width; i += STRIP) add_strip<R, STRIP>(rows, STRIP, x + i, step, sum + i);
    if (i < width) add_strip<R, 0>(rows, width - i, x + i, step, sum + i);
}

// d = x[i] - center[i] of each row: sum[i] += d, square[i] += d^2
template <class R, class T>
HPCTRAIN_CLONES void add_squares(Index rows, Index width, const T* x, Index step, const R* center, double* sum,
                                 double* square) {
    Index i = 0;
    for (; i + STRIP <= width; i += STRIP)
        add_squares_strip<R, STRIP>(rows, STRIP, x + i, step, center + i, sum + i, square + i);
    if (i < width) add_squares_strip<R, 0>(rows, width - i, x + i, step, center + i, sum + i, square + i);
}

// sum[i] += dy[i], product[i] += dy[i] * (x[i] - center[i]) of each row
template <class R, class T>
HPCTRAIN_CLONES void add_products(Index rows, Index width, const T* dy, Index dy_step, const T* x, Index x_step,
                                  const R* center, double* sum, double* product) {
    Index i = 0;
    for (; i + STRIP <= width; i += STRIP) {
        add_products_strip<R, STRIP>(rows, STRIP, dy + i, dy_step, x + i, x_step, center + i, sum + i, product + i);
    }
    if (i < width) {
        add_products_strip<R, 0>(rows, width - i, dy + i, dy_step, x + i, x_step, center + i, sum + i, product + i);
    }
}

}  // namespace hpctrain
