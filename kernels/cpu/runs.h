// What kernels do with each contiguous piece of their arrays, in threads.
#pragma once

#include <array>

#include "layout.h"
#include "parallel.h"

namespace hpctrain {

// Calls work(elements, offsets) for each contiguous run of a layout; threads may cut runs.
template <int N, class Work>
void by_runs(const Layout<N>& layout, Work work) {
    const Index size = layout.size(), parts = threads_for(size);
    in_threads(parts, parts, [&](Index part) {
        for (Cursor<N> cursor(layout, size * part / parts, size * (part + 1) / parts); cursor.left() > 0;
             cursor.skip(cursor.run()))
            work(cursor.run(), cursor.offset());
    });
}

// dy[i] *= y[i] > 0 ? 1 : slope (elementwise.cpp).
template <class T>
void mask_run(Index n, T* dy, const T* y, double slope);

// Channel vectors are held in arrays of this many elements: narrow ones repeated side by side, so that rows of 3
// channels still fill vector registers, wide ones in tiles.
constexpr Index LANES = 1024;

template <class R, int M>
using Vectors = R[M][LANES];

// Calls work(rows, width, offsets, row strides, vectors) until all rows of a layout are done, where vectors[m][i] is
// element m of value(c) for the channel c of element i of a row.
template <class R, int M, int N, class Value, class Work>
void by_rows(const Layout<N>& layout, Index channels, Value value, Work work) {
    const std::array<Index, N>& step = layout.stride[layout.dims - 1];
    bool dense = channels <= LANES;  // rows follow each other without gaps: several can be taken as one
    for (int i = 0; i < N; ++i) dense = dense && step[i] == channels;
    alignas(64) Vectors<R, M> vectors;
    for (Index first = 0; first < channels; first += LANES) {
        const Index width = std::min(channels - first, LANES);
        for (Index i = 0; i < width; ++i) {
            const std::array<R, M> values = value(first + i);
            for (int m = 0; m < M; ++m) vectors[m][i] = values[size_t(m)];
        }
        const Index group = dense ? std::min(LANES / width, layout.extent[layout.dims - 1]) : 1;
        for (int m = 0; m < M; ++m) {
            for (Index i = width; i < group * width; ++i) vectors[m][i] = vectors[m][i - width];
        }
        std::array<Index, N> strides = step;
        for (Index& stride : strides) stride *= group;
        const Index size = layout.size(), parts = threads_for(size * width);
        in_threads(parts, parts, [&](Index part) {
            for (Cursor<N> cursor(layout, size * part / parts, size * (part + 1) / parts); cursor.left() > 0;
                 cursor.skip(cursor.run())) {
                std::array<Index, N> offset = cursor.offset();
                for (Index& o : offset) o += first;
                const Index groups = cursor.run() / group, rest = cursor.run() % group;
                work(groups, group * width, offset, strides, vectors);
                for (int i = 0; i < N; ++i) offset[i] += groups * strides[i];
                if (rest) work(1, rest * width, offset, strides, vectors);
            }
        });
    }
}

}  // namespace hpctrain
