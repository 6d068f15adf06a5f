/* The arithmetic of one work item, compiled once for each set of vector instructions.
 *
 * `kernels.c` includes this file under several targets, with ITEM(name) giving each build names of its
 * own, cuts the work into items, and picks the build that the processor can run.
 */

/* ---- numbers ---------------------------------------------------------------------------------- */

INLINE void ITEM(widen_halves)(const uint16_t *half, int64_t count, float *room) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(room + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(half + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(room + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + i))));
#endif
    for (; i < count; i++) room[i] = half_to_float(half[i]);
}

INLINE void ITEM(widen_eighths)(const uint8_t *x, int64_t count, float factor, float *room) {
    for (int64_t i = 0; i < count; i++) room[i] = eighth_to_float(x[i], factor);
}

/* `count` numbers of a type as float32: x itself where it is float32 already, else `room`. */
INLINE const float *ITEM(widen)(const void *x, int type, int64_t first, int64_t count, float *room) {
    if (type == FLOAT32) return (const float *)x + first;
    const uint16_t *half = (const uint16_t *)x + first;
    if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) room[i] = bits_to_float((uint32_t)half[i] << 16);
    else
        ITEM(widen_halves)(half, count, room);
    return room;
}

/* The same of the keys (0) or values (1) of KV head g. */
INLINE const float *ITEM(widen_keys)(const Keys *x, int which, int64_t g, int64_t first, int64_t count,
                                     float *room) {
    const void *rows = which ? x->v : x->k;
    if (x->type != E4M3) return ITEM(widen)(rows, x->type, first, count, room);
    ITEM(widen_eighths)((const uint8_t *)rows + first, count, x->scales[2 * g + which] * E4M3_FACTOR, room);
    return room;
}

/* Row `row` of a table as float32 in `room`; nothing (zeros) where there is none. */
INLINE void ITEM(copy_wide)(const void *x, int type, int64_t row, int64_t D, float *room) {
    if (row < 0) {
        memset(room, 0, (size_t)D * sizeof(float));
        return;
    }
    const float *wide = ITEM(widen)(x, type, row * D, D, room);
    if (wide != room) memcpy(room, wide, (size_t)D * sizeof(float));
}

INLINE float ITEM(dot)(const float *a, const float *b, int D) {
    Vec sums = {0};
    int d = 0;
    for (; d + LANES <= D; d += LANES) sums += *(const Vec *)(a + d) * *(const Vec *)(b + d);
    float sum = add_lanes(sums);
    for (; d < D; d++) sum += a[d] * b[d];
    return sum;
}

/* out[i] = dot(a, rows[i]) for n rows of D numbers. */
INLINE void ITEM(dots)(const float *a, const float *rows, int64_t n, int D, float *out) {
    int64_t i = 0;
    if (D % LANES == 0)
        for (; i + 4 <= n; i += 4) {
            Vec sums[4] = {{0}, {0}, {0}, {0}};
            const float *row = rows + i * D;
            for (int d = 0; d < D; d += LANES) {
                Vec own = *(const Vec *)(a + d);
                sums[0] += own * *(const Vec *)(row + d);
                sums[1] += own * *(const Vec *)(row + D + d);
                sums[2] += own * *(const Vec *)(row + 2 * D + d);
                sums[3] += own * *(const Vec *)(row + 3 * D + d);
            }
            *(FourFloats *)(out + i) = add_lanes_of_four(sums[0], sums[1], sums[2], sums[3]);
        }
    for (; i < n; i++) out[i] = ITEM(dot)(a, rows + i * D, D);
}

/* out [D] += weights [n] times rows [n, D]. */
INLINE void ITEM(add_rows)(float *out, const float *weights, const float *rows, int64_t n, int D) {
    int d = 0;
    for (; d + 4 * LANES <= D; d += 4 * LANES) {
        Vec *at = (Vec *)(out + d), sum0 = at[0], sum1 = at[1], sum2 = at[2], sum3 = at[3];
        for (int64_t i = 0; i < n; i++) {
            const Vec *row = (const Vec *)(rows + i * D + d);
            sum0 += weights[i] * row[0];
            sum1 += weights[i] * row[1];
            sum2 += weights[i] * row[2];
            sum3 += weights[i] * row[3];
        }
        at[0] = sum0, at[1] = sum1, at[2] = sum2, at[3] = sum3;
    }
    for (; d < D; d++)
        for (int64_t i = 0; i < n; i++) out[d] += weights[i] * rows[i * D + d];
}

