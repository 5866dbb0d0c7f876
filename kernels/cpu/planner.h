// What the search for a plan spends its time in: bounds of the transfers between
// all pairs of partitions of two layers, and products of such tables.
#pragma once

#include <cstdint>
#include <vector>

#include "layout.h"

namespace hpctrain {

// Ranks that bounds are taken over, at most.
constexpr Index MOST_RANKS = 64;

// What dims with common axes contribute, as hpctrain/planner/tables.py makes it: rows of `ranks` numbers, one for each
// pair of the classes that partitions fall into. `have` and `want` are the class of each partition. Those that are not
// needed may be null.
struct EdgeDims {
    const std::int32_t *have, *want;
    Index have_classes, want_classes;
    const double *own, *kept, *given, *owners, *wanters;
    // (neighbours, have_classes, want_classes, ranks)
    const double *gives, *takes;
    // Where hosts are sums over the coordinates of their ranks.
    const double *near_owners, *near_wanters;
};

// Which ranks take part, 1 or 0, and what each wants in all: (partitions, ranks). Of neighbours (partitions,
// neighbours, ranks).
struct EdgeRanks {
    Index have_count, want_count, ranks, neighbours;
    // Whether `gives` and `takes` have a single entry that sums up a rank's host, itself included.
    bool summed;
    const double *has, *wants, *wanted, *has_beside, *wants_beside;
};

// Seconds per transfer or message, and per element; whether ranks of a host copy from each other; and which ways count.
struct EdgePrices {
    double near_alpha, near, far_alpha, far;
    bool copies, to_wanters, to_owners;
};

// out (have_count, want_count), or where `diagonal` (have_count,) of partitions with themselves: what the slowest rank
// takes, to those who want and back.
void edge_bounds(const EdgeRanks& ranks, const std::vector<EdgeDims>& dims, const EdgePrices& prices, bool diagonal,
                 float* out);

// out[i, k] = min over j of a[i, j] + b[j, k], row-major (n, k) of (n, m) and (m, k); infinity where m is 0.
void min_plus(Index n, Index m, Index k, const float* a, const float* b, float* out);

}  // namespace hpctrain
