// Whole episodes of an MLP with a linear head: the inner loop, the outer loss and its gradients, one episode after the
// other, so that all of it stays in the processor's own caches.
#include "layer.h"
#include "margin.h"

namespace mdml {

extern "C" {

// A layer of all episodes: as it is given (strides between episodes, 0 shares), as the inner loop leaves it, and the
// gradients by it [E / group, ...]. The head has nothing of its own.
struct EpisodeLayer {
  int64_t n_in, n_out, rectify;
  const float *weight, *bias;
  int64_t weight_stride, bias_stride;
  float *own_weight, *own_bias, *by_weight, *by_bias;
};

// The last of n_layers is the head. tau null: 1; background null: none; by_background [E] null: not wanted.
struct EpisodeProgram {
  int64_t n_layers, n_support, n_query, n_steps, group, mass;
  const EpisodeLayer* layers;
  const float *support, *query;
  const uint8_t* is_ood;
  const float *tau, *background;
  float *loss, *by_background;
  float lr, margin;
};

}  // extern "C"

namespace {

class Episode {
 public:
  explicit Episode(const EpisodeProgram& program) : of(program), head(program.n_layers - 1) {
    const int64_t n = std::max(of.n_support, of.n_query);
    activations.resize(of.n_layers), turned_given.resize(of.n_layers);
    int64_t widest = 0;
    for (int64_t l = 0; l < of.n_layers; ++l) {
      activations[l].resize(n * of.layers[l].n_out);
      widest = std::max(widest, of.layers[l].n_out);
    }
    grad.resize(n * widest), grad_below.resize(n * widest);
    slope.resize(n), log_sum.resize(n), first.resize(n);
  }

  void adapt(int64_t e) {
    const int64_t n = of.n_support;
    const float* rows = of.support + e * n * of.layers[0].n_in;
    for (int64_t step = 0; step < of.n_steps; ++step) {
      const bool own = step > 0;
      forward(e, own, rows, n);
      float* logits = activations[head].data();
      one_class_gradient(logits_of(e, n), of.mass, logits);
      pull(e, head, own, n, logits, grad.data());
      for (int64_t l = head - 1; l >= 0; --l) {
        if (l) pull(e, l, own, n, grad.data(), grad_below.data());
        layer_step(size(l, n), grad.data(), below(l, rows, n), -of.lr, at(e, l, own), own_layer(e, l));
        std::swap(grad, grad_below);
      }
    }
  }

  void outer(int64_t e) {
    const int64_t n = of.n_query, group = e / of.group;
    const float* rows = of.query + e * n * of.layers[0].n_in;
    const bool own = of.n_steps > 0;
    forward(e, own, rows, n);
    float* logits = activations[head].data();
    const EpisodeLogits episode = logits_of(e, n);
    of.loss[e] = hinge(episode, of.is_ood + e * n, of.margin, {slope.data(), log_sum.data(), first.data()});
    Floats by_background = {};
    for (int64_t i = 0; i < n; i += W) {
      const int64_t left = n - i;
      by_background += pull_odds(episode, i, load_some(slope.data() + i, left, 0.0f),
                                 load_some(log_sum.data() + i, left, 0.0f),
                                 load_indices(first.data() + i, std::min<int64_t>(W, left)), false,
                                 logits + i * of.layers[head].n_out);
    }
    if (of.by_background) of.by_background[e] = reduce(by_background, sum<Floats>)[0];
    const bool begins = e % of.group == 0;
    pull(e, head, own, n, logits, grad.data());
    collect(group, head, n, logits, rows, begins);
    for (int64_t l = head - 1; l >= 0; --l) {
      if (l) pull(e, l, own, n, grad.data(), grad_below.data());
      collect(group, l, n, grad.data(), rows, begins);
      std::swap(grad, grad_below);
    }
  }

