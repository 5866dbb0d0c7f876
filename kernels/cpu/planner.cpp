// Rows are short and products of a few factors: all of a pair of partitions stays in registers and the nearest cache.
#include "planner.h"

#include <algorithm>
#include <limits>

#include "kernels.h"

namespace hpctrain {
namespace {

#if defined(__GNUC__)
#define HPCTRAIN_INLINE inline __attribute__((always_inline))
#else
#define HPCTRAIN_INLINE inline
#endif

using Row = double[MOST_RANKS];

// Of one pair of partitions: where the rows of each group of dims begin.
struct Pair {
    const std::vector<EdgeDims>& dims;
    Index i, j, ranks;

    HPCTRAIN_INLINE const double* row(const EdgeDims& group, const double* rows, Index neighbour) const {
        const Index place = (neighbour * group.have_classes + group.have[i]) * group.want_classes + group.want[j];
        return rows + place * ranks;
    }
};

HPCTRAIN_INLINE double larger(double a, double b) { return a > b ? a : b; }

// Of n >= 1 numbers, none below 0.
HPCTRAIN_INLINE double largest(Index n, const double* x) {
    double lanes[8] = {}, found = 0;
    Index r = 0;
    for (; r + 8 <= n; r += 8)
        for (Index lane = 0; lane < 8; ++lane) lanes[lane] = larger(x[r + lane], lanes[lane]);
    for (; r < n; ++r) found = larger(x[r], found);
    for (double lane : lanes) found = larger(lane, found);
    return found;
}

// What ranks exchange with some others in one direction: elements, with how many, in how many contiguous runs.
struct Moved {
    Row elements, peers, runs;
};

// Which rows tell these; `counts` are 1 where there is something, where they are null.
struct Fields {
    const double* EdgeDims::* elements;
    const double* EdgeDims::* counts;
    const double* EdgeDims::* same;
    Index neighbour = 0;
};

// out = a * b * the rows of `field` of all groups
HPCTRAIN_INLINE void product(const Pair& pair, const double* EdgeDims::* field, const double* a, const double* b,
                             double* out) {
    for (Index r = 0; r < pair.ranks; ++r) out[r] = a[r] * b[r];
    for (const EdgeDims& group : pair.dims) {
        const double* row = pair.row(group, group.*field, 0);
        for (Index r = 0; r < pair.ranks; ++r) out[r] *= row[r];
    }
}

// The same for all three. Groups are in the order of dims, the outermost first: one that both ends have in full goes on
// with the runs of the dims within it, one that is cut begins new ones.
template <bool COUNTS>
HPCTRAIN_INLINE void move(const Pair& pair, const Fields& fields, const double* a, const double* b, bool runs,
                          Moved& out) {
    const Index n = pair.ranks;
    for (Index r = 0; r < n; ++r) out.elements[r] = out.peers[r] = out.runs[r] = a[r] * b[r];
    for (const EdgeDims& group : pair.dims) {
        const bool shared = fields.elements == &EdgeDims::wanted;
        const double* elements =
            shared ? group.wanted + group.want[pair.j] * n : pair.row(group, group.*fields.elements, fields.neighbour);
        const double* counts = COUNTS ? pair.row(group, group.*fields.counts, fields.neighbour) : nullptr;
        if (runs) {
            const double* same = pair.row(group, group.*fields.same, fields.neighbour);
            for (Index r = 0; r < n; ++r) {
                const double count = COUNTS ? counts[r] : elements[r] > 0 ? 1.0 : 0.0;
                out.runs[r] = out.runs[r] * same[r] + out.elements[r] * (count - same[r]);
            }
        }
        for (Index r = 0; r < n; ++r) {
            const double count = COUNTS ? counts[r] : elements[r] > 0 ? 1.0 : 0.0;
            out.elements[r] *= elements[r], out.peers[r] *= count;
        }
    }
}

HPCTRAIN_INLINE void subtract(Index n, const Moved& less, Moved& from) {
    for (Index r = 0; r < n; ++r) {
        from.elements[r] -= less.elements[r], from.peers[r] -= less.peers[r], from.runs[r] -= less.runs[r];
    }
}

HPCTRAIN_INLINE void add(Index n, const Moved& more, Moved& to) {
    for (Index r = 0; r < n; ++r) {
        to.elements[r] += more.elements[r], to.peers[r] += more.peers[r], to.runs[r] += more.runs[r];
    }
}

// What ranks receive from the others of their host, and hand to them.
HPCTRAIN_INLINE void near_of(const EdgeRanks& all, const Pair& pair, const Moved& own, bool runs, Moved& in,
                             Moved& out) {
    const Index n = pair.ranks;
    const double *has = all.has + pair.i * n, *wants = all.wants + pair.j * n;
    const double *has_beside = all.has_beside + pair.i * all.neighbours * n,
                 *wants_beside = all.wants_beside + pair.j * all.neighbours * n;
    if (all.summed) {
        move<true>(pair, {&EdgeDims::gives, &EdgeDims::near_owners, &EdgeDims::gives_same}, has_beside, wants, runs,
                   in);
        move<true>(pair, {&EdgeDims::takes, &EdgeDims::near_wanters, &EdgeDims::takes_same}, has, wants_beside, runs,
                   out);
        subtract(n, own, in), subtract(n, own, out);
        return;
    }
    in = {}, out = {};
    for (Index t = 0; t < all.neighbours; ++t) {
        Moved each;
        move<false>(pair, {&EdgeDims::gives, nullptr, &EdgeDims::gives_same, t}, has_beside + t * n, wants, runs, each);
        add(n, each, in);
        move<false>(pair, {&EdgeDims::takes, nullptr, &EdgeDims::takes_same, t}, has, wants_beside + t * n, runs, each);
        add(n, each, out);
    }
}

HPCTRAIN_CLONES float price(const EdgeRanks& all, const std::vector<EdgeDims>& dims, const EdgePrices& prices, Index i,
                            Index j) {
    const Index n = all.ranks;
    const Pair pair = {dims, i, j, n};
    const double *has = all.has + i * n, *wants = all.wants + j * n;
    const bool several = all.neighbours > 0, runs = prices.copies && prices.run > 0;
    Row copied, ones;
    Moved own, in, out, near_in, near_out;
    for (Index r = 0; r < n; ++r) ones[r] = 1;
    move<false>(pair, {&EdgeDims::own, nullptr, &EdgeDims::own_same}, has, wants, runs, own);
    move<true>(pair, {&EdgeDims::wanted, &EdgeDims::owners, &EdgeDims::owners_same}, wants, ones, runs, in);
    move<true>(pair, {&EdgeDims::given, &EdgeDims::wanters, &EdgeDims::wanters_same}, has, ones, runs, out);
    product(pair, &EdgeDims::kept, has, wants, copied);
    for (Index r = 0; r < n; ++r) copied[r] = own.elements[r] - copied[r];
    subtract(n, own, in), subtract(n, own, out);
    if (several) near_of(all, pair, own, runs, near_in, near_out);
    const Moved &beside_in = several ? near_in : in, &beside_out = several ? near_out : out;
    Row forward, backward;
    for (Index r = 0; r < n; ++r) {
        const double elements =
            larger(in.elements[r] - beside_in.elements[r], out.elements[r] - beside_out.elements[r]);
        const double peers = larger(in.peers[r] - beside_in.peers[r], out.peers[r] - beside_out.peers[r]);
        const double far = prices.far_alpha * peers + prices.far * elements;
        if (prices.copies) {
            const double once = beside_in.peers[r] > 0 || beside_out.peers[r] > 0 ? prices.near_alpha : 0;
            const double more = runs && copied[r] > 0 ? own.runs[r] : 0;
            const double in_runs = runs ? beside_in.runs[r] : 0, out_runs = runs ? beside_out.runs[r] : 0;
            forward[r] = once + prices.near * (beside_in.elements[r] + copied[r]) + prices.run * (in_runs + more) + far;
            backward[r] =
                once + prices.near * (beside_out.elements[r] + copied[r]) + prices.run * (out_runs + more) + far;
        } else {
            forward[r] = backward[r] = prices.near_alpha * larger(beside_in.peers[r], beside_out.peers[r]) +
                                       prices.near * larger(beside_in.elements[r], beside_out.elements[r]) + far;
        }
    }
    return float((prices.to_wanters ? largest(n, forward) : 0) + (prices.to_owners ? largest(n, backward) : 0));
}

constexpr Index COLUMNS = 512;  // of b, that stay in the nearest cache with four of its rows
constexpr Index DEPTH = 128;    // rows of b, that stay in the next one

HPCTRAIN_CLONES void min_plus_rows(Index n, Index m, Index k, const float* a, const float* b, float* out, Index first,
                                   Index last, Index begin, Index end) {
    for (Index i = 0; i < n; ++i) {
        float* row = out + i * k;
        Index j = first;
        for (; j + 4 <= last; j += 4) {
            const float *by = a + i * m + j, *b0 = b + j * k, *b1 = b0 + k, *b2 = b1 + k, *b3 = b2 + k;
            for (Index c = begin; c < end; ++c) {
                const float x = std::min(by[0] + b0[c], by[1] + b1[c]), y = std::min(by[2] + b2[c], by[3] + b3[c]);
                row[c] = std::min(row[c], std::min(x, y));
            }
        }
        for (; j < last; ++j) {
            const float by = a[i * m + j];
            for (Index c = begin; c < end; ++c) row[c] = std::min(row[c], by + b[j * k + c]);
        }
    }
}

}  // namespace

void edge_bounds(const EdgeRanks& ranks, const std::vector<EdgeDims>& dims, const EdgePrices& prices, bool diagonal,
                 float* out) {
    for (Index i = 0; i < ranks.have_count; ++i) {
        if (diagonal) {
            out[i] = price(ranks, dims, prices, i, i);
            continue;
        }
        for (Index j = 0; j < ranks.want_count; ++j) out[i * ranks.want_count + j] = price(ranks, dims, prices, i, j);
    }
}

void min_plus(Index n, Index m, Index k, const float* a, const float* b, float* out) {
    std::fill_n(out, n * k, std::numeric_limits<float>::infinity());
    for (Index begin = 0; begin < k; begin += COLUMNS) {
        for (Index first = 0; first < m; first += DEPTH) {
            min_plus_rows(n, m, k, a, b, out, first, std::min(m, first + DEPTH), begin, std::min(k, begin + COLUMNS));
        }
    }
}

}  // namespace hpctrain
