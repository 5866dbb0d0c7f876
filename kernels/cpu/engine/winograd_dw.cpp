// dw: the products of transformed tiles of x and dy, summed over all tiles, and transformed back once.
#include "scratch.h"
#include "threads.h"
#include "winograd_phases.h"
#include "winograd_weights.h"

namespace hpctrain::HPCTRAIN_ISA {
namespace winograd {
namespace {

constexpr Index ROWS = 96;  // of a block of many: a panel of so many tiles of dy stays in the first-level cache
constexpr Index OWN_SUMS = Index(1) << 20;  // floats that each thread may have for sums of its own

template <int KERNEL, int EDGE>
struct WeightGradient {
    Tiles tiles;
    Image<const float> x, dy;
    Filters<float> dw;

    int points() const { return EDGE * EDGE; }
    Index planes() const { return dy.extent[0]; }
};

// Units of work: W channels and a panel of filters at one depth tap.
struct Units {
    Matrices v, d;  // for their panels
    int taps;

    Units(const Filters<float>& dw, int points)
        : v(points, 1, dw.channels, 1), d(points, 1, dw.filters, TILE_VECTORS), taps(dw.taps) {}
    Index floats() const;  // of the sums of one unit
    Index count() const { return d.panels * v.panels * taps; }
    Index panel(Index unit) const { return unit / taps / v.panels; }
    Index vector(Index unit) const { return unit / taps % v.panels; }
    int tap(Index unit) const { return int(unit % taps); }
};

// Sums of a unit: matrices of W rows.
constexpr Index UNIT_POINT = W * TILE_VECTORS * W + 16;
inline Index Units::floats() const { return v.points * UNIT_POINT; }

template <int KERNEL, int EDGE>
inline Block source_of(const WeightGradient<KERNEL, EDGE>& g, const Block& block) {
    return {block.column, block.columns, block.plane, block.planes + g.dw.taps - 1};
}

// Adds the products of a block's tiles, whose transforms are v and d, to the unit's sums, or begins these.
template <int KERNEL, int EDGE>
void multiply(const WeightGradient<KERNEL, EDGE>& g, const Units& units, Index unit, const Block& block,
              const Matrices& v, const Matrices& d, float* sums, bool add) {
    const Index panel = units.panel(unit), vector = units.vector(unit), rows = least(W, g.dw.channels - vector * W);
    const float* shifted = v.panel(vector) + units.tap(unit) * block.columns * W;
    for (int point = 0; point < EDGE * EDGE; ++point) {
        product<1, W>(d.width(panel), Left{shifted + point * v.point, W * W, 0, 1, d.rows}, rows,
                      d.panel(panel) + point * d.point, sums + point * UNIT_POINT, add);
    }
}

template <int KERNEL, int EDGE>
void write(const WeightGradient<KERNEL, EDGE>& g, const Units& units, Index unit, const float* sums) {
    const Index panel = units.panel(unit), channel = units.vector(unit) * W;
    write_weight_gradients<KERNEL, EDGE>(g.dw, units.tap(unit), channel, units.d.first(panel), units.d.width(panel),
                                         sums, UNIT_POINT);
}

// Floats for the transforms of a block, v before d.
struct Room {
    Index v, d;
    template <int KERNEL, int EDGE>
    Room(const WeightGradient<KERNEL, EDGE>& g, const Block& block)
        : v(Matrices(g.points(), source_of(g, block).rows(), g.dw.channels, 1).floats()),
          d(Matrices(g.points(), block.rows(), g.dw.filters, TILE_VECTORS).floats()) {}
};

// Many tiles: each thread sums up its share of them; the threads' sums are added in their order.
template <int KERNEL, int EDGE>
void by_tiles(const WeightGradient<KERNEL, EDGE>& g) {
    const Units units(g.dw, g.points());
    const Block size = block_size(g.planes(), ROWS);
    const Room room(g, size);
    const Index own = room.v + room.d + units.count() * units.floats();
    Scratch scratch;
    float* memory = scratch.array<float>(thread_count() * own);
    in_threads([&](int thread, int threads) {
        float* mine = memory + thread * own;
        float* sums = mine + room.v + room.d;
        bool add = false;
        each_block(share(g.tiles, g.planes(), thread, threads), size, [&](const Block& block) {
            Matrices v(g.points(), source_of(g, block).rows(), g.dw.channels, 1),
                d(g.points(), block.rows(), g.dw.filters, TILE_VECTORS);
            v.data = mine, d.data = mine + room.v;
            read_tiles<Input<EDGE>>(g.x, g.tiles, source_of(g, block), v, 0, v.rows);
            read_tiles<OutputAdjoint<KERNEL, EDGE>>(g.dy, g.tiles, block, d, 0, d.rows);
            for (Index unit = 0; unit < units.count(); ++unit)
                multiply(g, units, unit, block, v, d, sums + unit * units.floats(), add);
            add = true;
        });
        if (!add) __builtin_memset(sums, 0, size_t(units.count() * units.floats()) * sizeof(float));
    });
    in_threads([&](int thread, int threads) {
        for (Index unit = thread; unit < units.count(); unit += threads) {
            float* sums = memory + room.v + room.d + unit * units.floats();
            for (int other = 1; other < threads; ++other) {
                for (Index i = 0; i < units.floats(); i += W)
                    store(sums + i, load(sums + i) + load(sums + other * own + i));
            }
            write(g, units, unit, sums);
        }
    });
}

// Few tiles or many sums: all threads transform a block, then each multiplies for its units.
template <int KERNEL, int EDGE>
void by_units(const WeightGradient<KERNEL, EDGE>& g) {
    const Units units(g.dw, g.points());
    const Block all{0, g.tiles.count(), 0, g.planes()};
    const Block size = block_size(all.planes, all.rows() <= FEW_ROWS ? FEW_ROWS : 2 * ROWS * thread_count());
    const bool once = size.columns >= all.columns && size.planes >= all.planes;
    const Room room(g, size);
    Scratch scratch;
    float* transforms = scratch.array<float>(room.v + room.d);
    float* sums = scratch.array<float>((once ? thread_count() : units.count()) * units.floats());
    each_block(all, size, [&](const Block& block) {
        Matrices v(g.points(), source_of(g, block).rows(), g.dw.channels, 1),
            d(g.points(), block.rows(), g.dw.filters, TILE_VECTORS);
        v.data = transforms, d.data = transforms + room.v;
        in_threads([&](int t, int threads) {
            const auto part = [=](Index rows, int i) { return rows * i / threads; };
            read_tiles<Input<EDGE>>(g.x, g.tiles, source_of(g, block), v, part(v.rows, t), part(v.rows, t + 1));
            read_tiles<OutputAdjoint<KERNEL, EDGE>>(g.dy, g.tiles, block, d, part(d.rows, t), part(d.rows, t + 1));
        });
        const bool first = block.plane == 0 && block.column == 0;
        const bool last = block.plane + block.planes == all.planes && block.column + block.columns == all.columns;
        in_threads([&](int t, int threads) {
            for (Index unit = units.count() * t / threads; unit < units.count() * (t + 1) / threads; ++unit) {
                float* mine = sums + (once ? t : unit) * units.floats();
                multiply(g, units, unit, block, v, d, mine, !first);
                if (last) write(g, units, unit, mine);
            }
        });
    });
}

template <int KERNEL, int EDGE>
void compute(const WeightGradient<KERNEL, EDGE>& g) {
    const Units units(g.dw, g.points());
    const bool few = g.tiles.count() * g.planes() <= FEW_ROWS;
    few || units.count() * units.floats() > OWN_SUMS ? by_units(g) : by_tiles(g);
}

template <int KERNEL, int EDGE>
void backward(const Convolution& c, const float* x, const float* dy, float* dw, TileAnchor anchor, Index complete,
              Index lacked) {
    for (Index g = 0; g < c.groups; ++g) {
        compute(WeightGradient<KERNEL, EDGE>{Tiles(c, EDGE, anchor),
                                             {x + g * c.channels, c.x, c.input, c.channels, complete, lacked},
                                             {dy + g * c.filters, c.y, c.output, c.filters},
                                             {dw + g * c.filters, c.w, c.channels, c.filters, int(c.kernel[0])}});
    }
}

}  // namespace
}  // namespace winograd

void winograd_dw(const Convolution& c, const float* x, const float* dy, float* dw, TileAnchor anchor) {
    using namespace winograd;
    // Sums over all tiles round by up to 2e-5 with F(4, 5), too much for a choice that nobody made.
    const bool wide = (c.kernel[1] + c.stride[1] - 1) / c.stride[1] == 5;
    if (wide && anchor.edge == 0) anchor.edge = 6;
    if (c.stride[1] > 1) {
        const Phases phases(c);
        Scratch scratch;
        float* copy = scratch.array<float>(phases.weights());
        with_scheme(phases.c, anchor, [&](auto scheme) {
            backward<scheme.KERNEL, scheme.EDGE>(phases.c, x, dy, copy, anchor, phases.complete, phases.lacked);
        });
        phases.each_tap(c, [&](Index to, Index from) {
            for (Index i = 0; i < c.channels * c.filters; ++i)
                dw[to + i / c.filters * c.w[3] + i % c.filters] = copy[from + i];
        });
        return;
    }
    with_scheme(c, anchor,
                [&](auto scheme) { backward<scheme.KERNEL, scheme.EDGE>(c, x, dy, dw, anchor, c.input[0], 0); });
}

}  // namespace hpctrain::HPCTRAIN_ISA
