/* CPU kernels of the `native` backend: a question's attention over clusters, and over everything.
 *
 * Owns the calls from `library.py`, how work is cut into items, and the order in which partial results
 * meet; `items.h` has the arithmetic. Nothing here allocates what it returns. Definitions are those of
 * `reference.py` and `select/centroid.py`; names and shape letters too: T tokens, H query heads, G KV
 * heads, P = H / G, D head dim, U units (clusters or groups), S slots. Query head h reads KV head h / P.
 * The caller folds the scale of scores into q.
 *
 * Keys lie flat, and are divided into folds (`folds.py`). Within a fold one running softmax goes over
 * the keys in their order, in items whose bounds are counted from the fold's own; the folds of a head
 * meet in a fixed tree. So the bits of a result do not depend on the number of threads, nor on how many
 * callers share the folds, nor on the tokens beside it unless the look-up has two levels (where the
 * units are what some token of the tile opened). What is computed of one number, row or key does not
 * depend on its place: remainders go through the same vectors. Threads are those of the OpenMP runtime
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

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, E4M3 = 3 };
enum { MAX_HEAD_DIM = 512, MAX_GROUP = 64, KEYS_AT_ONCE = 32, SLOTS_PER_ITEM = 512, LANES = 16 };
enum { UNITS_PER_ITEM = 256, UNITS_PER_SCORE_ITEM = 64, NUM_FOLDS = 8, TOKENS_AT_ONCE = 8 };

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
        (four_[0] + four_[2]) + (four_[1] + four_[3]);                                              \
    })

/* Sums of the lanes of four vectors, as one vector; each in the order of `add_lanes`. */
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

/* What the fields of e4m3, put where those of a float32 are, are to be multiplied by: the difference
 * of the exponents' biases, which also covers subnormals, and the scale. */
#define E4M3_FACTOR 0x1p120f

