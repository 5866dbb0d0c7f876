// Softmax and losses in hpctrain._native.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include "arrays.h"
#include "bindings.h"
#include "losses.h"

namespace hpctrain {
namespace {

using AnyIn = nb::ndarray<nb::ro, nb::device::cpu>;

constexpr const char* LOSSES[] = {"squared", "absolute", "huber", "logistic"};

// The place of a name in LOSSES is its value in the enumeration, whose last is none that has a gradient.
Loss loss_of(const char* name, const std::string& kind) {
    std::string known;
    for (int place = 0; place < int(std::size(LOSSES)); ++place) {
        if (kind == LOSSES[place]) return Loss(place);
        known += (place ? ", " : "") + std::string(LOSSES[place]);
    }
    refuse(name, "loss '" + kind + "' does not exist; choose one of " + known);
}

Labels labels_of(const char* name, const AnyIn& a) {
    using Type = Labels::Type;
    const auto type = nb::dlpack::dtype_code(a.dtype().code);
    const int size = a.dtype().bits == 8 ? 0 : a.dtype().bits == 16 ? 1 : a.dtype().bits == 32 ? 2 : 3;
    if (a.dtype().lanes != 1 || (type != nb::dlpack::dtype_code::Int && type != nb::dlpack::dtype_code::UInt))
        refuse(name, "labels must be whole numbers");
    return {Type(size + (type == nb::dlpack::dtype_code::UInt ? int(Type::u8) : 0)), a.data()};
}

// (N,): one number per sample beside x (N, ...)
template <class X, class V>
Index per_sample(const char* name, const X& x, const V& v) {
    if (x.ndim() < 1 || v.ndim() != 1 || v.shape(0) != x.shape(0))
        refuse(name, "one number per sample, (N,), is needed, not " + shape_of(v) + " beside " + shape_of(x));
    return Index(v.stride(0));
}

// Samples of arrays of one shape, each cut into its dims from 1 up to `end`.
template <class X, class... More>
Samples<1 + sizeof...(More)> samples_of(const char* name, size_t end, const X& x, const More&... more) {
    require_dims(name, x.ndim(), 1);
    Samples<1 + sizeof...(More)> found;
    found.count = Index(x.shape(0));
    found.step = {Index(x.stride(0)), Index(more.stride(0))...};
    for (size_t d = 1; d < end; ++d)
        found.inside.append(Index(x.shape(d)), {Index(x.stride(d)), Index(more.stride(d))...});
    return found;
}

template <class X, class V>
void require_labels(const char* name, const X& logits, const V& labels) {
    bool fits = logits.ndim() == labels.ndim() + 1 && labels.ndim() > 0;
    for (size_t d = 0; fits && d < labels.ndim(); ++d) fits = labels.shape(d) == logits.shape(d);
    if (!fits) refuse(name, "labels (N, ...) beside (N, ..., K) are needed, not " + shape_of(labels) + " beside " +
                                shape_of(logits));
}

template <class X, class... More>
auto samples_of_rows(const char* name, const X& logits, const More&... more) {
    auto found = samples_of(name, logits.ndim() - 1, logits, more...);
    found.inside.end_in_rows();
    return found;
}

template <class X, class... More>
auto samples_of_elements(const char* name, const X& x, const More&... more) {
    layout_of(name, 0, 0, x, more...);
    auto found = samples_of(name, x.ndim(), x, more...);
    found.inside.end_in_runs();
    return found;
}

template <class S>
void define(nb::module_& m) {
    using A = Real<S>;
    using I = const In<S>&;
    using O = const Out<S>&;
    using NumbersIn = const In<A>&;
    using NumbersOut = const Out<A>&;
    const auto arg = [](const char* name) { return nb::arg(name).noconvert(); };

    def(
        m, "softmax",
        [](I x, O out) {
            const auto rows = positions("softmax", 0, x, out);
            softmax<S>(rows, Index(x.shape(x.ndim() - 1)), x.data(), out.data());
        },
        arg("x"), arg("out"));

    def(
        m, "softmax_dx",
        [](I dy, I y, O out) {
            const auto rows = positions("softmax_dx", 0, dy, y, out);
            softmax_dx<S>(rows, Index(dy.shape(dy.ndim() - 1)), dy.data(), y.data(), out.data());
        },
        arg("dy"), arg("y"), arg("out"));

    def(
        m, "cross_entropy",
        [](I logits, const AnyIn& labels, NumbersIn weight, double smoothing, NumbersOut loss, NumbersOut probability) {
            const char* name = "cross_entropy";
            const Labels of = labels_of(name, labels);
            require_labels(name, logits, labels);
            positions(name, 0, logits), positions(name, 0, probability), layout_of(name, 0, 0, logits, probability);
            const Index step = per_sample(name, logits, loss), classes = channels(name, logits, weight);
            cross_entropy<S>(samples_of_rows(name, logits, labels, probability), classes, logits.data(), of,
                                weight.data(), smoothing, loss.data(), step, probability.data());
        },
        arg("logits"), arg("labels"), arg("weight"), arg("smoothing"), arg("loss"), arg("probability"));

    def(
        m, "cross_entropy_dx",
        [](NumbersIn probability, const AnyIn& labels, NumbersIn weight, double smoothing, NumbersIn scale, O out) {
            const char* name = "cross_entropy_dx";
            const Labels of = labels_of(name, labels);
            require_labels(name, probability, labels);
            positions(name, 0, probability), positions(name, 0, out), layout_of(name, 0, 0, probability, out);
            const Index step = per_sample(name, out, scale), classes = channels(name, out, weight);
            cross_entropy_dx<S>(samples_of_rows(name, probability, labels, out), classes, probability.data(), of,
                                   weight.data(), smoothing, scale.data(), step, out.data());
        },
        arg("probability"), arg("labels"), arg("weight"), arg("smoothing"), arg("scale"), arg("out"));

    def(
        m, "label_scores",
        [](I logits, const AnyIn& labels, NumbersIn weight, NumbersOut total, NumbersOut correct, NumbersOut count) {
            const char* name = "label_scores";
            const Labels of = labels_of(name, labels);
            require_labels(name, logits, labels);
            positions(name, 0, logits);
            const Index steps[] = {per_sample(name, logits, total), per_sample(name, logits, correct),
                                   per_sample(name, logits, count)};
            A* const scores[] = {total.data(), correct.data(), count.data()};
            label_scores<S>(samples_of_rows(name, logits, labels), channels(name, logits, weight), logits.data(), of,
                               weight.data(), scores, steps);
        },
        arg("logits"), arg("labels"), arg("weight"), arg("total"), arg("correct"), arg("count"));

    def(
        m, "pointwise_loss",
        [](const std::string& kind, I x, I target, NumbersOut loss, double delta) {
            const char* name = "pointwise_loss";
            const Loss f = loss_of(name, kind);
            const auto elements = samples_of_elements(name, x, target);
            pointwise_loss<S>(f, elements, x.data(), target.data(), loss.data(), per_sample(name, x, loss), delta);
        },
        arg("kind"), arg("x"), arg("target"), arg("loss"), arg("delta"));

    def(
        m, "pointwise_loss_dx",
        [](const std::string& kind, I x, I target, NumbersIn scale, O out, double delta) {
            const char* name = "pointwise_loss_dx";
            const Loss f = loss_of(name, kind);
            const auto elements = samples_of_elements(name, x, target, out);
            pointwise_loss_dx<S>(f, elements, x.data(), target.data(), scale.data(), per_sample(name, x, scale),
                                    out.data(), delta);
        },
        arg("kind"), arg("x"), arg("target"), arg("scale"), arg("out"), arg("delta"));

    def(
        m, "agreement",
        [](I x, I target, NumbersOut out) {
            const auto elements = samples_of_elements("agreement", x, target);
            pointwise_loss<S>(Loss::agreement, elements, x.data(), target.data(), out.data(),
                                 per_sample("agreement", x, out), 0);
        },
        arg("x"), arg("target"), arg("out"));
}

}  // namespace

void define_losses(nb::module_& m) {
    define<float>(m);
    define<double>(m);
    define<bf16>(m);
    for (const char* name : {"softmax", "softmax_dx", "cross_entropy", "cross_entropy_dx", "label_scores",
                             "pointwise_loss", "pointwise_loss_dx", "agreement"}) {
        refuse_others(m, name,
                      "takes NumPy arrays of one type, float32, float64 or, as uint16, bf16 (weights, losses and "
                      "probabilities beside bf16 float32, labels of any integer type), outputs writeable");
    }
}

}  // namespace hpctrain
