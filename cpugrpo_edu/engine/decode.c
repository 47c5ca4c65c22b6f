/* One token through the layers of a model with INT8 weights and LoRA, in one call, and the
 * products that go with it.
 *
 * decode.Decoder makes a few thousand torch calls for each token; here it is a single call.
 * c_kernel.py compiles this file and passes the model's tensors as they are.
 *
 * A weight matrix W (out, in) lies in strips of 16 outputs. Each output has a scale s and an offset
 * z for every BLOCK inputs: W = s q + z with 8-bit q. Activations x get 16 bits and a size a for
 * every BLOCK inputs: x = a l. A block of a product is then a (s sum(q l) + z sum(l)), with sums of
 * integers that are exact in 32 bits. Eight bits for x would not do: a real model has activations
 * hundreds of times as large as their neighbours, beside which the others would vanish.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define BLOCK 32 /* inputs with a scale and an offset of their own */
#define STRIP 16 /* outputs that lie side by side */
#define FEW 4     /* of LoRA's rows, multiplied together */
#define LANES 32 /* numbers of a head summed together */
#define AHEAD 6144 /* prefetch distance in bytes; a cache line is 64 */
#define LEVEL_2 2  /* prefetch into the second cache: the first holds fewer outstanding requests */

typedef struct { /* y = x W^T + bias + (x down^T) up */
  const int8_t *q;         /* (strips, width / 2, 16, 2) */
  const uint16_t *scales;  /* (strips, width / BLOCK, 2, 16): scales, then offsets, in float16 */
  const float *bias;       /* (out) or none */
  const float *down, *up;  /* (rank, in), (rank, out): LoRA's A and scaled B^T, or none */
  int in, width, out, rank; /* width: in, filled up to a multiple of BLOCK */
} linear;

typedef struct {
  const float *before_attention, *before_mlp; /* weights of the two norms (hidden) */
  linear query, key, value, output, gate, up, down;
  float *keys, *values; /* (rows, kv heads, capacity, dim) */
} layer;

typedef struct { /* rows of x, rounded */
  int16_t *levels;    /* (rows, width) */
  float *sizes, *sums; /* (rows, width / BLOCK): a, and a sum(l) */
} rounded;

typedef struct { /* buffers between the steps; the number of floats in brackets */
  float *normed, *mixed, *change; /* (rows, hidden), (rows, heads * dim), (rows, hidden) */
  float *query, *key, *value;
  float *gate, *up; /* (rows, ffn) */
  float *scores;    /* (rows, heads, capacity) */
  float *low;       /* (3, rows, rank) */
  rounded x;        /* of the largest input */
} workspace;

/* --- sixteen numbers at a time ----------------------------------------------------------- */

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t uints __attribute__((vector_size(64)));
typedef int16_t shorts __attribute__((vector_size(32)));
typedef uint16_t ushorts __attribute__((vector_size(32)));

#if defined(__AVX512BW__)
#define ROWS 8 /* rows of x that share what is read of W */
typedef __m512i pairs; /* 16 outputs, 2 inputs each, in 16 bits */
static inline pairs widen(const int8_t *q) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)q));
}
static inline ints multiply_add(ints sum, pairs q, int32_t levels) {
  const __m512i l = _mm512_set1_epi32(levels);
#if defined(__AVX512VNNI__)
  return (ints)_mm512_dpwssd_epi32((__m512i)sum, q, l);
#else
  return (ints)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16(q, l));
#endif
}
static inline floats half_to_float(const uint16_t *h) {
  return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)h));
}
#elif defined(__AVX2__) && defined(__F16C__)
#define ROWS 4
typedef struct { __m256i low, high; } pairs;
static inline pairs widen(const int8_t *q) {
  const pairs p = {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)q)),
                   _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)q + 1))};
  return p;
}
static inline ints multiply_add(ints sum, pairs q, int32_t levels) {
  const __m256i l = _mm256_set1_epi32(levels);
  union { ints all; __m256i half[2]; } s = {sum};
  s.half[0] = _mm256_add_epi32(s.half[0], _mm256_madd_epi16(q.low, l));
  s.half[1] = _mm256_add_epi32(s.half[1], _mm256_madd_epi16(q.high, l));
  return s.all;
}
static inline floats half_to_float(const uint16_t *h) {
  union { floats all; __m256 half[2]; } f;
  f.half[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h));
  f.half[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h + 1));
  return f.all;
}
#else
#define ROWS 4
typedef struct { int16_t of[2 * STRIP]; } pairs;
static inline pairs widen(const int8_t *q) {
  pairs p;
  for (int i = 0; i < 2 * STRIP; i++) p.of[i] = q[i];
  return p;
}
static inline ints multiply_add(ints sum, pairs q, int32_t levels) {
  int16_t l[2];
  memcpy(l, &levels, 4);
  for (int o = 0; o < STRIP; o++) sum[o] += q.of[2 * o] * l[0] + q.of[2 * o + 1] * l[1];
  return sum;
}
static inline floats half_to_float(const uint16_t *h) {
  floats f;
  for (int o = 0; o < STRIP; o++) { /* the exponent's bias is 15 here, 127 there */
    uint32_t bits = (uint32_t)(h[o] & 0x7fff) << 13;
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    f[o] = magnitude * 0x1p112f * (h[o] >> 15 ? -1 : 1);
  }
  return f;
}
#endif

