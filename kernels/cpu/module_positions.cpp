// Average pooling, resampling, and normalization by statistics of any shape, in hpctrain._native.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "arrays.h"
#include "bindings.h"
#include "norms.h"
#include "sampling.h"
#include "spans.h"

namespace hpctrain {
namespace {

using Numbers = std::vector<Index>;
using Strides = std::array<Index, MAX_DIMS>;

// How far element i + 1 of `a`, which broadcasts against x, lies behind element i, for each dim of x: 0 where it has
// one for all.
template <class X, class A>
Strides broadcast(const char* name, const X& x, const A& a) {
    Strides found{};
    bool fits = a.ndim() <= x.ndim();
    for (size_t d = 0; fits && d < a.ndim(); ++d) {
        const size_t at = x.ndim() - a.ndim() + d;
        fits = a.shape(d) == x.shape(at) || a.shape(d) == 1;
        found[at] = a.shape(d) == 1 ? 0 : Index(a.stride(d));
    }
    if (!fits) refuse(name, "an array of shape " + shape_of(a) + " does not broadcast against " + shape_of(x));
    return found;
}

// --- average pooling ---

template <class X, class Y, class D>
AveragePool average_pool(const char* name, const X& x, const Y& y, const D& divisor, const Numbers& kernel,
                         const Numbers& stride) {
    const size_t dims = kernel.size();
    if (dims < 1 || dims > 3 || stride.size() != dims || x.ndim() != dims + 2 || y.ndim() != dims + 2) {
        refuse(name, "kernel and stride need one number per position dim, of which there are 1 to 3, not " +
                         std::to_string(dims) + " and " + std::to_string(stride.size()) + " beside " + shape_of(x) +
                         " and " + shape_of(y));
    }
    require_rows(name, x), require_rows(name, y), require_rows(name, divisor);
    const Strides by = broadcast(name, y, divisor);
    AveragePool p;
    p.samples = Index(x.shape(0)), p.channels = Index(x.shape(dims + 1));
    p.x[0] = Index(x.stride(0)), p.y[0] = Index(y.stride(0)), p.divisor[0] = by[0], p.divisor[4] = by[dims + 1];
    bool fits = x.shape(0) == y.shape(0) && x.shape(dims + 1) == y.shape(dims + 1);
    for (size_t d = 0; d < dims; ++d) {
        if (kernel[d] < 1 || stride[d] < 1) refuse(name, "kernel and stride start at 1");
        const size_t to = 3 - dims + d;
        p.kernel[to] = kernel[d], p.stride[to] = stride[d];
        p.input[to] = Index(x.shape(d + 1)), p.output[to] = Index(y.shape(d + 1));
        p.x[to + 1] = Index(x.stride(d + 1)), p.y[to + 1] = Index(y.stride(d + 1)), p.divisor[to + 1] = by[d + 1];
        const Index room = p.input[to] - kernel[d];
        fits = fits && p.output[to] == (room < 0 ? 0 : room / stride[d] + 1);
    }
    if (!fits) refuse(name, "windows over " + shape_of(x) + " do not give outputs " + shape_of(y));
    return p;
}

// --- resampling ---

// What each output, or for the adjoint each input, is made of.
struct Terms {
    Numbers first{0}, offset;
    std::vector<double> weight;
};

template <class I, class W>
Terms terms_of(const char* name, const I& index, const W& weight, Index read, Index read_step, Index written,
               bool adjoint) {
    const Index outputs = Index(index.shape(0)), taps = Index(index.shape(1));
    const auto at = [](const auto& a, Index o, Index k) { return a.data()[o * a.stride(0) + k * a.stride(1)]; };
    const Index inputs = adjoint ? written : read;
    Terms found;
    std::vector<Numbers> readers(size_t(adjoint ? inputs : 0));  // the taps that read an input
    for (Index o = 0; o < outputs; ++o) {
        for (Index k = 0; k < taps; ++k) {
            const Index i = Index(at(index, o, k));
            if (i < 0 || i >= inputs)
                refuse(name, "index " + std::to_string(i) + " of " + std::to_string(inputs) + " inputs");
            if (adjoint) {
                readers[size_t(i)].push_back(o * taps + k);
            } else {
                found.offset.push_back(i * read_step), found.weight.push_back(double(at(weight, o, k)));
            }
        }
        if (!adjoint) found.first.push_back(Index(found.offset.size()));
    }
    for (const Numbers& list : readers) {
        for (Index tap : list) {
            found.offset.push_back(tap / taps * read_step);
            found.weight.push_back(double(at(weight, tap / taps, tap % taps)));
        }
        found.first.push_back(Index(found.offset.size()));
    }
    return found;
}

// x is what is read and `out` what is written, in either direction.
template <class T, class X, class Y, class I, class W>
void resample_along(const char* name, const X& x, const Y& out, Index dim, const I& index, const W& weight,
                    bool adjoint) {
    require_dims(name, x.ndim(), 1);
    bool fits = x.ndim() == out.ndim() && dim >= 0 && dim < Index(x.ndim()) && index.ndim() == 2 && weight.ndim() == 2;
    for (size_t d = 0; fits && d < x.ndim(); ++d) fits = Index(d) == dim || x.shape(d) == out.shape(d);
    fits = fits && index.shape(0) == weight.shape(0) && index.shape(1) == weight.shape(1) &&
           index.shape(0) == (adjoint ? x.shape(size_t(dim)) : out.shape(size_t(dim)));
    if (!fits) {
        refuse(name, "index " + shape_of(index) + " and weight " + shape_of(weight) + " do not take " + shape_of(x) +
                         " to " + shape_of(out) + " along dim " + std::to_string(dim));
    }
    const size_t along = size_t(dim);
    const Terms terms = terms_of(name, index, weight, Index(x.shape(along)), Index(x.stride(along)),
                                 Index(out.shape(along)), adjoint);
    Resampling by;
    for (size_t d = 0; d < x.ndim(); ++d) {
        if (d != along) (d < along ? by.before : by.after).append(Index(x.shape(d)), {Index(x.stride(d)), Index(out.stride(d))});
    }
    by.before.end_in_rows(), by.after.end_in_runs();
    by.outputs = Index(out.shape(along)), by.out_step = Index(out.stride(along));
    by.first = terms.first.data(), by.offset = terms.offset.data(), by.weight = terms.weight.data();
    resample<T>(by, x.data(), out.data());
}

// --- normalization ---

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
    using A = Real<S>;
    using I = const In<S>&;
    using O = const Out<S>&;
    using NumbersIn = const In<A>&;
    using StatisticIn = const In<double>&;
    using StatisticOut = const Out<double>&;
    const auto arg = [](const char* name) { return nb::arg(name).noconvert(); };

