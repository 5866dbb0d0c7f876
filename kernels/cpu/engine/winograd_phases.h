// A strided convolution of few channels as one without stride: a kernel 11 x 11 with stride 4 is one of 4 x 3 x 3 over
// the rows by their phase, as planes, and over four columns at a time, as channels. x is read as it lies.
#pragma once

#include "winograd_blocks.h"

namespace hpctrain::HPCTRAIN_ISA::winograd {

struct Phases {
    Convolution c;           // without stride; w of a copy that has zeros behind the kernel
    Index complete, lacked;  // planes that have the last row; channels that the last column lacks

    static bool fits(const Convolution& s) {
        const Index step = s.stride[1], edge = s.kernel[1], taps = ceil_div(edge, step);
        return s.samples > 0 && s.groups == 1 && s.input[0] == 1 && s.kernel[0] == 1 && step > 1 &&
               s.stride[2] == step && s.kernel[2] == edge && (taps == 3 || taps == 5) && s.dilation[1] == 1 &&
               s.dilation[2] == 1 && s.x[3] == s.channels && s.output[1] > 0 && s.output[2] > 0;
    }

    explicit Phases(const Convolution& s) {
        const Index step = s.stride[1], taps = ceil_div(s.kernel[1], step), column = step * s.channels * s.filters;
        c = s;
        c.channels = step * s.channels;
        c.input = {step, s.output[1] + taps - 1, s.output[2] + taps - 1};
        c.kernel = {step, taps, taps};
        c.stride = {1, 1, 1};
        c.x = {s.x[0], s.x[2], step * s.x[2], step * s.x[3]};
        c.w = {taps * column, step * taps * column, column, s.filters};
        complete = least(step, s.input[1] - (c.input[1] - 1) * step);
        lacked = (step - least(step, s.input[2] - (c.input[2] - 1) * step)) * s.channels;
    }

    Index weights() const { return c.kernel[1] * c.w[1]; }

    // Calls work(offset in w, offset in the copy) for all taps of `s`: there lie its channels and filters.
    template <class Work>
    void each_tap(const Convolution& s, Work work) const {
        for (Index i = 0; i < s.kernel[1]; ++i) {
            for (Index j = 0; j < s.kernel[2]; ++j)
                work(i * s.w[1] + j * s.w[2], i * c.w[0] + j * s.channels * s.filters);
        }
    }
};

}  // namespace hpctrain::HPCTRAIN_ISA::winograd