INLINE float ITEM(load_one)(const void *x, int type, int64_t at) {
    if (type == FLOAT32) return ((const float *)x)[at];
    return bits_to_float((uint32_t)((const uint16_t *)x)[at] << 16);
}

/* Every row is added up in the same order, wherever it stands: in lanes, then what is left over. */
INLINE void ITEM(multiply_rows)(const void *w, int type, int64_t K, int64_t first, int64_t last,
                                const float *x, float *out) {
    enum { AHEAD = 8 }; /* rows; matrices are cold, and rows too short to be seen coming */
    int64_t row = first, whole = K - K % LANES;
    for (; row + 4 <= last; row += 4) {
        Vec sums[4] = {{0}, {0}, {0}, {0}};
        int64_t at = row * K;
        for (int64_t k = 0; k < whole; k += LANES) {
            Vec own = *(const Vec *)(x + k);
            for (int i = 0; i < 4; i++)
                prefetch_number(w, type, at + (AHEAD + i) * K + k);
            sums[0] += own * LOAD(w, type, at + k);
            sums[1] += own * LOAD(w, type, at + K + k);
            sums[2] += own * LOAD(w, type, at + 2 * K + k);
            sums[3] += own * LOAD(w, type, at + 3 * K + k);
        }
        *(FourFloats *)(out + row) = add_lanes_of_four(sums[0], sums[1], sums[2], sums[3]);
    }
    for (; row < last; row++) {
        Vec sums = {0};
        for (int64_t k = 0; k < whole; k += LANES)
            sums += *(const Vec *)(x + k) * LOAD(w, type, row * K + k);
        out[row] = add_lanes(sums);
    }
    for (row = first; whole < K && row < last; row++) {
        float rest = 0.0f;
        for (int64_t k = whole; k < K; k++) rest += x[k] * ITEM(load_one)(w, type, row * K + k);
        out[row] += rest;
    }
}

static void ITEM(products)(const void *w, int type, int64_t K, int64_t first, int64_t last,
                           const float *x, float *out) {
    if (type == FLOAT32)
        ITEM(multiply_rows)(w, FLOAT32, K, first, last, x, out);
    else
        ITEM(multiply_rows)(w, BFLOAT16, K, first, last, x, out);
}

/* ---- a running softmax ------------------------------------------------------------------------ */

INLINE float ITEM(greatest)(const float *x, int64_t n) {
    Vec most = all_lanes(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vec own = *(const Vec *)(x + i);
        most = either(own > most, own, most);
    }
    float max = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) max = most[lane] > max ? most[lane] : max;
    for (; i < n; i++) max = x[i] > max ? x[i] : max;
    return max;
}

/* The last n < LANES numbers of a row, zeros after them: what is computed of a number does not depend
 * on where it stands. */
INLINE Vec ITEM(load_some)(const float *x, int64_t n) {
    float room[LANES] = {0};
    memcpy(room, x, (size_t)n * sizeof(float));
    return *(const Vec *)room;
}

/* out [n] = exp(x - base), and their sum; out may be x, or null. */
INLINE float ITEM(exps)(const float *x, float base, int64_t n, float *out) {
    Vec sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vec own = fast_exps(*(const Vec *)(x + i) - base);
        if (out) *(Vec *)(out + i) = own;
        sums += own;
    }
    float sum = add_lanes(sums);
    if (i < n) {
        Vec own = fast_exps(ITEM(load_some)(x + i, n - i) - base);
        if (out) memcpy(out + i, &own, (size_t)(n - i) * sizeof(float));
        for (int64_t lane = 0; lane < n - i; lane++) sum += own[lane];
    }
    return sum;
}

/* weights [n] = exp(scores - greatest score so far), which `s` takes in; the values are the caller's
 * to add. False if no score counts: then there is nothing to add. */
