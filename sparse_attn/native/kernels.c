/* CPU kernels of the `native` backend: a question's attention over clusters, and over everything.
 *
 * Owns the calls from `library.py`, how work is cut into items, and the order in which partial results
 * meet; `items.h` has the arithmetic. Nothing here allocates what it returns. Definitions are those of
 * `reference.py` and `select/centroid.py`; names and shape letters too: T tokens, H query heads, G KV
 * heads, P = H / G, D head dim, U units (clusters or groups), S slots. Query head h reads KV head h / P.
 * The caller folds the scale of scores into q.
 *
 * The bounds of items depend on shapes alone, and what they leave is merged in their order: the bits of
 * a result do not depend on the number of threads, nor on the tokens beside it unless the look-up has
 * two levels (where U is what some token of the tile opened). Threads are those of the OpenMP runtime
 * that torch has loaded; this file links none of its own.
 */

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#error "the native backend needs gcc 12 or later; without it, use --backend torch"
#endif

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { MAX_HEAD_DIM = 512, MAX_GROUP = 64, KEYS_AT_ONCE = 32, SLOTS_PER_ITEM = 512, LANES = 16 };
enum { UNITS_PER_ITEM = 256, MAX_ITEMS_PER_HEAD = 64, UNITS_PER_SCORE_ITEM = 64 };

/* ---- what the items compute with ---------------------------------------------------------------- */

/* Unaligned; lowered to whatever the target has. */
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(32)));
typedef uint16_t HalfWords __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Quarter __attribute__((vector_size(16)));
typedef float FourFloats __attribute__((vector_size(16), aligned(4), may_alias));

#define add_lanes(sums)                                                                             \
    ({                                                                                              \
        Vec all_ = (sums);                                                                          \
        Half eight_ = __builtin_shufflevector(all_, all_, 0, 1, 2, 3, 4, 5, 6, 7) +                 \
                      __builtin_shufflevector(all_, all_, 8, 9, 10, 11, 12, 13, 14, 15);            \
        Quarter four_ = __builtin_shufflevector(eight_, eight_, 0, 1, 2, 3) +                       \
                        __builtin_shufflevector(eight_, eight_, 4, 5, 6, 7);                        \
        (four_[0] + four_[1]) + (four_[2] + four_[3]);                                              \
    })

/* Sums of the lanes of four vectors, as one vector. */
#define add_lanes_of_four(a, b, c, d)                                                               \
    ({                                                                                              \
        Vec a_ = (a), b_ = (b), c_ = (c), d_ = (d);                                                 \
        Vec ab_ = __builtin_shufflevector(a_, b_, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21,   \
                                          22, 23) +                                                 \
                  __builtin_shufflevector(a_, b_, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, \
                                          29, 30, 31);                                              \
        Vec cd_ = __builtin_shufflevector(c_, d_, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21,   \
                                          22, 23) +                                                 \
                  __builtin_shufflevector(c_, d_, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, \
                                          29, 30, 31);                                              \
        Vec all_ = __builtin_shufflevector(ab_, cd_, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24,  \
                                           25, 26, 27) +                                            \
                   __builtin_shufflevector(ab_, cd_, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23,    \
                                           28, 29, 30, 31);                                         \
        all_ += __builtin_shufflevector(all_, all_, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15,   \
                                        12, 13);                                                    \
        all_ += __builtin_shufflevector(all_, all_, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12,   \
                                        15, 14);                                                    \
        (Quarter){all_[0], all_[4], all_[8], all_[12]};                                             \
    })

INLINE float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Finite halves only: the exponent is re-biased by a product, which also covers subnormals. */
INLINE float half_to_float(uint16_t x) {
    float magnitude = bits_to_float((uint32_t)(x & 0x7fff) << 13) * 0x1p112f;
    return bits_to_float(float_to_bits(magnitude) | (uint32_t)(x & 0x8000) << 16);
}

/* exp(x) to a few units in the last place; 1e-38 below -87, where float32 has nothing left. */
INLINE float fast_exp(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float turns = x * 1.44269504f;
    int32_t n = (int32_t)(turns + (turns < 0.0f ? -0.5f : 0.5f));
    float r = x - (float)n * 0.693359375f + (float)n * 2.12194440e-4f; /* ln 2 in two pieces */
    float series = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f
                 + r * (8.33333333e-3f + r * (1.38888889e-3f + r * 1.98412698e-4f))))));
    return series * bits_to_float((uint32_t)(n + 127) << 23);
}

