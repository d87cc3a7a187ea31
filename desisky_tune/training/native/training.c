/* Training of a ReLU MLP under AdamW on one core: nothing but loops over vectors.

   Everything that a step touches lies in panels of PANEL = 16 floats, so that a vector load is
   always of consecutive numbers and a panel streams through the first-level cache:

   - weights of a layer of K inputs and J units:  [K / 16][J][16], inputs innermost;
   - units (and signals) of a batch:              [batch / 16][J][16], exposures innermost;
   - the units once more, for the gradients:      [J / 16][batch][16], units innermost
     (one row more or so in the middle: `weight_pitch`).

   With that the three products of a layer are sums of (number) x (vector of 16) over operands as
   they lie: forward  unit[j] += W[k][j] unit[k];  backward  signal[k] += W[k][j] signal[j];
   gradient  G[.][j] += signal[j] units[.].  A tile of TALL rows by SIDE panels stays in registers
   over the whole sum, and what follows is done to it there (bias and ReLU; the mask), or right
   after from a buffer of a tile's size (Adam): no gradient leaves the first-level cache.

   A unit that is zero for a whole batch (in the last layers of a trained model every fourth) is
   left out of all three: what it is multiplied with adds nothing.

   Each element is summed in one order, whatever the length of a vector. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PANEL 16
#if defined(__AVX512F__)
#define LANES 16
#define TALL 12
#define SIDE 2 /* 24 of 32 registers; with 12 each sum would wait for its loads */
#elif defined(__AVX__)
#define LANES 8
#define TALL 6
#elif defined(__aarch64__)
#define LANES 4
#define TALL 6
#else
#define LANES 4
#define TALL 2
#endif
#ifndef SIDE
#define SIDE 1
#endif
/* Vectors in a panel, and in a tile's row; where the vectors of a row lie, its panels `apart`. */
#define PARTS (PANEL / LANES)
#define WIDE (SIDE * PARTS)
#define PART(p, apart) ((p) / PARTS * (apart) + (p) % PARTS * LANES)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

INLINE vec load(const float *at) {
    vec v;
    memcpy(&v, at, sizeof v);
    return v;
}

INLINE void store(float *at, vec v) { memcpy(at, &v, sizeof v); }

INLINE vec spread(float x) { return x - (vec){0}; }

/* a b + c, rounded once where the processor can. Said and not left to the compiler, which may fuse
   either of two products, and not the same one in every copy of a loop. */
INLINE vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* Whether any lane is set. */
INLINE int some(ivec x) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif defined(__AVX__)
    return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    int32_t any = 0;
    for (int i = 0; i < LANES; i++) any |= x[i];
    return any != 0;
#endif
}

static int64_t round_up(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }
/* Rows from one panel to the next, of weights and of units: an odd number, so that panels do not
   fall on the same lines of the cache (3 to 8 % at width 128). */
static int64_t weight_pitch(int64_t rows) { return rows | 1; }
static int64_t unit_pitch(int64_t rows) { return round_up(rows) + 1; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---------------------------------------------------------------- Adam */

#define BETA1 0.9f
#define BETA2 0.999f
#define EPSILON 1e-8f

typedef struct {
    float size, epsilon; /* rate / (1 - beta1^t) and EPSILON, both x root of (1 - beta2^t) */
    float decay, scale;  /* rate x weight decay, what clips the gradient: 0 and 1 change no bit */
    int plain;           /* whether they are 0 and 1 */
} Rates;

#if !defined(__AVX512F__)
INLINE vec root_of(vec x) {
#if defined(__AVX__)
    return (vec)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE__)
    return (vec)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
    return (vec)vsqrtq_f32((float32x4_t)x);
#else
    vec y;
    for (int i = 0; i < LANES; i++) y[i] = sqrtf(x[i]);
    return y;
#endif
}
#endif

/* first / (root of second + epsilon).

   With vectors of 512 bits the divider takes longer for a root and a quotient than all else in
   Adam, so there the root is made beside it: from an estimate of 14 bits by a Newton step, right
   to two units in the last place. Where `second` is zero or infinite the estimate is set to 1: the
   sum is then epsilon, or infinite. */
INLINE vec over_root(vec first, vec second, float epsilon) {
#if defined(__AVX512F__)
    const __m512i where = _mm512_set1_epi32(0xA << 8 | 0xA << 20);
    const __m512 x = (__m512)second, one = _mm512_set1_ps(1);
    const __m512 estimate = _mm512_fixupimm_ps(_mm512_rsqrt14_ps(x), x, where, 0);
    const __m512 root = _mm512_mul_ps(x, estimate);
    const __m512 error = _mm512_fnmadd_ps(root, estimate, one);
    const __m512 better = _mm512_fmadd_ps(error, _mm512_set1_ps(0.5f), one);
    return first / (vec)_mm512_fmadd_ps(root, better, _mm512_set1_ps(epsilon));
#else
    return first / (root_of(second) + epsilon);
#endif
}

/* AdamW as optax has it, the bias corrections in `size` and `epsilon`. */
INLINE void adam(float *w, float *m, float *v, vec g, Rates by, const int plain) {
    if (!plain) g *= by.scale;
    const vec first = fused(spread(BETA1), load(m), (1 - BETA1) * g);
    const vec second = fused(spread(BETA2), load(v), (1 - BETA2) * (g * g));
    store(m, first);
    store(v, second);
    vec kept = load(w);
    if (!plain) kept = fused(spread(-by.decay), kept, kept);
    store(w, fused(over_root(first, second, by.epsilon), spread(-by.size), kept));
}

