// How strided arrays are walked: as few, long runs as their strides allow. No Python, no allocation.
#pragma once

#include <array>
#include <cstddef>

namespace hpctrain {

using Index = std::ptrdiff_t;

constexpr int MAX_DIMS = 8;

// N arrays of one shape, with their strides in elements, outermost dim first.
template <int N>
struct Layout {
    int dims = 0;
    std::array<Index, MAX_DIMS> extent{};
    std::array<std::array<Index, N>, MAX_DIMS> stride{};

    // Add a dim inside the others: dropped where its extent is 1, merged into the one before where every array allows
    // it.
    void append(Index n, const std::array<Index, N>& step) {
        if (n == 1) return;
        bool merge = dims > 0 && n > 0;
        for (int i = 0; i < N && merge; ++i) merge = stride[dims - 1][i] == n * step[i];
        if (merge) {
            extent[dims - 1] *= n;
        } else {
            extent[dims++] = n;
        }
        stride[dims - 1] = step;
    }

    // The innermost dim is contiguous in every array: if need be a new one of extent 1.
    void end_in_runs() {
        bool contiguous = dims > 0;
        for (int i = 0; i < N && contiguous; ++i) contiguous = stride[dims - 1][i] == 1;
        if (!contiguous) push_unit();
    }

    // There is an innermost dim, whatever its strides.
    void end_in_rows() {
        if (dims == 0) push_unit();
    }

    Index size() const {
        Index n = 1;
        for (int d = 0; d < dims; ++d) n *= extent[d];
        return n;
    }

private:
    void push_unit() {
        extent[dims] = 1;
        stride[dims++].fill(1);
    }
};

// Visits positions of a layout in C order, one piece of the innermost dim at a time.
template <int N>
class Cursor {
public:
    explicit Cursor(const Layout<N>& layout) : layout_(layout), left_(layout.size()) {}

    // Positions [begin, end) only.
    Cursor(const Layout<N>& layout, Index begin, Index end) : layout_(layout), left_(end - begin) {
        if (left_ <= 0) return;
        for (int d = layout.dims - 1; d >= 0; --d) {
            advance(d, begin % layout.extent[d]);
            begin /= layout.extent[d];
        }
    }

    // Positions not yet visited.
    Index left() const { return left_; }

    // Where the next piece begins, in each array.
    const std::array<Index, N>& offset() const { return offset_; }

    // From one position of a piece to the next, in each array.
    const std::array<Index, N>& step() const { return layout_.stride[layout_.dims - 1]; }

    // Length of the next piece: what is left of this run.
    Index run() const {
        const Index rest = layout_.extent[layout_.dims - 1] - at_[layout_.dims - 1];
        return left_ < rest ? left_ : rest;
    }

    // Go on by `positions`, at most run().
    void skip(Index positions) {
        const int inner = layout_.dims - 1;
        left_ -= positions;
        advance(inner, positions);
        for (int d = inner; d > 0 && at_[d] == layout_.extent[d]; --d) {
            advance(d, -at_[d]);
            advance(d - 1, 1);
        }
    }

private:
    void advance(int dim, Index steps) {
        at_[dim] += steps;
        for (int i = 0; i < N; ++i) offset_[i] += steps * layout_.stride[dim][i];
    }

    const Layout<N>& layout_;
    Index left_;
    std::array<Index, MAX_DIMS> at_{};
    std::array<Index, N> offset_{};
};

}  // namespace hpctrain