/* Sixteen numbers of a float32 or bfloat16 tensor. */
#define LOAD(x, type, at)                                                                           \
    ((type) == FLOAT32                                                                              \
         ? *(const Vec *)((const float *)(x) + (at))                                                \
         : (Vec)(__builtin_convertvector(*(const HalfWords *)((const uint16_t *)(x) + (at)), Words) \
                 << 16))

INLINE void prefetch(const char *at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

INLINE void prefetch_number(const void *x, int type, int64_t at) {
    __builtin_prefetch((const char *)x + at * (type == FLOAT32 ? 4 : 2));
}

INLINE Vec either(Ints mask, Vec yes, Vec no) {
    return (Vec)((mask & (Ints)yes) | (~mask & (Ints)no));
}

INLINE Vec all_lanes(float x) { return (Vec){0} + x; }

/* `fast_exp` of sixteen numbers. */
INLINE Vec fast_exps(Vec x) {
    Vec half = all_lanes(0.5f), high = all_lanes(88.0f), low = all_lanes(-87.0f);
    x = either(x > high, high, x);
    x = either(x < low, low, x);
    Vec turns = x * 1.44269504f;
    Ints n = __builtin_convertvector(turns + either(turns < 0.0f, -half, half), Ints);
    Vec whole = __builtin_convertvector(n, Vec);
    Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec series = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f
               + r * (8.33333333e-3f + r * (1.38888889e-3f + r * 1.98412698e-4f))))));
    return series * (Vec)((n + 127) << 23);
}

/* log(exp(a) + exp(b)) where either may be -inf. */
static float log_add(float a, float b) {
    float high = a > b ? a : b, low = a > b ? b : a;
    return high == -INFINITY ? high : high + log1pf(expf(low - high));
}

/* Sums over some keys: greatest score, sum of exp(score - it), and that sum weighted by values. */
typedef struct {
    float max, sum;
    float *out; /* [D] */
} Sums;

INLINE void clear(Sums *s, int64_t D) {
    s->max = -INFINITY;
    s->sum = 0.0f;
    memset(s->out, 0, (size_t)D * sizeof(float));
}

/* NaN stays NaN: a fault in numbers must not look like keys that weigh nothing. */
INLINE float log_total(const Sums *s) { return s->sum == 0.0f ? -INFINITY : s->max + logf(s->sum); }

/* The part (out [D], lse) takes in sums over other keys. */
static void merge_into(float *out, float *lse, const Sums *s, int64_t D) {
    float other = log_total(s);
    if (other == -INFINITY) return;
    float total = log_add(*lse, other);
    float keep = *lse == -INFINITY ? 0.0f : expf(*lse - total), gain = expf(other - total) / s->sum;
    for (int64_t d = 0; d < D; d++) out[d] = out[d] * keep + s->out[d] * gain;
    *lse = total;
}

/* Keys and values of one layer: [G, S, D], contiguous within a head. */
typedef struct {
    const void *k, *v;
    int64_t head_stride; /* elements from one KV head to the next, the same for both */
    int32_t type, G, P, D;
} Keys;

typedef struct {
    const void *centroids, *variances, *value_sums; /* [G, C, D] of `type`, C columns of the store */
    const float *log_sizes, *critical;              /* [G, U] */
    const int64_t *starts, *sizes;                  /* [G, U] */
    const int64_t *columns;                         /* [G, U], column of each unit; null: its own */
    int64_t U, C;
    int32_t type, G, P, D;
} Units;

/* Row of unit u of head g in the large tables; a padded unit has none (-1). */
INLINE int64_t column_of(const Units *x, int64_t g, int64_t u) {
    int64_t column = x->columns ? x->columns[g * x->U + u] : u;
    return column < 0 ? -1 : g * x->C + column;
}

typedef struct {
    const Keys *keys;
    const Units *units;
    const float *q;       /* [T, H, D], scaled */
    const uint8_t *taken; /* [G, T, U] */
    float *log_mass;      /* [T, H, U]; what was taken becomes -inf */
    float *out;           /* [T, H, D]: the steady part on entry, everything on return */
    float *lse;           /* [T, H]: of the steady part on entry, of everything on return */
    float *lse_read;      /* [T, H]: of the steady part and what was taken */
    float *evidence;      /* [G, S] or null: the last query's mass of each slot is added */
    int64_t T, S;
    int32_t is_estimating, threads;
} UnitsCall;

