// A linear layer of one episode's MLP, forward and backward, with the activation and the descent in the same pass.
// Letters: n rows, I and O features into and out of the layer, whose weight is [O, I]. Null leaves out.
#pragma once

#include "products.h"

namespace mdml {

struct Size {
  int64_t n, n_in, n_out;
};

// out [n, O] = rows [n, I] W^T + bias, rectified if asked, kept as Out does. The weight comes turned.
template <class Kind, class Out>
static inline void layer_forward(const Size& size, const typename Kind::Stored* rows,
                                 const typename Kind::Entry* turned, const float* bias, bool rectify,
                                 typename Out::Stored* out) {
  using Entry = typename Kind::Entry;
  const Operands<Kind> of = {reinterpret_cast<const Entry*>(rows), turned, Kind::depth(size.n_in), 1,
                             padded(size.n_out), Kind::depth(size.n_in)};
  product(of, size.n, size.n_out, [=](int64_t i, int64_t j, Floats sums, int64_t left) INLINE {
    if (bias) sums += load_some(bias + j, left, 0.0f);
    if (rectify) sums = sums < 0.0f ? all(0.0f) : sums;
    Out::store(out + i * size.n_out + j, sums, left);
  });
}

// out [n, I] = grad [n, O] W, zero where below [n, I] is not positive. The weight comes stacked.
template <class Kind>
static inline void layer_pull(const Size& size, const typename Kind::Stored* grad,
                              const typename Kind::Entry* stacked, const typename Kind::Stored* below,
                              typename Kind::Stored* out) {
  using Entry = typename Kind::Entry;
  const Operands<Kind> of = {reinterpret_cast<const Entry*>(grad), stacked, Kind::depth(size.n_out), 1,
                             padded(size.n_in), Kind::depth(size.n_out)};
  product(of, size.n, size.n_in, [=](int64_t i, int64_t j, Floats sums, int64_t left) INLINE {
    if (below) sums = Kind::load(below + i * size.n_in + j, left) <= 0.0f ? all(0.0f) : sums;
    Kind::store(out + i * size.n_in + j, sums, left);
  });
}

// A weight [O, I] and a bias [O].
template <class Value>
struct Layer {
  Value *weight, *bias;
};

// next = last (null: 0) + factor * (grad^T rows, sum of grad); last may be next. The rows come stacked.
template <class Kind>
static inline void layer_step(const Size& size, const typename Kind::Stored* grad, const typename Kind::Entry* stacked,
                              float factor, Layer<const float> last, Layer<float> next) {
  static thread_local Buffer<typename Kind::Entry> grads;
  const auto* a = Kind::stacked(grad, size.n, size.n_out, grads);
  const Operands<Kind> of = {a, stacked, 1, padded(size.n_out), padded(size.n_in), Kind::depth(size.n)};
  product(of, size.n_out, size.n_in, [=](int64_t i, int64_t j, Floats sums, int64_t left) INLINE {
    sums *= factor;
    if (last.weight) sums += load_some(last.weight + i * size.n_in + j, left, 0.0f);
    store_some(next.weight + i * size.n_in + j, sums, left);
  });
  if (!next.bias) return;
  const Operands<Kind> ones = {&Kind::one, a, 0, 0, padded(size.n_out), Kind::depth(size.n)};
  product(ones, 1, size.n_out, [=](int64_t, int64_t j, Floats sums, int64_t left) {
    sums *= factor;
    if (last.bias) sums += load_some(last.bias + j, left, 0.0f);
    store_some(next.bias + j, sums, left);
  });
}

}  // namespace mdml