/* ---------------------------------------------------------------- tiles */

/* The units of a layer that are not zero for all of a batch. */
typedef struct {
    int64_t count, all;
    int64_t *row;    /* [all]: where a unit lies in a panel of units; the idle ones at the end */
    int64_t *weight; /* [count]: where its weights lie in the layer that it is an input of */
} Live;

/* sum[r] += numbers[r] x vectors over the live inputs of a layer; the numbers of a row are its
   weights, the rows 16 apart. `wide` vectors, those of the second panel `apart`. */
INLINE void sum_inputs(vec sum[TALL][WIDE], const int tall, const int wide,
                       const float *numbers, const Live *live, const float *vectors, int64_t apart) {
    for (int64_t start = 0; start < live->count; start += PANEL) {
        const int64_t end = smaller(start + PANEL, live->count);
        const float *ahead = numbers + live->weight[smaller(end, live->count - 1)] / PANEL * PANEL;
        UNROLL for (int r = 0; r < tall; r++) __builtin_prefetch(ahead + r * PANEL);
        for (int64_t i = start; i < end; i++) {
            const float *at = vectors + live->row[i], *number = numbers + live->weight[i];
            vec b[WIDE];
            UNROLL for (int p = 0; p < wide; p++) b[p] = load(at + PART(p, apart));
            UNROLL for (int r = 0; r < tall; r++) {
                const vec a = spread(number[r * PANEL]);
                UNROLL for (int p = 0; p < wide; p++) sum[r][p] += a * b[p];
            }
        }
    }
}

/* The same over the live units of a layer; the numbers of row r begin at rows[r]. */
INLINE void sum_units(vec sum[TALL][WIDE], const int tall, const int wide,
                      const float *const *rows, const Live *live, const float *vectors,
                      int64_t apart) {
    for (int64_t i = 0; i < live->count; i++) {
        const int64_t at = live->row[i];
        vec b[WIDE];
        UNROLL for (int p = 0; p < wide; p++) b[p] = load(vectors + at + PART(p, apart));
        UNROLL for (int r = 0; r < tall; r++) {
            const vec a = spread(rows[r][at]);
            UNROLL for (int p = 0; p < wide; p++) sum[r][p] += a * b[p];
        }
    }
}

/* The same over a batch of `count` exposures, in panels `block` floats apart. */
INLINE void sum_batch(vec sum[TALL][WIDE], const int tall, const int wide,
                      const float *const *rows, int64_t block, int64_t count,
                      const float *vectors, int64_t apart) {
    for (int64_t start = 0, at = 0; start < count; start += PANEL, at += block) {
        const int64_t terms = smaller(PANEL, count - start);
        for (int64_t k = at; k < at + terms; k++, vectors += PANEL) {
            vec b[WIDE];
            UNROLL for (int p = 0; p < wide; p++) b[p] = load(vectors + PART(p, apart));
            UNROLL for (int r = 0; r < tall; r++) {
                const vec a = spread(rows[r][k]);
                UNROLL for (int p = 0; p < wide; p++) sum[r][p] += a * b[p];
            }
        }
    }
}

/* Call TILE(tall) for rows 0..n-1 in tiles of nearly equal height, at most TALL, and then AFTER. */
#define CASE(TILE, height) \
    case height:           \
        TILE(height);      \
        break;
#if TALL == 12
#define HIGHER(TILE) \
    CASE(TILE, 7) CASE(TILE, 8) CASE(TILE, 9) CASE(TILE, 10) CASE(TILE, 11) CASE(TILE, 12)
#else
#define HIGHER(TILE)
#endif
#if TALL >= 6
#define MIDDLE(TILE) CASE(TILE, 3) CASE(TILE, 4) CASE(TILE, 5) CASE(TILE, 6)
#else
#define MIDDLE(TILE)
#endif
#define BY_TILES(n, TILE, AFTER)                                                   \
    for (int64_t from = 0, left = (n), tiles = ((n) + TALL - 1) / TALL; left > 0; tiles--) { \
        const int64_t height = (left + tiles - 1) / tiles;                  \
        switch (height) { CASE(TILE, 1) CASE(TILE, 2) MIDDLE(TILE) HIGHER(TILE) } \
        AFTER                                                               \
        from += height;                                                     \
        left -= height;                                                     \
    }

/* ---------------------------------------------------------------- a layer */

typedef struct {
    int64_t inputs, units;           /* K, J */
    float *weight, *weight1, *weight2; /* and moments: [K / 16][J][16] */
    float *bias, *bias1, *bias2;       /* [J], padded to 16 */
} Layer;