/* Finite e4m3 only. */
INLINE float eighth_to_float(uint8_t x, float factor) {
    return bits_to_float((uint32_t)(x & 0x80) << 24 | (uint32_t)(x & 0x7f) << 20) * factor;
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

/* exp(x) to a few units in the last place; 1e-38 below -87, where float32 has nothing left. The
 * logarithm of 2 is taken off in two pieces. */
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

INLINE float fast_exp(float x) { return fast_exps(all_lanes(x))[0]; }

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

/* Turns sums into the part that they are; returns its lse. */
INLINE float finish(Sums *s, int64_t D) {
    float lse = log_total(s), scale = s->sum == 0.0f ? 0.0f : 1.0f / s->sum;
    for (int64_t d = 0; d < D; d++) s->out[d] *= scale;
    return lse;
}

/* The part (out [D], lse) takes in the part (other, other_lse); an empty one changes no bit. Not inlined:
 * every merge is the same instructions. */
__attribute__((noinline)) static void merge_pair(float *out, float *lse, const float *other,
                                                 float other_lse, int64_t D) {
    if (other_lse == -INFINITY) return;
    if (*lse == -INFINITY) {
        if (D) memcpy(out, other, (size_t)D * sizeof(float));
        *lse = other_lse;
        return;
    }
    float total = log_add(*lse, other_lse), keep = expf(*lse - total), gain = expf(other_lse - total);
    for (int64_t d = 0; d < D; d++) out[d] = out[d] * keep + other[d] * gain;
    *lse = total;
}

/* Merges n parts, `stride` rows of D apart, into the first: i with i + half, then half of those. */
static void merge_tree(float *outs, float *lses, int64_t n, int64_t stride, int64_t D) {
    int64_t half = 1;
    while (2 * half < n) half *= 2;
    for (; half; half /= 2)
        for (int64_t i = 0; i < half && i + half < n; i++)
            merge_pair(outs + i * stride * D, lses + i * stride, outs + (i + half) * stride * D,
                       lses[(i + half) * stride], D);
}

/* The part (out [D], lse) takes in sums over other keys of its fold. */
static void merge_into(float *out, float *lse, const Sums *s, int64_t D) {
    float other = log_total(s);
    if (other == -INFINITY) return;
    float total = log_add(*lse, other);
    float keep = *lse == -INFINITY ? 0.0f : expf(*lse - total), gain = expf(other - total) / s->sum;
    for (int64_t d = 0; d < D; d++) out[d] = out[d] * keep + s->out[d] * gain;
    *lse = total;
}

/* Keys and values of one layer: [G, S, D], contiguous within a head, or flat [N, D] (stride 0). */
typedef struct {
    const void *k, *v;
    const float *scales; /* [G, 2], of a head's keys and values where they are e4m3, else null */
    int64_t head_stride; /* elements from one KV head to the next, the same for both */
    int32_t type, G, P, D;
} Keys;

typedef struct {
    const void *centroids, *variances, *value_sums; /* [G, C, D] of `type`, C columns of the store */
    const float *log_sizes, *critical;              /* [G, U] */
    const int64_t *starts, *sizes;                  /* [G, U] */
    const int64_t *bounds;                          /* [G, NUM_FOLDS + 1], columns of each fold */
    const int64_t *columns;                         /* [G, U], column of each unit; null: its own */
    int64_t U, C;
    int32_t type, G, P, D;
} Units;

/* Bytes of a number of a type. */
INLINE int64_t item_bytes(int type) {
    return type == FLOAT32 ? 4 : type == E4M3 ? 1 : 2;
}

/* Row of unit u of head g in the large tables; a padded unit has none (-1). */
INLINE int64_t column_of(const Units *x, int64_t g, int64_t u) {
    int64_t column = x->columns ? x->columns[g * x->U + u] : u;
    return column < 0 ? -1 : g * x->C + column;
}

typedef struct {
    const Keys *keys;
    const int64_t *first, *count, *offsets; /* [n], of each run; offsets: its first key among all keys */
    const int64_t *bounds;                  /* [G, NUM_FOLDS + 1], runs of each fold */
    const float *q;                         /* [T, H, D], scaled */
    float *out, *lse;                       /* [T, H, D], [T, H] */
    float *kept;                            /* [P, num_kept] or null: the last token's scores */
    int64_t T, num_kept;
    int32_t threads;
} RunsCall;

typedef struct {
    const Keys *keys;
    const Units *units, *closed; /* closed: groups that the look-up did not open, or null */
    const float *q;              /* [T, H, D], scaled */
    const uint8_t *taken;        /* [G, T, U] */
    float *log_mass;             /* [T, H, U]; what was taken becomes -inf */
    const float *closed_log_mass;
    float *out, *lse;       /* [T, H, D], [T, H]: of everything */
    float *lse_read;        /* [T, H]: of what was taken */
    const int64_t *offsets; /* [G, NUM_FOLDS]: where the kept scores of each fold begin */
    float *kept;            /* [P, num_kept] or null: the last token's scores */
    int64_t T, num_kept, most_keys;
    int32_t is_estimating, threads;
} UnitsCall;

/* ---- one build of the items for each target ----------------------------------------------------- */

typedef struct {
    void (*prefix)(const Keys *, int64_t, int64_t, const float *, float *, float *, float *);
    void (*fold)(const RunsCall *, int64_t, int64_t, int64_t, Sums *, float *);
    void (*mass)(const float *, int64_t, int, const float *, int64_t, float *);
    void (*score)(const Units *, int64_t, int64_t, int64_t, const float *, const float *, int64_t,
                  float *, float *);
    float (*log_sum_exp)(const float *, int64_t);
    void (*shares)(const float *, float, int64_t, float *);
    void (*add_benefit)(float *, const float *, const float *, int64_t);
    void (*units)(const UnitsCall *, int64_t, int64_t, int64_t, int64_t, Sums *, Sums *, float *);
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

/* Results of every fold, [NUM_FOLDS, T, H, D] and [NUM_FOLDS, T, H]; all empty. */
typedef struct {
    float *out, *lse;
} Folds;

static int make_folds(Folds *folds, int64_t rows, int64_t D) {
    folds->out = malloc((size_t)(NUM_FOLDS * rows * (D + 1) + 1) * sizeof(float));
    if (!folds->out) return 0;
    folds->lse = folds->out + NUM_FOLDS * rows * D;
    for (int64_t i = 0; i < NUM_FOLDS * rows; i++) folds->lse[i] = -INFINITY;
    return 1;
}

/* The folds of one row, merged by the tree, to out [D] and lse. */
static void meet(const Folds *folds, int64_t row, int64_t rows, int64_t D, float *out, float *lse) {
    merge_tree(folds->out + row * D, folds->lse + row, NUM_FOLDS, rows, D);
    *lse = folds->lse[row];
    if (*lse == -INFINITY) memset(out, 0, (size_t)D * sizeof(float));
    else memcpy(out, folds->out + row * D, (size_t)D * sizeof(float));
}

/* Every token of q over every run. Returns 0, or -1 without memory. */
int longspan_attend_runs(const RunsCall *call) {
    const Items *items = best_items();
    const Keys *x = call->keys;
    int64_t T = call->T, P = x->P, D = x->D, H = x->G * P, rows = T * H;
    Folds folds;
    int is_out_of_memory = 0;
    if (!make_folds(&folds, rows, D)) return -1;
#pragma omp parallel num_threads(call->threads) reduction(| : is_out_of_memory)
    {
        float *room = malloc((size_t)(P * SLOTS_PER_ITEM) * sizeof(float));
        Sums *sums = malloc((size_t)(T * P + 1) * sizeof(Sums));
        is_out_of_memory = !room || !sums;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < x->G * NUM_FOLDS; i++) {
            int64_t g = i / NUM_FOLDS, fold = i % NUM_FOLDS;
            const int64_t *runs = call->bounds + g * (NUM_FOLDS + 1) + fold;
            if (runs[0] == runs[1] || is_out_of_memory) continue;
            for (int64_t j = 0; j < T * P; j++) {
                sums[j].out = folds.out + (fold * rows + j / P * H + g * P + j % P) * D;
                clear(&sums[j], D);
            }
            items->fold(call, g, runs[0], runs[1], sums, room);
            for (int64_t j = 0; j < T * P; j++)
                folds.lse[fold * rows + j / P * H + g * P + j % P] = finish(&sums[j], D);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            meet(&folds, row, rows, D, call->out + row * D, call->lse + row);
        free(room);
        free(sums);
    }
    free(folds.out);
    return is_out_of_memory ? -1 : 0;
}

/* ---- parts that meet ---------------------------------------------------------------------------- */

/* n parts, outs [n, rows, D] and lses [n, rows], merged by the tree to out [rows, D] and lse [rows];
 * room: [n, D]. D = 0: lses alone. */
static void merge_rows(const float *outs, const float *lses, int64_t n, int64_t rows, int64_t first,
                       int64_t last, int64_t D, float *out, float *lse, float *room) {
    float *own = room + n * D;
    for (int64_t row = first; row < last; row++) {
        for (int64_t i = 0; i < n; i++) {
            own[i] = lses[i * rows + row];
            if (D) memcpy(room + i * D, outs + (i * rows + row) * D, (size_t)D * sizeof(float));
        }
        merge_tree(room, own, n, 1, D);
        lse[row] = own[0];
        if (D) memcpy(out + row * D, room, (size_t)D * sizeof(float));
    }
}

/* Returns 0, or -1 without memory. */
int longspan_merge_tree(const float *outs, const float *lses, int64_t n, int64_t rows, int64_t D,
                        float *out, float *lse, int threads) {
    enum { ROWS_AT_ONCE = 64 };
    int is_out_of_memory = 0;
#pragma omp parallel num_threads(threads) reduction(| : is_out_of_memory) if (n * rows * D > 65536)
    {
        float *room = malloc((size_t)(n * (D + 1) + 1) * sizeof(float));
        is_out_of_memory = !room;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < rows; first += ROWS_AT_ONCE)
            if (!is_out_of_memory)
                merge_rows(outs, lses, n, rows, first,
                           first + ROWS_AT_ONCE < rows ? first + ROWS_AT_ONCE : rows, D, out, lse, room);
        free(room);
    }
    return is_out_of_memory ? -1 : 0;
}

/* The part (out [rows, D], lse [rows]) takes in another. */
void longspan_merge_pair(float *out, float *lse, const float *other, const float *other_lse,
                         int64_t rows, int64_t D, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * D > 65536)
    for (int64_t row = 0; row < rows; row++)
        merge_pair(out + row * D, lse + row, other + row * D, other_lse[row], D);
}

