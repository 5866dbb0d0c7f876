// Sweeps over positions with one packed factor: convolution, its gradient by the input, and matrix products.
#pragma once

#include "tile.h"

namespace hpctrain::HPCTRAIN_ISA {

// For each group and each of its sweeps: C = epilogue(sums of A * B).
struct Product {
    Sweeps sweeps;
    Index step;  // in A, between the terms of a run
    const float* a;
    float* c;
    const float* packed;
    Index depth, width;                      // rows and columns of packed B, of one group
    Index groups, a_group = 0, c_group = 0;  // how far one group lies from the next in A and C
    Epilogue epilogue = {};
};
void multiply(const Product&);

// The same where each channel is alone: row t of B holds the factors of all channels by tap t, padded to whole vectors.
// Runs have one term.
void multiply_channels(const Product&);

// Packs `rows` rows of `columns` columns, at b + row * row_step + column * column_step, one step being 1, as one panel
// of `vectors`.
void pack_panel(const float* b, Index row_step, Index column_step, Index rows, Index columns, int vectors,
                float* panel);

}  // namespace hpctrain::HPCTRAIN_ISA
