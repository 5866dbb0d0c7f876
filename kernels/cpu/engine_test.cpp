// Tests of the engine without Python, for ctest and the sanitizers: every instruction set against plain loops. Arrays
// end with their last element, so that AddressSanitizer sees a read or write of one more.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "engine/engine.h"

namespace {

using namespace hpctrain;

int failures = 0;

void expect(const char* what, double got, double want, double size, double terms) {
    const double bound = (terms + 4) * std::numeric_limits<float>::epsilon() * size;
    if (std::abs(got - want) <= bound) return;
    if (++failures < 20) std::printf("%s, %s: %.9g, not %.9g\n", engine().isa, what, got, want);
}

// Memory of exactly this many floats: not in a vector, whose capacity may be larger.
struct Floats {
    std::unique_ptr<float[]> data;
    Index size;

    Floats(Index n, std::mt19937& random) : data(new float[size_t(n)]), size(n) {
        std::normal_distribution<float> normal(0, 1);
        for (Index i = 0; i < n; ++i) data[size_t(i)] = normal(random);
    }
    float* at(Index i) { return data.get() + i; }
};

// Calls visit(i) for all indices below an extent, the last one running fastest.
template <size_t N, class Visit>
void for_all(const std::array<Index, N>& extent, Visit visit) {
    std::array<Index, N> i{};
    for (Index n : extent) {
        if (n <= 0) return;
    }
    for (size_t d = N; d > 0;) {
        visit(i);
        for (d = N; d > 0 && ++i[d - 1] == extent[d - 1]; --d) i[d - 1] = 0;
    }
}

struct Case {
    Index samples, groups, channels, filters;
    Sizes input, kernel, stride, dilation;
    Index pad;  // unused elements between rows of channels, and after lines, planes and samples
};

Index last_of(const Strides& strides, Index samples, const Sizes& extent, Index row) {
    if (samples * extent[0] * extent[1] * extent[2] * row == 0) return 0;
    return (samples - 1) * strides[0] + (extent[0] - 1) * strides[1] + (extent[1] - 1) * strides[2] +
           (extent[2] - 1) * strides[3] + row;
}

Strides strides_of(const Sizes& extent, Index row, Index pad) {
    Strides s;
    s[3] = row + pad;
    for (size_t d = 3; d-- > 0;) s[d] = s[d + 1] * extent[d] + pad;
    return s;
}

Convolution convolution(const Case& t) {
    Convolution c;
    c.samples = t.samples, c.groups = t.groups, c.channels = t.channels, c.filters = t.filters;
    c.input = t.input, c.kernel = t.kernel, c.stride = t.stride, c.dilation = t.dilation;
    for (size_t d = 0; d < 3; ++d) {
        const Index room = t.input[d] - t.dilation[d] * (t.kernel[d] - 1) - 1;
        c.output[d] = room < 0 ? 0 : room / t.stride[d] + 1;
    }
    c.x = strides_of(c.input, t.groups * t.channels, t.pad);
    c.y = strides_of(c.output, t.groups * t.filters, t.pad);
    c.w[3] = t.groups * t.filters + t.pad;
    c.w[2] = c.w[3] * t.channels + t.pad;
    c.w[1] = c.w[2] * t.kernel[2] + t.pad;
    c.w[0] = c.w[1] * t.kernel[1] + t.pad;
    return c;
}

// Calls visit(offset, group * channels + channel) for all elements of x, or of y.
template <class Visit>
void for_elements(const Strides& s, Index samples, const Sizes& extent, Index row, Visit visit) {
    for_all<5>({samples, extent[0], extent[1], extent[2], row}, [&](const std::array<Index, 5>& i) {
        visit(i[0] * s[0] + i[1] * s[1] + i[2] * s[2] + i[3] * s[3] + i[4], i[4]);
    });
}

// Calls visit(x, w, y) with the offsets of the factors and the result of every product.
template <class Visit>
void for_products(const Convolution& c, Visit visit) {
    for_all<5>({c.samples, c.groups, c.output[0], c.output[1], c.output[2]}, [&](const std::array<Index, 5>& o) {
        for_all<5>({c.kernel[0], c.kernel[1], c.kernel[2], c.channels, c.filters}, [&](const std::array<Index, 5>& t) {
            Index x = o[0] * c.x[0] + o[1] * c.channels + t[3], y = o[0] * c.y[0] + o[1] * c.filters + t[4];
            Index w = t[3] * c.w[3] + o[1] * c.filters + t[4];
            for (size_t d = 0; d < 3; ++d) {
                x += (o[d + 2] * c.stride[d] + t[d] * c.dilation[d]) * c.x[d + 1];
                y += o[d + 2] * c.y[d + 1];
                w += t[d] * c.w[d];
            }
            visit(x, w, y);
        });
    });
}

// Sums of products and of their sizes; what no position has stays as it was.
struct Sums {
    std::vector<double> sum, size, terms;
    std::vector<bool> inside;