/* evidence [slots] += exp(score - lse) of every head, for the runs of each KV head; scores: [P, num_keys],
 * bounds: [G + 1], runs of each head; lse: [G, P]. Returns 0, or -1 without memory. */
int longspan_spread_evidence(float *evidence, const int64_t *first, const int64_t *count,
                              const int64_t *bounds, const float *scores, int64_t num_keys, int64_t G,
                              int64_t P, const float *lse, int threads) {
    const Items *items = best_items();
    int64_t offset = 0;
    float *mass = malloc((size_t)(num_keys + 1) * sizeof(float));
    if (!mass) return -1;
#pragma omp parallel num_threads(threads) firstprivate(offset) if (P * num_keys > 16384)
    for (int64_t g = 0; g < G; g++) {
        int64_t end = offset;
        for (int64_t run = bounds[g]; run < bounds[g + 1]; run++) end += count[run];
#pragma omp for schedule(static)
        for (int64_t from = offset; from < end; from += SLOTS_PER_ITEM)
            items->mass(scores + from, num_keys, (int)P, lse + g * P,
                        from + SLOTS_PER_ITEM < end ? SLOTS_PER_ITEM : end - from, mass + from);
        offset = end;
    }
    const float *own = mass;
    for (int64_t run = bounds[0]; run < bounds[G]; own += count[run++])
        for (int64_t i = 0; i < count[run]; i++) evidence[first[run] + i] += own[i];
    free(mass);
    return 0;
}

