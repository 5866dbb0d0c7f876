// Tests of products of bfloat16 without Python, for ctest and the sanitizers: random geometries on every instruction
// set against sums in double. Arrays end with their last element, so that AddressSanitizer sees a read of one more.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "engine/bf16.h"

using namespace hpctrain;

namespace {

int failures = 0;

float widened(Bf16 value) {
    const std::uint32_t bits = std::uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// `size` elements of memory that is exactly so large, normally distributed.
struct Numbers {
    std::unique_ptr<Bf16[]> data;
    Index size;

    Numbers(Index n, std::mt19937& random) : data(new Bf16[size_t(n)]), size(n) {
        std::normal_distribution<float> normal;
        for (Index i = 0; i < n; ++i) {
            const float value = normal(random);
            std::uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            data[size_t(i)].bits = std::uint16_t(bits >> 16);
        }
    }
    double operator[](Index i) const { return widened(data[size_t(i)]); }
};

// Sums of products and of their sizes.
struct Sums {
    std::vector<double> sum, size, terms;
    explicit Sums(Index n) : sum(size_t(n)), size(sum), terms(sum) {}
    void add(Index at, double a, double b) {
        sum[size_t(at)] += a * b, size[size_t(at)] += std::abs(a * b), terms[size_t(at)] += 1;
    }
    // Summed in float32, of Winograd with an error of `more` of the largest; results of bfloat16 are rounded once.
    template <class Got>
    void compare(const char* what, double unit, double more, Got got) const {
        double largest = 0;
        for (double value : sum) largest = std::max(largest, std::abs(value));
        for (size_t i = 0; i < sum.size(); ++i) {
            if (terms[i] < 0) continue;
            const double summed =
                std::max((terms[i] + 4) * std::numeric_limits<float>::epsilon() * size[i], more * largest);
            const double bound = summed + unit * (std::abs(sum[i]) + summed), value = got(Index(i));
            if (std::abs(value - sum[i]) <= bound) continue;
            if (++failures < 20)
                std::printf("%s, %s: %.9g, not %.9g +- %.2g\n", engine().isa, what, value, sum[i], bound);
        }
    }
};

constexpr double UNIT = 1.0 / 256, WINOGRAD = 1e-5;

Strides strides(const Sizes& extent, Index channels) {
    return {extent[0] * extent[1] * extent[2] * channels, extent[1] * extent[2] * channels, extent[2] * channels,
            channels};
}

Convolution random_case(std::mt19937& random) {
    const auto pick = [&](Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(random); };
    const Index channel_counts[] = {1, 2, 3, 4, 6, 8, 15, 16, 17, 34, 70};
    Convolution c;
    c.samples = pick(1, 5), c.groups = pick(0, 3) ? 1 : pick(2, 5);
    c.channels = channel_counts[pick(0, 10)], c.filters = channel_counts[pick(0, 10)];
    const bool volume = pick(0, 2) == 0, winograd = pick(0, 2) == 0;
    for (size_t d = volume ? 0 : 1; d < 3; ++d) {
        c.kernel[d] = winograd ? 3 : pick(1, 4), c.output[d] = pick(1, volume ? 5 : 9);
        if (!winograd) c.stride[d] = pick(1, 3), c.dilation[d] = pick(1, 2);
        const Index more = c.stride[d] > 1 ? pick(0, c.stride[d] - 1) : 0;  // inputs that no window reaches
        c.input[d] = (c.output[d] - 1) * c.stride[d] + c.dilation[d] * (c.kernel[d] - 1) + 1 + more;
    }
    const Index gap = pick(0, 2);
    c.x = strides(c.input, c.groups * c.channels + gap), c.y = strides(c.output, c.groups * c.filters + gap);
    const Index row = c.groups * c.filters + gap;
    c.w = {c.kernel[1] * c.kernel[2] * c.channels * row, c.kernel[2] * c.channels * row, c.channels * row, row};
    return c;
}

// Outputs 13 x 13: of these Winograd does 12 x 12 where there are pairs.
Convolution with_strips() {
    Convolution c;
    c.samples = 12, c.channels = c.filters = 64;
    c.kernel = {1, 3, 3}, c.output = {1, 13, 13}, c.input = {1, 15, 15};
    c.x = strides(c.input, 64), c.y = strides(c.output, 64), c.w = {9 * 64 * 64, 3 * 64 * 64, 64 * 64, 64};
    return c;
}

Index size_of(Index samples, const Sizes& extent, Index channels, const Strides& s) {
    return (samples - 1) * s[0] + (extent[0] - 1) * s[1] + (extent[1] - 1) * s[2] + (extent[2] - 1) * s[3] + channels;
}

void test(const Convolution& c, bool exact, std::mt19937& random) {
    const Index channels = c.groups * c.channels, filters = c.groups * c.filters;
    const Numbers x(size_of(c.samples, c.input, channels, c.x), random);
    const Numbers dy(size_of(c.samples, c.output, filters, c.y), random);
    const Numbers w(size_of(c.kernel[0], {c.kernel[1], c.kernel[2], c.channels}, filters, c.w), random);
    Numbers y(dy.size, random), dx(x.size, random);
    std::vector<float> dw(size_t(w.size), 7), bias(static_cast<size_t>(filters), 0.5f);
    Sums of_y(y.size), of_x(x.size), of_w(w.size);
    for (Index i = 0, all = c.samples * c.output[0] * c.output[1] * c.output[2] * filters; i < all; ++i) {
        const Index k = i % filters, ow = i / filters % c.output[2], oh = i / filters / c.output[2] % c.output[1];
        const Index od = i / filters / c.output[2] / c.output[1] % c.output[0];
        const Index n = i / filters / c.output[2] / c.output[1] / c.output[0];
        const Index at_y = n * c.y[0] + od * c.y[1] + oh * c.y[2] + ow * c.y[3] + k;
        of_y.add(at_y, 0.5, 1);
        for (Index t = 0; t < c.taps() * c.channels; ++t) {
            const Index channel = t % c.channels, tap = t / c.channels;
            const Index tw = tap % c.kernel[2], th = tap / c.kernel[2] % c.kernel[1];
            const Index td = tap / c.kernel[2] / c.kernel[1];
            const Index at_x = n * c.x[0] + (od * c.stride[0] + td * c.dilation[0]) * c.x[1] +
                               (oh * c.stride[1] + th * c.dilation[1]) * c.x[2] +
                               (ow * c.stride[2] + tw * c.dilation[2]) * c.x[3] + k / c.filters * c.channels + channel;
            const Index at_w = td * c.w[0] + th * c.w[1] + tw * c.w[2] + channel * c.w[3] + k;
            of_y.add(at_y, x[at_x], w[at_w]);
            of_x.add(at_x, dy[at_y], w[at_w]);
            of_w.add(at_w, x[at_x], dy[at_y]);
        }
    }
    for (double& value : of_y.sum) value = value > 0 ? value : 0.25 * value;
    for (Sums* gaps : {&of_y, &of_w}) {  // nothing is written there
        for (double& terms : gaps->terms) terms = terms > 0 ? terms : -1;
    }
    for (Index i = 0; i < x.size; ++i) {  // elements that no window reaches are 0, gaps are not
        if (of_x.terms[size_t(i)] == 0 && i % c.x[3] >= channels) of_x.terms[size_t(i)] = -1;
    }
    const double more = exact ? 0 : WINOGRAD;
    conv(c, x.data.get(), w.data.get(), {bias.data(), false, 0.25f}, exact, y.data.get());
    of_y.compare("conv", UNIT, more, [&](Index i) { return y[i]; });
    conv_dx(c, dy.data.get(), w.data.get(), exact, dx.data.get());
    of_x.compare("conv_dx", UNIT, more, [&](Index i) { return dx[i]; });
    conv_dw(c, x.data.get(), dy.data.get(), exact, dw.data());
    of_w.compare("conv_dw", 0, more, [&](Index i) { return double(dw[size_t(i)]); });
}

void test_gemm(Index m, Index n, Index k, bool turn_a, bool turn_b, std::mt19937& random) {
    const Numbers a(m * k, random), b(k * n, random);
    const Bf16Matrix left{a.data.get(), turn_a ? 1 : k, turn_a ? m : 1};
    const Bf16Matrix right{b.data.get(), turn_b ? 1 : n, turn_b ? k : 1};
    Numbers c(m * n, random);
    std::vector<float> bias(static_cast<size_t>(n), -0.5f), floats(static_cast<size_t>(m * n));
    Sums sums(m * n);
    for (Index i = 0; i < m * n; ++i) {
        for (Index t = 0; t < k; ++t)
            sums.add(i, a[i / n * left.row + t * left.column], b[t * right.row + i % n * right.column]);
        sums.add(i, -0.5, 1);
    }
    gemm(m, n, k, left, right, {bias.data()}, c.data.get(), n);
    sums.compare("gemm", UNIT, 0, [&](Index i) { return c[i]; });
    gemm(m, n, k, left, right, {bias.data()}, floats.data(), n);
    sums.compare("gemm", 0, 0, [&](Index i) { return double(floats[size_t(i)]); });
}

}  // namespace

int main() {
    for (const std::string& isa : engines()) {
        select_engine(isa);
        std::mt19937 random(5);
        for (int i = 0; i < 60; ++i) test(random_case(random), i % 2, random);
        if (isa == engines().front()) test(with_strips(), false, random);
        for (int turned = 0; turned < 4; ++turned) {
            for (Index m : {1, 7, 33}) test_gemm(m, 70 - m, 19, turned & 1, turned & 2, random);
            for (Index k : {0, 1, 2, 30}) test_gemm(5, 17, k, turned & 1, turned & 2, random);
            test_gemm(200, 17, 30, turned & 1, turned & 2, random);
            test_gemm(9, 300, 900, turned & 1, turned & 2, random);
        }
    }
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
