// Gradient of convolution by the weight: a product whose sums run over output positions. For each tap and channel a row
// of A, read from x as it lies; B is dy, packed by chunks of positions that stay in the cache.
#include "isa.h"
#include "sweep.h"
#include "threads.h"

namespace hpctrain::HPCTRAIN_ISA {
namespace {

#ifdef HPCTRAIN_PAIRS
constexpr Index CHUNK = 192;  // pairs of positions at a time: half as long as below
#else
constexpr Index CHUNK = 512;  // positions at a time
#endif
constexpr int CHANNEL_TAPS = 8;

constexpr Index least(Index a, Index b) { return a < b ? a : b; }

struct Gradient {
    const Convolution& c;
    const float *x, *dy;
    float* dw;
    Chunks chunks;
    WeightRows rows;
    Panels panels;
};

// dy of a chunk as the panel of some filters: where it lies, packed into `room` unless it is that already.
const float* panel_of(const Gradient& g, const Chunk& chunk, Index column, int vectors, float* room) {
    const float* dy = g.dy + column;
    bool packed = vectors * W == g.chunks.y_step && column % g.c.filters == 0 && vectors == g.panels.vectors &&
                  g.c.filters % W == 0;
    for (Index i = 0; packed && i < chunk.runs.count; ++i) {
        packed = chunk.y[i] == chunk.y[0] + chunk.runs.list[i].b * g.chunks.y_step;
    }
    if (packed) return dy + chunk.y[0];
    for (Index i = 0; i < chunk.runs.count; ++i) {
        const Run& run = chunk.runs.list[i];
        pack_panel(dy + chunk.y[i], g.chunks.y_step, 1, run.n, g.c.filters - column % g.c.filters, vectors,
                   room + run.b * vectors * W);
    }
    return room;
}

// Rows [first, last) of dw, of the filters of some panels of all groups together, from chunks [from, to).
struct Unit {
    Index first_panel, last_panel, first, last, from, to;
};

// row(i) is where row i of dw goes.
template <class Row>
void compute(const Gradient& g, const Unit& unit, float* room, Row row) {
    for (Index i = unit.from; i < unit.to; ++i) {  // outermost: x is read once
        const Chunk& chunk = g.chunks.list[i];
        for (Index q = unit.first_panel; q < unit.last_panel; ++q) {
            const Index group = q / g.panels.count, panel = q % g.panels.count;
            const Index column = group * g.c.filters + g.panels.first(panel) * W;
            const float *x = g.x + group * g.c.channels, *dy = panel_of(g, chunk, column, g.panels.size(panel), room);
            with_vectors(g.panels.size(panel), [&](auto vectors) {
                constexpr int N = decltype(vectors)::count, M = tile_rows(N);
                for (Index first = unit.first; first < unit.last; first += M) {
                    const float* a[M];
                    float* c[M];
                    for (int r = 0; r < M; ++r) {
                        const Index at = least(first + r, unit.last - 1);
                        a[r] = x + g.rows.x[at];
                        c[r] = row(at);
                    }
                    tile<N>(a, c, column, chunk.runs, g.chunks.x_step, dy,
                            Target{int(least(M, unit.last - first)), g.panels.tail(panel), i > unit.from, nullptr});
                }
            });
        }
    }
}

void zero(const Gradient& g, Index columns) {
    for (Index i = 0; i < g.rows.count; ++i) {
        for (Index f = 0; f < columns; ++f) g.dw[g.rows.w[i] + f] = 0;
    }
}

// Threads own panels of dw, and rows of these where there are more threads than panels.
void by_panels(const Gradient& g, float* room, Index room_of_one) {
    const Index panels = g.c.groups * g.panels.count, count = g.rows.count;
    in_threads([&](int thread, int threads) {
        const Index parts = (threads + panels - 1) / panels, units = panels * parts;
        for (Index i = units * thread / threads, end = units * (thread + 1) / threads; i < end;) {
            const Index part = i % parts, next = parts == 1 ? end : i + 1;  // panels in a row as one unit
            compute(g,
                    {i / parts, (next - 1) / parts + 1, count * part / parts, count * (part + 1) / parts, 0,
                     g.chunks.count},
                    room + thread * room_of_one, [&](Index row) { return g.dw + g.rows.w[row]; });
            i = next;
        }
    });
}

// Few rows: threads own chunks of positions, and their sums are added up in order.
void by_positions(const Gradient& g, Index parts, float* room, Index room_of_one, float* sums) {
    const Index width = g.c.groups * g.c.filters, size = g.rows.count * width;
    in_threads([&](int thread, int threads) {
        for (Index part = parts * thread / threads; part < parts * (thread + 1) / threads; ++part) {
            const Index from = g.chunks.count * part / parts, to = g.chunks.count * (part + 1) / parts;
            compute(g, {0, g.c.groups * g.panels.count, 0, g.rows.count, from, to}, room + thread * room_of_one,
                    [&](Index row) { return part ? sums + (part - 1) * size + row * width : g.dw + g.rows.w[row]; });
        }
    });
    for (Index row = 0; row < g.rows.count; ++row) {
        for (Index part = 0; part + 1 < parts; ++part) {
            for (Index f = 0; f < width; ++f) g.dw[g.rows.w[row] + f] += sums[part * size + row * width + f];
        }
    }
}

// Each channel alone: some taps of a vector of channels.
void channel_taps(const Gradient& g, const Chunk& chunk, Index column, int n, Index first, int taps, bool add) {
    V sums[CHANNEL_TAPS] = {};
    const float* x[CHANNEL_TAPS];
    for (int t = 0; t < CHANNEL_TAPS; ++t) x[t] = g.x + g.rows.x[first + (t < taps ? t : 0)] + column;
    for (Index i = 0; i < chunk.runs.count; ++i) {
        const float* dy = g.dy + chunk.y[i] + column;
        Index at = chunk.runs.list[i].a;
        for (Index left = chunk.runs.list[i].n; left > 0; --left, at += g.chunks.x_step, dy += g.chunks.y_step) {
            const V slope = n == W ? load(dy) : load(dy, n);
#pragma GCC unroll 8
            for (int t = 0; t < CHANNEL_TAPS; ++t) {
                sums[t] = fma(n == W ? load(x[t] + at) : load(x[t] + at, n), slope, sums[t]);
            }
        }
    }
    for (int t = 0; t < taps; ++t) {
        float* dw = g.dw + g.rows.w[first + t] + column;
        store(dw, add ? sums[t] + load(dw, n) : sums[t], n);
    }
}

void by_channels(const Gradient& g) {
    const Index vectors = Panels(g.c.groups).vectors;
    in_threads([&](int thread, int threads) {
        for (Index i = 0; i < g.chunks.count; ++i) {
            for (Index v = vectors * thread / threads; v < vectors * (thread + 1) / threads; ++v) {
                for (Index tap = 0; tap < g.rows.count; tap += CHANNEL_TAPS) {
                    channel_taps(g, g.chunks.list[i], v * W, int(least(W, g.c.groups - v * W)), tap,
                                 int(least(CHANNEL_TAPS, g.rows.count - tap)), i > 0);
                }
            }
        }
    });
}

}  // namespace

void conv_dw(const Convolution& c, const float* x, const float* dy, float* dw) {
    Scratch scratch;
    const Gradient g{c, x, dy, dw, position_chunks(c, CHUNK, scratch), weight_rows(c, scratch), Panels(c.filters)};
    const Index width = c.groups * c.filters;
    if (g.chunks.count == 0) return zero(g, width);
    if (g.rows.count == 0 || width == 0) return;
    if (c.depthwise()) return by_channels(g);
    const Index threads = thread_count(), room_of_one = CHUNK * TILE_VECTORS * W;
    float* room = scratch.array<float>(threads * room_of_one);
    const Index tiles = (g.rows.count + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    if (threads == 1 || c.groups * g.panels.count * tiles >= 8 * threads) return by_panels(g, room, room_of_one);
    const Index parts = least(threads, g.chunks.count);
    by_positions(g, parts, room, room_of_one, scratch.array<float>((parts - 1) * g.rows.count * width));
}

}  // namespace hpctrain::HPCTRAIN_ISA
