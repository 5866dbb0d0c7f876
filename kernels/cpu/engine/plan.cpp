#include "plan.h"

#include <algorithm>

namespace hpctrain {
namespace {

constexpr Index CACHED_FLOATS = 1 << 16;  // of A: a quarter of a usual second-level cache

// Appends a run, as part of the one before where it goes on from there.
void append(Run* list, Index& count, Run run) {
    if (run.n == 0) return;
    Run* last = list + count - 1;
    if (count && last->a + last->n == run.a && last->b + last->n == run.b) {
        last->n += run.n;
    } else {
        list[count++] = run;
    }
}

// Cuts the terms of a sweep into equal blocks of at most `block`; there is one at least, for sums of nothing.
// `step` lies in A between one term and the next.
void set_blocks(Sweep& sweep, const Run* runs, Index count, Index step, Index block, Scratch& scratch) {
    sweep.terms = 0;
    for (Index i = 0; i < count; ++i) sweep.terms += runs[i].n;
    sweep.block_count = std::max<Index>(1, (sweep.terms + block - 1) / block);
    Runs* blocks = scratch.array<Runs>(sweep.block_count);
    Run* cut = scratch.array<Run>(count + sweep.block_count);
    Index used = 0, done = 0, next = 0, taken = 0;  // `taken` terms of runs[next] are in blocks already
    for (Index i = 0; i < sweep.block_count; ++i) {
        blocks[i] = {cut + used, 0};
        for (const Index end = sweep.terms * (i + 1) / sweep.block_count; done < end; ++blocks[i].count) {
            const Index n = std::min(runs[next].n - taken, end - done);
            cut[used++] = {runs[next].a + taken * step, runs[next].b + taken, n};
            done += n, taken += n;
            if (taken == runs[next].n) ++next, taken = 0;
        }
    }
    sweep.blocks = blocks;
}

// Inputs along one dim that the same taps reach: first, first + stride, ...
struct Tap {
    Index tap, output;  // of the first input
};

struct Class {
    Index first, count;
    const Tap* taps;
    Index tap_count;

