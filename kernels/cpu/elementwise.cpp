// Kernels that take each element by itself: sums, products, ReLU. Loops say `ivdep` and not `restrict`: an output may
// be the very array that an input is.
#include "kernels.h"
#include "runs.h"

namespace hpctrain {
namespace {

template <class T>
HPCTRAIN_CLONES void add_run(Index n, const T* a, const T* b, T* out) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) out[i] = store<T>(load(a[i]) + load(b[i]));
}

template <class T>
HPCTRAIN_CLONES void multiply_run(Index n, const T* a, const T* b, T* out) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) out[i] = store<T>(load(a[i]) * load(b[i]));
}

template <class T>
HPCTRAIN_CLONES void relu_run(Index n, const T* x, T* out) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) out[i] = keep(!below_zero(x[i]), x[i]);  // NaN is not less: it stays
}

template <class T>
HPCTRAIN_CLONES void relu_dx_run(Index n, const T* dy, const T* y, T* out) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) out[i] = keep(above_zero(y[i]), dy[i]);
}

template <class T>
HPCTRAIN_CLONES void leaky_dx_run(Index n, T* dy, const T* y, Real<T> slope) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) dy[i] = store<T>(load(y[i]) > 0 ? load(dy[i]) : slope * load(dy[i]));
}

}  // namespace

template <class T>
void add(const Layout<3>& layout, const T* a, const T* b, T* out) {
    by_runs(layout, [=](Index n, auto& at) { add_run(n, a + at[0], b + at[1], out + at[2]); });
}

template <class T>
void multiply(const Layout<3>& layout, const T* a, const T* b, T* out) {
    by_runs(layout, [=](Index n, auto& at) { multiply_run(n, a + at[0], b + at[1], out + at[2]); });
}

template <class T>
void relu(const Layout<2>& layout, const T* x, T* out) {
    by_runs(layout, [=](Index n, auto& at) { relu_run(n, x + at[0], out + at[1]); });
}

template <class T>
void relu_dx(const Layout<3>& layout, const T* dy, const T* y, T* out) {
    by_runs(layout, [=](Index n, auto& at) { relu_dx_run(n, dy + at[0], y + at[1], out + at[2]); });
}

template <class T>
void activation_grad(const Layout<2>& layout, T* dy, const T* y, double slope) {
    by_runs(layout, [=](Index n, auto& at) { mask_run(n, dy + at[0], y + at[1], slope); });
}

template <class T>
void mask_run(Index n, T* dy, const T* y, double slope) {
    slope == 0 ? relu_dx_run<T>(n, dy, y, dy) : leaky_dx_run<T>(n, dy, y, Real<T>(slope));
}

#define HPCTRAIN_FOR(T)                                                       \
    template void add<T>(const Layout<3>&, const T*, const T*, T*);           \
    template void multiply<T>(const Layout<3>&, const T*, const T*, T*);      \
    template void relu<T>(const Layout<2>&, const T*, T*);                    \
    template void relu_dx<T>(const Layout<3>&, const T*, const T*, T*);       \
    template void activation_grad<T>(const Layout<2>&, T*, const T*, double); \
    template void mask_run<T>(Index, T*, const T*, double);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)
HPCTRAIN_FOR(bf16)

}  // namespace hpctrain
