// A linear layer of an MLP for many episodes, forward and backward, with the activation and the descent in one pass.
// Letters: n rows, I and O features into and out of the layer. Strides are from one episode to the next; 0 shares.
#include "products.h"

namespace mdml {
namespace {

thread_local std::vector<float> scratch;

Floats rectified(Floats x) { return x < 0.0f ? all(0.0f) : x; }

}  // namespace

extern "C" {

// out [n, O] = rows [n, I] W^T + bias, rectified if asked, of the episodes from `begin` to `end`. W is [O, I].
void mdml_layer_forward(int64_t begin, int64_t end, int64_t n, int64_t n_in, int64_t n_out, const float* rows,
                        const float* weight, int64_t weight_stride, const float* bias, int64_t bias_stride,
                        int64_t rectify, float* out) {
  scratch.resize(n_in * padded(n_out));
  for (int64_t e = begin; e < end; ++e) {
    if (e == begin || weight_stride)
      transpose(reinterpret_cast<const int32_t*>(weight + e * weight_stride), n_out, n_in,
                reinterpret_cast<int32_t*>(scratch.data()));
    const Operands<Singles> of = {rows + e * n * n_in, scratch.data(), n_in, 1, padded(n_out), n_in};
    const float* shift = bias ? bias + e * bias_stride : nullptr;
    float* to = out + e * n * n_out;
    product(of, n, n_out, [=](int64_t i, int64_t j, Floats sums, int64_t left) {
      if (shift) sums += load_some(shift + j, left, 0.0f);
      store_some(to + i * n_out + j, rectify ? rectified(sums) : sums, left);
    });
  }
}

// out [n, I] = grad [n, O] W, zero where below [n, I] (null: nowhere) is not positive.
void mdml_layer_pull(int64_t begin, int64_t end, int64_t n, int64_t n_in, int64_t n_out, const float* grad,
                     const float* weight, int64_t weight_stride, const float* below, float* out) {
  const float* b = nullptr;
  for (int64_t e = begin; e < end; ++e) {
    if (e == begin || weight_stride) b = whole_vectors(weight + e * weight_stride, n_out, n_in, scratch);
    const Operands<Singles> of = {grad + e * n * n_out, b, n_out, 1, padded(n_in), n_out};
    const float* active = below ? below + e * n * n_in : nullptr;
    float* to = out + e * n * n_in;
    product(of, n, n_in, [=](int64_t i, int64_t j, Floats sums, int64_t left) {
      if (active) sums = load_some(active + i * n_in + j, left, 0.0f) <= 0.0f ? all(0.0f) : sums;
      store_some(to + i * n_in + j, sums, left);
    });
  }
}

// new_weight [O, I] = weight (null: 0) + factor * grad^T rows, and new_bias [O] likewise (null: none).
void mdml_layer_step(int64_t begin, int64_t end, int64_t n, int64_t n_in, int64_t n_out, const float* grad,
                     const float* rows, float factor, const float* weight, int64_t weight_stride, float* new_weight,
                     const float* bias, int64_t bias_stride, float* new_bias) {
  for (int64_t e = begin; e < end; ++e) {
    const float* g = grad + e * n * n_out;
    const float* b = whole_vectors(rows + e * n * n_in, n, n_in, scratch);
    const Operands<Singles> of = {g, b, 1, n_out, padded(n_in), n};
    const float* old = weight ? weight + e * weight_stride : nullptr;
    float* to = new_weight + e * n_out * n_in;
    product(of, n_out, n_in, [=](int64_t i, int64_t j, Floats sums, int64_t left) {
      sums *= factor;
      if (old) sums += load_some(old + i * n_in + j, left, 0.0f);
      store_some(to + i * n_in + j, sums, left);
    });
    if (!new_bias) continue;
    for (int64_t j = 0; j < n_out; j += W) {
      Floats sums = {};
      for (int64_t i = 0; i < n; ++i) sums += load_some(g + i * n_out + j, n_out - j, 0.0f);
      sums *= factor;
      if (bias) sums += load_some(bias + e * bias_stride + j, n_out - j, 0.0f);
      store_some(new_bias + e * n_out + j, sums, n_out - j);
    }
  }
}

}  // extern "C"
}  // namespace mdml
