#include "winograd_weights.h"

namespace hpctrain::HPCTRAIN_ISA::winograd {
namespace {

inline int lanes(Index rest) { return rest < W ? int(rest) : W; }

}  // namespace

template <int KERNEL, int EDGE>
void pack_filters(const Filters<const float>& w, Index first_vector, int width, Index begin, Index end, float* to,
                  Index point) {
    for (int tap = 0; tap < w.taps; ++tap) {
        for (Index c = begin; c < end; ++c) {
            for (int q = 0; q < width; ++q, to += W) {
                const Index filter = (first_vector + q) * W;
                with_lanes(w.filters - filter, true, [&](auto lanes, auto) {
                    both_dims<Weights<KERNEL, EDGE>>(
                        [&](int i, int j) { return lanes.read(w.at(tap, i, j, c, filter)); },
                        [=](int i, int j, V v) { store(to + (i * EDGE + j) * point, v); });
                });
            }
        }
    }
}

template <int KERNEL, int EDGE>
void pack_channels(const Filters<const float>& w, Index first_vector, int width, Index begin, Index end, float* to,
                   Index point) {
    V turned[KERNEL * KERNEL][W];  // of W channels and W filters: a vector of channels for each filter
    for (int tap = w.taps - 1; tap >= 0; --tap) {
        for (Index filter = begin; filter < end; filter += W) {
            const int n = lanes(end - filter);
            for (int q = 0; q < width; ++q) {
                const Index channel = (first_vector + q) * W;
                const int m = lanes(w.channels - channel);
                for (int t = 0; t < KERNEL * KERNEL; ++t) {
                    for (int c = 0; c < W; ++c) {
                        const float* from = w.at(tap, t / KERNEL, t % KERNEL, channel + (c < m ? c : 0), filter);
                        turned[t][c] = c >= m ? V{} : n == W ? load(from) : load(from, n);
                    }
                    transpose(turned[t]);
                }
                for (int k = 0; k < n; ++k) {
                    float* row = to + (k * width + q) * W;
                    both_dims<Weights<KERNEL, EDGE>>(
                        [&](int i, int j) { return turned[i * KERNEL + j][k]; },
                        [=](int i, int j, V v) { store(row + (i * EDGE + j) * point, v); });
                }
            }
            to += n * width * W;
        }
    }
}

template <int KERNEL, int EDGE>
void write_weight_gradients(const Filters<float>& dw, int tap, Index channel, Index first_vector, int width,
                            const float* from, Index point) {
    for (int c = 0; c < lanes(dw.channels - channel); ++c) {
        for (int q = 0; q < width; ++q, from += W) {
            const Index filter = (first_vector + q) * W;
            const int n = lanes(dw.filters - filter);
            const auto read = [=](int i, int j) { return load(from + (i * EDGE + j) * point); };
            both_dims<WeightsAdjoint<KERNEL, EDGE>>(read, [&](int i, int j, V v) {
                float* at = dw.at(tap, i, j, channel + c, filter);
                n == W ? store(at, v) : store(at, v, n);
            });
        }
    }
}

using Packing = void(const Filters<const float>&, Index, int, Index, Index, float*, Index);
using Writing = void(const Filters<float>&, int, Index, Index, int, const float*, Index);
template Packing pack_filters<3, 4>;
template Packing pack_filters<3, 6>;
template Packing pack_filters<5, 6>;
template Packing pack_filters<5, 8>;
template Packing pack_channels<3, 4>;
template Packing pack_channels<3, 6>;
template Packing pack_channels<5, 6>;
template Packing pack_channels<5, 8>;
template Writing write_weight_gradients<3, 4>;
template Writing write_weight_gradients<3, 6>;
template Writing write_weight_gradients<5, 6>;
template Writing write_weight_gradients<5, 8>;

}  // namespace hpctrain::HPCTRAIN_ISA::winograd