/* ---- one build of the items for each target ----------------------------------------------------- */

typedef struct {
    void (*prefix)(const Keys *, int64_t, int64_t, const float *, float *, float *, float *);
    void (*body)(const Keys *, int64_t, int64_t, int64_t, const float *, Sums *, float *, int64_t);
    void (*add_evidence)(float *, const float *, int64_t, int, const float *, int64_t);
    void (*score)(const Units *, int64_t, int64_t, int64_t, const float *, const float *, int64_t,
                  float *, float *);
    float (*log_sum_exp)(const float *, int64_t);
    void (*shares)(const float *, float, int64_t, float *);
    void (*add_benefit)(float *, const float *, const float *, int64_t);
    void (*units)(const UnitsCall *, int64_t, int64_t, int64_t, Sums *, Sums *, float *, float *,
                  int64_t);
    void (*products)(const void *, int, int64_t, int64_t, int64_t, const float *, float *);
    float (*score_slot)(const Keys *, int64_t, int64_t, const float *);
    void (*reach)(const float *, const float *, const float *, float, int64_t, float *);
} Items;

/* The loops over D are unrolled for the usual head dims. */
#define BY_HEAD_DIM(D, call)                           \
    switch (D) {                                       \
    case 64: { enum { DIM = 64 }; call; break; }       \
    case 128: { enum { DIM = 128 }; call; break; }     \
    default: { const int DIM = (int)(D); call; break; } \
    }

#define ITEM(name) name##_plain
#include "items.h"
#undef ITEM

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define ITEM(name) name##_v3
#include "items.h"
#undef ITEM
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define ITEM(name) name##_v4
#include "items.h"
#undef ITEM
#pragma GCC pop_options
#endif

static const Items *best_items(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("x86-64-v4")) return &items_v4;
    if (__builtin_cpu_supports("x86-64-v3")) return &items_v3;
#endif
    return &items_plain;
}

/* Bounds of item i where each head's n elements are cut into runs of `size`. */
typedef struct {
    int64_t g, first, last;
} Range;

static Range range_of(int64_t i, int64_t n, int64_t size) {
    int64_t per_head = (n + size - 1) / size;
    Range range = {i / per_head, i % per_head * size, 0};
    range.last = range.first + size < n ? range.first + size : n;
    return range;
}

/* ---- a matrix times one vector ------------------------------------------------------------------ */

/* out [N] = w [N, K] x [K], w of `type` float32 or bfloat16. */
void longspan_products(const void *w, int type, int64_t N, int64_t K, const float *x, float *out,
                       int threads) {
    const Items *items = best_items();
    enum { ROWS_AT_ONCE = 16 };
    int64_t count = (N + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        int64_t first = i * ROWS_AT_ONCE, last = first + ROWS_AT_ONCE < N ? first + ROWS_AT_ONCE : N;
        items->products(w, type, K, first, last, x, out);
    }
}

/* ---- attention over the first keys, and over all of them ---------------------------------------- */

/* Token t of q [T, H, D] sees slots 0 .. past + t. Writes out [T, H, D], lse [T, H]. Returns 0, or -1
 * without memory. */
int longspan_attend_prefix(const Keys *x, const float *q, int64_t T, int64_t past, float *out,
                           float *lse, int threads) {
    const Items *items = best_items();
    int64_t count = T * x->G;
    int is_out_of_memory = 0;
#pragma omp parallel num_threads(threads) reduction(| : is_out_of_memory) if (count > 4)
    {
        float *scores = malloc((size_t)(x->P * SLOTS_PER_ITEM) * sizeof(float));
        is_out_of_memory = !scores;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            int64_t t = i / x->G, g = i % x->G, row = (t * x->G + g) * x->P;
            if (is_out_of_memory) continue;
            items->prefix(x, g, past + t + 1, q + row * x->D, out + row * x->D, lse + row, scores);
        }
        free(scores);
    }
    return is_out_of_memory ? -1 : 0;
}

/* Attention of q [H, D] over all S slots, merged into the part out [H, D], lse [H]; adds each slot's
 * share of the merged whole to evidence [G, S]. Returns 0, or -1 without memory. */
