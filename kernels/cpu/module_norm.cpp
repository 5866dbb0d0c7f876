// The part of hpctrain._native that works with vectors of one number per channel: bias and normalization.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "arrays.h"
#include "bindings.h"
#include "kernels.h"

namespace hpctrain {
namespace {

template <class T>
void define(nb::module_& m) {
    using I = const In<T>&;
    using O = const Out<T>&;
    using VectorIn = const In<Real<T>>&;
    using VectorOut = const Out<Real<T>>&;
    using Maybe = const std::optional<In<T>>&;
    using StatisticIn = const In<double>&;
    using StatisticOut = const Out<double>&;
    const auto arg = [](const char* name) { return nb::arg(name).noconvert(); };

    def(
        m, "bias_add",
        [](O y, VectorIn b) {
            const auto rows = positions("bias_add", 0, y);
            bias_add<T>(rows, channels("bias_add", y, b), y.data(), b.data());
        },
        arg("y"), arg("b"));

    def(
        m, "bias_grad",
        [](I dy, VectorOut out) {
            const auto rows = positions("bias_grad", 0, dy, dy);
            T* unchanged = const_cast<T*>(dy.data());
            bias_grad<T>(rows, channels("bias_grad", dy, out), unchanged, nullptr, 1, out.data());
        },
        arg("dy"), arg("out"));

    def(
        m, "bias_grad",
        [](O dy, VectorOut out, I y, double slope) {
            require_slope("bias_grad", slope);
            const auto rows = positions("bias_grad", 0, dy, y);
            bias_grad<T>(rows, channels("bias_grad", dy, out), dy.data(), y.data(), slope, out.data());
        },
        arg("dy"), arg("out"), arg("y"), arg("slope"));

    def(
        m, "moments",
        [](I x, StatisticOut mean, StatisticOut m2) {
            const auto rows = positions("moments", 0, x);
            moments<T>(rows, channels("moments", x, mean, m2), x.data(), mean.data(), m2.data());
        },
        arg("x"), arg("mean"), arg("m2"));

    def(
        m, "normalize",
        [](I x, StatisticIn mean, StatisticIn rstd, VectorIn gamma, VectorIn beta, O out, Maybe add, double slope) {
            require_slope("normalize", slope);
            const auto rows = add ? positions("normalize", 0, x, *add, out) : positions("normalize", 0, x, x, out);
            normalize<T>(rows, channels("normalize", x, mean, rstd, gamma, beta), x.data(), add ? add->data() : nullptr,
                         mean.data(), rstd.data(), gamma.data(), beta.data(), slope, out.data());
        },
        arg("x"), arg("mean"), arg("rstd"), arg("gamma"), arg("beta"), arg("out"), arg("add") = nb::none(),
        arg("slope") = 1.0);

    def(
        m, "normalize_grad",
        [](I dy, I x, StatisticIn mean, StatisticIn rstd, StatisticOut sum_dy, StatisticOut sum_dy_xhat) {
            const auto rows = positions("normalize_grad", 0, dy, x, dy);
            T* unchanged = const_cast<T*>(dy.data());
            normalize_grad<T>(rows, channels("normalize_grad", x, mean, rstd, sum_dy, sum_dy_xhat), unchanged, x.data(),
                              nullptr, 1, mean.data(), rstd.data(), sum_dy.data(), sum_dy_xhat.data());
        },
        arg("dy"), arg("x"), arg("mean"), arg("rstd"), arg("sum_dy"), arg("sum_dy_xhat"));

    def(
        m, "normalize_grad",
        [](O dy, I x, StatisticIn mean, StatisticIn rstd, StatisticOut sum_dy, StatisticOut sum_dy_xhat, I y,
           double slope) {
            require_slope("normalize_grad", slope);
            const auto rows = positions("normalize_grad", 0, dy, x, y);
            normalize_grad<T>(rows, channels("normalize_grad", x, mean, rstd, sum_dy, sum_dy_xhat), dy.data(), x.data(),
                              y.data(), slope, mean.data(), rstd.data(), sum_dy.data(), sum_dy_xhat.data());
        },
        arg("dy"), arg("x"), arg("mean"), arg("rstd"), arg("sum_dy"), arg("sum_dy_xhat"), arg("y"), arg("slope"));

    def(
        m, "normalize_dx",
        [](I dy, I x, StatisticIn mean, StatisticIn rstd, VectorIn gamma, StatisticIn mean_g, StatisticIn mean_g_xhat,
           O out) {
            const auto rows = positions("normalize_dx", 0, dy, x, out);
            normalize_dx<T>(rows, channels("normalize_dx", x, mean, rstd, gamma, mean_g, mean_g_xhat), dy.data(),
                            x.data(), mean.data(), rstd.data(), gamma.data(), mean_g.data(), mean_g_xhat.data(),
                            out.data());
        },
        arg("dy"), arg("x"), arg("mean"), arg("rstd"), arg("gamma"), arg("mean_g"), arg("mean_g_xhat"), arg("out"));
}

}  // namespace

void define_normalization(nb::module_& m) {
    define<float>(m);
    define<double>(m);
    define<bf16>(m);
    for (const char* name : {"bias_add", "bias_grad", "moments", "normalize", "normalize_grad", "normalize_dx"})
        refuse_others(m, name, TAKES);
}

}  // namespace hpctrain
