// Tests of the kernels without Python, for ctest and the sanitizers: each against plain loops over every element.
#include "kernels.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace {

using namespace hpctrain;

int failures = 0;

template <class T>
void expect_near(const char* what, double got, double want, double tolerance) {
    const bool same = std::isnan(want) ? std::isnan(got) : std::abs(got - want) <= tolerance || got == want;
    if (!same && ++failures < 20) std::printf("%s<%zu bytes>: %.17g, not %.17g\n", what, sizeof(T), got, want);
}

template <class T>
T from(double value) {
    if constexpr (std::is_same_v<T, std::int32_t>)
        return std::int32_t(value);
    else
        return store<T>(Real<T>(value));
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
        for (T& value : data) value = from<T>(normal(random));
    }
    Index line() const { return b * channels + pad; }
    T& at(Index i, Index j, Index c) { return data[size_t(i * line() + j * channels + c)]; }
    T at(Index i, Index j, Index c) const { return data[size_t(i * line() + j * channels + c)]; }
    double value(Index i, Index j, Index c) const { return double(load(at(i, j, c))); }
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

// The distance from 1 to the next number.
template <class T>
constexpr double EPSILON = std::is_same_v<T, bf16> ? 0x1p-7 : double(std::numeric_limits<Real<T>>::epsilon());

template <class T>
double masked(T dy, T y, double slope) {
    return load(y) > 0 ? load(dy) : slope == 0 ? 0 : load(store<T>(Real<T>(slope) * load(dy)));
}

template <class T>
void test_elementwise(Index a, Index b, Index channels, Index pad, std::mt19937& random) {
    Block<T> x(a, b, channels, pad, random), y(a, b, channels, 0, random), out(a, b, channels, 2 * pad, random);
    if (x.data.size() > 5) x.data[5] = store<T>(std::numeric_limits<Real<T>>::quiet_NaN());
    for (size_t i = 3; i < y.data.size(); i += 7) y.data[i] = store<T>(-load(y.data[i]));
    const auto three = layout_of<T>(false, x, y, out);
    const auto two = layout_of<T>(false, x, out);

    add<T>(three, x.data.data(), y.data.data(), out.data.data());
    each(x, [&](Index i, Index j, Index c) {
        expect_near<T>("add", out.value(i, j, c), load(store<T>(load(x.at(i, j, c)) + load(y.at(i, j, c)))), 0);
    });
    multiply<T>(three, x.data.data(), y.data.data(), out.data.data());
    each(x, [&](Index i, Index j, Index c) {
        expect_near<T>("multiply", out.value(i, j, c), load(store<T>(load(x.at(i, j, c)) * load(y.at(i, j, c)))), 0);
    });
    relu<T>(two, x.data.data(), out.data.data());
    each(x, [&](Index i, Index j, Index c) {
        const double value = x.value(i, j, c);
        expect_near<T>("relu", out.value(i, j, c), std::isnan(value) ? value : std::fmax(value, 0), 0);
    });
    relu_dx<T>(three, x.data.data(), y.data.data(), out.data.data());
    each(x, [&](Index i, Index j, Index c) {
        expect_near<T>("relu_dx", out.value(i, j, c), masked(x.at(i, j, c), y.at(i, j, c), 0), 0);
    });
    for (double slope : {0.0, 0.3}) {
        Block<T> dy = x;
        activation_grad<T>(layout_of<T>(false, dy, y), dy.data.data(), y.data.data(), slope);
        each(x, [&](Index i, Index j, Index c) {
            expect_near<T>("activation_grad", dy.value(i, j, c), masked(x.at(i, j, c), y.at(i, j, c), slope), 0);
        });
    }
}