/* out = W in + bias (max 0 where `relu`), for `wide` vectors of the batch. */
INLINE void forward_wide(const Layer *layer, const Live *inputs, const float *in, float *out,
                         int relu, int64_t in_apart, int64_t out_apart, const int wide) {
#define TILE(tall)                                                                       \
    {                                                                                    \
        vec sum[TALL][WIDE];                                                             \
        UNROLL for (int r = 0; r < tall; r++)                                            \
            UNROLL for (int p = 0; p < wide; p++) sum[r][p] = spread(layer->bias[from + r]); \
        sum_inputs(sum, tall, wide, layer->weight + from * PANEL, inputs, in, in_apart); \
        UNROLL for (int r = 0; r < tall; r++) UNROLL for (int p = 0; p < wide; p++) {    \
            vec value = sum[r][p];                                                       \
            if (relu) value = (vec)((ivec)value & ~(value < 0));                         \
            store(out + (from + r) * PANEL + PART(p, out_apart), value);                          \
        }                                                                                \
    }
    BY_TILES(layer->units, TILE, )
#undef TILE
}

/* The same for a batch. */
static void forward(const Layer *layer, const Live *inputs, const float *in, float *out, int relu,
                    int64_t panels) {
    const int64_t in_apart = unit_pitch(layer->inputs) * PANEL;
    const int64_t out_apart = unit_pitch(layer->units) * PANEL;
    for (; panels >= SIDE; panels -= SIDE, in += SIDE * in_apart, out += SIDE * out_apart)
        forward_wide(layer, inputs, in, out, relu, in_apart, out_apart, WIDE);
    if (SIDE > 1 && panels) forward_wide(layer, inputs, in, out, relu, in_apart, out_apart, PARTS);
}

/* out = W^T in, zero where `units` is, for `wide` vectors of the batch. */
INLINE void backward_wide(const Layer *layer, const Live *inputs, const Live *outputs,
                          const float *in, const float *units, float *out, int64_t in_apart,
                          int64_t out_apart, const int wide) {
#define TILE(tall)                                                                        \
    {                                                                                     \
        vec sum[TALL][WIDE];                                                             \
        const float *rows[TALL];                                                          \
        UNROLL for (int r = 0; r < tall; r++) {                                           \
            rows[r] = layer->weight + inputs->weight[from + r];                           \
            UNROLL for (int p = 0; p < wide; p++) sum[r][p] = spread(0);                  \
        }                                                                                 \
        sum_units(sum, tall, wide, rows, outputs, in, in_apart);                          \
        UNROLL for (int r = 0; r < tall; r++) UNROLL for (int p = 0; p < wide; p++) {     \
            const int64_t at = inputs->row[from + r] + PART(p, out_apart);                \
            store(out + at, (vec)((ivec)sum[r][p] & (load(units + at) > 0)));             \
        }                                                                                 \
    }
    BY_TILES(inputs->count, TILE, )
#undef TILE
    for (int64_t i = inputs->count; i < inputs->all; i++)
        UNROLL for (int p = 0; p < wide; p++) store(out + inputs->row[i] + PART(p, out_apart), spread(0));
}

/* The same for a batch. */
static void backward(const Layer *layer, const Live *inputs, const Live *outputs, const float *in,
                     const float *units, float *out, int64_t panels) {
    const int64_t in_apart = unit_pitch(layer->units) * PANEL;
    const int64_t out_apart = unit_pitch(layer->inputs) * PANEL;
    for (; panels >= SIDE; panels -= SIDE) {
        backward_wide(layer, inputs, outputs, in, units, out, in_apart, out_apart, WIDE);
        in += SIDE * in_apart, units += SIDE * out_apart, out += SIDE * out_apart;
    }
    if (SIDE > 1 && panels)
        backward_wide(layer, inputs, outputs, in, units, out, in_apart, out_apart, PARTS);
}

/* The gradient of `tall` live units by `wide` vectors of inputs, summed over a batch. */
INLINE void make_gradient(float *made, const int tall, const int wide, const int64_t *row,
                          const float *signal, int64_t stride, int64_t rows, const float *column,
                          int64_t apart) {
    vec sum[TALL][WIDE];
    const float *line[TALL];
    UNROLL for (int r = 0; r < tall; r++) {
        line[r] = signal + row[r];
        UNROLL for (int p = 0; p < wide; p++) sum[r][p] = spread(0);
    }
    sum_batch(sum, tall, wide, line, stride, rows, column, apart);
    UNROLL for (int r = 0; r < tall; r++)
        UNROLL for (int p = 0; p < wide; p++) store(made + (r * WIDE + p) * LANES, sum[r][p]);
}

/* Step along a gradient that `make_gradient` made, into the weights from `corner` on. */
INLINE void follow(Layer *layer, const float *made, int64_t tall, int64_t wide, const int64_t *row,
                   int64_t corner, int64_t across, Rates by, const int plain) {
    for (int64_t r = 0; r < tall; r++)
        for (int64_t p = 0; p < wide; p++) {
            const int64_t at = corner + row[r] + PART(p, across);
            adam(layer->weight + at, layer->weight1 + at, layer->weight2 + at,
                 load(made + (r * WIDE + p) * LANES), by, plain);
        }
}

