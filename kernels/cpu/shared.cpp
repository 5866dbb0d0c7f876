// Ranks of one host meet at flags in shared memory. The waits are bounded, as
// MPI must make progress meanwhile: another rank may be inside it and need this
// one's answer.
#include "shared.h"

#include <sched.h>

#include <algorithm>
#include <chrono>

#include "kernels.h"
#include "parallel.h"

namespace hpctrain {
namespace {

constexpr int SPINS = 50;         // of a few nanoseconds each; more cost milliseconds
                                  // where ranks share a core
constexpr Index CHUNK = 1024;     // elements that stay in the nearest cache while they are added up
constexpr Index A_PART = 262144;  // elements that a thread takes at a time

void pause_core() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

template <class T>
HPCTRAIN_CLONES void add_two(Index n, const T* a, const T* b, T* out) {
    for (Index i = 0; i < n; ++i) out[i] = store<T>(load(a[i]) + load(b[i]));
}

template <class T>
HPCTRAIN_CLONES void add_many(Index begin, Index end, Index sources, const T* const* from, T* out) {
    Real<T> sums[CHUNK];
    for (Index at = begin; at < end; at += CHUNK) {
        const Index n = std::min(CHUNK, end - at);
        for (Index i = 0; i < n; ++i) sums[i] = load(from[0][at + i]);
        for (Index source = 1; source < sources; ++source) {
            const T* more = from[source] + at;
            for (Index i = 0; i < n; ++i) sums[i] += load(more[i]);
        }
        for (Index i = 0; i < n; ++i) out[at + i] = store<T>(sums[i]);
    }
}

}  // namespace

void post(Flag* flag, Flag value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }

bool await(const Flag* flag, Flag value, double microseconds) {
    const auto reached = [&] { return __atomic_load_n(flag, __ATOMIC_ACQUIRE) >= value; };
    for (int spin = 0; spin < SPINS; ++spin) {
        if (reached()) return true;
        if (microseconds <= 0) return false;
        pause_core();
    }
    const auto begin = std::chrono::steady_clock::now();
    const std::chrono::duration<double, std::micro> limit(microseconds);
    while (!reached()) {
        if (std::chrono::steady_clock::now() - begin > limit) return false;
        sched_yield();
    }
    return true;
}

template <class T>
void add_up(Index n, const std::vector<const T*>& from, T* out) {
    const Index parts = (n + A_PART - 1) / A_PART;
    in_threads(threads_for(n), parts, [&](Index part) {
        const Index begin = part * A_PART, end = std::min(n, begin + A_PART);
        if (from.size() == 2) {
            add_two<T>(end - begin, from[0] + begin, from[1] + begin, out + begin);
        } else {
            add_many<T>(begin, end, Index(from.size()), from.data(), out);
        }
    });
}

template void add_up(Index, const std::vector<const float*>&, float*);
template void add_up(Index, const std::vector<const double*>&, double*);
template void add_up(Index, const std::vector<const bf16*>&, bf16*);

}  // namespace hpctrain
