// float32, bfloat16 and float16 in memory; float32 in registers. Rounding is to nearest even.
#pragma once

#include "vectors.h"

namespace mixq {

enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT32 = 3 };

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

MIXQ_INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

MIXQ_INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

MIXQ_INLINE float to_float(float value) { return value; }

MIXQ_INLINE float to_float(BFloat16 value) { return as_float(uint32_t(value.bits) << 16); }

MIXQ_INLINE float to_float(Float16 value) {
#if defined(__F16C__)
    return _cvtsh_ss(value.bits);
#else
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
    const uint32_t rest = uint32_t(value.bits & 0x7fff) << 13;
    if (rest >= 0x0f800000) return as_float(sign | 0x7f800000 | rest);
    // Multiplying by 2^112 moves the exponent's bias, and makes subnormal numbers normal.
    return as_float(sign | as_bits(as_float(rest) * 0x1p112f));
#endif
}

MIXQ_INLINE void from_float(float value, float& out) { out = value; }

MIXQ_INLINE void from_float(float value, BFloat16& out) {
    const uint32_t bits = as_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        out.bits = 0x7fc0;
    } else {
        out.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

MIXQ_INLINE void from_float(float value, Float16& out) {
#if defined(__F16C__)
    out.bits = uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
    const uint32_t bits = as_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) {
        out.bits = uint16_t(sign | 0x7e00);
    } else if (rest >= 0x477ff000) {
        out.bits = uint16_t(sign | 0x7c00);
    } else if (rest < 0x38800000) {
        // Adding 1/2 leaves the subnormal result, rounded, in the lowest bits.
        out.bits = uint16_t(sign | (as_bits(as_float(rest) + 0.5f) - as_bits(0.5f)));
    } else {
        out.bits = uint16_t(sign | ((rest - 0x38000000 + 0x0fff + ((rest >> 13) & 1)) >> 13));
    }
#endif
}

MIXQ_INLINE FloatVector load_floats(const float* from) { return load<FloatVector>(from); }

MIXQ_INLINE FloatVector load_floats(const BFloat16* from) {
    return (FloatVector)(__builtin_convertvector(load<HalfVector>(from), UnsignedVector) << 16);
}

MIXQ_INLINE FloatVector load_floats(const Float16* from) {
#if defined(MIXQ_AVX512)
    return (FloatVector)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(MIXQ_AVX2)
    return (FloatVector)_mm256_cvtph_ps(load<__m128i>(from));
#else
    FloatVector values{};
    for (int lane = 0; lane < LANES; lane++) values[lane] = to_float(from[lane]);
    return values;
#endif
}

// The first `elements` numbers; the other lanes are zero.
template <typename T>
MIXQ_INLINE FloatVector load_floats(const T* from, int64_t elements) {
    T part[LANES] = {};
    std::memcpy(part, from, elements * sizeof(T));
    return load_floats(part);
}

MIXQ_INLINE void store_floats(float* to, FloatVector values) { store(to, values); }

MIXQ_INLINE void store_floats(BFloat16* to, FloatVector values) {
    const UnsignedVector bits = (UnsignedVector)values;
    const UnsignedVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const UnsignedVector is_nan = (UnsignedVector)((bits & 0x7fffffff) > 0x7f800000);
    store(to, __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), HalfVector));
}

MIXQ_INLINE void store_floats(Float16* to, FloatVector values) {
#if defined(MIXQ_AVX512)
    store(to, _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT));
#elif defined(MIXQ_AVX2)
    store(to, _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int lane = 0; lane < LANES; lane++) from_float(values[lane], to[lane]);
#endif
}

template <typename T>
MIXQ_INLINE void store_floats(T* to, FloatVector values, int64_t elements) {
    T part[LANES];
    store_floats(part, values);
    std::memcpy(to, part, elements * sizeof(T));
}

// Calls `function` with a null pointer of the element type that `type` names.
template <typename Function>
MIXQ_INLINE auto with_type(int type, Function function) {
    if (type == BFLOAT16) return function((BFloat16*)nullptr);
    if (type == FLOAT16) return function((Float16*)nullptr);
    return function((float*)nullptr);
}

}  // namespace mixq
