/* The same from C: a prompt, a few decoded tokens, and what the cache costs. Waves stand in for a model's rows.
 *   decode_c                    one layer, 3 bits
 *   decode_c PLAN LAYERS        a plan for that many layers of this shape, e.g. examples/plan.json 1 */
#include <kvmix/kvmix.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { kQHeads = 8, kKvHeads = 2, kHeadDim = 128, kChunk = 128, kPrompt = 8 * kChunk, kDecoded = 16 };

static int failed(const char* what, kvmix_status status) {
  if (status == KVMIX_OK) return 0;
  fprintf(stderr, "%s: %s: %s\n", what, kvmix_status_name(status), kvmix_last_error());
  return 1;
}

static void fill(float* x, size_t n, float phase) {
  for (size_t i = 0; i < n; ++i) x[i] = sinf(phase + 0.37f * (float)i);
}

static int step(kvmix_cache* cache, int layers, kvmix_sequence sequence, int n_tokens, float phase, float* q, float* k,
                float* v, float* out) {
  const int64_t q_row = kQHeads * kHeadDim, kv_row = kKvHeads * kHeadDim;
  const kvmix_step_item item = {sizeof item, sequence, n_tokens, 0, 0};
  int bad = failed("begin", kvmix_step_begin(cache, &item, 1));
  for (int l = 0; !bad && l < layers; ++l) {
    fill(q, (size_t)(n_tokens * q_row), phase);
    fill(k, (size_t)(n_tokens * kv_row), phase + 1.0f);
    fill(v, (size_t)(n_tokens * kv_row), phase + 2.0f);
    bad = failed("append", kvmix_cache_append(cache, l, k, kv_row, v, kv_row, 0, 1)) ||
          failed("attend", kvmix_cache_attend(cache, l, q, q_row, out, q_row, 0, 1));
  }
  return bad || failed("end", kvmix_step_end(cache));
}

/* Three-bit keys and values. */
static int make_cache(kvmix_cache** cache) {
  kvmix_layer_config layer = {sizeof layer};
  if (failed("defaults", kvmix_layer_defaults(&layer))) return 1;
  layer.q_heads = kQHeads;
  layer.kv_heads = kKvHeads;
  layer.head_dim = kHeadDim;
  return failed("create", kvmix_cache_create(&layer, 1, NULL, cache));
}

/* What a plan says. Without a fingerprint any plan will do whose layers fit. */
static int make_planned_cache(const char* path, int n_layers, kvmix_cache** cache) {
  kvmix_plan* plan = NULL;
  kvmix_model_layer* layers = calloc((size_t)n_layers, sizeof *layers);
  const kvmix_model_shape model = {sizeof model, "waves", NULL, layers, (size_t)n_layers};
  int bad = layers == NULL;
  for (int l = 0; !bad && l < n_layers; ++l) {
    layers[l].struct_bytes = sizeof *layers;
    layers[l].q_heads = kQHeads;
    layers[l].kv_heads = kKvHeads;
    layers[l].head_dim = kHeadDim;
  }
  bad = bad || failed("plan", kvmix_plan_read(path, &plan)) ||
        failed("create", kvmix_cache_create_from_plan(plan, &model, NULL, cache));
  kvmix_plan_destroy(plan);
  free(layers);
  return bad;
}

int main(int argc, char** argv) {
  const int layers = argc == 3 ? atoi(argv[2]) : 1;
  kvmix_cache* cache = NULL;
  kvmix_sequence sequence;
  kvmix_memory memory = {sizeof memory};
  size_t predicted = 0;
  const char* kernel = "";
  if ((argc != 1 && argc != 3) || layers < 1) {
    fprintf(stderr, "usage: %s [PLAN LAYERS]\n", argv[0]);
    return 2;
  }
  float* q = malloc(sizeof(float) * kChunk * kQHeads * kHeadDim);
  float* out = malloc(sizeof(float) * kChunk * kQHeads * kHeadDim);
  float* k = malloc(sizeof(float) * kChunk * kKvHeads * kHeadDim);
  float* v = malloc(sizeof(float) * kChunk * kKvHeads * kHeadDim);
  int bad = q == NULL || out == NULL || k == NULL || v == NULL;

  bad = bad || (argc == 3 ? make_planned_cache(argv[1], layers, &cache) : make_cache(&cache)) ||
        failed("sequence", kvmix_sequence_create(cache, &sequence));
  for (int i = 0; !bad && i < kPrompt; i += kChunk) bad = step(cache, layers, sequence, kChunk, (float)i, q, k, v, out);
  for (int i = 0; !bad && i < kDecoded; ++i) bad = step(cache, layers, sequence, 1, (float)(kPrompt + i), q, k, v, out);
  bad = bad || failed("memory", kvmix_cache_memory(cache, &memory)) || failed("kernel", kvmix_cache_kernel(cache, &kernel)) ||
        failed("predict", kvmix_cache_predict_bytes(cache, memory.tokens, &predicted));
  if (!bad) {
    printf(
        "kvmix %s, kernel %s: %lld tokens in %zu bytes (%zu by formula) and %zu in reserve, fp16 would take %zu; first output "
        "%.4f\n",
        kvmix_version(), kernel, (long long)memory.tokens, memory.total_bytes - memory.slack_bytes, predicted,
        memory.slack_bytes, (size_t)memory.tokens * 2 * 2 * kKvHeads * kHeadDim * (size_t)layers, (double)out[0]);
  }
  kvmix_cache_destroy(cache);
  free(q);
  free(out);
  free(k);
  free(v);
  return bad;
}
