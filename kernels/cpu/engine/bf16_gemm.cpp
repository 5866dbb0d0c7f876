#include <algorithm>

#include "bf16.h"
#include "scratch.h"

namespace hpctrain {
namespace {

constexpr Index BLOCK = 256, BLOCK_TERMS = 1024;  // rows and columns, and terms, of products of converted blocks

// Rows [row, row + rows) and columns alike of a matrix, as floats.
Matrix block_of(const Engine& e, Bf16Matrix a, Index row, Index rows, Index column, Index columns, float* room) {
    const Bf16* from = a.data + (row * a.row + column * a.column);
    const bool turned = a.column != 1;
    const Index lines = turned ? columns : rows, length = turned ? rows : columns, step = turned ? a.column : a.row;
    e.widen({1, {1, 1, lines}, length, {0, 0, 0, step}, {0, 0, 0, length}}, from, room);
    return turned ? Matrix{room, 1, length} : Matrix{room, length, 1};
}

// Calls store(row, rows, column, columns, sums) for blocks of the product.
template <class Store>
void multiply(Index m, Index n, Index k, Bf16Matrix a, Bf16Matrix b, const Epilogue& epilogue, Store store) {
    const Engine& e = engine();
    Scratch scratch;
    float* left = scratch.array<float>(BLOCK * BLOCK_TERMS);
    float* right = scratch.array<float>(BLOCK * BLOCK_TERMS);
    float* sums = scratch.array<float>(BLOCK * BLOCK);
    for (Index column = 0; column < n; column += BLOCK) {
        const Index columns = std::min(BLOCK, n - column);
        for (Index row = 0; row < m; row += BLOCK) {
            const Index rows = std::min(BLOCK, m - row);
            for (Index term = 0; term < k || term == 0; term += BLOCK_TERMS) {
                const Index terms = std::min(BLOCK_TERMS, k - term);
                Epilogue part{nullptr, term > 0, term + terms == k ? epilogue.slope : 1};
                if (term == 0 && epilogue.bias) part.bias = epilogue.bias + column;
                e.gemm(rows, columns, terms, block_of(e, a, row, rows, term, terms, left),
                       block_of(e, b, term, terms, column, columns, right), part, sums, columns);
            }
            store(e, Rows{1, {1, 1, rows}, columns, {}, {0, 0, 0, columns}}, row, column, sums);
        }
    }
}

// (k, lines) as pairs of rows: ceil(k / 2) rows of pairs.
const float* paired_rows(const Pairs& pairs, const Bf16* a, Index k, Index n, Index row, Scratch& scratch) {
    float* words = scratch.array<float>((k + 1) / 2 * n);
    const Rows rows{1, {1, 1, k / 2}, n, {0, 0, 0, 2 * row}, {0, 0, 0, n}};
    pairs.pair(rows, a, a + row, words);
    if (k % 2) pairs.pair({1, {1, 1, 1}, n, {}, {}}, a + (k - 1) * row, nullptr, words + k / 2 * n);
    return words;
}

// A factor of which terms are pairs. The terms of `a` run along its columns.
Matrix paired_factor(const Pairs& pairs, Bf16Matrix a, Index rows, Index k, Scratch& scratch) {
    if (a.column != 1) return {paired_rows(pairs, a.data, k, rows, a.column, scratch), 1, rows};
    if (k % 2 == 0 && a.row % 2 == 0) return {reinterpret_cast<const float*>(a.data), a.row / 2, 1};
    const Index width = (k + 1) / 2;
    float* words = scratch.array<float>(rows * width);
    pairs.pad({1, {1, 1, rows}, k, {0, 0, 0, a.row}, {0, 0, 0, 2 * width}}, a.data, reinterpret_cast<Bf16*>(words));
    return {words, width, 1};
}

constexpr Index FEW_ROWS = 192;         // of A
constexpr Index MUCH = Index(1) << 17;  // pairs of B that are made at a time
constexpr Index WIDE = 2048;           // columns of B of which they are

void gemm_in_pairs(const Pairs& pairs, Index m, Index n, Index k, Bf16Matrix a, Bf16Matrix b, const Epilogue& epilogue,
                   float* c, Index row) {
    Scratch scratch;
    const Matrix left = paired_factor(pairs, a, m, k, scratch);
    const auto product = [&](Index first, Index terms, Index column, Index columns, Scratch& room) {
        const Bf16Matrix part{b.data + (first * b.row + column * b.column), b.row, b.column};
        const Matrix right = paired_factor(pairs, {part.data, part.column, part.row}, columns, terms, room);
        Epilogue some{nullptr, epilogue.accumulate || first > 0, first + terms == k ? epilogue.slope : 1};
        if (first == 0 && epilogue.bias) some.bias = epilogue.bias + column;
        pairs.gemm(m, columns, (terms + 1) / 2, {left.data + first / 2 * left.column, left.row, left.column},
                   {right.data, right.column, right.row}, some, c + column, row);
    };
    if (m > FEW_ROWS || n * k <= 4 * MUCH || b.column != 1) return product(0, k, 0, n, scratch);
    for (Index column = 0; column < n; column += WIDE) {  // B is large: pairs are made of some rows at a time
        const Index columns = std::min(WIDE, n - column), terms = (MUCH / columns + 1) * 2;
        for (Index first = 0; first < k; first += terms) {
            Scratch room;
            product(first, std::min(terms, k - first), column, columns, room);
        }
    }
}

// Calls store(first row, rows, sums) for blocks of rows of the product, of which the sums stay in the cache.
template <class Store>
void by_rows(Index m, Index n, Store store) {
    constexpr Index MOST = Index(1) << 18;
    const Index at_once = std::max<Index>(FEW_ROWS, MOST / std::max<Index>(1, n));
    for (Index i = 0; i < m; i += at_once) store(i, std::min(at_once, m - i));
}

}  // namespace

void gemm(Index m, Index n, Index k, Bf16Matrix a, Bf16Matrix b, const Epilogue& epilogue, Bf16* c, Index c_row) {
    const Engine& e = engine();
    if (e.pairs && k > 0) {
        return by_rows(m, n, [&](Index first, Index rows) {
            Scratch scratch;
            float* sums = scratch.array<float>(rows * n);
            gemm_in_pairs(*e.pairs, rows, n, k, {a.data + first * a.row, a.row, a.column}, b, epilogue, sums, n);
            e.narrow({1, {1, 1, rows}, n, {0, 0, 0, c_row}, {0, 0, 0, n}}, sums, c + first * c_row);
        });
    }
    multiply(m, n, k, a, b, epilogue, [=](const Engine& e, Rows rows, Index row, Index column, const float* sums) {
        rows.array[3] = c_row;
        e.narrow(rows, sums, c + (row * c_row + column));
    });
}

void gemm(Index m, Index n, Index k, Bf16Matrix a, Bf16Matrix b, const Epilogue& epilogue, float* c, Index c_row) {
    const Engine& e = engine();
    if (e.pairs && k > 0) return gemm_in_pairs(*e.pairs, m, n, k, a, b, epilogue, c, c_row);
    multiply(m, n, k, a, b, epilogue, [=](const Engine&, Rows rows, Index row, Index column, const float* sums) {
        for (Index i = 0; i < rows.extent[2]; ++i)
            std::copy_n(sums + i * rows.channels, rows.channels, c + ((row + i) * c_row + column));
    });
}

}  // namespace hpctrain
