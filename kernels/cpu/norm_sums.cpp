// Sums for statistics of any shape. Where the last dim is summed, each statistic is a sum over blocks of contiguous
// elements; where not, rows are added to a row of sums. In double and in C order, in parts that depend on shapes alone.
#include "norms.h"

#include <vector>

#include "spans.h"

namespace hpctrain {
namespace {

constexpr Index BLOCK = 1024;           // elements of a statistic that are added at a time
constexpr Index PART = 1 << 15;         // elements of a statistic from which on several threads share it
constexpr Index TASK = 1 << 14;         // elements that a thread takes at a time
constexpr Index MOST_PARTS = 64;

// As few parts as threads need; the same for any number of threads.
Index shares(Index summed) { return std::clamp<Index>(summed / PART, 1, MOST_PARTS); }
Index share_begin(Index n, Index shares, Index i) { return n / shares * i + std::min(i, n % shares); }

// Chan, Golub & LeVeque 1983.
struct Moments {
    double count = 0, sum = 0, m2 = 0;

    void merge(const Moments& later) {
        if (later.count == 0) return;
        const double n = count + later.count, delta = count > 0 ? later.sum / later.count - sum / count : 0;
        sum += later.sum;
        m2 += later.m2 + delta * delta * (count * later.count / n);
        count = n;
    }
};

struct TwoSums {
    double dy = 0, dy_xhat = 0;

