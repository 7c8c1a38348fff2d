/* Elementwise arithmetic in one pass: numbers are widened, go through a few operations in the nearest cache, and are
   rounded once, while it is noticed how large they are.

   A program is values and operations. The first values are the inputs; every operation makes one more, of two earlier
   ones or of one and a constant; the last value is the result. All of it is IEEE 754 in separate operations (compile
   with -ffp-contract=off), in fp32 or in fp64, so that it gives the bytes that torch gives. An input may also be the
   product of two matrices in fp64: it is made tile by tile where it is needed, and lies nowhere as a whole. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { F16, BF16, F32, F64, PRODUCT };             /* types of inputs; the result has one of the first three */
enum { ADD, SUB, MUL, ADD_C, SUB_C, MUL_C };       /* x op y, x op constant */
enum { CHUNK = 768, MOST = 32 };                   /* numbers gone through at a time; values of a program at most */
enum { HIGH = 16, WIDE = 192, STEP = 24 };         /* a tile's rows and columns; columns that are made at once */
enum { PRODUCTS = 8, RANKS = 256 };                /* of a program at most; RANKS: of all its products together */

typedef struct {
    int32_t op, x, y, unused;
    double constant;
} Operation;

typedef struct {
    const double *left, *right;                    /* (rows, rank) and (rank, columns), in C order */
    int64_t rank, columns;
} Product;

typedef struct {
    int32_t inputs;
    const void *const *in;                         /* numbers in C order, or a Product */
    const int32_t *types;
    int32_t count;
    const Operation *operations;
    int32_t wide;                                  /* whether it is computed in fp64 */
    void *out;
    int32_t type;
} Program;

/* -- 8 numbers at a time ---------------------------------------------------------------------------------------- */

enum { LANES = 8 };                                /* fp32 numbers that are read and rounded at a time */

#define BASE static inline __attribute__((always_inline))

/* Return 8 numbers of 16 or 32 bits, as fp32. */
BASE __m256 taken(const void *x, int type, int64_t at) {
    if (type == F32) return _mm256_loadu_ps((const float *)x + at);
    const __m128i bits = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + at));
    if (type == F16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/* Round 8 numbers to a type. bf16: to nearest, ties to even; NaN never gets there unnoticed. */
BASE void given(__m256 x, void *y, int type, int64_t at) {
    if (type == F32) {
        _mm256_storeu_ps((float *)y + at, x);
        return;
    }
    __m128i *place = (__m128i *)((uint16_t *)y + at);
    if (type == F16) {
        _mm_storeu_si128(place, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
        return;
    }
    const __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i high = _mm256_srli_epi32(near, 16);
    _mm_storeu_si128(place, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

/* Return the bytes of a number of a type. */
BASE size_t item(int type) { return type == F64 ? 8 : type == F32 ? 4 : 2; }

/* The same of fewer than 8 numbers; what is taken has zeros behind them. */
BASE __m256 taken_some(const void *x, int type, int64_t at, int64_t n) {
    float some[LANES] = {0};
    memcpy(some, (const char *)x + (size_t)at * item(type), (size_t)n * item(type));
    return taken(some, type, 0);
}

BASE void given_some(__m256 x, void *y, int type, int64_t at, int64_t n) {
    float some[LANES];
    given(x, some, type, 0);
    memcpy((char *)y + (size_t)at * item(type), some, (size_t)n * item(type));
}

/* All bits of the first lanes. */
BASE __m256 first_lanes(int64_t n) {
    const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)n), number));
}

/* The largest of 8 whole numbers that are not negative. */
BASE uint32_t largest(__m256i x) {
    int32_t own[LANES], found = 0;
    _mm256_storeu_si256((__m256i *)own, x);
    for (int i = 0; i < LANES; i++) found = own[i] > found ? own[i] : found;
    return (uint32_t)found;
}

/* -- units of 8 fp64 and 16 fp32 numbers: two vectors of AVX2, or one of AVX-512 ----------------------------------- */

