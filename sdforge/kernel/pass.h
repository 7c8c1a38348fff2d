/* How numbers are taken through a program, for processors with certain instructions: included once for each kind.

   TARGET names the instructions, VARIANT(name) what is made of a name here. There are units of 8 fp64 and 16 fp32 numbers
   (Unit_f64, Unit_f32) with load, store, set, add, sub and mul of each, and 8 fp32 numbers are `broadened` and `narrowed`.
   Buffers have room for whole units: what lies behind the last number is computed too, and not looked at. */

#define HERE static inline __attribute__((always_inline, target(TARGET)))
#define EACH(N, T, VALUE) for (int64_t i = 0; i < n; i += N) VARIANT(store_##T)(z + i, VALUE)
#define BOTH(NAME, T) VARIANT(NAME##_##T)(VARIANT(load_##T)(x + i), VARIANT(load_##T)(y + i))
#define CONSTANT(NAME, T) VARIANT(NAME##_##T)(VARIANT(load_##T)(x + i), c)
#define OPERATE(N, T, C)                                                                                       \
    HERE void VARIANT(operate_##T)(const Operation *o, const C *x, const C *y, C *z, int64_t n) {              \
        const VARIANT(Unit_##T) c = VARIANT(set_##T)((C)o->constant);                                          \
        switch (o->op) {                                                                                       \
        case ADD: EACH(N, T, BOTH(add, T)); break;                                                             \
        case SUB: EACH(N, T, BOTH(sub, T)); break;                                                             \
        case MUL: EACH(N, T, BOTH(mul, T)); break;                                                             \
        case ADD_C: EACH(N, T, CONSTANT(add, T)); break;                                                       \
        case SUB_C: EACH(N, T, CONSTANT(sub, T)); break;                                                       \
        case MUL_C: EACH(N, T, CONSTANT(mul, T)); break;                                                       \
        }                                                                                                      \
    }

OPERATE(16, f32, float)
OPERATE(8, f64, double)

/* Store 8 fp32 numbers as they are computed with. */
HERE void VARIANT(put)(__m256 x, int wide, void *y, int64_t at) {
    if (wide) VARIANT(store_f64)((double *)y + at, VARIANT(broadened)(x));
    else _mm256_storeu_ps((float *)y + at, x);
}

/* Widen n numbers of one type, which the compiler knows. */
HERE void VARIANT(widen_known)(const void *x, const int type, const int wide, void *y, int64_t n) {
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) VARIANT(put)(taken(x, type, i), wide, y, i);
    if (whole < n) VARIANT(put)(taken_some(x, type, whole, n - whole), wide, y, whole);
}

HERE void VARIANT(widen)(const void *x, int type, int wide, void *y, int64_t n) {
    if (type == F16 && wide) VARIANT(widen_known)(x, F16, 1, y, n);
    else if (type == F16) VARIANT(widen_known)(x, F16, 0, y, n);
    else if (type == BF16 && wide) VARIANT(widen_known)(x, BF16, 1, y, n);
    else if (type == BF16) VARIANT(widen_known)(x, BF16, 0, y, n);
    else if (wide) VARIANT(widen_known)(x, F32, 1, y, n);
    else memcpy(y, x, (size_t)n * sizeof(float));
}

/* Return 8 numbers that were computed, as fp32. */
HERE __m256 VARIANT(got)(const void *x, int wide, int64_t at) {
    if (wide) return VARIANT(narrowed)(VARIANT(load_f64)((const double *)x + at));
    return _mm256_loadu_ps((const float *)x + at);
}

/* Round n numbers to a type that the compiler knows; see `finish`. */
HERE __m256i VARIANT(finish_known)(const void *x, const int wide, void *y, const int type, int64_t n, __m256i most) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        const __m256 own = VARIANT(got)(x, wide, i);
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(own), magnitude));
        given(own, y, type, i);
    }
    if (whole < n) {
        const __m256 own = _mm256_and_ps(VARIANT(got)(x, wide, whole), first_lanes(n - whole));
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(own), magnitude));
        given_some(own, y, type, whole, n - whole);
    }
    return most;
}

/* Round n numbers; return `most`, or where it is more the bits of one without the sign: they are ordered as magnitudes,
   NaN last. */
HERE __m256i VARIANT(finish)(const void *x, int wide, void *y, int type, int64_t n, __m256i most) {
    if (type == F16 && wide) return VARIANT(finish_known)(x, 1, y, F16, n, most);
    if (type == F16) return VARIANT(finish_known)(x, 0, y, F16, n, most);
    if (type == BF16 && wide) return VARIANT(finish_known)(x, 1, y, BF16, n, most);
    if (type == BF16) return VARIANT(finish_known)(x, 0, y, BF16, n, most);
    if (wide) return VARIANT(finish_known)(x, 1, y, F32, n, most);
    return VARIANT(finish_known)(x, 0, y, F32, n, most);
}

/* Take rows of n numbers through a program, the first one from place `at` on, each `apart` behind the one before.
   More than one: n is whole units of both kinds, and of a product they lie one behind the other.
   tiles: what products are there. Returns `most` or the bits of the result's largest magnitude, whichever is more. */
__attribute__((target(TARGET))) static uint32_t VARIANT(pass)(const Program *p, int64_t at, int64_t rows, int64_t n,
                                                              int64_t apart, const double *const *tiles,
                                                              uint32_t most) {
    static _Thread_local double memory[MOST][CHUNK] __attribute__((aligned(64)));
    const void *values[MOST];
    const int32_t last = p->inputs + p->count - 1;
    const size_t size = p->wide ? sizeof(double) : sizeof(float);
    for (int32_t i = 0; i <= last; i++) values[i] = memory[i];
    for (int32_t i = 0; i < p->inputs; i++) {
        if (p->types[i] == PRODUCT) {
            values[i] = *tiles++;
            continue;
        }
        const size_t own = item(p->types[i]);
        for (int64_t row = 0; row < rows; row++) {
            const char *x = (const char *)p->in[i] + (size_t)(at + row * apart) * own;
            char *y = (char *)memory[i] + (size_t)(row * n) * size;
            if (p->types[i] == F64) memcpy(y, x, (size_t)n * size);
            else VARIANT(widen)(x, p->types[i], p->wide, y, n);
        }
    }
    for (int32_t k = 0; k < p->count; k++) {
        const Operation *o = p->operations + k;
        void *z = memory[p->inputs + k];
        if (p->wide) VARIANT(operate_f64)(o, values[o->x], values[o->y], z, rows * n);
        else VARIANT(operate_f32)(o, values[o->x], values[o->y], z, rows * n);
    }
    __m256i found = _mm256_set1_epi32((int32_t)most);
    for (int64_t row = 0; row < rows; row++) {
        const char *x = (const char *)memory[last] + (size_t)(row * n) * size;
        char *y = (char *)p->out + (size_t)(at + row * apart) * item(p->type);
        found = VARIANT(finish)(x, p->wide, y, p->type, n, found);
    }
    return largest(found);
}

#undef HERE
#undef EACH
#undef BOTH
#undef CONSTANT
#undef OPERATE
#undef TARGET
#undef VARIANT
