/* The same from C: one layer, a prompt, a few decoded tokens, and what the cache costs. Waves stand in for a model's rows. */
#include <kvmix/kvmix.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { kQHeads = 8, kKvHeads = 2, kHeadDim = 128, kPrompt = 1024, kDecoded = 16 };

static int failed(const char* what, kvmix_status status) {
  if (status == KVMIX_OK) return 0;
  fprintf(stderr, "%s: %s: %s\n", what, kvmix_status_name(status), kvmix_last_error());
  return 1;
}

static void fill(float* x, size_t n, float phase) {
  for (size_t i = 0; i < n; ++i) x[i] = sinf(phase + 0.37f * (float)i);
}

static int step(kvmix_cache* cache, kvmix_sequence sequence, int n_tokens, float phase, float* q, float* k, float* v,
                float* out) {
  const int64_t q_row = kQHeads * kHeadDim, kv_row = kKvHeads * kHeadDim;
  const kvmix_step_item item = {sequence, n_tokens};
  fill(q, (size_t)(n_tokens * q_row), phase);
  fill(k, (size_t)(n_tokens * kv_row), phase + 1.0f);
  fill(v, (size_t)(n_tokens * kv_row), phase + 2.0f);
  return failed("begin", kvmix_step_begin(cache, &item, 1)) ||
         failed("append", kvmix_cache_append(cache, 0, k, kv_row, v, kv_row, 0, 1)) ||
         failed("attend", kvmix_cache_attend(cache, 0, q, q_row, out, q_row, 0, 1)) || failed("end", kvmix_step_end(cache));
}

int main(void) {
  kvmix_layer_config layer;
  kvmix_cache_config config = {&layer, 1, 1, 0, NULL, 0};
  kvmix_cache* cache = NULL;
  kvmix_sequence sequence;
  kvmix_memory memory;
  const char* kernel = "";
  float* q = malloc(sizeof(float) * kPrompt * kQHeads * kHeadDim);
  float* out = malloc(sizeof(float) * kPrompt * kQHeads * kHeadDim);
  float* k = malloc(sizeof(float) * kPrompt * kKvHeads * kHeadDim);
  float* v = malloc(sizeof(float) * kPrompt * kKvHeads * kHeadDim);
  int bad = q == NULL || out == NULL || k == NULL || v == NULL;

  kvmix_layer_defaults(&layer);
  layer.q_heads = kQHeads;
  layer.kv_heads = kKvHeads;
  layer.head_dim = kHeadDim;
  bad = bad || failed("create", kvmix_cache_create(&config, &cache)) ||
        failed("sequence", kvmix_sequence_create(cache, &sequence)) || step(cache, sequence, kPrompt, 0.0f, q, k, v, out);
  for (int i = 0; !bad && i < kDecoded; ++i) bad = step(cache, sequence, 1, (float)(kPrompt + i), q, k, v, out);
  bad = bad || failed("memory", kvmix_cache_memory(cache, &memory)) || failed("kernel", kvmix_cache_kernel(cache, &kernel));
  if (!bad) {
    printf("kvmix %s, kernel %s: %lld tokens in %zu bytes, fp16 would take %zu; first output %.4f\n", kvmix_version(), kernel,
           (long long)memory.tokens, memory.total_bytes, (size_t)memory.tokens * 2 * 2 * kKvHeads * kHeadDim, (double)out[0]);
  }
  kvmix_cache_destroy(cache);
  free(q);
  free(out);
  free(k);
  free(v);
  return bad;
}
