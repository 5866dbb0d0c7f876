// Sums over positions, per channel, added in double whatever the arrays hold, straight from them in one pass: float
// sums would be no faster, as memory is what they wait for.
//
// The order is that of the shape, whatever strides and threads: rows are added up in blocks, the sums of blocks meet in
// a binary tree per segment, and segments, which threads share, meet in a tree again. The error of n additions so grows
// like log n.
#include <cmath>

#include "kernels.h"
#include "runs.h"

namespace hpctrain {
namespace {

constexpr Index TILE = 128;        // channels that are done at a time
constexpr Index FOLDED = 64;       // narrower rows are folded side by side into this many lanes
constexpr Index BLOCK_ROWS = 32;   // rows of a block, folded ones counted as one
constexpr Index SEGMENTS = 64;

// A tile of channels, and how rows of it are folded.
struct Tile {
    Index first, channels, lanes, rows_per_block;
    bool folded;

    Tile(Index first_channel, Index all_channels) : first(first_channel) {
        channels = std::min(all_channels - first, TILE);
        folded = channels < FOLDED;
        lanes = folded ? FOLDED / channels * channels : channels;
        rows_per_block = BLOCK_ROWS * (lanes / channels);
    }
};

// M sums per channel, or per lane.
template <int M>
struct Sums {
    double sum[M][TILE];

    void clear(const Tile& tile) {
        for (auto& row : sum) std::fill_n(row, tile.lanes, 0.0);
    }
    void assign(const Sums& other, Index channels) {
        for (int m = 0; m < M; ++m) std::copy_n(other.sum[m], channels, sum[m]);
    }
    void merge(const Sums& later, Index channels) {
        for (int m = 0; m < M; ++m) {
            for (Index c = 0; c < channels; ++c) sum[m][c] += later.sum[m][c];
        }
    }
    // Lanes of one channel added up into the first of them.
    void fold(const Tile& tile) {
        for (auto& row : sum) {
            for (Index i = tile.channels; i < tile.lanes; ++i) row[i % tile.channels] += row[i];
        }
    }
};

// Chan, Golub & LeVeque 1983. The sum is kept, not the mean, so that infinities add up to an infinite mean.
struct Moments {
    double count, sum[TILE], m2[TILE];

    void assign(const Moments& other, Index channels) {
        count = other.count;
        std::copy_n(other.sum, channels, sum);
        std::copy_n(other.m2, channels, m2);
    }
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
    void push(const Node& node, Index channels) {
        const Node* carry = &node;
        int l = 0;
        for (std::uint64_t n = pushed_++; n & 1; n >>= 1) {
            level_[l].merge(*carry, channels);
            carry = &level_[l++];
        }
        level_[l].assign(*carry, channels);
    }

