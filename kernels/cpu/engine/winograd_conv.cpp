// y and dx: tiles are transformed, multiplied with transformed weights, and transformed back, block by block.
#include "scratch.h"
#include "threads.h"
#include "winograd_phases.h"
#include "winograd_weights.h"

namespace hpctrain::HPCTRAIN_ISA {
namespace winograd {
namespace {

// What y and dx have in common. Their difference is in the transforms, and in what is summed over: terms are channels
// for y and filters for dx, results the other of the two.
struct Pass {
    Tiles tiles;
    int taps;
    Index terms, results;
    Index planes;  // of the result
    int lead;      // planes of the source before plane 0 that the first one of the result reads
};

template <int KERNEL, int EDGE>
struct Forward : Pass {
    Image<const float> x;
    Filters<const float> w;
    Image<float> y;
    Epilogue epilogue;

    void read(const Block& block, const Matrices& to, Index begin, Index end) const {
        read_tiles<Input<EDGE>>(x, tiles, block, to, begin, end);
    }
    void pack(Index first, int width, Index begin, Index end, float* to, Index point) const {
        pack_filters<KERNEL, EDGE>(w, first, width, begin, end, to, point);
    }
    void write(const Block& block, const Matrices& from, Index first, Index last, const Seam&) const {
        write_outputs<KERNEL, EDGE>(y, tiles, block, from, first, last, epilogue);
    }
    // tiles of y do not overlap
    Index seam_floats() const { return 0; }
    Index seam_columns() const { return 0; }
    Seam seam(const Block&, float*) const { return {}; }
    void close(const Seam&, Index, Index) const {}
};

template <int KERNEL, int EDGE>
struct Backward : Pass {
    Image<const float> dy;
    Filters<const float> w;
    Image<float> dx;

    void read(const Block& block, const Matrices& to, Index begin, Index end) const {
        read_tiles<OutputAdjoint<KERNEL, EDGE>>(dy, tiles, block, to, begin, end);
    }
    void pack(Index first, int width, Index begin, Index end, float* to, Index point) const {
        pack_channels<KERNEL, EDGE>(w, first, width, begin, end, to, point);
    }
    void write(const Block& block, const Matrices& from, Index first, Index last, const Seam& seam) const {
        write_input_gradients<KERNEL, EDGE>(dx, tiles, block, from, first, last, seam);
    }

