// Sums over positions, per channel. float and double alike are added in double: in blocks of BLOCK elements, whose sums
// meet in a binary tree, so that the error of n additions grows like log n and the order depends on the shape alone.
// Each block is first gathered into a dense buffer: strides then end there, and narrow rows fill vector registers.
#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace hpctrain {
namespace {

constexpr Index LANES = 64;    // partial sums per block; channels beyond that are done in tiles
constexpr Index BLOCK = 2048;  // doubles gathered at a time: 16 KiB, so that two of them stay in the first-level cache

// A tile of channels, and how many rows of it are folded side by side into the lanes.
struct Tile {
    Index first, channels, rows_per_block, lanes;

    Tile(Index first_channel, Index all_channels) : first(first_channel) {
        channels = std::min(all_channels - first, LANES);
        lanes = LANES / channels * channels;
        rows_per_block = BLOCK / lanes * (lanes / channels);
    }
};

struct Sums {
    double sum[LANES];

    void merge(const Sums& later, Index channels) {
        for (Index c = 0; c < channels; ++c) sum[c] += later.sum[c];
    }
};

struct TwoSums {
    double first[LANES], second[LANES];

    void merge(const TwoSums& later, Index channels) {
        for (Index c = 0; c < channels; ++c) first[c] += later.first[c];
        for (Index c = 0; c < channels; ++c) second[c] += later.second[c];
    }
};

// Chan, Golub & LeVeque 1983. The sum is kept, not the mean, so that infinities add up to an infinite mean.
struct Moments {
    double count, sum[LANES], m2[LANES];

    void merge(const Moments& later, Index channels) {
        const double n = count + later.count;
        for (Index c = 0; c < channels; ++c) {
            const double delta = later.sum[c] / later.count - sum[c] / count;
            sum[c] += later.sum[c];
            m2[c] += later.m2[c] + delta * delta * (count * later.count / n);
        }
        count = n;
    }
};

// Merges nodes pairwise as they come: level l holds 2^l of them.
template <class Node>
class Tree {
public:
    void push(Node node, Index channels) {
        int l = 0;
        for (std::uint64_t n = pushed_++; n & 1; n >>= 1) {
            level_[l].merge(node, channels);
            node = level_[l++];
        }
        level_[l] = node;
    }

    // All nodes merged; there must be one.
    Node total(Index channels) const {
        int l = 0;
        while (!(pushed_ >> l & 1)) ++l;
        Node node = level_[l];
        for (++l; l < LEVELS && pushed_ >> l; ++l) {
            if (pushed_ >> l & 1) {
                Node earlier = level_[l];
                earlier.merge(node, channels);
                node = earlier;
            }
        }
        return node;
    }

private:
    static constexpr int LEVELS = 48;
    std::uint64_t pushed_ = 0;
    Node level_[LEVELS];
};

template <class T>
HPCTRAIN_CLONES void widen(Index rows, Index width, const T* x, Index step, double* to) {
    for (Index r = 0; r < rows; ++r, x += step, to += width) {
        for (Index i = 0; i < width; ++i) to[i] = x[i];
    }
}

// `rows` rows of `width` elements, `step` apart, to a dense buffer; rows without gaps are copied as one.
template <class T>
void gather(Index rows, Index width, const T* x, Index step, double* to) {
    step == width ? widen(1, rows * width, x, step, to) : widen(rows, width, x, step, to);
}

// acc[i % lanes] += x[i]
HPCTRAIN_CLONES void add_up(Index n, Index lanes, const double* x, double* acc) {
    for (Index i = 0; i < n; i += lanes) {
        const Index width = std::min(lanes, n - i);
#pragma GCC ivdep
        for (Index j = 0; j < width; ++j) acc[j] += x[i + j];
    }
}

// acc[i % lanes] += (x[i] - mean[i % lanes])^2
HPCTRAIN_CLONES void add_up_squares(Index n, Index lanes, const double* x, const double* mean, double* acc) {
    for (Index i = 0; i < n; i += lanes) {
        const Index width = std::min(lanes, n - i);
#pragma GCC ivdep
        for (Index j = 0; j < width; ++j) acc[j] += (x[i + j] - mean[j]) * (x[i + j] - mean[j]);
    }
}

// acc[i % lanes] += dy[i] * (x[i] - mean[i % lanes])
HPCTRAIN_CLONES void add_up_products(Index n, Index lanes, const double* dy, const double* x, const double* mean,
                                     double* acc) {
    for (Index i = 0; i < n; i += lanes) {
        const Index width = std::min(lanes, n - i);
#pragma GCC ivdep
        for (Index j = 0; j < width; ++j) acc[j] += dy[i + j] * (x[i + j] - mean[j]);
    }
}

// Lanes of one channel added up into the first of them.
void fold(const Tile& tile, double* acc) {
    for (Index i = tile.channels; i < tile.lanes; ++i) acc[i % tile.channels] += acc[i];
}

void repeat(const Tile& tile, double* vector) {
    for (Index i = tile.channels; i < tile.lanes; ++i) vector[i] = vector[i - tile.channels];
}

// Calls work(elements, buffers) for each block of rows of a tile, gathered from N arrays.
template <int N, class T, class Work>
void by_blocks(const Layout<N>& layout, const Tile& tile, const std::array<const T*, N>& arrays, Work work) {
    alignas(64) double buffer[N][BLOCK];
    const std::array<Index, N>& step = layout.stride[layout.dims - 1];
    Index filled = 0;
    for (Cursor<N> cursor(layout); cursor.left() > 0;) {
        const Index rows = std::min(cursor.run(), tile.rows_per_block - filled);
        for (int i = 0; i < N; ++i) {
            const T* from = arrays[i] + cursor.offset()[i] + tile.first;
            gather(rows, tile.channels, from, step[i], buffer[i] + filled * tile.channels);
        }
        filled += rows;
        cursor.skip(rows);
        if (filled == tile.rows_per_block || cursor.left() == 0) {
            work(filled * tile.channels, buffer);
            filled = 0;
        }
    }
}

template <class T>
void sum_rows(const Layout<1>& layout, Index channels, const T* x, T* out, double scale) {
    for (Index c = 0; c < channels; c += LANES) {
        const Tile tile(c, channels);
        Tree<Sums> tree;
        by_blocks<1, T>(layout, tile, {x}, [&](Index n, auto& block) {
            Sums sums{};
            add_up(n, tile.lanes, block[0], sums.sum);
            fold(tile, sums.sum);
            tree.push(sums, tile.channels);
        });
        const Sums total = tree.total(tile.channels);
        for (Index i = 0; i < tile.channels; ++i) out[c + i] = T(total.sum[i] * scale);
    }
}

template <class T>
void set_zero(Index n, T* out) {
    for (Index i = 0; i < n; ++i) out[i] = 0;
}

}  // namespace

