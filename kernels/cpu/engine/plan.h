// What a convolution sums, as loops over offsets: worked out once per call, whatever the instruction set.
#pragma once

#include "engine.h"
#include "scratch.h"

namespace hpctrain {

// n terms of a sum: of the factor A from offset `a` on, of the packed factor B from its row `b` on.
struct Run {
    Index a, b, n;
};

struct Runs {
    const Run* list;
    Index count;
};

// Positions (sample, depth, height, width) whose sums have the same terms, each from its own place in A. Where A lies
// for the first of them, how it moves from one to the next, and the same for the result C.
struct Sweep {
    std::array<Index, 4> extent, a_step, c_step;
    Index a, c;
    // The terms, in blocks of which the packed rows stay in the second-level cache.
    const Runs* blocks;
    Index block_count, terms;

    Index positions() const { return extent[1] * extent[2] * extent[3]; }  // of one sample
};

// Sweeps that read the same array: of some samples one sweep after the other, so that what they read of A stays in the
// cache, then of the next ones.
struct Sweeps {
    const Sweep* list;
    Index count, samples, samples_at_once;
};

// Terms of one block of a sweep, at most; `block` below may say less.
constexpr Index BLOCK_TERMS = 768;

// y: for each output the taps in x, which are packed rows tap * channels + channel.
Sweeps forward_sweeps(const Convolution&, Index block, Scratch&);
// dx: for each input the outputs that read it; packed rows are (taps - 1 - tap) * filters + filter, so that both
// factors are walked upwards. Every input is in one sweep, if only to become 0.
Sweeps dx_sweeps(const Convolution&, Index block, Scratch&);
// (m, k) by k rows of packed B.
Sweeps matrix_sweep(Index m, Index k, Index a_row, Index a_column, Index c_row, Index block, Scratch&);

// Some output positions: where each run of them begins in x (`a`) and in dy; `b` counts them within the chunk.
struct Chunk {
    Runs runs;
    const Index* y;
    Index positions;
};

struct Chunks {
    const Chunk* list;
    Index count;
    Index x_step, y_step;  // between the positions of a run
};

// All output positions of a convolution, `limit` at most in a chunk.
Chunks position_chunks(const Convolution&, Index limit, Scratch&);

// Where tap * channels + channel begins in x, and where it lies in w.
struct WeightRows {
    const Index *x, *w;
    Index count;
};
WeightRows weight_rows(const Convolution&, Scratch&);

}  // namespace hpctrain
