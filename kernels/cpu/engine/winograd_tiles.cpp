#include "winograd_tiles.h"

namespace hpctrain::HPCTRAIN_ISA::winograd {
namespace {

// Calls work(read, channel) for the vectors of channels of panels [first, last), of which `channel` is the first
// channel: read(i, j) gives their products in `row`.
template <int EDGE, class Work>
inline void each_vector(const Matrices& from, Index first, Index last, Index row, Work work) {
    for (Index panel = first; panel < last; ++panel) {
        const int width = from.width(panel);
        const Index point = from.point;
        for (int j = 0; j < width; ++j) {
            const float* values = from.panel(panel) + (row * width + j) * W;
            work([=](int f, int g) { return load(values + (f * EDGE + g) * point); }, (from.first(panel) + j) * W);
        }
    }
}

}  // namespace

template <int KERNEL, int EDGE>
void write_outputs(const Image<float>& y, const Tiles& tiles, const Block& block, const Matrices& from, Index first,
                   Index last, const Epilogue& epilogue) {
    for (Index row = 0; row < block.rows(); ++row) {
        const Place place = tiles.place(block.column + row % block.columns);
        const Patch<float, outputs_of(KERNEL, EDGE)> patch(y, place, block.plane + row / block.columns);
        const bool whole = patch.whole();
        each_vector<EDGE>(from, first, last, row, [&](auto read, Index channel) {
            with_lanes(y.channels - channel, whole, [&](auto lanes, auto all) {
                const V offset = epilogue.bias ? lanes.read(epilogue.bias + channel) : V{};
                both_dims<Output<KERNEL, EDGE>>(read, [&](int i, int j, V v) {
                    if (!all && !patch.has(i, j)) return;
                    float* at = patch.at(i, j) + channel;
                    v += offset;
                    if (epilogue.accumulate) v += lanes.read(at);
                    lanes.write(at, rectified(v, epilogue.slope));
                });
            });
        });
    }
}

template <int KERNEL, int EDGE>
void write_input_gradients(const Image<float>& dx, const Tiles& tiles, const Block& block, const Matrices& from,
                           Index first, Index last, const Seam& seam) {
    constexpr int SHARED = KERNEL - 1;
    for (Index row = 0; row < block.rows(); ++row) {
        const Index plane = block.plane + row / block.columns;
        const Place place = tiles.place(block.column + row % block.columns);
        const Patch<float, EDGE> patch(dx, place, plane);
        // the rows [0, apart) of this tile are in the seam
        const bool near = seam.rows.data && place.n == seam.sample && place.row < seam.row + SHARED;
        const int apart = near ? int(seam.row + SHARED - place.row) : 0;
        const Patch<float, EDGE> seamed(seam.rows, Place{0, place.row - seam.row, place.col, false, false}, plane);
        const bool whole = patch.whole() && apart == 0, below = place.below && apart < SHARED;
        each_vector<EDGE>(from, first, last, row, [&](auto read, Index channel) {
            with_lanes(dx.channels - channel, whole, [&](auto lanes, auto all) {
                both_dims<InputAdjoint<EDGE>>(read, [&](int i, int j, V v) {
                    if (!all && !patch.has(i, j)) return;
                    float* at = (!all && i < apart ? seamed : patch).at(i, j) + channel;
                    const bool add = (i < SHARED && below) || (j < SHARED && place.right);
                    lanes.write(at, add ? v + lanes.read(at) : v);
                });
            });
        });
    }
}

using Outputs = void(const Image<float>&, const Tiles&, const Block&, const Matrices&, Index, Index, const Epilogue&);
using Gradients = void(const Image<float>&, const Tiles&, const Block&, const Matrices&, Index, Index, const Seam&);
template Outputs write_outputs<3, 4>;
template Outputs write_outputs<3, 6>;
template Outputs write_outputs<5, 6>;
template Outputs write_outputs<5, 8>;
template Gradients write_input_gradients<3, 4>;
template Gradients write_input_gradients<3, 6>;
template Gradients write_input_gradients<5, 6>;
template Gradients write_input_gradients<5, 8>;

}  // namespace hpctrain::HPCTRAIN_ISA::winograd
