// Average pooling and resampling. S is the type that tensors are stored in. Same meaning, argument order and names as
// hpctrain/backends/base.py.
#pragma once

#include "kernels.h"

namespace hpctrain {

// --- avg_pool.cpp ---

// Windows over x (samples, *input, channels) that give y (samples, *output, channels): depth, height, width, of which
// the first ones have extents 1 where there are fewer. Strides are in elements; the divisor's are 0 where it has one
// number for all.
struct AveragePool {
    Index samples = 0, channels = 0;
    std::array<Index, 3> input{1, 1, 1}, output{1, 1, 1}, kernel{1, 1, 1}, stride{1, 1, 1};
    std::array<Index, 4> x{}, y{};     // of sample, depth, height, width; x also of dx, y also of dy
    std::array<Index, 5> divisor{};    // of channel, too
};

template <class S>
void avg_pool(const AveragePool& pool, const S* x, S* out, const Real<S>* divisor);
template <class S>
void avg_pool_dx(const AveragePool& pool, const S* dy, S* out, const Real<S>* divisor);

// --- resample.cpp ---

// Each output along a dim is a sum over terms first[output] to first[output + 1]: weight[term] times the input that lies
// offset[term] elements from the first one. The layouts, of x and out, are those of the dims before and after.
struct Resampling {
    Layout<2> before, after;
    Index outputs = 0, out_step = 0;
    const Index* first = nullptr;
    const Index* offset = nullptr;
    const double* weight = nullptr;
};

template <class S>
void resample(const Resampling& by, const S* x, S* out);

}  // namespace hpctrain