int longspan_attend_body(const Keys *x, const float *q, int64_t S, float *out, float *lse,
                         float *evidence, int threads) {
    const Items *items = best_items();
    int64_t per_head = (S + SLOTS_PER_ITEM - 1) / SLOTS_PER_ITEM, count = per_head * x->G;
    int64_t P = x->P, D = x->D, H = x->G * P;
    float *room = malloc((size_t)(count * P * D + H * S + 1) * sizeof(float));
    Sums *sums = malloc((size_t)(count * P + 1) * sizeof(Sums));
    if (!room || !sums) {
        free(room);
        free(sums);
        return -1;
    }
    float *scores = room + count * P * D;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            Range r = range_of(i, S, SLOTS_PER_ITEM);
            for (int64_t p = 0; p < P; p++) sums[i * P + p].out = room + (i * P + p) * D;
            items->body(x, r.g, r.first, r.last - r.first, q + r.g * P * D, sums + i * P,
                        scores + r.g * P * S + r.first, S);
        }
#pragma omp for schedule(static)
        for (int64_t h = 0; h < H; h++)
            for (int64_t i = 0; i < per_head; i++)
                merge_into(out + h * D, lse + h, &sums[(h / P * per_head + i) * P + h % P], D);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            Range r = range_of(i, S, SLOTS_PER_ITEM);
            items->add_evidence(evidence + r.g * S + r.first, scores + r.g * P * S + r.first, S,
                                (int)P, lse + r.g * P, r.last - r.first);
        }
    }
    free(room);
    free(sums);
    return 0;
}

/* ---- which units a query takes ------------------------------------------------------------------ */

/* Log mass of every unit with and without its spread, [T, H, U] each; squares: q * q. */
void longspan_score_units(const Units *x, const float *q, const float *squares, int64_t T,
                          float *log_mass, float *linear, int threads) {
    const Items *items = best_items();
    int64_t size = UNITS_PER_SCORE_ITEM, count = (x->U + size - 1) / size * x->G;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        Range r = range_of(i, x->U, size);
        items->score(x, r.g, r.first, r.last, q, squares, T, log_mass, linear);
    }
}

/* A non-negative number and its index as one integer: greater numbers first, then lower indices. */
INLINE uint64_t rank_of(float x, int64_t i) {
    return (uint64_t)(~float_to_bits(x)) << 32 | (uint32_t)i;
}

enum { DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS, NUM_DIGITS = 3 };

INLINE uint32_t digit_of(uint64_t rank, int digit) {
    return (uint32_t)(rank >> (32 + digit * DIGIT_BITS)) & (DIGITS - 1);
}

/* Sorts ranks that stand in order of their index; spare: [n] room. Returns the one of the two that
 * holds the result. */
static uint64_t *sort_ranks(uint64_t *ranks, int64_t n, uint64_t *spare) {
    for (int digit = 0; digit < NUM_DIGITS; digit++) {
        int64_t places[DIGITS + 1] = {0};
        for (int64_t i = 0; i < n; i++) places[digit_of(ranks[i], digit) + 1]++;
        for (int value = 0; value < DIGITS; value++) places[value + 1] += places[value];
        for (int64_t i = 0; i < n; i++) spare[places[digit_of(ranks[i], digit)]++] = ranks[i];
        uint64_t *swap = ranks;
        ranks = spare;
        spare = swap;
    }
    return ranks;
}

/* The best units whose keys fit, in order of benefit, then index: a radix selection, one digit of the
 * benefit's bits at a time, among the units that share the digits before with the first that does not
 * fit. ranks: [U] room. */
static void take_by_keys(const float *benefit, const int64_t *sizes, int64_t U, int64_t max_keys,
                         uint8_t *taken, uint64_t *ranks) {
    int64_t keys = 0, count = 0;
    memset(taken, 0, (size_t)U);
    for (int64_t u = 0; u < U; u++)
        if (sizes[u] > 0) ranks[count++] = rank_of(benefit[u], u);
    for (int digit = NUM_DIGITS - 1; digit >= 0; digit--) {
        int64_t keys_of[DIGITS] = {0}, left = 0;
        uint32_t edge = 0;
        for (int64_t i = 0; i < count; i++)
            keys_of[digit_of(ranks[i], digit)] += sizes[(uint32_t)ranks[i]];
        while (edge < DIGITS && keys + keys_of[edge] <= max_keys) keys += keys_of[edge++];
        for (int64_t i = 0; i < count; i++) {
            uint32_t own = digit_of(ranks[i], digit);
            if (own < edge) taken[(uint32_t)ranks[i]] = 1;
            if (own == edge) ranks[left++] = ranks[i];
        }
        count = left;
    }
    for (int64_t i = 0; i < count; i++) { /* equal benefits, by index */
        uint32_t u = (uint32_t)ranks[i];
        keys += sizes[u];
        if (keys > max_keys) break;
        taken[u] = 1;
    }
}

