// hpctrain._native: the kernels for NumPy arrays. Arrays are taken as they are, never converted or copied; shapes are
// checked here, once, and every function lets other Python threads run.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>

#include "arrays.h"
#include "bindings.h"
#include "kernels.h"
#include "runs.h"

namespace hpctrain {
namespace {

constexpr const char* ACTIVATIONS[] = {"leaky_relu", "gelu", "silu", "sigmoid", "tanh", "softplus"};

// The place of a name in ACTIVATIONS is its value in the enumeration.
Activation activation_of(const char* name, const std::string& kind) {
    std::string known;
    for (int place = 0; place < int(std::size(ACTIVATIONS)); ++place) {
        if (kind == ACTIVATIONS[place]) return Activation(place);
        known += (place ? ", " : "") + std::string(ACTIVATIONS[place]);
    }
    refuse(name, "activation '" + kind + "' does not exist; choose one of " + known);
}

// Contiguous vectors of one length.
template <class A, class... More>
void vector(const char* name, const A& a, const More&... more) {
    if (a.ndim() != 1) refuse(name, "1D arrays are needed, not " + shape_of(a));
    channels(name, a, a, more...);
}

// Of a few channels single ones are faster than short vectors.
constexpr Index FEW = 16;

template <class X, class Y, class I>
Pooling pooling(const Windows& windows, const X& x, const Y& y, const I& index) {
    return {windows.outputs,
            {Index(x.stride(0)), Index(y.stride(0)), Index(index.stride(0))},
            Index(x.shape(0)),
            Index(x.shape(x.ndim() - 1)),
            windows.taps.data(),
            std::int32_t(windows.taps.size()),
            windows.disjoint && Index(x.shape(x.ndim() - 1)) >= FEW};
}

template <class T>
void define(nb::module_& m) {
    using I = const In<T>&;
    using O = const Out<T>&;
    using IndexIn = const In<std::int32_t>&;
    using IndexOut = const Out<std::int32_t>&;
    using Numbers = std::vector<Index>;
    const auto arg = [](const char* name) { return nb::arg(name).noconvert(); };

    def(
        m, "add", [](I a, I b, O out) { add<T>(elements("add", a, b, out), a.data(), b.data(), out.data()); }, arg("a"),
        arg("b"), arg("out"));

    def(
        m, "multiply",
        [](I a, I b, O out) { multiply<T>(elements("multiply", a, b, out), a.data(), b.data(), out.data()); }, arg("a"),
        arg("b"), arg("out"));

    def(m, "relu", [](I x, O out) { relu<T>(elements("relu", x, out), x.data(), out.data()); }, arg("x"), arg("out"));

    def(
        m, "relu_dx",
        [](I dy, I y, O out) { relu_dx<T>(elements("relu_dx", dy, y, out), dy.data(), y.data(), out.data()); },
        arg("dy"), arg("y"), arg("out"));

    def(
        m, "activation_grad",
        [](O dy, I y, double slope) {
            require_slope("activation_grad", slope);
            activation_grad<T>(elements("activation_grad", dy, y), dy.data(), y.data(), slope);
        },
        arg("dy"), arg("y"), arg("slope"));

    def(
        m, "activate",
        [](const std::string& kind, I x, O out, double slope) {
            const Activation f = activation_of("activate", kind);
            activate<T>(f, elements("activate", x, out), x.data(), out.data(), slope);
        },
        arg("kind"), arg("x"), arg("out"), arg("slope"));

    def(
        m, "activate_dx",
        [](const std::string& kind, I dy, I x, O out, double slope) {
            const Activation f = activation_of("activate_dx", kind);
            activate_dx<T>(f, elements("activate_dx", dy, x, out), dy.data(), x.data(), out.data(), slope);
        },
        arg("kind"), arg("dy"), arg("x"), arg("out"), arg("slope"));

    def(
        m, "max_pool",
        [](I x, O out, IndexOut index, const Numbers& kernel, const Numbers& stride, const Numbers& dilation) {
            const Windows w = windows("max_pool", x, out, index, kernel, stride, dilation);
            max_pool<T>(pooling(w, x, out, index), x.data(), out.data(), index.data());
        },
        arg("x"), arg("out"), arg("index"), arg("kernel"), arg("stride"), arg("dilation"));

    def(
        m, "max_pool_dx",
        [](I dy, IndexIn index, O out, const Numbers& kernel, const Numbers& stride, const Numbers& dilation) {
            const Windows w = windows("max_pool_dx", out, dy, index, kernel, stride, dilation);
            const Pooling p = pooling(w, out, dy, index);
            if (!p.disjoint || !w.cover) {
                by_runs(elements("max_pool_dx", out),
                        [&](Index n, auto& at) { std::fill_n(out.data() + at[0], n, T{}); });
            }
            max_pool_dx<T>(p, dy.data(), index.data(), out.data());
        },
        arg("dy"), arg("index"), arg("out"), arg("kernel"), arg("stride"), arg("dilation"));

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
                                    out.data() + n * out.stride(0), Real<T>(scale));
            }
        },
        arg("dy"), arg("out"), arg("scale"));
}