/* ---- which units a query takes ------------------------------------------------------------------ */

/* Mass of one row of log_mass [U], fold by fold, then the tree; bounds: of its KV head. */
static float mass_of_row(const Items *items, const float *log_mass, const int64_t *bounds) {
    float folds[NUM_FOLDS];
    for (int v = 0; v < NUM_FOLDS; v++)
        folds[v] = items->log_sum_exp(log_mass + bounds[v], bounds[v + 1] - bounds[v]);
    merge_tree(NULL, folds, NUM_FOLDS, 1, 0);
    return folds[0];
}

/* Log mass of every unit with and without its spread, [T, H, U] each, and of all of them, lse [T, H];
 * squares: q * q. */
void longspan_score_units(const Units *x, const float *q, const float *squares, int64_t T,
                          float *log_mass, float *linear, float *lse, int threads) {
    const Items *items = best_items();
    int64_t size = UNITS_PER_SCORE_ITEM, count = (x->U + size - 1) / size * x->G;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            Range r = range_of(i, x->U, size);
            items->score(x, r.g, r.first, r.last, q, squares, T, log_mass, linear);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < T * x->G * x->P; row++)
            lse[row] = mass_of_row(items, log_mass + row * x->U,
                                   x->bounds + row / x->P % x->G * (NUM_FOLDS + 1));
    }
}

/* Natural log of the mass of all units, lse [T, H], of log_mass [T, H, U]. */
void longspan_total_mass(const float *log_mass, const int64_t *bounds, int64_t T, int64_t G, int64_t P,
                         int64_t U, float *lse, int threads) {
    const Items *items = best_items();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < T * G * P; row++)
        lse[row] = mass_of_row(items, log_mass + row * U, bounds + row / P % G * (NUM_FOLDS + 1));
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

/* A share as a whole multiple of 2^-40: sums of them do not depend on their order. */
INLINE int64_t quantised(float share) { return share == share ? (int64_t)((double)share * 0x1p40) : 0; }