template <class T>
void test_normalization(Index a, Index b, Index channels, Index pad, std::mt19937& random) {
    const double eps = 8 * EPSILON<Real<T>>, own = EPSILON<T>;  // of what computes, and of the result's rounding
    Block<T> x(a, b, channels, pad, random), y(a, b, channels, 0, random), out(a, b, channels, 2 * pad, random);
    Block<double> statistics(4, 1, channels, 0, random);
    Block<Real<T>> vectors(2, 1, channels, 0, random);
    const double* v[4];
    for (Index i = 0; i < 4; ++i) v[i] = statistics.data.data() + i * channels;
    const Real<T>*gamma = vectors.data.data(), *beta = gamma + channels;
    if (x.data.size() > 5) x.data[5] = store<T>(std::numeric_limits<Real<T>>::quiet_NaN());
    for (const T* added : {static_cast<const T*>(nullptr), static_cast<const T*>(y.data.data())}) {
        for (double slope : {1.0, 0.0, 0.25}) {
            normalize<T>(added ? layout_of<T>(true, x, y, out) : layout_of<T>(true, x, x, out), channels, x.data.data(),
                         added, v[0], v[1], gamma, beta, slope, out.data.data());
            each(x, [&](Index i, Index j, Index c) {
                double want = (x.value(i, j, c) - v[0][c]) * v[1][c] * gamma[c] + beta[c];
                if (added) want += y.value(i, j, c);
                if (want < 0) want *= slope;
                expect_near<T>("normalize", out.value(i, j, c), want, eps * 500 + own * std::abs(want));
            });
        }
    }
    normalize_dx<T>(layout_of<T>(true, y, x, out), channels, y.data.data(), x.data.data(), v[0], v[1], gamma, v[2],
                    v[3], out.data.data());
    each(x, [&](Index i, Index j, Index c) {
        const double xhat = (x.value(i, j, c) - v[0][c]) * v[1][c];
        const double want = v[1][c] * (double(gamma[c]) * y.value(i, j, c) - v[2][c] - xhat * v[3][c]);
        expect_near<T>("normalize_dx", out.value(i, j, c), want, eps * 50000 + own * std::abs(want));
    });
    Block<T> before = x;
    bias_add<T>(layout_of<T>(true, x), channels, x.data.data(), beta);
    each(x, [&](Index i, Index j, Index c) {
        expect_near<T>("bias_add", x.value(i, j, c), load(store<T>(load(before.at(i, j, c)) + beta[c])), 0);
    });
    const Block<T> row(1, 1, channels, 0, random);
    spread_positions<T>(layout_of<T>(true, out), channels, row.data.data(), out.data.data(), Real<T>(0.25));
    each(out, [&](Index i, Index j, Index c) {
        expect_near<T>("spread_positions", out.value(i, j, c), load(store<T>(load(row.at(0, 0, c)) / 4)), 0);
    });
}

template <class T>
void test_reductions(Index a, Index b, Index channels, Index pad, std::mt19937& random) {
    const double eps = 8 * EPSILON<Real<T>>, own = EPSILON<T>, n = double(a * b);
    Block<T> x(a, b, channels, pad, random), y(a, b, channels, 2 * pad, random), half(1, 1, channels, 0, random);
    Block<Real<T>> bias(1, 1, channels, 0, random);
    Block<double> v(4, 1, channels, 0, random);
    double *first = v.data.data(), *second = first + channels, *mean = second + channels, *rstd = mean + channels;
    for (size_t i = 0; i < y.data.size(); i += 2) y.data[i] = store<T>(-load(y.data[i]));
    std::vector<long double> sum(size_t(channels), 0), square(sum);  // the kernels' order of additions errs less
    each(x, [&](Index i, Index j, Index c) { sum[size_t(c)] += x.value(i, j, c); });
    each(x, [&](Index i, Index j, Index c) {
        square[size_t(c)] += std::pow(x.value(i, j, c) - sum[size_t(c)] / n, 2.0L);
    });
    sum_positions<T>(layout_of<T>(true, x), channels, x.data.data(), half.data.data(), 0.5);
    for (Index c = 0; c < channels; ++c) {
        const double want = double(sum[size_t(c)] / 2);
        expect_near<T>("sum", half.value(0, 0, c), want, eps * 10 * (n + 1) + own * std::abs(want));
    }
    moments<T>(layout_of<T>(true, x), channels, x.data.data(), first, second);
    for (Index c = 0; c < channels; ++c) {
        expect_near<T>("mean", first[c], n > 0 ? double(sum[size_t(c)] / n) : 0, eps * 10);
        expect_near<T>("m2", second[c], double(square[size_t(c)]), eps * 100 * (n + 1));
    }
    for (double slope : {1.0, 0.0, 0.3}) {
        Block<T> dy(a, b, channels, 3 * pad, random), again = dy;
        const Block<T> before = dy;
        const T* mask = slope == 1 ? nullptr : y.data.data();
        const auto with_y = [&](auto& g) { return mask ? layout_of<T>(true, g, y) : layout_of<T>(true, g, g); };
        bias_grad<T>(with_y(again), channels, again.data.data(), mask, slope, bias.data.data());
        normalize_grad<T>(mask ? layout_of<T>(true, dy, x, y) : layout_of<T>(true, dy, x, dy), channels, dy.data.data(),
                          x.data.data(), mask, slope, mean, rstd, first, second);
        std::vector<long double> sum_dy(size_t(channels), 0), product(sum_dy);
        each(x, [&](Index i, Index j, Index c) {
            const T g = before.at(i, j, c);
            const double want = mask ? masked(g, y.at(i, j, c), slope) : load(g);
            expect_near<T>("masked dy", dy.value(i, j, c), want, 0);
            expect_near<T>("masked dy", again.value(i, j, c), want, 0);
            product[size_t(c)] += want * (x.value(i, j, c) - mean[c]) * rstd[c];
            sum_dy[size_t(c)] += want;
        });
        for (Index c = 0; c < channels; ++c) {
            expect_near<T>("bias_grad", bias.data[size_t(c)], double(sum_dy[size_t(c)]), eps * 10 * (n + 1));
            expect_near<T>("sum_dy", first[c], double(sum_dy[size_t(c)]), eps * 10 * (n + 1));
            expect_near<T>("sum_dy_xhat", second[c], double(product[size_t(c)]), eps * 1000 * (n + 1));
        }
    }
}

