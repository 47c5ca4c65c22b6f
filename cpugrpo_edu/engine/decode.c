/* One token through the layers of a frozen INT8 model with LoRA, for a few rows.
 *
 * decode.Decoder makes a few thousand torch calls for each token; here it is a single call, so
 * almost all of a token's time goes into reading the weights. c_kernel.py compiles this file and
 * passes the model's tensors as they are; it names every pointer.
 *
 * A product with INT8 weights W = diag(scale) Q: a row of x becomes the levels
 * round(127 x / peak) + 128, from 1 to 255, since processors multiply unsigned by signed bytes;
 * the shift by 128 is subtracted again as 128 times the sum of a row of Q. Compilers turn
 * `dot` into such instructions (VNNI) by themselves.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 64 /* outputs that a thread takes at a time */
#define FEW 4    /* of these, computed together */
#define LANES 32 /* numbers of a head summed together */
#define AHEAD 6144 /* prefetch distance in bytes; a cache line is 64 */
#define LEVEL_2 2  /* prefetch into the second cache: the first holds fewer outstanding requests */

typedef struct { /* y = x W^T + bias + (x down^T) up */
  const int8_t *q;         /* (out, in) */
  const float *scale;      /* (out) */
  const int32_t *row_sum;  /* (out), of q */
  const float *bias;       /* (out) or none */
  const float *down, *up;  /* (rank, in), (rank, out): LoRA's A and scaled B^T, or none */
  int in, out, rank;
} linear;

typedef struct {
  const float *before_attention, *before_mlp; /* weights of the two norms (hidden) */
  linear query, key, value, output, gate, up, down;
  float *keys, *values; /* (rows, kv heads, capacity, dim) */
} layer;

typedef struct { /* buffers between the steps; the number of floats in brackets */
  float *normed, *mixed, *change; /* (rows, hidden), (rows, heads * dim), (rows, hidden) */
  float *query, *key, *value;
  float *gate, *up;                       /* (rows, ffn) */
  float *scores;                          /* (rows, heads, capacity) */
  float *low;                             /* (3, rows, rank) */
  float *sizes;                           /* (rows) */
  uint8_t *levels;                        /* (rows, largest input) */
} workspace;

/* The largest |x|, compared as integers: the same order, and NaN above all, so that it shows. */
static float peak_of(const float *x, int n) {
  int32_t top = 1;
  for (int i = 0; i < n; i++) {
    int32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  float peak;
  memcpy(&peak, &top, 4);
  return peak < 1e-30f ? 1e-30f : peak;
}

static float to_levels(const float *x, int n, uint8_t *levels) {
  const float peak = peak_of(x, n), by = 127 / peak;
  for (int i = 0; i < n; i++) levels[i] = (uint8_t)(int)(x[i] * by + 128.5f);
  return peak / 127;
}

/* The same for each row of x (rows, n), shared among the threads. */
static void all_to_levels(const float *x, int rows, int n, uint8_t *levels, float *sizes) {
#pragma omp for schedule(static)
  for (int r = 0; r < rows; r++) sizes[r] = to_levels(x + (long)r * n, n, levels + (long)r * n);
}

/* e^x without a call, so that loops of it are vectorized: 2^k e^r, |r| <= log(2) / 2, with an error
 * of 1e-6 of the value. */
static inline float exponential(float x) {
  const float shift = 12582912; /* 1.5 * 2^23: adding it rounds to an integer */
  x = x < -87 ? -87 : x > 88 ? 88 : x;
  const float rounded = x * 1.44269504f + shift, k = rounded - shift;
  const float r = x - k * 0.693359375f + k * 2.12194440e-4f; /* log(2) in two parts */
  const float e = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f)))));
  int32_t bits;
  float power;
  memcpy(&bits, &rounded, 4);
  bits = (int32_t)((uint32_t)(bits - 0x4b400000 + 127) << 23);
  memcpy(&power, &bits, 4);
  return e * power;
}

/* The row x against `count` rows of q, at most FEW: they share what is read of x. */
static void dot(const uint8_t *levels, const int8_t *q, int n, int count, int32_t *sums) {
  if (count == FEW) {
    const int8_t *q1 = q + n, *q2 = q1 + n, *q3 = q2 + n;
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (int i = 0; i < n; i++) {
      const int x = levels[i];
      s0 += x * (int)q[i];
      s1 += x * (int)q1[i];
      s2 += x * (int)q2[i];
      s3 += x * (int)q3[i];
    }
    sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
    return;
  }
  for (int k = 0; k < count; k++, q += n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += (int)levels[i] * (int)q[i];
    sums[k] = sum;
  }
}

