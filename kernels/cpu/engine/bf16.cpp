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
    return !exact && e.winograd->fits(c) && e.winograd->cost(c) < 1 ? e.winograd : nullptr;
}

// The instructions for pairs of bfloat16, where they serve for sums over `channels` of each group.
const Pairs* in_pairs(const Engine& e, const Convolution& c, Index channels) {
    return c.depthwise() || (c.groups > 1 && channels % 2) || channels == 0 ? nullptr : e.pairs;
}

Strides half(const Strides& strides) { return {strides[0] / 2, strides[1] / 2, strides[2] / 2, strides[3] / 2}; }

// An array of which pairs of channels are read: as it lies where all strides are even, else as a copy.
struct PairedChannels {
    const float* data;
    Strides strides;  // in pairs

    PairedChannels(const Pairs& pairs, const Rows& rows, const Bf16* array, Scratch& scratch)
        : data(reinterpret_cast<const float*>(array)), strides(half(rows.array)) {
        const Strides& s = rows.array;
        if ((rows.channels | s[0] | s[1] | s[2] | s[3]) % 2 == 0) return;
        const Index channels = (rows.channels + 1) / 2;
        Rows copied = rows;
        copied.copy = contiguous(rows.extent, 2 * channels);
        strides = half(copied.copy);
        float* copy = scratch.array<float>(rows.samples * positions(rows.extent) * channels);
        pairs.pad(copied, array, reinterpret_cast<Bf16*>(copy));
        data = copy;
    }
};

const float* widened(const Engine& e, const Rows& rows, const Bf16* from, Scratch& scratch) {
    float* to = scratch.array<float>(size(rows));
    e.widen(rows, from, to);
    return to;
}

// A convolution whose sums run over pairs of channels, and its packed weights.
struct Paired {
    Convolution c;
    const float* packed;
};

Paired pair_forward(const Pairs& pairs, const Convolution& c, const Bf16* w, Scratch& scratch) {
    Convolution of = c;
    of.channels = (c.channels + 1) / 2;
    of.w = contiguous({c.kernel[1], c.kernel[2], of.channels}, c.groups * c.filters);
    float* words = scratch.array<float>(size(w_rows(of)));
    Rows rows = w_rows(c);
    rows.copy = of.w;
    rows.extent[2] = c.channels / 2;
    rows.array[3] *= 2;
    pairs.pair(rows, w, w + c.w[3], words);
    if (c.channels % 2) {
        rows.extent[2] = 1;
        pairs.pair(rows, w + (c.channels - 1) * c.w[3], nullptr, words + (of.channels - 1) * of.w[3]);
    }
    float* packed = scratch.array<float>(pairs.packed_size(of));
    pairs.pack(of, words, packed);
    return {of, packed};
}

Paired pair_backward(const Pairs& pairs, const Convolution& c, const Bf16* w, Scratch& scratch) {
    Convolution of = c;
    const PairedChannels words(pairs, w_rows(c), w, scratch);
    of.filters = (c.filters + 1) / 2;
    of.w = words.strides;
    float* packed = scratch.array<float>(pairs.packed_dx_size(of));
    pairs.pack_dx(of, words.data, packed);
    return {of, packed};
}

// An array in pairs (sample, sample + half of them), or of one sample (row, row + half of the output rows); an odd one
// out is paired with zeros. `shift`: where the second half begins; `common`, `all`: how many of the split dim (0: the
// samples) have a partner, and how many there are.
const float* paired_halves(const Pairs& pairs, Rows rows, size_t split, Index common, Index all, const Bf16* array,
                           Index shift, Scratch& scratch) {
    Index& count = split ? rows.extent[split - 1] : rows.samples;
    count = all;
    rows.copy = contiguous(rows.extent, rows.channels);
    float* words = scratch.array<float>(size(rows));
    count = common;
    pairs.pair(rows, array, array + shift, words);
    count = all - common;
    if (count > 0) pairs.pair(rows, array + common * rows.array[split], nullptr, words + common * rows.copy[split]);
    return words;
}

void conv_dw_in_pairs(const Pairs& pairs, const Convolution& part, const Convolution& strided, int dim, const Bf16* x,
                      const Bf16* dy, float* dw) {
    Scratch scratch;
    Convolution of = part;
    const Index stride = part.stride[size_t(dim)];
    const size_t split = part.samples > 1 ? 0 : size_t(dim) + 1;
    const Index all = split ? part.output[size_t(dim)] : part.samples, low = (all + 1) / 2, high = all - low;
    Index low_x = low, high_x = high, shift = low * strided.x[split];
    if (split) {
        const Index more = span(part, dim) - stride;
        low_x = low * stride + more, high_x = high > 0 ? high * stride + more : 0, shift *= stride;
        of.output[size_t(dim)] = low, of.input[size_t(dim)] = low_x;
    } else {
        of.samples = low;
    }
    of.x = contiguous(of.input, of.groups * of.channels), of.y = contiguous(of.output, of.groups * of.filters);
    const float* inputs = paired_halves(pairs, x_rows(of, strided.x), split, high_x, low_x, x, shift, scratch);
    const float* slopes =
        paired_halves(pairs, y_rows(of, strided.y), split, high, low, dy, low * strided.y[split], scratch);
    pairs.conv_dw(of, inputs, slopes, dw);
}

}  // namespace