// Every bf16, and numbers between them: to the nearest, to even where halfway.
void test_rounding_to_bf16() {
    for (std::uint32_t upper = 0; upper < 0x10000; ++upper) {
        const float value = load(bf16{std::uint16_t(upper)});
        const bf16 same = store<bf16>(value);
        if (std::isnan(value)) {
            expect_near<bf16>("NaN", load(same), value, 0);
            continue;
        }
        expect_near<bf16>("bf16", same.bits, upper, 0);
        for (std::uint32_t lower : {0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
            const std::uint32_t bits = upper << 16 | lower;
            float between;
            std::memcpy(&between, &bits, sizeof between);
            if (std::isnan(between)) continue;  // beyond infinity
            const bool up = lower > 0x8000 || (lower == 0x8000 && (upper & 1));
            expect_near<bf16>("rounded", store<bf16>(between).bits, double(upper + up), 0);
        }
    }
    const std::uint32_t signalling = 0x7f800001;
    float nan;
    std::memcpy(&nan, &signalling, sizeof nan);
    expect_near<bf16>("NaN of low bits", load(store<bf16>(nan)), NAN, 0);
}

struct Case {
    Activation kind;
    double (*value)(double);
    double (*slope)(double);
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double sigmoid_slope(double x) { return sigmoid(x) * sigmoid(-x); }
double normal(double x) { return std::erfc(-x / std::sqrt(2.0)) / 2; }
double normal_density(double x) { return std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.0)); }

const Case CASES[] = {
    {Activation::leaky_relu, [](double x) { return x > 0 ? x : 0.25 * x; }, [](double x) { return x > 0 ? 1 : 0.25; }},
    {Activation::gelu, [](double x) { return x * normal(x); },
     [](double x) { return normal(x) + x * normal_density(x); }},
    {Activation::silu, [](double x) { return x * sigmoid(x); },
     [](double x) { return sigmoid(x) + x * sigmoid_slope(x); }},
    {Activation::sigmoid, sigmoid, sigmoid_slope},
    {Activation::tanh, [](double x) { return std::tanh(x); }, [](double x) { return 4 * sigmoid_slope(2 * x); }},
    {Activation::softplus, [](double x) { return std::fmax(x, 0) + std::log1p(std::exp(-std::abs(x))); }, sigmoid},
};

