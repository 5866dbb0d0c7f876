// hpctrain._native: the kernels for NumPy arrays. Arrays are taken as they are, never converted or copied; shapes are
// checked here, once, and every function lets other Python threads run.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <sstream>
#include <string>

#include "kernels.h"

namespace nb = nanobind;

namespace hpctrain {
namespace {

template <class T>
using In = nb::ndarray<const T, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::device::cpu>;

template <class A>
std::string shape_of(const A& a) {
    std::ostringstream text;
    text << "(";
    for (size_t d = 0; d < a.ndim(); ++d) text << (d ? ", " : "") << a.shape(d);
    text << ")";
    return text.str();
}

[[noreturn]] void refuse(const char* name, const std::string& what) {
    throw std::invalid_argument(std::string("hpctrain._native.") + name + ": " + what);
}

void require_dims(const char* name, size_t ndim, size_t least) {
    if (ndim < least || ndim >= size_t(MAX_DIMS)) {
        refuse(name, "an array of " + std::to_string(ndim) + " dims; it takes " + std::to_string(least) + " to " +
                         std::to_string(MAX_DIMS - 1));
    }
}

// The layout of dims [begin, end) of arrays of one shape.
template <class First, class... Rest>
Layout<1 + sizeof...(Rest)> layout_of(const char* name, size_t begin, size_t end, const First& a, const Rest&... rest) {
    const auto same = [&](const auto& b) {
        bool equal = a.ndim() == b.ndim();
        for (size_t d = 0; equal && d < a.ndim(); ++d) equal = a.shape(d) == b.shape(d);
        if (!equal) refuse(name, "arrays of one shape are needed, not " + shape_of(a) + " and " + shape_of(b));
    };
    (same(rest), ...);
    Layout<1 + sizeof...(Rest)> layout;
    for (size_t d = begin; d < end; ++d)
        layout.append(Index(a.shape(d)), {Index(a.stride(d)), Index(rest.stride(d))...});
    return layout;
}

template <class... A>
Layout<sizeof...(A)> elements(const char* name, const A&... arrays) {
    size_t ndim = 0;
    ((ndim = arrays.ndim()), ...);
    require_dims(name, ndim, 0);
    auto layout = layout_of(name, 0, ndim, arrays...);
    layout.end_in_runs();
    return layout;
}

template <class A>
void require_rows(const char* name, const A& a) {
    const size_t last = a.ndim() - 1;
    if (a.size() > 0 && a.shape(last) > 1 && a.stride(last) != 1) {  // without elements NumPy says any stride
        refuse(name, "channels must be contiguous, but those of an array of shape " + shape_of(a) + " lie " +
                         std::to_string(a.stride(last)) + " elements apart; pass numpy.ascontiguousarray(...)");
    }
}

// The positions of channels-last arrays, from dim `begin` on.
template <class... A>
Layout<sizeof...(A)> positions(const char* name, size_t begin, const A&... arrays) {
    size_t ndim = 0;
    ((ndim = arrays.ndim()), ...);
    (require_dims(name, arrays.ndim(), begin + 1), ...);
    (require_rows(name, arrays), ...);
    auto layout = layout_of(name, begin, ndim - 1, arrays...);
    layout.end_in_rows();
    return layout;
}

// Vectors with one contiguous element per channel; the number of channels.
template <class A, class... Vectors>
Index channels(const char* name, const A& a, const Vectors&... vectors) {
    const size_t count = a.shape(a.ndim() - 1);
    const auto check = [&](const auto& v) {
        if (v.ndim() != 1 || v.shape(0) != count || (count > 1 && v.stride(0) != 1)) {
            refuse(name, "a contiguous vector of " + std::to_string(count) +
                             " channels is needed, not an array of shape " + shape_of(v));
        }
    };
    (check(vectors), ...);
    return Index(count);
}

// (N, C) beside an array (N, ..., C)
template <class A, class B>
void require_samples(const char* name, const A& whole, const B& reduced) {
    if (whole.ndim() < 2 || reduced.ndim() != 2 || reduced.shape(0) != whole.shape(0) ||
        reduced.shape(1) != whole.shape(whole.ndim() - 1)) {
        refuse(name, "(N, C) beside (N, ..., C) is needed, not " + shape_of(reduced) + " beside " + shape_of(whole));
    }
    require_rows(name, reduced);
}

template <class F, class... Names>
void def(nb::module_& m, const char* name, F function, Names... names) {
    m.def(name, function, names.noconvert()..., nb::call_guard<nb::gil_scoped_release>());
}

template <class T>
void define(nb::module_& m) {
    using I = const In<T>&;
    using O = const Out<T>&;
    using StatisticIn = const In<double>&;
    using StatisticOut = const Out<double>&;
    const auto arg = [](const char* name) { return nb::arg(name); };

    def(
        m, "add", [](I a, I b, O out) { add<T>(elements("add", a, b, out), a.data(), b.data(), out.data()); }, arg("a"),
        arg("b"), arg("out"));

    def(m, "relu", [](I x, O out) { relu<T>(elements("relu", x, out), x.data(), out.data()); }, arg("x"), arg("out"));

    def(
        m, "relu_dx",
        [](I dy, I y, O out) { relu_dx<T>(elements("relu_dx", dy, y, out), dy.data(), y.data(), out.data()); },
        arg("dy"), arg("y"), arg("out"));

    def(
        m, "bias_add",
        [](O y, I b) {
            const auto rows = positions("bias_add", 0, y);
            bias_add<T>(rows, channels("bias_add", y, b), y.data(), b.data());
        },
        arg("y"), arg("b"));

    def(
        m, "bias_grad",
        [](I dy, O out) {
            const auto rows = positions("bias_grad", 0, dy);
            bias_grad<T>(rows, channels("bias_grad", dy, out), dy.data(), out.data());
        },
        arg("dy"), arg("out"));

    def(
        m, "sum_positions",
        [](I x, O out, double scale) {
            require_samples("sum_positions", x, out);
            const auto rows = positions("sum_positions", 1, x);
            for (Index n = 0; n < Index(x.shape(0)); ++n) {
                sum_positions<T>(rows, Index(out.shape(1)), x.data() + n * x.stride(0), out.data() + n * out.stride(0),
                                 scale);
            }
        },
        arg("x"), arg("out"), arg("scale"));

    def(
        m, "spread_positions",
        [](I dy, O out, double scale) {
            require_samples("spread_positions", out, dy);
            const auto rows = positions("spread_positions", 1, out);
            for (Index n = 0; n < Index(out.shape(0)); ++n) {
                spread_positions<T>(rows, Index(dy.shape(1)), dy.data() + n * dy.stride(0),
                                    out.data() + n * out.stride(0), T(scale));
            }
        },
        arg("dy"), arg("out"), arg("scale"));

    def(
        m, "moments",
        [](I x, StatisticOut mean, StatisticOut m2) {
            const auto rows = positions("moments", 0, x);
            moments<T>(rows, channels("moments", x, mean, m2), x.data(), mean.data(), m2.data());
        },
        arg("x"), arg("mean"), arg("m2"));

    def(
        m, "normalize",
        [](I x, StatisticIn mean, StatisticIn rstd, I gamma, I beta, O out) {
            const auto rows = positions("normalize", 0, x, out);
            normalize<T>(rows, channels("normalize", x, mean, rstd, gamma, beta), x.data(), mean.data(), rstd.data(),
                         gamma.data(), beta.data(), out.data());
        },
        arg("x"), arg("mean"), arg("rstd"), arg("gamma"), arg("beta"), arg("out"));

    def(
        m, "normalize_grad",
        [](I dy, I x, StatisticIn mean, StatisticIn rstd, StatisticOut sum_dy, StatisticOut sum_dy_xhat) {
            const auto rows = positions("normalize_grad", 0, dy, x);
            normalize_grad<T>(rows, channels("normalize_grad", x, mean, rstd, sum_dy, sum_dy_xhat), dy.data(), x.data(),
                              mean.data(), rstd.data(), sum_dy.data(), sum_dy_xhat.data());
        },
        arg("dy"), arg("x"), arg("mean"), arg("rstd"), arg("sum_dy"), arg("sum_dy_xhat"));

    def(
        m, "normalize_dx",
        [](I dy, I x, StatisticIn mean, StatisticIn rstd, I gamma, StatisticIn mean_dy, StatisticIn mean_dy_xhat,
           O out) {
            const auto rows = positions("normalize_dx", 0, dy, x, out);
            normalize_dx<T>(rows, channels("normalize_dx", x, mean, rstd, gamma, mean_dy, mean_dy_xhat), dy.data(),
                            x.data(), mean.data(), rstd.data(), gamma.data(), mean_dy.data(), mean_dy_xhat.data(),
                            out.data());
        },
        arg("dy"), arg("x"), arg("mean"), arg("rstd"), arg("gamma"), arg("mean_dy"), arg("mean_dy_xhat"), arg("out"));

    def(
        m, "sgd_update",
        [](O w, I g, O velocity, double lr, double momentum, double weight_decay, bool nesterov) {
            if (w.ndim() != 1) refuse("sgd_update", "1D arrays are needed, not " + shape_of(w));
            channels("sgd_update", w, w, g, velocity);
            sgd_update<T>(Index(w.shape(0)), w.data(), g.data(), velocity.data(), T(lr), T(momentum), T(weight_decay),
                          nesterov);
        },
        arg("w"), arg("g"), arg("velocity"), arg("lr"), arg("momentum"), arg("weight_decay"), arg("nesterov"));
}

// Tried last: says what was wrong with the arguments, which nanobind's own message does not.
void define_refusals(nb::module_& m) {
    for (const char* name : {"add", "relu", "relu_dx", "bias_add", "bias_grad", "sum_positions", "spread_positions",
                             "moments", "normalize", "normalize_grad", "normalize_dx", "sgd_update"}) {
        m.def(name, [name](const nb::args& arguments) {
            std::string got;
            for (nb::handle a : arguments) {
                const bool array = nb::hasattr(a, "dtype");
                got += (got.empty() ? "" : ", ") + std::string(nb::str(array ? a.attr("dtype") : a.type()).c_str());
            }
            const std::string text =
                std::string("hpctrain._native.") + name +
                ": takes NumPy arrays of one type, float32 or float64 (statistics always float64), "
                "outputs writeable; got " +
                got;
            throw nb::type_error(text.c_str());
        });
    }
}

}  // namespace
}  // namespace hpctrain

NB_MODULE(_native, m) {
    m.doc() = "Compiled kernels of the `native` backend; their meaning is that of hpctrain.backends.base.Backend.";
    hpctrain::define<float>(m);
    hpctrain::define<double>(m);
    hpctrain::define_refusals(m);
}