static float float_dot(const float *a, const float *b, int n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

/* The product without the second half of LoRA, which needs all of `low`. The threads share the
 * work and do not wait for each other at the end (nowait): the caller places the barrier. */
static void product(const linear *l, const float *x, const uint8_t *levels, const float *sizes,
                    int rows, float *y, float *low) {
#pragma omp for schedule(static) nowait
  for (int block = 0; block < l->out; block += BLOCK) {
    const int end = block + BLOCK < l->out ? block + BLOCK : l->out;
    for (int o = block; o < end; o += FEW) {
      const int8_t *q = l->q + (long)o * l->in;
      for (long i = 0; i < (long)FEW * l->in; i += 64) __builtin_prefetch(q + AHEAD + i, 0, LEVEL_2);
      for (int r = 0; r < rows; r++) {
        const int count = end - o < FEW ? end - o : FEW;
        int32_t sums[FEW];
        dot(levels + (long)r * l->in, q, l->in, count, sums);
        memcpy(y + (long)r * l->out + o, sums, count * sizeof(int32_t));
      }
    }
    for (int r = 0; r < rows; r++)
      for (int o = block; o < end; o++) {
        float *at = y + (long)r * l->out + o;
        int32_t sum;
        memcpy(&sum, at, sizeof sum);
        *at = sizes[r] * l->scale[o] * (float)(sum - 128 * l->row_sum[o]);
      }
    if (l->bias)
      for (int r = 0; r < rows; r++)
        for (int o = block; o < end; o++) y[(long)r * l->out + o] += l->bias[o];
  }
#pragma omp for schedule(static) nowait
  for (int k = 0; k < l->rank; k++)
    for (int r = 0; r < rows; r++)
      low[r * l->rank + k] = float_dot(l->down + (long)k * l->in, x + (long)r * l->in, l->in);
}

/* LoRA's second half for the outputs from `start` to `end` of row r. */
static void adapt(const linear *l, const float *low, int r, int start, int end, float *y) {
  y += (long)r * l->out;
  for (int k = 0; k < l->rank; k++) {
    const float share = low[r * l->rank + k], *up = l->up + (long)k * l->out;
    for (int o = start; o < end; o++) y[o] += share * up[o];
  }
}

/* x += change, row r of a product whose second half of LoRA is still missing. */
static void add_row(const linear *l, const float *low, int r, float *change, float *x) {
  const long at = (long)r * l->out;
  adapt(l, low, r, 0, l->out, change);
  for (int i = 0; i < l->out; i++) x[at + i] += change[at + i];
}

static void norm(const float *x, const float *weight, int n, float epsilon, float *y) {
  const float by = 1 / sqrtf(float_dot(x, x, n) / n + epsilon);
  for (int i = 0; i < n; i++) y[i] = x[i] * by * weight[i];
}

static void rotate(const float *x, const float *cos, const float *sin, int dim, float *y) {
  const int half = dim / 2;
  for (int i = 0; i < half; i++) {
    y[i] = x[i] * cos[i] - x[i + half] * sin[i];
    y[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
  }
}

/* One query over the first n keys and values; `bias` (n) is added to the scores, or none. */
static void attend(const float *query, const float *keys, const float *values, const float *bias,
                   long n, int dim, float *scores, float *y) {
  const float by = 1 / sqrtf(dim);
  float top = -INFINITY, total = 0;
  for (long t = 0; t < n; t++) {
    scores[t] = by * float_dot(query, keys + t * dim, dim) + (bias ? bias[t] : 0);
    top = scores[t] > top ? scores[t] : top;
  }
  for (long t = 0; t < n; t++) scores[t] = exponential(scores[t] - top);
  for (long t = 0; t < n; t++) total += scores[t];
  int i = 0;
  for (; i + LANES <= dim; i += LANES) { /* sums that stay in registers */
    float sum[LANES] = {0};
    for (long t = 0; t < n; t++)
      for (int k = 0; k < LANES; k++) sum[k] += scores[t] * values[t * dim + i + k];
    for (int k = 0; k < LANES; k++) y[i + k] = sum[k] / total;
  }
  for (; i < dim; i++) {
    float sum = 0;
    for (long t = 0; t < n; t++) sum += scores[t] * values[t * dim + i];
    y[i] = sum / total;
  }
}

/* x (rows, hidden) through all layers, in place. Its keys and values go to position `start` of
 * the cache; cos, sin (rows, dim); mask (rows, start + 1), added to the scores, or none. */
void decode(const layer *layers, int count, int rows, int hidden, int heads, int kv_heads, int dim,
            long capacity, long start, const float *cos, const float *sin, const float *mask,
            float epsilon, float *x, const workspace *w) {
  const int ffn = layers->gate.out, attention = heads * dim;
#pragma omp parallel
  for (int index = 0; index < count; index++) {
    const layer *l = layers + index;
    float *low[3] = {w->low, w->low + rows * l->query.rank,
                     w->low + rows * (l->query.rank + l->key.rank)};
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) {
      const long at = (long)r * hidden;
      norm(x + at, l->before_attention, hidden, epsilon, w->normed + at);
      w->sizes[r] = to_levels(w->normed + at, hidden, w->levels + at);
    }
    product(&l->query, w->normed, w->levels, w->sizes, rows, w->query, low[0]);
    product(&l->key, w->normed, w->levels, w->sizes, rows, w->key, low[1]);
    product(&l->value, w->normed, w->levels, w->sizes, rows, w->value, low[2]);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int job = 0; job < rows * kv_heads; job++) { /* one head's key and value into the cache */
      const int r = job / kv_heads, from = job % kv_heads * dim;
      const long to = (job * capacity + start) * dim, at = (long)r * kv_heads * dim + from;
      adapt(&l->key, low[1], r, from, from + dim, w->key);
      adapt(&l->value, low[2], r, from, from + dim, w->value);
      rotate(w->key + at, cos + (long)r * dim, sin + (long)r * dim, dim, l->keys + to);
      memcpy(l->values + to, w->value + at, dim * sizeof(float));
    }
#pragma omp for schedule(static)
    for (int job = 0; job < rows * heads; job++) { /* one head's attention */
      const int r = job / heads, head = job % heads, from = head * dim;
      const long at = (long)r * attention + from;
      const long kv = ((long)r * kv_heads + head / (heads / kv_heads)) * capacity * dim;
      float *scores = w->scores + (long)job * capacity, *rotated = w->mixed + at;
      adapt(&l->query, low[0], r, from, from + dim, w->query);
      rotate(w->query + at, cos + (long)r * dim, sin + (long)r * dim, dim, rotated);
      memcpy(w->query + at, rotated, dim * sizeof(float));
      attend(w->query + at, l->keys + kv, l->values + kv, mask ? mask + r * (start + 1) : 0,
             start + 1, dim, scores, w->mixed + at);
    }
    all_to_levels(w->mixed, rows, attention, w->levels, w->sizes);
    product(&l->output, w->mixed, w->levels, w->sizes, rows, w->change, low[0]);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) {
      const long at = (long)r * hidden;
      add_row(&l->output, low[0], r, w->change, x);
      norm(x + at, l->before_mlp, hidden, epsilon, w->normed + at);
      w->sizes[r] = to_levels(w->normed + at, hidden, w->levels + at);
    }
    low[1] = w->low + rows * l->gate.rank;
    product(&l->gate, w->normed, w->levels, w->sizes, rows, w->gate, low[0]);
    product(&l->up, w->normed, w->levels, w->sizes, rows, w->up, low[1]);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int block = 0; block < ffn; block += BLOCK)
      for (int r = 0; r < rows; r++) {
        const int end = block + BLOCK < ffn ? block + BLOCK : ffn;
        float *gate = w->gate + (long)r * ffn, *up = w->up + (long)r * ffn;
        adapt(&l->gate, low[0], r, block, end, w->gate);
        adapt(&l->up, low[1], r, block, end, w->up);
        for (int i = block; i < end; i++) gate[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
      }
    all_to_levels(w->gate, rows, ffn, w->levels, w->sizes);
    product(&l->down, w->gate, w->levels, w->sizes, rows, w->change, low[0]);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) add_row(&l->down, low[0], r, w->change, x);
  }
}

