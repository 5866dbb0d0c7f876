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

// out = a * b * the rows of `field` of all groups
HPCTRAIN_INLINE void product(const Pair& pair, const double* EdgeDims::* field, Index neighbour, const double* a,
                             const double* b, double* out) {
    for (Index r = 0; r < pair.ranks; ++r) out[r] = a[r] * b[r];
    for (const EdgeDims& group : pair.dims) {
        const double* row = pair.row(group, group.*field, neighbour);
        for (Index r = 0; r < pair.ranks; ++r) out[r] *= row[r];
    }
}

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

// What ranks get from others (in) and hand to them (out), on their host and in all: elements and with how many.
struct Moved {
    Row in, out, in_peers, out_peers;
};

HPCTRAIN_INLINE void near_of(const EdgeRanks& all, const Pair& pair, const double* own, Moved& near) {
    const Index n = pair.ranks;
    const double *has = all.has + pair.i * n, *wants = all.wants + pair.j * n;
    const double *has_beside = all.has_beside + pair.i * all.neighbours * n,
                 *wants_beside = all.wants_beside + pair.j * all.neighbours * n;
    if (all.summed) {
        product(pair, &EdgeDims::gives, 0, has_beside, wants, near.in);
        product(pair, &EdgeDims::takes, 0, has, wants_beside, near.out);
        product(pair, &EdgeDims::near_owners, 0, has_beside, wants, near.in_peers);
        product(pair, &EdgeDims::near_wanters, 0, has, wants_beside, near.out_peers);
        for (Index r = 0; r < n; ++r) {
            const double itself = own[r] > 0 ? 1 : 0;
            near.in[r] -= own[r], near.out[r] -= own[r];
            near.in_peers[r] -= itself, near.out_peers[r] -= itself;
        }
        return;
    }
    for (Index r = 0; r < n; ++r) near.in[r] = near.out[r] = near.in_peers[r] = near.out_peers[r] = 0;
    for (Index t = 0; t < all.neighbours; ++t) {
        Row gives, takes;
        product(pair, &EdgeDims::gives, t, has_beside + t * n, wants, gives);
        product(pair, &EdgeDims::takes, t, has, wants_beside + t * n, takes);
        for (Index r = 0; r < n; ++r) {
            near.in[r] += gives[r], near.out[r] += takes[r];
            near.in_peers[r] += gives[r] > 0 ? 1 : 0, near.out_peers[r] += takes[r] > 0 ? 1 : 0;
        }
    }
}

HPCTRAIN_CLONES float price(const EdgeRanks& all, const std::vector<EdgeDims>& dims, const EdgePrices& prices, Index i,
                            Index j) {
    const Index n = all.ranks;
    const Pair pair = {dims, i, j, n};
    const double *has = all.has + i * n, *wants = all.wants + j * n, *wanted = all.wanted + j * n;
    const bool several = all.neighbours > 0;
    Row own, copied, ones;
    Moved total, near;
    for (Index r = 0; r < n; ++r) ones[r] = 1;
    product(pair, &EdgeDims::own, 0, has, wants, own);
    product(pair, &EdgeDims::kept, 0, has, wants, copied);
    product(pair, &EdgeDims::given, 0, has, ones, total.out);
    for (Index r = 0; r < n; ++r) {
        copied[r] = own[r] - copied[r];
        total.in[r] = wanted[r] - own[r];
        total.out[r] -= own[r];
        total.in_peers[r] = total.out_peers[r] = 0;
    }
    if (several || !prices.copies) {
        product(pair, &EdgeDims::owners, 0, wants, ones, total.in_peers);
        product(pair, &EdgeDims::wanters, 0, has, ones, total.out_peers);
        for (Index r = 0; r < n; ++r) {
            const double itself = own[r] > 0 ? 1 : 0;
            total.in_peers[r] -= itself, total.out_peers[r] -= itself;
        }
    }
    if (several) near_of(all, pair, own, near);
    const Moved& beside = several ? near : total;
    Row forward, backward;
    for (Index r = 0; r < n; ++r) {
        const double elements = larger(total.in[r] - beside.in[r], total.out[r] - beside.out[r]);
        const double peers =
            larger(total.in_peers[r] - beside.in_peers[r], total.out_peers[r] - beside.out_peers[r]);
        const double far = prices.far_alpha * peers + prices.far * elements;
        if (prices.copies) {
            const double once = beside.in[r] > 0 || beside.out[r] > 0 ? prices.near_alpha : 0;
            forward[r] = once + prices.near * (beside.in[r] + copied[r]) + far;
            backward[r] = once + prices.near * (beside.out[r] + copied[r]) + far;
        } else {
            forward[r] = backward[r] = prices.near_alpha * larger(beside.in_peers[r], beside.out_peers[r]) +
                                       prices.near * larger(beside.in[r], beside.out[r]) + far;
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
