/* SHA-256 (FIPS 180-4, §6.2.2) of whole blocks, by the processor's own instructions: one sum, or two of the same bytes
   that began differently. Two share what is made of a block before its rounds, and one computes while the other waits. */

#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>

enum { WORDS = 8, BLOCK = 64 };                    /* of a sum; bytes */
enum { AHEAD = 2048 };                             /* bytes that are asked for early: another processor has made them */

/* the first 32 bits of the fractions of the cube roots of the first 64 primes (§4.2.2) */
static const uint32_t CONSTANTS[64] __attribute__((aligned(64))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

/* A sum's words a … h as the instructions take them: (a, b, e, f) and (c, d, g, h), from the highest word down. */
typedef struct {
    __m128i abef, cdgh;
} Sum;

#define INLINE static inline __attribute__((always_inline, target("sha,sse4.1")))

INLINE Sum taken(const uint32_t *words) {
    const __m128i abcd = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)words), 0xB1);
    const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(words + 4)), 0x1B);
    return (Sum){_mm_alignr_epi8(abcd, efgh, 8), _mm_blend_epi16(efgh, abcd, 0xF0)};
}

INLINE void given(Sum sum, uint32_t *words) {
    const __m128i feba = _mm_shuffle_epi32(sum.abef, 0x1B), dchg = _mm_shuffle_epi32(sum.cdgh, 0xB1);
    _mm_storeu_si128((__m128i *)words, _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128((__m128i *)(words + 4), _mm_alignr_epi8(dchg, feba, 8));
}

/* The next four words of a block's schedule, in place of the first of the last sixteen. */
INLINE __m128i scheduled(__m128i *w, int i) {
    const __m128i before = _mm_alignr_epi8(w[(i + 3) & 3], w[(i + 2) & 3], 4);
    const __m128i first = _mm_add_epi32(_mm_sha256msg1_epu32(w[i & 3], w[(i + 1) & 3]), before);
    return w[i & 3] = _mm_sha256msg2_epu32(first, w[(i + 3) & 3]);
}

INLINE void add_blocks(uint32_t *words, const int count, const uint8_t *data, int64_t blocks) {
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    Sum sums[2] = {0};
    for (int k = 0; k < count; k++) sums[k] = taken(words + WORDS * k);
    for (; blocks > 0; blocks--, data += BLOCK) {
        Sum now[2] = {sums[0], sums[1]};
        __m128i w[4];
        _mm_prefetch((const char *)data + AHEAD, _MM_HINT_T0);
        for (int i = 0; i < 4; i++)
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(data + 16 * i)), big_endian);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const __m128i next = i < 4 ? w[i] : scheduled(w, i);
            const __m128i low = _mm_add_epi32(next, _mm_load_si128((const __m128i *)(CONSTANTS + 4 * i)));
            const __m128i high = _mm_shuffle_epi32(low, 0x0E);
            for (int k = 0; k < count; k++) now[k].cdgh = _mm_sha256rnds2_epu32(now[k].cdgh, now[k].abef, low);
            for (int k = 0; k < count; k++) now[k].abef = _mm_sha256rnds2_epu32(now[k].abef, now[k].cdgh, high);
        }
        for (int k = 0; k < count; k++) {
            sums[k].abef = _mm_add_epi32(sums[k].abef, now[k].abef);
            sums[k].cdgh = _mm_add_epi32(sums[k].cdgh, now[k].cdgh);
        }
    }
    for (int k = 0; k < count; k++) given(sums[k], words + WORDS * k);
}

__attribute__((target("sha,sse4.1"))) static void one(uint32_t *words, const uint8_t *data, int64_t blocks) {
    add_blocks(words, 1, data, blocks);
}

__attribute__((target("sha,sse4.1"))) static void two(uint32_t *words, const uint8_t *data, int64_t blocks) {
    add_blocks(words, 2, data, blocks);
}

/* Whether this processor has the instructions. */
int sums_usable(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
}

/* Add blocks of 64 bytes to one sum or to two. words: eight of each. */
void add_to_sums(uint32_t *words, int32_t count, const uint8_t *data, int64_t blocks) {
    (count == 2 ? two : one)(words, data, blocks);
}
