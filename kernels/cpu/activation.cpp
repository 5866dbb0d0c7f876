// Activations and their derivatives. Computed in double for float and bf16 arrays too.
#include "functions.h"
#include "kernels.h"
#include "runs.h"

namespace hpctrain {
namespace {

// From here on functions that decay are 0; infinity times that 0 would not be a number.
constexpr double FAR = 800;

HPCTRAIN_INLINE double at_least(double x, double lowest) { return x < lowest ? lowest : x; }
HPCTRAIN_INLINE double at_most(double x, double highest) { return x > highest ? highest : x; }
HPCTRAIN_INLINE double near(double x) { return at_most(at_least(x, -FAR), FAR); }

HPCTRAIN_INLINE double sigmoid(double x) {
    const double e = exp_negative(-std::abs(x));
    return (x > 0 ? 1 : e) / (1 + e);
}

HPCTRAIN_INLINE double sigmoid_slope(double x) {
    const double e = exp_negative(-std::abs(x));
    return e / ((1 + e) * (1 + e));
}

// The standard normal distribution.
struct Normal {
    double function, density;
};

HPCTRAIN_INLINE Normal normal(double x) {
    const double size = at_most(std::abs(x), FAR), e = exp_negative(-0.5 * size * size);
    const double tail = 0.5 * e * scaled_erfc(size * 0.7071067811865476);  // sqrt(1/2)
    return {x > 0 ? 1 - tail : tail, e * 0.3989422804014327};              // 1 / sqrt(2 pi)
}

struct LeakyRelu {
    double below;
    HPCTRAIN_INLINE double value(double x) const { return x > 0 ? x : below * x; }
    HPCTRAIN_INLINE double slope(double x) const { return x > 0 ? 1 : below; }
};

struct Gelu {
    HPCTRAIN_INLINE double value(double x) const { return at_least(x, -FAR) * normal(x).function; }
    HPCTRAIN_INLINE double slope(double x) const {
        const Normal n = normal(x);
        return n.function + near(x) * n.density;
    }
};

struct Silu {
    HPCTRAIN_INLINE double value(double x) const { return at_least(x, -FAR) * sigmoid(x); }
    HPCTRAIN_INLINE double slope(double x) const { return sigmoid(x) + near(x) * sigmoid_slope(x); }
};

struct Sigmoid {
    HPCTRAIN_INLINE double value(double x) const { return sigmoid(x); }
    HPCTRAIN_INLINE double slope(double x) const { return sigmoid_slope(x); }
};

struct Tanh {
    HPCTRAIN_INLINE double value(double x) const {
        const double t = expm1_negative(-2 * std::abs(x));
        return std::copysign(t / (2 + t), x);
    }
    HPCTRAIN_INLINE double slope(double x) const { return 4 * sigmoid_slope(2 * x); }
};

struct Softplus {
    HPCTRAIN_INLINE double value(double x) const { return at_least(x, 0) + log1p_unit(exp_negative(-std::abs(x))); }
    HPCTRAIN_INLINE double slope(double x) const { return sigmoid(x); }
};

template <class F, class T>
HPCTRAIN_CLONES void value_run(F f, Index n, const T* x, T* out) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) out[i] = store<T>(Real<T>(f.value(double(load(x[i])))));
}

template <class F, class T>
HPCTRAIN_CLONES void slope_run(F f, Index n, const T* dy, const T* x, T* out) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) out[i] = store<T>(Real<T>(double(load(dy[i])) * f.slope(double(load(x[i])))));
}

// work(f) for the function of that kind.
template <class Work>
void with(Activation kind, double slope, Work work) {
    switch (kind) {
        case Activation::leaky_relu:
            return work(LeakyRelu{slope});
        case Activation::gelu:
            return work(Gelu{});
        case Activation::silu:
            return work(Silu{});
        case Activation::sigmoid:
            return work(Sigmoid{});
        case Activation::tanh:
            return work(Tanh{});
        case Activation::softplus:
            return work(Softplus{});
    }
}

}  // namespace

template <class T>
void activate(Activation kind, const Layout<2>& layout, const T* x, T* out, double slope) {
    with(kind, slope,
         [&](auto f) { by_runs(layout, [=](Index n, auto& at) { value_run(f, n, x + at[0], out + at[1]); }); });
}

template <class T>
void activate_dx(Activation kind, const Layout<3>& layout, const T* dy, const T* x, T* out, double slope) {
    with(kind, slope, [&](auto f) {
        by_runs(layout, [=](Index n, auto& at) { slope_run(f, n, dy + at[0], x + at[1], out + at[2]); });
    });
}

#define HPCTRAIN_FOR(T)                                                            \
    template void activate<T>(Activation, const Layout<2>&, const T*, T*, double); \
    template void activate_dx<T>(Activation, const Layout<3>&, const T*, const T*, T*, double);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)
HPCTRAIN_FOR(bf16)

}  // namespace hpctrain
