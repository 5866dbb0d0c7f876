// Average pooling and resampling in hpctrain._native.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "bindings.h"
#include "broadcast.h"
#include "sampling.h"

namespace hpctrain {
namespace {

using Numbers = std::vector<Index>;

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

template <class S>
void define(nb::module_& m) {
    using A = Real<S>;
    using I = const In<S>&;
    using O = const Out<S>&;
    using NumbersIn = const In<A>&;
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
}

}  // namespace

void define_positions(nb::module_& m) {
    define<float>(m);
    define<double>(m);
    define<bf16>(m);
    for (const char* name : {"avg_pool", "avg_pool_dx", "resample", "resample_dx"}) {
        refuse_others(m, name,
                      "takes NumPy arrays of one type, float32, float64 or, as uint16, bf16 (weights and divisors beside "
                      "bf16 float32, indices int32 or int64), outputs writeable");
    }
}

}  // namespace hpctrain
