#include "bf16.h"

#include <algorithm>

#include "scratch.h"
#include "winograd.h"

namespace hpctrain {
namespace {

constexpr Index PART_FLOATS = Index(1) << 19;  // of inputs and outputs that are converted at a time
constexpr Index PART_POSITIONS = 2048;         // Winograd transforms the weights for each part anew
constexpr Index PART_ROWS = 8;                 // a multiple of the rows of Winograd's tiles

Index ceil_div(Index a, Index b) { return a > 0 ? (a + b - 1) / b : 0; }

Strides contiguous(const Sizes& extent, Index channels) {
    return {extent[0] * extent[1] * extent[2] * channels, extent[1] * extent[2] * channels, extent[2] * channels,
            channels};
}

Index positions(const Sizes& extent) { return extent[0] * extent[1] * extent[2]; }

// An array (samples, *extent, channels) of bfloat16 at these strides, and its contiguous copy.
Rows rows_of(Index samples, const Sizes& extent, Index channels, const Strides& strides) {
    return {samples, extent, channels, strides, contiguous(extent, channels)};
}

Rows x_rows(const Convolution& c, const Strides& strides) {
    return rows_of(c.samples, c.input, c.groups * c.channels, strides);
}
Rows y_rows(const Convolution& c, const Strides& strides) {
    return rows_of(c.samples, c.output, c.groups * c.filters, strides);
}
Rows w_rows(const Convolution& c) {
    return rows_of(c.kernel[0], {c.kernel[1], c.kernel[2], c.channels}, c.groups * c.filters, c.w);
}

Index size(const Rows& rows) { return rows.samples * positions(rows.extent) * rows.channels; }

// Some samples, or of one sample some rows along the first dim that has several.
struct Cut {
    int dim;
    Index samples, rows;  // of a part, at most

    // `extent`: of what is cut, the inputs or the outputs.
    Cut(const Convolution& c, const Sizes& extent, bool winograd)
        : dim(extent[0] > 1 ? 0 : extent[1] > 1 ? 1 : 2), samples(1), rows(extent[size_t(dim)]) {
        const Index channels = c.groups * c.channels, filters = c.groups * c.filters;
        const Index sample = std::max<Index>(1, positions(c.input) * channels + positions(c.output) * filters);
        Index room = PART_FLOATS;
        if (winograd) room = std::max(room, PART_POSITIONS * (channels + filters));
        samples = std::max<Index>(1, room / sample);
        if (sample > room) rows = std::max(PART_ROWS, rows * room / sample / PART_ROWS * PART_ROWS);
    }

