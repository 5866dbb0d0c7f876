// Goes through the contiguous runs of an array and its copy.
#pragma once

#include "engine.h"
#include "threads.h"

namespace hpctrain::HPCTRAIN_ISA {

constexpr Index PIECE = 1 << 13;  // of a run, that a thread does at a time

// Calls work(offset in the array, offset in its copy, length) for this thread's share of the contiguous runs.
template <class Work>
inline void each_run(const Rows& rows, Work work) {
    Index extent[4] = {rows.samples, rows.extent[0], rows.extent[1], rows.extent[2]}, length = rows.channels;
    for (int d = 3; d >= 0; --d) {  // dims without gaps are one
        if (extent[d] != 1 && (rows.array[size_t(d)] != length || rows.copy[size_t(d)] != length)) break;
        length *= extent[d];
        extent[d] = 1;
    }
    const Index pieces = (length + PIECE - 1) / PIECE, all = extent[0] * extent[1] * extent[2] * extent[3] * pieces;
    in_threads([&](int thread, int threads) {
        for (Index i = all * thread / threads, end = all * (thread + 1) / threads; i < end; ++i) {
            const Index first = i % pieces * PIECE, n = length - first < PIECE ? length - first : PIECE;
            Index run = i / pieces, array = first, copy = first;
            for (int d = 3; d >= 0; run /= extent[d], --d) {
                array += run % extent[d] * rows.array[size_t(d)];
                copy += run % extent[d] * rows.copy[size_t(d)];
            }
            work(array, copy, n);
        }
    });
}

}  // namespace hpctrain::HPCTRAIN_ISA