/* One strip times `count` rows, at most ROWS. Inlined for each count, so that the sums stay in
 * registers. y (count rows, stride outputs) gets the 16 results of each, plus the bias. */
static inline __attribute__((always_inline)) void strip_times(
    const int count, const linear *l, const int8_t *q, const uint16_t *scales, const int16_t *levels,
    const float *sizes, const float *sums, floats *y) {
  const long blocks = l->width / BLOCK;
#pragma GCC unroll 8
  for (int r = 0; r < count; r++) y[r] = (floats){0};
  for (long b = 0; b < blocks; b++, q += BLOCK * STRIP) {
    ints sum[ROWS];
    for (int i = 0; i < BLOCK * STRIP; i += 64) __builtin_prefetch(q + AHEAD + i, 0, LEVEL_2);
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) sum[r] = (ints){0};
#pragma GCC unroll 4
    for (int i = 0; i < BLOCK; i += 2) {
      const pairs w = widen(q + i * STRIP);
#pragma GCC unroll 8
      for (int r = 0; r < count; r++) {
        int32_t two;
        memcpy(&two, levels + r * (long)l->width + b * BLOCK + i, 4);
        sum[r] = multiply_add(sum[r], w, two);
      }
    }
    const floats s = half_to_float(scales + b * 2 * STRIP);
    const floats z = half_to_float(scales + b * 2 * STRIP + STRIP);
#pragma GCC unroll 8
    for (int r = 0; r < count; r++)
      y[r] += __builtin_convertvector(sum[r], floats) * (s * sizes[r * blocks + b]) +
              z * sums[r * blocks + b];
  }
}