void conv(const Convolution& c, const Bf16* x, const Bf16* w, const Epilogue& epilogue, bool exact, Bf16* y) {
    const Engine& e = engine();
    const Winograd* winograd = faster(e, c, exact);
    const Pairs* pairs = winograd ? nullptr : in_pairs(e, c, c.channels);
    const Cut cut(c, c.output, winograd);
    Scratch scratch;
    const Paired paired = pairs ? pair_forward(*pairs, c, w, scratch) : Paired{};
    const float* weights = pairs ? nullptr : widened(e, w_rows(c), w, scratch);
    if (!winograd && !pairs) {
        float* packed = scratch.array<float>(e.packed_size(c));
        e.pack(part_of(c, cut.dim, 0, 0, 0), weights, packed);
        weights = packed;
    }
    cut.each(c, c.output, [&](Index sample, Index samples, Index first, Index last) {
        Scratch room;
        const Convolution part = part_of(c, cut.dim, samples, first, last);
        const Index from = sample * c.x[0] + first * c.stride[size_t(cut.dim)] * c.x[size_t(cut.dim) + 1];
        float* outputs = room.array<float>(size(y_rows(part, c.y)));
        if (pairs) {
            const PairedChannels inputs(*pairs, x_rows(part, c.x), x + from, room);
            Convolution of = part;
            of.channels = paired.c.channels, of.w = paired.c.w, of.x = inputs.strides;
            pairs->conv(of, inputs.data, paired.packed, epilogue, outputs);
        } else {
            const float* inputs = widened(e, x_rows(part, c.x), x + from, room);
            if (winograd) {
                winograd->conv(part, inputs, weights, epilogue, outputs, {});
            } else {
                e.conv(part, inputs, weights, epilogue, outputs);
            }
        }
        e.narrow(y_rows(part, c.y), outputs, y + (sample * c.y[0] + first * c.y[size_t(cut.dim) + 1]));
    });
}

void conv_dx(const Convolution& c, const Bf16* dy, const Bf16* w, bool exact, Bf16* dx) {
    const Engine& e = engine();
    const Winograd* winograd = faster(e, c, exact);
    const Pairs* pairs = winograd ? nullptr : in_pairs(e, c, c.filters);
    const Cut cut(c, c.input, winograd);
    const size_t dim = size_t(cut.dim);
    Scratch scratch;
    const Paired paired = pairs ? pair_backward(*pairs, c, w, scratch) : Paired{};
    const float* weights = pairs ? nullptr : widened(e, w_rows(c), w, scratch);
    if (!winograd && !pairs) {
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
        float* sums = room.array<float>(size(x_rows(part, c.x)));
        if (pairs) {
            const PairedChannels slopes(*pairs, y_rows(part, c.y), from, room);
            Convolution of = part;
            of.filters = paired.c.filters, of.w = paired.c.w, of.y = slopes.strides;
            pairs->conv_dx(of, slopes.data, paired.packed, sums);
        } else {
            const float* slopes = widened(e, y_rows(part, c.y), from, room);
            if (winograd) {
                winograd->conv_dx(part, slopes, weights, sums, {});
            } else {
                e.conv_dx(part, slopes, weights, sums);
            }
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
    const Rows rows = w_rows(c);
    bool add = false;
    cut.each(c, c.output, [&](Index sample, Index samples, Index first, Index last) {
        Scratch room;
        Convolution part = part_of(c, cut.dim, samples, first, last);
        const Index from_x = sample * c.x[0] + first * c.stride[size_t(cut.dim)] * c.x[size_t(cut.dim) + 1];
        const Index from_y = sample * c.y[0] + first * c.y[size_t(cut.dim) + 1];
        float* sums = add ? room.array<float>(size(rows)) : dw;
        if (!add) part.w = c.w;
        if (!winograd && e.pairs) {
            conv_dw_in_pairs(*e.pairs, part, c, cut.dim, x + from_x, dy + from_y, sums);
        } else {
            const float* inputs = widened(e, x_rows(part, c.x), x + from_x, room);
            const float* slopes = widened(e, y_rows(part, c.y), dy + from_y, room);
            if (winograd) {
                winograd->conv_dw(part, inputs, slopes, sums, {});
            } else {
                e.conv_dw(part, inputs, slopes, sums);
            }
        }
        if (add) e.add(rows, sums, dw);
        add = true;
    });
}

}  // namespace hpctrain
