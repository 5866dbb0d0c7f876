// Normalization by statistics of any shape in hpctrain._native.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "arrays.h"
#include "bindings.h"
#include "broadcast.h"
#include "norms.h"
#include "spans.h"

namespace hpctrain {
namespace {

template <class A, class B>
void require_pair(const char* name, const A& a, const B& b) {
    bool same = a.ndim() == b.ndim();
    for (size_t d = 0; same && d < a.ndim(); ++d)
        same = a.shape(d) == b.shape(d) && (a.shape(d) == 1 || a.stride(d) == b.stride(d));
    if (!same) refuse(name, "arrays of one shape and layout are needed, not " + shape_of(a) + " and " + shape_of(b));
}

// Whether `a`, which broadcasts against x, has its last dim.
template <class X>
bool has_last(const char* name, const X& x, const Strides& a) {
    const size_t last = x.ndim() - 1;
    if (x.shape(last) > 1 && a[last] != 0 && a[last] != 1 && x.size() > 0)
        refuse(name, "statistics and weights must be contiguous along the last dim, or have one number there");
    return x.shape(last) > 1 && a[last] == 1;
}

// The layout of all dims but the last, whose arrays have these strides.
template <int N, class X>
Layout<N> rows_of(const X& x, const std::array<Strides, N>& strides) {
    Layout<N> found;
    for (size_t d = 0; d + 1 < x.ndim(); ++d) {
        std::array<Index, N> step;
        for (size_t i = 0; i < N; ++i) step[i] = strides[i][d];
        found.append(Index(x.shape(d)), step);
    }
    found.end_in_rows();
    return found;
}

template <class X>
Strides strides_of(const X& x) {
    Strides found{};
    for (size_t d = 0; d < x.ndim(); ++d) found[d] = Index(x.stride(d));
    return found;
}

// The dims of x sorted into those that `sums` has and those that it has as 1 or not at all.
template <int N, class X>
Reduction<N> reduction(const char* name, const X& x, const std::array<Strides, N>& strides, const Strides& sums) {
    Reduction<N> found;
    const bool columns = has_last(name, x, sums);
    if (columns) found.columns = Index(x.shape(x.ndim() - 1));
    for (size_t d = 0; d + (columns ? 1 : 0) < x.ndim(); ++d) {
        std::array<Index, N> step;
        std::array<Index, N + 1> both;
        for (size_t i = 0; i < N; ++i) step[i] = both[i] = strides[i][d];
        both[N] = sums[d];
        sums[d] == 0 ? found.summed.append(Index(x.shape(d)), step) : found.kept.append(Index(x.shape(d)), both);
    }
    found.kept.end_in_rows(), found.summed.end_in_rows();
    return found;
}

// Whether the statistics are (N, 1, ..., C) and gamma (C,): for each sample what batch normalization takes.
template <class X, class A, class G>
bool by_sample(const X& x, const A& statistics, const G& gamma) {
    const size_t last = x.ndim() - 1;
    bool found = statistics.ndim() == x.ndim() && gamma.ndim() == 1 && gamma.shape(0) == x.shape(last) &&
                 statistics.shape(0) == x.shape(0) && statistics.shape(last) == x.shape(last);
    for (size_t d = 1; found && d < last; ++d) found = statistics.shape(d) == 1;
    return found && x.ndim() > 1 && (x.shape(last) == 1 || statistics.stride(last) == 1);
}

template <class S>
void define(nb::module_& m) {
    using I = const In<S>&;
    using O = const Out<S>&;
    using NumbersIn = const In<Real<S>>&;
    using StatisticIn = const In<double>&;
    using StatisticOut = const Out<double>&;
    const auto arg = [](const char* name) { return nb::arg(name).noconvert(); };

    def(
        m, "moments_of",
        [](I x, StatisticOut mean, StatisticOut m2) {
            const char* name = "moments_of";
            require_dims(name, x.ndim(), 1), require_rows(name, x), require_pair(name, mean, m2);
            const Strides sums = broadcast(name, x, mean);
            moments_of<S>(reduction<1>(name, x, {strides_of(x)}, sums), x.data(), mean.data(), m2.data());
        },
        arg("x"), arg("mean"), arg("m2"));

    def(
        m, "normalize_by",
        [](I x, StatisticIn mean, StatisticIn rstd, NumbersIn gamma, NumbersIn beta, O out,
           const std::optional<In<S>>& add, double slope) {
            const char* name = "normalize_by";
            require_slope(name, slope);
            if (add) positions(name, 0, x, *add);
            positions(name, 0, x, out), require_pair(name, mean, rstd), require_pair(name, gamma, beta);
            const S* added = add ? add->data() : nullptr;
            const Strides s = broadcast(name, x, mean), g = broadcast(name, x, gamma), own = strides_of(x),
                          a = add ? strides_of(*add) : own;
            const Index n = Index(x.shape(x.ndim() - 1));
            const bool statistic = has_last(name, x, s), each = has_last(name, x, g);
            if (by_sample(x, mean, gamma)) {
                Layout<3> rows;
                for (size_t d = 1; d + 1 < x.ndim(); ++d)
                    rows.append(Index(x.shape(d)), {own[d], a[d], Index(out.stride(d))});
                rows.end_in_rows();
                return in_tasks(Index(x.shape(0)), Index(x.size()), [&](Index i) {
                    normalize<S>(rows, n, x.data() + i * own[0], added ? added + i * a[0] : nullptr,
                                 mean.data() + i * s[0], rstd.data() + i * s[0], gamma.data(), beta.data(), slope,
                                 out.data() + i * out.stride(0));
                });
            }
            normalize_by<S>(rows_of<5>(x, {own, a, strides_of(out), s, g}), n, statistic, each, x.data(), added,
                            mean.data(), rstd.data(), gamma.data(), beta.data(), slope, out.data());
        },
        arg("x"), arg("mean"), arg("rstd"), arg("gamma"), arg("beta"), arg("out"), arg("add") = nb::none(),
        arg("slope") = 1.0);

    def(
        m, "normalize_grad_of",
        [](I dy, I x, StatisticIn mean, StatisticIn rstd, StatisticOut sum_dy, StatisticOut sum_dy_xhat) {
            const char* name = "normalize_grad_of";
            positions(name, 0, dy, x), require_pair(name, mean, rstd), require_pair(name, sum_dy, sum_dy_xhat);
            const Strides s = broadcast(name, x, mean), sums = broadcast(name, x, sum_dy);
            normalize_grad_of<S>(reduction<3>(name, x, {strides_of(dy), strides_of(x), s}, sums), has_last(name, x, s),
                                 dy.data(), x.data(), mean.data(), rstd.data(), sum_dy.data(), sum_dy_xhat.data());
        },
        arg("dy"), arg("x"), arg("mean"), arg("rstd"), arg("sum_dy"), arg("sum_dy_xhat"));

    def(
        m, "normalize_dx_by",
        [](I dy, I x, StatisticIn mean, StatisticIn rstd, NumbersIn gamma, StatisticIn mean_g, StatisticIn mean_g_xhat,
           O out) {
            const char* name = "normalize_dx_by";
            positions(name, 0, dy, x, out), require_pair(name, mean, rstd), require_pair(name, mean_g, mean_g_xhat);
            const Strides s = broadcast(name, x, mean), g = broadcast(name, x, gamma), p = broadcast(name, x, mean_g);
            const Index n = Index(x.shape(x.ndim() - 1));
            const bool statistic = has_last(name, x, s), each = has_last(name, x, g), means = has_last(name, x, p);
            if (by_sample(x, mean, gamma) && by_sample(x, mean_g, gamma)) {
                const auto rows = positions(name, 1, dy, x, out);
                return in_tasks(Index(x.shape(0)), Index(x.size()), [&](Index i) {
                    normalize_dx<S>(rows, n, dy.data() + i * dy.stride(0), x.data() + i * x.stride(0),
                                    mean.data() + i * s[0], rstd.data() + i * s[0], gamma.data(),
                                    mean_g.data() + i * p[0], mean_g_xhat.data() + i * p[0],
                                    out.data() + i * out.stride(0));
                });
            }
            const auto rows = rows_of<6>(x, {strides_of(dy), strides_of(x), strides_of(out), s, g, p});
            normalize_dx_by<S>(rows, n, statistic, each, means, dy.data(), x.data(), mean.data(), rstd.data(),
                                  gamma.data(), mean_g.data(), mean_g_xhat.data(), out.data());
        },
        arg("dy"), arg("x"), arg("mean"), arg("rstd"), arg("gamma"), arg("mean_g"), arg("mean_g_xhat"), arg("out"));
}

}  // namespace

void define_statistics(nb::module_& m) {
    define<float>(m);
    define<double>(m);
    define<bf16>(m);
    for (const char* name : {"moments_of", "normalize_by", "normalize_grad_of", "normalize_dx_by"})
        refuse_others(m, name, TAKES);
}

}  // namespace hpctrain
