// The CPU kernels, for float, double and, but for the optimizer's, bf16. Same meaning, argument order and names as
// hpctrain/backends/base.py.
//
// Layouts hold the strides of the array arguments in the order in which these stand. Where an operation works per
// channel, the layout is that of the positions (all dims but the last), whose rows of `channels` elements are
// contiguous. Statistics (mean, rstd and the sums that belong to them) are double for float arrays too: they are merged
// over ranks. Every result is a fixed sequence of IEEE operations that depends on shape and dtype alone: not on
// strides, instruction set, number of threads or time of day.
#pragma once

#include <cstdint>

#include "layout.h"
#include "storage.h"

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
void multiply(const Layout<3>& layout, const T* a, const T* b, T* out);
template <class T>
void relu(const Layout<2>& layout, const T* x, T* out);
template <class T>
void relu_dx(const Layout<3>& layout, const T* dy, const T* y, T* out);
// dy *= y > 0 ? 1 : slope, where a slope of 0 gives 0 whatever dy is.
template <class T>
void activation_grad(const Layout<2>& layout, T* dy, const T* y, double slope);

// --- normalize.cpp ---

template <class T>
void bias_add(const Layout<1>& rows, Index channels, T* y, const Real<T>* b);
// `add` may be null.
template <class T>
void normalize(const Layout<3>& rows, Index channels, const T* x, const T* add, const double* mean, const double* rstd,
               const Real<T>* gamma, const Real<T>* beta, double slope, T* out);
template <class T>
void normalize_dx(const Layout<3>& rows, Index channels, const T* dy, const T* x, const double* mean,
                  const double* rstd, const Real<T>* gamma, const double* mean_g, const double* mean_g_xhat, T* out);
// One sample: out[..., c] = scale * dy[c].
template <class T>
void spread_positions(const Layout<1>& rows, Index channels, const T* dy, T* out, Real<T> scale);

// --- activation.cpp ---

enum class Activation { leaky_relu, gelu, silu, sigmoid, tanh, softplus };

template <class T>
void activate(Activation kind, const Layout<2>& layout, const T* x, T* out, double slope);
template <class T>
void activate_dx(Activation kind, const Layout<3>& layout, const T* dy, const T* x, T* out, double slope);

// --- pooling.cpp ---

struct Pooling {
    // Of one sample's outputs. Strides are those of the first element of each window in x (or dx), of out (or dy), and
    // of index; `sample` are the ones from sample to sample.
    Layout<3> outputs;
    std::array<Index, 3> sample;
    Index samples, channels;
    // Offsets of the elements of a window from its first one.
    const Index* taps;
    std::int32_t tap_count;
    // No two windows share an element.
    bool disjoint;
};

template <class T>
void max_pool(const Pooling& pooling, const T* x, T* out, std::int32_t* index);
// Adds to dx, or, of disjoint windows, writes all of their elements.
template <class T>
void max_pool_dx(const Pooling& pooling, const T* dy, const std::int32_t* index, T* dx);

// --- reduction.cpp ---

// `y` may be null; where it is not, dy is first masked as by `activation_grad`, in the same pass.
template <class T>
void bias_grad(const Layout<2>& rows, Index channels, T* dy, const T* y, double slope, Real<T>* out);
// One sample: out[c] = scale * sum of x[..., c].
template <class T>
void sum_positions(const Layout<1>& rows, Index channels, const T* x, T* out, double scale);
template <class T>
void moments(const Layout<1>& rows, Index channels, const T* x, double* mean, double* m2);
// `y` as in bias_grad.
template <class T>
void normalize_grad(const Layout<3>& rows, Index channels, T* dy, const T* x, const T* y, double slope,
                    const double* mean, const double* rstd, double* sum_dy, double* sum_dy_xhat);

// --- optimizer.cpp ---

template <class T>
void sgd_update(Index n, T* w, const T* g, T* velocity, T lr, T momentum, T weight_decay, bool nesterov);

// What is the same for all weights of an update of Adam, computed in double and then rounded once.
template <class T>
struct AdamFactors {
    T rate;          // lr / (1 - beta1^t)
    T correction;    // 1 / sqrt(1 - beta2^t)
    T beta1, rest1;  // and 1 - beta1
    T beta2, rest2;
    T eps, weight_decay, keep;  // of the weight: 1, or 1 - lr * weight decay where that is decoupled
};

template <class T>
void adam_update(Index n, T* w, const T* g, T* mean, T* square, const AdamFactors<T>& factors);
template <class T>
void lars_update(Index n, T* w, const T* g, T* velocity, T rate, T momentum, T weight_decay);
template <class T>
double sum_squares(Index n, const T* x);

}  // namespace hpctrain