#define PAIRS(T, C, VECTOR, INTRINSIC)                                                                                 \
    typedef struct { VECTOR low, high; } Unit_##T##_avx2;                                                              \
    enum { HALF_##T = sizeof(VECTOR) / sizeof(C) };                                                                    \
    BASE Unit_##T##_avx2 load_##T##_avx2(const C *x) {                                                                 \
        return (Unit_##T##_avx2){INTRINSIC(loadu)(x), INTRINSIC(loadu)(x + HALF_##T)};                                 \
    }                                                                                                                  \
    BASE void store_##T##_avx2(C *x, Unit_##T##_avx2 y) {                                                              \
        INTRINSIC(storeu)(x, y.low), INTRINSIC(storeu)(x + HALF_##T, y.high);                                          \
    }                                                                                                                  \
    BASE Unit_##T##_avx2 set_##T##_avx2(C x) { return (Unit_##T##_avx2){INTRINSIC(set1)(x), INTRINSIC(set1)(x)}; }     \
    PAIRED(add, T, INTRINSIC)                                                                                          \
    PAIRED(sub, T, INTRINSIC)                                                                                          \
    PAIRED(mul, T, INTRINSIC)
#define PAIRED(NAME, T, INTRINSIC)                                                                                     \
    BASE Unit_##T##_avx2 NAME##_##T##_avx2(Unit_##T##_avx2 x, Unit_##T##_avx2 y) {                                     \
        return (Unit_##T##_avx2){INTRINSIC(NAME)(x.low, y.low), INTRINSIC(NAME)(x.high, y.high)};                      \
    }
#define PD(NAME) _mm256_##NAME##_pd
#define PS(NAME) _mm256_##NAME##_ps
PAIRS(f64, double, __m256d, PD)
PAIRS(f32, float, __m256, PS)

BASE Unit_f64_avx2 broadened_avx2(__m256 x) {
    return (Unit_f64_avx2){_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
}

BASE __m256 narrowed_avx2(Unit_f64_avx2 x) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(x.low)), _mm256_cvtpd_ps(x.high), 1);
}

#define BASE512 static inline __attribute__((always_inline, target("avx512f")))
#define WHOLE(T, C, VECTOR, S)                                                                                         \
    typedef VECTOR Unit_##T##_avx512;                                                                                  \
    BASE512 VECTOR load_##T##_avx512(const C *x) { return _mm512_loadu_##S(x); }                                       \
    BASE512 void store_##T##_avx512(C *x, VECTOR y) { _mm512_storeu_##S(x, y); }                                       \
    BASE512 VECTOR set_##T##_avx512(C x) { return _mm512_set1_##S(x); }                                                \
    BASE512 VECTOR add_##T##_avx512(VECTOR x, VECTOR y) { return _mm512_add_##S(x, y); }                               \
    BASE512 VECTOR sub_##T##_avx512(VECTOR x, VECTOR y) { return _mm512_sub_##S(x, y); }                               \
    BASE512 VECTOR mul_##T##_avx512(VECTOR x, VECTOR y) { return _mm512_mul_##S(x, y); }
WHOLE(f64, double, __m512d, pd)
WHOLE(f32, float, __m512, ps)

BASE512 __m512d broadened_avx512(__m256 x) { return _mm512_cvtps_pd(x); }

BASE512 __m256 narrowed_avx512(__m512d x) { return _mm512_cvtpd_ps(x); }

/* -- through a program ---------------------------------------------------------------------------------------------- */

typedef uint32_t Pass(const Program *, int64_t, int64_t, int64_t, int64_t, const double *const *, uint32_t);

#define TARGET "avx2,f16c"
#define VARIANT(NAME) NAME##_avx2
#include "pass.h"

#define TARGET "avx2,f16c,avx512f"
#define VARIANT(NAME) NAME##_avx512
#include "pass.h"

static Pass *pass = pass_avx2;

/* -- products, tile by tile ----------------------------------------------------------------------------------------- */

/* Make a tile of HIGH rows of a product. left: (HIGH, rank); right: (rank, WIDE), of which `columns` are taken, a
   multiple of STEP; tile: (HIGH, WIDE). Ranks are added one after the other by fused multiply-adds, in every variant,
   so that all give the same bits. What is taken of `right` at once stays in the nearest cache for all rows. */
typedef void Tile(const double *left, const double *right, int64_t rank, int64_t columns, double *tile);

#define TILE(NAME, TARGET, VECTOR, LANES, ROWS, ZERO, SET, LOAD, STORE, FMA)                                      \
    __attribute__((target(TARGET))) static void NAME(const double *left, const double *right, int64_t rank,       \
                                                     int64_t columns, double *tile) {                             \
        for (int64_t column = 0; column < columns; column += 3 * LANES)                                           \
            for (int64_t row = 0; row < HIGH; row += ROWS) {                                                      \
                VECTOR sum[ROWS][3];                                                                              \
                for (int i = 0; i < ROWS; i++) for (int j = 0; j < 3; j++) sum[i][j] = ZERO();                    \
                for (int64_t r = 0; r < rank; r++) {                                                              \
                    const double *x = left + row * rank + r, *y = right + r * WIDE + column;                      \
                    const VECTOR y0 = LOAD(y), y1 = LOAD(y + LANES), y2 = LOAD(y + 2 * LANES);                    \
                    for (int i = 0; i < ROWS; i++) {                                                              \
                        const VECTOR own = SET(x[i * rank]);                                                      \
                        sum[i][0] = FMA(own, y0, sum[i][0]);                                                      \
                        sum[i][1] = FMA(own, y1, sum[i][1]);                                                      \
                        sum[i][2] = FMA(own, y2, sum[i][2]);                                                      \
                    }                                                                                             \
                }                                                                                                 \
                for (int i = 0; i < ROWS; i++)                                                                    \
                    for (int j = 0; j < 3; j++) STORE(tile + (row + i) * WIDE + column + j * LANES, sum[i][j]);   \
            }                                                                                                     \
    }