/* y (rows, out) of one layer without LoRA, such as the head. */
void few_rows(const linear *l, const float *x, int rows, uint8_t *levels, float *sizes, float *y) {
#pragma omp parallel
  {
    all_to_levels(x, rows, l->in, levels, sizes);
    product(l, x, levels, sizes, rows, y, 0);
  }
}

/* For products of many rows, which torch does in integers: each row of x as integers from -127
 * to 127, and the size of one. */
void round_rows(const float *x, int rows, int in, int8_t *q, float *sizes) {
#pragma omp parallel for schedule(static)
  for (int r = 0; r < rows; r++) {
    uint8_t *levels = (uint8_t *)q + (long)r * in;
    sizes[r] = to_levels(x + (long)r * in, in, levels);
    for (int i = 0; i < in; i++) levels[i] ^= 128; /* the level less 128 */
  }
}

/* Their sums (rows, out) to floats in the same place: sum * size * scale + bias. */
void scale_rows(int32_t *sums, int rows, int out, const float *sizes, const float *scale,
                const float *bias) {
#pragma omp parallel for schedule(static)
  for (int r = 0; r < rows; r++)
    for (int o = 0; o < out; o++) {
      int32_t *at = sums + (long)r * out + o;
      const float y =
          (float)*at * (sizes[r] * (scale ? scale[o] : 1)) + (bias ? bias[o] : 0);
      memcpy(at, &y, 4);
    }
}
