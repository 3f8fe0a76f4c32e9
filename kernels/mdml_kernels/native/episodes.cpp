// Whole episodes of an MLP with a linear head: the inner loop, the outer loss and its gradients, one episode after the
// other, so that all of it stays in the processor's own caches.
#include "bfloat16.h"
#include "layer.h"
#include "margin.h"

#include <vector>

namespace mdml {

extern "C" {

// A layer of all episodes: as it is given (strides between episodes, 0 shares), as the inner loop leaves it (null: not
// wanted), and the gradients by it, of one group of episodes `group_stride` after those of the one before.
struct EpisodeLayer {
  int64_t n_in, n_out, rectify;
  const float *weight, *bias;
  int64_t weight_stride, bias_stride;
  float *own_weight, *own_bias, *by_weight, *by_bias;
};

// The last of n_layers is the head. tau null: 1; background null: none; by_background [E] null: not wanted.
// metric null: the head stays as it is. Else it stands for two layers, F = V W, and metric is V V^T (stride 0: shared).
// SGD on W moves F by metric times the steps of one on F, and its bias likewise, unless it is fixed. Their sums D and d
// are the head's own, and cross [K, K] of each group sums G D^T + g d^T of its gradients by the outer loss (null: not
// wanted).
struct EpisodeProgram {
  int64_t n_layers, n_support, n_query, n_steps, group, group_stride, mass, bfloat16, fixed_bias;
  const EpisodeLayer* layers;
  const float *support, *query;
  const uint8_t* is_ood;
  const float *tau, *background;
  float *loss, *by_background, *cross;
  const float* metric;
  int64_t metric_stride;
  float lr, margin;
};

}  // extern "C"

namespace {

// out [m, n] = base (null: 0) + a [m, depth] b, whose rows can be read in whole vectors; base may be out.
void plus_product(const float* base, const float* a, const float* b, int64_t m, int64_t n, int64_t depth, float* out) {
  const Operands<Singles> of = {a, b, depth, 1, padded(n), depth};
  product(of, m, n, [=](int64_t i, int64_t j, Floats sums, int64_t left) INLINE {
    if (base) sums += load_some(base + i * n + j, left, 0.0f);
    store_some(out + i * n + j, sums, left);
  });
}

// A thread's own memory for its episodes.
template <class Kind>
struct Workspace {
  using Entry = typename Kind::Entry;
  using Stored = typename Kind::Stored;

  std::vector<Buffer<Stored>> outputs;                     // of the encoder's layers [n, O]
  std::vector<Buffer<Entry>> turned_given, stacked_given;  // weights that all episodes share
  std::vector<Buffer<float>> own;  // weight and bias of each layer, where they are not wanted
  Buffer<Stored> grad[2];
  Buffer<Entry> inputs, stacked_inputs, by_logits, turned, stacked;
  Buffer<float> logits, slope, peak, total, folded, by_head, metric, moves, moves_turned;
  Buffer<int64_t> first;
};

template <class Kind>
class Episode {
 public:
  using Entry = typename Kind::Entry;
  using Stored = typename Kind::Stored;

  Episode(const EpisodeProgram& program, Workspace<Kind>& space) : of(program), head(program.n_layers - 1), space(space) {
    const int64_t n = std::max(of.n_support, of.n_query);
    space.outputs.resize(head), space.turned_given.resize(of.n_layers), space.stacked_given.resize(of.n_layers);
    turned_given.assign(of.n_layers, nullptr), stacked_given.assign(of.n_layers, nullptr);
    space.own.resize(of.n_layers);
    int64_t widest = 0;
    for (int64_t l = 0; l < head; ++l) {
      space.own[l].take((of.layers[l].n_in + 1) * of.layers[l].n_out);
      outputs.push_back(space.outputs[l].take(n * of.layers[l].n_out));
      widest = std::max(widest, of.layers[l].n_out);
    }
    grad = space.grad[0].take(n * widest), grad_below = space.grad[1].take(n * widest);
    logits = space.logits.take(n * of.layers[head].n_out);
    kept = {space.slope.take(n), space.peak.take(n), space.total.take(n), space.first.take(n)};
    const int64_t size_of_head = (of.layers[head].n_in + 1) * of.layers[head].n_out;
    if (of.metric) space.own[head].take(size_of_head), space.folded.take(size_of_head), space.by_head.take(size_of_head);
  }