    void merge(const TwoSums& later) { dy += later.dy, dy_xhat += later.dy_xhat; }
};

template <class S>
HPCTRAIN_CLONES Moments moments_block(Index n, const S* x) {
    const double sum = sum_of(n, [=](Index i) { return wide(x[i]); }), mean = sum / double(n);
    return {double(n), sum, sum_of(n, [=](Index i) { return (wide(x[i]) - mean) * (wide(x[i]) - mean); })};
}

template <class S>
HPCTRAIN_CLONES TwoSums gradient_block(Index n, const S* dy, const S* x, double mean, double rstd) {
    return {sum_of(n, [=](Index i) { return wide(dy[i]); }),
            sum_of(n, [=](Index i) { return wide(dy[i]) * (wide(x[i]) - mean); }) * rstd};
}

template <class S>
HPCTRAIN_CLONES TwoSums gradient_block(Index n, const S* dy, const S* x, const double* mean, const double* rstd) {
    return {sum_of(n, [=](Index i) { return wide(dy[i]); }),
            sum_of(n, [=](Index i) { return wide(dy[i]) * ((wide(x[i]) - mean[i]) * rstd[i]); })};
}

// The same for rows of n contiguous elements, a statistic each.
template <class S>
HPCTRAIN_CLONES void moments_rows(Index rows, Index n, const std::array<Index, 2>& step, const S* x, double* mean,
                                  double* m2) {
    for (Index r = 0; r < rows; ++r, x += step[0], mean += step[1], m2 += step[1]) {
        const double center = sum_of(n, [=](Index i) { return wide(x[i]); }) / double(n);
        *mean = center;
        *m2 = sum_of(n, [=](Index i) { return (wide(x[i]) - center) * (wide(x[i]) - center); });
    }
}

template <class S>
HPCTRAIN_CLONES void gradient_by_row(Index rows, Index n, const std::array<Index, 4>& step, const S* dy, const S* x,
                                     const double* mean, const double* rstd, double* sum_dy, double* sum_dy_xhat) {
    for (Index r = 0; r < rows; ++r) {
        const double center = *mean;
        *sum_dy = sum_of(n, [=](Index i) { return wide(dy[i]); });
        *sum_dy_xhat = sum_of(n, [=](Index i) { return wide(dy[i]) * (wide(x[i]) - center); }) * *rstd;
        dy += step[0], x += step[1], mean += step[2], rstd += step[2], sum_dy += step[3], sum_dy_xhat += step[3];
    }
}

// Whether each statistic is of one run of contiguous elements of the first `arrays` arrays that a block holds.
template <int N>
bool short_rows(const Layout<N>& summed, size_t arrays) {
    bool found = summed.dims == 1 && summed.extent[0] > 0 && summed.extent[0] <= BLOCK;
    for (size_t i = 0; i < arrays; ++i) found = found && summed.stride[0][i] == 1;
    return found;
}

// Calls work(rows, offsets, strides) for pieces of `kept`, each of whose positions stands for n elements.
template <int N, class Work>
void by_pieces(const Layout<N>& kept, Index n, Work work) {
    const Index size = kept.size(), chunk = std::max<Index>(1, TASK / n);
    in_tasks(parts(size, chunk), size * n, [&](Index task) {
        by_span(kept, task * chunk, std::min(size, (task + 1) * chunk), [&](Index rows, auto& at) {
            work(rows, at, kept.stride[size_t(kept.dims - 1)]);
        });
    });
}

template <class T>
void gather(Index n, const T* from, Index step, T* to) {
    for (Index i = 0; i < n; ++i) to[i] = from[i * step];
}

// Calls work(n, begin) for pieces [begin, begin + n) of `count` that fit behind what fills a block; flush() where full.
template <class Work, class Flush>
void fill(Index& filled, Index count, Work work, Flush flush) {
    for (Index begin = 0; begin < count;) {
        const Index n = std::min(count - begin, BLOCK - filled);
        work(n, begin);
        begin += n, filled += n;
        if (filled == BLOCK) flush(), filled = 0;
    }
}

// Elements [begin, end) of one statistic.
template <class S>
Moments moments_span(const Layout<1>& layout, Index begin, Index end, const S* x) {
    S block[BLOCK];
    Moments total;
    Index filled = 0;
    const auto flush = [&] { total.merge(moments_block(filled, block)); };
    by_span(layout, begin, end, [&](Index count, auto& at) {
        const Index step = layout.stride[size_t(layout.dims - 1)][0];
        fill(filled, count, [&](Index n, Index i) { gather(n, x + at[0] + i * step, step, block + filled); }, flush);
    });
    if (filled) flush();
    return total;
}

// Whether no dim moves array `i` of a layout.
template <int N>
bool fixed(const Layout<N>& layout, size_t i) {
    bool found = true;
    for (int d = 0; d < layout.dims; ++d) found = found && (layout.stride[size_t(d)][i] == 0 || layout.extent[size_t(d)] == 1);
    return found;
}

template <class S>
TwoSums gradient_span(const Layout<3>& layout, bool one, Index begin, Index end, const S* dy, const S* x,
                      const double* mean, const double* rstd) {
    S g[BLOCK], v[BLOCK];
    double m[BLOCK], r[BLOCK];
    TwoSums total;
    Index filled = 0;
    const auto flush = [&] {
        total.merge(one ? gradient_block(filled, g, v, *mean, *rstd) : gradient_block(filled, g, v, m, r));
    };
    by_span(layout, begin, end, [&](Index count, auto& at) {
        const auto& step = layout.stride[size_t(layout.dims - 1)];
        fill(
            filled, count,
            [&](Index n, Index i) {
                gather(n, dy + at[0] + i * step[0], step[0], g + filled);
                gather(n, x + at[1] + i * step[1], step[1], v + filled);
                if (one) return;
                gather(n, mean + at[2] + i * step[2], step[2], m + filled);
                gather(n, rstd + at[2] + i * step[2], step[2], r + filled);
            },
            flush);
    });
    if (filled) flush();
    return total;
}

// For each position of `kept`, the merged values of span(begin, end, offsets) over all of `summed`, given to
// store(value, offsets).
template <class Value, int N, class Span, class Store>
void by_statistic(const Layout<N>& kept, Index summed, Span span, Store store) {
    const Index size = kept.size(), several = shares(summed);
    if (several == 1) {
        const Index chunk = std::max<Index>(1, TASK / std::max<Index>(1, summed));
        in_tasks(parts(size, chunk), size * summed, [&](Index task) {
            by_span(kept, task * chunk, std::min(size, (task + 1) * chunk), [&](Index count, auto at) {
                for (Index i = 0; i < count; ++i) {
                    store(span(Index(0), summed, at), at);
                    for (size_t a = 0; a < N; ++a) at[a] += kept.stride[size_t(kept.dims - 1)][a];
                }
            });
        });
        return;
    }
    std::vector<Value> part(size_t(size * several));
    in_tasks(size * several, size * summed, [&](Index task) {
        const Index i = task % several;
        by_span(kept, task / several, task / several + 1, [&](Index, auto& at) {
            part[size_t(task)] = span(share_begin(summed, several, i), share_begin(summed, several, i + 1), at);
        });
    });
    for (Index n = 0; n < size; ++n) {
        Value total = part[size_t(n * several)];
        for (Index i = 1; i < several; ++i) total.merge(part[size_t(n * several + i)]);
        by_span(kept, n, n + 1, [&](Index, auto& at) { store(total, at); });
    }
}

// sums[c] += dy, sums[c + columns] += dy * xhat over rows
template <bool EACH, class S>
HPCTRAIN_CLONES void gradient_rows(Index rows, Index columns, const std::array<Index, 3>& step, const S* dy, const S* x,
                                   const double* mean, const double* rstd, double* sums) {
    for (Index i = 0; i < rows; ++i) {
#pragma GCC ivdep
        for (Index c = 0; c < columns; ++c) {
            const double g = wide(dy[c]), m = mean[EACH ? c : 0], r = rstd[EACH ? c : 0];
            sums[c] += g;
            sums[c + columns] += g * ((wide(x[c]) - m) * r);
        }
        dy += step[0], x += step[1], mean += step[2], rstd += step[2];
    }
}

// The same for rows of sums, one per position of `kept`.
template <class S>
void gradient_columns(const Reduction<3>& over, bool each, const S* dy, const S* x, const double* mean,
                      const double* rstd, double* sum_dy, double* sum_dy_xhat) {
    const Index size = over.kept.size(), rows = over.summed.size(), columns = over.columns;
    const Index several = shares(rows * columns / std::max<Index>(1, size)), width = 2 * columns;
    const Index group = std::max<Index>(1, TASK / std::max<Index>(1, rows * columns)) * several;
    std::vector<double> sums(size_t(size * several * width), 0.0);
    in_tasks(parts(size * several, group), size * rows * columns, [&](Index chunk) {
        for (Index task = chunk * group; task < std::min(size * several, (chunk + 1) * group); ++task) {
            const Index i = task % several;
            by_span(over.kept, task / several, task / several + 1, [&](Index, auto& from) {
                by_span(over.summed, share_begin(rows, several, i), share_begin(rows, several, i + 1),
                        [&](Index count, auto& at) {
                            const auto& step = over.summed.stride[size_t(over.summed.dims - 1)];
                            const Index s = from[2] + at[2];
                            (each ? gradient_rows<true, S> : gradient_rows<false, S>)(
                                count, columns, step, dy + from[0] + at[0], x + from[1] + at[1], mean + s, rstd + s,
                                sums.data() + task * width);
                        });
            });
        }
    });
    for (Index n = 0; n < size; ++n) {
        double* total = sums.data() + n * several * width;
        for (Index i = 1; i < several; ++i) {
            for (Index c = 0; c < width; ++c) total[c] += total[i * width + c];
        }
        by_span(over.kept, n, n + 1, [&](Index, auto& at) {
            std::copy_n(total, columns, sum_dy + at[3]), std::copy_n(total + columns, columns, sum_dy_xhat + at[3]);
        });
    }
}

}  // namespace

template <class S>
void moments_of(const Reduction<1>& over, const S* x, double* mean, double* m2) {
    if (over.columns > 0) {  // each row of sums is what batch normalization takes
        in_tasks(over.kept.size(), over.kept.size() * over.summed.size() * over.columns, [&](Index n) {
            by_span(over.kept, n, n + 1, [&](Index, auto& at) {
                moments<S>(over.summed, over.columns, x + at[0], mean + at[1], m2 + at[1]);
            });
        });
        return;
    }
    if (short_rows(over.summed, 1)) {
        const Index n = over.summed.size();
        return by_pieces(over.kept, n, [&](Index rows, auto& at, auto& step) {
            moments_rows(rows, n, step, x + at[0], mean + at[1], m2 + at[1]);
        });
    }
    by_statistic<Moments>(
        over.kept, over.summed.size(),
        [&](Index begin, Index end, auto& at) {
            return begin < end ? moments_span(over.summed, begin, end, x + at[0]) : Moments{};
        },
        [&](const Moments& found, auto& at) {
            mean[at[1]] = found.count > 0 ? found.sum / found.count : 0;
            m2[at[1]] = found.m2;
        });
}

template <class S>
void normalize_grad_of(const Reduction<3>& over, bool each, const S* dy, const S* x, const double* mean,
                       const double* rstd, double* sum_dy, double* sum_dy_xhat) {
    const bool one = fixed(over.summed, 2);
    if (over.columns > 0 && each && one) {  // each row of sums is what batch normalization takes
        Layout<3> rows;  // of dy twice, as normalize_grad can change it
        for (int d = 0; d < over.summed.dims; ++d) {
            const auto& step = over.summed.stride[size_t(d)];
            rows.append(over.summed.extent[size_t(d)], {step[0], step[1], step[0]});
        }
        rows.end_in_rows();
        return in_tasks(over.kept.size(), over.kept.size() * over.summed.size() * over.columns, [&](Index n) {
            by_span(over.kept, n, n + 1, [&](Index, auto& at) {
                normalize_grad<S>(rows, over.columns, const_cast<S*>(dy) + at[0], x + at[1], nullptr, 1, mean + at[2],
                                  rstd + at[2], sum_dy + at[3], sum_dy_xhat + at[3]);
            });
        });
    }
    if (over.columns > 0) return gradient_columns(over, each, dy, x, mean, rstd, sum_dy, sum_dy_xhat);
    if (one && short_rows(over.summed, 2)) {
        const Index n = over.summed.size();
        return by_pieces(over.kept, n, [&](Index rows, auto& at, auto& step) {
            gradient_by_row(rows, n, step, dy + at[0], x + at[1], mean + at[2], rstd + at[2], sum_dy + at[3],
                            sum_dy_xhat + at[3]);
        });
    }
    by_statistic<TwoSums>(
        over.kept, over.summed.size(),
        [&](Index begin, Index end, auto& at) {
            return begin < end ? gradient_span(over.summed, one, begin, end, dy + at[0], x + at[1], mean + at[2],
                                               rstd + at[2])
                               : TwoSums{};
        },
        [&](const TwoSums& found, auto& at) { sum_dy[at[3]] = found.dy, sum_dy_xhat[at[3]] = found.dy_xhat; });
}

#define HPCTRAIN_FOR(S)                                                                                             \
    template void moments_of<S>(const Reduction<1>&, const S*, double*, double*);                                   \
    template void normalize_grad_of<S>(const Reduction<3>&, bool, const S*, const S*, const double*, const double*, \
                                       double*, double*);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)
HPCTRAIN_FOR(bf16)

}  // namespace hpctrain
