// Max pooling. Channels are compared side by side; windows are walked in C order, so that the gradients which an
// element gets from several windows are always added in the same order.
#include "kernels.h"
#include "parallel.h"

#include <cstring>
#include <type_traits>

namespace hpctrain {
namespace {

constexpr Index TILE = 32;  // channels that threads part

// Calls work(sample, first channel, channels) for all of them, in threads; samples are only parted where there are few.
template <class Work>
void by_samples(const Pooling& pooling, Work work) {
    const Index tiles = (pooling.channels + TILE - 1) / TILE;
    const Index threads = threads_for(pooling.samples * pooling.outputs.size() * pooling.channels);
    const Index parts = pooling.samples < threads ? tiles : 1;
    in_threads(threads, pooling.samples * parts, [&](Index part) {
        const Index tile = part % parts, first = tiles * tile / parts * TILE;
        work(part / parts, first, std::min(pooling.channels, tiles * (tile + 1) / parts * TILE) - first);
    });
}

// Vectors in the compilers' own types, as loops with two results per element stay loops otherwise.
template <class T>
struct Vector {
    static constexpr int LANES = 8;
    typedef float Values __attribute__((vector_size(32)));
    typedef std::int32_t Places __attribute__((vector_size(32)));
    typedef Places Indices;
};
template <>
struct Vector<double> {
    static constexpr int LANES = 4;
    typedef double Values __attribute__((vector_size(32)));
    typedef std::int64_t Places __attribute__((vector_size(32)));
    typedef std::int32_t Indices __attribute__((vector_size(16)));
};
typedef std::uint16_t Halves __attribute__((vector_size(16)));
typedef std::uint32_t Words __attribute__((vector_size(32)));

template <class T>
HPCTRAIN_ALWAYS_INLINE void load_vector(const T* from, typename Vector<T>::Values& to) {
    if constexpr (std::is_same_v<T, bf16>) {
        Halves halves;
        std::memcpy(&halves, from, sizeof halves);
        const Words words = __builtin_convertvector(halves, Words) << 16;
        std::memcpy(&to, &words, sizeof to);
    } else {
        std::memcpy(&to, from, sizeof to);
    }
}

// Of values that were loaded from T: nothing is rounded.
template <class T>
HPCTRAIN_ALWAYS_INLINE void store_vector(T* to, const typename Vector<T>::Values& from) {
    if constexpr (std::is_same_v<T, bf16>) {
        Words words;
        std::memcpy(&words, &from, sizeof words);
        const Halves halves = __builtin_convertvector(words >> 16, Halves);
        std::memcpy(to, &halves, sizeof halves);
    } else {
        std::memcpy(to, &from, sizeof from);
    }
}

// The first N vectors of channels of one window.
template <int N, class T>
HPCTRAIN_ALWAYS_INLINE void max_vectors(const Index* taps, std::int32_t tap_count, const T* x, T* out,
                                        std::int32_t* index) {
    constexpr int LANES = Vector<T>::LANES;
    typename Vector<T>::Values best[N], value;
    typename Vector<T>::Places winner[N] = {};
    for (int n = 0; n < N; ++n) load_vector(x + taps[0] + n * LANES, best[n]);
    for (std::int32_t tap = 1; tap < tap_count; ++tap) {
        const typename Vector<T>::Places place = typename Vector<T>::Places{} + tap;
        for (int n = 0; n < N; ++n) {
            load_vector(x + taps[tap] + n * LANES, value);
            const auto better = (value > best[n]) | ((value != value) & (best[n] == best[n]));
            best[n] = better ? value : best[n];
            winner[n] = better ? place : winner[n];
        }
    }
    for (int n = 0; n < N; ++n) {
        const auto indices = __builtin_convertvector(winner[n], typename Vector<T>::Indices);
        store_vector(out + n * LANES, best[n]);
        std::memcpy(index + n * LANES, &indices, sizeof indices);
    }
}

template <class T>
HPCTRAIN_ALWAYS_INLINE void max_channel(const Index* taps, std::int32_t tap_count, const T* x, T& out,
                                        std::int32_t& index) {
    Real<T> best = load(x[taps[0]]);
    index = 0;
    for (std::int32_t tap = 1; tap < tap_count; ++tap) {
        const Real<T> value = load(x[taps[tap]]);
        if (value > best || (value != value && best == best)) best = value, index = tap;
    }
    out = store<T>(best);
}

template <class T>
HPCTRAIN_CLONES void max_rows(Index rows, Index channels, const Index* taps, std::int32_t tap_count, const T* x,
                              Index x_step, T* out, Index out_step, std::int32_t* index, Index index_step) {
    constexpr Index LANES = Vector<T>::LANES;
    for (Index r = 0; r < rows; ++r, x += x_step, out += out_step, index += index_step) {
        Index c = 0;
        for (; c + 4 * LANES <= channels; c += 4 * LANES) max_vectors<4>(taps, tap_count, x + c, out + c, index + c);
        for (; c + LANES <= channels; c += LANES) max_vectors<1>(taps, tap_count, x + c, out + c, index + c);
        for (; c < channels; ++c) max_channel(taps, tap_count, x + c, out[c], index[c]);
    }
}

// Fewer channels than a vector has: all but the last positions of a row also read and write what lies behind their
// channels. There are the next positions, which are there to be read, and to be written after them.
constexpr Index NARROW = 8;
typedef float Values __attribute__((vector_size(NARROW * sizeof(float))));
typedef std::int32_t Places __attribute__((vector_size(NARROW * sizeof(std::int32_t))));

HPCTRAIN_CLONES void max_narrow_rows(Index rows, Index channels, const Index* taps, std::int32_t tap_count,
                                     const float* x, Index x_step, float* out, std::int32_t* index) {
    for (Index r = 0; r < rows; ++r, x += x_step, out += channels, index += channels) {
        Values best;
        std::memcpy(&best, x + taps[0], sizeof best);
        Places winner{};
        for (std::int32_t tap = 1; tap < tap_count; ++tap) {
            Values value;
            std::memcpy(&value, x + taps[tap], sizeof value);
            const Places first_nan = (value != value) & (best == best);
            const Places better = (value > best) | first_nan;
            best = better ? value : best;
            winner = better ? Places{} + tap : winner;
        }
        std::memcpy(out, &best, sizeof best);
        std::memcpy(index, &winner, sizeof winner);
    }
}

// Of windows that overlap: winners get their gradients added.
template <class T>
void add_rows(Index rows, Index channels, const Index* taps, std::int32_t tap_count, const T* dy, Index dy_step,
              const std::int32_t* index, Index index_step, T* dx, Index dx_step) {
    for (Index r = 0; r < rows; ++r, dy += dy_step, index += index_step, dx += dx_step) {
        for (Index c = 0; c < channels; ++c) {
            if (index[c] < 0 || index[c] >= tap_count) continue;
            T& element = dx[taps[index[c]] + c];
            element = store<T>(load(element) + load(dy[c]));
        }
    }
}

// Of windows that share nothing: each element gets a gradient or 0.
template <class T>
HPCTRAIN_CLONES void set_rows(Index rows, Index channels, const Index* taps, std::int32_t tap_count, const T* dy,
                              Index dy_step, const std::int32_t* index, Index index_step, T* dx, Index dx_step) {
    for (Index r = 0; r < rows; ++r, dy += dy_step, index += index_step, dx += dx_step) {
        for (std::int32_t tap = 0; tap < tap_count; ++tap) {
            T* into = dx + taps[tap];
#pragma GCC ivdep
            for (Index c = 0; c < channels; ++c) into[c] = keep(index[c] == tap, dy[c]);
        }
    }
}

}  // namespace

template <class T>
void max_pool(const Pooling& pooling, const T* x, T* out, std::int32_t* index) {
    const Index xs = pooling.sample[0], outs = pooling.sample[1], indices = pooling.sample[2];
    by_samples(pooling, [&](Index n, Index first, Index channels) {
        for (Cursor<3> cursor(pooling.outputs); cursor.left() > 0; cursor.skip(cursor.run())) {
            const auto &at = cursor.offset(), &step = cursor.step();
            const Index rows = cursor.run();
            const T* from = x + n * xs + at[0] + first;
            T* to = out + n * outs + at[1] + first;
            std::int32_t* winner = index + n * indices + at[2] + first;
            Index done = 0;
            if constexpr (std::is_same_v<T, float>) {
                const bool side_by_side = step[0] >= channels && step[1] == channels && step[2] == channels;
                if (0 < channels && channels < NARROW && side_by_side && rows > (NARROW - 1) / channels) {
                    done = rows - (NARROW - 1) / channels;
                    max_narrow_rows(done, channels, pooling.taps, pooling.tap_count, from, step[0], to, winner);
                }
            }
            max_rows<T>(rows - done, channels, pooling.taps, pooling.tap_count, from + done * step[0], step[0],
                        to + done * step[1], step[1], winner + done * step[2], step[2]);
        }
    });
}

template <class T>
void max_pool_dx(const Pooling& pooling, const T* dy, const std::int32_t* index, T* dx) {
    const Index dxs = pooling.sample[0], dys = pooling.sample[1], indices = pooling.sample[2];
    by_samples(pooling, [&](Index n, Index first, Index channels) {
        for (Cursor<3> cursor(pooling.outputs); cursor.left() > 0; cursor.skip(cursor.run())) {
            const auto &at = cursor.offset(), &step = cursor.step();
            const auto rows = pooling.disjoint ? set_rows<T> : add_rows<T>;
            rows(cursor.run(), channels, pooling.taps, pooling.tap_count, dy + n * dys + at[1] + first, step[1],
                 index + n * indices + at[2] + first, step[2], dx + n * dxs + at[0] + first, step[0]);
        }
    });
}

#define HPCTRAIN_FOR(T)                                                     \
    template void max_pool<T>(const Pooling&, const T*, T*, std::int32_t*); \
    template void max_pool_dx<T>(const Pooling&, const T*, const std::int32_t*, T*);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)
HPCTRAIN_FOR(bf16)

}  // namespace hpctrain