  void adapt(int64_t e) {
    const int64_t n = of.n_support, d = of.layers[0].n_in;
    take(of.support + e * n * d, n, d);
    for (int64_t step = 0; step < of.n_steps; ++step) {
      const bool own = step > 0;
      forward(e, own, n);
      one_class_gradient(logits_of(e, n), of.mass, logits);
      const Stored* by_logits = logit_gradients(n);
      pull(e, head, own, n, by_logits, grad);
      if (of.metric) {
        const Layer<float> moves = own_layer(e, head);
        const Layer<const float> last = own ? Layer<const float>{moves.weight, moves.bias} : Layer<const float>{};
        layer_step<Kind>(size(head, n), by_logits, stacked_below(head, n), -of.lr, last, moves);
        move_head(e);
      }
      for (int64_t l = head - 1; l >= 0; --l) {
        if (l) pull(e, l, own, n, grad, grad_below);
        layer_step<Kind>(size(l, n), grad, stacked_below(l, n), -of.lr, at(e, l, own), own_layer(e, l));
        std::swap(grad, grad_below);
      }
    }
  }

  void outer(int64_t e) {
    const int64_t n = of.n_query, d = of.layers[0].n_in, group = e / of.group;
    take(of.query + e * n * d, n, d);
    const bool own = of.n_steps > 0, begins = e % of.group == 0;
    forward(e, own, n);
    margin_gradient(e, n);
    const Stored* by_logits = logit_gradients(n);
    pull(e, head, own, n, by_logits, grad);
    if (of.cross)
      collect_head(e, n, by_logits, begins);
    else
      collect(group, head, n, by_logits, begins);
    for (int64_t l = head - 1; l >= 0; --l) {
      if (l) pull(e, l, own, n, grad, grad_below);
      collect(group, l, n, grad, begins);
      std::swap(grad, grad_below);
    }
  }

 private:
  const EpisodeProgram& of;
  const int64_t head;
  Workspace<Kind>& space;
  std::vector<Stored*> outputs;
  std::vector<const Entry*> turned_given, stacked_given;
  const Stored* rows = nullptr;  // what goes in, and stacked
  const Entry* stacked_rows = nullptr;
  Stored *grad, *grad_below;
  float* logits;  // they become their own gradient
  Kept kept;

  Size size(int64_t l, int64_t n) const { return {n, of.layers[l].n_in, of.layers[l].n_out}; }

  EpisodeLogits logits_of(int64_t e, int64_t n) const {
    const int64_t k = of.layers[head].n_out;
    return {logits, k, n, k, of.tau ? of.tau[e] : 1.0f, of.background ? of.background + e : nullptr};
  }

  const Stored* logit_gradients(int64_t n) { return Kind::stored(logits, n * of.layers[head].n_out, space.by_logits); }

  Layer<float> own_layer(int64_t e, int64_t l) const {
    const EpisodeLayer& layer = of.layers[l];
    const bool moves = layer.bias && !(l == head && of.fixed_bias);
    if (!layer.own_weight) {
      float* mine = space.own[l].get();
      return {mine, moves ? mine + layer.n_out * layer.n_in : nullptr};
    }
    return {layer.own_weight + e * layer.n_out * layer.n_in, moves ? layer.own_bias + e * layer.n_out : nullptr};
  }

