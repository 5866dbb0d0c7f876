// What kernels do with each contiguous piece of their arrays.
#pragma once

#include "layout.h"

namespace hpctrain {

// Calls work(elements, offsets) for each contiguous run of a layout.
template <int N, class Work>
void by_runs(const Layout<N>& layout, Work work) {
    for (Cursor<N> cursor(layout); cursor.left() > 0; cursor.skip(cursor.run())) work(cursor.run(), cursor.offset());
}

}  // namespace hpctrain
