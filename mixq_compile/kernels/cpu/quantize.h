// Rows to int8 codes, one scale a row, and the outlier columns; each row is read from memory once.
#pragma once

#include <cmath>
#include <type_traits>

#include "numbers.h"

namespace mixq {

constexpr float EPSILON = 0x1p-96f;
constexpr float TEACHING_LIMIT = 0x1p23f;  // as in outlier_state.py
constexpr int RELATIVE_BITS = 13;
constexpr float SMALLEST_RELATIVE = 0x1p-96f, LARGEST_RELATIVE = 0x1p112f;
constexpr int32_t INFINITY_BITS = 0x7f800000;

// State and results of one quantization; `QuantizeArguments` in interface.py has the same fields.
struct QuantizeArguments {
    const int32_t* index;        // [C]
    const int32_t* column_slot;  // [K]
    int32_t* counters;           // count, overflow, flag, frozen; null: no column is an outlier
    const float* threshold;      // null: the columns are fixed; negative: a multiple of a row's mean
    int8_t* codes;               // [M, K]
    float* scale;                // [M]
    void* outliers;              // [M, C]
    int32_t* used;               // the number of outlier columns that the results hold
    const bool* row_mask;        // [M], false where a row teaches nothing; null: every row may
    int64_t columns, capacity, codes_stride;
    int32_t largest_code, threads;

    int32_t count() const { return counters ? counters[0] : 0; }

    bool relative() const { return threshold && *threshold < 0; }

    bool may_teach(int64_t row) const { return !row_mask || row_mask[row]; }

    bool masked() const {
        bool any = false;
        for (int64_t column = 0; column < columns; column++) any |= column_slot[column] >= 0;
        return any;
    }