    // All nodes merged; there must be one.
    Node& total(Index channels) {
        int l = 0;
        while (!(pushed_ >> l & 1)) ++l;
        Node* node = &level_[l];
        for (++l; l < LEVELS && pushed_ >> l; ++l) {
            if (pushed_ >> l & 1) {
                level_[l].merge(*node, channels);
                node = &level_[l];
            }
        }
        return *node;
    }

private:
    static constexpr int LEVELS = 40;
    std::uint64_t pushed_ = 0;
    Node level_[LEVELS];
};

// Rows are taken STRIP channels at a time, whose sums stay in registers.
constexpr Index STRIP = 32;

// sum[i] += x[i] of each row
template <class T>
HPCTRAIN_CLONES void add_rows(Index rows, Index width, const T* x, Index step, double* sum) {
    Index i = 0;
    for (; i + STRIP <= width; i += STRIP) {
        double s[STRIP];
        for (Index j = 0; j < STRIP; ++j) s[j] = sum[i + j];
        for (Index r = 0; r < rows; ++r) {
            for (Index j = 0; j < STRIP; ++j) s[j] += double(load(x[r * step + i + j]));
        }
        for (Index j = 0; j < STRIP; ++j) sum[i + j] = s[j];
    }
    for (Index r = 0; r < rows; ++r) {
#pragma GCC ivdep
        for (Index j = i; j < width; ++j) sum[j] += double(load(x[r * step + j]));
    }
}

// d = x[i] - center[i] of each row: sum[i] += d, square[i] += d^2
template <class T>
HPCTRAIN_CLONES void add_squares(Index rows, Index width, const T* x, Index step, const double* center, double* sum,
                                 double* square) {
    Index i = 0;
    for (; i + STRIP <= width; i += STRIP) {
        double s[STRIP], q[STRIP], c[STRIP];
        for (Index j = 0; j < STRIP; ++j) s[j] = sum[i + j], q[j] = square[i + j], c[j] = center[i + j];
        for (Index r = 0; r < rows; ++r) {
            for (Index j = 0; j < STRIP; ++j) {
                const double d = double(load(x[r * step + i + j])) - c[j];
                s[j] += d, q[j] += d * d;
            }
        }
        for (Index j = 0; j < STRIP; ++j) sum[i + j] = s[j], square[i + j] = q[j];
    }
    for (Index r = 0; r < rows; ++r) {
#pragma GCC ivdep
        for (Index j = i; j < width; ++j) {
            const double d = double(load(x[r * step + j])) - center[j];
            sum[j] += d, square[j] += d * d;
        }
    }
}

// sum[i] += dy[i], product[i] += dy[i] * (x[i] - mean[i]) of each row
template <class T>
HPCTRAIN_CLONES void add_products(Index rows, Index width, const T* dy, Index dy_step, const T* x, Index x_step,
                                  const double* mean, double* sum, double* product) {
    Index i = 0;
    for (; i + STRIP <= width; i += STRIP) {
        double s[STRIP], p[STRIP], c[STRIP];
        for (Index j = 0; j < STRIP; ++j) s[j] = sum[i + j], p[j] = product[i + j], c[j] = mean[i + j];
        for (Index r = 0; r < rows; ++r) {
            for (Index j = 0; j < STRIP; ++j) {
                const double g = double(load(dy[r * dy_step + i + j]));
                s[j] += g, p[j] += g * (double(load(x[r * x_step + i + j])) - c[j]);
            }
        }
        for (Index j = 0; j < STRIP; ++j) sum[i + j] = s[j], product[i + j] = p[j];
    }
    for (Index r = 0; r < rows; ++r) {
#pragma GCC ivdep
        for (Index j = i; j < width; ++j) {
            const double g = double(load(dy[r * dy_step + j]));
            sum[j] += g, product[j] += g * (double(load(x[r * x_step + j])) - mean[j]);
        }
    }
}

template <class T>
void gather(Index rows, Index width, const T* x, Index step, T* to) {
    if (step == width) {
        std::copy_n(x, rows * width, to);
    } else {
        for (Index r = 0; r < rows; ++r) std::copy_n(x + r * step, width, to + r * width);
    }
}

// Goes `rows` positions on and calls work(rows, width, arrays, steps) for them: wide rows as they lie, narrow ones
// folded, copied where they do not lie one behind the other.
template <int N, class T, class Work>
void take_block(Cursor<N>& cursor, Index rows, const Tile& tile, const std::array<const T*, N>& arrays, Work work) {
    const std::array<Index, N>& step = cursor.step();
    std::array<const T*, N> from;
    const auto locate = [&] {
        for (int i = 0; i < N; ++i) from[i] = arrays[i] + cursor.offset()[i] + tile.first;
    };
    if (!tile.folded) {
        for (Index left = rows; left > 0;) {
            const Index some = std::min(cursor.run(), left);
            locate();
            work(some, tile.channels, from, step);
            cursor.skip(some);
            left -= some;
        }
        return;
    }
    constexpr Index MOST = FOLDED * BLOCK_ROWS;
    alignas(64) T buffer[N][MOST];
    std::array<Index, N> folded;
    folded.fill(tile.lanes);
    bool dense = cursor.run() >= rows;
    for (int i = 0; i < N; ++i) dense = dense && step[i] == tile.channels;
    locate();
    if (dense) {
        cursor.skip(rows);
    } else {
        for (Index done = 0; done < rows;) {
            const Index some = std::min(cursor.run(), rows - done);
            locate();
            for (int i = 0; i < N; ++i) gather(some, tile.channels, from[i], step[i], buffer[i] + done * tile.channels);
            cursor.skip(some);
            done += some;
        }
        for (int i = 0; i < N; ++i) from[i] = buffer[i];
    }
    const Index whole = rows * tile.channels / tile.lanes, rest = rows * tile.channels % tile.lanes;
    work(whole, tile.lanes, from, folded);
    for (int i = 0; i < N; ++i) from[i] += whole * tile.lanes;
    if (rest) work(1, rest, from, folded);
}

// Rows [begin, end) of a layout, of which `begin` starts a block.
struct Segment {
    Index begin, end;
};

// The sums of a segment: before(cursor, rows) and then add(rows, width, arrays, steps, sums) for each block.
template <int M, int N, class T, class Before, class Add>
Sums<M> sum_segment(const Layout<N>& layout, const Tile& tile, const std::array<const T*, N>& arrays, Segment segment,
                    Before before, Add add) {
    Tree<Sums<M>> tree;
    Cursor<N> cursor(layout, segment.begin, segment.end);
    while (cursor.left() > 0) {
        const Index rows = std::min(tile.rows_per_block, cursor.left());
        before(cursor, rows);
        Sums<M> sums;
        sums.clear(tile);
        take_block<N, T>(cursor, rows, tile, arrays,
                         [&](Index n, Index width, auto& from, auto& step) { add(n, width, from, step, sums); });
        sums.fold(tile);
        tree.push(sums, tile.channels);
    }
    return tree.total(tile.channels);
}

constexpr auto NOTHING = [](const auto&, Index) {};

// For each tile: node(tile, segment) of each segment, in threads, merged in order into what done(tile, total) gets.
template <class Node, int N, class Make, class Done>
void by_segments(const Layout<N>& layout, Index channels, Make make, Done done) {
    const Index rows = layout.size();
    for (Index c = 0; c < channels; c += TILE) {
        const Tile tile(c, channels);
        const Index blocks = (rows + tile.rows_per_block - 1) / tile.rows_per_block;
        const Index segments = std::clamp(blocks / 4, Index(1), SEGMENTS);
        Node nodes[SEGMENTS];
        in_threads(threads_for(rows * tile.channels), segments, [&](Index s) {
            const auto start = [&](Index i) { return std::min(rows, blocks * i / segments * tile.rows_per_block); };
            nodes[s] = make(tile, Segment{start(s), start(s + 1)});
        });
        Tree<Node> tree;
        for (Index s = 0; s < segments; ++s) tree.push(nodes[s], tile.channels);
        done(tile, tree.total(tile.channels));
    }
}

// Masks dy of the next `rows` positions of a tile by y; these are arrays 0 and `Y` of the layout.
template <int Y, int N, class T>
void mask_block(Cursor<N> cursor, Index rows, const Tile& tile, T* dy, const T* y, double slope) {
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

template <class T>
Sums<1> sum_of(const Layout<1>& layout, const Tile& tile, const T* x, Segment segment) {
    const auto add = [](Index rows, Index width, auto& from, auto& step, Sums<1>& sums) {
        add_rows<T>(rows, width, from[0], step[0], sums.sum[0]);
    };
    return sum_segment<1, 1, T>(layout, tile, {x}, segment, NOTHING, add);
}

// About the mean of the segment's first block. Its distance from the segment's mean, in standard deviations, is at most
// sqrt(rows of the segment / rows of the block), and what the squares lose by it, of a double's precision, the square
// of that.
template <class T>
Moments moments_of(const Layout<1>& layout, const Tile& tile, const T* x, Segment segment) {
    const Segment block{segment.begin, std::min(segment.end, segment.begin + tile.rows_per_block)};
    const Sums<1> first = sum_of(layout, tile, x, block);
    double center[TILE];
    for (Index i = 0; i < tile.lanes; ++i) {
        const double mean = first.sum[0][i % tile.channels] / double(block.end - block.begin);
        center[i] = std::isfinite(mean) ? mean : 0;
    }
    const auto add = [&](Index rows, Index width, auto& from, auto& step, Sums<2>& sums) {
        add_squares<T>(rows, width, from[0], step[0], center, sums.sum[0], sums.sum[1]);
    };
    const Sums<2> sums = sum_segment<2, 1, T>(layout, tile, {x}, segment, NOTHING, add);
    Moments found;
    found.count = double(segment.end - segment.begin);
    for (Index c = 0; c < tile.channels; ++c) {
        const double shift = sums.sum[0][c], m2 = sums.sum[1][c] - shift * shift / found.count;
        found.sum[c] = center[c] * found.count + shift;
        found.m2[c] = m2 < 0 ? 0 : m2;
    }
    return found;
}

template <class T>
void set_zero(Index n, T* out) {
    for (Index i = 0; i < n; ++i) out[i] = T{};
}

}  // namespace

template <class T>
void sum_positions(const Layout<1>& layout, Index channels, const T* x, T* out, double scale) {
    if (layout.size() == 0) return set_zero(channels, out);
    by_segments<Sums<1>>(
        layout, channels, [&](auto& tile, Segment segment) { return sum_of(layout, tile, x, segment); },
        [&](auto& tile, auto& total) {
            for (Index i = 0; i < tile.channels; ++i) out[tile.first + i] = store<T>(Real<T>(total.sum[0][i] * scale));
        });
}

template <class T>
void bias_grad(const Layout<2>& layout, Index channels, T* dy, const T* y, double slope, Real<T>* out) {
    if (layout.size() == 0) return set_zero(channels, out);
    const auto make = [&](auto& tile, Segment segment) {
        const auto mask = [&](const Cursor<2>& cursor, Index rows) {
            if (y) mask_block<1>(cursor, rows, tile, dy, y, slope);
        };
        const auto add = [](Index rows, Index width, auto& from, auto& steps, Sums<1>& sums) {
            add_rows<T>(rows, width, from[0], steps[0], sums.sum[0]);
        };
        return sum_segment<1, 2, T>(layout, tile, {dy, y ? y : dy}, segment, mask, add);
    };
    by_segments<Sums<1>>(layout, channels, make, [&](auto& tile, auto& total) {
        for (Index i = 0; i < tile.channels; ++i) out[tile.first + i] = Real<T>(total.sum[0][i]);
    });
}

template <class T>
void moments(const Layout<1>& layout, Index channels, const T* x, double* mean, double* m2) {
    if (layout.size() == 0) return set_zero(channels, mean), set_zero(channels, m2);
    by_segments<Moments>(
        layout, channels, [&](auto& tile, Segment segment) { return moments_of(layout, tile, x, segment); },
        [&](auto& tile, auto& total) {
            for (Index i = 0; i < tile.channels; ++i) mean[tile.first + i] = total.sum[i] / total.count;
            for (Index i = 0; i < tile.channels; ++i) m2[tile.first + i] = total.m2[i];
        });
}

template <class T>
void normalize_grad(const Layout<3>& layout, Index channels, T* dy, const T* x, const T* y, double slope,
                    const double* mean, const double* rstd, double* sum_dy, double* sum_dy_xhat) {
    if (layout.size() == 0) return set_zero(channels, sum_dy), set_zero(channels, sum_dy_xhat);
    const auto make = [&](auto& tile, Segment segment) {
        double center[TILE];
        for (Index i = 0; i < tile.lanes; ++i) center[i] = mean[tile.first + i % tile.channels];
        const auto mask = [&](const Cursor<3>& cursor, Index rows) {
            if (y) mask_block<2>(cursor, rows, tile, dy, y, slope);
        };
        const auto add = [&](Index rows, Index width, auto& from, auto& steps, Sums<2>& sums) {
            add_products<T>(rows, width, from[0], steps[0], from[1], steps[1], center, sums.sum[0], sums.sum[1]);
        };
        return sum_segment<2, 3, T>(layout, tile, {dy, x, y ? y : dy}, segment, mask, add);
    };
    by_segments<Sums<2>>(layout, channels, make, [&](auto& tile, auto& total) {
        for (Index i = 0; i < tile.channels; ++i) sum_dy[tile.first + i] = total.sum[0][i];
        for (Index i = 0; i < tile.channels; ++i)
            sum_dy_xhat[tile.first + i] = total.sum[1][i] * rstd[tile.first + i];
    });
}

#define HPCTRAIN_FOR(T)                                                                                       \
    template void bias_grad<T>(const Layout<2>&, Index, T*, const T*, double, Real<T>*);                      \
    template void sum_positions<T>(const Layout<1>&, Index, const T*, T*, double);                            \
    template void moments<T>(const Layout<1>&, Index, const T*, double*, double*);                            \
    template void normalize_grad<T>(const Layout<3>&, Index, T*, const T*, const T*, double, const double*,   \
                                    const double*, double*, double*);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)
HPCTRAIN_FOR(bf16)

}  // namespace hpctrain
