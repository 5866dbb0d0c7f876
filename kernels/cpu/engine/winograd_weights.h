// Weights, transformed into the right factors of the products, and back from their gradients.
#pragma once

#include "winograd_tiles.h"

namespace hpctrain::HPCTRAIN_ISA::winograd {

// Weights (taps, KERNEL, KERNEL, channels, filters); T is float or const float.
template <class T>
struct Filters {
    T* data;
    Strides stride;
    Index channels, filters;
    int taps;

    T* at(int tap, int i, int j, Index channel, Index filter) const {
        return data + (tap * stride[0] + i * stride[1] + j * stride[2] + channel * stride[3] + filter);
    }
};

// Terms [begin, end) of one panel of filters, to `to`: matrices, `point` floats apart, of rows (tap, channel).
template <int KERNEL, int EDGE>
void pack_filters(const Filters<const float>& w, Index first_vector, int width, Index begin, Index end, float* to,
                  Index point);

// The same for the gradient by the inputs: a panel of channels, rows (tap, filter), the last depth tap first.
template <int KERNEL, int EDGE>
void pack_channels(const Filters<const float>& w, Index first_vector, int width, Index begin, Index end, float* to,
                   Index point);

// dw of W channels from `channel` on and of a panel of filters, at one depth tap, from matrices of W rows.
template <int KERNEL, int EDGE>
void write_weight_gradients(const Filters<float>& dw, int tap, Index channel, Index first_vector, int width,
                            const float* from, Index point);

}  // namespace hpctrain::HPCTRAIN_ISA::winograd
