// Convolutions of bfloat16 by the processor's products of pairs of them.
#pragma once

#include "bf16.h"
#include "bf16_parts.h"
#include "scratch.h"

namespace hpctrain {

// The instructions for pairs of bfloat16, where they serve for sums over `channels` of each group.
inline const Pairs* in_pairs(const Engine& e, const Convolution& c, Index channels) {
    return c.depthwise() || (c.groups > 1 && channels % 2) || channels == 0 ? nullptr : e.pairs;
}

// An array of which pairs of channels are read: as it lies where all strides are even, else as a copy.
struct PairedChannels {
    const float* data;
    Strides strides;  // in pairs

    PairedChannels(const Pairs&, const Rows&, const Bf16* array, Scratch&);
};

// A convolution whose sums run over pairs of channels, and its packed weights.
struct Paired {
    Convolution c;
    const float* packed;
};

Paired pair_forward(const Pairs&, const Convolution&, const Bf16* w, Scratch&);
Paired pair_backward(const Pairs&, const Convolution&, const Bf16* w, Scratch&);

// conv_dw of a part, whose w and dw are at its own strides, and x and dy at those of `strided`; it may be cut along
// `dim`.
void conv_dw_in_pairs(const Pairs&, const Convolution& part, const Convolution& strided, int dim, const Bf16* x,
                      const Bf16* dy, float* dw);

}  // namespace hpctrain
