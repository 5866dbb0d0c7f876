#include "winograd_tiles.h"

namespace hpctrain::HPCTRAIN_ISA::winograd {
namespace {

// Calls work(read, channel) for the vectors of channels of panels [first, last): read(i, j) gives the products for `row`
// of the channels from `channel` on.
template <class Work>
inline void each_vector(const Matrices& from, Index first, Index last, Index row, Work work) {
    for (Index panel = first; panel < last; ++panel) {
        const int width = from.width(panel);
        const Index point = from.point;
        for (int j = 0; j < width; ++j) {
            const float* values = from.panel(panel) + (row * width + j) * W;
            work([=](int f, int g) { return load(values + (f * INPUTS + g) * point); }, (from.first(panel) + j) * W);
        }
    }
}

}  // namespace

void write_outputs(const Image<float>& y, const Tiles& tiles, const Block& block, const Matrices& from, Index first,
                   Index last, const float* bias, bool accumulate) {
    for (Index row = 0; row < block.rows(); ++row) {
        const Place place = tiles.place(block.column + row % block.columns);
        const Patch<float, OUTPUTS> patch(y, place, block.plane + row / block.columns);
        const bool whole = patch.whole();
        each_vector(from, first, last, row, [&](auto read, Index channel) {
            with_lanes(y.channels - channel, whole, [&](auto lanes, auto all) {
                const V offset = bias ? lanes.read(bias + channel) : V{};
                both_dims<Output>(read, [&](int i, int j, V v) {
                    if (!all && !patch.has(i, j)) return;
                    float* at = patch.at(i, j) + channel;
                    v += offset;
                    lanes.write(at, accumulate ? v + lanes.read(at) : v);
                });
            });
        });
    }
}

void write_input_gradients(const Image<float>& dx, const Tiles& tiles, const Block& block, const Matrices& from,
                           Index first, Index last, const Image<float>& seam, Index seam_end) {
    constexpr int SHARED = INPUTS - OUTPUTS;
    for (Index row = 0; row < block.rows(); ++row) {
        const Index column = block.column + row % block.columns, plane = block.plane + row / block.columns;
        const Place place = tiles.place(column);
        const Patch<float, INPUTS> patch(dx, place, plane);
        const Patch<float, INPUTS> apart(seam, Place{0, 0, place.col, false, false}, plane);
        const bool seamed = column < seam_end, whole = patch.whole() && !seamed;
        each_vector(from, first, last, row, [&](auto read, Index channel) {
            with_lanes(dx.channels - channel, whole, [&](auto lanes, auto all) {
                both_dims<InputAdjoint>(read, [&](int i, int j, V v) {
                    if (!all && !patch.has(i, j)) return;
                    const bool elsewhere = !all && seamed && i < SHARED;
                    float* at = (elsewhere ? apart : patch).at(i, j) + channel;
                    const bool add = (i < SHARED && place.below && !elsewhere) || (j < SHARED && place.right);
                    lanes.write(at, add ? v + lanes.read(at) : v);
                });
            });
        });
    }
}

}  // namespace hpctrain::HPCTRAIN_ISA::winograd