/* Update the weights of `wide` vectors of inputs: see `update`. */
INLINE double update_wide(Layer *layer, const Live *live, const float *signal, int64_t stride,
                          int64_t rows, const float *column, int64_t apart, int64_t corner,
                          const Rates *by, const int wide) {
    const int64_t across = weight_pitch(layer->units) * PANEL;
    float made[TALL * WIDE * LANES] __attribute__((aligned(64)));
    double squares[SIDE] = {0}, all = 0;
#define TILE(tall)                                                                        \
    make_gradient(made, tall, wide, live->row + from, signal, stride, rows, column, apart);
#define SINK                                                                              \
    if (!by)                                                                              \
        for (int64_t i = 0; i < height * WIDE * LANES; i++) {                             \
            if (i / LANES % WIDE < wide)                                                  \
                squares[i / PANEL % SIDE] += (double)made[i] * (double)made[i];           \
        }                                                                                 \
    else if (by->plain)                                                                   \
        follow(layer, made, height, wide, live->row + from, corner, across, *by, 1);      \
    else                                                                                  \
        follow(layer, made, height, wide, live->row + from, corner, across, *by, 0);
    BY_TILES(live->count, TILE, SINK)
#undef TILE
#undef SINK
    for (int side = 0; side < SIDE; side++) all += squares[side];
    if (by)
        for (int64_t i = live->count; i < live->all; i++)
            for (int p = 0; p < wide; p++) {
                const int64_t at = corner + live->row[i] + PART(p, across);
                float *m = layer->weight1 + at, *v = layer->weight2 + at;
                if (by->plain && !some(load(m) != 0)) /* faded: a step of 0 */
                    store(v, BETA2 * load(v));
                else
                    adam(layer->weight + at, m, v, spread(0), *by, 0);
            }
    return all;
}

/* Update the weights: gradient [K / 16][J][16] = sum over the batch of signal x units; it is zero
   for idle units, whose moments fade. Without `by` nothing changes, and the sum of the gradient's
   squares is returned. */
static double update(Layer *layer, const Live *live, const float *signal, int64_t stride,
                     int64_t rows, const float *units, int64_t padded, const Rates *by) {
    const int64_t apart = padded * PANEL, across = weight_pitch(layer->units) * PANEL;
    const int64_t panels = (layer->inputs + PANEL - 1) / PANEL;
    double squares = 0;
    int64_t panel = 0;
    for (; panel + SIDE <= panels; panel += SIDE)
        squares += update_wide(layer, live, signal, stride, rows, units + panel * apart, apart,
                               panel * across, by, WIDE);
    if (SIDE > 1 && panel < panels)
        squares += update_wide(layer, live, signal, stride, rows, units + panel * apart, apart,
                               panel * across, by, PARTS);
    return squares;
}

/* Transpose a block of 16 x 16. */
INLINE void transpose_block(const float *in, float *out) {
#if defined(__AVX512F__)
    /* Four columns of rows i, i + 4, i + 8, i + 12 side by side; then blocks of 4 x 4. */
    for (int side = 0; side < PANEL; side += 4, out += 4 * PANEL) {
        __m512 r[4];
        __m512d t[4];
        UNROLL for (int i = 0; i < 4; i++) {
            const float *at = in + i * PANEL + side;
            r[i] = _mm512_castps128_ps512(_mm_loadu_ps(at));
            r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(at + 4 * PANEL), 1);
            r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(at + 8 * PANEL), 2);
            r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(at + 12 * PANEL), 3);
        }
        UNROLL for (int i = 0; i < 4; i += 2) {
            t[i] = _mm512_castps_pd(_mm512_unpacklo_ps(r[i], r[i + 1]));
            t[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(r[i], r[i + 1]));
        }
        UNROLL for (int i = 0; i < 2; i++) {
            store(out + 2 * i * PANEL, (vec)_mm512_unpacklo_pd(t[i], t[i + 2]));
            store(out + (2 * i + 1) * PANEL, (vec)_mm512_unpackhi_pd(t[i], t[i + 2]));
        }
    }
#elif defined(__AVX__)
    for (int half = 0; half < 2; half++)
        for (int side = 0; side < 2; side++) {
            __m256 r[8], t[8];
            UNROLL for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(in + (half * 8 + i) * PANEL + side * 8);
            UNROLL for (int i = 0; i < 8; i += 2) {
                t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
                t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
            }
            UNROLL for (int i = 0; i < 8; i += 4) {
                r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
                r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
                r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
                r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
            }
            UNROLL for (int i = 0; i < 4; i++) {
                t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
                t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
            }
            UNROLL for (int i = 0; i < 8; i++) _mm256_storeu_ps(out + (side * 8 + i) * PANEL + half * 8, t[i]);
        }
#else
    for (int i = 0; i < PANEL; i++)
        for (int j = 0; j < PANEL; j++) out[j * PANEL + i] = in[i * PANEL + j];
#endif
}

/* Update the biases: their gradient is the sum of the signal over the batch. */
static void update_bias(Layer *layer, const float *signal, int64_t stride, int64_t panels, Rates by) {
    float summed[PANEL * PANEL], turned[PANEL * PANEL];
    for (int64_t from = 0; from < layer->units; from += PANEL) {
        const float *rows = signal + from * PANEL;
        const int64_t size = smaller(PANEL, layer->units - from) * PANEL;
        memset(summed, 0, sizeof summed);
        for (int64_t panel = 0; panel < panels; panel++)
            for (int64_t at = 0; at < size; at += LANES)
                store(summed + at, load(summed + at) + load(rows + panel * stride + at));
        transpose_block(summed, turned);
        for (int p = 0; p < PANEL; p += LANES) {
            vec gradient = load(turned + p);
            for (int i = 1; i < PANEL; i++) gradient += load(turned + i * PANEL + p);
            adam(layer->bias + from + p, layer->bias1 + from + p, layer->bias2 + from + p, gradient, by, 0);
        }
    }
}