INLINE int ITEM(weigh)(Sums *s, const float *scores, int64_t n, float *weights, int D) {
    float max = ITEM(greatest)(scores, n);
    if (max == -INFINITY) { /* nothing counts, or nothing is a number */
        for (int64_t i = 0; i < n; i++) s->sum += scores[i] == scores[i] ? 0.0f : scores[i];
        return 0;
    }
    if (max > s->max) {
        float shrink = s->max == -INFINITY ? 0.0f : fast_exp(s->max - max);
        for (int d = 0; d < D; d++) s->out[d] *= shrink;
        s->sum *= shrink;
        s->max = max;
    }
    s->sum += ITEM(exps)(scores, s->max, n, weights);
    return 1;
}

static float ITEM(log_sum_exp)(const float *x, int64_t n) {
    float max = ITEM(greatest)(x, n);
    return max == -INFINITY ? max : max + logf(ITEM(exps)(x, max, n, NULL));
}

/* ---- attention over one run of slots ----------------------------------------------------------- */

/* P query heads over `n` slots from `first` of KV head g; sums go on from where they are. scores: [P],
 * `stride` apart, receives the scores; n is at most SLOTS_PER_ITEM. */
INLINE void ITEM(attend_run)(const Keys *x, int64_t g, int64_t first, int64_t n, const float *q,
                             Sums *sums, float *scores, int64_t stride, int D) {
    float room[KEYS_AT_ONCE * MAX_HEAD_DIM], weights[SLOTS_PER_ITEM];
    int64_t from = g * x->head_stride + first * D;
    for (int64_t start = 0; start < n; start += KEYS_AT_ONCE) {
        int64_t count = n - start < KEYS_AT_ONCE ? n - start : KEYS_AT_ONCE;
        const float *k = ITEM(widen_keys)(x, 0, g, from + start * D, count * D, room);
        for (int p = 0; p < x->P; p++)
            ITEM(dots)(q + p * D, k, count, D, scores + p * stride + start);
    }
    for (int p = 0; p < x->P; p++) {
        if (!ITEM(weigh)(&sums[p], scores + p * stride, n, weights, D)) continue;
        for (int64_t start = 0; start < n; start += KEYS_AT_ONCE) {
            int64_t count = n - start < KEYS_AT_ONCE ? n - start : KEYS_AT_ONCE;
            const float *v = ITEM(widen_keys)(x, 1, g, from + start * D, count * D, room);
            ITEM(add_rows)(sums[p].out, weights + start, v, count, D);
        }
    }
}

/* T tokens over the runs `first` to `last` of one fold; sums [T, P]. The last token's scores go to
 * `kept` where there is one; room: [P, SLOTS_PER_ITEM]. */
INLINE void ITEM(attend_fold)(const RunsCall *call, int64_t g, int64_t first, int64_t last, Sums *sums,
                              float *room, int D) {
    const Keys *x = call->keys;
    int64_t H = (int64_t)x->G * x->P;
    for (int64_t run = first; run < last; run++)
        for (int64_t from = 0; from < call->count[run]; from += SLOTS_PER_ITEM) {
            int64_t left = call->count[run] - from, n = left < SLOTS_PER_ITEM ? left : SLOTS_PER_ITEM;
            for (int64_t t = 0; t < call->T; t++) {
                int is_kept = call->kept && t == call->T - 1;
                ITEM(attend_run)(x, g, call->first[run] + from, n, call->q + (t * H + g * x->P) * D,
                                 sums + t * x->P,
                                 is_kept ? call->kept + call->offsets[run] + from : room,
                                 is_kept ? call->num_kept : SLOTS_PER_ITEM, D);
            }
        }
}

static void ITEM(fold)(const RunsCall *call, int64_t g, int64_t first, int64_t last, Sums *sums,
                       float *room) {
    BY_HEAD_DIM(call->keys->D, ITEM(attend_fold)(call, g, first, last, sums, room, DIM));
}

/* One token over the first n slots; writes out [P, D] and lse [P]. scores: [P, SLOTS_PER_ITEM]. */
static void ITEM(prefix)(const Keys *x, int64_t g, int64_t n, const float *q, float *out, float *lse,
                         float *scores) {
    Sums sums[MAX_GROUP];
    for (int p = 0; p < x->P; p++) {
        sums[p].out = out + p * x->D;
        clear(&sums[p], x->D);
    }
    for (int64_t first = 0; first < n; first += SLOTS_PER_ITEM) {
        int64_t count = n - first < SLOTS_PER_ITEM ? n - first : SLOTS_PER_ITEM;
        BY_HEAD_DIM(x->D, ITEM(attend_run)(x, g, first, count, q, sums, scores, SLOTS_PER_ITEM, DIM));
    }
    for (int p = 0; p < x->P; p++) lse[p] = finish(&sums[p], x->D);
}

