// Rows of a weight to codes of 8 or 4 bits, one scale a row: the scale is the largest magnitude over the largest
// code, and each value is divided by it, as `weights/rounding.py` says, bit by bit.
#pragma once

#include <cmath>

#include "quantize.h"

namespace mixq {

// `WeightRoundingArguments` in interface.py has the same fields.
struct WeightRoundingArguments {
    const void* values;  // [N, K]
    uint8_t* codes;      // [N, ceil(K * bits / 8)]
    float* scale;        // [N]
    int64_t rows, columns, stride, codes_stride;
    int32_t type, bits, threads;
};

MIXQ_INLINE IntVector rounded_quotient(FloatVector values, float scale, int32_t lowest, int32_t largest) {
    // Adding and subtracting 1.5 * 2^23 rounds to an integer, to nearest even; quotients are small.
    const FloatVector rounded = (values / scale + 0x1.8p23f) - 0x1.8p23f;
    const IntVector whole = maximum(__builtin_convertvector(rounded, IntVector), splat(lowest));
    return whole < splat(largest) ? whole : splat(largest);
}

// Returns false where a value is not finite; its codes are not written then.
template <int BITS, typename T>
bool round_row(const T* row, int64_t columns, uint8_t* codes, float& scale) {
    constexpr int32_t LARGEST = (1 << (BITS - 1)) - 1, LOWEST = BITS == 8 ? -LARGEST : -LARGEST - 1;
    IntVector magnitudes{};
    int64_t column = 0;
    for (; column + LANES <= columns; column += LANES)
        magnitudes = maximum(magnitudes, (IntVector)load_floats(row + column) & 0x7fffffff);
    if (column < columns)
        magnitudes = maximum(magnitudes, (IntVector)load_floats(row + column, columns - column) & 0x7fffffff);
    const int32_t bits = largest_lane(magnitudes);
    if (bits >= INFINITY_BITS) return false;
    const float largest = as_float(bits);
    scale = (largest < EPSILON ? EPSILON : largest) / float(LARGEST);
    const auto rounded = [&](int64_t from, int64_t count) {
        const FloatVector values = count == LANES ? load_floats(row + from) : load_floats(row + from, count);
        return rounded_quotient(values, scale, LOWEST, LARGEST);
    };
    for (column = 0; column < columns; column += LANES) {
        const int64_t count = columns - column < LANES ? columns - column : LANES;
        const ByteVector bytes = __builtin_convertvector(rounded(column, count), ByteVector);
        if constexpr (BITS == 8) {
            std::memcpy(codes + column, &bytes, count);
        } else {
            uint8_t packed[LANES / 2];
            for (int pair = 0; pair < LANES / 2; pair++)
                packed[pair] = uint8_t((bytes[2 * pair] & 15) | (bytes[2 * pair + 1] << 4));
            std::memcpy(codes + column / 2, packed, (count + 1) / 2);
        }
    }
    return true;
}

// Returns how many rows hold a value that is not finite.
template <int BITS>
int64_t round_rows(const WeightRoundingArguments& arguments) {
    int64_t refused = 0;
    with_type(arguments.type, [&](auto* element) {
        const auto* values = (decltype(element))arguments.values;
#pragma omp parallel for num_threads(arguments.threads) schedule(static) reduction(+ : refused)
        for (int64_t row = 0; row < arguments.rows; row++) {
            uint8_t* codes = arguments.codes + row * arguments.codes_stride;
            refused +=
                !round_row<BITS>(values + row * arguments.stride, arguments.columns, codes, arguments.scale[row]);
        }
    });
    return refused;
}

}  // namespace mixq