/* Units until every head has read `mass`; steady [P] is what each has read already. ranks: [2, U]. */
static void take_by_mass(const float *benefit, const int64_t *sizes, int64_t U, int64_t P,
                         const float *shares, const float *steady, double mass, uint8_t *taken,
                         uint64_t *ranks) {
    int64_t read[MAX_GROUP], enough = (int64_t)(mass * 0x1p40);
    memset(taken, 0, (size_t)U);
    for (int64_t p = 0; p < P; p++) read[p] = quantised(steady[p]);
    for (int64_t u = 0; u < U; u++) ranks[u] = rank_of(benefit[u], u);
    ranks = sort_ranks(ranks, U, ranks + U);
    for (int64_t i = 0; i < U; i++) {
        uint32_t u = (uint32_t)ranks[i];
        int is_short = 0;
        for (int64_t p = 0; p < P; p++) {
            is_short |= read[p] < enough;
            read[p] += quantised(shares[p * U + u]);
        }
        if (!is_short) break;
        taken[u] = sizes[u] > 0;
    }
}

/* One token and KV head: shares [P, U] of its attention, benefit [U], and steady [P], the shares that are
 * read anyway. total, lse_steady: [P], natural log of the mass of everything, and of what is read anyway
 * (or null). */
static void rank_row(const Items *items, const float *log_mass, const float *weights, int64_t P, int64_t U,
                     const float *total, const float *lse_steady, float *shares, int64_t stride,
                     float *benefit, float *steady) {
    memset(benefit, 0, (size_t)U * sizeof(float));
    for (int64_t p = 0; p < P; p++) {
        items->shares(log_mass + p * U, total[p], U, shares + p * stride);
        items->add_benefit(benefit, shares + p * stride, weights, U);
        if (lse_steady) steady[p] = expf(lse_steady[p] - total[p]);
    }
}

typedef struct {
    const float *log_mass;            /* [T, H, U] */
    const int64_t *sizes;             /* [G, U] */
    const float *rank_weights;        /* [G, U]: benefit of a unit per share of attention */
    const float *total, *lse_steady;  /* [T, H]: see `rank_row` */
    float *benefit, *shares, *steady; /* [G, T, U]; [G, P, T, U], [G, P, T] or null */
    uint8_t *taken;                   /* [G, T, U], or null: ranks alone */
    int64_t T, G, P, U;
    int64_t max_keys; /* below 0: limited by mass */
    double mass;
    int32_t threads;
} RankCall;

/* benefit, shares and steady of every unit. Returns 0, or -1 without memory. */
int longspan_rank_units(const RankCall *call) {
    const Items *items = best_items();
    int64_t T = call->T, G = call->G, P = call->P, U = call->U;
    int is_out_of_memory = 0;
#pragma omp parallel num_threads(call->threads) reduction(| : is_out_of_memory)
    {
        float *room = malloc((size_t)(P * U + 1) * sizeof(float)), steady[MAX_GROUP];
        is_out_of_memory = !room;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < T * G; i++) {
            int64_t t = i / G, g = i % G, row = (t * G + g) * P;
            if (is_out_of_memory) continue;
            rank_row(items, call->log_mass + row * U, call->rank_weights + g * U, P, U, call->total + row,
                     call->lse_steady ? call->lse_steady + row : NULL,
                     call->shares ? call->shares + (g * P * T + t) * U : room, call->shares ? T * U : U,
                     call->benefit + (g * T + t) * U, steady);
            for (int64_t p = 0; call->steady && p < P; p++) call->steady[(g * P + p) * T + t] = steady[p];
        }
        free(room);
    }
    return is_out_of_memory ? -1 : 0;
}