// Weights are never bf16.
template <class T>
void define_updates(nb::module_& m) {
    using I = const In<T>&;
    using O = const Out<T>&;
    const auto arg = [](const char* name) { return nb::arg(name).noconvert(); };

    def(
        m, "sgd_update",
        [](O w, I g, O velocity, double lr, double momentum, double weight_decay, bool nesterov) {
            vector("sgd_update", w, g, velocity);
            sgd_update<T>(Index(w.shape(0)), w.data(), g.data(), velocity.data(), T(lr), T(momentum), T(weight_decay),
                          nesterov);
        },
        arg("w"), arg("g"), arg("velocity"), arg("lr"), arg("momentum"), arg("weight_decay"), arg("nesterov"));

    def(
        m, "adam_update",
        [](O w, I g, O mean, O square, double lr, double beta1, double beta2, double eps, double weight_decay,
           bool decoupled, Index update) {
            vector("adam_update", w, g, mean, square);
            if (update < 1) refuse("adam_update", "updates are counted from 1, not " + std::to_string(update));
            AdamFactors<T> f;
            f.rate = T(lr / (1 - std::pow(beta1, double(update))));
            f.correction = T(1 / std::sqrt(1 - std::pow(beta2, double(update))));
            f.beta1 = T(beta1), f.rest1 = T(1 - beta1), f.beta2 = T(beta2), f.rest2 = T(1 - beta2);
            f.eps = T(eps), f.weight_decay = T(decoupled ? 0 : weight_decay);
            f.keep = T(decoupled ? 1 - lr * weight_decay : 1);
            adam_update<T>(Index(w.shape(0)), w.data(), g.data(), mean.data(), square.data(), f);
        },
        arg("w"), arg("g"), arg("mean"), arg("square"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"),
        arg("weight_decay"), arg("decoupled"), arg("update"));

    def(
        m, "lars_update",
        [](O w, I g, O velocity, double rate, double momentum, double weight_decay) {
            vector("lars_update", w, g, velocity);
            lars_update<T>(Index(w.shape(0)), w.data(), g.data(), velocity.data(), T(rate), T(momentum),
                           T(weight_decay));
        },
        arg("w"), arg("g"), arg("velocity"), arg("rate"), arg("momentum"), arg("weight_decay"));

    def(
        m, "sum_squares",
        [](I x) {
            vector("sum_squares", x);
            return sum_squares<T>(Index(x.shape(0)), x.data());
        },
        arg("x"));
}

void define_refusals(nb::module_& m) {
    for (const char* name : {"add", "multiply", "relu", "relu_dx", "activation_grad", "activate", "activate_dx",
                             "max_pool", "max_pool_dx", "sum_positions", "spread_positions"}) {
        refuse_others(m, name, TAKES);
    }
    for (const char* name : {"sgd_update", "adam_update", "lars_update", "sum_squares"})
        refuse_others(m, name, "takes NumPy arrays of one type, float32 or float64, outputs writeable");
}

}  // namespace

void refuse_others(nb::module_& m, const char* name, const char* takes) {
    m.def(name, [name, takes](const nb::args& arguments, const nb::kwargs&) {
        std::string got;
        for (nb::handle a : arguments) {
            const bool array = nb::hasattr(a, "dtype");
            got += (got.empty() ? "" : ", ") + std::string(nb::str(array ? a.attr("dtype") : a.type()).c_str());
        }
        throw nb::type_error((std::string("hpctrain._native.") + name + ": " + takes + "; got " + got).c_str());
    });
}

}  // namespace hpctrain

NB_MODULE(_native, m) {
    m.doc() = "Compiled kernels of the `native` backend; their meaning is that of hpctrain.backends.base.Backend.";
    hpctrain::define<float>(m);
    hpctrain::define<double>(m);
    hpctrain::define<hpctrain::bf16>(m);
    hpctrain::define_updates<float>(m);
    hpctrain::define_updates<double>(m);
    hpctrain::define_refusals(m);
    hpctrain::define_normalization(m);
    hpctrain::define_engine(m);
    hpctrain::define_losses(m);
    hpctrain::define_planner(m);
    hpctrain::define_positions(m);
    hpctrain::define_shared(m);
    hpctrain::define_statistics(m);
}