/* Units until every head has read `mass`; read [P] is what each has read already. ranks: [2, U]. */
static void take_by_mass(const float *benefit, const int64_t *sizes, int64_t U, int64_t P,
                         const float *shares, float *read, float mass, uint8_t *taken,
                         uint64_t *ranks) {
    memset(taken, 0, (size_t)U);
    for (int64_t u = 0; u < U; u++) ranks[u] = rank_of(benefit[u], u);
    ranks = sort_ranks(ranks, U, ranks + U);
    for (int64_t i = 0; i < U; i++) {
        uint32_t u = (uint32_t)ranks[i];
        int is_short = 0;
        for (int64_t p = 0; p < P; p++) {
            is_short |= read[p] < mass;
            read[p] += shares[p * U + u];
        }
        if (!is_short) break;
        taken[u] = sizes[u] > 0;
    }
}

/* taken [G, T, U] from log_mass [T, H, U]; lse_other, lse_steady [T, H]: natural log of the mass
 * outside the units, and of what is read anyway. max_keys < 0: limited by mass. rank_weights [G, U]
 * turn the share of a unit into its benefit. Returns 0, or -1 without memory. */
int longspan_take_units(const float *log_mass, const int64_t *sizes, const float *rank_weights,
                        int64_t T, int64_t G, int64_t P, int64_t U, const float *lse_other,
                        const float *lse_steady, int64_t max_keys, float mass, uint8_t *taken,
                        int threads) {
    const Items *items = best_items();
    int is_out_of_memory = 0;
#pragma omp parallel num_threads(threads) reduction(| : is_out_of_memory)
    {
        float *shares = malloc((size_t)((P + 1) * U + 1) * sizeof(float)), read[MAX_GROUP];
        uint64_t *ranks = malloc((size_t)(2 * U + 1) * sizeof(uint64_t));
        is_out_of_memory = !shares || !ranks;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < T * G; i++) {
            int64_t t = i / G, g = i % G, row = (t * G + g) * P;
            if (is_out_of_memory) continue;
            float *benefit = shares + P * U;
            memset(benefit, 0, (size_t)U * sizeof(float));
            for (int64_t p = 0; p < P; p++) {
                const float *own = log_mass + (row + p) * U;
                float total = log_add(items->log_sum_exp(own, U), lse_other[row + p]);
                items->shares(own, total, U, shares + p * U);
                items->add_benefit(benefit, shares + p * U, rank_weights + g * U, U);
                read[p] = expf(lse_steady[row + p] - total);
            }
            uint8_t *is_taken = taken + (g * T + t) * U;
            if (max_keys >= 0)
                take_by_keys(benefit, sizes + g * U, U, max_keys, is_taken, ranks);
            else
                take_by_mass(benefit, sizes + g * U, U, P, shares, read, mass, is_taken, ranks);
        }
        free(shares);
        free(ranks);
    }
    return is_out_of_memory ? -1 : 0;
}

/* Keys of the taken units: of each query, attended [G, T], and of their union, read [G]. */
void longspan_count_taken(const uint8_t *taken, const int64_t *sizes, int64_t T, int64_t G, int64_t U,
                          int64_t *attended, int64_t *read) {
    for (int64_t g = 0; g < G; g++) {
        const uint8_t *rows = taken + g * T * U;
        read[g] = 0;
        for (int64_t t = 0; t < T; t++) attended[g * T + t] = 0;
        for (int64_t u = 0; u < U; u++) {
            int64_t size = sizes[g * U + u], is_read = 0;
            for (int64_t t = 0; t < T; t++) {
                attended[g * T + t] += rows[t * U + u] ? size : 0;
                is_read |= rows[t * U + u];
            }
            read[g] += is_read ? size : 0;
        }
    }
}

/* ---- attention over what was taken, and an estimate of the rest -------------------------------- */

