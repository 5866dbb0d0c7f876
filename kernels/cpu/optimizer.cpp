// Updates of the weights, in place.
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

}  // namespace

template <class T>
void sgd_update(Index n, T* w, const T* g, T* velocity, T lr, T momentum, T weight_decay, bool nesterov) {
    (nesterov ? sgd_nesterov<T> : sgd<T>)(n, w, g, velocity, lr, momentum, weight_decay);
}

template void sgd_update<float>(Index, float*, const float*, float*, float, float, float, bool);
template void sgd_update<double>(Index, double*, const double*, double*, double, double, double, bool);

}  // namespace hpctrain
