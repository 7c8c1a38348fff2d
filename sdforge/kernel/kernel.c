/* Elementwise arithmetic in one pass: numbers are widened, go through a few operations in the nearest cache, and are
   rounded once, while whatever is not finite is noticed.

   A program is values and operations. The first values are the inputs; every operation makes one more, of two earlier
   ones or of one and a constant; the last value is the result. All of it is IEEE 754 in separate operations (compile
   with -ffp-contract=off), in fp32 or in fp64, so that it gives the bytes that torch gives. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { F16, BF16, F32, F64 };                      /* types of inputs and of the result */
enum { ADD, SUB, MUL, ADD_C, SUB_C, MUL_C };       /* x op y, x op constant */
enum { CHUNK = 512, MOST = 32 };                   /* numbers gone through at a time; values of a program at most */

typedef struct {
    int32_t op, x, y, unused;
    double constant;
} Operation;

static uint32_t largest(const float *x, int64_t n, uint32_t most) {
    const int32_t *bits = (const int32_t *)x;      /* without the sign they are ordered as the numbers are */
    int32_t found = (int32_t)most;
    for (int64_t i = 0; i < n; i++) {
        int32_t own = bits[i] & 0x7fffffff;
        found = own > found ? own : found;
    }
    return (uint32_t)found;
}

static void widen_f16(const uint16_t *x, float *y, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    for (; i < n; i++) y[i] = _cvtsh_ss(x[i]);
}

static void widen_bf16(const uint16_t *x, float *y, int64_t n) {
    uint32_t *bits = (uint32_t *)y;
    for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)x[i] << 16;
}

static void round_f16(const float *x, uint16_t *y, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++) y[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
}

static void round_bf16(const float *x, uint16_t *y, int64_t n) {
    const uint32_t *bits = (const uint32_t *)x;    /* to nearest, ties to even; NaN never gets here unnoticed */
    for (int64_t i = 0; i < n; i++) y[i] = (uint16_t)((bits[i] + 0x7fff + ((bits[i] >> 16) & 1)) >> 16);
}

/* Widen n numbers of 16 or 32 bits to fp32. */
static void widen(const void *x, int type, int64_t at, float *y, int64_t n) {
    if (type == F16) widen_f16((const uint16_t *)x + at, y, n);
    else if (type == BF16) widen_bf16((const uint16_t *)x + at, y, n);
    else memcpy(y, (const float *)x + at, (size_t)n * sizeof(float));
}

static void rounded(const float *x, void *y, int type, int64_t at, int64_t n) {
    if (type == F16) round_f16(x, (uint16_t *)y + at, n);
    else if (type == BF16) round_bf16(x, (uint16_t *)y + at, n);
    else memcpy((float *)y + at, x, (size_t)n * sizeof(float));
}

#define EACH(VALUE) for (int64_t i = 0; i < n; i++) z[i] = VALUE
#define OPERATE(NAME, T)                                                                                     \
    static void NAME(const Operation *o, const T *restrict x, const T *restrict y, T *restrict z, int64_t n) \
    {                                                                                                        \
        const T c = (T)o->constant;                                                                          \
        switch (o->op) {                                                                                     \
        case ADD: EACH(x[i] + y[i]); break;                                                                  \
        case SUB: EACH(x[i] - y[i]); break;                                                                  \
        case MUL: EACH(x[i] * y[i]); break;                                                                  \
        case ADD_C: EACH(x[i] + c); break;                                                                   \
        case SUB_C: EACH(x[i] - c); break;                                                                   \
        case MUL_C: EACH(x[i] * c); break;                                                                   \
        }                                                                                                    \
    }

OPERATE(operate_f32, float)
OPERATE(operate_f64, double)

/* Of which source this was made, so that an older one is not taken for it. */
const char *source(void) { return SOURCE; }

/* Whether this processor has the instructions that it is compiled for. */
int usable(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
}

/* Run a program on n numbers. found: the bits of the largest magnitude of all inputs of up to 32 bits, and of the
   result as fp32; what is not finite in an input of 64 bits is not finite in the result.
   wide: whether it is computed in fp64; inputs may be F64 only then. Returns 0, or 1 for what it cannot do. */
int run(int32_t inputs, const void *const *in, const int32_t *types, int32_t count, const Operation *operations,
        int64_t n, int32_t wide, void *out, int32_t type, uint32_t *found) {
    static _Thread_local float narrow[MOST][CHUNK] __attribute__((aligned(64)));
    static _Thread_local double broad[MOST][CHUNK] __attribute__((aligned(64)));
    const double *values[MOST];
    const int32_t last = inputs + count - 1;
    uint32_t most_in = 0, most_out = 0;
    if (inputs < 1 || count < 1 || last >= MOST || type > F32) return 1;
    for (int32_t i = 0; i < inputs; i++)
        if (types[i] == F64 && !wide) return 1;
    for (int32_t i = 0; i < MOST; i++) values[i] = broad[i];
    for (int64_t at = 0; at < n; at += CHUNK) {
        const int64_t left = n - at < CHUNK ? n - at : CHUNK;
        for (int32_t i = 0; i < inputs; i++) {
            if (types[i] == F64) {
                values[i] = (const double *)in[i] + at;   /* read where it lies */
                continue;
            }
            widen(in[i], types[i], at, narrow[i], left);
            most_in = largest(narrow[i], left, most_in);
            if (wide) for (int64_t j = 0; j < left; j++) broad[i][j] = (double)narrow[i][j];
        }
        for (int32_t k = 0; k < count; k++) {
            const Operation *o = operations + k;
            const int32_t z = inputs + k;
            if (wide) operate_f64(o, values[o->x], values[o->y], broad[z], left);
            else operate_f32(o, narrow[o->x], narrow[o->y], narrow[z], left);
        }
        if (wide) for (int64_t j = 0; j < left; j++) narrow[last][j] = (float)broad[last][j];
        most_out = largest(narrow[last], left, most_out);
        rounded(narrow[last], out, type, at, left);
    }
    found[0] = most_in;
    found[1] = most_out;
    return 0;
}