/* mass [n] = exp(score - lse), added up over the rows of scores [P], `stride` apart. */
static void ITEM(mass)(const float *scores, int64_t stride, int P, const float *lse, int64_t n,
                       float *mass) {
    for (int64_t i = 0; i < n; i += LANES) {
        Vec sums = {0};
        int64_t left = n - i < LANES ? n - i : LANES;
        for (int p = 0; p < P; p++) {
            const float *own = scores + p * stride + i;
            sums += fast_exps((left == LANES ? *(const Vec *)own : ITEM(load_some)(own, left)) - lse[p]);
        }
        memcpy(mass + i, &sums, (size_t)left * sizeof(float));
    }
}

/* ---- units: scores, ranking, attention ---------------------------------------------------------- */

/* Scores of four units at a time: the lanes of four products are added up together. */
INLINE void ITEM(score_units)(const Units *x, int64_t g, int64_t first, int64_t last, const float *q,
                              const float *squares, int64_t T, float *log_mass, float *linear, int D) {
    enum { AT_ONCE = 4 };
    float centroids[AT_ONCE * MAX_HEAD_DIM], variances[AT_ONCE * MAX_HEAD_DIM];
    const float *log_sizes = x->log_sizes + g * x->U, *critical = x->critical + g * x->U;
    int64_t H = (int64_t)x->G * x->P;
    for (int64_t u = first; u < last; u += AT_ONCE) {
        int64_t n = last - u < AT_ONCE ? last - u : AT_ONCE;
        for (int64_t i = 0; i < n; i++) {
            int64_t column = column_of(x, g, u + i);
            ITEM(copy_wide)(x->centroids, x->type, column, D, centroids + i * D);
            ITEM(copy_wide)(x->variances, x->type, column, D, variances + i * D);
        }
        for (int64_t t = 0; t < T; t++)
            for (int p = 0; p < x->P; p++) {
                int64_t row = t * H + g * x->P + p;
                float *mass = log_mass + row * x->U + u, *flat = linear + row * x->U + u;
                float products[AT_ONCE], spreads[AT_ONCE];
                ITEM(dots)(q + row * D, centroids, n, D, products);
                ITEM(dots)(squares + row * D, variances, n, D, spreads);
                for (int64_t i = 0; i < n; i++) {
                    float sigma = sqrtf(spreads[i]);
                    float knee = sigma < critical[u + i] ? sigma : critical[u + i];
                    flat[i] = log_sizes[u + i] + products[i];
                    mass[i] = flat[i] + knee * (sigma - 0.5f * knee);
                }
            }
    }
}

static void ITEM(score)(const Units *x, int64_t g, int64_t first, int64_t last, const float *q,
                        const float *squares, int64_t T, float *log_mass, float *linear) {
    BY_HEAD_DIM(x->D, ITEM(score_units)(x, g, first, last, q, squares, T, log_mass, linear, DIM));
}

/* shares[i] = exp(x[i] - total), 0 where float32 has nothing left. */
static void ITEM(shares)(const float *x, float total, int64_t n, float *shares) {
    ITEM(exps)(x, total, n, shares);
    for (int64_t i = 0; i < n; i++) shares[i] = shares[i] > 2e-38f ? shares[i] : 0.0f;
}

/* benefit[i] += shares[i] * weights[i]: one head of the group. */
static void ITEM(add_benefit)(float *benefit, const float *shares, const float *weights, int64_t n) {
    for (int64_t i = 0; i < n; i++) benefit[i] += shares[i] * weights[i];
}

/* The next run of taken units from *u on, as slots; 0 if there is none. Neighbouring units are
 * neighbouring slots: they are read as one run of at most KEYS_AT_ONCE, or one unit. */
INLINE int64_t ITEM(next_run)(const Units *x, int64_t g, const uint8_t *is_taken, int64_t last,
                              int64_t *u, int64_t *start) {
    const int64_t *starts = x->starts + g * x->U, *sizes = x->sizes + g * x->U;
    while (*u < last && !is_taken[*u]) ++*u;
    if (*u == last) return 0;
    int64_t count = sizes[*u];
    *start = starts[*u];
    for (++*u; *u < last && is_taken[*u] && starts[*u] == *start + count; ++*u) {
        if (count + sizes[*u] > KEYS_AT_ONCE) break;
        count += sizes[*u];
    }
    return count;
}

