// Kernels that combine each position with vectors of one number per channel: bias, and normalization by given
// statistics. As in elementwise.cpp, an output may be the very array that an input is.
#include "kernels.h"
#include "runs.h"

namespace hpctrain {
namespace {

template <class T>
HPCTRAIN_CLONES void bias_add_rows(Index rows, Index width, T* y, Index y_step, const Real<T>* b) {
    for (Index r = 0; r < rows; ++r, y += y_step) {
#pragma GCC ivdep
        for (Index i = 0; i < width; ++i) y[i] = store<T>(load(y[i]) + b[i]);
    }
}

template <class T>
HPCTRAIN_CLONES void copy_rows(Index rows, Index width, T* out, Index out_step, const Real<T>* row) {
    for (Index r = 0; r < rows; ++r, out += out_step) {
#pragma GCC ivdep
        for (Index i = 0; i < width; ++i) out[i] = store<T>(row[i]);
    }
}

// The activations that normalization ends with.
struct Linear {
    template <class T>
    HPCTRAIN_ALWAYS_INLINE static T stored(Real<T> v, Real<T>) {
        return store<T>(v);
    }
};
struct Rectified {
    template <class T>
    HPCTRAIN_ALWAYS_INLINE static T stored(Real<T> v, Real<T>) {
        const T rounded = store<T>(v);
        return keep(!below_zero(rounded), rounded);  // NaN is not below: it stays
    }
};
struct Leaky {
    template <class T>
    HPCTRAIN_ALWAYS_INLINE static T stored(Real<T> v, Real<T> slope) {
        return store<T>(v > 0 ? v : slope * v);
    }
};

template <class T, class F>
HPCTRAIN_CLONES void normalize_rows(Index rows, Index width, const T* x, Index x_step, T* out, Index out_step,
                                    const Vectors<Real<T>, 3>& v, Real<T> slope) {
    for (Index r = 0; r < rows; ++r, x += x_step, out += out_step) {
#pragma GCC ivdep
        for (Index i = 0; i < width; ++i) {
            out[i] = F::template stored<T>((load(x[i]) - v[0][i]) * v[1][i] + v[2][i], slope);
        }
    }
}

template <class T, class F>
HPCTRAIN_CLONES void normalize_add_rows(Index rows, Index width, const T* x, Index x_step, const T* add, Index add_step,
                                        T* out, Index out_step, const Vectors<Real<T>, 3>& v, Real<T> slope) {
    for (Index r = 0; r < rows; ++r, x += x_step, add += add_step, out += out_step) {
#pragma GCC ivdep
        for (Index i = 0; i < width; ++i) {
            out[i] = F::template stored<T>((load(x[i]) - v[0][i]) * v[1][i] + v[2][i] + load(add[i]), slope);
        }
    }
}

template <class T>
HPCTRAIN_CLONES void normalize_dx_rows(Index rows, Index width, const T* dy, Index dy_step, const T* x, Index x_step,
                                       T* out, Index out_step, const Vectors<Real<T>, 4>& v) {
    for (Index r = 0; r < rows; ++r, dy += dy_step, x += x_step, out += out_step) {
#pragma GCC ivdep
        for (Index i = 0; i < width; ++i) {
            out[i] = store<T>(load(dy[i]) * v[1][i] - v[2][i] - (load(x[i]) - v[0][i]) * v[3][i]);
        }
    }
}

template <class F, class T>
void normalize_then(const Layout<3>& layout, Index channels, const T* x, const T* add, const double* mean,
                    const double* rstd, const Real<T>* gamma, const Real<T>* beta, double slope, T* out) {
    using R = Real<T>;
    const auto value = [=](Index c) { return std::array<R, 3>{R(mean[c]), R(rstd[c] * double(gamma[c])), beta[c]}; };
    by_rows<R, 3>(layout, channels, value, [=](Index rows, Index width, auto& at, auto& step, auto& v) {
        if (add) {
            normalize_add_rows<T, F>(rows, width, x + at[0], step[0], add + at[1], step[1], out + at[2], step[2], v,
                                     R(slope));
        } else {
            normalize_rows<T, F>(rows, width, x + at[0], step[0], out + at[2], step[2], v, R(slope));
        }
    });
}

}  // namespace

template <class T>
void bias_add(const Layout<1>& layout, Index channels, T* y, const Real<T>* b) {
    const auto value = [=](Index c) { return std::array<Real<T>, 1>{b[c]}; };
    by_rows<Real<T>, 1>(layout, channels, value, [=](Index rows, Index width, auto& at, auto& step, auto& v) {
        bias_add_rows<T>(rows, width, y + at[0], step[0], v[0]);
    });
}

template <class T>
void spread_positions(const Layout<1>& layout, Index channels, const T* dy, T* out, Real<T> scale) {
    const auto value = [=](Index c) { return std::array<Real<T>, 1>{scale * load(dy[c])}; };
    by_rows<Real<T>, 1>(layout, channels, value, [=](Index rows, Index width, auto& at, auto& step, auto& v) {
        copy_rows<T>(rows, width, out + at[0], step[0], v[0]);
    });
}

template <class T>
void normalize(const Layout<3>& layout, Index channels, const T* x, const T* add, const double* mean,
               const double* rstd, const Real<T>* gamma, const Real<T>* beta, double slope, T* out) {
    const auto then = slope == 1   ? normalize_then<Linear, T>
                      : slope == 0 ? normalize_then<Rectified, T>
                                   : normalize_then<Leaky, T>;
    then(layout, channels, x, add, mean, rstd, gamma, beta, slope, out);
}

template <class T>
void normalize_dx(const Layout<3>& layout, Index channels, const T* dy, const T* x, const double* mean,
                  const double* rstd, const Real<T>* gamma, const double* mean_g, const double* mean_g_xhat, T* out) {
    using R = Real<T>;
    const auto value = [=](Index c) {
        return std::array<R, 4>{R(mean[c]), R(rstd[c] * double(gamma[c])), R(rstd[c] * mean_g[c]),
                                R(rstd[c] * rstd[c] * mean_g_xhat[c])};
    };
    by_rows<R, 4>(layout, channels, value, [=](Index rows, Index width, auto& at, auto& step, auto& v) {
        normalize_dx_rows<T>(rows, width, dy + at[0], step[0], x + at[1], step[1], out + at[2], step[2], v);
    });
}

#define HPCTRAIN_FOR(T)                                                                                      \
    template void bias_add<T>(const Layout<1>&, Index, T*, const Real<T>*);                                  \
    template void spread_positions<T>(const Layout<1>&, Index, const T*, T*, Real<T>);                       \
    template void normalize<T>(const Layout<3>&, Index, const T*, const T*, const double*, const double*,    \
                               const Real<T>*, const Real<T>*, double, T*);                                  \
    template void normalize_dx<T>(const Layout<3>&, Index, const T*, const T*, const double*, const double*, \
                                  const Real<T>*, const double*, const double*, T*);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)
HPCTRAIN_FOR(bf16)

}  // namespace hpctrain
