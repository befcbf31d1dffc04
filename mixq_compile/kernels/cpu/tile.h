// The integer product with everything that follows it: scales, outlier columns, bias, rounding.
//
// Sums of integers are exact, and what follows is the same arithmetic in the same order for every
// M, thread count and tile, so that a row's result depends on that row alone.
#pragma once

#include <type_traits>

#include "activations.h"
#include "packing.h"

namespace mixq {

// One mixed linear; `LinearArguments` in interface.py has the same fields.
struct LinearArguments {
    const int8_t* codes;         // [M, K]
    const float* scale;          // [M]
    const void* outliers;        // [M, C]
    const int32_t* counters;     // the first is the number of outlier columns in use; null for none
    WeightCodes weight;          // [N, K]
    const float* weight_scale;   // [N]
    const void* outlier_weight;  // [N, C]
    const void* bias;            // [N] or null
    void* result;                // [M, N]
    int64_t rows, codes_stride, outliers_stride, outlier_weight_stride;
    int32_t outliers_type, outlier_weight_type, bias_type, result_type, activation, threads;

    int64_t count() const { return counters ? *counters : 0; }

    // Vectors of one panel: its head, its outlier columns, its codes.
    int64_t panel_vectors() const { return (2 + count() + weight.steps() * LANES) * TILE_VECTORS; }

    int64_t result_bytes() const { return result_type == FLOAT32 || result_type == INT32 ? 4 : 2; }
};

// Rows of one task: where their codes are, and what the end of a tile needs of them.
struct RowBlock {
    const int8_t* codes;
    int64_t stride;
    int64_t first;            // row number in the whole
    const float* outliers;    // [rows, outliers_stride] fp32
    int64_t outliers_stride;
    int32_t* surplus;         // [rows]: 128 * sum of the codes, what packed codes add to every sum
    void* result;             // [rows, N]
};

struct Panel {
    const IntVector* codes;  // [quads][TILE_VECTORS]
    const PanelHead* head;
    const FloatVector* outliers;  // [count][TILE_VECTORS]
    int64_t first;                // column number of the result
};

MIXQ_INLINE int32_t sum_of_codes(const int8_t* codes, int64_t columns) {
    IntVector total{};
    int64_t column = 0;
    for (; column + STEP <= columns; column += STEP)
        total = dot4(total, splat(0x01010101), load<IntVector>(codes + column));
    const IntVector rest = load_part<IntVector>(codes + column, columns - column);
    total = dot4(total, splat(0x01010101), rest);
    return sum_of_lanes(total);
}

template <typename T>
MIXQ_INLINE void store_columns(T* to, FloatVector values, int64_t columns) {
    if (columns >= LANES) {
        store_floats(to, values);
    } else if (columns > 0) {
        store_floats(to, values, columns);
    }
}

// Turns the integer sums [ROWS][TILE_VECTORS] of one tile into results.
template <int ROWS>
__attribute__((noinline)) void finish_tile(
    const LinearArguments& arguments, const RowBlock& block, const Panel& panel, int64_t row, const IntVector* sums) {
    const int64_t stride = arguments.weight.rows;
    FloatVector values[ROWS][TILE_VECTORS];
    MIXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
        const float scale = arguments.scale[block.first + row + r];
        MIXQ_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++) {
            const IntVector exact = sums[r * TILE_VECTORS + v] - block.surplus[row + r];
            values[r][v] = __builtin_convertvector(exact, FloatVector) * scale * panel.head->scale[v];
        }
    }
    const float* outliers = block.outliers + row * block.outliers_stride;
    const int64_t count = arguments.count();
    for (int64_t slot = 0; slot < count; slot++) {
        const FloatVector* weight = panel.outliers + slot * TILE_VECTORS;
        MIXQ_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const FloatVector outlier = splat(outliers[r * block.outliers_stride + slot]);
            MIXQ_UNROLL
            for (int v = 0; v < TILE_VECTORS; v++) values[r][v] = multiply_add(outlier, weight[v], values[r][v]);
        }
    }
    MIXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
        MIXQ_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++) values[r][v] += panel.head->bias[v];
    }
    if (arguments.activation == GELU) {
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < TILE_VECTORS; v++) values[r][v] = gelu(values[r][v]);
    } else if (arguments.activation == RELU) {
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < TILE_VECTORS; v++) values[r][v] = larger(splat(0.0f), values[r][v]);
    }
    with_type(arguments.result_type, [&](auto* element) {
        auto* result = (decltype(element))block.result + row * stride + panel.first;
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < TILE_VECTORS; v++)
                store_columns(result + r * stride + v * LANES, values[r][v], stride - panel.first - v * LANES);
    });
}