    bool same_taps(const Tap* others, Index other_count) const {
        return tap_count == other_count &&
               std::equal(taps, taps + tap_count, others, [](Tap a, Tap b) { return a.tap == b.tap; });
    }
};

struct Classes {
    const Class* list;
    Index count;
};

Classes input_classes(const Convolution& c, int dim, Scratch& scratch) {
    const Index inputs = c.input[dim], kernel = c.kernel[dim], stride = c.stride[dim];
    Class* list = scratch.array<Class>(inputs);
    Tap* taps = scratch.array<Tap>(inputs * kernel);
    Index count = 0;
    for (Index phase = 0; phase < std::min(stride, inputs); ++phase) {
        for (Index i = phase; i < inputs; i += stride) {
            Index reached = 0;
            for (Index tap = kernel - 1; tap >= 0; --tap) {  // outputs ascend
                const Index from = i - tap * c.dilation[dim];
                if (from >= 0 && from % stride == 0 && from / stride < c.output[dim])
                    taps[reached++] = {tap, from / stride};
            }
            if (i > phase && list[count - 1].same_taps(taps, reached)) {
                ++list[count - 1].count;
            } else {
                list[count++] = {i, 1, taps, reached};
                taps += reached;
            }
        }
    }
    return {list, count};
}

}  // namespace

Sweeps forward_sweeps(const Convolution& c, Index block, Scratch& scratch) {
    Sweep* sweep = scratch.array<Sweep>(1);
    Run* runs = scratch.array<Run>(c.taps());
    Index count = 0, row = 0;
    for (Index d = 0; d < c.kernel[0]; ++d) {
        for (Index h = 0; h < c.kernel[1]; ++h) {
            for (Index w = 0; w < c.kernel[2]; ++w, row += c.channels) {
                const Index a = d * c.dilation[0] * c.x[1] + h * c.dilation[1] * c.x[2] + w * c.dilation[2] * c.x[3];
                append(runs, count, {a, row, c.channels});
            }
        }
    }
    *sweep = {{c.samples, c.output[0], c.output[1], c.output[2]},
              {c.x[0], c.x[1] * c.stride[0], c.x[2] * c.stride[1], c.x[3] * c.stride[2]},
              c.y,
              0,
              0,
              nullptr,
              0,
              0};
    set_blocks(*sweep, runs, count, 1, block, scratch);
    return {sweep, 1, c.samples, c.samples};
}

Sweeps dx_sweeps(const Convolution& c, Index block, Scratch& scratch) {
    const Classes classes[3] = {input_classes(c, 0, scratch), input_classes(c, 1, scratch),
                                input_classes(c, 2, scratch)};
    Sweep* sweeps = scratch.array<Sweep>(classes[0].count * classes[1].count * classes[2].count);
    Run* runs = scratch.array<Run>(c.taps());
    Index sweep_count = 0;
    for (Index d = 0; d < classes[0].count; ++d) {
        for (Index h = 0; h < classes[1].count; ++h) {
            for (Index w = 0; w < classes[2].count; ++w) {
                const Class &depth = classes[0].list[d], &height = classes[1].list[h], &width = classes[2].list[w];
                Index count = 0;
                for (Index i = 0; i < depth.tap_count; ++i) {
                    for (Index j = 0; j < height.tap_count; ++j) {
                        for (Index k = 0; k < width.tap_count; ++k) {
                            const Tap &at_d = depth.taps[i], &at_h = height.taps[j], &at_w = width.taps[k];
                            const Index tap = (at_d.tap * c.kernel[1] + at_h.tap) * c.kernel[2] + at_w.tap;
                            append(runs, count,
                                   {at_d.output * c.y[1] + at_h.output * c.y[2] + at_w.output * c.y[3],
                                    (c.taps() - 1 - tap) * c.filters, c.filters});
                        }
                    }
                }
                Sweep& sweep = sweeps[sweep_count++];
                sweep = {{c.samples, depth.count, height.count, width.count},
                         c.y,
                         {c.x[0], c.x[1] * c.stride[0], c.x[2] * c.stride[1], c.x[3] * c.stride[2]},
                         0,
                         depth.first * c.x[1] + height.first * c.x[2] + width.first * c.x[3],
                         nullptr,
                         0,
                         0};
                set_blocks(sweep, runs, count, 1, block, scratch);
            }
        }
    }
    // as much of dy as the cache holds, or as the weights are large: these are read again for each part
    const Index sample = c.output[0] * c.output[1] * c.output[2] * c.groups * c.filters;
    const Index weights = c.taps() * c.groups * c.channels * c.filters;
    return {sweeps, sweep_count, c.samples, 1 + std::max(CACHED_FLOATS, weights) / std::max<Index>(1, sample)};
}

Sweeps matrix_sweep(Index m, Index k, Index a_row, Index a_column, Index c_row, Index block, Scratch& scratch) {
    Sweep* sweep = scratch.array<Sweep>(1);
    *sweep = {{1, 1, 1, m}, {0, 0, 0, a_row}, {0, 0, 0, c_row}, 0, 0, nullptr, 0, 0};
    const Run run{0, 0, k};
    set_blocks(*sweep, &run, k > 0, a_column, block, scratch);
    return {sweep, 1, 1, 1};
}

Chunks position_chunks(const Convolution& c, Index limit, Scratch& scratch) {
    Layout<2> rows;  // of x and dy; dims without gaps become one
    rows.append(c.samples, {c.x[0], c.y[0]});
    for (int d = 0; d < 3; ++d) rows.append(c.output[d], {c.x[d + 1] * c.stride[d], c.y[d + 1]});
    rows.end_in_rows();
    const Index all = rows.size(), run_length = std::max<Index>(1, rows.extent[rows.dims - 1]);
    const Index most_runs = all / run_length + all / limit + 1;
    Run* runs = scratch.array<Run>(most_runs);
    Index* y = scratch.array<Index>(most_runs);
    Chunk* chunks = scratch.array<Chunk>(all / limit + 1);
    const Index chunk_count = (all + limit - 1) / limit;
    Index used = 0;
    Cursor<2> cursor(rows);
    for (Index i = 0; i < chunk_count; ++i) {
        Chunk& chunk = chunks[i];
        chunk = {{runs + used, 0}, y + used, 0};
        for (const Index size = all * (i + 1) / chunk_count - all * i / chunk_count; chunk.positions < size;) {
            const Index n = std::min(cursor.run(), size - chunk.positions);
            runs[used] = {cursor.offset()[0], chunk.positions, n};
            y[used++] = cursor.offset()[1];
            chunk.positions += n;
            ++chunk.runs.count;
            cursor.skip(n);
        }
    }
    return {chunks, chunk_count, rows.stride[rows.dims - 1][0], rows.stride[rows.dims - 1][1]};
}

WeightRows weight_rows(const Convolution& c, Scratch& scratch) {
    Index *x = scratch.array<Index>(c.taps() * c.channels), *w = scratch.array<Index>(c.taps() * c.channels), row = 0;
    for (Index i = 0; i < c.kernel[0]; ++i) {
        for (Index j = 0; j < c.kernel[1]; ++j) {
            for (Index k = 0; k < c.kernel[2]; ++k) {
                for (Index channel = 0; channel < c.channels; ++channel, ++row) {
                    x[row] =
                        i * c.dilation[0] * c.x[1] + j * c.dilation[1] * c.x[2] + k * c.dilation[2] * c.x[3] + channel;
                    w[row] = i * c.w[0] + j * c.w[1] + k * c.w[2] + channel * c.w[3];
                }
            }
        }
    }
    return {x, w, row};
}

}  // namespace hpctrain