    // Calls work(first sample, samples, first row, last row) for all parts.
    template <class Work>
    void each(const Convolution& c, const Sizes& extent, Work work) const {
        if (positions(extent) == 0) return;
        for (Index n = 0; n < c.samples; n += samples) {
            for (Index row = 0, all = extent[size_t(dim)]; row < all; row += rows)
                work(n, std::min(samples, c.samples - n), row, std::min(row + rows, all));
        }
    }
};

// The part of a convolution that computes output rows [first, last) of some samples, on contiguous copies; `inputs`
// of their rows.
Convolution part_of(const Convolution& c, int dim, Index samples, Index first, Index last, Index inputs) {
    Convolution part = c;
    part.samples = samples;
    part.output[size_t(dim)] = last - first, part.input[size_t(dim)] = inputs;
    part.x = contiguous(part.input, c.groups * c.channels), part.y = contiguous(part.output, c.groups * c.filters);
    part.w = w_rows(c).copy;
    return part;
}

Index span(const Convolution& c, int dim) { return c.dilation[size_t(dim)] * (c.kernel[size_t(dim)] - 1) + 1; }

Convolution part_of(const Convolution& c, int dim, Index samples, Index first, Index last) {
    return part_of(c, dim, samples, first, last, (last - first - 1) * c.stride[size_t(dim)] + span(c, dim));
}

const Winograd* faster(const Engine& e, const Convolution& c, bool exact) {
    return !exact && e.winograd->fits(c) && e.winograd->pays(c) ? e.winograd : nullptr;
}

const float* widened(const Engine& e, const Rows& rows, const Bf16* from, Scratch& scratch) {
    float* to = scratch.array<float>(size(rows));
    e.widen(rows, from, to);
    return to;
}

}  // namespace

void conv(const Convolution& c, const Bf16* x, const Bf16* w, const Epilogue& epilogue, bool exact, Bf16* y) {
    const Engine& e = engine();
    const Winograd* winograd = faster(e, c, exact);
    const Cut cut(c, c.output, winograd);
    Scratch scratch;
    const float* weights = widened(e, w_rows(c), w, scratch);
    if (!winograd) {
        float* packed = scratch.array<float>(e.packed_size(c));
        e.pack(part_of(c, cut.dim, 0, 0, 0), weights, packed);
        weights = packed;
    }
    cut.each(c, c.output, [&](Index sample, Index samples, Index first, Index last) {
        Scratch room;
        const Convolution part = part_of(c, cut.dim, samples, first, last);
        const Index from = sample * c.x[0] + first * c.stride[size_t(cut.dim)] * c.x[size_t(cut.dim) + 1];
        const float* inputs = widened(e, x_rows(part, c.x), x + from, room);
        float* outputs = room.array<float>(size(y_rows(part, c.y)));
        if (winograd) {
            winograd->conv(part, inputs, weights, epilogue, outputs, {});
        } else {
            e.conv(part, inputs, weights, epilogue, outputs);
        }
        e.narrow(y_rows(part, c.y), outputs, y + (sample * c.y[0] + first * c.y[size_t(cut.dim) + 1]));
    });
}

void conv_dx(const Convolution& c, const Bf16* dy, const Bf16* w, bool exact, Bf16* dx) {
    const Engine& e = engine();
    const Winograd* winograd = faster(e, c, exact);
    const Cut cut(c, c.input, winograd);
    const size_t dim = size_t(cut.dim);
    Scratch scratch;
    const float* weights = widened(e, w_rows(c), w, scratch);
    if (!winograd) {
        float* packed = scratch.array<float>(e.packed_dx_size(c));
        e.pack_dx(part_of(c, cut.dim, 0, 0, 0), weights, packed);
        weights = packed;
    }
    cut.each(c, c.input, [&](Index sample, Index samples, Index first, Index last) {
        // the outputs that reach rows [first, last), from one on that begins before these
        const Index stride = c.stride[dim], outputs = c.output[dim];
        Index begin = std::min(ceil_div(first - span(c, cut.dim) + 1, stride), outputs);
        if (begin * stride > first) --begin;
        const Index end = std::max(begin, std::min((last - 1) / stride + 1, outputs)), start = begin * stride;
        const Index reached = begin < end ? (end - 1) * stride + span(c, cut.dim) : 0;
        Scratch room;
        const Convolution part = part_of(c, cut.dim, samples, begin, end, std::max(last, reached) - start);
        const Bf16* from = dy + (sample * c.y[0] + begin * c.y[dim + 1]);
        const float* slopes = widened(e, y_rows(part, c.y), from, room);
        float* sums = room.array<float>(size(x_rows(part, c.x)));
        if (winograd) {
            winograd->conv_dx(part, slopes, weights, sums, {});
        } else {
            e.conv_dx(part, slopes, weights, sums);
        }
        Rows rows = x_rows(part, c.x);
        rows.extent[dim] = last - first;
        e.narrow(rows, sums + (first - start) * rows.copy[dim + 1],
                 dx + (sample * c.x[0] + first * c.x[dim + 1]));
    });
}

void conv_dw(const Convolution& c, const Bf16* x, const Bf16* dy, bool exact, float* dw) {
    const Engine& e = engine();
    const Winograd* winograd = faster(e, c, exact);
    const Cut cut(c, c.output, winograd);
    if (c.samples * positions(c.output) == 0) return e.conv_dw(c, nullptr, nullptr, dw);
    Rows rows = w_rows(c);
    bool add = false;
    cut.each(c, c.output, [&](Index sample, Index samples, Index first, Index last) {
        Scratch room;
        Convolution part = part_of(c, cut.dim, samples, first, last);
        const Index from_x = sample * c.x[0] + first * c.stride[size_t(cut.dim)] * c.x[size_t(cut.dim) + 1];
        const float* inputs = widened(e, x_rows(part, c.x), x + from_x, room);
        const Index from_y = sample * c.y[0] + first * c.y[size_t(cut.dim) + 1];
        const float* slopes = widened(e, y_rows(part, c.y), dy + from_y, room);
        float* sums = add ? room.array<float>(size(rows)) : dw;
        if (!add) part.w = c.w;
        if (winograd) {
            winograd->conv_dw(part, inputs, slopes, sums, {});
        } else {
            e.conv_dw(part, inputs, slopes, sums);
        }
        if (add) e.add(rows, sums, dw);
        add = true;
    });
}

namespace {

constexpr Index BLOCK = 256, BLOCK_TERMS = 1024;  // rows and columns, and terms, of products of converted blocks

// Rows [row, row + rows) and columns alike of a matrix, as floats.
Matrix block_of(const Engine& e, Bf16Matrix a, Index row, Index rows, Index column, Index columns, float* room) {
    const Bf16* from = a.data + (row * a.row + column * a.column);
    const bool turned = a.column != 1;
    const Index lines = turned ? columns : rows, length = turned ? rows : columns, step = turned ? a.column : a.row;
    e.widen({1, {1, 1, lines}, length, {0, 0, 0, step}, {0, 0, 0, length}}, from, room);
    return turned ? Matrix{room, 1, length} : Matrix{room, length, 1};
}

// Calls store(row, rows, column, columns, sums) for blocks of the product.
template <class Store>
void multiply(Index m, Index n, Index k, Bf16Matrix a, Bf16Matrix b, const Epilogue& epilogue, Store store) {
    const Engine& e = engine();
    Scratch scratch;
    float* left = scratch.array<float>(BLOCK * BLOCK_TERMS);
    float* right = scratch.array<float>(BLOCK * BLOCK_TERMS);
    float* sums = scratch.array<float>(BLOCK * BLOCK);
    for (Index column = 0; column < n; column += BLOCK) {
        const Index columns = std::min(BLOCK, n - column);
        for (Index row = 0; row < m; row += BLOCK) {
            const Index rows = std::min(BLOCK, m - row);
            for (Index term = 0; term < k || term == 0; term += BLOCK_TERMS) {
                const Index terms = std::min(BLOCK_TERMS, k - term);
                Epilogue part{nullptr, term > 0, term + terms == k ? epilogue.slope : 1};
                if (term == 0 && epilogue.bias) part.bias = epilogue.bias + column;
                e.gemm(rows, columns, terms, block_of(e, a, row, rows, term, terms, left),
                       block_of(e, b, term, terms, column, columns, right), part, sums, columns);
            }
            store(e, Rows{1, {1, 1, rows}, columns, {}, {0, 0, 0, columns}}, row, column, sums);
        }
    }
}

}  // namespace

void gemm(Index m, Index n, Index k, Bf16Matrix a, Bf16Matrix b, const Epilogue& epilogue, Bf16* c, Index c_row) {
    multiply(m, n, k, a, b, epilogue, [=](const Engine& e, Rows rows, Index row, Index column, const float* sums) {
        rows.array[3] = c_row;
        e.narrow(rows, sums, c + (row * c_row + column));
    });
}

void gemm(Index m, Index n, Index k, Bf16Matrix a, Bf16Matrix b, const Epilogue& epilogue, float* c, Index c_row) {
    multiply(m, n, k, a, b, epilogue, [=](const Engine&, Rows rows, Index row, Index column, const float* sums) {
        for (Index i = 0; i < rows.extent[2]; ++i)
            std::copy_n(sums + i * rows.channels, rows.channels, c + ((row + i) * c_row + column));
    });
}

}  // namespace hpctrain
