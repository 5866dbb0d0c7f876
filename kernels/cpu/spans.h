// Parts of strided arrays, dealt out to threads, and sums whose order depends on the number of terms alone.
#pragma once

#include <algorithm>

#include "functions.h"
#include "layout.h"
#include "parallel.h"
#include "storage.h"

namespace hpctrain {

// Calls work(task) for each task, of all of which `elements` elements come, in threads where these are worth it.
// Nothing may be thrown in there, and no result may depend on who does what.
template <class Work>
void in_tasks(Index tasks, Index elements, Work work) {
    in_threads(threads_for(elements), tasks, work);
}

// How many parts of `size` elements there are in n.
inline Index parts(Index n, Index size) { return (n + size - 1) / size; }

// Calls work(count, offsets) for pieces of the positions [begin, end) of a layout, in C order: `count` of them
// along its last dim.
template <int N, class Work>
void by_span(const Layout<N>& layout, Index begin, Index end, Work work) {
    for (Cursor<N> cursor(layout, begin, end); cursor.left() > 0; cursor.skip(cursor.run()))
        work(cursor.run(), cursor.offset());
}

// An element of an array of any type in double, and back.
template <class T>
HPCTRAIN_INLINE double wide(T value) {
    return double(load(value));
}
template <class T>
HPCTRAIN_INLINE T narrow(double value) {
    return store<T>(Real<T>(value));
}

constexpr int SUM_LANES = 16;

// value(0) + ... + value(n - 1): term i is added in lane i % SUM_LANES, so that lanes fill vectors; then these pairwise.
template <class Value>
HPCTRAIN_INLINE double sum_of(Index n, Value value) {
    double lane[SUM_LANES] = {};
    Index i = 0;
    for (; i + SUM_LANES <= n; i += SUM_LANES) {
        for (int j = 0; j < SUM_LANES; ++j) lane[j] += value(i + j);
    }
    for (int j = 0; i + j < n; ++j) lane[j] += value(i + j);
    for (int half = SUM_LANES / 2; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    return lane[0];
}

}  // namespace hpctrain
