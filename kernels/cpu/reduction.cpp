// Sums over positions, per channel, in one pass over the arrays.
//
// The order is that of the shape, whatever strides and threads: rows are added up in blocks, the sums of blocks meet in
// a binary tree per segment, and segments, which threads share, meet in a tree again. The error of n additions so grows
// like log n. All this in double; but what is squared or multiplied is added in the arrays' own precision over runs of
// RUN rows, which is as fast as memory gives them, where double would take twice as long.
//
// What that costs: with u = 2^-24, each term of a run is rounded at most RUN + 2 times (difference, product,
// additions), so that a sum errs by (RUN + 2) u times the sum of |terms|: 1.1e-6, and only if all roundings went one
// way. Squares are of differences from the mean of the first piece of their block. With k that mean's distance from the
// block's in standard deviations, 1 + k^2 <= BLOCK / PIECE, as the piece alone makes that much variance; the sum of
// squares is 1 + k^2 times what it would be about the mean, and m2 errs by BLOCK / PIECE (RUN + 2) u < 1e-5 at most. A
// block whose sums overflow is taken again in double.
#include <cmath>

#include "kernels.h"
#include "runs.h"
#include "strips.h"
#include "sums.h"

namespace hpctrain {
namespace {

constexpr Index SEGMENTS = 32;

// Plain sums are added up in double at once, which is no slower than memory; but not those of bf16, whose memory holds
// twice as many.
template <class T>
using Plain = std::conditional_t<std::is_same_v<T, bf16>, float, double>;

template <class T>
void gather(Index rows, Index width, const T* x, Index step, T* to) {
    if (step == width) {
        std::copy_n(x, rows * width, to);
    } else {
        for (Index r = 0; r < rows; ++r) std::copy_n(x + r * step, width, to + r * width);
    }
}

// Asks for wide rows in the order in which they lie; strips of them then find them in the cache.
template <class T>
void fetch(Index rows, Index width, const T* x, Index step) {
    constexpr Index LINE = 64 / sizeof(T);
    for (Index r = 0; r < rows; ++r) {
        for (Index i = 0; i < width; i += LINE) __builtin_prefetch(x + r * step + i, 0, 2);
    }
}

// Takes the next `rows` positions of a tile in pieces. Of each calls before(cursor, rows), and then work(rows, width,
// arrays, steps) with the first A arrays of the layout: as they lie, narrow rows folded; copied where they do not lie
// in one run, or folded ones not one behind the other.
template <int A, int N, class T, class Before, class Work>
void by_pieces(Cursor<N>& cursor, Index rows, const Tile& tile, const std::array<const T*, size_t(A)>& arrays,
               Before before, Work work) {
    alignas(64) T buffer[A][PIECE * TILE];
    while (rows > 0) {
        const Index piece = std::min(rows, PIECE * tile.fold);
        before(cursor, piece);
        std::array<const T*, size_t(A)> from;
        std::array<Index, size_t(A)> step;
        const auto locate = [&](size_t i) { return arrays[i] + cursor.offset()[i] + tile.first; };
        bool dense = cursor.run() >= piece;
        for (size_t i = 0; i < A; ++i) {
            from[i] = locate(i), step[i] = tile.folded ? tile.lanes : cursor.step()[i];
            dense = dense && (!tile.folded || cursor.step()[i] == tile.channels);
        }
        if (dense) {
            if (tile.lanes > 4 * STRIP) {
                for (size_t i = 0; i < A; ++i) fetch(piece, tile.lanes, from[i], step[i]);
            }
            cursor.skip(piece);
        } else {
            for (Index done = 0; done < piece;) {
                const Index some = std::min(cursor.run(), piece - done);
                for (size_t i = 0; i < A; ++i)
                    gather(some, tile.channels, locate(i), cursor.step()[i], buffer[i] + done * tile.channels);
                cursor.skip(some);
                done += some;
            }
            for (size_t i = 0; i < A; ++i) from[i] = buffer[i];
            step.fill(tile.lanes);
        }
        const Index whole = piece / tile.fold, rest = piece % tile.fold;
        work(whole, tile.lanes, from, step);
        if (rest) {
            for (size_t i = 0; i < A; ++i) from[i] += whole * tile.lanes;
            work(1, rest * tile.channels, from, step);
        }
        rows -= piece;
    }
}

constexpr auto NOTHING = [](const auto&, Index) {};

// Masks dy of the next `rows` positions of a tile by y; these are arrays 0 and Y of the layout.
template <int Y, int N, class T>
void mask_rows(Cursor<N> cursor, Index rows, const Tile& tile, T* dy, const T* y, double slope) {
    const auto& step = cursor.step();
    const bool dense = step[0] == tile.channels && step[Y] == tile.channels;
    while (rows > 0) {
        const Index some = std::min(cursor.run(), rows);
        T* into = dy + cursor.offset()[0] + tile.first;
        const T* by = y + cursor.offset()[Y] + tile.first;
        const Index pieces = dense ? 1 : some, length = some / pieces * tile.channels;
        for (Index p = 0; p < pieces; ++p) mask_run<T>(length, into + p * step[0], by + p * step[Y], slope);
        cursor.skip(some);
        rows -= some;
    }
}

// For each tile: block(tile, cursor, rows, node), which takes the cursor on, for each block of rows; nodes are merged
// into what done(tile, total) gets.
template <class Node, int N, class Block, class Done>
void by_blocks(const Layout<N>& layout, Index channels, Block block, Done done) {
    const Index rows = layout.size();
    for (Index c = 0; c < channels; c += TILE) {
        const Tile tile(c, channels);
        const Index block_rows = BLOCK * tile.fold, blocks = (rows + block_rows - 1) / block_rows;
        const Index segments = std::min(blocks, SEGMENTS);
        Node nodes[SEGMENTS];
        in_threads(threads_for(rows * tile.channels), segments, [&](Index s) {
            const auto start = [&](Index i) { return std::min(rows, blocks * i / segments * block_rows); };
            Tree<Node> tree;
            for (Cursor<N> cursor(layout, start(s), start(s + 1)); cursor.left() > 0;) {
                Node node;
                block(tile, cursor, std::min(block_rows, cursor.left()), node);
                tree.push(node, tile.channels);
            }
            nodes[s].assign(tree.total(tile.channels), tile.channels);
        });
        Tree<Node> tree;
        for (Index s = 0; s < segments; ++s) tree.push(nodes[s], tile.channels);
        done(tile, tree.total(tile.channels));
    }
}

// The sums of a block in runs of R.
template <class R, int N, class T, class Before>
void sum_block(const Tile& tile, Cursor<N>& cursor, Index rows, const T* x, Before before, Sums<1>& sums) {
    sums.clear(tile);
    by_pieces<1, N, T>(cursor, rows, tile, {x}, before, [&](Index n, Index width, auto& from, auto& step) {
        add_rows<R, T>(n, width, from[0], step[0], sums.sum[0]);
    });
    sums.fold(tile);
}

template <class R, class T>
void moments_of_block(const Tile& tile, Cursor<1>& cursor, Index rows, const T* x, Moments& found) {
    const Cursor<1> start = cursor;
    const Index piece = std::min(rows, PIECE * tile.fold);
    Cursor<1> first = cursor;
    Sums<1> sum;
    sum_block<R>(tile, first, piece, x, NOTHING, sum);
    R center[TILE];
    for (Index i = 0; i < tile.lanes; ++i) {
        const R mean = R(sum.sum[0][i % tile.channels] / double(piece));
        center[i] = std::isfinite(mean) ? mean : 0;
    }
    Sums<2> sums;
    sums.clear(tile);
    by_pieces<1, 1, T>(cursor, rows, tile, {x}, NOTHING, [&](Index n, Index width, auto& from, auto& step) {
        add_squares<R, T>(n, width, from[0], step[0], center, sums.sum[0], sums.sum[1]);
    });
    if constexpr (!std::is_same_v<R, double>) {
        if (!sums.finite(tile)) {
            Cursor<1> again = start;
            return moments_of_block<double>(tile, again, rows, x, found);
        }
    }
    sums.fold(tile);
    found.count = double(rows);
    for (Index c = 0; c < tile.channels; ++c) {
        const double shift = sums.sum[0][c], m2 = sums.sum[1][c] - shift * shift / found.count;
        found.sum[c] = double(center[c]) * found.count + shift;
        found.m2[c] = m2 < 0 ? 0 : m2;
    }
}

// Sums of dy and of dy * (x - mean), the mean rounded as T is computed with.
template <class R, class T, class Before>
void products_of_block(const Tile& tile, Cursor<3>& cursor, Index rows, const T* dy, const T* x, const double* mean,
                       Before before, Sums<2>& sums) {
    const Cursor<3> start = cursor;
    R center[TILE];
    for (Index i = 0; i < tile.lanes; ++i) center[i] = R(Real<T>(mean[tile.first + i % tile.channels]));
    sums.clear(tile);
    by_pieces<2, 3, T>(cursor, rows, tile, {dy, x}, before, [&](Index n, Index width, auto& from, auto& step) {
        add_products<R, T>(n, width, from[0], step[0], from[1], step[1], center, sums.sum[0], sums.sum[1]);
    });
    if constexpr (!std::is_same_v<R, double>) {
        if (!sums.finite(tile)) {
            Cursor<3> again = start;
            return products_of_block<double>(tile, again, rows, dy, x, mean, NOTHING, sums);
        }
    }
    sums.fold(tile);
}

template <class T>
void set_zero(Index n, T* out) {
    for (Index i = 0; i < n; ++i) out[i] = T{};
}

}  // namespace

template <class T>
void sum_positions(const Layout<1>& layout, Index channels, const T* x, T* out, double scale) {
    if (layout.size() == 0) return set_zero(channels, out);
    const auto block = [&](auto& tile, auto& cursor, Index rows, auto& sums) {
        sum_block<Plain<T>>(tile, cursor, rows, x, NOTHING, sums);
    };
    by_blocks<Sums<1>>(layout, channels, block, [&](auto& tile, auto& total) {
        for (Index i = 0; i < tile.channels; ++i) out[tile.first + i] = store<T>(Real<T>(total.sum[0][i] * scale));
    });
}

template <class T>
void bias_grad(const Layout<2>& layout, Index channels, T* dy, const T* y, double slope, Real<T>* out) {
    if (layout.size() == 0) return set_zero(channels, out);
    const auto block = [&](auto& tile, auto& cursor, Index rows, auto& sums) {
        const auto mask = [&](const auto& at, Index some) {
            if (y) mask_rows<1>(at, some, tile, dy, y, slope);
        };
        sum_block<Plain<T>>(tile, cursor, rows, dy, mask, sums);
    };
    by_blocks<Sums<1>>(layout, channels, block, [&](auto& tile, auto& total) {
        for (Index i = 0; i < tile.channels; ++i) out[tile.first + i] = Real<T>(total.sum[0][i]);
    });
}

template <class T>
void moments(const Layout<1>& layout, Index channels, const T* x, double* mean, double* m2) {
    if (layout.size() == 0) return set_zero(channels, mean), set_zero(channels, m2);
    const auto block = [&](auto& tile, auto& cursor, Index rows, auto& found) {
        moments_of_block<Real<T>>(tile, cursor, rows, x, found);
    };
    by_blocks<Moments>(layout, channels, block, [&](auto& tile, auto& total) {
        for (Index i = 0; i < tile.channels; ++i) mean[tile.first + i] = total.sum[i] / total.count;
        for (Index i = 0; i < tile.channels; ++i) m2[tile.first + i] = total.m2[i];
    });
}

template <class T>
void normalize_grad(const Layout<3>& layout, Index channels, T* dy, const T* x, const T* y, double slope,
                    const double* mean, const double* rstd, double* sum_dy, double* sum_dy_xhat) {
    if (layout.size() == 0) return set_zero(channels, sum_dy), set_zero(channels, sum_dy_xhat);
    const auto block = [&](auto& tile, auto& cursor, Index rows, auto& sums) {
        const auto mask = [&](const auto& at, Index some) {
            if (y) mask_rows<2>(at, some, tile, dy, y, slope);
        };
        products_of_block<Real<T>>(tile, cursor, rows, dy, x, mean, mask, sums);
    };
    by_blocks<Sums<2>>(layout, channels, block, [&](auto& tile, auto& total) {
        for (Index i = 0; i < tile.channels; ++i) {
            const Index c = tile.first + i;
            sum_dy[c] = total.sum[0][i];
            const double center_off = double(Real<T>(mean[c])) - mean[c];
            sum_dy_xhat[c] = (total.sum[1][i] + center_off * total.sum[0][i]) * rstd[c];
        }
    });
}

#define HPCTRAIN_FOR(T)                                                                                     \
    template void bias_grad<T>(const Layout<2>&, Index, T*, const T*, double, Real<T>*);                    \
    template void sum_positions<T>(const Layout<1>&, Index, const T*, T*, double);                          \
    template void moments<T>(const Layout<1>&, Index, const T*, double*, double*);                          \
    template void normalize_grad<T>(const Layout<3>&, Index, T*, const T*, const T*, double, const double*, \
                                    const double*, double*, double*);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)
HPCTRAIN_FOR(bf16)

}  // namespace hpctrain