/* The sum of squares of the gradient that `update_bias` takes. */
static double bias_squares(const Layer *layer, const float *signal, int64_t stride, int64_t rows) {
    double squares = 0;
    for (int64_t unit = 0; unit < layer->units; unit++) {
        double bias = 0;
        for (int64_t row = 0; row < rows; row++)
            bias += (double)signal[row / PANEL * stride + unit * PANEL + row % PANEL];
        squares += bias * bias;
    }
    return squares;
}

/* ---------------------------------------------------------------- the order of an epoch */

static void threefry(uint32_t k0, uint32_t k1, uint32_t *x0, uint32_t *x1) {
    static const int turns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    const uint32_t key[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDAu};
    uint32_t a = *x0 + key[0], b = *x1 + key[1];
    for (int round = 0; round < 5; round++) {
        for (int i = 0; i < 4; i++) {
            const int turn = turns[round % 2][i];
            a += b;
            b = (b << turn | b >> (32 - turn)) ^ a;
        }
        a += key[(round + 1) % 3];
        b += key[(round + 2) % 3] + (uint32_t)round + 1;
    }
    *x0 = a;
    *x1 = b;
}

/* `desisky_tune.training.shuffle.epoch_order`: sort the rows by random bits of (seed, epoch).
   `work` holds 3 x rows words and the counts. */
void epoch_order(uint32_t seed, uint32_t epoch, int64_t rows, int32_t *order, uint32_t *work) {
    uint32_t k0 = 0, k1 = epoch;
    threefry(0, seed, &k0, &k1);
    uint32_t *bits = work, *keys = work + rows;
    int32_t *from = (int32_t *)(work + 2 * rows);
    uint32_t shift = 0;
    if (rows <= 1 << 16)
        while (larger(rows - 1, 1) >> shift) shift++;
    for (int64_t i = 0; i < rows; i++) {
        uint32_t a = (uint32_t)((uint64_t)i >> 32), b = (uint32_t)i;
        threefry(k0, k1, &a, &b);
        bits[i] = (a ^ b) >> shift << shift;
        order[i] = (int32_t)i;
    }
    for (int pass = 0; pass < 4; pass++) {
        uint32_t counts[257] = {0};
        for (int64_t i = 0; i < rows; i++) counts[(bits[i] >> 8 * pass & 255) + 1]++;
        for (int i = 0; i < 256; i++) counts[i + 1] += counts[i];
        for (int64_t i = 0; i < rows; i++) {
            const uint32_t to = counts[bits[i] >> 8 * pass & 255]++;
            keys[to] = bits[i];
            from[to] = order[i];
        }
        memcpy(bits, keys, (size_t)rows * sizeof *bits);
        memcpy(order, from, (size_t)rows * sizeof *order);
    }
}

/* ---------------------------------------------------------------- a training */

enum { L2 = 0, HUBER = 1 };
enum { BY_RMSE = 0, BY_LOSS = 1 };

/* As `Training` in program.py has it. */
typedef struct {
    int64_t inputs, outputs, width, depth;
    int64_t batch, rows, validation_rows;
    int64_t loss, select, validate_every, shuffle, drop_last;
    int64_t epoch, epochs, seed;
    int64_t warmup_steps, decay_steps; /* of the learning rate */
    double rate, delta, final_rate, weight_decay, gradient_clip;
    const float *x, *y, *validation_x, *validation_y; /* row-major */
    const float *target_mean, *target_sd;
    float *weights, *first, *second, *best; /* as `lay_out` has them; updated */
    float *table;                           /* (epochs, 4 + outputs) */
    int64_t steps;                          /* of Adam; updated */
    double best_value;                      /* updated */
    int64_t best_epoch;                     /* updated */
    int64_t failed;                         /* updated */
} Training;

typedef struct {
    Layer *layers;
    float **units;              /* by layer: its inputs in panels */
    float *rows, *turned;       /* the model's inputs, and a layer's, as the gradient wants them */
    float *signal[2], *output;
    Live *live;     /* by layer: its inputs; and the model's outputs */
    int64_t panels; /* of the batch, at most */
} Scratch;

static int64_t layer_inputs(const Training *t, int64_t layer) {
    return layer == 0 ? t->inputs : t->width;
}

static int64_t layer_units(const Training *t, int64_t layer) {
    return layer == t->depth ? t->outputs : t->width;
}

/* Floats that the weights of a training take: by layer, weights and biases in whole panels. */
int64_t parameter_count(int64_t inputs, int64_t outputs, int64_t width, int64_t depth) {
    const Training t = {.inputs = inputs, .outputs = outputs, .width = width, .depth = depth};
    int64_t count = 0;
    for (int64_t layer = 0; layer <= depth; layer++)
        count += round_up(layer_inputs(&t, layer)) * weight_pitch(layer_units(&t, layer)) +
                 round_up(layer_units(&t, layer));
    return count;
}