/* Which units each query takes, where one caller holds them all. Returns 0, or -1 without memory. */
int longspan_take_units(const RankCall *call) {
    const Items *items = best_items();
    int64_t T = call->T, G = call->G, P = call->P, U = call->U;
    int is_out_of_memory = 0;
#pragma omp parallel num_threads(call->threads) reduction(| : is_out_of_memory)
    {
        float *shares = malloc((size_t)((P + 1) * U + 1) * sizeof(float)), steady[MAX_GROUP];
        uint64_t *ranks = malloc((size_t)(2 * U + 1) * sizeof(uint64_t));
        is_out_of_memory = !shares || !ranks;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < T * G; i++) {
            int64_t t = i / G, g = i % G, row = (t * G + g) * P;
            if (is_out_of_memory) continue;
            float *benefit = shares + P * U;
            const int64_t *sizes = call->sizes + g * U;
            uint8_t *is_taken = call->taken + (g * T + t) * U;
            rank_row(items, call->log_mass + row * U, call->rank_weights + g * U, P, U, call->total + row,
                     call->lse_steady + row, shares, U, benefit, steady);
            if (call->max_keys >= 0)
                take_by_keys(benefit, sizes, U, call->max_keys, is_taken, ranks);
            else
                take_by_mass(benefit, sizes, U, P, shares, steady, call->mass, is_taken, ranks);
        }
        free(shares);
        free(ranks);
    }
    return is_out_of_memory ? -1 : 0;
}

typedef struct {
    const uint8_t *taken;          /* [G, T, U] */
    const Units *units;
    int64_t *attended, *read;      /* [G, T]: keys of each query; [G]: of their union */
    int64_t *offsets;              /* [G, NUM_FOLDS]: keys that the last query took before each fold */
    int64_t *first, *count, *runs; /* [G * U] each, or null: those keys as runs of slots; [G + 1] */
    int64_t T, num_kept, num_runs; /* the last query's keys, and runs */
    int64_t most_keys;             /* that are read of an item */
} CountCall;

/* Lists a unit that the last query took; neighbours become one run. */
INLINE void list_run(CountCall *call, int64_t start, int64_t size, int64_t head_first) {
    int64_t last = call->num_runs - 1;
    if (last >= head_first && call->first[last] + call->count[last] == start) {
        call->count[last] += size;
        return;
    }
    call->first[call->num_runs] = start;
    call->count[call->num_runs++] = size;
}

/* Units `first` to `last` of one item: few are taken, and eight that are not are passed at once. Returns
 * how many of their keys are read. */
static int64_t count_item(CountCall *call, int64_t g, int64_t first, int64_t last) {
    const Units *units = call->units;
    int64_t T = call->T, U = units->U, *attended = call->attended + g * T, keys = 0;
    const uint8_t *rows = call->taken + g * T * U;
    const int64_t *sizes = units->sizes + g * U, *starts = units->starts + g * U;
    for (int64_t from = first; from < last; from += 8) {
        uint64_t any = 0;
        int64_t n = from + 8 < last ? 8 : last - from;
        for (int64_t t = 0; t < T; t++) {
            uint64_t own = 0;
            memcpy(&own, rows + t * U + from, (size_t)n);
            any |= own;
        }
        if (!any) continue;
        for (int64_t u = from; u < from + n; u++) {
            int is_read = 0;
            for (int64_t t = 0; t < T; t++) {
                attended[t] += rows[t * U + u] ? sizes[u] : 0;
                is_read |= rows[t * U + u];
            }
            keys += is_read ? sizes[u] : 0;
            if (!rows[(T - 1) * U + u] || sizes[u] == 0) continue;
            call->num_kept += sizes[u];
            if (call->runs) list_run(call, starts[u], sizes[u], call->runs[g]);
        }
    }
    return keys;
}

/* Counts what was taken, and lists what the last query took. */
void longspan_count_taken(CountCall *call) {
    const Units *units = call->units;
    call->num_kept = call->num_runs = 0;
    call->most_keys = UNITS_PER_ITEM;
    memset(call->attended, 0, (size_t)(units->G * call->T) * sizeof(int64_t));
    for (int64_t g = 0; g < units->G; g++) {
        call->read[g] = 0;
        if (call->runs) call->runs[g] = call->num_runs;
        for (int64_t fold = 0; fold < NUM_FOLDS; fold++) {
            const int64_t *bounds = units->bounds + g * (NUM_FOLDS + 1) + fold;
            call->offsets[g * NUM_FOLDS + fold] = call->num_kept;
            for (int64_t u = bounds[0]; u < bounds[1]; u += UNITS_PER_ITEM) {
                int64_t last = u + UNITS_PER_ITEM < bounds[1] ? u + UNITS_PER_ITEM : bounds[1];
                int64_t keys = count_item(call, g, u, last);
                call->read[g] += keys;
                call->most_keys = keys > call->most_keys ? keys : call->most_keys;
            }
        }
    }
    if (call->runs) call->runs[units->G] = call->num_runs;
}