template <class T>
void test_activations(Index a, Index b, Index channels, Index pad, std::mt19937& random) {
    Block<T> x(a, b, channels, pad, random), dy(a, b, channels, 0, random), out(a, b, channels, 2 * pad, random);
    for (size_t i = 0; i < x.data.size(); ++i) x.data[i] = from<T>((load(x.data[i]) - 3) * (i % 3 ? 1 : 10));
    for (size_t i = 0; i < x.data.size(); i += 11) x.data[i] = from<T>(i % 2 ? 0.0 : NAN);
    for (const Case& f : CASES) {
        const double eps = 8 * EPSILON<T>;
        activate<T>(f.kind, layout_of<T>(false, x, out), x.data.data(), out.data.data(), 0.25);
        each(x, [&](Index i, Index j, Index c) {
            // far below 0 the argument of exp is large, and with it what its rounding does
            const double want = f.value(x.value(i, j, c)), more = x.value(i, j, c) < -2 ? 0.01 : 0;
            expect_near<T>("activate", out.value(i, j, c), want, eps * (std::abs(want) + more));
        });
        activate_dx<T>(f.kind, layout_of<T>(false, dy, x, out), dy.data.data(), x.data.data(), out.data.data(), 0.25);
        each(x, [&](Index i, Index j, Index c) {
            const double factor = dy.value(i, j, c), want = factor * f.slope(x.value(i, j, c));
            expect_near<T>("activate_dx", out.value(i, j, c), want, eps * std::abs(factor));
        });
        // the largest number of a float is infinite as bf16, the largest bf16 not as float
        const double infinity = std::numeric_limits<double>::infinity();
        const double largest = sizeof(T) == 8 ? std::numeric_limits<double>::max() : 0x1.fep127;
        const T far[4] = {from<T>(infinity), from<T>(-infinity), from<T>(largest), from<T>(-largest)};
        const T ones[4] = {from<T>(1), from<T>(1), from<T>(1), from<T>(1)};
        T ends[4];
        const bool bounded = f.kind == Activation::sigmoid || f.kind == Activation::tanh;
        const bool leaky = f.kind == Activation::leaky_relu;
        const double lowest = f.kind == Activation::tanh ? -1 : 0;
        Layout<2> two;
        Layout<3> three;
        two.append(4, {1, 1}), three.append(4, {1, 1, 1});
        activate<T>(f.kind, two, far, ends, 0.25);
        for (size_t i : {0, 2}) expect_near<T>("at infinity", load(ends[i]), bounded ? 1 : load(far[i]), 0);
        for (size_t i : {1, 3}) expect_near<T>("at -infinity", load(ends[i]), leaky ? load(far[i]) / 4 : lowest, 0);
        activate_dx<T>(f.kind, three, ones, far, ends, 0.25);
        for (size_t i : {0, 2}) expect_near<T>("slope at infinity", load(ends[i]), bounded ? 0 : 1, 0);
        for (size_t i : {1, 3}) expect_near<T>("slope at -infinity", load(ends[i]), leaky ? 0.25 : 0, 0);
    }
}