static void lay_out(const Training *t, Scratch *s, float *weights, float *first, float *second) {
    int64_t at = 0;
    for (int64_t layer = 0; layer <= t->depth; layer++) {
        Layer *l = s->layers + layer;
        l->inputs = layer_inputs(t, layer);
        l->units = layer_units(t, layer);
        const int64_t size = round_up(l->inputs) * weight_pitch(l->units);
        l->weight = weights + at, l->weight1 = first + at, l->weight2 = second + at;
        at += size;
        l->bias = weights + at, l->bias1 = first + at, l->bias2 = second + at;
        at += round_up(l->units);
    }
}

/* Put rows into panels: `units` with exposures innermost, and `columns` with inputs innermost. */
static void take_rows(const float *x, int64_t inputs, const int32_t *order, int64_t count,
                      float *units, float *columns, int64_t padded) {
    const int64_t high = unit_pitch(inputs);
    for (int64_t i = 0; i < count; i++) {
        const float *row = x + (order ? order[i] : i) * inputs;
        float *unit = units + i / PANEL * high * PANEL + i % PANEL;
        for (int64_t k = 0; k < inputs; k++) {
            unit[k * PANEL] = row[k];
            if (columns) columns[k / PANEL * padded * PANEL + i * PANEL + k % PANEL] = row[k];
        }
    }
}

/* Terms a batch row spends on a unit (its own sum, its part in the next layer's and in their
   gradients) from which on it pays to see whether it is idle. */
#define WORTH 96

/* Find which units of a layer are not zero for all of a batch; what is no number is not. `pitch`:
   of the weights that they are the inputs of. */
static void find_live(Live *live, const float *units, int64_t panels, int64_t pitch) {
    const int64_t high = unit_pitch(live->all) * PANEL;
    int64_t count = 0, idle = live->all;
    for (int64_t unit = 0; unit < live->all; unit++) {
        const float *at = units + unit * PANEL;
        ivec any = {0};
        for (int64_t panel = 0; panel < panels; panel++, at += high)
            UNROLL for (int p = 0; p < PARTS; p++) any |= (ivec)load(at + p * LANES);
        const int lives = some(any);
        live->row[lives ? count : idle - 1] = unit * PANEL;
        live->weight[count] = unit / PANEL * pitch * PANEL + unit % PANEL;
        count += lives;
        idle -= !lives;
    }
    live->count = count;
}

/* Run the layers on what stands in units[0]. */
static void run_forward(const Training *t, Scratch *s, int64_t panels) {
    for (int64_t layer = 0; layer <= t->depth; layer++) {
        const Layer *l = s->layers + layer;
        float *to = layer == t->depth ? s->output : s->units[layer + 1];
        forward(l, s->live + layer, s->units[layer], to, layer < t->depth, panels);
        if (layer < t->depth && l->inputs + 2 * l[1].units >= WORTH)
            find_live(s->live + layer + 1, to, panels, weight_pitch(l[1].units));
    }
}

/* Lay a layer's inputs out for the gradient, and return where they lie. One place serves all
   layers: it stays in the second-level cache, and what is turned was just read by `backward`. */
static const float *turn(const Scratch *s, int64_t layer, int64_t inputs, int64_t panels) {
    if (layer == 0) return s->rows;
    const int64_t padded = s->panels * PANEL + 1, high = unit_pitch(inputs) * PANEL;
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t j = 0; j < inputs; j += PANEL)
            transpose_block(s->units[layer] + panel * high + j * PANEL,
                            s->turned + (j * padded + panel * PANEL * PANEL));
    return s->turned;
}

/* Return the loss of a batch; the signal at the output goes to signal[0]. */
static double residuals(const Training *t, Scratch *s, const int32_t *order, int64_t start,
                        int64_t count, int64_t panels) {
    const int64_t high = unit_pitch(t->outputs);
    const float share = 1.0f / (float)(count * t->outputs), delta = (float)t->delta;
    float losses[PANEL] = {0};
    double total = 0;
    memset(s->signal[0], 0, (size_t)(panels * high * PANEL) * sizeof(float));
    for (int64_t from = 0; from < count; from += PANEL) {
        const int64_t rows = smaller(PANEL, count - from);
        float seen[PANEL * t->outputs];
        memset(seen, 0, sizeof seen);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t row = order ? order[start + from + i] : start + from + i;
            for (int64_t o = 0; o < t->outputs; o++) seen[o * PANEL + i] = t->y[row * t->outputs + o];
        }
        for (int64_t o = 0; o < t->outputs; o++) {
            const int64_t at = from * high + o * PANEL;
            const float mean = t->target_mean[o], sd = t->target_sd[o], factor = share * sd;
            const float *output = s->output + at, *observed = seen + o * PANEL;
            float *signal = s->signal[0] + at;
            if (t->loss == L2)
                for (int64_t i = 0; i < rows; i++) {
                    const float r = output[i] * sd + mean - observed[i];
                    losses[i] += r * r;
                    signal[i] = 2 * r * factor;
                }
            else
                for (int64_t i = 0; i < rows; i++) {
                    const float r = output[i] * sd + mean - observed[i], size = fabsf(r);
                    /* Not fminf: a residual that is no number must stay one. */
                    const float cut = size > delta ? delta : size;
                    losses[i] += cut * (size - 0.5f * cut);
                    signal[i] = copysignf(cut, r) * factor;
                }
        }
    }
    for (int i = 0; i < PANEL; i++) total += (double)losses[i];
    return total / (double)(count * t->outputs);
}

