// Updates of the weights, in place, and the norms that some of them need.
#include <cmath>

#include "kernels.h"

namespace hpctrain {
namespace {

template <class T>
HPCTRAIN_CLONES void sgd(Index n, T* w, const T* g, T* velocity, T lr, T momentum, T weight_decay) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) {
        velocity[i] = momentum * velocity[i] + (g[i] + weight_decay * w[i]);
        w[i] -= lr * velocity[i];
    }
}

template <class T>
HPCTRAIN_CLONES void sgd_nesterov(Index n, T* w, const T* g, T* velocity, T lr, T momentum, T weight_decay) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) {
        const T step = g[i] + weight_decay * w[i];
        velocity[i] = momentum * velocity[i] + step;
        w[i] -= lr * (step + momentum * velocity[i]);
    }
}

template <class T>
HPCTRAIN_CLONES void adam(Index n, T* w, const T* g, T* mean, T* square, const AdamFactors<T> f) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) {
        const T slope = g[i] + f.weight_decay * w[i];
        mean[i] = f.beta1 * mean[i] + f.rest1 * slope;
        square[i] = f.beta2 * square[i] + f.rest2 * (slope * slope);
        w[i] = f.keep * w[i] - f.rate * (mean[i] / (std::sqrt(square[i]) * f.correction + f.eps));
    }
}

template <class T>
HPCTRAIN_CLONES void lars(Index n, T* w, const T* g, T* velocity, T rate, T momentum, T weight_decay) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) {
        velocity[i] = momentum * velocity[i] + rate * (g[i] + weight_decay * w[i]);
        w[i] -= velocity[i];
    }
}

constexpr Index LANES = 32, ROWS = 128;

// Of at most LANES * ROWS elements: side by side in lanes, which are then folded in halves.
template <class T>
HPCTRAIN_CLONES double sum_squares_of_block(Index n, const T* x) {
    double lanes[LANES] = {};
    Index i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (Index l = 0; l < LANES; ++l) lanes[l] += double(x[i + l]) * double(x[i + l]);
    }
    for (Index l = 0; i + l < n; ++l) lanes[l] += double(x[i + l]) * double(x[i + l]);
    for (Index half = LANES / 2; half > 0; half /= 2) {
        for (Index l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    return lanes[0];
}

}  // namespace

template <class T>
void adam_update(Index n, T* w, const T* g, T* mean, T* square, const AdamFactors<T>& factors) {
    adam<T>(n, w, g, mean, square, factors);
}

template <class T>
void lars_update(Index n, T* w, const T* g, T* velocity, T rate, T momentum, T weight_decay) {
    lars<T>(n, w, g, velocity, rate, momentum, weight_decay);
}

template <class T>
double sum_squares(Index n, const T* x) {
    // halves, each of whole blocks: the error of n additions grows like log n
    const Index blocks = (n + LANES * ROWS - 1) / (LANES * ROWS);
    if (blocks <= 1) return sum_squares_of_block<T>(n, x);
    const Index first = blocks / 2 * (LANES * ROWS);
    return sum_squares<T>(first, x) + sum_squares<T>(n - first, x + first);
}

template <class T>
void sgd_update(Index n, T* w, const T* g, T* velocity, T lr, T momentum, T weight_decay, bool nesterov) {
    (nesterov ? sgd_nesterov<T> : sgd<T>)(n, w, g, velocity, lr, momentum, weight_decay);
}

template void sgd_update<float>(Index, float*, const float*, float*, float, float, float, bool);
template void sgd_update<double>(Index, double*, const double*, double*, double, double, double, bool);
template void adam_update<float>(Index, float*, const float*, float*, float*, const AdamFactors<float>&);
template void adam_update<double>(Index, double*, const double*, double*, double*, const AdamFactors<double>&);
template void lars_update<float>(Index, float*, const float*, float*, float, float, float);
template void lars_update<double>(Index, double*, const double*, double*, double, double, double);
template double sum_squares<float>(Index, const float*);
template double sum_squares<double>(Index, const double*);

}  // namespace hpctrain
