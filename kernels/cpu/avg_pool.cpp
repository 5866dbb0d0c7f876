// Average pooling. Both directions are sums in double over what one element reads, in C order: the gradient of an
// element is gathered from the windows that hold it, so that threads never write to the same one.
#include <vector>

#include "sampling.h"
#include "spans.h"

namespace hpctrain {
namespace {

constexpr Index TILE = 64;  // channels whose sums are kept at a time

template <class S>
HPCTRAIN_INLINE void add_scaled(Index n, double factor, const S* x, double* sum) {
#pragma GCC ivdep
    for (Index c = 0; c < n; ++c) sum[c] += factor * wide(x[c]);
}

// sum[c] += x[c] / divisor[c]
template <class S, class A>
HPCTRAIN_INLINE void add_divided(Index n, const S* x, const A* divisor, double* sum) {
#pragma GCC ivdep
    for (Index c = 0; c < n; ++c) sum[c] += wide(x[c]) / wide(divisor[c]);
}

struct Span {
    Index begin, end;
};

// For each input along dim d, the outputs whose windows hold it.
std::vector<Span> holders(const AveragePool& p, size_t d) {
    std::vector<Span> found;
    for (Index i = 0; i < p.input[d]; ++i) {
        const Index begin = i < p.kernel[d] ? 0 : (i - p.kernel[d]) / p.stride[d] + 1;
        found.push_back({begin, std::max(begin, std::min(i / p.stride[d] + 1, p.output[d]))});
    }
    return found;
}

// The line of outputs along the width whose first window begins at *x.
template <class S, class A>
HPCTRAIN_CLONES void pool_line(const AveragePool& p, const S* x, S* out, const A* divisor) {
    for (Index o = 0; o < p.output[2]; ++o) {
        const A* by = divisor + o * p.divisor[3];
        const double inverse = 1 / wide(*by);
        for (Index first = 0; first < p.channels; first += TILE) {
            const Index n = std::min(p.channels - first, TILE);
            double sum[TILE];
            for (Index c = 0; c < n; ++c) sum[c] = 0;
            const S* window = x + o * p.stride[2] * p.x[3] + first;
            for (Index d = 0; d < p.kernel[0]; ++d) {
                for (Index h = 0; h < p.kernel[1]; ++h) {
                    const S* row = window + d * p.x[1] + h * p.x[2];
                    for (Index w = 0; w < p.kernel[2]; ++w) add_scaled(n, 1.0, row + w * p.x[3], sum);
                }
            }
            S* to = out + o * p.y[3] + first;
            if (p.divisor[4] == 0) {
                for (Index c = 0; c < n; ++c) to[c] = narrow<S>(sum[c] * inverse);
            } else {
                for (Index c = 0; c < n; ++c) to[c] = narrow<S>(sum[c] / wide(by[first + c]));
            }
        }
    }
}

// One line of inputs along the width, whose first element is *out, held by these windows; dy and divisor begin with
// the sample's.
template <class S, class A>
HPCTRAIN_CLONES void gradient_line(const AveragePool& p, Span depth, Span height, const Span* width, const S* dy,
                                   S* out, const A* divisor) {
    const bool one = depth.end - depth.begin == 1 && height.end - height.begin == 1 && p.divisor[4] == 0;
    for (Index i = 0; i < p.input[2]; ++i, out += p.x[3]) {
        if (one && width[i].end - width[i].begin == 1) {  // windows that do not overlap
            const Index w = width[i].begin;
            const S* from = dy + depth.begin * p.y[1] + height.begin * p.y[2] + w * p.y[3];
            const double inverse =
                1 / wide(divisor[depth.begin * p.divisor[1] + height.begin * p.divisor[2] + w * p.divisor[3]]);
#pragma GCC ivdep
            for (Index c = 0; c < p.channels; ++c) out[c] = narrow<S>(inverse * wide(from[c]));
            continue;
        }
        for (Index first = 0; first < p.channels; first += TILE) {
            const Index n = std::min(p.channels - first, TILE);
            double sum[TILE];
            for (Index c = 0; c < n; ++c) sum[c] = 0;
            for (Index d = depth.begin; d < depth.end; ++d) {
                for (Index h = height.begin; h < height.end; ++h) {
                    for (Index w = width[i].begin; w < width[i].end; ++w) {
                        const S* from = dy + d * p.y[1] + h * p.y[2] + w * p.y[3] + first;
                        const A* by = divisor + d * p.divisor[1] + h * p.divisor[2] + w * p.divisor[3];
                        if (p.divisor[4] == 0) {
                            add_scaled(n, 1 / wide(*by), from, sum);
                        } else {
                            add_divided(n, from, by + first, sum);
                        }
                    }
                }
            }
            for (Index c = 0; c < n; ++c) out[first + c] = narrow<S>(sum[c]);
        }
    }
}

// Calls work(sample, depth, height) for all lines along the width of tensors of these extents, each of which takes so
// many elements.
template <class Work>
void by_lines(Index samples, const std::array<Index, 3>& extent, Index work_per_line, Work work) {
    const Index lines = extent[2] == 0 ? 0 : samples * extent[0] * extent[1];
    in_tasks(lines, lines * work_per_line, [&](Index line) {
        const Index plane = line / extent[1];
        work(plane / extent[0], plane % extent[0], line % extent[1]);
    });
}

}  // namespace

template <class S>
void avg_pool(const AveragePool& p, const S* x, S* out, const Real<S>* divisor) {
    by_lines(p.samples, p.output, p.input[2] * p.channels, [&](Index n, Index d, Index h) {
        pool_line(p, x + n * p.x[0] + d * p.stride[0] * p.x[1] + h * p.stride[1] * p.x[2],
                  out + n * p.y[0] + d * p.y[1] + h * p.y[2],
                  divisor + n * p.divisor[0] + d * p.divisor[1] + h * p.divisor[2]);
    });
}

template <class S>
void avg_pool_dx(const AveragePool& p, const S* dy, S* out, const Real<S>* divisor) {
    const std::vector<Span> depth = holders(p, 0), height = holders(p, 1), width = holders(p, 2);
    by_lines(p.samples, p.input, p.input[2] * p.channels, [&](Index n, Index d, Index h) {
        gradient_line(p, depth[size_t(d)], height[size_t(h)], width.data(), dy + n * p.y[0], out + n * p.x[0] + d * p.x[1] + h * p.x[2],
                      divisor + n * p.divisor[0]);
    });
}

#define HPCTRAIN_FOR(S)                                                           \
    template void avg_pool<S>(const AveragePool&, const S*, S*, const Real<S>*); \
    template void avg_pool_dx<S>(const AveragePool&, const S*, S*, const Real<S>*);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)
HPCTRAIN_FOR(bf16)

}  // namespace hpctrain
