// Matrix products. B is packed: in whole, or where it is large and few rows use it, piece by piece just before.
#include "isa.h"
#include "sweep.h"
#include "threads.h"

namespace hpctrain::HPCTRAIN_ISA {
namespace {

constexpr Index FEW_ROWS = 192, MUCH = 1 << 18;  // rows of A; floats of B that need not stay in the cache

constexpr Index least(Index a, Index b) { return a < b ? a : b; }

void pack_whole(Index n, Index k, Matrix b, float* packed) {
    const Panels panels(n);
    in_threads([&](int thread, int threads) {
        for (Index q = panels.count * thread / threads; q < panels.count * (thread + 1) / threads; ++q) {
            const Index column = panels.first(q) * W;
            pack_panel(b.data + column * b.column, b.row, b.column, k, n - column, panels.size(q), packed + column * k);
        }
    });
}

// One panel of C: all rows, block by block of B.
void panel_product(const Sweep& sweep, Index m, Index n, const Panels& panels, Index q, Matrix a, Matrix b,
                   const float* bias, bool accumulate, float* c, Index row, float* room) {
    const Index column = panels.first(q) * W;
    const int vectors = panels.size(q);
    for (Index block = 0; block < sweep.block_count; ++block) {
        const Runs& runs = sweep.blocks[block];
        if (runs.count) {
            const Run& run = runs.list[0];
            pack_panel(b.data + run.b * b.row + column * b.column, b.row, b.column, run.n, n - column, vectors, room);
        }
        const Run here{runs.count ? runs.list[0].a : 0, 0, runs.count ? runs.list[0].n : 0};
        with_vectors(vectors, [&](auto count) {
            constexpr int N = decltype(count)::count, M = tile_rows(N);
            for (Index first = 0; first < m; first += M) {
                const float* from[M];
                float* to[M];
                for (int r = 0; r < M; ++r) {
                    from[r] = a.data + least(first + r, m - 1) * a.row;
                    to[r] = c + least(first + r, m - 1) * row;
                }
                tile<N>(from, to, column, Runs{&here, 1}, a.column, room,
                        Target{int(least(M, m - first)), panels.tail(q), accumulate || block > 0,
                               bias && block == 0 ? bias + column : nullptr});
            }
        });
    }
}

}  // namespace

void gemm(Index m, Index n, Index k, Matrix a, Matrix b, const float* bias, bool accumulate, float* c, Index row) {
    if (m == 0 || n == 0) return;
    Scratch scratch;
    const Panels panels(n);
    const Sweeps sweeps = matrix_sweep(m, k, a.row, a.column, row, scratch);
    if (m > FEW_ROWS || n * k <= MUCH) {
        float* packed = scratch.array<float>(panels.vectors * W * k);
        pack_whole(n, k, b, packed);
        return multiply({sweeps, a.column, a.data, c, packed, k, n, 1, 0, 0, bias, accumulate});
    }
    const Index room_of_one = (BLOCK_TERMS + 1) * TILE_VECTORS * W;
    float* room = scratch.array<float>(thread_count() * room_of_one);
    in_threads([&](int thread, int threads) {
        for (Index q = panels.count * thread / threads; q < panels.count * (thread + 1) / threads; ++q) {
            panel_product(sweeps.list[0], m, n, panels, q, a, b, bias, accumulate, c, row, room + thread * room_of_one);
        }
    });
}

}  // namespace hpctrain::HPCTRAIN_ISA
