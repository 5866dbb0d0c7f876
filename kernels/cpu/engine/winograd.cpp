// Which convolutions Winograd computes, and which of them faster.
#include "winograd.h"

#include "winograd_blocks.h"

namespace hpctrain::HPCTRAIN_ISA {

bool winograd_fits(const Convolution& c) {
    if ((c.kernel[1] != 3 && c.kernel[1] != 5) || c.kernel[2] != c.kernel[1]) return false;
    for (int dim = 0; dim < 3; ++dim) {
        if (c.stride[dim] != 1 || (c.kernel[dim] > 1 && c.dilation[dim] != 1)) return false;
    }
    return c.samples > 0 && c.output[0] > 0 && c.output[1] > 0 && c.output[2] > 0;
}

// Counts vector operations, as measured: a tile takes about 250 for the transforms of each vector of channels, on
// either side, however many filters share them, and weights 400 for each vector of them, however many tiles there are.
// So few channels, filters or tiles do not pay, nor do tiles that lie mostly outside of the outputs.
double winograd_cost(const Convolution& c) {
    using namespace winograd;
    constexpr double TILE = 250, KERNEL = 400, EFFICIENCY = 0.8;
    const Tiles tiles(c, {});
    const double products = double(c.kernel[0]) * double(c.channels) * double(c.filters) / W;
    const double transforms = TILE * double(ceil_div(c.channels, W) + ceil_div(c.filters, W));
    const double direct = double(c.kernel[1] * c.kernel[2] * c.output[1] * c.output[2]) * products;
    const double images = double(c.samples) * double(c.output[0]);
    const double operations = images * double(tiles.down * tiles.across) * (POINTS * products + transforms);
    return (operations + KERNEL * products) / (EFFICIENCY * images * direct);
}

const Winograd WINOGRAD = {winograd_fits, winograd_cost, winograd_conv, winograd_dx, winograd_dw};

}  // namespace hpctrain::HPCTRAIN_ISA
