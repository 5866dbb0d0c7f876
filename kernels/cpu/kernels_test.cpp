// Tests of the kernels without Python, for ctest and the sanitizers: each against plain loops over every element.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "kernels.h"

namespace {

using namespace hpctrain;

int failures = 0;

template <class T>
void expect_near(const char* what, double got, double want, double tolerance) {
    const bool same = std::isnan(want) ? std::isnan(got) : std::abs(got - want) <= tolerance || got == want;
    if (!same && ++failures < 20) std::printf("%s<%zu bytes>: %.17g, not %.17g\n", what, sizeof(T), got, want);
}

// Positions (a, b) of rows of `channels`, inside a larger allocation: `pad` unused elements end each line of b rows.
// The allocation ends with the last used element, so that AddressSanitizer sees a read of one more.
template <class T>
struct Block {
    Index a, b, channels, pad;
    std::vector<T> data;

    Block(Index a_, Index b_, Index channels_, Index pad_, std::mt19937& random)
        : a(a_), b(b_), channels(channels_), pad(pad_), data(size_t(a * (b * channels + pad) - (a > 0 ? pad : 0))) {
        std::normal_distribution<double> normal(3, 2);
        for (T& value : data) value = T(normal(random));
    }
    Index line() const { return b * channels + pad; }
    T& at(Index i, Index j, Index c) { return data[size_t(i * line() + j * channels + c)]; }
    std::array<Index, 3> strides() const { return {line(), channels, 1}; }
};

template <class T, class... Blocks>
Layout<sizeof...(Blocks)> layout_of(bool rows, const Blocks&... blocks) {
    Layout<sizeof...(Blocks)> layout;
    const Index extent[3] = {(blocks.a, ...), (blocks.b, ...), (blocks.channels, ...)};
    for (int d = 0; d < (rows ? 2 : 3); ++d) layout.append(extent[d], {blocks.strides()[size_t(d)]...});
    rows ? layout.end_in_rows() : layout.end_in_runs();
    return layout;
}

template <class T, class Check>
void each(const Block<T>& x, Check check) {
    for (Index i = 0; i < x.a; ++i) {
        for (Index j = 0; j < x.b; ++j) {
            for (Index c = 0; c < x.channels; ++c) check(i, j, c);
        }
    }
}

template <class T>
void test_elementwise(Index a, Index b, Index channels, Index pad, std::mt19937& random) {
    const double eps = 8 * std::numeric_limits<T>::epsilon();
    Block<T> x(a, b, channels, pad, random), y(a, b, channels, 0, random), out(a, b, channels, 2 * pad, random);
    Block<double> statistics(4, 1, channels, 0, random);
    Block<T> vectors(2, 1, channels, 0, random);
    const double* v[4];
    for (Index i = 0; i < 4; ++i) v[i] = statistics.data.data() + i * channels;
    const T *gamma = vectors.data.data(), *beta = gamma + channels;
    if (x.data.size() > 5) x.data[5] = std::numeric_limits<T>::quiet_NaN();
    const auto three = layout_of<T>(false, x, y, out);
    const auto two = layout_of<T>(false, x, out);

    add<T>(three, x.data.data(), y.data.data(), out.data.data());
    each(x,
         [&](Index i, Index j, Index c) { expect_near<T>("add", out.at(i, j, c), x.at(i, j, c) + y.at(i, j, c), 0); });
    relu<T>(two, x.data.data(), out.data.data());
    each(x, [&](Index i, Index j, Index c) {
        const double value = x.at(i, j, c);
        expect_near<T>("relu", out.at(i, j, c), std::isnan(value) ? value : std::fmax(value, 0), 0);
    });
    relu_dx<T>(three, x.data.data(), y.data.data(), out.data.data());
    each(x, [&](Index i, Index j, Index c) {
        expect_near<T>("relu_dx", out.at(i, j, c), y.at(i, j, c) > 0 ? x.at(i, j, c) : 0, 0);
    });
    normalize<T>(layout_of<T>(true, x, out), channels, x.data.data(), v[0], v[1], gamma, beta, out.data.data());
    each(x, [&](Index i, Index j, Index c) {
        const double want = (double(x.at(i, j, c)) - v[0][c]) * v[1][c] * gamma[c] + beta[c];
        expect_near<T>("normalize", out.at(i, j, c), want, eps * 500);
    });
    normalize_dx<T>(layout_of<T>(true, y, x, out), channels, y.data.data(), x.data.data(), v[0], v[1], gamma, v[2],
                    v[3], out.data.data());
    each(x, [&](Index i, Index j, Index c) {
        const double xhat = (double(x.at(i, j, c)) - v[0][c]) * v[1][c];
        const double want = gamma[c] * v[1][c] * (double(y.at(i, j, c)) - v[2][c] - xhat * v[3][c]);
        expect_near<T>("normalize_dx", out.at(i, j, c), want, eps * 50000);
    });
    Block<T> before = x;
    bias_add<T>(layout_of<T>(true, x), channels, x.data.data(), beta);
    each(x, [&](Index i, Index j, Index c) {
        expect_near<T>("bias_add", x.at(i, j, c), before.at(i, j, c) + beta[c], 0);
    });
    spread_positions<T>(layout_of<T>(true, out), channels, beta, out.data.data(), T(0.25));
    each(out,
         [&](Index i, Index j, Index c) { expect_near<T>("spread_positions", out.at(i, j, c), beta[c] * 0.25, 0); });
}

template <class T>
void test_reductions(Index a, Index b, Index channels, Index pad, std::mt19937& random) {
    const double eps = 8 * std::numeric_limits<T>::epsilon(), n = double(a * b);
    Block<T> x(a, b, channels, pad, random), dy(a, b, channels, 3 * pad, random), half(1, 1, channels, 0, random);
    Block<double> v(4, 1, channels, 0, random);
    double *first = v.data.data(), *second = first + channels, *mean = second + channels, *rstd = mean + channels;
    std::vector<double> sum(size_t(channels), 0), square(sum), product(sum), sum_dy(sum);
    each(x, [&](Index i, Index j, Index c) { sum[size_t(c)] += x.at(i, j, c); });
    each(x, [&](Index i, Index j, Index c) {
        square[size_t(c)] += std::pow(x.at(i, j, c) - sum[size_t(c)] / n, 2);
        product[size_t(c)] += double(dy.at(i, j, c)) * (double(x.at(i, j, c)) - mean[c]) * rstd[c];
        sum_dy[size_t(c)] += dy.at(i, j, c);
    });

    sum_positions<T>(layout_of<T>(true, x), channels, x.data.data(), half.data.data(), 0.5);
    for (Index c = 0; c < channels; ++c)
        expect_near<T>("sum", half.data[size_t(c)], sum[size_t(c)] / 2, eps * 10 * (n + 1));
    moments<T>(layout_of<T>(true, x), channels, x.data.data(), first, second);
    for (Index c = 0; c < channels; ++c) {
        expect_near<T>("mean", first[c], n > 0 ? sum[size_t(c)] / n : 0, eps * 10);
        expect_near<T>("m2", second[c], square[size_t(c)], eps * 100 * (n + 1));
    }
    normalize_grad<T>(layout_of<T>(true, dy, x), channels, dy.data.data(), x.data.data(), mean, rstd, first, second);
    for (Index c = 0; c < channels; ++c) {
        expect_near<T>("sum_dy", first[c], sum_dy[size_t(c)], eps * 10 * (n + 1));
        expect_near<T>("sum_dy_xhat", second[c], product[size_t(c)], eps * 1000 * (n + 1));
    }
}

template <class T>
void test_optimizer(std::mt19937& random) {
    for (bool nesterov : {false, true}) {
        Block<T> w(1, 1, 77, 0, random), g(1, 1, 77, 0, random), velocity(1, 1, 77, 0, random);
        const Block<T> w0 = w, v0 = velocity;
        sgd_update<T>(77, w.data.data(), g.data.data(), velocity.data.data(), T(0.1), T(0.9), T(0.01), nesterov);
        for (size_t i = 0; i < 77; ++i) {
            const double step = g.data[i] + 0.01 * w0.data[i], v = 0.9 * v0.data[i] + step;
            const double want = w0.data[i] - 0.1 * (nesterov ? step + 0.9 * v : v);
            expect_near<T>("velocity", velocity.data[i], v, 100 * std::numeric_limits<T>::epsilon());
            expect_near<T>("weights", w.data[i], want, 100 * std::numeric_limits<T>::epsilon());
        }
    }
}

template <class T>
void test_all() {
    std::mt19937 random(20);
    for (Index channels : {0, 1, 2, 3, 5, 31, 32, 33, 64, 65, 129, 300}) {
        for (Index a : {0, 1, 2, 7}) {
            for (Index b : {0, 1, 3, 65}) {
                for (Index pad : {0, 13}) {
                    test_elementwise<T>(a, b, channels, pad, random);
                    test_reductions<T>(a, b, channels, pad, random);
                }
            }
        }
    }
    test_reductions<T>(3, 5001, 3, 1, random);
    test_optimizer<T>(random);
}

}  // namespace

int main() {
    test_all<float>();
    test_all<double>();
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
