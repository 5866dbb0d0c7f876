// Interpolation along one dim, and its adjoint, which is one too: sums in double of weighted inputs, in their order.
#include "sampling.h"
#include "spans.h"

namespace hpctrain {
namespace {

constexpr Index TILE = 128;
constexpr Index TASK = 1 << 14;  // elements that a thread takes at a time

// out[i] = sum over terms of weight * x[offset + i]
template <class S>
HPCTRAIN_CLONES void weigh(Index n, Index terms, const Index* offset, const double* weight, const S* x, S* out) {
    if (terms == 1) {
        const S* a = x + offset[0];
        for (Index i = 0; i < n; ++i) out[i] = narrow<S>(weight[0] * wide(a[i]));
    } else if (terms == 2) {
        const S *a = x + offset[0], *b = x + offset[1];
        for (Index i = 0; i < n; ++i) out[i] = narrow<S>(weight[0] * wide(a[i]) + weight[1] * wide(b[i]));
    } else {
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
                for (Index o = begin; o < stop; ++o) {
                    const Index first = by.first[o], terms = by.first[o + 1] - first;
                    const S* from = x + whole[0];
                    S* to = out + whole[1] + o * by.out_step;
                    by_span(by.after, 0, inner, [&](Index n, auto& part) {
                        weigh(n, terms, by.offset + first, by.weight + first, from + part[0], to + part[1]);
                    });
                }
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
