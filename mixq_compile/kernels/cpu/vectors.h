// Vectors of LANES 32-bit numbers, and what differs between instruction sets.
//
// Arithmetic is written with the compiler's vector extensions; only operations they lack are here.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mixq {

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define MIXQ_AVX512 1
constexpr int LANES = 16;
constexpr int TILE_ROWS = 6;  // 6 x 4 accumulators, 4 weight vectors and one broadcast: 29 of 32 registers
constexpr int TILE_VECTORS = 4;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MIXQ_AVX2 1
constexpr int LANES = 8;
constexpr int TILE_ROWS = 4;
constexpr int TILE_VECTORS = 2;
#else
constexpr int LANES = 4;
constexpr int TILE_ROWS = 4;
constexpr int TILE_VECTORS = 2;
#endif

constexpr int TILE_COLUMNS = TILE_VECTORS * LANES;
constexpr int VECTOR_BYTES = 4 * LANES;

typedef int32_t IntVector __attribute__((vector_size(4 * LANES)));
typedef uint32_t UnsignedVector __attribute__((vector_size(4 * LANES)));
typedef float FloatVector __attribute__((vector_size(4 * LANES)));
typedef int8_t ByteVector __attribute__((vector_size(LANES)));
typedef uint16_t HalfVector __attribute__((vector_size(2 * LANES)));
typedef uint8_t PackedVector __attribute__((vector_size(2 * LANES)));
typedef uint16_t WideVector __attribute__((vector_size(4 * LANES)));

#define MIXQ_INLINE inline __attribute__((always_inline))
#define MIXQ_UNROLL _Pragma("GCC unroll 16")

template <typename Vector, typename Element>
MIXQ_INLINE Vector load(const Element* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof(Vector));
    return vector;
}

// Loads the first `elements` elements, or as many as fit; the others are zero.
template <typename Vector, typename Element>
MIXQ_INLINE Vector load_part(const Element* from, int64_t elements) {
    Vector vector{};
    const size_t bytes = elements * sizeof(Element);
    std::memcpy(&vector, from, bytes < sizeof(Vector) ? bytes : sizeof(Vector));
    return vector;
}

template <typename Vector, typename Element>
MIXQ_INLINE void store(Element* to, Vector vector) {
    std::memcpy(to, &vector, sizeof(Vector));
}

MIXQ_INLINE FloatVector splat(float value) { return FloatVector{} + value; }
MIXQ_INLINE IntVector splat(int32_t value) { return IntVector{} + value; }

// Signed bytes as integers; the compiler's own conversion goes byte by byte.
MIXQ_INLINE IntVector widen(ByteVector bytes) {
#if defined(MIXQ_AVX512)
    return (IntVector)_mm512_cvtepi8_epi32((__m128i)bytes);
#elif defined(MIXQ_AVX2)
    return (IntVector)_mm256_cvtepi8_epi32(load_part<__m128i>(&bytes, 1));
#else
    return __builtin_convertvector(bytes, IntVector);
#endif
}

MIXQ_INLINE FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector c) {
#if defined(MIXQ_AVX512)
    return (FloatVector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(MIXQ_AVX2)
    return (FloatVector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// acc + the sum over the four bytes of each lane of (unsigned byte) * (signed byte), exactly.
MIXQ_INLINE IntVector dot4(IntVector acc, IntVector unsigned_bytes, IntVector signed_bytes) {
#if defined(MIXQ_AVX512) && defined(__AVX512VNNI__)
    return (IntVector)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
#elif defined(MIXQ_AVX2) && defined(__AVXVNNI__)
    return (IntVector)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)unsigned_bytes, (__m256i)signed_bytes);
#elif defined(MIXQ_AVX512)
    // vpmaddubsw would saturate at 16 bits: even and odd bytes go through 16-bit products instead.
    __m512i u = (__m512i)unsigned_bytes, s = (__m512i)signed_bytes;
    __m512i even = _mm512_madd_epi16(_mm512_and_si512(u, _mm512_set1_epi16(255)),
                                     _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8));
    __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(u, 8), _mm512_srai_epi16(s, 8));
    return acc + (IntVector)even + (IntVector)odd;
#elif defined(MIXQ_AVX2)
    __m256i u = (__m256i)unsigned_bytes, s = (__m256i)signed_bytes;
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return acc + (IntVector)even + (IntVector)odd;
#else
    for (int byte = 0; byte < 4; byte++)
        acc += ((unsigned_bytes >> (8 * byte)) & 255) * ((signed_bytes << (24 - 8 * byte)) >> 24);
    return acc;
#endif
}

// Lane numbers as constants: the compiler does not see through a vector filled lane by lane.
using Lanes = std::make_integer_sequence<int, LANES>;

// The vector with lanes exchanged in blocks of DISTANCE.
template <int DISTANCE, typename Vector, int... LANE>
MIXQ_INLINE Vector exchange(Vector vector, std::integer_sequence<int, LANE...>) {
    return __builtin_shuffle(vector, IntVector{(LANE ^ DISTANCE)...});
}

template <typename Vector, int DISTANCE = LANES / 2>
MIXQ_INLINE auto sum_of_lanes(Vector vector) {
    vector += exchange<DISTANCE>(vector, Lanes());
    if constexpr (DISTANCE == 1) {
        return vector[0];
    } else {
        return sum_of_lanes<Vector, DISTANCE / 2>(vector);
    }
}

MIXQ_INLINE IntVector maximum(IntVector a, IntVector b) { return a > b ? a : b; }

template <int DISTANCE = LANES / 2>
MIXQ_INLINE int32_t largest_lane(IntVector vector) {
    vector = maximum(vector, exchange<DISTANCE>(vector, Lanes()));
    if constexpr (DISTANCE == 1) {
        return vector[0];
    } else {
        return largest_lane<DISTANCE / 2>(vector);
    }
}

template <int DISTANCE, typename Vector, int... LANE>
MIXQ_INLINE void exchange_rows(Vector& upper, Vector& lower, std::integer_sequence<int, LANE...>) {
    const Vector a = upper, b = lower;
    upper = __builtin_shuffle(a, b, IntVector{(LANE & DISTANCE ? LANES + LANE - DISTANCE : LANE)...});
    lower = __builtin_shuffle(a, b, IntVector{(LANE & DISTANCE ? LANES + LANE : LANE + DISTANCE)...});
}

// Transposes a LANES x LANES block in place, by exchanging blocks of 1, 2, 4, ... lanes.
template <int DISTANCE = 1, typename Vector>
MIXQ_INLINE void transpose(Vector (&rows)[LANES]) {
    MIXQ_UNROLL
    for (int row = 0; row < LANES; row++) {
        if (!(row & DISTANCE)) exchange_rows<DISTANCE>(rows[row], rows[row + DISTANCE], Lanes());
    }
    if constexpr (DISTANCE < LANES / 2) transpose<2 * DISTANCE>(rows);
}

}  // namespace mixq