  Layer<const float> at(int64_t e, int64_t l, bool own) const {
    const EpisodeLayer& layer = of.layers[l];
    if (own && l < head) {
      const Layer<float> mine = own_layer(e, l);
      return {mine.weight, mine.bias};
    }
    if (own && of.metric) {
      const float* mine = space.folded.get();
      return {mine, layer.bias ? mine + layer.n_out * layer.n_in : nullptr};
    }
    return {layer.weight + e * layer.weight_stride, layer.bias ? layer.bias + e * layer.bias_stride : nullptr};
  }

  void take(const float* from, int64_t n, int64_t d) {
    rows = Kind::stored(from, n * d, space.inputs);
    stacked_rows = Kind::stacked(rows, n, d, space.stacked_inputs);
  }

  const Stored* below(int64_t l) const { return l ? outputs[l - 1] : rows; }

  const Entry* stacked_below(int64_t l, int64_t n) {
    return l ? Kind::stacked(outputs[l - 1], n, of.layers[l].n_in, space.stacked) : stacked_rows;
  }

  using Lay = const Entry* (*)(const float*, int64_t, int64_t, Buffer<Entry>&);

  // A weight laid out for products: only once where all episodes have the same.
  const Entry* laid(Lay lay, int64_t e, int64_t l, bool own, std::vector<const Entry*>& ready,
                    std::vector<Buffer<Entry>>& given, Buffer<Entry>& mine) {
    const EpisodeLayer& layer = of.layers[l];
    const bool shared = !layer.weight_stride && !(own && (l < head || of.metric));
    if (shared && ready[l]) return ready[l];
    const Entry* weight = lay(at(e, l, own).weight, layer.n_out, layer.n_in, shared ? given[l] : mine);
    if (shared) ready[l] = weight;
    return weight;
  }

  const Entry* turned(int64_t e, int64_t l, bool own) {
    return laid(Kind::turned, e, l, own, turned_given, space.turned_given, space.turned);
  }

  const Entry* stacked(int64_t e, int64_t l, bool own) {
    return laid(Kind::stacked, e, l, own, stacked_given, space.stacked_given, space.stacked);
  }

  void forward(int64_t e, bool own, int64_t n) {
    for (int64_t l = 0; l <= head; ++l) {
      const EpisodeLayer& layer = of.layers[l];
      const float* bias = at(e, l, own).bias;
      if (l == head)
        layer_forward<Kind, Singles>(size(l, n), below(l), turned(e, l, own), bias, false, logits);
      else
        layer_forward<Kind, Kind>(size(l, n), below(l), turned(e, l, own), bias, layer.rectify, outputs[l]);
    }
  }

  // The logits become the gradient of the outer loss.
  void margin_gradient(int64_t e, int64_t n) {
    const EpisodeLogits episode = logits_of(e, n);
    of.loss[e] = hinge(episode, of.is_ood + e * n, of.margin, kept);
    Floats by_background = {};
    for (int64_t i = 0; i < n; i += W) {
      const int64_t left = n - i;
      by_background += pull_odds(episode, i, load_some(kept.slope + i, left, 0.0f), kept.exps(i, left),
                                 load_indices(kept.first + i, std::min<int64_t>(W, left)), false,
                                 logits + i * episode.n_classes);
    }
    if (of.by_background) of.by_background[e] = reduce(by_background, sum<Floats>)[0];
  }

  // The head as it was given, moved: F + M D, and c + M d.
  void move_head(int64_t e) {
    const int64_t n_in = of.layers[head].n_in, n_out = of.layers[head].n_out;
    const Layer<const float> given = at(e, head, false);
    const Layer<float> moves = own_layer(e, head);
    float *weight = space.folded.get(), *bias = weight + n_out * n_in;
    const float* metric = of.metric + e * of.metric_stride;
    plus_product(given.weight, metric, Singles::stacked(moves.weight, n_out, n_in, space.moves), n_out, n_in, n_out,
                 weight);
    if (!given.bias) return;
    if (!moves.bias) return void(memcpy(bias, given.bias, n_out * sizeof(float)));
    const float* rows = Singles::stacked(metric, n_out, n_out, space.metric);  // M is symmetric
    plus_product(given.bias, moves.bias, rows, 1, n_out, n_out, bias);
  }