/* The learning rate of a step, counted from 0: a linear rise, then half a cosine down. */
static double rate_at(const Training *t, int64_t step) {
    if (step < t->warmup_steps) return t->rate * (double)step / (double)t->warmup_steps;
    if (!t->decay_steps) return t->rate;
    const double way = (double)smaller(step - t->warmup_steps, t->decay_steps) / (double)t->decay_steps;
    return t->rate * (t->final_rate + (1 - t->final_rate) * 0.5 * (1 + cos(M_PI * way)));
}

/* Send the signal at the output back through the layers. With `by` each is updated on the way;
   without, nothing changes, and the sum of the gradient's squares is returned. */
static double backpropagate(const Training *t, Scratch *s, int64_t count, const Rates *by) {
    const int64_t panels = round_up(count) / PANEL, padded = s->panels * PANEL + 1;
    float *signal = s->signal[0], *next = s->signal[1];
    double squares = 0;
    for (int64_t layer = t->depth; layer >= 0; layer--) {
        Layer *l = s->layers + layer;
        const int64_t out = unit_pitch(l->units) * PANEL;
        if (layer > 0)
            backward(l, s->live + layer, s->live + layer + 1, signal, s->units[layer], next, panels);
        const float *columns = turn(s, layer, l->inputs, panels);
        squares += update(l, s->live + layer + 1, signal, out, count, columns, padded, by);
        if (by)
            update_bias(l, signal, out, panels, *by);
        else
            squares += bias_squares(l, signal, out, count);
        float *swap = signal;
        signal = next, next = swap;
    }
    return squares;
}

/* One step on `count` rows; return their mean loss. */
static double take_step(Training *t, Scratch *s, const int32_t *order, int64_t start, int64_t count) {
    const int64_t panels = round_up(count) / PANEL, padded = s->panels * PANEL + 1;
    const int32_t *rows = order ? order + start : NULL;
    float scale = 1;
    take_rows(order ? t->x : t->x + start * t->inputs, t->inputs, rows, count, s->units[0],
              s->rows, padded);
    run_forward(t, s, panels);
    const double loss = residuals(t, s, order, start, count, panels);
    if (t->gradient_clip > 0) {
        /* The whole gradient's length stands before any of it is used: it is made twice. */
        const double norm = sqrt(backpropagate(t, s, count, NULL));
        if (!(norm < t->gradient_clip)) scale = (float)(t->gradient_clip / norm);
        residuals(t, s, order, start, count, panels);
    }
    const double rate = rate_at(t, t->steps), step = (double)++t->steps;
    const double unbias = sqrt(1 - pow(BETA2, step));
    const Rates by = {(float)(rate / (1 - pow(BETA1, step)) * unbias), (float)(EPSILON * unbias),
                      (float)(rate * t->weight_decay), scale,
                      t->weight_decay == 0 && scale == 1};
    backpropagate(t, s, count, &by);
    return loss;
}

/* Measure all validation rows: loss, objective, RMSE of each output. */
static void validate(const Training *t, Scratch *s, float *measured) {
    const int64_t high = unit_pitch(t->outputs), chunk = s->panels * PANEL;
    const float delta = (float)t->delta;
    double loss = 0, squares[t->outputs];
    memset(squares, 0, sizeof squares);
    for (int64_t start = 0; start < t->validation_rows; start += chunk) {
        const int64_t count = smaller(chunk, t->validation_rows - start);
        take_rows(t->validation_x + start * t->inputs, t->inputs, NULL, count, s->units[0], NULL, 0);
        run_forward(t, s, round_up(count) / PANEL);
        for (int64_t i = 0; i < count; i++)
            for (int64_t o = 0; o < t->outputs; o++) {
                const int64_t at = i / PANEL * high * PANEL + o * PANEL + i % PANEL;
                const float predicted = s->output[at] * t->target_sd[o] + t->target_mean[o];
                const float r = predicted - t->validation_y[(start + i) * t->outputs + o];
                const float size = fabsf(r), cut = size > delta ? delta : size;
                loss += (double)(t->loss == L2 ? r * r : cut * (size - 0.5f * cut));
                squares[o] += (double)r * (double)r;
            }
    }
    double mean = 0;
    for (int64_t o = 0; o < t->outputs; o++) {
        /* What single precision cannot hold has diverged, as it has for XLA. */
        const float square = (float)(squares[o] / (double)t->validation_rows);
        const double rmse = sqrt((double)square);
        measured[2 + o] = (float)rmse;
        mean += rmse / (double)t->outputs;
    }
    measured[0] = (float)(loss / (double)(t->validation_rows * t->outputs));
    measured[1] = (float)mean;
}

