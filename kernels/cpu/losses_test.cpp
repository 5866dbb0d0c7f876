// Tests of softmax, losses, average pooling, resampling and norms without Python, for ctest and the sanitizers: each
// against plain loops. Arrays end with their last used element, so that AddressSanitizer sees a read of one more.
#include "losses.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "norms.h"
#include "sampling.h"

namespace {

using namespace hpctrain;

int failures = 0;

// Of numbers up to `size`, of a type whose rounding is `eps`.
void expect_near(const char* what, double got, double want, double eps, double size) {
    const bool same = std::isnan(want) ? std::isnan(got) : std::abs(got - want) <= eps * size || got == want;
    if (!same && ++failures < 20) std::printf("%s: %.17g, not %.17g (eps %g)\n", what, got, want, eps);
}

template <class T>
double eps() {
    return std::is_same_v<T, bf16> ? 0x1p-7 : double(std::numeric_limits<Real<T>>::epsilon());
}

template <class T>
double get(T value) {
    return double(load(value));
}

// Samples of `rows` rows of `width` elements: `gap` elements lie between rows.
template <class T>
struct Table {
    Index samples, rows, width, gap;
    std::vector<T> data;

    Table(Index n, Index r, Index w, Index g, std::mt19937& random) : samples(n), rows(r), width(w), gap(g) {
        data.resize(size_t(n * r > 0 ? n * r * (w + g) - g : 0));
        std::normal_distribution<double> normal(0, 2);
        for (T& value : data) value = store<T>(Real<T>(normal(random)));
    }
    Index step() const { return width + gap; }
    T& at(Index n, Index r, Index c) { return data[size_t((n * rows + r) * step() + c)]; }
    double operator()(Index n, Index r, Index c) { return get(at(n, r, c)); }
};

template <class First, class... More>
auto samples_of(const First& a, const More&... more) {
    Samples<1 + sizeof...(More)> found;
    found.count = a.samples, found.step = {a.rows * a.step(), more.rows * more.step()...};
    found.inside.append(a.rows, {a.step(), more.step()...});
    found.inside.end_in_rows();
    return found;
}

// The same with the elements of a row as positions, too.
template <class First, class... More>
auto elements_of(const First& a, const More&... more) {
    auto found = samples_of(a, more...);
    found.inside.append(a.width, {(static_cast<void>(more), Index(1))..., Index(1)});
    found.inside.end_in_runs();
    return found;
}

template <class T>
void test_softmax(Index n, Index rows, Index classes, Index gap, std::mt19937& random) {
    Table<T> x(n, rows, classes, gap, random), out(n, rows, classes, 0, random), dy(n, rows, classes, 0, random);
    Table<T> dx(n, rows, classes, gap, random);
    Table<Real<T>> p(n, rows, classes, 2 * gap, random);
    Table<std::int32_t> labels(n, rows, 1, gap, random);
    std::uniform_int_distribution<int> any(-1, int(classes));
    for (auto& label : labels.data) label = any(random);
    if (x.data.size() > 5) x.data[5] = store<T>(-std::numeric_limits<Real<T>>::infinity());
    std::vector<Real<T>> weight(size_t(classes), Real<T>(0.5)), loss(size_t(2 * n), Real<T>(0)), scale(size_t(n), Real<T>(3));
    const double tolerance = 16 * eps<T>(), smoothing = classes % 2 ? 0.25 : 0;
    Layout<2> two;
    Layout<3> three;
    two.append(n * rows, {x.step(), out.step()}), two.end_in_rows();
    three.append(n * rows, {dy.step(), out.step(), dx.step()}), three.end_in_rows();
    softmax<T>(two, classes, x.data.data(), out.data.data());
    softmax_dx<T>(three, classes, dy.data.data(), out.data.data(), dx.data.data());
    const auto samples = samples_of(x, labels, p);
    const Labels of{Labels::Type::i32, labels.data.data()};
    cross_entropy<T>(samples, classes, x.data.data(), of, weight.data(), 0, loss.data(), 2, p.data.data());
    Real<T> scores[3][8];
    Real<T>* const into[] = {scores[0], scores[1], scores[2]};
    label_scores<T>(samples_of(x, labels), classes, x.data.data(), of, weight.data(), into, {1, 1, 1});
    for (Index i = 0; i < n; ++i) {
        double want = 0, hits = 0, count = 0;
        for (Index r = 0; r < rows; ++r) {
            double total = 0, top = -INFINITY, dot = 0;
            Index best = 0;
            for (Index k = 0; k < classes; ++k) {
                if (x(i, r, k) > top) top = x(i, r, k), best = k;
            }
            for (Index k = 0; k < classes; ++k) total += std::exp(x(i, r, k) - top);
            for (Index k = 0; k < classes; ++k) dot += out(i, r, k) * dy(i, r, k);
            for (Index k = 0; k < classes; ++k) {
                const double probability = std::exp(x(i, r, k) - top) / total;
                expect_near("softmax", out(i, r, k), probability, tolerance, 1);
                expect_near("probability", p(i, r, k), probability, tolerance, 1);
                const double slope = out(i, r, k) * (dy(i, r, k) - dot);
                expect_near("softmax_dx", dx(i, r, k), slope, tolerance, 10);
            }
            const Index label = labels.at(i, r, 0);
            if (label < 0 || label >= classes) continue;
            want += 0.5 * (std::log(total) + top - x(i, r, label));
            hits += best == label, count += 1;
        }
        expect_near("cross_entropy", get(loss[size_t(2 * i)]), want, tolerance, 10 * double(rows));
        expect_near("total", get(scores[0][i]), 0.5 * count, 0, 1);
        expect_near("correct", get(scores[1][i]), hits, 0, 1);
        expect_near("count", get(scores[2][i]), count, 0, 1);
    }
    Table<T> slope(n, rows, classes, gap, random);
    cross_entropy_dx<T>(samples_of(p, labels, slope), classes, p.data.data(), of, weight.data(), smoothing,
                        scale.data(), 1, slope.data.data());
    for (Index i = 0; i < n; ++i) {
        for (Index r = 0; r < rows; ++r) {
            const Index label = labels.at(i, r, 0);
            for (Index k = 0; k < classes; ++k) {
                const double aim = (k == label) * (1 - smoothing) + smoothing / double(classes);
                const double want = label < 0 || label >= classes ? 0 : 3 * 0.5 * (p(i, r, k) - aim);
                expect_near("cross_entropy_dx", slope(i, r, k), want, tolerance, 3);
            }
        }
    }
}

template <class T>
void test_pointwise(Index n, Index rows, Index width, Index gap, std::mt19937& random) {
    Table<T> x(n, rows, width, gap, random), t(n, rows, width, 0, random), out(n, rows, width, 2 * gap, random);
    std::vector<Real<T>> loss(size_t(n), Real<T>(0)), scale(size_t(n), Real<T>(2));
    const auto value = [](Loss kind, double a, double b) {
        const double d = std::abs(a - b);
        if (kind == Loss::squared) return d * d;
        if (kind == Loss::absolute) return d;
        if (kind == Loss::huber) return d <= 0.5 ? d * d / 2 : 0.5 * (d - 0.25);
        if (kind == Loss::logistic) return std::fmax(a, 0) - b * a + std::log1p(std::exp(-std::abs(a)));
        return double((a > 0) == (b > 0.5));
    };
    const auto slope = [](Loss kind, double a, double b) {
        const double d = a - b, sign = d > 0 ? 1 : d < 0 ? -1 : 0;
        if (kind == Loss::squared) return 2 * d;
        if (kind == Loss::absolute) return sign;
        if (kind == Loss::huber) return std::abs(d) <= 0.5 ? d : 0.5 * sign;
        return 1 / (1 + std::exp(-a)) - b;
    };
    for (Loss kind : {Loss::squared, Loss::absolute, Loss::huber, Loss::logistic, Loss::agreement}) {
        pointwise_loss<T>(kind, elements_of(x, t), x.data.data(), t.data.data(), loss.data(), 1, 0.5);
        pointwise_loss_dx<T>(kind, elements_of(x, t, out), x.data.data(), t.data.data(), scale.data(), 1,
                             out.data.data(), 0.5);
        for (Index i = 0; i < n; ++i) {
            long double sum = 0;
            for (Index r = 0; r < rows; ++r) {
                for (Index c = 0; c < width; ++c) {
                    sum += value(kind, x(i, r, c), t(i, r, c));
                    if (kind == Loss::agreement) continue;
                    expect_near("loss_dx", out(i, r, c), 2 * slope(kind, x(i, r, c), t(i, r, c)), 4 * eps<T>(), 50);
                }
            }
            expect_near("loss", get(loss[size_t(i)]), double(sum), 4 * eps<Real<T>>(), 100 * double(rows * width + 1));
        }
    }
}

template <class T>
void test_avg_pool(Index channels, Index kernel, Index stride, Index gap, std::mt19937& random) {
    const Index outputs = 4, inputs = (outputs - 1) * stride + kernel + 1, n = 2;
    Table<T> x(n * inputs, inputs, channels, gap, random), y(n * outputs, outputs, channels, 0, random);
    Table<T> dx(n * inputs, inputs, channels, 0, random);
    std::vector<Real<T>> divisor;
    for (Index o = 0; o < outputs; ++o) divisor.push_back(Real<T>(o + 1));
    AveragePool p;
    p.samples = n, p.channels = channels;
    p.input = {1, inputs, inputs}, p.output = {1, outputs, outputs}, p.kernel = {1, kernel, kernel};
    p.stride = {1, stride, stride}, p.divisor = {0, 0, 0, 1, 0};
    p.x = {inputs * inputs * x.step(), 0, inputs * x.step(), x.step()};
    p.y = {outputs * outputs * y.step(), 0, outputs * y.step(), y.step()};
    avg_pool<T>(p, x.data.data(), y.data.data(), divisor.data());
    p.x = {inputs * inputs * dx.step(), 0, inputs * dx.step(), dx.step()};
    avg_pool_dx<T>(p, y.data.data(), dx.data.data(), divisor.data());
    std::vector<double> want(dx.data.size(), 0);
    for (Index i = 0; i < n * outputs * outputs * channels; ++i) {
        const Index c = i % channels, b = i / channels % outputs, a = i / channels / outputs % outputs;
        const Index s = i / channels / outputs / outputs;
        double sum = 0;
        for (Index tap = 0; tap < kernel * kernel; ++tap) {
            const Index row = s * inputs + a * stride + tap / kernel, column = b * stride + tap % kernel;
            sum += x(row, column, c);
            want[size_t((row * inputs + column) * channels + c)] += y(s * outputs + a, b, c) / double(b + 1);
        }
        expect_near("avg_pool", y(s * outputs + a, b, c), sum / double(b + 1), 2 * eps<T>(), 100);
    }
    for (size_t i = 0; i < want.size(); ++i) expect_near("avg_pool_dx", get(dx.data[i]), want[i], 4 * eps<T>(), 50);
}

template <class T>
void test_resample(Index before, Index inner, Index terms, Index gap, std::mt19937& random) {
    const Index inputs = 5, outputs = 4;
    Table<T> x(before, inputs, inner, gap, random), y(before, outputs, inner, 0, random);
    std::vector<Index> first{0}, offset, read;
    std::vector<double> weight;
    for (Index o = 0; o < outputs; ++o) {
        for (Index t = 0; t < terms + o % 2 - 1; ++t) {
            read.push_back((o * 3 + t * 2) % inputs), offset.push_back(read.back() * x.step());
            weight.push_back(0.25 * double(t + 1));
        }
        first.push_back(Index(read.size()));
    }
    Resampling by;
    by.before.append(before, {inputs * x.step(), outputs * y.step()}), by.before.end_in_rows();
    by.after.append(inner, {1, 1}), by.after.end_in_runs();
    by.outputs = outputs, by.out_step = y.step();
    by.first = first.data(), by.offset = offset.data(), by.weight = weight.data();
    resample<T>(by, x.data.data(), y.data.data());
    for (Index i = 0; i < before * outputs * inner; ++i) {
        const Index c = i % inner, o = i / inner % outputs, n = i / inner / outputs;
        double want = 0;
        for (Index t = first[size_t(o)]; t < first[size_t(o + 1)]; ++t)
            want += weight[size_t(t)] * x(n, read[size_t(t)], c);
        expect_near("resample", y(n, o, c), want, 4 * eps<T>(), 50);
    }
}

// Statistics per row, and sums per element of a row: layer normalization.
template <class T>
void test_norms(Index n, Index rows, Index width, Index gap, std::mt19937& random) {
    Table<T> x(n, rows, width, gap, random), dy(n, rows, width, 0, random), out(n, rows, width, gap, random);
    const Index all = n * rows;
    std::vector<double> v(size_t(6 * all), 0.0), columns(size_t(2 * width), 0.0);
    double *mean = v.data(), *m2 = mean + all, *rstd = m2 + all, *sums = rstd + all, *sums_xhat = sums + all;
    std::vector<Real<T>> gamma(size_t(width), Real<T>(0.5)), beta(size_t(width), Real<T>(-1));
    Reduction<1> one;
    one.kept.append(all, {x.step(), 1}), one.kept.end_in_rows();
    one.summed.append(width, {1}), one.summed.end_in_rows();
    moments_of<T>(one, x.data.data(), mean, m2);
    for (Index r = 0; r < all; ++r) rstd[r] = 1 / std::sqrt(m2[r] + 1);
    Reduction<3> row, column;
    row.kept.append(all, {dy.step(), x.step(), 1, 1}), row.kept.end_in_rows();
    row.summed.append(width, {1, 1, 0}), row.summed.end_in_rows();
    if (width == 0) column.kept.append(0, {0, 0, 0, 1});  // there is nothing to store
    column.kept.end_in_rows(), column.columns = width;
    column.summed.append(all, {dy.step(), x.step(), 1}), column.summed.end_in_rows();
    normalize_grad_of<T>(row, false, dy.data.data(), x.data.data(), mean, rstd, sums, sums_xhat);
    normalize_grad_of<T>(column, false, dy.data.data(), x.data.data(), mean, rstd, columns.data(),
                         columns.data() + width);
    Layout<5> five;
    Layout<6> six;
    five.append(all, {x.step(), dy.step(), out.step(), 1, 0}), five.end_in_rows();
    normalize_by<T>(five, width, false, true, x.data.data(), dy.data.data(), mean, rstd, gamma.data(), beta.data(), 0.5,
                    out.data.data());
    std::vector<double> want(size_t(2 * width), 0);
    for (Index r = 0; r < all; ++r) {
        double sum = 0, square = 0, sum_dy = 0, sum_xhat = 0;
        for (Index c = 0; c < width; ++c) sum += x(0, r, c);
        for (Index c = 0; c < width; ++c) square += std::pow(x(0, r, c) - sum / double(width), 2);
        for (Index c = 0; c < width; ++c) {
            const double xhat = (x(0, r, c) - mean[r]) * rstd[r], linear = 0.5 * xhat - 1 + dy(0, r, c);
            sum_dy += dy(0, r, c), sum_xhat += dy(0, r, c) * xhat;
            want[size_t(c)] += dy(0, r, c), want[size_t(width + c)] += dy(0, r, c) * xhat;
            expect_near("normalize", out(0, r, c), linear < 0 ? linear / 2 : linear, 4 * eps<T>(), 20);
        }
        expect_near("mean", mean[r], width ? sum / double(width) : 0, 1e-14, 20);
        expect_near("m2", m2[r], square, 1e-14, 100 * double(width + 1));
        expect_near("sum_dy", sums[r], sum_dy, 1e-14, 20 * double(width + 1));
        expect_near("sum_dy_xhat", sums_xhat[r], sum_xhat, 1e-14, 100 * double(width + 1));
    }
    for (size_t c = 0; c < want.size(); ++c) expect_near("columns", columns[c], want[c], 1e-13, 20 * double(all + 1));
    six.append(all, {dy.step(), x.step(), out.step(), 1, 0, 1}), six.end_in_rows();
    normalize_dx_by<T>(six, width, false, true, false, dy.data.data(), x.data.data(), mean, rstd, gamma.data(), sums,
                       sums_xhat, out.data.data());
    for (Index r = 0; r < all; ++r) {
        for (Index c = 0; c < width; ++c) {
            const double xhat = (x(0, r, c) - mean[r]) * rstd[r], g = 0.5 * dy(0, r, c);
            const double expected = rstd[r] * (g - sums[r] - xhat * sums_xhat[r]);
            expect_near("normalize_dx", out(0, r, c), expected, 4 * eps<T>(), 20 * double(width + 1));
        }
    }
}

template <class T>
void test_all() {
    std::mt19937 random(20);
    for (Index n : {0, 1, 3}) {
        for (Index rows : {0, 1, 5, 130, 700}) {
            for (Index width : {0, 1, 2, 3, 15, 16, 17, 33, 65}) {
                const Index gap = width % 2 ? 3 : 0;
                if (width > 0) test_softmax<T>(n, rows, width, gap, random);
                test_pointwise<T>(n, rows, width, gap, random);
                test_norms<T>(n, rows, width, gap, random);
            }
        }
    }
    test_softmax<T>(2, 3, 2049, 1, random);
    test_pointwise<T>(1, 7, 20011, 3, random);
    test_norms<T>(1, 2, 70001, 1, random);
    test_norms<T>(1, 30001, 5, 0, random);
    for (Index channels : {0, 1, 3, 16, 65}) {
        for (Index kernel : {1, 2, 3}) {
            for (Index stride : {1, 2, 4}) test_avg_pool<T>(channels, kernel, stride, 5, random);
        }
        for (Index terms : {1, 2, 3, 4, 5, 9}) test_resample<T>(3, channels, terms, 2, random);
    }
}

}  // namespace

int main() {
    test_all<float>();
    test_all<double>();
    test_all<bf16>();
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