template <class T>
void test_pooling(Index channels, Index pad, Index kernel, Index stride, Index dilation, std::mt19937& random) {
    const Index reach = dilation * (kernel - 1) + 1, oa = 3, ob = 4;
    Block<T> x((oa - 1) * stride + reach, (ob - 1) * stride + reach + 1, channels, pad, random);
    Block<T> y(oa, ob, channels, 0, random), dy(oa, ob, channels, 2 * pad, random), dx = x;
    Block<std::int32_t> index(oa, ob, channels, 0, random);
    for (T& value : x.data) value = from<T>(std::round(load(value)));  // ties
    for (size_t i = 0; i < x.data.size(); i += 17) x.data[i] = from<T>(NAN);
    for (T& value : dx.data) value = T{};
    Block<double> left(x.a, x.b, channels, pad, random);
    std::vector<Index> taps;
    for (Index s = 0; s < kernel; ++s) {
        for (Index t = 0; t < kernel; ++t) taps.push_back((s * x.line() + t * channels) * dilation);
    }
    const auto pooling = [&](const Block<T>& rows) {
        Layout<3> layout;
        const std::array<Index, 3> line{stride * x.line(), rows.line(), index.line()};
        const bool disjoint = stride >= kernel && dilation == 1;  // then lines may be taken as samples
        if (!disjoint) layout.append(oa, line);
        layout.append(ob, {stride * channels, channels, channels});
        layout.end_in_rows();
        return Pooling{layout, line, disjoint ? oa : 1, channels, taps.data(), std::int32_t(taps.size()), disjoint};
    };
    max_pool<T>(pooling(y), x.data.data(), y.data.data(), index.data.data());
    max_pool_dx<T>(pooling(dy), dy.data.data(), index.data.data(), dx.data.data());
    for (size_t i = 0; i < dx.data.size(); ++i) left.data[i] = load(dx.data[i]);
    each(y, [&](Index i, Index j, Index c) {
        Index winner = 0;
        const auto element = [&](Index tap) {
            return std::array<Index, 2>{i * stride + tap / kernel * dilation, j * stride + tap % kernel * dilation};
        };
        const auto value = [&](Index tap) { return x.value(element(tap)[0], element(tap)[1], c); };
        for (Index tap = 1; tap < kernel * kernel && !std::isnan(value(winner)); ++tap) {
            if (std::isnan(value(tap)) || value(tap) > value(winner)) winner = tap;
        }
        expect_near<T>("max_pool", y.value(i, j, c), value(winner), 0);
        expect_near<T>("index", double(index.at(i, j, c)), double(winner), 0);
        left.at(element(winner)[0], element(winner)[1], c) -= dy.value(i, j, c);
    });
    for (size_t i = 0; i < dx.data.size(); ++i) expect_near<T>("max_pool_dx", left.data[i], 0, 100 * EPSILON<T>);
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
void test_adaptive_optimizers(std::mt19937& random) {
    const double eps = 100 * std::numeric_limits<T>::epsilon();
    Block<T> w(1, 1, 77, 0, random), g(1, 1, 77, 0, random), mean(1, 1, 77, 0, random), square(1, 1, 77, 0, random);
    for (T& value : square.data) value *= value;
    Block<T> w0 = w, m0 = mean, s0 = square;
    const AdamFactors<T> f{T(0.2), T(2), T(0.9), T(0.1), T(0.99), T(0.01), T(0.5), T(0.03), T(0.875)};
    adam_update<T>(77, w.data.data(), g.data.data(), mean.data.data(), square.data.data(), f);
    for (size_t i = 0; i < 77; ++i) {
        const double slope = g.data[i] + 0.03 * w0.data[i], m = 0.9 * m0.data[i] + 0.1 * slope;
        const double s = 0.99 * s0.data[i] + 0.01 * slope * slope;
        expect_near<T>("mean", mean.data[i], m, eps);
        expect_near<T>("square", square.data[i], s, eps);
        expect_near<T>("weights", w.data[i], 0.875 * w0.data[i] - 0.2 * m / (2 * std::sqrt(s) + 0.5), eps);
    }
    w0 = w, m0 = mean;
    lars_update<T>(77, w.data.data(), g.data.data(), mean.data.data(), T(0.1), T(0.9), T(0.01));
    for (size_t i = 0; i < 77; ++i) {
        const double v = 0.9 * m0.data[i] + 0.1 * (g.data[i] + 0.01 * w0.data[i]);
        expect_near<T>("velocity", mean.data[i], v, eps);
        expect_near<T>("weights", w.data[i], w0.data[i] - v, eps);
    }
    for (Index n : {0, 1, 31, 32, 33, 4096, 4097, 20000}) {
        const std::vector<T> x(n, T(0.5));  // every sum is exact
        expect_near<T>("sum_squares", T(sum_squares<T>(n, x.data())), 0.25 * double(n), 0);
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
                    test_normalization<T>(a, b, channels, pad, random);
                    test_activations<T>(a, b, channels, pad, random);
                    test_reductions<T>(a, b, channels, pad, random);
                }
            }
        }
    }
    for (Index channels : {0, 1, 3, 16, 33}) {
        for (Index kernel : {1, 2, 3}) {
            for (Index stride : {1, 2}) {
                for (Index dilation : {1, 2}) test_pooling<T>(channels, 5, kernel, stride, dilation, random);
            }
        }
    }
    test_reductions<T>(3, 5001, 3, 1, random);
    test_reductions<T>(1, 3001, 131, 1, random);
}

template <class T>
void test_updates() {
    std::mt19937 random(21);
    test_optimizer<T>(random);
    test_adaptive_optimizers<T>(random);
}

}  // namespace

int main() {
    test_all<float>();
    test_all<double>();
    test_all<bf16>();
    test_updates<float>();
    test_updates<double>();
    test_rounding_to_bf16();
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
