// Max pooling. Rows of channels are compared side by side; windows are walked in C order, so that the gradients which
// an element gets from several windows are always added in the same order.
#include "kernels.h"

#include <cstring>

namespace hpctrain {
namespace {

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

template <class T>
HPCTRAIN_CLONES void max_rows(Index rows, Index channels, const Index* taps, std::int32_t tap_count, const T* x,
                              Index x_step, T* out, Index out_step, std::int32_t* index, Index index_step) {
    for (Index r = 0; r < rows; ++r, x += x_step, out += out_step, index += index_step) {
        for (Index c = 0; c < channels; ++c) out[c] = x[taps[0] + c];
        for (Index c = 0; c < channels; ++c) index[c] = 0;
        for (std::int32_t tap = 1; tap < tap_count; ++tap) {
            const T* candidate = x + taps[tap];
#pragma GCC ivdep
            for (Index c = 0; c < channels; ++c) {
                const T value = candidate[c], best = out[c];
                const bool first_nan = value != value && best == best;
                const bool better = value > best || first_nan;
                out[c] = better ? value : best;
                index[c] = better ? tap : index[c];
            }
        }
    }
}

}  // namespace

template <class T>
void max_pool(const Layout<3>& layout, Index channels, const Index* taps, std::int32_t tap_count, const T* x, T* out,
              std::int32_t* index) {
    const auto& step = layout.stride[layout.dims - 1];
    for (Cursor<3> cursor(layout); cursor.left() > 0; cursor.skip(cursor.run())) {
        const auto& at = cursor.offset();
        const Index rows = cursor.run();
        Index done = 0;
        if constexpr (sizeof(T) == sizeof(float)) {
            const bool side_by_side = step[0] >= channels && step[1] == channels && step[2] == channels;
            if (0 < channels && channels < NARROW && side_by_side && rows > (NARROW - 1) / channels) {
                done = rows - (NARROW - 1) / channels;
                max_narrow_rows(done, channels, taps, tap_count, x + at[0], step[0], out + at[1], index + at[2]);
            }
        }
        max_rows(rows - done, channels, taps, tap_count, x + at[0] + done * step[0], step[0],
                 out + at[1] + done * step[1], step[1], index + at[2] + done * step[2], step[2]);
    }
}

template <class T>
void max_pool_dx(const Layout<3>& layout, Index channels, const Index* taps, std::int32_t tap_count, const T* dy,
                 const std::int32_t* index, T* dx) {
    for (Cursor<3> cursor(layout); cursor.left() > 0; cursor.skip(1)) {
        T* into = dx + cursor.offset()[0];
        const T* from = dy + cursor.offset()[1];
        const std::int32_t* winner = index + cursor.offset()[2];
        for (Index c = 0; c < channels; ++c) {
            if (winner[c] >= 0 && winner[c] < tap_count) into[taps[winner[c]] + c] += from[c];
        }
    }
}

#define HPCTRAIN_FOR(T)                                                                                              \
    template void max_pool<T>(const Layout<3>&, Index, const Index*, std::int32_t, const T*, T*, std::int32_t*);     \
    template void max_pool_dx<T>(const Layout<3>&, Index, const Index*, std::int32_t, const T*, const std::int32_t*, \
                                 T*);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)

}  // namespace hpctrain