TILE(tile_avx2, "avx2,fma", __m256d, 4, 4, _mm256_setzero_pd, _mm256_set1_pd, _mm256_load_pd, _mm256_store_pd,
     _mm256_fmadd_pd)
TILE(tile_avx512, "avx512f", __m512d, 8, 8, _mm512_setzero_pd, _mm512_set1_pd, _mm512_load_pd, _mm512_store_pd,
     _mm512_fmadd_pd)

static Tile *tile = tile_avx2;

/* Copy WIDE columns at most of (rank, all) to (rank, WIDE), zeros behind them up to a multiple of STEP. */
static void take_columns(const double *x, int64_t rank, int64_t all, int64_t columns, double *y) {
    for (int64_t r = 0; r < rank; r++, x += all, y += WIDE) {
        memcpy(y, x, (size_t)columns * sizeof(double));
        for (int64_t j = columns; j % STEP; j++) y[j] = 0;
    }
}

/* Take rows through a program that products belong to, tile by tile. Of the last rows a tile has more than there are:
   they are made of what `left` happens to hold, and nothing is taken of them. */
static uint32_t in_tiles(const Program *p, const Product *const *products, int32_t count, int64_t rows) {
    static _Thread_local double left[RANKS * HIGH] __attribute__((aligned(64)));
    static _Thread_local double right[RANKS * WIDE] __attribute__((aligned(64)));
    static _Thread_local double tiles[PRODUCTS][HIGH * WIDE] __attribute__((aligned(64)));
    const int64_t all = products[0]->columns;
    uint32_t most = 0;
    for (int64_t column = 0; column < all; column += WIDE) {
        const int64_t columns = all - column < WIDE ? all - column : WIDE, made = (columns + STEP - 1) / STEP * STEP;
        double *panel = right;
        for (int32_t k = 0; k < count; panel += products[k++]->rank * WIDE)
            take_columns(products[k]->right + column, products[k]->rank, all, columns, panel);
        for (int64_t row = 0; row < rows; row += HIGH) {
            const int64_t high = rows - row < HIGH ? rows - row : HIGH;
            panel = right;
            for (int32_t k = 0; k < count; panel += products[k++]->rank * WIDE) {
                const int64_t rank = products[k]->rank;
                const double *own = products[k]->left + row * rank;
                if (high < HIGH) own = memcpy(left, own, (size_t)(high * rank) * sizeof(double));
                tile(own, panel, rank, made, tiles[k]);
            }
            const int64_t at_once = columns == WIDE ? CHUNK / WIDE : 1;
            for (int64_t i = 0; i < high; i += at_once) {
                const double *own[PRODUCTS];
                for (int32_t k = 0; k < count; k++) own[k] = tiles[k] + i * WIDE;
                const int64_t here = high - i < at_once ? high - i : at_once;
                most = pass(p, (row + i) * all + column, here, columns, all, own, most);
            }
        }
    }
    return most;
}

/* -- what Python calls ---------------------------------------------------------------------------------------------- */

/* Of which source this was made, so that an older one is not taken for it. */
const char *source(void) { return SOURCE; }

/* Whether this processor has the instructions that it is compiled for. avx512: whether to use those where they are. */
int usable(int32_t avx512) {
    __builtin_cpu_init();
    avx512 = avx512 && __builtin_cpu_supports("avx512f");
    tile = avx512 ? tile_avx512 : tile_avx2;
    pass = avx512 ? pass_avx512 : pass_avx2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
}

/* Run a program on n numbers. most: the bits of the result's largest magnitude, in fp32. What is not finite in an input
   is not finite in what is made of it: no sum, difference or product loses it.
   wide: whether it is computed in fp64; inputs may be F64 or PRODUCT only then, and of a product n are whole rows.
   Returns 0, or 1 for what it cannot do. */
int run(int32_t inputs, const void *const *in, const int32_t *types, int32_t count, const Operation *operations,
        int64_t n, int32_t wide, void *out, int32_t type, uint32_t *most) {
    const Program p = {inputs, in, types, count, operations, wide, out, type};
    const Product *products[PRODUCTS];
    int32_t found = 0;
    int64_t ranks = 0;
    if (inputs < 1 || count < 1 || inputs + count > MOST || type > F32) return 1;
    for (int32_t i = 0; i < inputs; i++) {
        if (types[i] >= F64 && !wide) return 1;
        if (types[i] != PRODUCT) continue;
        if (found == PRODUCTS) return 1;
        products[found] = in[i];
        ranks += products[found]->rank;
        if (ranks > RANKS || products[found]->columns != products[0]->columns || n % products[0]->columns) return 1;
        found++;
    }
    *most = 0;
    if (found) *most = in_tiles(&p, products, found, n / products[0]->columns);
    else for (int64_t at = 0; at < n; at += CHUNK) *most = pass(&p, at, 1, n - at < CHUNK ? n - at : CHUNK, 0, 0, *most);
    return 0;
}
