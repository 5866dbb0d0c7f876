// The CPU kernels, for float and double. Same meaning, argument order and names as hpctrain/backends/base.py.
//
// Layouts hold the strides of the array arguments in the order in which these stand. Where an operation works per
// channel, the layout is that of the positions (all dims but the last), whose rows of `channels` elements are
// contiguous. Statistics (mean, rstd and the sums that belong to them) are double for float arrays too: they are merged
// over ranks. Every result is a fixed sequence of IEEE operations that depends on shape and dtype alone: not on
// strides, instruction set or time of day.
#pragma once

#include "layout.h"

// Hot loops are compiled for several instruction sets; the loader picks one. They give the same bits, as nothing is
// contracted.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(HPCTRAIN_NO_CLONES)
#define HPCTRAIN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HPCTRAIN_CLONES
#endif

namespace hpctrain {

// --- elementwise.cpp ---

template <class T>
void add(const Layout<3>& layout, const T* a, const T* b, T* out);
template <class T>
void relu(const Layout<2>& layout, const T* x, T* out);
template <class T>
void relu_dx(const Layout<3>& layout, const T* dy, const T* y, T* out);
template <class T>
void bias_add(const Layout<1>& rows, Index channels, T* y, const T* b);
template <class T>
void normalize(const Layout<2>& rows, Index channels, const T* x, const double* mean, const double* rstd,
               const T* gamma, const T* beta, T* out);
template <class T>
void normalize_dx(const Layout<3>& rows, Index channels, const T* dy, const T* x, const double* mean,
                  const double* rstd, const T* gamma, const double* mean_dy, const double* mean_dy_xhat, T* out);
// One sample: out[..., c] = scale * dy[c].
template <class T>
void spread_positions(const Layout<1>& rows, Index channels, const T* dy, T* out, T scale);

// --- reduction.cpp ---

template <class T>
void bias_grad(const Layout<1>& rows, Index channels, const T* dy, T* out);
// One sample: out[c] = scale * sum of x[..., c].
template <class T>
void sum_positions(const Layout<1>& rows, Index channels, const T* x, T* out, double scale);
template <class T>
void moments(const Layout<1>& rows, Index channels, const T* x, double* mean, double* m2);
template <class T>
void normalize_grad(const Layout<2>& rows, Index channels, const T* dy, const T* x, const double* mean,
                    const double* rstd, double* sum_dy, double* sum_dy_xhat);

// --- optimizer.cpp ---

template <class T>
void sgd_update(Index n, T* w, const T* g, T* velocity, T lr, T momentum, T weight_decay, bool nesterov);

}  // namespace hpctrain
