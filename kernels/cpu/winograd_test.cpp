// Winograd's convolution on all instruction sets of this machine against sums in double: random geometries, arrays that
// end where they must not be read beyond.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "engine/engine.h"
#include "engine/winograd.h"

using namespace hpctrain;

namespace {

int failures = 0;

struct Case {
    Convolution c;
    TileAnchor anchor;
};

// Extents of a row of arrays (N, D, H, W, C), whose rows lie `gap` floats further apart than they need.
Strides strides(Sizes extent, Index channels, Index gap) {
    const Index row = extent[2] * channels + gap;
    return {extent[0] * extent[1] * row, extent[1] * row, row, channels};
}

Index floats(Index samples, Sizes extent, Index channels, const Strides& step) {
    if (samples * extent[0] * extent[1] * extent[2] * channels == 0) return 0;
    return (samples - 1) * step[0] + (extent[0] - 1) * step[1] + (extent[1] - 1) * step[2] + (extent[2] - 1) * step[3] +
           channels;
}

Case random_case(std::mt19937& random) {
    const auto pick = [&](Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(random); };
    const Index channel_counts[] = {1, 2, 3, 5, 8, 15, 16, 17, 33, 70};
    Case found;
    Convolution& c = found.c;
    const Index edge = pick(0, 2) ? 3 : 5;
    c.samples = pick(1, 3), c.groups = pick(0, 3) ? 1 : 2;
    c.channels = channel_counts[pick(0, 9)], c.filters = channel_counts[pick(0, 9)];
    c.kernel = {pick(0, 1) ? 3 : 1, edge, edge};
    c.output = {c.kernel[0] == 3 ? pick(1, 9) : 1, pick(1, 11), pick(1, 11)};
    for (int d = 0; d < 3; ++d) c.input[d] = c.output[d] + c.kernel[d] - 1;
    c.x = strides(c.input, c.channels * c.groups, pick(0, 3));
    c.y = strides(c.output, c.filters * c.groups, pick(0, 3));
    c.w[3] = c.filters * c.groups + pick(0, 3);
    c.w[2] = c.channels * c.w[3], c.w[1] = edge * c.w[2], c.w[0] = edge * c.w[1];
    const int points = int(edge + 1 + 2 * pick(0, 1));
    found.anchor = {int(pick(0, points - edge)), int(pick(0, points - edge)), points};
    return found;
}

// A stride, by which rows and columns part into phases: the last ones may lack some.
Case strided_case(std::mt19937& random) {
    const auto pick = [&](Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(random); };
    Case found;
    Convolution& c = found.c;
    const Index stride = pick(2, 4), taps = pick(0, 2) ? 3 : 5, edge = pick((taps - 1) * stride + 1, taps * stride);
    c.samples = pick(1, 3), c.channels = pick(1, 6), c.filters = pick(1, 40);
    c.kernel = {1, edge, edge}, c.stride = {1, stride, stride};
    c.input = {1, edge + pick(0, 25), edge + pick(0, 25)};
    for (size_t d = 1; d < 3; ++d) c.output[d] = (c.input[d] - edge) / stride + 1;
    c.x = strides(c.input, c.channels, pick(0, 3)), c.y = strides(c.output, c.filters, pick(0, 3));
    c.w[3] = c.filters + pick(0, 3);
    c.w[2] = c.channels * c.w[3], c.w[1] = edge * c.w[2], c.w[0] = edge * c.w[1];
    return found;
}

// One tile, and more weights than the second-level cache holds.
Case many_weights() {
    Case found;
    Convolution& c = found.c;
    c.samples = 1, c.channels = 100, c.filters = 150, c.kernel = {1, 3, 3};
    c.output = {1, 4, 4}, c.input = {1, 6, 6};
    c.x = strides(c.input, c.channels, 0), c.y = strides(c.output, c.filters, 0);
    c.w = {9 * c.channels * c.filters, 3 * c.channels * c.filters, c.channels * c.filters, c.filters};
    return found;
}

// Calls work(offset in x, in w, in y) for every product of the convolution.
template <class Work>
void each_product(const Convolution& c, Work work) {
    for (Index n = 0; n < c.samples; ++n)
        for (Index d = 0; d < c.output[0]; ++d)
            for (Index i = 0; i < c.output[1]; ++i)
                for (Index j = 0; j < c.output[2]; ++j)
                    for (Index r = 0; r < c.kernel[0]; ++r)
                        for (Index s = 0; s < c.kernel[1]; ++s)
                            for (Index t = 0; t < c.kernel[2]; ++t)
                                for (Index ch = 0; ch < c.channels; ++ch)
                                    for (Index k = 0; k < c.filters * c.groups; ++k)
                                        work(n * c.x[0] + (d + r) * c.x[1] + (i * c.stride[1] + s) * c.x[2] +
                                                 (j * c.stride[2] + t) * c.x[3] + ch +
                                                 k / c.filters * c.channels,
                                             r * c.w[0] + s * c.w[1] + t * c.w[2] + ch * c.w[3] + k,
                                             n * c.y[0] + d * c.y[1] + i * c.y[2] + j * c.y[3] + k);
}

// Elements that no product reaches (between rows) must be what they were.
void expect(const char* isa, const char* what, const std::vector<float>& got, const std::vector<double>& want,
            const std::vector<bool>& reached, float before) {
    double error = 0, size = 0;
    bool spilled = false;
    for (size_t i = 0; i < got.size(); ++i) {
        if (reached[i]) {
            error = std::max(error, std::isfinite(got[i]) ? std::abs(got[i] - want[i]) : 1e30);
            size = std::max(size, std::abs(want[i]));
        } else {
            spilled = spilled || got[i] != before;
        }
    }
    if (error > 2e-5 * size || spilled) {
        std::printf("%s %s: error %.3g of %.3g%s\n", isa, what, error, size, spilled ? ", and wrote between rows" : "");
        ++failures;
    }
}

void test(const Case& given, std::mt19937& random) {
    const Convolution& c = given.c;
    constexpr float BEFORE = 77;
    const auto values = [&](Index count) {
        std::vector<float> found(static_cast<size_t>(count));
        for (float& value : found) value = std::uniform_real_distribution<float>(-1, 1)(random);
        found.shrink_to_fit();
        return found;
    };
    const Index filters = c.filters * c.groups;
    const std::vector<float> x = values(floats(c.samples, c.input, c.channels * c.groups, c.x));
    const std::vector<float> w = values((c.kernel[0] - 1) * c.w[0] + (c.kernel[1] - 1) * c.w[1] +
                                        (c.kernel[2] - 1) * c.w[2] + (c.channels - 1) * c.w[3] + filters);
    const std::vector<float> dy = values(floats(c.samples, c.output, filters, c.y));
    std::vector<double> want_y(dy.size()), want_dx(x.size()), want_dw(w.size());
    std::vector<bool> in_y(dy.size()), in_x(x.size()), in_w(w.size());
    each_product(c, [&](Index ix, Index iw, Index iy) {
        const size_t a = size_t(ix), b = size_t(iw), o = size_t(iy);
        want_y[o] += double(x[a]) * w[b], want_dx[a] += double(dy[o]) * w[b], want_dw[b] += double(x[a]) * dy[o];
        in_x[a] = in_w[b] = in_y[o] = true;
    });
    const Engine& e = engine();
    std::vector<float> y(dy.size(), BEFORE), dx(x.size(), BEFORE), dw(w.size(), BEFORE);
    e.winograd->conv(c, x.data(), w.data(), {}, y.data(), given.anchor);
    if (c.stride[1] == 1) e.winograd->conv_dx(c, dy.data(), w.data(), dx.data(), given.anchor);
    e.winograd->conv_dw(c, x.data(), dy.data(), dw.data(), given.anchor);
    expect(e.isa, "y", y, want_y, in_y, BEFORE);
    if (c.stride[1] == 1) expect(e.isa, "dx", dx, want_dx, in_x, BEFORE);
    expect(e.isa, "dw", dw, want_dw, in_w, BEFORE);
}

}  // namespace

int main() {
    for (const std::string& isa : engines()) {
        select_engine(isa);
        std::mt19937 random(31);
        for (int i = 0; i < 40; ++i) test(random_case(random), random);
        for (int i = 0; i < 20; ++i) test(strided_case(random), random);
        test(many_weights(), random);
    }
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