/* The largest |x|, compared as integers: the same order, and NaN above all, so that it shows. */
static inline float peak_of(const float *x, int n) {
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

/* Row r of x, n numbers each, filled up with zeros to `width`. */
static void round_row(const float *x, int r, int n, int width, const rounded *to) {
  const int blocks = width / BLOCK;
  for (int b = 0; b < blocks; b++) {
    float padded[BLOCK] = {0};
    const int count = n - b * BLOCK < BLOCK ? n - b * BLOCK : BLOCK;
    const float *from = x + (long)r * n + b * BLOCK;
    if (count < BLOCK) {
      memcpy(padded, from, count * sizeof(float));
      from = padded;
    }
    const float peak = peak_of(from, BLOCK), by = 32767 / peak;
    int16_t *levels = to->levels + (long)r * width + b * BLOCK;
    int32_t sum = 0;
    for (int i = 0; i < BLOCK; i++) {
      const int level = (int)(from[i] * by + 32768.5f) - 32768;
      levels[i] = (int16_t)level;
      sum += level;
    }
    to->sizes[(long)r * blocks + b] = peak / 32767;
    to->sums[(long)r * blocks + b] = peak / 32767 * (float)sum;
  }
}

/* The same for each row of x, shared among the threads. */
static void round_rows(const float *x, int rows, int n, int width, const rounded *to) {
#pragma omp for schedule(static)
  for (int r = 0; r < rows; r++) round_row(x, r, n, width, to);
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

static float float_dot(const float *a, const float *b, int n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

/* x (n) times `count` rows of w, at most FEW: together they read x once. */
static void float_dots(const float *w, const float *x, int n, int count, float *y) {
  if (count < FEW) {
    for (int k = 0; k < count; k++) y[k] = float_dot(w + (long)k * n, x, n);
    return;
  }
  const float *w1 = w + n, *w2 = w1 + n, *w3 = w2 + n;
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int i = 0; i < n; i++) {
    s0 += w[i] * x[i];
    s1 += w1[i] * x[i];
    s2 += w2[i] * x[i];
    s3 += w3[i] * x[i];
  }
  y[0] = s0, y[1] = s1, y[2] = s2, y[3] = s3;
}

/* The product without the second half of LoRA, which needs all of `low`. The threads share the
 * work and do not wait for each other at the end (nowait): the caller places the barrier. */
static void product(const linear *l, const float *x, const rounded *from, int rows, float *y,
                    float *low) {
  const long blocks = l->width / BLOCK;
#pragma omp for schedule(static) nowait
  for (int start = 0; start < l->out; start += STRIP) {
    const int8_t *q = l->q + start * (long)l->width;
    const uint16_t *scales = l->scales + start / STRIP * blocks * 2 * STRIP;
    const int count = l->out - start < STRIP ? l->out - start : STRIP;
    for (int r = 0; r < rows; r += ROWS) {
      const int some = rows - r < ROWS ? rows - r : ROWS;
      const int16_t *levels = from->levels + (long)r * l->width;
      const float *sizes = from->sizes + r * blocks, *sums = from->sums + r * blocks;
      floats sixteen[ROWS];
      switch (some) {
#define CASE(n) case n: strip_times(n, l, q, scales, levels, sizes, sums, sixteen); break;
        CASE(1) CASE(2) CASE(3) CASE(4)
#if ROWS == 8
        CASE(5) CASE(6) CASE(7) CASE(8)
#endif
      }
      for (int k = 0; k < some; k++) {
        float *to = y + (long)(r + k) * l->out + start;
        memcpy(to, sixteen + k, count * sizeof(float));
        if (l->bias)
          for (int o = 0; o < count; o++) to[o] += l->bias[start + o];
      }
    }
  }
#pragma omp for schedule(static) nowait
  for (int job = 0; job < (l->rank + FEW - 1) / FEW * rows; job++) {
    const int r = job % rows, k = job / rows * FEW;
    float_dots(l->down + (long)k * l->in, x + (long)r * l->in, l->in,
               l->rank - k < FEW ? l->rank - k : FEW, low + (long)r * l->rank + k);
  }
}

/* LoRA's second half for the outputs from `start` to `end` of row r. */
static void adapt(const linear *l, const float *low, int r, int start, int end, float *y) {
  y += (long)r * l->out;
  low += (long)r * l->rank;
  int o = start;
  for (; l->rank && o + LANES <= end; o += LANES) { /* sums that stay in registers */
    float sum[LANES];
    memcpy(sum, y + o, sizeof sum);
    for (int k = 0; k < l->rank; k++)
      for (int i = 0; i < LANES; i++) sum[i] += low[k] * l->up[(long)k * l->out + o + i];
    memcpy(y + o, sum, sizeof sum);
  }
  for (int k = 0; k < l->rank; k++)
    for (int i = o; i < end; i++) y[i] += low[k] * l->up[(long)k * l->out + i];
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
#pragma omp simd reduction(+ : total)
  for (long t = 0; t < n; t++) {
    scores[t] = exponential(scores[t] - top);
    total += scores[t];
  }
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
      round_row(w->normed, r, hidden, l->query.width, &w->x);
    }
    product(&l->query, w->normed, &w->x, rows, w->query, low[0]);
    product(&l->key, w->normed, &w->x, rows, w->key, low[1]);
    product(&l->value, w->normed, &w->x, rows, w->value, low[2]);
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
    round_rows(w->mixed, rows, attention, l->output.width, &w->x);
    product(&l->output, w->mixed, &w->x, rows, w->change, low[0]);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) {
      const long at = (long)r * hidden;
      add_row(&l->output, low[0], r, w->change, x);
      norm(x + at, l->before_mlp, hidden, epsilon, w->normed + at);
      round_row(w->normed, r, hidden, l->gate.width, &w->x);
    }
    low[1] = w->low + rows * l->gate.rank;
    product(&l->gate, w->normed, &w->x, rows, w->gate, low[0]);
    product(&l->up, w->normed, &w->x, rows, w->up, low[1]);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int block = 0; block < ffn; block += 2 * BLOCK)
      for (int r = 0; r < rows; r++) {
        const int end = block + 2 * BLOCK < ffn ? block + 2 * BLOCK : ffn;
        float *gate = w->gate + (long)r * ffn, *up = w->up + (long)r * ffn;
        adapt(&l->gate, low[0], r, block, end, w->gate);
        adapt(&l->up, low[1], r, block, end, w->up);
        for (int i = block; i < end; i++) gate[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
      }
    round_rows(w->gate, rows, ffn, l->down.width, &w->x);
    product(&l->down, w->gate, &w->x, rows, w->change, low[0]);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) add_row(&l->down, low[0], r, w->change, x);
  }
}