/* One epoch: a step on each batch, validation, the best weights; `row` is its line. */
static void take_epoch(Training *t, Scratch *s, int32_t *order, uint32_t *work, int64_t weights,
                       float *row) {
    if (t->shuffle) epoch_order((uint32_t)t->seed, (uint32_t)t->epoch, t->rows, order, work);
    double total = 0;
    int64_t used = 0;
    for (int64_t start = 0; start < t->rows; start += t->batch) {
        const int64_t count = smaller(t->batch, t->rows - start);
        if (count < t->batch && t->drop_last) break;
        total += (double)count * take_step(t, s, t->shuffle ? order : NULL, start, count);
        used += count;
    }
    row[0] = (float)(total / (double)used);
    const int due = t->epoch % t->validate_every == 0;
    float *measured = row + 1;
    if (due)
        validate(t, s, measured);
    else
        for (int64_t i = 0; i < 2 + t->outputs; i++) measured[i] = NAN;
    row[3 + t->outputs] = (float)due;
    t->failed = !isfinite(row[0]) || (due && !(isfinite(measured[0]) && isfinite(measured[1])));
    const float value = measured[t->select == BY_LOSS ? 0 : 1];
    if (due && !t->failed && value < t->best_value) {
        t->best_value = value;
        t->best_epoch = t->epoch;
        memcpy(t->best, t->weights, (size_t)weights * sizeof(float));
    }
    t->epoch++;
}

/* A piece of one large allocation. */
static float *piece(float **free_from, int64_t count) {
    float *at = *free_from;
    *free_from += round_up(count);
    return at;
}

static int64_t flush_small_numbers(void) {
#if defined(__SSE__)
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040); /* to zero, and from zero: moments of idle units decay so far */
    return before;
#elif defined(__aarch64__)
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | 1u << 24));
    return (int64_t)before;
#else
    return 0;
#endif
}

static void restore_small_numbers(int64_t before) {
#if defined(__SSE__)
    _mm_setcsr((unsigned)before);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)before));
#else
    (void)before;
#endif
}

/* Train until `epochs` more are done or a value is not finite. Return the epochs done, or -1
   where there is no memory. */
int64_t train(Training *t) {
    const int64_t layers = t->depth + 1, lanes = round_up(larger(t->batch < t->rows ? t->batch : t->rows, 8 * PANEL));
    const int64_t weights = parameter_count(t->inputs, t->outputs, t->width, t->depth);
    const int64_t high = unit_pitch(larger(t->width, larger(t->inputs, t->outputs)));
    int64_t floats = 4 * round_up(weights) + 3 * high * lanes + 4 * round_up(t->rows);
    for (int64_t layer = 0; layer < layers; layer++) floats += unit_pitch(layer_inputs(t, layer)) * lanes;
    floats += (round_up(t->inputs) + round_up(t->width)) * (lanes + 1);
    float *memory = NULL;
    Layer *shapes = calloc((size_t)layers, sizeof *shapes);
    float **places = calloc((size_t)layers, sizeof *places);
    Live *live = calloc((size_t)layers + 1, sizeof *live);
    floats += 4 * (layers + 1) * round_up(larger(t->width, larger(t->inputs, t->outputs)));
    if (!shapes || !places || !live || posix_memalign((void **)&memory, 64, (size_t)floats * sizeof(float))) {
        free(shapes), free(places), free(live);
        return -1;
    }
    memset(memory, 0, (size_t)floats * sizeof(float));
    float *next = memory;
    /* Panels begin at multiples of 64 bytes here, as the caller's arrays need not. */
    float *given[4] = {t->weights, t->first, t->second, t->best}, *own[4];
    for (int i = 0; i < 4; i++) {
        own[i] = piece(&next, weights);
        memcpy(own[i], given[i], (size_t)weights * sizeof(float));
    }
    Scratch s = {shapes, places, piece(&next, round_up(t->inputs) * (lanes + 1)),
                 piece(&next, round_up(t->width) * (lanes + 1)),
                 {piece(&next, high * lanes), piece(&next, high * lanes)},
                 piece(&next, high * lanes), live, lanes / PANEL};
    for (int64_t layer = 0; layer < layers; layer++)
        s.units[layer] = piece(&next, unit_pitch(layer_inputs(t, layer)) * lanes);
    lay_out(t, &s, own[0], own[1], own[2]);
    for (int64_t layer = 0; layer <= layers; layer++) {
        Live *l = live + layer;
        l->all = l->count = layer < layers ? layer_inputs(t, layer) : t->outputs;
        l->row = (int64_t *)piece(&next, 2 * l->all);
        l->weight = (int64_t *)piece(&next, 2 * l->all);
        /* Of the model's own inputs and outputs none is ever idle. */
        const int64_t pitch = layer < layers ? weight_pitch(layer_units(t, layer)) : 0;
        for (int64_t unit = 0; unit < l->all; unit++) {
            l->row[unit] = unit * PANEL;
            l->weight[unit] = unit / PANEL * pitch * PANEL + unit % PANEL;
        }
    }
    uint32_t *work = (uint32_t *)piece(&next, 3 * t->rows);
    int32_t *order = (int32_t *)piece(&next, t->rows);
    t->weights = own[0], t->best = own[3];
    const int64_t before = flush_small_numbers();
    int64_t done = 0;
    while (done < t->epochs && !t->failed) {
        take_epoch(t, &s, order, work, weights, t->table + done * (4 + t->outputs));
        done++;
    }
    restore_small_numbers(before);
    t->weights = given[0], t->best = given[3];
    for (int i = 0; i < 4; i++) memcpy(given[i], own[i], (size_t)weights * sizeof(float));
    free(memory), free(shapes), free(places), free(live);
    return done;
}
