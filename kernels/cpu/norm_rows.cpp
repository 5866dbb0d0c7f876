// Normalization of rows by given statistics, which change along any dims. Computed in double for every storage type.
#include "norms.h"
#include "spans.h"

namespace hpctrain {
namespace {

constexpr Index TASK = 1 << 14;  // elements that a thread takes at a time

// values[i] of a row, or its one value.
template <bool EACH, class A>
HPCTRAIN_INLINE double pick(const A* values, Index i) {
    return wide(values[EACH ? i : 0]);
}

// Where FUSED, `add` is added unless null, and what is then below 0 multiplied by the slope.
template <bool SE, bool GE, bool FUSED, class S, class A>
HPCTRAIN_CLONES void forward(Index rows, Index n, const std::array<Index, 5>& step, const S* x, const S* add,
                             const double* mean, const double* rstd, const A* gamma, const A* beta, double slope,
                             S* out) {
    for (Index r = 0; r < rows; ++r) {
#pragma GCC ivdep
        for (Index i = 0; i < n; ++i) {
            const double xhat = (wide(x[i]) - pick<SE>(mean, i)) * pick<SE>(rstd, i);
            double value = xhat * pick<GE>(gamma, i) + pick<GE>(beta, i);
            if (FUSED) {
                if (add) value += wide(add[i]);
                value = value < 0 ? (slope == 0 ? 0 : slope * value) : value;
            }
            out[i] = narrow<S>(value);
        }
        x += step[0], out += step[2], mean += step[3], rstd += step[3], gamma += step[4], beta += step[4];
        if (FUSED && add) add += step[1];
    }
}

template <bool SE, bool GE, bool ME, class S, class A>
HPCTRAIN_CLONES void backward(Index rows, Index n, const std::array<Index, 6>& step, const S* dy, const S* x,
                              const double* mean, const double* rstd, const A* gamma, const double* mean_g,
                              const double* mean_g_xhat, S* out) {
    for (Index r = 0; r < rows; ++r) {
#pragma GCC ivdep
        for (Index i = 0; i < n; ++i) {
            const double xhat = (wide(x[i]) - pick<SE>(mean, i)) * pick<SE>(rstd, i);
            const double g = pick<GE>(gamma, i) * wide(dy[i]);
            out[i] = narrow<S>(pick<SE>(rstd, i) * (g - pick<ME>(mean_g, i) - xhat * pick<ME>(mean_g_xhat, i)));
        }
        dy += step[0], x += step[1], out += step[2], mean += step[3], rstd += step[3], gamma += step[4];
        mean_g += step[5], mean_g_xhat += step[5];
    }
}

// Calls work(rows, offsets, strides) for pieces of a layout.
template <int N, class Work>
void by_rows(const Layout<N>& layout, Index n, Work work) {
    const Index size = n == 0 ? 0 : layout.size(), chunk = std::max<Index>(1, TASK / std::max<Index>(1, n));
    in_tasks(parts(size, chunk), size * n, [&](Index task) {
        by_span(layout, task * chunk, std::min(size, (task + 1) * chunk), [&](Index rows, auto& at) {
            work(rows, at, layout.stride[size_t(layout.dims - 1)]);
        });
    });
}

template <class Work>
void choose(bool flag, Work work) {
    flag ? work(std::true_type()) : work(std::false_type());
}

}  // namespace

template <class S>
void normalize_by(const Layout<5>& layout, Index n, bool each_statistic, bool each_gamma, const S* x, const S* add,
                  const double* mean, const double* rstd, const Real<S>* gamma, const Real<S>* beta, double slope,
                  S* out) {
    choose(each_statistic, [&](auto s) {
        choose(each_gamma, [&](auto g) {
            choose(add || slope != 1, [&](auto fused) {
                by_rows(layout, n, [&](Index rows, auto& at, auto& step) {
                    forward<s.value, g.value, fused.value>(rows, n, step, x + at[0], add ? add + at[1] : nullptr,
                                                           mean + at[3], rstd + at[3], gamma + at[4], beta + at[4],
                                                           slope, out + at[2]);
                });
            });
        });
    });
}

template <class S>
void normalize_dx_by(const Layout<6>& layout, Index n, bool each_statistic, bool each_gamma, bool each_mean,
                     const S* dy, const S* x, const double* mean, const double* rstd, const Real<S>* gamma,
                     const double* mean_g, const double* mean_g_xhat, S* out) {
    choose(each_statistic, [&](auto s) {
        choose(each_gamma, [&](auto g) {
            choose(each_mean, [&](auto m) {
                by_rows(layout, n, [&](Index rows, auto& at, auto& step) {
                    backward<s.value, g.value, m.value>(rows, n, step, dy + at[0], x + at[1], mean + at[3],
                                                        rstd + at[3], gamma + at[4], mean_g + at[5],
                                                        mean_g_xhat + at[5], out + at[2]);
                });
            });
        });
    });
}

#define HPCTRAIN_FOR(S)                                                                                              \
    template void normalize_by<S>(const Layout<5>&, Index, bool, bool, const S*, const S*, const double*,            \
                                  const double*, const Real<S>*, const Real<S>*, double, S*);                        \
    template void normalize_dx_by<S>(const Layout<6>&, Index, bool, bool, bool, const S*, const S*, const double*,    \
                                     const double*, const Real<S>*, const double*, const double*, S*);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)
HPCTRAIN_FOR(bf16)

}  // namespace hpctrain
