// Matrix products. B is packed: in whole, or where it is large and few rows use it, piece by piece just before.
#include "isa.h"
#include "sweep.h"
#include "threads.h"

namespace hpctrain::HPCTRAIN_ISA {
namespace {

constexpr Index FEW_ROWS = 192;  // of A
// Floats of B that need not stay in the cache.
#ifdef HPCTRAIN_PAIRS
constexpr Index MUCH = 1 << 15;  // parts of B are made just before
#else
constexpr Index MUCH = 1 << 18;
#endif

constexpr Index ROOM = (BLOCK_TERMS + 1) * TILE_VECTORS * W;  // of a packed block

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

// The widest panels for which tiles of m rows waste least.
int best_width(Index m) {
    int best = TILE_VECTORS;
    const auto rows = [m](int vectors) {
        return (m + tile_rows(vectors) - 1) / tile_rows(vectors) * tile_rows(vectors);
    };
    for (int vectors = TILE_VECTORS - 1; vectors >= TILE_VECTORS - 1 && vectors > 0; --vectors) {
        if (rows(vectors) < rows(best)) best = vectors;
    }
    return best;
}

struct Operands {
    Index m, n;
    Matrix a, b;
    Epilogue epilogue;
    float* c;
    Index row;
};

// A block of rows of a panel of B, and where it is packed.
struct Block {
    Index panel, number;
    Run terms;
    float* packed;
};

// Packs vector j of a block.
Copy packing(const Operands& o, const Panels& panels, const Block& block, int j) {
    const Index column = (panels.first(block.panel) + j) * W;
    const int vectors = panels.size(block.panel);
    return {o.b.data + block.terms.b * o.b.row + column,   o.b.row, block.packed + j * W, vectors * W, block.terms.n,
            j + 1 < vectors ? W : panels.tail(block.panel)};
}

// All rows of C by a packed block, of which columns are contiguous; packs the next one.
template <int N>
void block_product(const Operands& o, const Panels& panels, const Block& block, Index blocks, const Block* next) {
    constexpr int M = tile_rows(N);
    const Index column = panels.first(block.panel) * W;
    const Run run{block.terms.a, 0, block.terms.n};
    const Target open = target_of(o.epilogue, column, block.number, blocks);
    int packed = 0;  // vectors of the next block
    for (Index i = 0; i < o.m; i += M) {
        const float* a[M];
        float* c[M];
        for (int r = 0; r < M; ++r) {
            a[r] = o.a.data + least(i + r, o.m - 1) * o.a.row;
            c[r] = o.c + least(i + r, o.m - 1) * o.row;
        }
        const Target target = open.of(int(least(M, o.m - i)), panels.tail(block.panel));
        if (next && packed < panels.size(next->panel)) {
            Copy copy = packing(o, panels, *next, packed++);
            tile<N>(a, c, column, Runs{&run, 1}, o.a.column, block.packed, target, copy);
            while (copy.left) copy.step();
        } else {
            tile<N>(a, c, column, Runs{&run, 1}, o.a.column, block.packed, target);
        }
    }
    for (; next && packed < panels.size(next->panel); ++packed) {
        for (Copy copy = packing(o, panels, *next, packed); copy.left;) copy.step();
    }
}

// Panels [first, last) of C; `rooms` for two blocks.
void few_rows(const Operands& o, const Sweep& sweep, const Panels& panels, Index first, Index last, float* rooms) {
    const Index blocks = sweep.block_count;
    const auto block = [&](Index i) {  // of all in turn
        return Block{first + i / blocks, i % blocks, sweep.blocks[i % blocks].list[0], rooms + i % 2 * ROOM};
    };
    for (Index i = 0, count = (last - first) * blocks; i < count; ++i) {
        const Block now = block(i), next = block(least(i + 1, count - 1));
        for (int j = 0; i == 0 && j < panels.size(first); ++j) {
            for (Copy copy = packing(o, panels, now, j); copy.left;) copy.step();
        }
        with_vectors(panels.size(now.panel), [&](auto vectors) {
            block_product<decltype(vectors)::count>(o, panels, now, blocks, i + 1 < count ? &next : nullptr);
        });
    }
}

// c (m, n) = epilogue(transposed t (n, m))
void turn(const Operands& o, const float* t, Index t_row) {
    in_threads([&](int thread, int threads) {
        const Index blocks = (o.n + W - 1) / W;
        for (Index j = blocks * thread / threads * W; j < least(o.n, blocks * (thread + 1) / threads * W); j += W) {
            const int columns = int(least(W, o.n - j));
            const V bias = o.epilogue.bias ? load(o.epilogue.bias + j, columns) : V{};
            for (Index i = 0; i < o.m; i += W) {
                V block[W];
                for (int k = 0; k < W; ++k) block[k] = k < columns ? load(t + (j + k) * t_row + i) : V{};
                transpose(block);
                for (Index k = 0; k < least(W, o.m - i); ++k) {
                    float* c = o.c + (i + k) * o.row + j;
                    V sum = o.epilogue.bias ? block[k] + bias : block[k];
                    if (o.epilogue.accumulate) sum += load(c, columns);
                    store(c, rectified(sum, o.epilogue.slope), columns);
                }
            }
        }
    });
}

}  // namespace

void gemm(Index m, Index n, Index k, Matrix a, Matrix b, const Epilogue& epilogue, float* c, Index row) {
    if (m == 0 || n == 0) return;
    Scratch scratch;
    const Operands o{m, n, a, b, epilogue, c, row};
    if (m <= FEW_ROWS && n > FEW_ROWS && n * k > MUCH && b.column != 1) {  // columns of B as they lie are rows of A
        const Index t_row = Panels(m).vectors * W;
        float* t = scratch.array<float>(n * t_row);
        gemm(n, m, k, {b.data, b.column, b.row}, {a.data, a.column, a.row}, {}, t, t_row);
        return turn(o, t, t_row);
    }
    const Sweeps sweeps = matrix_sweep(m, k, a.row, a.column, row, TERMS, scratch);
    if (m > FEW_ROWS || n * k <= MUCH || b.column != 1) {
        float* packed = scratch.array<float>(Panels(n).vectors * W * k);
        pack_whole(n, k, b, packed);
        return multiply({sweeps, a.column, a.data, c, packed, k, n, 1, 0, 0, epilogue});
    }
    const Panels panels(n, best_width(m));
    float* rooms = scratch.array<float>(thread_count() * 2 * ROOM);
    in_threads([&](int thread, int threads) {
        few_rows(o, sweeps.list[0], panels, panels.count * thread / threads, panels.count * (thread + 1) / threads,
                 rooms + thread * 2 * ROOM);
    });
}

}  // namespace hpctrain::HPCTRAIN_ISA