/* ---- attention over what was taken, and an estimate of the rest -------------------------------- */

/* Sums of a block of tokens over one fold, to its parts: read, then read and estimated. */
static void end_fold(const UnitsCall *call, const Folds *folds, const Folds *reads, int64_t fold,
                     int64_t first_row, int64_t count, Sums *read, const Sums *rest) {
    int64_t P = call->units->P, H = call->units->G * P, D = call->keys->D, rows = call->T * H;
    for (int64_t j = 0; j < count * P; j++) {
        int64_t row = fold * rows + first_row + j / P * H + j % P;
        folds->lse[row] = reads->lse[row] = finish(&read[j], D);
        if (call->is_estimating) merge_into(folds->out + row * D, folds->lse + row, &rest[j], D);
    }
}

/* Attends to the taken units, and lets the others stand for their keys. Returns 0, or -1 without
 * memory. */
int longspan_attend_units(const UnitsCall *call) {
    const Items *items = best_items();
    int64_t T = call->T, G = call->units->G, P = call->units->P, D = call->keys->D, H = G * P, rows = T * H;
    int64_t blocks = (T + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE, most_sums = TOKENS_AT_ONCE * P;
    Folds folds, reads;
    int is_out_of_memory = 0;
    if (!make_folds(&folds, rows, D)) return -1;
    if (!make_folds(&reads, rows, 0)) {
        free(folds.out);
        return -1;
    }
#pragma omp parallel num_threads(call->threads) reduction(| : is_out_of_memory)
    {
        float *room = malloc((size_t)(P * call->most_keys + most_sums * D + 1) * sizeof(float));
        Sums *read = malloc((size_t)(2 * most_sums) * sizeof(Sums)), *rest = read + most_sums;
        is_out_of_memory = !room || !read;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < G * NUM_FOLDS * blocks; i++) {
            int64_t g = i / blocks / NUM_FOLDS, fold = i / blocks % NUM_FOLDS, from = i % blocks * TOKENS_AT_ONCE;
            int64_t to = from + TOKENS_AT_ONCE < T ? from + TOKENS_AT_ONCE : T;
            if (is_out_of_memory) continue;
            for (int64_t j = 0; j < (to - from) * P; j++) {
                read[j].out = folds.out + (fold * rows + (from + j / P) * H + g * P + j % P) * D;
                rest[j].out = room + P * call->most_keys + j * D;
                clear(&read[j], D);
                clear(&rest[j], D);
            }
            items->units(call, g, fold, from, to, read, rest, room);
            end_fold(call, &folds, &reads, fold, from * H + g * P, to - from, read, rest);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            meet(&folds, row, rows, D, call->out + row * D, call->lse + row);
            merge_tree(NULL, reads.lse + row, NUM_FOLDS, rows, 0);
            call->lse_read[row] = reads.lse[row];
        }
        free(room);
        free(read);
    }
    free(folds.out);
    free(reads.out);
    return is_out_of_memory ? -1 : 0;
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
    float *mean, *variance, *most; /* [T, H] */
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
    call->most[row] = items->log_sum_exp(rising, U);
    call->mean[row] = call->variance[row] = 0.0f;
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
    call->mean[row] = (float)(mean / (double)(2 * call->strata));
    call->variance[row] = (float)(variance / (4.0 * (double)(call->strata * call->strata)));
}

/* A sample of what was missed, and the bound on it; `estimate.py` says what they are. Returns 0, or -1
 * without memory. */
int longspan_sample_missed(const SampleCall *call) {
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
