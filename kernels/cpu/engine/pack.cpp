#include "sweep.h"

namespace hpctrain::HPCTRAIN_ISA {
namespace {

inline V load_some(const float* p, Index n) { return n >= W ? load(p) : n > 0 ? load(p, int(n)) : V{}; }

void copy_rows(const float* b, Index row_step, Index rows, Index columns, int vectors, float* panel) {
    for (Index row = 0; row < rows; ++row, b += row_step) {
        for (int j = 0; j < vectors; ++j, panel += W) store(panel, load_some(b + j * W, columns - j * W));
    }
}

// Columns are what lies contiguously: blocks of W x W are transposed.
void turn_columns(const float* b, Index column_step, Index rows, Index columns, int vectors, float* panel) {
    for (Index row = 0; row < rows; row += W) {
        const Index count = rows - row < W ? rows - row : W;
        for (int j = 0; j < vectors; ++j) {
            V block[W];
            for (int i = 0; i < W; ++i) {
                const Index column = j * W + i;
                block[i] = column < columns ? load_some(b + column * column_step + row, count) : V{};
            }
            transpose(block);
            for (Index i = 0; i < count; ++i) store(panel + (row + i) * vectors * W + j * W, block[i]);
        }
    }
}

}  // namespace

void pack_panel(const float* b, Index row_step, Index column_step, Index rows, Index columns, int vectors,
                float* panel) {
    if (column_step == 1) {
        copy_rows(b, row_step, rows, columns, vectors, panel);
    } else {
        turn_columns(b, column_step, rows, columns, vectors, panel);
    }
}

}  // namespace hpctrain::HPCTRAIN_ISA
