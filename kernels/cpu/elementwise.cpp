// Kernels whose output elements do not depend on each other: sums, products, ReLU, and normalization by given
// statistics. Loops say `ivdep` and not `restrict`: an output may be the very array that an input is.
#include <algorithm>

#include "kernels.h"
#include "runs.h"

namespace hpctrain {
namespace {

// Channel vectors are held in arrays of this many elements: narrow ones repeated side by side, so that rows of 3
// channels still fill vector registers, wide ones in tiles.
constexpr Index LANES = 256;

template <class T, int M>
using Vectors = T[M][LANES];

// Calls work(rows, width, offsets, row strides, vectors) until all rows of a layout are done, where vectors[m][i] is
// element m of value(c) for the channel c of element i of a row.
template <class T, int M, int N, class Value, class Work>
void by_rows(const Layout<N>& layout, Index channels, Value value, Work work) {
    const std::array<Index, N>& step = layout.stride[layout.dims - 1];
    bool dense = channels <= LANES;  // rows follow each other without gaps: several can be taken as one
    for (int i = 0; i < N; ++i) dense = dense && step[i] == channels;
    Vectors<T, M> vectors;
    for (Index first = 0; first < channels; first += LANES) {
        const Index width = std::min(channels - first, LANES);
        for (Index i = 0; i < width; ++i) {
            const std::array<T, M> values = value(first + i);
            for (int m = 0; m < M; ++m) vectors[m][i] = values[size_t(m)];
        }
        const Index group = dense ? std::min(LANES / width, layout.extent[layout.dims - 1]) : 1;
        for (int m = 0; m < M; ++m) {
            for (Index i = width; i < group * width; ++i) vectors[m][i] = vectors[m][i - width];
        }
        std::array<Index, N> strides = step;
        for (Index& stride : strides) stride *= group;
        for (Cursor<N> cursor(layout); cursor.left() > 0; cursor.skip(cursor.run())) {
            std::array<Index, N> offset = cursor.offset();
            for (Index& o : offset) o += first;
            const Index groups = cursor.run() / group, rest = cursor.run() % group;
            work(groups, group * width, offset, strides, vectors);
            for (int i = 0; i < N; ++i) offset[i] += groups * strides[i];
            if (rest) work(1, rest * width, offset, strides, vectors);
        }
    }
}

template <class T>
HPCTRAIN_CLONES void add_run(Index n, const T* a, const T* b, T* out) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

template <class T>
HPCTRAIN_CLONES void multiply_run(Index n, const T* a, const T* b, T* out) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) out[i] = a[i] * b[i];
}

template <class T>
HPCTRAIN_CLONES void relu_run(Index n, const T* x, T* out) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) out[i] = x[i] < 0 ? T(0) : x[i];  // NaN is not less: it stays
}

template <class T>
HPCTRAIN_CLONES void relu_dx_run(Index n, const T* dy, const T* y, T* out) {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) out[i] = y[i] > 0 ? dy[i] : T(0);
}

template <class T>
HPCTRAIN_CLONES void bias_add_rows(Index rows, Index width, T* y, Index y_step, const T* b) {
    for (Index r = 0; r < rows; ++r, y += y_step) {
#pragma GCC ivdep
        for (Index i = 0; i < width; ++i) y[i] += b[i];
    }
}

template <class T>
HPCTRAIN_CLONES void copy_rows(Index rows, Index width, T* out, Index out_step, const T* row) {
    for (Index r = 0; r < rows; ++r, out += out_step) {
#pragma GCC ivdep
        for (Index i = 0; i < width; ++i) out[i] = row[i];
    }
}

template <class T>
HPCTRAIN_CLONES void normalize_rows(Index rows, Index width, const T* x, Index x_step, T* out, Index out_step,
                                    const Vectors<T, 3>& v) {
    for (Index r = 0; r < rows; ++r, x += x_step, out += out_step) {
#pragma GCC ivdep
        for (Index i = 0; i < width; ++i) out[i] = (x[i] - v[0][i]) * v[1][i] + v[2][i];
    }
}

template <class T>
HPCTRAIN_CLONES void normalize_dx_rows(Index rows, Index width, const T* dy, Index dy_step, const T* x, Index x_step,
                                       T* out, Index out_step, const Vectors<T, 4>& v) {
    for (Index r = 0; r < rows; ++r, dy += dy_step, x += x_step, out += out_step) {
#pragma GCC ivdep
        for (Index i = 0; i < width; ++i) out[i] = dy[i] * v[1][i] - v[2][i] - (x[i] - v[0][i]) * v[3][i];
    }
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
void bias_add(const Layout<1>& layout, Index channels, T* y, const T* b) {
    const auto value = [=](Index c) { return std::array<T, 1>{b[c]}; };
    by_rows<T, 1>(layout, channels, value, [=](Index rows, Index width, auto& at, auto& step, auto& v) {
        bias_add_rows(rows, width, y + at[0], step[0], v[0]);
    });
}

template <class T>
void spread_positions(const Layout<1>& layout, Index channels, const T* dy, T* out, T scale) {
    const auto value = [=](Index c) { return std::array<T, 1>{scale * dy[c]}; };
    by_rows<T, 1>(layout, channels, value, [=](Index rows, Index width, auto& at, auto& step, auto& v) {
        copy_rows(rows, width, out + at[0], step[0], v[0]);
    });
}

template <class T>
void normalize(const Layout<2>& layout, Index channels, const T* x, const double* mean, const double* rstd,
               const T* gamma, const T* beta, T* out) {
    const auto value = [=](Index c) { return std::array<T, 3>{T(mean[c]), T(rstd[c] * double(gamma[c])), beta[c]}; };
    by_rows<T, 3>(layout, channels, value, [=](Index rows, Index width, auto& at, auto& step, auto& v) {
        normalize_rows<T>(rows, width, x + at[0], step[0], out + at[1], step[1], v);
    });
}

template <class T>
void normalize_dx(const Layout<3>& layout, Index channels, const T* dy, const T* x, const double* mean,
                  const double* rstd, const T* gamma, const double* mean_g, const double* mean_g_xhat, T* out) {
    const auto value = [=](Index c) {
        return std::array<T, 4>{T(mean[c]), T(rstd[c] * double(gamma[c])), T(rstd[c] * mean_g[c]),
                                T(rstd[c] * rstd[c] * mean_g_xhat[c])};
    };
    by_rows<T, 4>(layout, channels, value, [=](Index rows, Index width, auto& at, auto& step, auto& v) {
        normalize_dx_rows<T>(rows, width, dy + at[0], step[0], x + at[1], step[1], out + at[2], step[2], v);
    });
}

#define HPCTRAIN_FOR(T)                                                                                                \
    template void add<T>(const Layout<3>&, const T*, const T*, T*);                                                    \
    template void multiply<T>(const Layout<3>&, const T*, const T*, T*);                                               \
    template void relu<T>(const Layout<2>&, const T*, T*);                                                             \
    template void relu_dx<T>(const Layout<3>&, const T*, const T*, T*);                                                \
    template void bias_add<T>(const Layout<1>&, Index, T*, const T*);                                                  \
    template void spread_positions<T>(const Layout<1>&, Index, const T*, T*, T);                                       \
    template void normalize<T>(const Layout<2>&, Index, const T*, const double*, const double*, const T*, const T*,    \
                               T*);                                                                                    \
    template void normalize_dx<T>(const Layout<3>&, Index, const T*, const T*, const double*, const double*, const T*, \
                                  const double*, const double*, T*);
HPCTRAIN_FOR(float)
HPCTRAIN_FOR(double)

}  // namespace hpctrain
