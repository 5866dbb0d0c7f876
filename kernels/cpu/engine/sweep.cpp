#include "sweep.h"

#include "threads.h"

namespace hpctrain::HPCTRAIN_ISA {
namespace {

// Positions that all panels are used for before the next ones: what they read of A should stay in the cache.
constexpr Index BLOCK_ROWS = 96;

constexpr Index least(Index a, Index b) { return a < b ? a : b; }

// Work that one thread does at a time: some positions of a sweep, of one group, by some panels.
struct Unit {
    const Sweep* sweep;
    Index group, first, count, first_panel, last_panel;
};

// Where the positions of a unit lie in A and C.
struct Rows {
    const float* a[BLOCK_ROWS + MAX_TILE_ROWS];
    float* c[BLOCK_ROWS + MAX_TILE_ROWS];

    Rows(const Product& p, const Unit& unit) {
        const Sweep& sweep = *unit.sweep;
        Index at[4], rest = unit.first;
        for (int d = 3; d >= 0; --d) {
            at[d] = rest % sweep.extent[size_t(d)];
            rest /= sweep.extent[size_t(d)];
        }
        for (Index i = 0; i < unit.count; ++i, ++at[3]) {
            if (i > 0 && at[3] < sweep.extent[3]) {
                a[i] = a[i - 1] + sweep.a_step[3];
                c[i] = c[i - 1] + sweep.c_step[3];
                continue;
            }
            for (size_t d = 3; d > 0 && at[d] == sweep.extent[d]; --d) at[d] = 0, ++at[d - 1];
            a[i] = p.a + unit.group * p.a_group + sweep.a;
            c[i] = p.c + unit.group * p.c_group + sweep.c;
            for (size_t d = 0; d < 4; ++d) a[i] += at[d] * sweep.a_step[d], c[i] += at[d] * sweep.c_step[d];
        }
        // the last tile may lack some rows: it computes the last one again, and stores it once
        for (Index i = unit.count; i < unit.count + MAX_TILE_ROWS; ++i) a[i] = a[unit.count - 1], c[i] = nullptr;
    }
};

// Calls visit(group, sweep, first position, positions) for blocks of positions, in the order in which they should be
// done.
template <class Visit>
inline void for_blocks(const Product& p, Visit visit) {
    const Sweeps& s = p.sweeps;
    for (Index group = 0; group < p.groups; ++group) {
        for (Index sample = 0; sample < s.samples; sample += s.samples_at_once) {
            for (const Sweep* sweep = s.list; sweep != s.list + s.count; ++sweep) {
                const Index end = least(s.samples, sample + s.samples_at_once) * sweep->positions();
                for (Index first = sample * sweep->positions(); first < end; first += BLOCK_ROWS)
                    visit(group, *sweep, first, least(BLOCK_ROWS, end - first));
            }
        }
    }
}

// Calls work(unit) for the share of one thread: equal ones, as far as units allow.
template <class Work>
void for_share(const Product& p, Index panels, int thread, int threads, Work work) {
    const auto cost = [](const Sweep& sweep, Index positions) { return positions * (sweep.terms + 8); };
    Index blocks = 0, total = 0, before = 0;
    for_blocks(p, [&](Index, const Sweep& sweep, Index, Index count) { ++blocks, total += cost(sweep, count); });
    // few positions: threads part the panels too
    const Index parts = threads == 1 || blocks == 0 ? 1 : least(panels, (4 * threads + blocks - 1) / blocks);
    for_blocks(p, [&](Index group, const Sweep& sweep, Index first, Index count) {
        for (Index part = 0; part < parts; ++part, before += cost(sweep, count)) {
            if (before * threads / (total * parts) != thread) continue;
            work(Unit{&sweep, group, first, count, part * panels / parts, (part + 1) * panels / parts});
        }
    });
}

void compute(const Product& p, const Panels& panels, const Unit& unit) {
    const Rows rows(p, unit);
    const float* packed = p.packed + unit.group * panels.vectors * W * p.depth;
    for (Index block = 0; block < unit.sweep->block_count; ++block) {
        for (Index q = unit.first_panel; q < unit.last_panel; ++q) {
            const Index column = panels.first(q) * W;
            const Target target = target_of(p.epilogue, unit.group * p.width + column, block, unit.sweep->block_count);
            with_vectors(panels.size(q), [&](auto vectors) {
                constexpr int N = decltype(vectors)::count, M = tile_rows(N);
                for (Index i = 0; i < unit.count; i += M) {
                    tile<N>(rows.a + i, rows.c + i, column, unit.sweep->blocks[block], p.step,
                            packed + column * p.depth,
                            target.of(int(least(M, unit.count - i)), panels.tail(q)));
                }
            });
        }
    }
}

constexpr int CHANNEL_ROWS = 8;  // positions at a time where each channel is alone

// A vector of channels, of some positions.
inline void channel_tile(const float* const* a, float* const* c, Index column, Runs runs, const float* packed,
                         Index width, const Target& target) {
    V sums[CHANNEL_ROWS] = {};
    const int n = target.tail;
    for (const Run* run = runs.list; run != runs.list + runs.count; ++run) {
        const V factor = load(packed + run->b * width);
#pragma GCC unroll 8
        for (int r = 0; r < CHANNEL_ROWS; ++r) {
            const float* place = a[r] + run->a + column;
            sums[r] = fma(n == W ? load(place) : load(place, n), factor, sums[r]);
        }
    }
    const V bias = target.bias ? load(target.bias, n) : V{};
    for (int r = 0; r < target.rows; ++r) {
        float* place = c[r] + column;
        V sum = sums[r];
        if (target.bias) sum += bias;
        if (target.add) sum += load(place, n);
        store(place, rectified(sum, target.slope), n);
    }
}

void compute_channels(const Product& p, const Panels& vectors, const Unit& unit) {
    const Rows rows(p, unit);
    for (Index i = 0; i < unit.count; i += CHANNEL_ROWS) {
        const int count = int(least(CHANNEL_ROWS, unit.count - i));
        for (Index block = 0; block < unit.sweep->block_count; ++block) {
            for (Index v = unit.first_panel; v < unit.last_panel; ++v) {
                const int n = int(least(W, p.width - v * W));
                const Target target = target_of(p.epilogue, v * W, block, unit.sweep->block_count).of(count, n);
                channel_tile(rows.a + i, rows.c + i, v * W, unit.sweep->blocks[block], p.packed + v * W,
                             vectors.vectors * W, target);
            }
        }
    }
}

}  // namespace

void multiply(const Product& p) {
    const Panels panels(p.width);
    if (panels.count == 0) return;
    in_threads([&](int thread, int threads) {
        for_share(p, panels.count, thread, threads, [&](const Unit& unit) { compute(p, panels, unit); });
    });
}

void multiply_channels(const Product& p) {
    const Panels vectors(p.width);
    in_threads([&](int thread, int threads) {
        for_share(p, vectors.vectors, thread, threads, [&](const Unit& unit) { compute_channels(p, vectors, unit); });
    });
}

}  // namespace hpctrain::HPCTRAIN_ISA