/* Adds the last query's mass of one item's read slots to evidence [S] of its KV head. */
static void spread_evidence(const Items *items, const Units *units, Range r, const uint8_t *is_taken,
                            const float *kept, int64_t stride, int P, const float *lse,
                            float *evidence) {
    const int64_t *starts = units->starts + r.g * units->U, *sizes = units->sizes + r.g * units->U;
    for (int64_t u = r.first; u < r.last; u++) {
        if (!is_taken[u]) continue;
        items->add_evidence(evidence + starts[u], kept, stride, P, lse, sizes[u]);
        kept += sizes[u];
    }
}

static int64_t units_per_item(int64_t U) {
    int64_t size = UNITS_PER_ITEM;
    while ((U + size - 1) / size > MAX_ITEMS_PER_HEAD) size *= 2;
    return size;
}

/* Attends to the taken units, and lets the others stand for their keys. Returns 0, or -1 without
 * memory. */
int longspan_attend_units(const UnitsCall *call) {
    const Items *items = best_items();
    const Keys *x = call->keys;
    const Units *units = call->units;
    int64_t T = call->T, U = units->U, G = x->G, P = x->P, D = x->D, H = G * P;
    if (T == 0) return 0;
    int64_t size = units_per_item(U), per_head = (U + size - 1) / size, count = per_head * G;
    int64_t rows = count * T * P, most_keys = size, *offsets = malloc((size_t)(count + 1) * 8);
    if (!offsets) return -1;
    offsets[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        Range r = range_of(i, U, size);
        const uint8_t *is_taken = call->taken + (r.g * T + T - 1) * U;
        int64_t keys = 0, keys_taken = 0;
        for (int64_t u = r.first; u < r.last; u++) {
            keys += units->sizes[r.g * U + u];
            keys_taken += is_taken[u] ? units->sizes[r.g * U + u] : 0;
        }
        most_keys = keys > most_keys ? keys : most_keys;
        offsets[i + 1] = offsets[i] + (call->evidence ? keys_taken : 0);
    }
    int64_t num_kept = offsets[count];
    float *partial = malloc((size_t)(2 * rows * D + P * num_kept + 1) * sizeof(float));
    Sums *sums = malloc((size_t)(2 * rows + 1) * sizeof(Sums)), *rest = sums + rows;
    float *kept = partial + 2 * rows * D;
    int is_out_of_memory = !partial || !sums;
    if (!is_out_of_memory)
        for (int64_t i = 0; i < 2 * rows; i++) sums[i].out = partial + i * D;
#pragma omp parallel num_threads(call->threads) reduction(| : is_out_of_memory)
    {
        float *room = malloc((size_t)(P * most_keys + 1) * sizeof(float));
        is_out_of_memory |= !room || !partial || !sums;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            Range r = range_of(i, U, size);
            if (is_out_of_memory) continue;
            items->units(call, r.g, r.first, r.last, sums + i * T * P, rest + i * T * P, room,
                         call->evidence ? kept + offsets[i] : NULL, num_kept);
        }
        free(room);
    }
    if (is_out_of_memory) {
        free(offsets);
        free(partial);
        free(sums);
        return -1;
    }
#pragma omp parallel num_threads(call->threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < T * H; row++) {
            int64_t t = row / H, h = row % H, own = t * P + h % P, first = h / P * per_head;
            float *out = call->out + row * D, *lse = call->lse + row;
            for (int64_t i = first; i < first + per_head; i++)
                merge_into(out, lse, &sums[i * T * P + own], D);
            call->lse_read[row] = *lse;
            for (int64_t i = first; call->is_estimating && i < first + per_head; i++)
                merge_into(out, lse, &rest[i * T * P + own], D);
        }
        if (call->evidence) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; i++) {
                Range r = range_of(i, U, size);
                spread_evidence(items, units, r, call->taken + (r.g * T + T - 1) * U,
                                kept + offsets[i], num_kept, (int)P,
                                call->lse_read + (T - 1) * H + r.g * P,
                                call->evidence + r.g * call->S);
            }
        }
    }
    free(offsets);
    free(partial);
    free(sums);
    return 0;
}

/* ---- a sample of what was missed ---------------------------------------------------------------- */

typedef struct {
    const Keys *keys;
    const float *q;                /* [T, H, D], scaled */
    const float *log_mass, *linear; /* [T, H, U], of the tail: -inf where read, and nowhere masked */
    const float *radii;            /* [G, U] */
    const int64_t *starts, *sizes; /* [G, U] */
    const float *lse_read;         /* [T, H] */
    const float *uniform;          /* [2, T, H, strata, 2] in [0, 1): which key mass, which key of it */
    float *recall, *bound;         /* [T, H] */
    int64_t T, U, strata;
    float uniform_share, max_log_ratio;
    int32_t threads;
} SampleCall;