/* The taken units of one token; `room` holds the scores: [P, num_keys]. */
INLINE void ITEM(attend_taken)(const Keys *x, const Units *units, int64_t g, int64_t first,
                               int64_t last, const float *q, const uint8_t *is_taken,
                               int64_t num_keys, Sums *read, float *room, float *kept,
                               int64_t kept_stride, int D) {
    float wide[KEYS_AT_ONCE * MAX_HEAD_DIM];
    int64_t done = 0, start, n, bytes = item_bytes(x->type) * D;
    /* Runs are too short for the hardware to see them coming. */
    for (int64_t u = first; (n = ITEM(next_run)(units, g, is_taken, last, &u, &start));)
        prefetch((const char *)x->k + (g * x->head_stride / D + start) * bytes, n * bytes);
    for (int64_t u = first; (n = ITEM(next_run)(units, g, is_taken, last, &u, &start)); done += n)
        for (int64_t part = 0; part < n; part += KEYS_AT_ONCE) {
            int64_t count = n - part < KEYS_AT_ONCE ? n - part : KEYS_AT_ONCE;
            int64_t from = g * x->head_stride + (start + part) * D;
            const float *k = ITEM(widen_keys)(x, 0, g, from, count * D, wide);
            prefetch((const char *)x->v + from / D * bytes, count * bytes);
            for (int p = 0; p < x->P; p++)
                ITEM(dots)(q + p * D, k, count, D, room + p * num_keys + done + part);
        }
    for (int p = 0; p < x->P; p++) {
        float *scores = room + p * num_keys;
        if (kept) memcpy(kept + p * kept_stride, scores, (size_t)num_keys * sizeof(float));
        if (!ITEM(weigh)(&read[p], scores, num_keys, scores, D))
            memset(scores, 0, (size_t)num_keys * sizeof(float));
    }
    done = 0;
    for (int64_t u = first; (n = ITEM(next_run)(units, g, is_taken, last, &u, &start)); done += n)
        for (int64_t part = 0; part < n; part += KEYS_AT_ONCE) {
            int64_t count = n - part < KEYS_AT_ONCE ? n - part : KEYS_AT_ONCE;
            int64_t from = g * x->head_stride + (start + part) * D;
            const float *v = ITEM(widen_keys)(x, 1, g, from, count * D, wide);
            for (int p = 0; p < x->P; p++)
                ITEM(add_rows)(read[p].out, room + p * num_keys + done + part, v, count, D);
        }
}

/* The units that one token did not take, log_mass [P, U]; `room` holds the weights of one head: [last - first]. */
INLINE void ITEM(attend_rest)(const Units *units, int64_t g, int64_t first, int64_t last,
                              const float *log_mass, Sums *rest, float *room, int P, int D) {
    float wide[KEYS_AT_ONCE * MAX_HEAD_DIM];
    const int64_t *sizes = units->sizes + g * units->U;
    for (int p = 0; p < P; p++) {
        if (!ITEM(weigh)(&rest[p], log_mass + p * units->U + first, last - first, room, D)) continue;
        for (int64_t u = first; u < last; u++)
            room[u - first] = sizes[u] ? room[u - first] / (float)sizes[u] : 0.0f;
        for (int64_t u = first; u < last;) {
            /* Columns that follow each other are rows that follow each other. */
            int64_t column = column_of(units, g, u), count = 1;
            while (u + count < last && count < KEYS_AT_ONCE && column >= 0 &&
                   column_of(units, g, u + count) == column + count)
                count++;
            if (column >= 0) {
                const float *sums =
                    ITEM(widen)(units->value_sums, units->type, column * D, count * D, wide);
                ITEM(add_rows)(rest[p].out, room + u - first, sums, count, D);
            }
            u += count;
        }
    }
}

/* The units `first` to `last` of one fold for one token, an item of them after another: those taken,
 * and what the others are estimated to hold. Returns how many keys were taken. */
