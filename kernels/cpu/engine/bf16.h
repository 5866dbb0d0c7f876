// Convolution and matrix products of arrays of bfloat16, summed in float32.
//
// Sums, biases and gradients by weights are float32; what is stored as bfloat16 is rounded once, to nearest, ties to
// even. Blocks of samples or of rows that stay in the cache are converted and handed to the float engine, Winograd
// included; what it leaves to a direct convolution goes to the processor's own products of bfloat16 where it has them.
#pragma once

#include "engine.h"

namespace hpctrain {

// A matrix like Matrix.
struct Bf16Matrix {
    const Bf16* data;
    Index row, column;
};

// Direct convolution and matrix products where what stands for each float of both factors is a pair of bfloat16, and a
// product is the sum of two; results are floats. Channels are summed over in pairs, gradients by weights over pairs of
// positions. Pairs need not lie at multiples of their size.
struct Pairs : Products {
    // The pairs of two arrays, of which the second one is zeros if null. Strides of the array are in bfloat16.
    void (*pair)(const Rows&, const Bf16* low, const Bf16* high, float* pairs);
    // A copy with more channels, zeros; strides are in bfloat16.
    void (*pad)(const Rows&, const Bf16* array, Bf16* copy);
};

// y = epilogue(conv(x, w)); `exact` is without Winograd. No epilogue here accumulates.
void conv(const Convolution&, const Bf16* x, const Bf16* w, const Epilogue&, bool exact, Bf16* y);
void conv_dx(const Convolution&, const Bf16* dy, const Bf16* w, bool exact, Bf16* dx);
void conv_dw(const Convolution&, const Bf16* x, const Bf16* dy, bool exact, float* dw);
// c (m, n), rows `row` apart, = epilogue(a (m, k) b (k, n))
void gemm(Index m, Index n, Index k, Bf16Matrix a, Bf16Matrix b, const Epilogue&, Bf16* c, Index row);
void gemm(Index m, Index n, Index k, Bf16Matrix a, Bf16Matrix b, const Epilogue&, float* c, Index row);

}  // namespace hpctrain