 private:
  const EpisodeProgram& of;
  const int64_t head;
  std::vector<Scratch> activations;  // what each layer gives [n, O]; the logits become their own gradient
  std::vector<Scratch> turned_given;  // weights that all episodes share, turned once
  Scratch grad, grad_below, turned, whole, slope, log_sum;
  std::vector<int64_t> first;

  Size size(int64_t l, int64_t n) const { return {n, of.layers[l].n_in, of.layers[l].n_out}; }

  EpisodeLogits logits_of(int64_t e, int64_t n) const {
    const int64_t k = of.layers[head].n_out;
    return {activations[head].data(), k, n, k, of.tau ? of.tau[e] : 1.0f, of.background ? of.background + e : nullptr};
  }

  Layer<float> own_layer(int64_t e, int64_t l) const {
    const EpisodeLayer& layer = of.layers[l];
    return {layer.own_weight + e * layer.n_out * layer.n_in, layer.own_bias ? layer.own_bias + e * layer.n_out : nullptr};
  }

  Layer<const float> at(int64_t e, int64_t l, bool own) const {
    const EpisodeLayer& layer = of.layers[l];
    if (own && l < head) {
      const Layer<float> mine = own_layer(e, l);
      return {mine.weight, mine.bias};
    }
    return {layer.weight + e * layer.weight_stride, layer.bias ? layer.bias + e * layer.bias_stride : nullptr};
  }

  // What layer l takes, so that whole vectors can be read of each row.
  const float* below(int64_t l, const float* rows, int64_t n) {
    return whole_vectors(l ? activations[l - 1].data() : rows, n, of.layers[l].n_in, whole);
  }

  void forward(int64_t e, bool own, const float* rows, int64_t n) {
    for (int64_t l = 0; l <= head; ++l) {
      const EpisodeLayer& layer = of.layers[l];
      const Layer<const float> with = at(e, l, own);
      const bool shared = !layer.weight_stride && !(own && l < head);
      if (shared && turned_given[l].empty()) turned_weight(with.weight, size(l, n), turned_given[l]);
      const float* weight = shared ? turned_given[l].data() : turned_weight(with.weight, size(l, n), turned);
      layer_forward(size(l, n), rows, weight, with.bias, layer.rectify, activations[l].data());
      rows = activations[l].data();
    }
  }

  // The gradient to what layer l - 1 gave before its activation, from that to what l gives.
  void pull(int64_t e, int64_t l, bool own, int64_t n, const float* from, float* to) {
    const EpisodeLayer& layer = of.layers[l];
    const float* weight = whole_vectors(at(e, l, own).weight, layer.n_out, layer.n_in, whole);
    layer_pull(size(l, n), from, weight, of.layers[l - 1].rectify ? activations[l - 1].data() : nullptr, to);
  }

  void collect(int64_t group, int64_t l, int64_t n, const float* from, const float* rows, bool begins) {
    const EpisodeLayer& layer = of.layers[l];
    const Layer<float> sums = {layer.by_weight + group * layer.n_out * layer.n_in,
                               layer.by_bias ? layer.by_bias + group * layer.n_out : nullptr};
    const Layer<const float> last = begins ? Layer<const float>{} : Layer<const float>{sums.weight, sums.bias};
    layer_step(size(l, n), from, below(l, rows, n), 1.0f, last, sums);
  }
};

}  // namespace

extern "C" {

// The inner loop of the episodes from `begin` to `end`.
void mdml_adapt(int64_t begin, int64_t end, const EpisodeProgram* program) {
  Episode episode(*program);
  for (int64_t e = begin; e < end; ++e) episode.adapt(e);
}

// Everything, of the groups of episodes from `begin` to `end`.
void mdml_meta_gradients(int64_t begin, int64_t end, const EpisodeProgram* program) {
  Episode episode(*program);
  for (int64_t e = begin * program->group; e < end * program->group; ++e) episode.adapt(e), episode.outer(e);
}

}  // extern "C"
}  // namespace mdml