    // The rows that the first row of tiles of a thread's share has in common with the thread before.
    Index seam_floats() const { return dx.extent[0] * (KERNEL - 1) * dx.extent[2] * dx.channels; }
    Index seam_columns() const { return dx.extent[2]; }
    Seam seam(const Block& share, float* data) const {
        const Place place = tiles.place(share.column);
        if (share.columns == 0 || !place.below) return {};
        const Index row = dx.extent[2] * dx.channels;
        const Strides step{0, (KERNEL - 1) * row, row, dx.channels};
        return {{data, step, {dx.extent[0], KERNEL - 1, dx.extent[2]}, dx.channels}, place.n, place.row};
    }
    // Adds columns [begin, end) of a seam to dx.
    void close(const Seam& seam, Index begin, Index end) const {
        if (!seam.rows.data) return;
        for (Index plane = 0; plane < dx.extent[0]; ++plane) {
            for (Index i = 0; i < KERNEL - 1; ++i) {
                for (Index j = begin; j < end; ++j) {
                    const Strides& step = seam.rows.stride;
                    const float* from = seam.rows.data + plane * step[1] + i * step[2] + j * step[3];
                    float* to = dx.data + (seam.sample * dx.stride[0] + plane * dx.stride[1] +
                                           (seam.row + i) * dx.stride[2] + j * dx.stride[3]);
                    for (Index c = 0; c < dx.channels; ++c) to[c] += from[c];
                }
            }
        }
    }
};

// Terms of one run of sums, of all depth taps.
inline Index run_terms(const Pass& pass) { return pass.taps == 1 ? RUN : most(W, RUN / pass.taps / W * W); }

// One of the products: sums over a run of terms [begin, end) into a panel of m; `right` is that run of the panel
// of weights.
inline void multiply(const Pass& pass, const Block& block, const Matrices& v, const Matrices& m, Index panel,
                     Index begin, Index end, const float* right, Index right_point, int point) {
    const Left left{v.data + point * v.point + begin * v.rows, v.rows * W, block.columns * W, pass.taps, end - begin};
    product<W, 1>(m.width(panel), left, block.rows(), right + point * right_point, m.panel(panel) + point * m.point,
                  begin > 0);
}

inline Block source_of(const Pass& pass, const Block& block) {
    return {block.column, block.columns, block.plane - pass.lead, block.planes + pass.taps - 1};
}

// Many tiles: weights are transformed once, then threads go through blocks of tiles.
template <class P>
void by_tiles(const P& pass) {
    Scratch scratch;
    const int points = pass.tiles.points();
    Matrices u(points, pass.taps * pass.terms, pass.results, TILE_VECTORS);
    u.data = scratch.array<float>(u.floats());
    const Index run = run_terms(pass), runs = ceil_div(pass.terms, run);
    in_threads([&](int thread, int threads) {
        for (Index unit = thread; unit < u.panels * runs; unit += threads) {
            const Index panel = unit / runs, begin = unit % runs * run;
            const int width = u.width(panel);
            pass.pack(u.first(panel), width, begin, least(begin + run, pass.terms),
                      u.panel(panel) + pass.taps * begin * width * W, u.point);
        }
    });

    const Block size = block_size(pass.planes, block_rows(points, u.floats(), pass.terms + pass.results));
    const Index v_floats = Matrices(points, source_of(pass, size).rows(), pass.terms, 1).floats();
    const Index m_floats = Matrices(points, size.rows(), pass.results, TILE_VECTORS).floats();
    const int threads_at_most = thread_count();
    float* memory = scratch.array<float>(threads_at_most * (v_floats + m_floats));
    float* seams = scratch.array<float>(threads_at_most * pass.seam_floats());
    in_threads([&](int thread, int threads) {
        const Block all = share(pass.tiles, pass.planes, thread, threads);
        const Seam seam = pass.seam(all, seams + thread * pass.seam_floats());
        each_block(all, size, [&](const Block& block) {
            Matrices v(points, source_of(pass, block).rows(), pass.terms, 1),
                m(points, block.rows(), pass.results, TILE_VECTORS);
            v.data = memory + thread * (v_floats + m_floats), m.data = v.data + v_floats;
            pass.read(source_of(pass, block), v, 0, v.rows);
            for (int point = 0; point < points; ++point) {
                for (Index panel = 0; panel < u.panels; ++panel) {
                    for (Index begin = 0; begin < pass.terms || begin == 0; begin += run) {
                        multiply(pass, block, v, m, panel, begin, least(begin + run, pass.terms),
                                 u.panel(panel) + pass.taps * begin * u.width(panel) * W, u.point, point);
                    }
                }
            }
            pass.write(block, m, 0, m.panels, seam);
        });
    });
    if (threads_at_most > 1 && pass.seam_floats() > 0) {
        in_threads([&](int thread, int threads) {
            // seams may overlap, so each thread adds its columns of all of them
            for (int other = 0; other < threads; ++other) {
                const Block all = share(pass.tiles, pass.planes, other, threads);
                const Index width = pass.seam_columns();
                pass.close(pass.seam(all, seams + other * pass.seam_floats()), width * thread / threads,
                           width * (thread + 1) / threads);
            }
        });
    }
}

// Few tiles: all of them are transformed, then threads go through panels of weights, which are transformed just before
// their use and never leave the second-level cache.
template <class P>
void by_weights(const P& pass) {
    const int points = pass.tiles.points();
    const Index run = run_terms(pass);
    const Block size = block_size(pass.planes, FEW_ROWS);
    const Index u_floats = Matrices(points, run * pass.taps, TILE_VECTORS * W, TILE_VECTORS).floats();
    const Index m_floats = Matrices(points, size.rows(), TILE_VECTORS * W, TILE_VECTORS).floats();
    Scratch scratch;
    float* tiles = scratch.array<float>(Matrices(points, source_of(pass, size).rows(), pass.terms, 1).floats());
    float* memory = scratch.array<float>(thread_count() * (u_floats + m_floats));
    each_block({0, pass.tiles.count(), 0, pass.planes}, size, [&](const Block& block) {
        const Block source = source_of(pass, block);
        Matrices v(points, source.rows(), pass.terms, 1);
        v.data = tiles;
        in_threads([&](int thread, int threads) {
            pass.read(source, v, v.rows * thread / threads, v.rows * (thread + 1) / threads);
        });
        in_threads([&](int thread, int threads) {
            float* right = memory + thread * (u_floats + m_floats);
            Matrices m(points, block.rows(), pass.results, TILE_VECTORS);
            m.point = m_floats / points;
            for (Index panel = thread; panel < m.panels; panel += threads) {
                m.data = right + (u_floats - m.offset(panel));  // there is room for this panel only
                for (Index begin = 0; begin < pass.terms || begin == 0; begin += run) {
                    const Index end = least(begin + run, pass.terms);
                    pass.pack(m.first(panel), m.width(panel), begin, end, right, u_floats / points);
                    for (int point = 0; point < points; ++point)
                        multiply(pass, block, v, m, panel, begin, end, right, u_floats / points, point);
                }
                pass.write(block, m, panel, panel + 1, {});
            }
        });
    });
}

template <class P>
void compute(const P& pass) {
    const Index weights = pass.tiles.points() * pass.taps * pass.terms * pass.results;
    const bool few = pass.tiles.count() * pass.planes <= FEW_ROWS && weights > CACHE_FLOATS;
    few && thread_count() <= ceil_div(pass.results, TILE_VECTORS * W) ? by_weights(pass) : by_tiles(pass);
}

template <int KERNEL, int EDGE>
void forward(const Convolution& c, const float* x, const float* w, const Epilogue& epilogue, float* y,
             TileAnchor anchor, Index complete, Index lacked) {
    const float* bias = epilogue.bias;
    for (Index g = 0; g < c.groups; ++g) {
        compute(Forward<KERNEL, EDGE>{{Tiles(c, EDGE, anchor), int(c.kernel[0]), c.channels, c.filters, c.output[0], 0},
                                      {x + g * c.channels, c.x, c.input, c.channels, complete, lacked},
                                      {w + g * c.filters, c.w, c.channels, c.filters, int(c.kernel[0])},
                                      {y + g * c.filters, c.y, c.output, c.filters},
                                      {bias ? bias + g * c.filters : nullptr, epilogue.accumulate, epilogue.slope}});
    }
}

template <int KERNEL, int EDGE>
void backward(const Convolution& c, const float* dy, const float* w, float* dx, TileAnchor anchor) {
    const int taps = int(c.kernel[0]);
    for (Index g = 0; g < c.groups; ++g) {
        compute(Backward<KERNEL, EDGE>{{Tiles(c, EDGE, anchor), taps, c.filters, c.channels, c.input[0], taps - 1},
                                       {dy + g * c.filters, c.y, c.output, c.filters},
                                       {w + g * c.filters, c.w, c.channels, c.filters, taps},
                                       {dx + g * c.channels, c.x, c.input, c.channels}});
    }
}

}  // namespace
}  // namespace winograd

void winograd_conv(const Convolution& c, const float* x, const float* w, const Epilogue& epilogue, float* y,
                   TileAnchor anchor) {
    using namespace winograd;
    if (c.stride[1] > 1) {
        const Phases phases(c);
        if (phases.c.kernel[1] == 5 && anchor.edge == 0) anchor.edge = 6;  // F(4, 5) rounds by more than 1e-5 here
        Scratch scratch;
        float* copy = scratch.array<float>(phases.weights());
        __builtin_memset(copy, 0, size_t(phases.weights()) * sizeof(float));
        phases.each_tap(c, [&](Index from, Index to) {
            for (Index i = 0; i < c.channels * c.filters; ++i)
                copy[to + i] = w[from + i / c.filters * c.w[3] + i % c.filters];
        });
        with_scheme(phases.c, anchor, [&](auto scheme) {
            forward<scheme.KERNEL, scheme.EDGE>(phases.c, x, copy, epilogue, y, anchor, phases.complete, phases.lacked);
        });
        return;
    }
    with_scheme(c, anchor,
                [&](auto scheme) { forward<scheme.KERNEL, scheme.EDGE>(c, x, w, epilogue, y, anchor, c.input[0], 0); });
}

void winograd_dx(const Convolution& c, const float* dy, const float* w, float* dx, TileAnchor anchor) {
    winograd::with_scheme(c, anchor,
                          [&](auto scheme) { winograd::backward<scheme.KERNEL, scheme.EDGE>(c, dy, w, dx, anchor); });
}

}  // namespace hpctrain::HPCTRAIN_ISA
