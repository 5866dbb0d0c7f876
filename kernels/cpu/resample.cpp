// Interpolation along one dim, and its adjoint, which is one too: sums of weighted inputs in their order, in double
// where there are many.
#include "sampling.h"
#include "spans.h"

namespace hpctrain {
namespace {

constexpr Index TILE = 128;
constexpr Index TASK = 1 << 14;  // elements that a thread takes at a time

// out[i] = sum over TERMS of weight * x[offset + i]
template <int TERMS, class S>
HPCTRAIN_INLINE void weigh_few(Index n, const Index* offset, const double* weight, const S* x, S* out) {
    using E = Real<S>;
    E factor[TERMS];
    for (int t = 0; t < TERMS; ++t) factor[t] = E(weight[t]);
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) {
        E sum = factor[0] * load(x[offset[0] + i]);
        for (int t = 1; t < TERMS; ++t) sum += factor[t] * load(x[offset[t] + i]);
        out[i] = store<S>(sum);
    }
}

// The same for any number of terms, in double.
template <class S>
HPCTRAIN_INLINE void weigh_many(Index n, Index terms, const Index* offset, const double* weight, const S* x, S* out) {
    for (Index first = 0; first < n; first += TILE) {
        const Index width = std::min(n - first, TILE);
        double sum[TILE];
        for (Index i = 0; i < width; ++i) sum[i] = 0;
        for (Index t = 0; t < terms; ++t) {
            const S* from = x + offset[t] + first;
            for (Index i = 0; i < width; ++i) sum[i] += weight[t] * wide(from[i]);
        }
        for (Index i = 0; i < width; ++i) out[first + i] = narrow<S>(sum[i]);
    }
}

// Outputs [begin, end), of n contiguous elements each.
template <class S>
HPCTRAIN_CLONES void weigh(const Resampling& by, Index begin, Index end, Index n, const S* x, S* out) {
    for (Index o = begin; o < end; ++o) {
        const Index first = by.first[o], terms = by.first[o + 1] - first;
        const Index* offset = by.offset + first;
        const double* weight = by.weight + first;
        S* to = out + o * by.out_step;
        switch (terms) {
            case 1:
                weigh_few<1>(n, offset, weight, x, to);
                break;
            case 2:
                weigh_few<2>(n, offset, weight, x, to);
                break;
            case 3:
                weigh_few<3>(n, offset, weight, x, to);
                break;
            case 4:
                weigh_few<4>(n, offset, weight, x, to);
                break;
            default:
                weigh_many(n, terms, offset, weight, x, to);
        }
    }
}

}  // namespace

template <class S>
void resample(const Resampling& by, const S* x, S* out) {
    const Index inner = by.after.size();
    if (inner == 0) return;
    const Index all = by.before.size() * by.outputs, chunk = std::max<Index>(1, TASK / inner);
    in_tasks(parts(all, chunk), all * inner, [&](Index task) {
        const Index end = std::min(all, (task + 1) * chunk);
        for (Index at = task * chunk; at < end;) {
            const Index position = at / by.outputs, begin = at % by.outputs;
            const Index stop = std::min(by.outputs, begin + end - at);
            by_span(by.before, position, position + 1, [&](Index, auto& whole) {
                by_span(by.after, 0, inner, [&](Index n, auto& part) {
                    weigh(by, begin, stop, n, x + whole[0] + part[0], out + whole[1] + part[1]);
                });
            });
            at += stop - begin;
        }
    });
}

#define HPCTRAIN_FOR(S) template void resample<S>(const Resampling&, const S*, S*);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)
HPCTRAIN_FOR(bf16)

}  // namespace hpctrain
