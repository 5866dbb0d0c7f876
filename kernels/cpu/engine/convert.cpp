// Blocks of arrays of bfloat16 to floats and back, row by row.
#include "bf16_simd.h"
#include "isa.h"
#include "runs_of_rows.h"

namespace hpctrain::HPCTRAIN_ISA {
namespace {

template <class From, class To>
inline void convert(const From* from, To* to, Index n) {
    Index i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i, int(n - i)), int(n - i));
}

}  // namespace

void widen(const Rows& rows, const Bf16* array, float* copy) {
    each_run(rows, [=](Index from, Index to, Index n) { convert(array + from, copy + to, n); });
}

void narrow(const Rows& rows, const float* copy, Bf16* array) {
    each_run(rows, [=](Index to, Index from, Index n) { convert(copy + from, array + to, n); });
}

void add(const Rows& rows, const float* copy, float* array) {
    each_run(rows, [=](Index to, Index from, Index n) {
        for (Index i = 0; i < n; ++i) array[to + i] += copy[from + i];
    });
}

}  // namespace hpctrain::HPCTRAIN_ISA
