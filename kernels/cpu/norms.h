// Normalization whose statistics are not one number per channel: they broadcast against x. S is the type that
// tensors are stored in, gamma and beta are Real<S>, statistics double. Same meaning, argument order and names as
// hpctrain/backends/base.py.
#pragma once

#include "kernels.h"

namespace hpctrain {

// Sums into each element of a tensor of statistics. Layouts: of x (dy and x, and what normalizes these), then of the
// sums, for the dims that they have; without the sums for the dims that are summed.
template <int N>
struct Reduction {
    Layout<N + 1> kept;
    Layout<N> summed;
    // Elements along the last dim, which is not in the layouts, where the sums have it; 0 where it is summed, too.
    Index columns = 0;
};

// --- norm_sums.cpp ---

template <class S>
void moments_of(const Reduction<1>& over, const S* x, double* mean, double* m2);
// `each` says whether mean and rstd have the last dim.
template <class S>
void normalize_grad_of(const Reduction<3>& over, bool each, const S* dy, const S* x, const double* mean,
                       const double* rstd, double* sum_dy, double* sum_dy_xhat);

// --- norm_rows.cpp ---

// Layouts: x, add, out, mean and rstd, gamma and beta; dy, x, out, mean and rstd, gamma, both means. The last dim, of
// `n` contiguous elements, is not in them; `each_*` says which of the statistics, of gamma, of both means have it.
// `add` may be null.
template <class S>
void normalize_by(const Layout<5>& rows, Index n, bool each_statistic, bool each_gamma, const S* x, const S* add,
                  const double* mean, const double* rstd, const Real<S>* gamma, const Real<S>* beta, double slope,
                  S* out);
template <class S>
void normalize_dx_by(const Layout<6>& rows, Index n, bool each_statistic, bool each_gamma, bool each_mean, const S* dy,
                     const S* x, const double* mean, const double* rstd, const Real<S>* gamma, const double* mean_g,
                     const double* mean_g_xhat, S* out);

}  // namespace hpctrain
