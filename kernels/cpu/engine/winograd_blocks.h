// How the tiles are cut into blocks, by the sizes of the caches.
#pragma once

#include "winograd_tiles.h"

namespace hpctrain::HPCTRAIN_ISA::winograd {

constexpr Index CACHE_FLOATS = Index(1) << 18;  // the second-level cache of one core: 1 MiB
constexpr Index FEW_ROWS = 256;                 // so few tiles are one block
constexpr Index PLANES_PER_BLOCK = 16, PLANES_PER_THREAD = 8;

inline Index least(Index a, Index b) { return a < b ? a : b; }
inline Index most(Index a, Index b) { return a > b ? a : b; }

// Rows of a block of tiles that many blocks of one thread have. What is read and written for it should fill half of the
// second-level cache; where the weights do not fit beside it, they come from further away for each block, which then
// should be larger. Multiples of 24 leave no partly filled register tiles.
inline Index block_rows(int points, Index weights, Index channels) {
    constexpr Index UNIT = 24;
    const Index fitting = CACHE_FLOATS / 2 / (points * most(channels, 1)) / UNIT * UNIT;
    return least(most(fitting, weights > CACHE_FLOATS ? 2 * UNIT : UNIT), 8 * UNIT);
}

// Planes of one block read taps - 1 more planes: the more of them, the less is transformed twice.
inline Block block_size(Index planes, Index rows) {
    const Index deep = most(1, least(planes, least(PLANES_PER_BLOCK, rows)));
    return {0, most(1, rows / deep), 0, deep};
}

// A thread's part of the tiles: whole rows of tiles or, where there are enough, planes.
inline Block share(const Tiles& tiles, Index planes, int thread, int threads) {
    if (planes >= PLANES_PER_THREAD * threads) {
        const Index plane = planes * thread / threads;
        return {0, tiles.count(), plane, planes * (thread + 1) / threads - plane};
    }
    const Index rows = tiles.samples * tiles.down, row = rows * thread / threads;
    return {row * tiles.across, (rows * (thread + 1) / threads - row) * tiles.across, 0, planes};
}

// Points of a tile per dim with which a convolution takes the fewest operations.
int best_edge(const Convolution& c);

template <int KERNEL_, int EDGE_>
struct Scheme {
    static constexpr int KERNEL = KERNEL_, EDGE = EDGE_;
};

// Calls work(Scheme<kernel, edge>()) for what a convolution has and `anchor` asks for.
template <class Work>
inline void with_scheme(const Convolution& c, const TileAnchor& anchor, Work work) {
    const int edge = anchor.edge ? anchor.edge : best_edge(c);
    if (c.kernel[1] == 5) return edge == 8 ? work(Scheme<5, 8>()) : work(Scheme<5, 6>());
    edge == 4 ? work(Scheme<3, 4>()) : work(Scheme<3, 6>());
}

// Calls work(block) for the blocks of at most this size in order.
template <class Work>
inline void each_block(const Block& all, const Block& size, Work work) {
    for (Index plane = all.plane; plane < all.plane + all.planes; plane += size.planes) {
        for (Index column = all.column; column < all.column + all.columns; column += size.columns) {
            work(Block{column, least(size.columns, all.column + all.columns - column), plane,
                       least(size.planes, all.plane + all.planes - plane)});
        }
    }
}

}  // namespace hpctrain::HPCTRAIN_ISA::winograd