    // Ends a quantization: whether `largest`, of all rows that teach, asks for learning.
    bool finish(float largest) const {
        constexpr int FLAG = 2, FROZEN = 3;
        *used = count();
        if (!threshold) return false;
        counters[FLAG] = 0;
        return largest > std::fabs(*threshold) && !counters[FROZEN];
    }
};

struct RowMaxima {
    int32_t inner;    // bits of the largest magnitude outside the outlier columns
    int32_t overall;  // the same with them
    float sum;        // about the sum of all magnitudes, where it was asked for
};

// The bit pattern of a magnitude orders like its value, and is at least INFINITY_BITS where not finite.
template <bool MASKED, bool SUMMED, typename T>
MIXQ_INLINE RowMaxima row_maxima(const T* row, const int32_t* column_slot, int64_t columns) {
    IntVector inner{}, overall{};
    FloatVector sum{};
    int64_t column = 0;
    for (; column + LANES <= columns; column += LANES) {
        const IntVector magnitude = (IntVector)load_floats(row + column) & 0x7fffffff;
        overall = maximum(overall, magnitude);
        if (SUMMED) sum += (FloatVector)magnitude;
        if (MASKED) inner = maximum(inner, magnitude & (load<IntVector>(column_slot + column) >> 31));
    }
    if (column < columns) {
        const IntVector magnitude = (IntVector)load_floats(row + column, columns - column) & 0x7fffffff;
        const IntVector slot = load_part<IntVector>(column_slot + column, columns - column);
        overall = maximum(overall, magnitude);
        if (SUMMED) sum += (FloatVector)magnitude;
        if (MASKED) inner = maximum(inner, magnitude & (slot >> 31));
    }
    const int32_t largest = largest_lane(overall);
    float total = 0;
    if (SUMMED)
        for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    return {MASKED ? largest_lane(inner) : largest, largest, total};
}

// The inverse of the mean magnitude of a row with this largest magnitude, or 0; `row_factors` of the reference.
template <typename T>
float inverse_mean(const T* row, int64_t columns, float largest) {
    if (!(largest >= SMALLEST_RELATIVE && largest < LARGEST_RELATIVE)) return 0;
    const float per_unit = as_float((254 + RELATIVE_BITS - (as_bits(largest) >> 23)) << 23);
    IntVector sums{};
    int64_t column = 0;
    for (; column + LANES <= columns; column += LANES) {
        const FloatVector units = load_floats(row + column) * per_unit;
        sums += __builtin_convertvector((FloatVector)((IntVector)units & 0x7fffffff), IntVector);
    }
    if (column < columns) {
        const FloatVector units = load_floats(row + column, columns - column) * per_unit;
        sums += __builtin_convertvector((FloatVector)((IntVector)units & 0x7fffffff), IntVector);
    }
    int32_t total = 0;
    for (int lane = 0; lane < LANES; lane++) total += sums[lane];
    return float(columns) / float(total) * per_unit;
}

// Whether a row's largest magnitude outside the outlier columns lies so far below this multiple of its mean that
// rounding, in the sum here or of the units there, cannot lift it above: most rows need no second look.
inline bool well_below(const RowMaxima& maxima, int64_t columns, float multiple) {
    constexpr float ROUNDED = 1 - 0x1p-8f, UNIT = 0x1p-12f;
    const float overall = as_float(maxima.overall);
    if (!(overall >= SMALLEST_RELATIVE && maxima.sum < LARGEST_RELATIVE)) return false;
    return as_float(maxima.inner) < multiple * (maxima.sum / float(columns) * ROUNDED - overall * UNIT);
}

template <bool MASKED>
MIXQ_INLINE ByteVector codes_of(FloatVector values, IntVector slot, float inverse, int32_t largest_code) {
    if (MASKED) values = (FloatVector)((IntVector)values & (slot >> 31));
    // Adding and subtracting 1.5 * 2^23 rounds to an integer, to nearest even.
    const FloatVector rounded = (values * inverse + 0x1.8p23f) - 0x1.8p23f;
    const IntVector whole = __builtin_convertvector(rounded, IntVector);
    const IntVector above = splat(-largest_code), below = splat(largest_code);
    const IntVector bounded = maximum(whole, above);
    return __builtin_convertvector(bounded < below ? bounded : below, ByteVector);
}

template <bool MASKED, typename T>
void row_codes(
    const T* row, const T* next_row, const int32_t* column_slot, int64_t columns, float inverse, int32_t largest_code,
    int8_t* codes) {
    int64_t column = 0;
    for (; column + LANES <= columns; column += LANES) {
        __builtin_prefetch(next_row + column);
        const IntVector slot = MASKED ? load<IntVector>(column_slot + column) : IntVector{};
        store(codes + column, codes_of<MASKED>(load_floats(row + column), slot, inverse, largest_code));
    }
    if (column < columns) {
        const int64_t rest = columns - column;
        const IntVector slot = load_part<IntVector>(column_slot + column, rest);
        const ByteVector last = codes_of<MASKED>(load_floats(row + column, rest), slot, inverse, largest_code);
        std::memcpy(codes + column, &last, rest);
    }
}

// Quantizes one row whose values may be wider than its outliers are stored; the next one lies `stride` on.
// Returns the bits of what the threshold is compared with: its largest magnitude outside the outlier columns, or
// that as a multiple of its mean; 0 where it is not finite, teaches nothing because its scale is too large, or is
// well below the multiple.
template <bool MASKED, typename T, typename Stored>
int32_t quantize_row(const QuantizeArguments& arguments, const T* values, int64_t stride, int64_t row) {
    const int64_t columns = arguments.columns;
    int8_t* codes = arguments.codes + row * arguments.codes_stride;
    Stored* outliers = (Stored*)arguments.outliers + row * arguments.capacity;

    const int32_t count = arguments.count();
    for (int32_t slot = 0; slot < count; slot++) from_float(to_float(values[arguments.index[slot]]), outliers[slot]);
    std::memset(outliers + count, 0, (arguments.capacity - count) * sizeof(Stored));

    const RowMaxima maxima = arguments.relative()
        ? row_maxima<MASKED, true>(values, arguments.column_slot, columns)
        : row_maxima<MASKED, false>(values, arguments.column_slot, columns);
    if (maxima.overall >= INFINITY_BITS) {
        arguments.scale[row] = NAN;
        std::memset(codes, 0, columns);
        return 0;
    }
    const float largest = as_float(maxima.inner);
    const float largest_code = float(arguments.largest_code);
    if (largest < EPSILON) {
        arguments.scale[row] = EPSILON / largest_code;
        std::memset(codes, 0, columns);
    } else {
        arguments.scale[row] = largest / largest_code;
        const float inverse = largest_code / largest;
        row_codes<MASKED>(
            values, values + stride, arguments.column_slot, columns, inverse, arguments.largest_code, codes);
    }
    if (!(arguments.scale[row] < TEACHING_LIMIT)) return 0;
    if (!arguments.relative()) return maxima.inner;
    if (well_below(maxima, columns, -*arguments.threshold)) return 0;
    return as_bits(largest * inverse_mean(values, columns, as_float(maxima.overall)));
}

// Returns the largest of what the rows that teach are compared by.
template <bool MASKED, typename T>
float quantize_rows(const QuantizeArguments& arguments, const T* x, int64_t stride, int64_t rows) {
    int32_t largest = 0;
#pragma omp parallel for num_threads(arguments.threads) schedule(static) reduction(max : largest)
    for (int64_t row = 0; row < rows; row++) {
        const int32_t row_largest = quantize_row<MASKED, T, T>(arguments, x + row * stride, stride, row);
        if (row_largest > largest && arguments.may_teach(row)) largest = row_largest;
    }
    return as_float(largest);
}

inline float quantize(const QuantizeArguments& arguments, const void* x, int type, int64_t stride, int64_t rows) {
    if (!rows) return 0;
    return with_type(type, [&](auto* element) {
        const auto* values = (decltype(element))x;
        return arguments.masked() ? quantize_rows<true>(arguments, values, stride, rows)
                                  : quantize_rows<false>(arguments, values, stride, rows);
    });
}

}  // namespace mixq
