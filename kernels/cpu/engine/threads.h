// OpenMP threads, or this one where the compiler has none.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace hpctrain::HPCTRAIN_ISA {

inline int thread_count() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// Of loops that the calling thread starts from now on.
inline void use_threads([[maybe_unused]] int count) {
#ifdef _OPENMP
    omp_set_num_threads(count);
#endif
}

// Calls work(thread, threads) in each thread. Nothing may be thrown in there.
template <class Work>
inline void in_threads(Work work) {
#ifdef _OPENMP
    if (thread_count() > 1) {
#pragma omp parallel
        work(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    work(0, 1);
}

}  // namespace hpctrain::HPCTRAIN_ISA