/* y (rows, out) of one layer without LoRA, such as the head. */
void times(const linear *l, const float *x, int rows, const rounded *into, float *y) {
#pragma omp parallel
  {
    round_rows(x, rows, l->in, l->width, into);
    product(l, x, into, rows, y, 0);
  }
}

/* The weights as floats, transposed: to (in, outputs). `bfloat16`:
 * the upper half of each float, rounded to even. For products of many rows, which torch does. */
void unpack(const linear *l, int outputs, int bfloat16, void *to) {
  const long blocks = l->width / BLOCK;
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; b++)
    for (int start = 0; start < outputs; start += STRIP) {
      const long strip = start / STRIP;
      const int8_t *q = l->q + strip * l->width * STRIP + b * BLOCK * STRIP;
      const uint16_t *scales = l->scales + (strip * blocks + b) * 2 * STRIP;
      const floats s = half_to_float(scales), z = half_to_float(scales + STRIP);
      const int count = outputs - start < STRIP ? outputs - start : STRIP;
      for (int i = 0; i < BLOCK; i++) {
        shorts two; /* inputs i and i + 1 of each output */
        memcpy(&two, q + i / 2 * 2 * STRIP, sizeof two);
        two = (i % 2 ? two : two << 8) >> 8;
        const floats f = __builtin_convertvector(__builtin_convertvector(two, ints), floats) * s + z;
        const long at = (long)(b * BLOCK + i) * outputs + start;
        if (b * BLOCK + i >= l->in) break;
        if (bfloat16) {
          const uints bits = (uints)f, even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
          const ushorts upper = __builtin_convertvector(even, ushorts);
          memcpy((uint16_t *)to + at, &upper, count * sizeof(uint16_t));
        } else {
          memcpy((float *)to + at, &f, count * sizeof(float));
        }
      }
    }
}

/* A tile of logits z (rows, n) of a softmax that goes through the vocabulary tile by tile. With the
 * largest logit so far, peak (rows): total = sum exp(z - peak), expected = sum exp(z - peak)
 * (z - peak); shrink is what the sums so far were multiplied by, since the peak rose. exp(z - peak)
 * takes the place of z; `weights` gets it in bfloat16, or is none. */
void softmax_tile(float *z, int rows, int n, float by, float *peak, float *total, float *expected,
                  float *shrink, uint16_t *weights) {
#pragma omp parallel for schedule(static)
  for (int r = 0; r < rows; r++) {
    float *row = z + (long)r * n, top = peak[r], sum = 0, moment = 0;
#pragma omp simd reduction(max : top)
    for (int i = 0; i < n; i++) {
      row[i] *= by;
      top = row[i] > top ? row[i] : top;
    }
#pragma omp simd reduction(+ : sum, moment)
    for (int i = 0; i < n; i++) {
      const float below = row[i] - top, e = exponential(below);
      sum += e;
      moment += e * below;
      row[i] = e;
    }
    if (weights) {
      uint16_t *to = weights + (long)r * n;
      for (int i = 0; i < n; i++) { /* rounded to even */
        uint32_t bits;
        memcpy(&bits, row + i, 4);
        to[i] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
      }
    }
    const float s = exponential(peak[r] - top);
    expected[r] = s * (expected[r] + total[r] * (peak[r] - top)) + moment;
    total[r] = s * total[r] + sum;
    peak[r] = top;
    shrink[r] = s;
  }
}

#define PIECE 1024 /* probabilities that are summed in floats */

/* One token of each row of logits (rows, n), by inverse transform: the first whose probabilities,
 * those before it included, exceed `uniform` (rows). `by` is 1 / temperature. */
void draw(const float *logits, int rows, int n, float by, const double *uniform, int64_t *token,
          float *log_prob) {
#pragma omp parallel for schedule(static)
  for (int r = 0; r < rows; r++) {
    const float *x = logits + (long)r * n;
    float top = x[0];
#pragma omp simd reduction(max : top)
    for (int i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    double total = 0, sums[n / PIECE + 1];
    for (int start = 0; start < n; start += PIECE) {
      const int end = start + PIECE < n ? start + PIECE : n;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int i = start; i < end; i++) sum += exponential((x[i] - top) * by);
      total += sums[start / PIECE] = sum;
    }
    const double point = uniform[r] * total;
    double before = 0;
    int i = 0; /* the piece, and then the token in it; rounding never leads beyond the last one */
    while (i + PIECE < n && before + sums[i / PIECE] <= point) before += sums[i / PIECE], i += PIECE;
    while (i + 1 < n && (before += exponential((x[i] - top) * by)) <= point) i++;
    token[r] = i;
    log_prob[r] = (x[i] - top) * by - (float)log(total);
  }
}
