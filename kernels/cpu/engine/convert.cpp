// Blocks of arrays of bfloat16 to floats and back, row by row.
#include "bf16_simd.h"
#include "isa.h"
#include "threads.h"

namespace hpctrain::HPCTRAIN_ISA {
namespace {

template <class From, class To>
inline void convert(const From* from, To* to, Index n) {
    Index i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i, int(n - i)), int(n - i));
}

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

}  // namespace

void widen(const Rows& rows, const Bf16* array, float* copy) {
    each_run(rows, [=](Index from, Index to, Index n) { convert(array + from, copy + to, n); });
}

void narrow(const Rows& rows, const float* copy, Bf16* array) {
    each_run(rows, [=](Index to, Index from, Index n) { convert(copy + from, array + to, n); });
}

void add(const Rows& rows, const float* copy, float* array) {
    each_run(rows, [=](Index to, Index from, Index n) {
        for (Index i = 0; i < n; ++i) array[to + i] += copy[from + i];
    });
}

}  // namespace hpctrain::HPCTRAIN_ISA