    def(
        m, "avg_pool",
        [](I x, O out, NumbersIn divisor, const Numbers& kernel, const Numbers& stride) {
            const AveragePool p = average_pool("avg_pool", x, out, divisor, kernel, stride);
            avg_pool<S>(p, x.data(), out.data(), divisor.data());
        },
        arg("x"), arg("out"), arg("divisor"), arg("kernel"), arg("stride"));

    def(
        m, "avg_pool_dx",
        [](I dy, O out, NumbersIn divisor, const Numbers& kernel, const Numbers& stride) {
            const AveragePool p = average_pool("avg_pool_dx", out, dy, divisor, kernel, stride);
            avg_pool_dx<S>(p, dy.data(), out.data(), divisor.data());
        },
        arg("dy"), arg("out"), arg("divisor"), arg("kernel"), arg("stride"));

    const auto define_resample = [&](auto index) {
        using Whole = decltype(index);
        def(
            m, "resample",
            [](I x, O out, Index dim, const In<Whole>& index, NumbersIn weight) {
                resample_along<S>("resample", x, out, dim, index, weight, false);
            },
            arg("x"), arg("out"), arg("dim"), arg("index"), arg("weight"));
        def(
            m, "resample_dx",
            [](I dy, O out, Index dim, const In<Whole>& index, NumbersIn weight) {
                resample_along<S>("resample_dx", dy, out, dim, index, weight, true);
            },
            arg("dy"), arg("out"), arg("dim"), arg("index"), arg("weight"));
    };
    define_resample(std::int64_t());
    define_resample(std::int32_t());

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

void define_positions(nb::module_& m) {
    define<float>(m);
    define<double>(m);
    define<bf16>(m);
    for (const char* name : {"avg_pool", "avg_pool_dx", "resample", "resample_dx", "moments_of", "normalize_by",
                             "normalize_grad_of", "normalize_dx_by"}) {
        refuse_others(m, name,
                      "takes NumPy arrays of one type, float32 or float64 (statistics always float64, indices int32 or "
                      "int64), outputs writeable");
    }
}

}  // namespace hpctrain