template <class T>
void sum_positions(const Layout<1>& layout, Index channels, const T* x, T* out, double scale) {
    if (layout.size() == 0) return set_zero(channels, out);
    sum_rows(layout, channels, x, out, scale);
}

template <class T>
void bias_grad(const Layout<1>& layout, Index channels, const T* dy, T* out) {
    sum_positions(layout, channels, dy, out, 1.0);
}

template <class T>
void moments(const Layout<1>& layout, Index channels, const T* x, double* mean, double* m2) {
    if (layout.size() == 0) return set_zero(channels, mean), set_zero(channels, m2);
    for (Index c = 0; c < channels; c += LANES) {
        const Tile tile(c, channels);
        Tree<Moments> tree;
        by_blocks<1, T>(layout, tile, {x}, [&](Index n, auto& block) {
            Moments node{};
            double center[LANES];
            node.count = double(n / tile.channels);
            add_up(n, tile.lanes, block[0], node.sum);
            fold(tile, node.sum);
            for (Index i = 0; i < tile.channels; ++i) center[i] = node.sum[i] / node.count;
            repeat(tile, center);
            add_up_squares(n, tile.lanes, block[0], center, node.m2);
            fold(tile, node.m2);
            tree.push(node, tile.channels);
        });
        const Moments total = tree.total(tile.channels);
        for (Index i = 0; i < tile.channels; ++i) mean[c + i] = total.sum[i] / total.count;
        for (Index i = 0; i < tile.channels; ++i) m2[c + i] = total.m2[i];
    }
}

template <class T>
void normalize_grad(const Layout<2>& layout, Index channels, const T* dy, const T* x, const double* mean,
                    const double* rstd, double* sum_dy, double* sum_dy_xhat) {
    if (layout.size() == 0) return set_zero(channels, sum_dy), set_zero(channels, sum_dy_xhat);
    for (Index c = 0; c < channels; c += LANES) {
        const Tile tile(c, channels);
        double center[LANES];
        for (Index i = 0; i < tile.channels; ++i) center[i] = mean[c + i];
        repeat(tile, center);
        Tree<TwoSums> tree;
        by_blocks<2, T>(layout, tile, {dy, x}, [&](Index n, auto& block) {
            TwoSums sums{};
            add_up(n, tile.lanes, block[0], sums.first);
            add_up_products(n, tile.lanes, block[0], block[1], center, sums.second);
            fold(tile, sums.first);
            fold(tile, sums.second);
            tree.push(sums, tile.channels);
        });
        const TwoSums total = tree.total(tile.channels);
        for (Index i = 0; i < tile.channels; ++i) sum_dy[c + i] = total.first[i];
        for (Index i = 0; i < tile.channels; ++i) sum_dy_xhat[c + i] = total.second[i] * rstd[c + i];
    }
}

#define HPCTRAIN_FOR(T)                                                                                        \
    template void bias_grad<T>(const Layout<1>&, Index, const T*, T*);                                         \
    template void sum_positions<T>(const Layout<1>&, Index, const T*, T*, double);                             \
    template void moments<T>(const Layout<1>&, Index, const T*, double*, double*);                             \
    template void normalize_grad<T>(const Layout<2>&, Index, const T*, const T*, const double*, const double*, \
                                    double*, double*);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)

}  // namespace hpctrain
