#include "bf16.h"

#include "bf16_pairs.h"
#include "bf16_parts.h"
#include "scratch.h"
#include "winograd.h"

namespace hpctrain {
namespace {

constexpr double PAIRS_TIME = 0.47;  // of a direct convolution by products of pairs, relative to one in float

const Winograd* faster(const Engine& e, const Convolution& c, bool exact, bool dx = false) {
    if (exact || !e.winograd->fits(c)) return nullptr;
    return (dx ? e.winograd->cost_dx : e.winograd->cost)(c) < (e.pairs ? PAIRS_TIME : 1) ? e.winograd : nullptr;
}

const float* widened(const Engine& e, const Rows& rows, const Bf16* from, Scratch& scratch) {
    float* to = scratch.array<float>(size(rows));
    e.widen(rows, from, to);
    return to;
}

// Winograd's tiles have 4 x 4 outputs of a kernel 3 x 3. Planes that are a little larger than whole tiles leave the
// rest to products of pairs.
constexpr Index TILE = 4;
constexpr double STRIPS_TIME = 1.3 * PAIRS_TIME;

// Some rows and columns of the outputs of a convolution with stride 1, from (row, column) on.
struct Region {
    Convolution c;
    Index row, column;

    Region(const Convolution& whole, Index row, Index column, Index rows, Index columns)
        : c(whole), row(row), column(column) {
        c.output[1] = rows, c.output[2] = columns;
        c.input[1] = rows + c.kernel[1] - 1, c.input[2] = columns + c.kernel[2] - 1;
    }
    Index offset(const Strides& strides) const { return row * strides[2] + column * strides[3]; }
};

// Whole tiles, the rows below them, and the columns to their right.
struct Regions {
    Region tiles, strips[2];

    explicit Regions(const Convolution& c)
        : Regions(c, c.output[1] / TILE * TILE, c.output[2] / TILE * TILE) {}
    Regions(const Convolution& c, Index h, Index w)
        : tiles(c, 0, 0, h, w),
          strips{{c, h, 0, c.output[1] - h, c.output[2]}, {c, 0, w, h, c.output[2] - w}} {}
};

bool in_regions(const Engine& e, const Convolution& c, bool exact) {
    const Index h = c.output[1] / TILE * TILE, w = c.output[2] / TILE * TILE;
    if (exact || !e.winograd->fits(c) || c.kernel[0] != 1 || c.kernel[1] != 3 || h * w == 0) return false;
    if (h == c.output[1] && w == c.output[2]) return false;
    if (!in_pairs(e, c, c.channels) || !in_pairs(e, c, c.filters)) return false;
    const double part = double(h * w) / double(c.output[1] * c.output[2]);
    const double cost = part * e.winograd->cost(Regions(c).tiles.c) + (1 - part) * STRIPS_TIME;
    return cost < e.winograd->cost(c) && cost < PAIRS_TIME;
}

// conv_dx of regions whose results overlap: of some samples at a time, added up as floats.
void conv_dx_in_regions(const Engine& e, const Convolution& c, const Bf16* dy, const Bf16* w, Bf16* dx) {
    Scratch scratch;
    const Pairs& pairs = *e.pairs;
    const Paired paired = pair_backward(pairs, c, w, scratch);
    const float* weights = widened(e, w_rows(c), w, scratch);
    const Index channels = c.groups * c.channels, sample = x_floats(c) + y_floats(c);
    const Index at_once = Cut(c, c.input, sample, room_of(c, true)).samples;
    for (Index n = 0; n < c.samples; n += at_once, dy += at_once * c.y[0], dx += at_once * c.x[0]) {
        Scratch room;
        Convolution part = c;
        part.samples = std::min(at_once, c.samples - n), part.w = w_rows(c).copy;
        const Rows rows = x_rows(part, c.x);
        part.x = rows.copy;
        float* sums = room.array<float>(size(rows));
        std::fill_n(sums, size(rows), 0.0f);  // the tiles do not reach all
        const Regions regions(part);
        Convolution tiles = regions.tiles.c;
        const float* slopes = widened(e, y_rows(tiles, c.y), dy, room);
        tiles.y = y_rows(tiles, c.y).copy;
        e.winograd->conv_dx(tiles, slopes, weights, sums, {});
        for (const Region& strip : regions.strips) {
            Convolution of = strip.c;
            if (positions(of.output) == 0) continue;
            const PairedChannels strip_slopes(pairs, y_rows(of, c.y), dy + strip.offset(c.y), room);
            const Rows shares = rows_of(of.samples, of.input, channels, part.x);
            float* share = room.array<float>(size(shares));
            of.filters = paired.c.filters, of.w = paired.c.w, of.y = strip_slopes.strides, of.x = shares.copy;
            pairs.conv_dx(of, strip_slopes.data, paired.packed, share);
            e.add(shares, share, sums + strip.offset(part.x));
        }
        e.narrow(rows, sums, dx);
    }
}

// dw, or what is added to it.
void conv_dw(const Convolution& c, const Bf16* x, const Bf16* dy, bool exact, float* dw, bool add) {
    const Engine& e = engine();
    const Winograd* winograd = faster(e, c, exact);
    const Cut cut(c, c.output, x_floats(c) + y_floats(c), room_of_dw(c, winograd));
    if (c.samples * positions(c.output) == 0 && !add) return e.conv_dw(c, nullptr, nullptr, dw);
    const Rows rows = w_rows(c);
    cut.each(c, c.output, [&, add](Index sample, Index samples, Index first, Index last) mutable {
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

}  // namespace

void conv(const Convolution& c, const Bf16* x, const Bf16* w, const Epilogue& epilogue, bool exact, Bf16* y) {
    const Engine& e = engine();
    if (in_regions(e, c, exact)) {
        const Regions regions(c);
        conv(regions.tiles.c, x, w, epilogue, false, y);
        for (const Region& strip : regions.strips) {
            if (positions(strip.c.output) == 0) continue;
            conv(strip.c, x + strip.offset(c.x), w, epilogue, true, y + strip.offset(c.y));
        }
        return;
    }
    const Winograd* winograd = faster(e, c, exact);
    const Pairs* pairs = winograd ? nullptr : in_pairs(e, c, c.channels);
    const Cut cut(c, c.output, y_floats(c) + (pairs ? 0 : x_floats(c)), room_of(c, winograd));
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
    if (in_regions(e, c, exact)) return conv_dx_in_regions(e, c, dy, w, dx);
    const Winograd* winograd = faster(e, c, exact, true);
    const Pairs* pairs = winograd ? nullptr : in_pairs(e, c, c.filters);
    const Cut cut(c, c.input, x_floats(c) + (pairs ? 0 : y_floats(c)), room_of(c, winograd), true);
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
    if (!in_regions(engine(), c, exact)) return conv_dw(c, x, dy, exact, dw, false);
    const Regions regions(c);
    conv_dw(regions.tiles.c, x, dy, false, dw, false);
    for (const Region& strip : regions.strips)
        conv_dw(strip.c, x + strip.offset(c.x), dy + strip.offset(c.y), true, dw, true);
}

}  // namespace hpctrain