// The integer sums of one tile as they are.
inline void store_sums(
    const LinearArguments& arguments, const RowBlock& block, const Panel& panel, int64_t row, int rows,
    const IntVector* sums) {
    const int64_t stride = arguments.weight.rows;
    float* result = (float*)block.result + row * stride + panel.first;
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < TILE_VECTORS; v++) {
            const IntVector exact = sums[r * TILE_VECTORS + v] - block.surplus[row + r];
            store_columns(result + r * stride + v * LANES, (FloatVector)exact, stride - panel.first - v * LANES);
        }
    }
}

template <int ROWS>
MIXQ_INLINE void store_tile(
    const LinearArguments& arguments, const RowBlock& block, const Panel& panel, int64_t row, const IntVector* sums) {
    if (arguments.result_type == INT32) {
        store_sums(arguments, block, panel, row, ROWS, sums);
    } else {
        finish_tile<ROWS>(arguments, block, panel, row, sums);
    }
}

// One tile: ROWS rows times the panel's TILE_COLUMNS columns, all of K, in registers.
template <int ROWS>
__attribute__((noinline)) void tile(
    const LinearArguments& arguments, const RowBlock& block, const Panel& panel, int64_t row) {
    constexpr int LINE = 64;
    const int64_t quads = arguments.weight.quads();
    const int64_t element = arguments.result_bytes();
    const char* result = (char*)block.result + (row * arguments.weight.rows + panel.first) * element;
    const int8_t* codes = block.codes + row * block.stride;
    const IntVector* weight = panel.codes;
    IntVector sums[ROWS][TILE_VECTORS];
    MIXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
        MIXQ_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++) sums[r][v] = IntVector{};
    }
    int64_t quad = 0;
    for (int part = 0; part < ROWS; part++) {
        // The result's cache lines arrive while the sums are formed; all at once they would hold up the loads.
        for (int64_t byte = 0; byte < TILE_COLUMNS * element; byte += LINE)
            __builtin_prefetch(result + part * arguments.weight.rows * element + byte, 1);
        for (const int64_t end = quads * (part + 1) / ROWS; quad < end; quad++) {
            IntVector columns[TILE_VECTORS];
            MIXQ_UNROLL
            for (int v = 0; v < TILE_VECTORS; v++) columns[v] = weight[quad * TILE_VECTORS + v];
            MIXQ_UNROLL
            for (int r = 0; r < ROWS; r++) {
                int32_t four;
                std::memcpy(&four, codes + r * block.stride + quad * QUAD, 4);
                const IntVector repeated = splat(four);
                MIXQ_UNROLL
                for (int v = 0; v < TILE_VECTORS; v++) sums[r][v] = dot4(sums[r][v], columns[v], repeated);
            }
        }
    }
    IntVector stored[ROWS * TILE_VECTORS];
    std::memcpy(stored, sums, sizeof(sums));
    store_tile<ROWS>(arguments, block, panel, row, stored);
}

// Calls `function` with the integral constant ROWS and a row for each strip of ROWS rows, and once
// with what is left.
template <int ROWS, typename Function>
MIXQ_INLINE void for_strips(int64_t rows, int64_t row, Function function) {
    for (; row + ROWS <= rows; row += ROWS) function(std::integral_constant<int, ROWS>(), row);
    if constexpr (ROWS > 1) {
        if (row < rows) for_strips<ROWS - 1>(rows, row, function);
    }
}

inline void multiply(const LinearArguments& arguments, const RowBlock& block, const Panel& panel, int64_t rows) {
    for_strips<TILE_ROWS>(rows, 0, [&](auto strip, int64_t row) {
        tile<decltype(strip)::value>(arguments, block, panel, row);
    });
}

}  // namespace mixq
