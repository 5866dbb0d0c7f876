// Softmax and losses. S is the type that predictions are stored in; weights, losses and probabilities are
// Real<S>. Same meaning, argument order and names as hpctrain/backends/base.py.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hpctrain {

// Whole numbers of any type, read as Index.
struct Labels {
    enum class Type { i8, i16, i32, i64, u8, u16, u32, u64 };
    Type type;
    const void* data;

    // The labels at offset, offset + step, ...
    void read(Index count, Index offset, Index step, Index* to) const;
};

// `samples` times the positions of a layout, of arrays whose samples lie `sample[i]` elements apart.
template <int N>
struct Samples {
    Index count = 0;
    std::array<Index, N> step{};
    Layout<N> inside;
};

// --- softmax.cpp: rows of `classes` contiguous elements at each position ---

template <class S>
void softmax(const Layout<2>& rows, Index classes, const S* x, S* out);
template <class S>
void softmax_dx(const Layout<3>& rows, Index classes, const S* dy, const S* y, S* out);

// --- cross_entropy.cpp: layouts of logits, labels and probability; of probability, labels and out ---

template <class S>
void cross_entropy(const Samples<3>& rows, Index classes, const S* logits, const Labels& labels, const Real<S>* weight,
                   double smoothing, Real<S>* loss, Index loss_step, Real<S>* probability);
template <class S>
void cross_entropy_dx(const Samples<3>& rows, Index classes, const Real<S>* probability, const Labels& labels,
                      const Real<S>* weight, double smoothing, const Real<S>* scale, Index scale_step, S* out);
// Per sample three numbers, `step` apart: the weight of what counts, how often the largest logit is the label's, and
// how much counts.
template <class S>
void label_scores(const Samples<2>& rows, Index classes, const S* logits, const Labels& labels, const Real<S>* weight,
                  Real<S>* const (&scores)[3], const Index (&steps)[3]);

// --- pointwise.cpp: layouts of x and target; of x, target and out ---

enum class Loss { squared, absolute, huber, logistic, agreement };

template <class S>
void pointwise_loss(Loss kind, const Samples<2>& elements, const S* x, const S* target, Real<S>* loss, Index loss_step,
                    double delta);
template <class S>
void pointwise_loss_dx(Loss kind, const Samples<3>& elements, const S* x, const S* target, const Real<S>* scale,
                       Index scale_step, S* out, double delta);

}  // namespace hpctrain
