// What reductions add up: sums per channel of a tile of channels, merged pairwise.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layout.h"

namespace hpctrain {

constexpr Index TILE = 512;   // channels that are done at a time
constexpr Index FOLDED = 64;  // narrower rows are folded side by side into this many lanes
// Rows, folded ones counted as one: in a run, a piece, and a block.
constexpr Index RUN = 16, PIECE = 32, BLOCK = 256;

// A tile of channels, and how rows of it are folded.
struct Tile {
    Index first, channels, lanes, fold;
    bool folded;

    Tile(Index first_channel, Index all_channels) : first(first_channel) {
        channels = std::min(all_channels - first, TILE);
        folded = channels < FOLDED;
        fold = folded ? FOLDED / channels : 1;
        lanes = fold * channels;
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
    bool finite(const Tile& tile) const {
        bool all = true;
        for (const auto& row : sum) {
            for (Index i = 0; i < tile.lanes; ++i) all &= row[i] - row[i] == 0;
        }
        return all;
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
    static constexpr int LEVELS = 32;  // 2^32 blocks
    std::uint64_t pushed_ = 0;
    Node level_[LEVELS];
};

}  // namespace hpctrain
