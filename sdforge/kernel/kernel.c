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
enum { CHUNK = 512, MOST = 32 };                   /* numbers gone through at a time; values of a program at most */
enum { HIGH = 8, WIDE = 192, STEP = 24 };          /* a tile's rows and columns; columns that are made at once */
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

static uint32_t largest(const float *x, int64_t n, uint32_t most) {
    const int32_t *bits = (const int32_t *)x;      /* without the sign they are ordered as magnitudes, NaN last */
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

/* Take n numbers through a program, from place `at` on. tiles: what products are there. Returns `most` or the bits of
   the result's largest magnitude, whichever is more. */
static uint32_t pass(const Program *p, int64_t at, int64_t n, const double *const *tiles, uint32_t most) {
    static _Thread_local float narrow[MOST][CHUNK] __attribute__((aligned(64)));
    static _Thread_local double broad[MOST][CHUNK] __attribute__((aligned(64)));
    const double *values[MOST];
    const int32_t last = p->inputs + p->count - 1;
    for (int32_t i = 0; i <= last; i++) values[i] = broad[i];
    for (int32_t i = 0; i < p->inputs; i++) {
        if (p->types[i] == PRODUCT) values[i] = *tiles++;
        else if (p->types[i] == F64) values[i] = (const double *)p->in[i] + at;   /* read where it lies */
        else {
            widen(p->in[i], p->types[i], at, narrow[i], n);
            if (p->wide) for (int64_t j = 0; j < n; j++) broad[i][j] = (double)narrow[i][j];
        }
    }
    for (int32_t k = 0; k < p->count; k++) {
        const Operation *o = p->operations + k;
        const int32_t z = p->inputs + k;
        if (p->wide) operate_f64(o, values[o->x], values[o->y], broad[z], n);
        else operate_f32(o, narrow[o->x], narrow[o->y], narrow[z], n);
    }
    if (p->wide) for (int64_t j = 0; j < n; j++) narrow[last][j] = (float)broad[last][j];
    most = largest(narrow[last], n, most);
    rounded(narrow[last], p->out, p->type, at, n);
    return most;
}

/* Make a tile of HIGH rows of a product. left: (rank, HIGH); right: (rank, WIDE), of which `columns` are taken, a
   multiple of STEP; tile: (HIGH, WIDE). Ranks are added one after the other by fused multiply-adds, in every variant,
   so that all give the same bits. */
typedef void Tile(const double *left, const double *right, int64_t rank, int64_t columns, double *tile);

#define TILE(NAME, TARGET, VECTOR, LANES, ROWS, ZERO, SET, LOAD, STORE, FMA)                                      \
    __attribute__((target(TARGET))) static void NAME(const double *left, const double *right, int64_t rank,       \
                                                     int64_t columns, double *tile) {                             \
        for (int64_t row = 0; row < HIGH; row += ROWS)                                                            \
            for (int64_t column = 0; column < columns; column += 3 * LANES) {                                     \
                VECTOR sum[ROWS][3];                                                                              \
                for (int i = 0; i < ROWS; i++) for (int j = 0; j < 3; j++) sum[i][j] = ZERO();                    \
                for (int64_t r = 0; r < rank; r++) {                                                              \
                    const double *x = left + r * HIGH + row, *y = right + r * WIDE + column;                      \
                    const VECTOR y0 = LOAD(y), y1 = LOAD(y + LANES), y2 = LOAD(y + 2 * LANES);                    \
                    for (int i = 0; i < ROWS; i++) {                                                              \
                        const VECTOR own = SET(x[i]);                                                             \
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

/* Turn HIGH rows at most of (rows, rank) into (rank, HIGH), zeros in place of rows that are not there. */
static void take_rows(const double *x, int64_t rank, int64_t rows, double *y) {
    for (int64_t r = 0; r < rank; r++)
        for (int64_t i = 0; i < HIGH; i++) y[r * HIGH + i] = i < rows ? x[i * rank + r] : 0;
}

/* Take rows through a program that products belong to, tile by tile. */
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
                take_rows(products[k]->left + row * rank, rank, high, left);
                tile(left, panel, rank, made, tiles[k]);
            }
            for (int64_t i = 0; i < high; i++) {
                const double *own[PRODUCTS];
                for (int32_t k = 0; k < count; k++) own[k] = tiles[k] + i * WIDE;
                most = pass(p, (row + i) * all + column, columns, own, most);
            }
        }
    }
    return most;
}

/* Of which source this was made, so that an older one is not taken for it. */
const char *source(void) { return SOURCE; }

/* Whether this processor has the instructions that it is compiled for. avx512: whether to use those where they are. */
int usable(int32_t avx512) {
    __builtin_cpu_init();
    tile = avx512 && __builtin_cpu_supports("avx512f") ? tile_avx512 : tile_avx2;
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
    else for (int64_t at = 0; at < n; at += CHUNK) *most = pass(&p, at, n - at < CHUNK ? n - at : CHUNK, 0, *most);
    return 0;
}
