// What the search for a plan spends its time in: bounds of the transfers between
// all pairs of partitions of two layers, and products of such tables.
#pragma once

#include <cstdint>
#include <vector>

#include "layout.h"

namespace hpctrain {

// Ranks that bounds are taken over, at most.
constexpr Index MOST_RANKS = 64;

// What dims with common axes contribute, as hpctrain/planner/rows.py makes it: rows of `ranks` numbers, one for each
// pair of the classes that partitions fall into. `have` and `want` are the class of each partition. Those rows that are
// not needed may be null. `same` are counts of blocks that are just what is wanted.
struct EdgeDims {
    const std::int32_t *have, *want;
    Index have_classes, want_classes;
    // (want_classes, ranks)
    const double* wanted;
    const double *own, *own_same, *kept;
    const double *owners, *owners_same;
    const double *given, *wanters, *wanters_same;
    // (neighbours, have_classes, want_classes, ranks)
    const double *gives, *gives_same, *takes, *takes_same;
    // Where `gives` and `takes` are of all ranks of a host: how many of them.
    const double *near_owners, *near_wanters;
};

// Which ranks take part, 1 or 0: (partitions, ranks), and of neighbours (partitions, neighbours, ranks).
struct EdgeRanks {
    Index have_count, want_count, ranks, neighbours;
    // Whether `gives` and `takes` have a single entry that sums up a rank's host, itself included.
    bool summed;
    const double *has, *wants, *has_beside, *wants_beside;
};

// Seconds per transfer or message, per element, and per contiguous run of copies; whether ranks of a host copy from
// each other; and which ways count.
struct EdgePrices {
    double near_alpha, near, run, far_alpha, far;
    bool copies, to_wanters, to_owners;
};

// out (have_count, want_count), or where `diagonal` (have_count,) of partitions with themselves: what the slowest rank
// takes, to those who want and back.
void edge_bounds(const EdgeRanks& ranks, const std::vector<EdgeDims>& dims, const EdgePrices& prices, bool diagonal,
                 float* out);

// out[i, k] = min over j of a[i, j] + b[j, k], row-major (n, k) of (n, m) and (m, k); infinity where m is 0.
void min_plus(Index n, Index m, Index k, const float* a, const float* b, float* out);

}  // namespace hpctrain
