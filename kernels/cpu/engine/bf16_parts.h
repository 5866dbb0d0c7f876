// How convolutions of bfloat16 are cut into parts, of which float copies stay in the cache.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>

#include "engine.h"

namespace hpctrain {

constexpr Index PART_FLOATS = Index(1) << 18;  // of arrays that are copied, at a time
constexpr Index PART_POSITIONS = 2048;         // Winograd transforms the weights for each part anew
constexpr Index PART_ROWS = 8;                 // a multiple of the rows of Winograd's tiles

inline Index ceil_div(Index a, Index b) { return a > 0 ? (a + b - 1) / b : 0; }

inline Strides contiguous(const Sizes& extent, Index channels) {
    return {extent[0] * extent[1] * extent[2] * channels, extent[1] * extent[2] * channels, extent[2] * channels,
            channels};
}

inline Index positions(const Sizes& extent) { return extent[0] * extent[1] * extent[2]; }

// An array (samples, *extent, channels) of bfloat16 at these strides, and its contiguous copy.
inline Rows rows_of(Index samples, const Sizes& extent, Index channels, const Strides& strides) {
    return {samples, extent, channels, strides, contiguous(extent, channels)};
}

inline Rows x_rows(const Convolution& c, const Strides& strides) {
    return rows_of(c.samples, c.input, c.groups * c.channels, strides);
}
inline Rows y_rows(const Convolution& c, const Strides& strides) {
    return rows_of(c.samples, c.output, c.groups * c.filters, strides);
}
inline Rows w_rows(const Convolution& c) {
    return rows_of(c.kernel[0], {c.kernel[1], c.kernel[2], c.channels}, c.groups * c.filters, c.w);
}

inline Index size(const Rows& rows) { return rows.samples * positions(rows.extent) * rows.channels; }

// Floats of x and of y, of one sample.
inline Index x_floats(const Convolution& c) { return positions(c.input) * c.groups * c.channels; }
inline Index y_floats(const Convolution& c) { return positions(c.output) * c.groups * c.filters; }

inline Index thread_count() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// Floats that a part may copy, each thread having a cache: more than the weights where these are gone through for each part.
inline Index room_of(const Convolution& c, bool winograd) {
    return thread_count() * std::max(PART_FLOATS, winograd ? PART_POSITIONS * c.groups * (c.channels + c.filters) : 0);
}
inline Index room_of_dw(const Convolution& c, bool winograd) {
    return std::max(room_of(c, winograd), 4 * c.taps() * c.channels * c.groups * c.filters);
}

// Some samples, or of one sample some rows along the first dim that has several.
struct Cut {
    int dim;
    Index samples, rows;  // of a part, at most

    // `extent`: of what is cut, the inputs or the outputs; `sample`: floats that are copied for a sample, of at most
    // `room`. Parts that overlap by some rows of the other array are larger.
    Cut(const Convolution& c, const Sizes& extent, Index sample, Index room, bool overlap = false)
        : dim(extent[0] > 1 ? 0 : extent[1] > 1 ? 1 : 2),
          samples(std::max<Index>(1, room / std::max<Index>(1, sample))),
          rows(extent[size_t(dim)]) {
        if (sample <= room) return;
        const Index halo = overlap && c.stride[size_t(dim)] == 1 ? (c.kernel[size_t(dim)] - 1) % PART_ROWS : 0;
        rows = std::max((overlap ? 4 : 1) * PART_ROWS, rows * room / sample / PART_ROWS * PART_ROWS) - halo;
    }

    // Calls work(first sample, samples, first row, last row) for all parts.
    template <class Work>
    void each(const Convolution& c, const Sizes& extent, Work work) const {
        if (positions(extent) == 0) return;
        for (Index n = 0; n < c.samples; n += samples) {
            for (Index row = 0, all = extent[size_t(dim)]; row < all; row += rows)
                work(n, std::min(samples, c.samples - n), row, std::min(row + rows, all));
        }
    }
};

// The part of a convolution that computes output rows [first, last) of some samples, on contiguous copies; `inputs`
// of their rows.
inline Convolution part_of(const Convolution& c, int dim, Index samples, Index first, Index last, Index inputs) {
    Convolution part = c;
    part.samples = samples;
    part.output[size_t(dim)] = last - first, part.input[size_t(dim)] = inputs;
    part.x = contiguous(part.input, c.groups * c.channels), part.y = contiguous(part.output, c.groups * c.filters);
    part.w = w_rows(c).copy;
    return part;
}

inline Index span(const Convolution& c, int dim) { return c.dilation[size_t(dim)] * (c.kernel[size_t(dim)] - 1) + 1; }

inline Convolution part_of(const Convolution& c, int dim, Index samples, Index first, Index last) {
    return part_of(c, dim, samples, first, last, (last - first - 1) * c.stride[size_t(dim)] + span(c, dim));
}

}  // namespace hpctrain
