// Arrays of pairs of bfloat16, for the processors that multiply these.
#include "bf16_simd.h"
#include "isa.h"
#include "runs_of_rows.h"

namespace hpctrain::HPCTRAIN_ISA {

void pair(const Rows& rows, const Bf16* low, const Bf16* high, float* pairs) {
    const Index ahead = rows.array[3];
    each_run(rows, [=](Index from, Index to, Index n) {
        for (Index i = 0; i < n; i += W) {
            __builtin_prefetch(low + from + i + ahead, 0, 2);  // memory takes longer than the row before
            if (high) __builtin_prefetch(high + from + i + ahead, 0, 2);
            const int some = n - i < W ? int(n - i) : W;
            const V words = paired(low + from + i, high ? high + from + i : nullptr, some);
            some == W ? store(pairs + to + i, words) : store(pairs + to + i, words, some);
        }
    });
}

namespace {

// All positions of a line but the last: one Word is read of each, which reaches into the next position.
template <class Word>
Index pad_words(const Bf16* from, Index step, Index channels, Bf16* to, Index positions) {
    const Word mask = Word((Word(1) << (16 * channels)) - 1);
    for (Index i = 0; i + 1 < positions; ++i, from += step, to += sizeof(Word) / sizeof(Bf16)) {
        Word word;
        __builtin_memcpy(&word, from, sizeof word);
        word &= mask;  // the first channel is the lowest: pairs exist on little-endian processors only
        __builtin_memcpy(to, &word, sizeof word);
    }
    return positions > 0 ? positions - 1 : 0;
}

}  // namespace

void pad(const Rows& rows, const Bf16* array, Bf16* copy) {
    const Index lines = rows.samples * rows.extent[0] * rows.extent[1], channels = rows.channels, width = rows.copy[3];
    in_threads([&](int thread, int threads) {
        for (Index i = lines * thread / threads; i < lines * (thread + 1) / threads; ++i) {
            const Index h = i % rows.extent[1], d = i / rows.extent[1] % rows.extent[0];
            const Index n = i / rows.extent[1] / rows.extent[0];
            const Bf16* from = array + n * rows.array[0] + d * rows.array[1] + h * rows.array[2];
            Bf16* to = copy + n * rows.copy[0] + d * rows.copy[1] + h * rows.copy[2];
            Index done = 0;
            if (channels == 1) done = pad_words<std::uint32_t>(from, rows.array[3], channels, to, rows.extent[2]);
            if (channels == 3) done = pad_words<std::uint64_t>(from, rows.array[3], channels, to, rows.extent[2]);
            for (Index w = done; w < rows.extent[2]; ++w) {
                __builtin_memcpy(to + w * width, from + w * rows.array[3], size_t(channels) * sizeof(Bf16));
                for (Index c = channels; c < width; ++c) to[w * width + c] = {0};
            }
        }
    });
}

}  // namespace hpctrain::HPCTRAIN_ISA
