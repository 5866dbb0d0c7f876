// Which convolutions Winograd computes, and which of them faster.
#include "winograd.h"

#include "winograd_phases.h"

namespace hpctrain::HPCTRAIN_ISA {

bool winograd_fits(const Convolution& c) {
    if ((c.kernel[1] != 3 && c.kernel[1] != 5) || c.kernel[2] != c.kernel[1]) return false;
    for (int dim = 0; dim < 3; ++dim) {
        if (c.stride[dim] != 1 || (c.kernel[dim] > 1 && c.dilation[dim] != 1)) return false;
    }
    return c.samples > 0 && c.output[0] > 0 && c.output[1] > 0 && c.output[2] > 0;
}

namespace winograd {
namespace {

constexpr double EFFICIENCY = 0.8;  // of its products, compared with a direct convolution's

// Vector operations of a pass that sums over `terms` for each of `results`, as measured: a point of a tile takes about
// edge + 1 for the transforms of each vector of channels, on either side, however many filters share them, and a point
// of the weights 11 for each vector of them, however many tiles there are. So few channels, filters or tiles do not
// pay, nor do tiles that lie mostly outside of the outputs.
double operations(const Convolution& c, int edge, Index terms, Index results) {
    constexpr double KERNEL = 11;
    const Tiles tiles(c, edge, {});
    const double products = double(c.kernel[0] * terms * ceil_div(results, W));
    const double transforms = double(edge + 1) * double(ceil_div(terms, W) + ceil_div(results, W));
    return double(tiles.points()) * (double(tiles.count() * c.output[0]) * (products + transforms) + KERNEL * products);
}

// Time relative to that of a direct convolution.
double cost(const Convolution& c, Index terms, Index results) {
    const double direct =
        double(c.samples * c.output[0] * c.output[1] * c.output[2] * c.taps() * terms) * double(ceil_div(results, W));
    return operations(c, best_edge(c), terms, results) / (EFFICIENCY * direct);
}

// The same for a strided one: here each plane of the outputs needs the transforms of several of x.
double cost_of_phases(const Convolution& strided) {
    const Convolution c = Phases(strided).c;
    const int edge = best_edge(c);
    const double more = double((c.input[0] - 1) * (edge + 1) * ceil_div(c.channels, W) * edge * edge);
    const double direct = double(c.samples * c.output[1] * c.output[2] * strided.taps() * strided.channels) *
                          double(ceil_div(c.filters, W));
    const double all = operations(c, edge, c.channels, c.filters) + more * double(Tiles(c, edge, {}).count());
    return all / (EFFICIENCY * direct);
}

}  // namespace

int best_edge(const Convolution& c) {
    const int small = c.kernel[1] == 3 ? 4 : 6;
    const bool smaller = operations(c, small, c.channels, c.filters) < operations(c, small + 2, c.channels, c.filters);
    return smaller ? small : small + 2;
}

}  // namespace winograd

double winograd_cost(const Convolution& c) { return winograd::cost(c, c.channels, c.filters); }
bool winograd_strided(const Convolution& c) { return winograd::Phases::fits(c) && winograd::cost_of_phases(c) < 1; }
double winograd_cost_dx(const Convolution& c) { return winograd::cost(c, c.filters, c.channels); }

const Winograd WINOGRAD = {
    winograd_fits, winograd_cost, winograd_cost_dx, winograd_strided, winograd_conv, winograd_dx, winograd_dw,
};

}  // namespace hpctrain::HPCTRAIN_ISA
