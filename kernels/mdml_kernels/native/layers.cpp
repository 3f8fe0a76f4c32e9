// The layers of `layer.h` for tensors of many episodes. Strides are from one episode to the next; 0 shares.
#include "layer.h"

namespace mdml {
namespace {

thread_local Buffer<float> buffer;

}  // namespace

extern "C" {

void mdml_layer_forward(int64_t begin, int64_t end, int64_t n, int64_t n_in, int64_t n_out, const float* rows,
                        const float* weight, int64_t weight_stride, const float* bias, int64_t bias_stride,
                        int64_t rectify, float* out) {
  const float* turned = nullptr;
  for (int64_t e = begin; e < end; ++e) {
    if (!turned || weight_stride) turned = Singles::turned(weight + e * weight_stride, n_out, n_in, buffer);
    layer_forward<Singles, Singles>({n, n_in, n_out}, rows + e * n * n_in, turned, bias ? bias + e * bias_stride : nullptr,
                                    rectify, out + e * n * n_out);
  }
}

void mdml_layer_pull(int64_t begin, int64_t end, int64_t n, int64_t n_in, int64_t n_out, const float* grad,
                     const float* weight, int64_t weight_stride, const float* below, float* out) {
  const float* stacked = nullptr;
  for (int64_t e = begin; e < end; ++e) {
    if (!stacked || weight_stride) stacked = Singles::stacked(weight + e * weight_stride, n_out, n_in, buffer);
    layer_pull<Singles>({n, n_in, n_out}, grad + e * n * n_out, stacked, below ? below + e * n * n_in : nullptr,
                        out + e * n * n_in);
  }
}

void mdml_layer_step(int64_t begin, int64_t end, int64_t n, int64_t n_in, int64_t n_out, const float* grad,
                     const float* rows, float factor, const float* weight, int64_t weight_stride, float* new_weight,
                     const float* bias, int64_t bias_stride, float* new_bias) {
  for (int64_t e = begin; e < end; ++e) {
    const Layer<const float> last = {weight ? weight + e * weight_stride : nullptr,
                                     bias ? bias + e * bias_stride : nullptr};
    const Layer<float> next = {new_weight + e * n_out * n_in, new_bias ? new_bias + e * n_out : nullptr};
    const float* stacked = Singles::stacked(rows + e * n * n_in, n, n_in, buffer);
    layer_step<Singles>({n, n_in, n_out}, grad + e * n * n_out, stacked, factor, last, next);
  }
}

}  // extern "C"
}  // namespace mdml
