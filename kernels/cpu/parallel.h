// OpenMP threads of kernels that are not the engine's.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>

#include "layout.h"

namespace hpctrain {

// How many threads are worth their start for so many elements: at most as many as `use_threads` said.
inline Index threads_for([[maybe_unused]] Index elements) {
#ifdef _OPENMP
    constexpr Index ENOUGH = 32768;  // a few microseconds of work, as much as the start of a thread takes
    return std::clamp(elements / ENOUGH, Index(1), Index(omp_get_max_threads()));
#else
    return 1;
#endif
}

// Calls work(part) for each part in [0, parts), on so many threads. Nothing may be thrown in there.
template <class Work>
void in_threads(Index threads, Index parts, Work work) {
#ifdef _OPENMP
    if (threads > 1 && parts > 1) {
#pragma omp parallel for schedule(static) num_threads(int(std::min(threads, parts)))
        for (Index part = 0; part < parts; ++part) work(part);
        return;
    }
#endif
    static_cast<void>(threads);
    for (Index part = 0; part < parts; ++part) work(part);
}

}  // namespace hpctrain