  // `collect` of a head that moved, and G D^T + g d^T.
  void collect_head(int64_t e, int64_t n, const Stored* from, bool begins) {
    const EpisodeLayer& layer = of.layers[head];
    const int64_t n_in = layer.n_in, n_out = layer.n_out, offset = e / of.group * of.group_stride;
    float *weight = space.by_head.get(), *bias = layer.by_bias ? weight + n_out * n_in : nullptr;
    layer_step<Kind>(size(head, n), from, stacked_below(head, n), 1.0f, {}, {weight, bias});
    add(weight, n_out * n_in, begins, layer.by_weight + offset);
    if (bias) add(bias, n_out, begins, layer.by_bias + offset);

    const Layer<float> moves = own_layer(e, head);
    float* cross = of.cross + offset;
    const float* turned = Singles::turned(moves.weight, n_out, n_in, space.moves_turned);
    plus_product(begins ? nullptr : cross, weight, turned, n_out, n_out, n_in, cross);
    for (int64_t i = 0; moves.bias && i < n_out; ++i)
      for (int64_t j = 0; j < n_out; ++j) cross[i * n_out + j] += bias[i] * moves.bias[j];
  }

  // to [n] += values, or = where a sum begins.
  static void add(const float* values, int64_t n, bool begins, float* to) {
    for (int64_t i = 0; i < n; i += W) {
      const Floats sums = load_some(values + i, n - i, 0.0f);
      store_some(to + i, begins ? sums : sums + load_some(to + i, n - i, 0.0f), n - i);
    }
  }

  // The gradient to what layer l - 1 gave before its activation, from that to what l gives.
  void pull(int64_t e, int64_t l, bool own, int64_t n, const Stored* from, Stored* to) {
    layer_pull<Kind>(size(l, n), from, stacked(e, l, own), of.layers[l - 1].rectify ? outputs[l - 1] : nullptr, to);
  }

  void collect(int64_t group, int64_t l, int64_t n, const Stored* from, bool begins) {
    const EpisodeLayer& layer = of.layers[l];
    const int64_t offset = group * of.group_stride;
    const Layer<float> sums = {layer.by_weight + offset, layer.by_bias ? layer.by_bias + offset : nullptr};
    const Layer<const float> last = begins ? Layer<const float>{} : Layer<const float>{sums.weight, sums.bias};
    layer_step<Kind>(size(l, n), from, stacked_below(l, n), 1.0f, last, sums);
  }
};

template <class Kind>
void run(const EpisodeProgram& program, int64_t begin, int64_t end, bool outer) {
  static thread_local Workspace<Kind> space;
  Episode<Kind> episode(program, space);
  for (int64_t e = begin; e < end; ++e) {
    episode.adapt(e);
    if (outer) episode.outer(e);
  }
}

void run(const EpisodeProgram& program, int64_t begin, int64_t end, bool outer) {
  if (program.bfloat16) return run<Bfloat16>(program, begin, end, outer);
  run<Singles>(program, begin, end, outer);
}

}  // namespace

extern "C" {

// What Python fills.
extern const int64_t mdml_episode_layer = sizeof(EpisodeLayer), mdml_episode_program = sizeof(EpisodeProgram);

// Whether the processor has products of bfloat16.
int64_t mdml_has_bfloat16() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

// The inner loop of the episodes from `begin` to `end`.
void mdml_adapt(int64_t begin, int64_t end, const EpisodeProgram* program) { run(*program, begin, end, false); }

// Everything, of the groups of episodes from `begin` to `end`.
void mdml_meta_gradients(int64_t begin, int64_t end, const EpisodeProgram* program) {
  run(*program, begin * program->group, end * program->group, true);
}

}  // extern "C"
}  // namespace mdml
