// Outlier columns of a weight: fetched into a linear's cache where it does not hold them yet.
#pragma once

#include "packing.h"

namespace mixq {

constexpr int64_t ZEROED_BLOCK = 64;  // slots from the count on are zero up to a multiple of this

// The cache of one linear; `RefreshArguments` in interface.py has the same fields.
struct RefreshArguments {
    const int32_t* index;     // [C]
    const int32_t* counters;  // the first is the number of slots in use
    int32_t* cached_index;    // [C], -1 where empty
    void* outlier_weight;     // [N, C]
    WeightCodes weight;       // [N, K]
    const float* scale;       // [N]
    const void* original;     // [N, K] or null: then codes * scale stand for it
    int64_t capacity, outlier_weight_stride, original_row_stride, original_column_stride;
    int32_t outlier_weight_type, original_type;
};

inline int32_t code_at(const WeightCodes& weight, int64_t row, int64_t column) {
    const uint8_t* codes = weight.row(row);
    if (weight.bits == 8) return int8_t(codes[column]);
    const int32_t nibble = column % 2 ? codes[column / 2] >> 4 : codes[column / 2] & 15;
    return (nibble ^ 8) - 8;
}

template <typename T>
void fetch_column(const RefreshArguments& arguments, int64_t slot, int64_t column) {
    T* to = (T*)arguments.outlier_weight + slot;
    for (int64_t row = 0; row < arguments.weight.rows; row++, to += arguments.outlier_weight_stride) {
        if (!arguments.original) {
            from_float(float(code_at(arguments.weight, row, column)) * arguments.scale[row], *to);
            continue;
        }
        with_type(arguments.original_type, [&](auto* element) {
            const auto* from = (decltype(element))arguments.original;
            from_float(
                to_float(from[row * arguments.original_row_stride + column * arguments.original_column_stride]), *to);
        });
    }
}

template <typename T>
void refresh(const RefreshArguments& arguments) {
    const int64_t count = *arguments.counters;
    for (int64_t slot = 0; slot < count; slot++) {
        if (arguments.cached_index[slot] == arguments.index[slot]) continue;
        fetch_column<T>(arguments, slot, arguments.index[slot]);
        arguments.cached_index[slot] = arguments.index[slot];
    }
    const int64_t rounded = (count + ZEROED_BLOCK - 1) / ZEROED_BLOCK * ZEROED_BLOCK;
    const int64_t end = rounded < arguments.capacity ? rounded : arguments.capacity;
    bool stale = false;
    for (int64_t slot = count; slot < end; slot++) stale |= arguments.cached_index[slot] >= 0;
    if (!stale) return;
    for (int64_t row = 0; row < arguments.weight.rows; row++) {
        T* to = (T*)arguments.outlier_weight + row * arguments.outlier_weight_stride;
        std::memset(to + count, 0, (end - count) * sizeof(T));
    }
    for (int64_t slot = count; slot < end; slot++) arguments.cached_index[slot] = -1;
}

}  // namespace mixq