/* First of n rising numbers that is above x, n - 1 if none is. */
static int64_t first_above(const float *rising, int64_t n, float x) {
    int64_t low = 0, high = n - 1;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (rising[middle] > x) high = middle;
        else low = middle + 1;
    }
    return low;
}

static void sample_row(const Items *items, const SampleCall *call, int64_t row, float *rising,
                       float *chance) {
    const Keys *x = call->keys;
    int64_t U = call->U, H = (int64_t)x->G * x->P, g = row % H / x->P, D = x->D;
    const float *log_mass = call->log_mass + row * U, *q = call->q + row * D;
    const int64_t *sizes = call->sizes + g * U, *starts = call->starts + g * U;
    float total = items->log_sum_exp(log_mass, U), norm = 0.0f;
    for (int64_t d = 0; d < D; d++) norm += q[d] * q[d];
    items->reach(log_mass, call->linear + row * U, call->radii + g * U, sqrtf(norm), U, rising);
    float most = items->log_sum_exp(rising, U);
    call->bound[row] = most == -INFINITY ? 0.0f : 1.0f / (1.0f + expf(call->lse_read[row] - most));
    call->recall[row] = 1.0f;
    if (total == -INFINITY) return;
    items->shares(log_mass, total, U, chance);
    double keys = 0.0, sum = 0.0, mean = 0.0, variance = 0.0;
    for (int64_t u = 0; u < U; u++) keys += log_mass[u] == -INFINITY ? 0 : (double)sizes[u];
    int64_t num_choices = 0; /* up to the last unit that can be drawn: rounding may reach the very end */
    for (int64_t u = 0; u < U; u++) {
        int is_unread = log_mass[u] > -INFINITY && sizes[u] > 0;
        float by_size = (float)((double)sizes[u] / keys);
        chance[u] = is_unread ? chance[u] + call->uniform_share * (by_size - chance[u]) : 0.0f;
        sum += chance[u];
        rising[u] = (float)sum;
        num_choices = chance[u] > 0.0f ? u + 1 : num_choices;
    }
    if (num_choices == 0) return;
    const float *which = call->uniform + row * call->strata * 2;
    const float *where = which + call->T * H * call->strata * 2;
    for (int64_t s = 0; s < call->strata; s++) {
        float ratios[2];
        for (int i = 0; i < 2; i++) {
            float place = ((float)s + which[2 * s + i]) / (float)call->strata * rising[U - 1];
            int64_t u = first_above(rising, num_choices, place), size = sizes[u];
            int64_t key = (int64_t)(where[2 * s + i] * (float)size);
            float score = items->score_slot(x, g, starts[u] + (key < size ? key : size - 1), q);
            float log_ratio = score - call->lse_read[row];
            log_ratio = log_ratio > call->max_log_ratio ? call->max_log_ratio : log_ratio;
            ratios[i] = (float)size / chance[u] * expf(log_ratio);
            mean += ratios[i];
        }
        variance += (double)(ratios[0] - ratios[1]) * (ratios[0] - ratios[1]);
    }
    mean /= (double)(2 * call->strata);
    variance /= 4.0 * (double)(call->strata * call->strata);
    double recall = 1.0 / (1.0 + mean);
    recall -= recall * recall * recall * variance;
    call->recall[row] = (float)(recall < 0.0 ? 0.0 : recall > 1.0 ? 1.0 : recall);
}

/* Sampled recall and the bound on what was missed; `estimate.py` says what they are. Returns 0, or
 * -1 without memory. */
int longspan_sample_recall(const SampleCall *call) {
    const Items *items = best_items();
    int64_t rows = call->T * call->keys->G * call->keys->P;
    int is_out_of_memory = 0;
#pragma omp parallel num_threads(call->threads) reduction(| : is_out_of_memory)
    {
        float *room = malloc((size_t)(2 * call->U + 1) * sizeof(float));
        is_out_of_memory = !room;
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < rows; row++)
            if (!is_out_of_memory) sample_row(items, call, row, room, room + call->U);
        free(room);
    }
    return is_out_of_memory ? -1 : 0;
}
