// Losses that are a sum over elements, in double, and their gradients.
#include <vector>

#include "losses.h"
#include "spans.h"

namespace hpctrain {
namespace {

constexpr Index BLOCK = 2048;        // elements of strided arrays that are made contiguous at a time
constexpr Index TASK = 16 * BLOCK;   // elements that a thread takes at a time

struct Squared {
    HPCTRAIN_INLINE double value(double x, double t) const { return (x - t) * (x - t); }
    HPCTRAIN_INLINE double slope(double x, double t) const { return 2 * (x - t); }
};

struct Absolute {
    HPCTRAIN_INLINE double value(double x, double t) const { return std::abs(x - t); }
    HPCTRAIN_INLINE double slope(double x, double t) const {
        const double d = x - t;
        return d > 0 ? 1 : d < 0 ? -1 : d;  // NaN stays
    }
};

struct Huber {
    double delta;
    HPCTRAIN_INLINE double value(double x, double t) const {
        const double d = std::abs(x - t), square = d > delta ? delta : d;  // the part that is not in the linear range
        return square * (d - square / 2);
    }
    HPCTRAIN_INLINE double slope(double x, double t) const {
        const double d = x - t;
        return d > delta ? delta : d < -delta ? -delta : d;
    }
};

// E is float where x is no more precise: functions in double would take most of the time.
template <class E>
struct Logistic {
    // small terms last: those of a right and certain prediction would be lost beside x
    HPCTRAIN_INLINE double value(double x, double t) const {
        return ((x < 0 ? 0 : x) - t * x) + double(log1p_unit(exp_negative(-std::abs(E(x)))));
    }
    HPCTRAIN_INLINE double slope(double x, double t) const {
        const E e = exp_negative(-std::abs(E(x)));
        return double((x > 0 ? 1 : e) / (1 + e)) - t;
    }
};

struct Agreement {
    HPCTRAIN_INLINE double value(double x, double t) const { return (x > 0) == (t > 0.5) ? 1 : 0; }
    HPCTRAIN_INLINE double slope(double, double) const { return 0; }
};

template <class F, class S>
HPCTRAIN_CLONES double value_block(F f, Index n, const S* x, const S* t) {
    return sum_of(n, [=](Index i) { return f.value(wide(x[i]), wide(t[i])); });
}

template <class F, class S>
HPCTRAIN_CLONES void slope_run(F f, double scale, Index n, const S* x, const S* t, S* out) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) out[i] = narrow<S>(f.slope(wide(x[i]), wide(t[i])) * scale);
}

// The sum over elements [begin, end), block by block, whatever the strides are.
template <class F, class S>
double value_span(F f, const Layout<2>& layout, Index begin, Index end, const S* x, const S* t) {
    S from_x[BLOCK], from_t[BLOCK];
    Index filled = 0;
    double sum = 0;
    by_span(layout, begin, end, [&](Index count, auto& at) {
        const S *a = x + at[0], *b = t + at[1];
        while (count > 0) {
            const Index n = std::min(count, BLOCK - filled);
            if (n == BLOCK) {
                sum += value_block(f, n, a, b);
            } else {
                std::copy_n(a, n, from_x + filled), std::copy_n(b, n, from_t + filled);
                filled += n;
            }
            if (filled == BLOCK) sum += value_block(f, filled, from_x, from_t), filled = 0;
            a += n, b += n, count -= n;
        }
    });
    return filled ? sum + value_block(f, filled, from_x, from_t) : sum;
}

// work(f) for the loss of that kind.
template <class S, class Work>
void with(Loss kind, double delta, Work work) {
    switch (kind) {
        case Loss::squared:
            return work(Squared{});
        case Loss::absolute:
            return work(Absolute{});
        case Loss::huber:
            return work(Huber{delta});
        case Loss::logistic:
            return work(Logistic<Real<S>>{});
        case Loss::agreement:
            return work(Agreement{});
    }
}

}  // namespace

template <class S>
void pointwise_loss(Loss kind, const Samples<2>& samples, const S* x, const S* target, Real<S>* loss, Index loss_step,
                    double delta) {
    const Index size = samples.inside.size(), each = parts(size, TASK);
    std::vector<double> sums(size_t(samples.count * each));
    with<S>(kind, delta, [&](auto f) {
        in_tasks(samples.count * each, samples.count * size, [&](Index task) {
            const Index n = task / each, begin = task % each * TASK;
            sums[size_t(task)] = value_span(f, samples.inside, begin, std::min(size, begin + TASK),
                                            x + n * samples.step[0], target + n * samples.step[1]);
        });
    });
    for (Index n = 0; n < samples.count; ++n) {
        double sum = 0;
        for (Index part = 0; part < each; ++part) sum += sums[size_t(n * each + part)];
        loss[n * loss_step] = narrow<Real<S>>(sum);
    }
}

template <class S>
void pointwise_loss_dx(Loss kind, const Samples<3>& samples, const S* x, const S* target, const Real<S>* scale,
                       Index scale_step, S* out, double delta) {
    const Index size = samples.inside.size(), each = parts(size, TASK);
    with<S>(kind, delta, [&](auto f) {
        in_tasks(samples.count * each, samples.count * size, [&](Index task) {
            const Index n = task / each, begin = task % each * TASK;
            by_span(samples.inside, begin, std::min(size, begin + TASK), [&](Index count, auto& at) {
                slope_run(f, wide(scale[n * scale_step]), count, x + n * samples.step[0] + at[0],
                          target + n * samples.step[1] + at[1], out + n * samples.step[2] + at[2]);
            });
        });
    });
}

#define HPCTRAIN_FOR(S)                                                                                      \
    template void pointwise_loss<S>(Loss, const Samples<2>&, const S*, const S*, Real<S>*, Index, double);        \
    template void pointwise_loss_dx<S>(Loss, const Samples<3>&, const S*, const S*, const Real<S>*, Index, S*, double);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)
HPCTRAIN_FOR(bf16)

}  // namespace hpctrain