INLINE int64_t ITEM(attend_item)(const UnitsCall *call, int64_t g, int64_t first, int64_t last, int64_t t,
                                 Sums *read, Sums *rest, float *room, float *kept, int D) {
    const Units *units = call->units;
    int64_t U = units->U, P = units->P, row = (t * units->G + g) * P, num_keys = 0;
    const uint8_t *is_taken = call->taken + (g * call->T + t) * U;
    float *log_mass = call->log_mass + row * U;
    for (int64_t u = first; u < last; u++) num_keys += is_taken[u] ? units->sizes[g * U + u] : 0;
    for (int64_t p = 0; p < P; p++)
        for (int64_t u = first; u < last; u++)
            log_mass[p * U + u] = is_taken[u] ? -INFINITY : log_mass[p * U + u];
    if (num_keys)
        ITEM(attend_taken)(call->keys, units, g, first, last, call->q + row * D, is_taken, num_keys, read,
                           room, kept, call->num_kept, D);
    if (call->is_estimating)
        ITEM(attend_rest)(units, g, first, last, log_mass, rest, room, (int)P, D);
    return num_keys;
}

/* One fold for the tokens `from` to `to`: units first, then the groups that the look-up did not open.
 * read, rest: [to - from, P]. */
INLINE void ITEM(attend_units)(const UnitsCall *call, int64_t g, int64_t fold, int64_t from, int64_t to,
                               Sums *read, Sums *rest, float *room, int D) {
    const int64_t *bounds = call->units->bounds + g * (NUM_FOLDS + 1) + fold;
    float *kept = call->kept ? call->kept + call->offsets[g * NUM_FOLDS + fold] : NULL;
    int64_t P = call->units->P;
    for (int64_t u = bounds[0]; u < bounds[1]; u += UNITS_PER_ITEM) {
        int64_t last = u + UNITS_PER_ITEM < bounds[1] ? u + UNITS_PER_ITEM : bounds[1];
        for (int64_t t = from; t < to; t++) {
            float *own = t == call->T - 1 ? kept : NULL;
            int64_t num_keys = ITEM(attend_item)(call, g, u, last, t, read + (t - from) * P,
                                                 rest + (t - from) * P, room, own, D);
            if (own) kept += num_keys;
        }
    }
    if (!call->closed || !call->is_estimating) return;
    bounds = call->closed->bounds + g * (NUM_FOLDS + 1) + fold;
    for (int64_t u = bounds[0]; u < bounds[1]; u += UNITS_PER_ITEM) {
        int64_t last = u + UNITS_PER_ITEM < bounds[1] ? u + UNITS_PER_ITEM : bounds[1];
        for (int64_t t = from; t < to; t++)
            ITEM(attend_rest)(call->closed, g, u, last,
                              call->closed_log_mass + (t * call->units->G + g) * P * call->closed->U,
                              rest + (t - from) * P, room, (int)P, D);
    }
}

static void ITEM(units)(const UnitsCall *call, int64_t g, int64_t fold, int64_t from, int64_t to,
                        Sums *read, Sums *rest, float *room) {
    BY_HEAD_DIM(call->keys->D, ITEM(attend_units)(call, g, fold, from, to, read, rest, room, DIM));
}

/* ---- a sample of what was missed ---------------------------------------------------------------- */

static float ITEM(score_slot)(const Keys *x, int64_t g, int64_t slot, const float *q) {
    float room[MAX_HEAD_DIM];
    int64_t from = g * x->head_stride + slot * x->D;
    return ITEM(dot)(q, ITEM(widen_keys)(x, 0, g, from, x->D, room), x->D);
}

/* Greatest scores that unread units can hold: [U], -inf where read. */
static void ITEM(reach)(const float *log_mass, const float *linear, const float *radii, float norm,
                        int64_t U, float *most) {
    for (int64_t u = 0; u < U; u++)
        most[u] = log_mass[u] == -INFINITY ? -INFINITY : linear[u] + norm * radii[u];
}

static const Items ITEM(items) = {
    .prefix = ITEM(prefix),
    .fold = ITEM(fold),
    .mass = ITEM(mass),
    .score = ITEM(score),
    .log_sum_exp = ITEM(log_sum_exp),
    .shares = ITEM(shares),
    .add_benefit = ITEM(add_benefit),
    .units = ITEM(units),
    .products = ITEM(products),
    .score_slot = ITEM(score_slot),
    .reach = ITEM(reach),
};
