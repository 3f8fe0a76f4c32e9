// A linear layer of one episode's MLP, forward and backward, with the activation and the descent in the same pass.
// Letters: n rows, I and O features into and out of the layer, whose weight is [O, I].
#pragma once

#include "products.h"

namespace mdml {

struct Size {
  int64_t n, n_in, n_out;
};

using Scratch = std::vector<float>;

// W^T, for `layer_forward`.
static inline const float* turned_weight(const float* weight, const Size& size, Scratch& scratch) {
  scratch.resize(size.n_in * padded(size.n_out));
  transpose(reinterpret_cast<const int32_t*>(weight), size.n_out, size.n_in, reinterpret_cast<int32_t*>(scratch.data()));
  return scratch.data();
}

// out [n, O] = rows [n, I] W^T + bias (null: none), rectified if asked.
static inline void layer_forward(const Size& size, const float* rows, const float* turned, const float* bias,
                                 bool rectify, float* out) {
  const Operands<Singles> of = {rows, turned, size.n_in, 1, padded(size.n_out), size.n_in};
  product(of, size.n, size.n_out, [=](int64_t i, int64_t j, Floats sums, int64_t left) {
    if (bias) sums += load_some(bias + j, left, 0.0f);
    if (rectify) sums = sums < 0.0f ? all(0.0f) : sums;
    store_some(out + i * size.n_out + j, sums, left);
  });
}

// out [n, I] = grad [n, O] W, zero where below [n, I] (null: nowhere) is not positive. W's rows as `whole_vectors`.
static inline void layer_pull(const Size& size, const float* grad, const float* weight, const float* below,
                              float* out) {
  const Operands<Singles> of = {grad, weight, size.n_out, 1, padded(size.n_in), size.n_out};
  product(of, size.n, size.n_in, [=](int64_t i, int64_t j, Floats sums, int64_t left) {
    if (below) sums = load_some(below + i * size.n_in + j, left, 0.0f) <= 0.0f ? all(0.0f) : sums;
    store_some(out + i * size.n_in + j, sums, left);
  });
}

// A weight [O, I] and a bias [O]; null: none.
template <class Value>
struct Layer {
  Value *weight, *bias;
};

// next = last + factor * (grad^T rows, sum of grad); last may be next, or null for 0. The rows as `whole_vectors`.
static inline void layer_step(const Size& size, const float* grad, const float* rows, float factor,
                              Layer<const float> last, Layer<float> next) {
  const Operands<Singles> of = {grad, rows, 1, size.n_out, padded(size.n_in), size.n};
  product(of, size.n_out, size.n_in, [=](int64_t i, int64_t j, Floats sums, int64_t left) {
    sums *= factor;
    if (last.weight) sums += load_some(last.weight + i * size.n_in + j, left, 0.0f);
    store_some(next.weight + i * size.n_in + j, sums, left);
  });
  if (!next.bias) return;
  for (int64_t j = 0; j < size.n_out; j += W) {
    const int64_t left = size.n_out - j;
    Floats sums = {};
    for (int64_t i = 0; i < size.n; ++i) sums += load_some(grad + i * size.n_out + j, left, 0.0f);
    sums *= factor;
    if (last.bias) sums += load_some(last.bias + j, left, 0.0f);
    store_some(next.bias + j, sums, left);
  }
}

}  // namespace mdml
