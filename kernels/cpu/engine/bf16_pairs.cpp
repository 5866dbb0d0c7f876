#include "bf16_pairs.h"

namespace hpctrain {
namespace {

Strides half(const Strides& strides) { return {strides[0] / 2, strides[1] / 2, strides[2] / 2, strides[3] / 2}; }

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

}  // namespace

PairedChannels::PairedChannels(const Pairs& pairs, const Rows& rows, const Bf16* array, Scratch& scratch)
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

}  // namespace hpctrain
