// Softmax over the classes of each position, and its gradient; sums in double.
#include "losses.h"
#include "softmax_rows.h"

namespace hpctrain {
namespace {

constexpr Index TASK = 1 << 14;  // elements that a thread takes at a time

template <class S>
HPCTRAIN_CLONES void dx_narrow(Index rows, Index classes, const S* dy, Index dy_step, const S* y, Index y_step, S* out,
                               Index out_step) {
    alignas(64) double dot[ROWS], g[NARROW][ROWS], p[NARROW][ROWS];
    for (Index k = 0; k < classes; ++k) {
        for (Index r = 0; r < rows; ++r) g[k][r] = wide(dy[r * dy_step + k]), p[k][r] = wide(y[r * y_step + k]);
    }
    for (Index r = 0; r < rows; ++r) dot[r] = 0;
    for (Index k = 0; k < classes; ++k) {
        for (Index r = 0; r < rows; ++r) dot[r] += g[k][r] * p[k][r];
    }
    for (Index k = 0; k < classes; ++k) {
        for (Index r = 0; r < rows; ++r) out[r * out_step + k] = narrow<S>(p[k][r] * (g[k][r] - dot[r]));
    }
}

template <class S>
HPCTRAIN_CLONES void dx_wide(Index classes, const S* dy, const S* y, S* out) {
    const double dot = sum_of(classes, [=](Index k) { return wide(dy[k]) * wide(y[k]); });
#pragma GCC ivdep
    for (Index k = 0; k < classes; ++k) out[k] = narrow<S>(wide(y[k]) * (wide(dy[k]) - dot));
}

}  // namespace

template <class S>
void softmax(const Layout<2>& layout, Index classes, const S* x, S* out) {
    if (classes == 0) return;
    const Index size = layout.size(), chunk = std::max<Index>(1, TASK / classes);
    in_tasks(parts(size, chunk), size * classes, [&](Index task) {
        by_span(layout, task * chunk, std::min(size, (task + 1) * chunk), [&](Index count, auto& at) {
            const auto& step = layout.stride[size_t(layout.dims - 1)];
            softmax_rows(count, classes, x + at[0], step[0], out + at[1], step[1], [](auto...) {});
        });
    });
}

template <class S>
void softmax_dx(const Layout<3>& layout, Index classes, const S* dy, const S* y, S* out) {
    if (classes == 0) return;
    const Index size = layout.size(), chunk = std::max<Index>(1, TASK / classes);
    in_tasks(parts(size, chunk), size * classes, [&](Index task) {
        by_span(layout, task * chunk, std::min(size, (task + 1) * chunk), [&](Index count, auto& at) {
            const auto& step = layout.stride[size_t(layout.dims - 1)];
            const Index rows = classes <= NARROW ? ROWS : 1;
            for (Index r = 0; r < count; r += rows) {
                const S *g = dy + at[0] + r * step[0], *p = y + at[1] + r * step[1];
                S* to = out + at[2] + r * step[2];
                if (classes <= NARROW) {
                    dx_narrow(std::min(count - r, rows), classes, g, step[0], p, step[1], to, step[2]);
                } else {
                    dx_wide(classes, g, p, to);
                }
            }
        });
    });
}

#define HPCTRAIN_FOR(S)                                               \
    template void softmax<S>(const Layout<2>&, Index, const S*, S*); \
    template void softmax_dx<S>(const Layout<3>&, Index, const S*, const S*, S*);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)
HPCTRAIN_FOR(bf16)

}  // namespace hpctrain