    explicit Sums(Index n) : sum(size_t(n)), size(sum), terms(sum), inside(size_t(n)) {}
    void add(Index at, double a, double b) {
        sum[size_t(at)] += a * b, size[size_t(at)] += std::abs(a * b), terms[size_t(at)] += 1;
    }
    void compare(const char* what, Floats& got, const Floats& before) {
        for (size_t i = 0; i < sum.size(); ++i) {
            const double want = inside[i] ? sum[i] : before.data[i];
            expect(what, got.data[i], want, size[i], inside[i] ? terms[i] : -4);
        }
    }
};

void test(const Case& t, std::mt19937& random) {
    const Convolution c = convolution(t);
    const Index channels = c.groups * c.channels, filters = c.groups * c.filters;
    const Index in_x = last_of(c.x, c.samples, c.input, channels), in_y = last_of(c.y, c.samples, c.output, filters);
    const Index in_w = (c.kernel[0] - 1) * c.w[0] + (c.kernel[1] - 1) * c.w[1] + (c.kernel[2] - 1) * c.w[2] +
                       (c.channels ? (c.channels - 1) * c.w[3] + filters : 0);
    Floats x(in_x, random), w(in_w, random), y(in_y, random), dx(in_x, random), dw(in_w, random), dy(in_y, random);
    Floats bias(filters, random), before_y(in_y, random), before_x(in_x, random), before_w(in_w, random);
    Sums of_y(in_y), of_x(in_x), of_w(in_w);
    for_elements(c.x, c.samples, c.input, channels, [&](Index at, Index) { of_x.inside[size_t(at)] = true; });
    const std::array<Index, 5> weights{c.kernel[0], c.kernel[1], c.kernel[2], c.channels, filters};
    for_all<5>(weights, [&](const std::array<Index, 5>& i) {
        of_w.inside[size_t(i[0] * c.w[0] + i[1] * c.w[1] + i[2] * c.w[2] + i[3] * c.w[3] + i[4])] = true;
    });
    for_elements(c.y, c.samples, c.output, filters, [&](Index at, Index filter) {
        of_y.inside[size_t(at)] = true;
        of_y.add(at, *before_y.at(at), 1);
        of_y.add(at, *bias.at(filter), 1);
    });
    for_products(c, [&](Index at_x, Index at_w, Index at_y) {
        of_y.add(at_y, *x.at(at_x), *w.at(at_w));
        of_x.add(at_x, *dy.at(at_y), *w.at(at_w));
        of_w.add(at_w, *x.at(at_x), *dy.at(at_y));
    });
    std::copy_n(before_y.at(0), in_y, y.at(0));
    std::copy_n(before_x.at(0), in_x, dx.at(0));
    std::copy_n(before_w.at(0), in_w, dw.at(0));

    const Engine& e = engine();
    Floats packed(e.packed_size(c), random), packed_dx(e.packed_dx_size(c), random);
    e.pack(c, w.at(0), packed.at(0));
    e.conv(c, x.at(0), packed.at(0), {bias.at(0), true}, y.at(0));
    of_y.compare("conv", y, before_y);
    e.pack_dx(c, w.at(0), packed_dx.at(0));
    e.conv_dx(c, dy.at(0), packed_dx.at(0), dx.at(0));
    of_x.compare("conv_dx", dx, before_x);
    e.conv_dw(c, x.at(0), dy.at(0), dw.at(0));
    of_w.compare("conv_dw", dw, before_w);
}

void test_gemm(Index m, Index n, Index k, bool turn_a, bool turn_b, std::mt19937& random) {
    Floats a(m * k, random), b(k * n, random), c(m * n, random), bias(n, random), before(m * n, random);
    const Matrix left{a.at(0), turn_a ? 1 : k, turn_a ? m : 1}, right{b.at(0), turn_b ? 1 : n, turn_b ? k : 1};
    Sums sums(m * n);
    for_all<2>({m, n}, [&](const std::array<Index, 2>& i) {
        const Index at = i[0] * n + i[1];
        sums.inside[size_t(at)] = true;
        for (Index l = 0; l < k; ++l)
            sums.add(at, left.data[i[0] * left.row + l * left.column], right.data[l * right.row + i[1] * right.column]);
        sums.add(at, *bias.at(i[1]), 1), sums.add(at, *before.at(at), 1);
        *c.at(at) = *before.at(at);
    });
    engine().gemm(m, n, k, left, right, {bias.at(0), true}, c.at(0), n);
    sums.compare("gemm", c, before);
}

void test_engine() {
    std::mt19937 random(11);
    const Sizes one{1, 1, 1};
    for (Index pad : {0, 3}) {
        for (Index channels = 1; channels < 36; channels += channels < 18 ? 1 : 5)
            test({2, 1, channels, 36 - channels, {1, 5, 6}, {1, 3, 3}, {1, 1, 2}, one, pad}, random);
        for (Index filters : {63, 64, 65, 70, 97})
            test({1, 1, 3, filters, {1, 5, 4}, {1, 2, 3}, one, one, pad}, random);
        for (Index groups : {2, 15, 16, 33}) {
            test({2, groups, 1, 1, {1, 7, 8}, {1, 3, 2}, {1, 2, 1}, {1, 1, 2}, pad}, random);
            test({1, groups, 2, 3, {1, 7, 8}, {1, 3, 2}, {1, 1, 2}, {1, 2, 1}, pad}, random);
        }
        test({2, 1, 3, 4, {4, 5, 6}, {2, 3, 3}, {2, 1, 3}, {1, 2, 1}, pad}, random);
        test({3, 1, 90, 20, {1, 4, 4}, {1, 3, 3}, one, one, pad}, random);  // two blocks of terms
        test({1, 1, 2, 5, {1, 3, 700}, {1, 1, 3}, one, one, pad}, random);  // two chunks of positions
        test({2, 1, 3, 5, {1, 9, 11}, {1, 2, 2}, {1, 4, 5}, one, pad}, random);
        test({0, 1, 3, 5, {1, 4, 4}, {1, 2, 2}, one, one, pad}, random);
        test({2, 1, 0, 5, {1, 4, 4}, {1, 2, 2}, one, one, pad}, random);
        test({2, 1, 3, 5, {1, 1, 4}, {1, 2, 2}, one, one, pad}, random);
    }
    for (int turned = 0; turned < 4; ++turned) {
        for (Index m : {1, 7, 33}) test_gemm(m, 70 - m, 19, turned & 1, turned & 2, random);
        test_gemm(3, 5, 0, turned & 1, turned & 2, random);
        test_gemm(200, 17, 30, turned & 1, turned & 2, random);
        test_gemm(9, 300, 900, turned & 1, turned & 2, random);
    }
}

}  // namespace

int main() {
    for (const std::string& isa : engines()) {
        select_engine(isa);
        test_engine();
    }
    try {
        select_engine("none");
        ++failures;
    } catch (const std::invalid_argument&) {
    }
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
