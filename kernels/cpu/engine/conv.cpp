// Convolution and its gradient by the input: sweeps over positions whose terms are the taps, straight from the array.
#include "isa.h"
#include "sweep.h"
#include "threads.h"

namespace hpctrain::HPCTRAIN_ISA {
namespace {

// Calls work(tap, offset in w) for all taps in C order.
template <class Work>
inline void for_taps(const Convolution& c, Work work) {
    Index tap = 0;
    for (Index d = 0; d < c.kernel[0]; ++d) {
        for (Index h = 0; h < c.kernel[1]; ++h) {
            for (Index w = 0; w < c.kernel[2]; ++w) work(tap++, d * c.w[0] + h * c.w[1] + w * c.w[2]);
        }
    }
}

Index padded(Index width) { return Panels(width).vectors * W; }

// A row of all channels per tap; for dx in opposite order.
void pack_channels(const Convolution& c, const float* w, bool backwards, float* packed) {
    const int vectors = int(Panels(c.groups).vectors);
    for_taps(c, [&](Index tap, Index offset) {
        const Index row = backwards ? c.taps() - 1 - tap : tap;
        pack_panel(w + offset, 0, 1, 1, c.groups, vectors, packed + row * vectors * W);
    });
}

// Panels of `width` columns, `rows` rows per tap; panels are shared among the threads.
template <class Pack>
void pack_panels(const Convolution& c, Index width, Index rows, float* packed, Pack pack) {
    const Panels panels(width);
    const Index depth = c.taps() * rows, all = c.groups * panels.count;
    in_threads([&](int thread, int threads) {
        for (Index i = all * thread / threads; i < all * (thread + 1) / threads; ++i) {
            const Index group = i / panels.count, q = i % panels.count, first = panels.first(q);
            float* panel = packed + (group * panels.vectors + first) * W * depth;
            for_taps(c, [&](Index tap, Index offset) { pack(group, first * W, tap, offset, panels.size(q), panel); });
        }
    });
}

}  // namespace

Index packed_size(const Convolution& c) {
    return c.depthwise() ? c.taps() * padded(c.groups) : c.groups * c.taps() * c.channels * padded(c.filters);
}

Index packed_dx_size(const Convolution& c) {
    return c.depthwise() ? c.taps() * padded(c.groups) : c.groups * c.taps() * c.filters * padded(c.channels);
}

void pack(const Convolution& c, const float* w, float* packed) {
    if (c.depthwise()) return pack_channels(c, w, false, packed);
    pack_panels(c, c.filters, c.channels, packed,
                [&](Index group, Index column, Index tap, Index offset, int vectors, float* panel) {
                    pack_panel(w + offset + group * c.filters + column, c.w[3], 1, c.channels, c.filters - column,
                               vectors, panel + tap * c.channels * vectors * W);
                });
}

void pack_dx(const Convolution& c, const float* w, float* packed) {
    if (c.depthwise()) return pack_channels(c, w, true, packed);
    pack_panels(c, c.channels, c.filters, packed,
                [&](Index group, Index column, Index tap, Index offset, int vectors, float* panel) {
                    pack_panel(w + offset + group * c.filters + column * c.w[3], 1, c.w[3], c.filters,
                               c.channels - column, vectors, panel + (c.taps() - 1 - tap) * c.filters * vectors * W);
                });
}

void conv(const Convolution& c, const float* x, const float* packed, const Epilogue& epilogue, float* y) {
    Scratch scratch;
    if (c.depthwise()) {
        return multiply_channels(
            {forward_sweeps(c, TERMS, scratch), 1, x, y, packed, c.taps(), c.groups, 1, 0, 0, epilogue});
    }
    multiply({forward_sweeps(c, TERMS, scratch), 1, x, y, packed, c.taps() * c.channels, c.filters, c.groups,
              c.channels, c.filters, epilogue});
}

void conv_dx(const Convolution& c, const float* dy, const float* packed, float* dx) {
    Scratch scratch;
    if (c.depthwise()) {
        return multiply_channels(
            {dx_sweeps(c, TERMS, scratch), 1, dy, dx, packed, c.taps(), c.groups, 1, 0, 0, {}});
    }
    multiply({dx_sweeps(c, TERMS, scratch), 1, dy, dx, packed, c.taps() * c.filters, c.channels, c.groups, c.filters,
              c.channels, {}});
}

}  // namespace hpctrain::HPCTRAIN_ISA
