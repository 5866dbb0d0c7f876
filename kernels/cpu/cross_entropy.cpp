// Softmax cross-entropy, its gradient, and how many labels have the largest logit; sums in double. A sample's positions
// are added in order, in parts whose size depends on the number of classes alone.
#include <vector>

#include "losses.h"
#include "softmax_rows.h"

namespace hpctrain {
namespace {

constexpr Index TASK = 1 << 14;  // elements that a thread takes at a time

template <class L>
void read_as(const void* data, Index count, Index offset, Index step, Index* to) {
    const L* from = static_cast<const L*>(data) + offset;
    for (Index i = 0; i < count; ++i) to[i] = Index(from[i * step]);
}

bool counts(Index label, Index classes) { return label >= 0 && label < classes; }

// log(total[r]), and the sum of what the rows cost.
template <class S, class A>
HPCTRAIN_CLONES double cost(Index rows, Index classes, const S* x, Index x_step, const Index* label, const double* top,
                            const double* total, const A* weight, double all_weights, double smoothing) {
    double base[ROWS], sum = 0;
    for (Index r = 0; r < rows; ++r) base[r] = log_positive(total[r]);
    for (Index r = 0; r < rows; ++r, x += x_step) {
        if (label[r] < 0 || label[r] >= classes) continue;
        const double largest = top[r], at_label = wide(x[label[r]]) - largest;
        double term = (1 - smoothing) * wide(weight[label[r]]) * (base[r] - at_label);
        if (smoothing != 0) {  // 0 times the infinity of a class that a logit of -inf excludes would be NaN
            const double shifted =
                sum_of(classes, [=](Index k) { return (wide(x[k]) - largest) * wide(weight[k]); });
            term += smoothing / double(classes) * (base[r] * all_weights - shifted);
        }
        sum += term;
    }
    return sum;
}

template <class S, class A>
HPCTRAIN_CLONES void gradient(Index rows, Index classes, const A* p, Index p_step, const Index* label, const A* weight,
                              double all_weights, double smoothing, double scale, S* out, Index out_step) {
    const double share = smoothing / double(classes);
    for (Index r = 0; r < rows; ++r, p += p_step, out += out_step) {
        if (label[r] < 0 || label[r] >= classes) {
            for (Index k = 0; k < classes; ++k) out[k] = narrow<S>(0);
            continue;
        }
        const double at_label = wide(weight[label[r]]), hit = (1 - smoothing) * at_label;
        const double factor = scale * (hit + share * all_weights);
        const double whole = factor * wide(p[label[r]]) - scale * (hit + share * at_label);
        if (smoothing != 0) {
#pragma GCC ivdep
            for (Index k = 0; k < classes; ++k)
                out[k] = narrow<S>(factor * wide(p[k]) - scale * share * wide(weight[k]));
        } else {
#pragma GCC ivdep
            for (Index k = 0; k < classes; ++k) out[k] = narrow<S>(factor * wide(p[k]));
        }
        out[label[r]] = narrow<S>(whole);
    }
}

// How many of the rows have at their label the first of their largest logits, where NaN is larger than any number.
template <class S>
HPCTRAIN_CLONES Index correct(Index rows, Index classes, const S* x, Index x_step, const Index* label) {
    Index found = 0;
    for (Index r = 0; r < rows; ++r, x += x_step) {
        const int at = int(label[r]);
        if (label[r] < 0 || label[r] >= classes) continue;
        const auto best = load(x[at]);
        int beaten = 0;
        if (best == best) {
            for (int k = 0; k < at; ++k) beaten += !(load(x[k]) < best);
            for (int k = at + 1; k < int(classes); ++k) beaten += !(load(x[k]) <= best);
        } else {
            for (int k = 0; k < at; ++k) beaten += load(x[k]) != load(x[k]);
        }
        found += beaten == 0;
    }
    return found;
}

// The same of rows of few classes, side by side.
template <class S>
HPCTRAIN_CLONES Index correct_narrow(Index rows, Index classes, const S* x, Index x_step, const Index* label) {
    using E = Real<S>;
    alignas(64) E largest[ROWS], value[ROWS];
    int first[ROWS], found = 0;
    for (Index r = 0; r < rows; ++r) largest[r] = load(x[r * x_step]), first[r] = 0;
    for (int k = 1; k < int(classes); ++k) {
        for (Index r = 0; r < rows; ++r) value[r] = load(x[r * x_step + k]);
        for (Index r = 0; r < rows; ++r) {
            const bool nan = (value[r] != value[r]) & (largest[r] == largest[r]), better = (value[r] > largest[r]) | nan;
            largest[r] = better ? value[r] : largest[r];
            first[r] = better ? k : first[r];
        }
    }
    for (Index r = 0; r < rows; ++r) found += Index(first[r]) == label[r];
    return found;
}

// Calls work(sample, part, rows, row offsets, row strides, labels) for up to ROWS rows at a time.
template <int N, class Work>
void by_rows(const Samples<N>& samples, Index classes, const Labels& labels, Work work) {
    const Index size = samples.inside.size(), chunk = std::max<Index>(1, TASK / std::max<Index>(1, classes));
    const Index each = parts(size, chunk);
    in_tasks(samples.count * each, samples.count * size * classes, [&](Index task) {
        const Index sample = task / each, part = task % each;
        by_span(samples.inside, part * chunk, std::min(size, (part + 1) * chunk), [&](Index count, auto at) {
            const auto& step = samples.inside.stride[size_t(samples.inside.dims - 1)];
            for (size_t i = 0; i < N; ++i) at[i] += sample * samples.step[i];
            Index label[ROWS];
            for (Index row = 0; row < count; row += ROWS) {
                const Index rows = std::min(count - row, ROWS);
                labels.read(rows, at[1], step[1], label);
                work(sample, task, rows, at, step, label);
                for (size_t i = 0; i < N; ++i) at[i] += rows * step[i];
            }
        });
    });
}

template <int N>
Index parts_of(const Samples<N>& samples, Index classes) {
    return parts(samples.inside.size(), std::max<Index>(1, TASK / std::max<Index>(1, classes)));
}

template <class A>
double sum_all(Index n, const A* values) {
    double sum = 0;
    for (Index i = 0; i < n; ++i) sum += wide(values[i]);
    return sum;
}

}  // namespace

void Labels::read(Index count, Index offset, Index step, Index* to) const {
    switch (type) {
        case Type::i8:
            return read_as<std::int8_t>(data, count, offset, step, to);
        case Type::i16:
            return read_as<std::int16_t>(data, count, offset, step, to);
        case Type::i32:
            return read_as<std::int32_t>(data, count, offset, step, to);
        case Type::i64:
            return read_as<std::int64_t>(data, count, offset, step, to);
        case Type::u8:
            return read_as<std::uint8_t>(data, count, offset, step, to);
        case Type::u16:
            return read_as<std::uint16_t>(data, count, offset, step, to);
        case Type::u32:
            return read_as<std::uint32_t>(data, count, offset, step, to);
        case Type::u64:  // beyond 2^63 negative: no class either way
            return read_as<std::uint64_t>(data, count, offset, step, to);
    }
}

template <class S>
void cross_entropy(const Samples<3>& samples, Index classes, const S* logits, const Labels& labels, const Real<S>* weight,
                   double smoothing, Real<S>* loss, Index loss_step, Real<S>* probability) {
    const Index each = classes == 0 ? 0 : parts_of(samples, classes);
    std::vector<double> sums(size_t(samples.count * each), 0.0);
    const double all = sum_all(classes, weight);
    if (classes > 0) {
        by_rows(samples, classes, labels,
                [&](Index, Index task, Index count, auto& at, auto& step, const Index* label) {
                    const S* x = logits + at[0];
                    softmax_rows(count, classes, x, step[0], probability + at[2], step[2],
                                 [&](Index rows, Index row, const double* top, const double* total) {
                                     sums[size_t(task)] += cost(rows, classes, x + row * step[0], step[0], label + row,
                                                                top, total, weight, all, smoothing);
                                 });
                });
    }
    for (Index n = 0; n < samples.count; ++n) {
        double sum = 0;
        for (Index part = 0; part < each; ++part) sum += sums[size_t(n * each + part)];
        loss[n * loss_step] = narrow<Real<S>>(sum);
    }
}

template <class S>
void cross_entropy_dx(const Samples<3>& samples, Index classes, const Real<S>* probability, const Labels& labels,
                      const Real<S>* weight, double smoothing, const Real<S>* scale, Index scale_step, S* out) {
    const double all = sum_all(classes, weight);
    by_rows(samples, classes, labels, [&](Index n, Index, Index rows, auto& at, auto& step, const Index* label) {
        gradient(rows, classes, probability + at[0], step[0], label, weight, all, smoothing,
                 wide(scale[n * scale_step]), out + at[2], step[2]);
    });
}

template <class S>
void label_scores(const Samples<2>& samples, Index classes, const S* logits, const Labels& labels, const Real<S>* weight,
                  Real<S>* const (&scores)[3], const Index (&steps)[3]) {
    const Index each = parts_of(samples, classes);
    struct Sums {
        double of[3] = {};
    };
    std::vector<Sums> sums(size_t(samples.count * each));
    by_rows(samples, classes, labels, [&](Index, Index task, Index rows, auto& at, auto& step, const Index* label) {
        double* sum = sums[size_t(task)].of;
        for (Index r = 0; r < rows; ++r) {
            if (!counts(label[r], classes)) continue;
            sum[0] += wide(weight[label[r]]);
            sum[2] += 1;
        }
        const auto count = classes <= NARROW ? correct_narrow<S> : correct<S>;
        if (classes > 0) sum[1] += double(count(rows, classes, logits + at[0], step[0], label));
    });
    for (Index n = 0; n < samples.count; ++n) {
        Sums total;
        for (Index part = 0; part < each; ++part) {
            for (int i = 0; i < 3; ++i) total.of[i] += sums[size_t(n * each + part)].of[i];
        }
        for (int i = 0; i < 3; ++i) scores[i][n * steps[i]] = narrow<Real<S>>(total.of[i]);
    }
}

#define HPCTRAIN_FOR(S)                                                                                           \
    template void cross_entropy<S>(const Samples<3>&, Index, const S*, const Labels&, const Real<S>*, double, Real<S>*, Index, \
                                      Real<S>*);                                                                           \
    template void cross_entropy_dx<S>(const Samples<3>&, Index, const Real<S>*, const Labels&, const Real<S>*, double,        \
                                         const Real<S>*, Index, S*);                                                       \
    template void label_scores<S>(const Samples<2>&, Index, const S*, const Labels&, const Real<S>*, Real<S>* const(&)[3],    \
                                     const Index(&)[3]);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)
HPCTRAIN_FOR(bf16)

}  // namespace hpctrain
