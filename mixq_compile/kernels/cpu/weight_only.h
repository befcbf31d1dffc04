// Products of floating-point rows with integer weights, for few rows; and weights back to float32.
#pragma once

#include <algorithm>

#include "scratch.h"
#include "tile.h"

namespace mixq {

// One weight-only linear; `WeightOnlyArguments` in interface.py has the same fields.
struct WeightOnlyArguments {
    const void* x;              // [M, K]
    WeightCodes weight;         // [N, K]
    const float* weight_scale;  // [N]
    const void* bias;           // [N] or null
    void* result;               // [M, N]
    int64_t rows, x_stride;
    int32_t type, bias_type, threads;
};

// STEP codes as LANES floats each.
template <int BITS>
MIXQ_INLINE void load_weights(const uint8_t* from, FloatVector (&weights)[4]) {
    ByteVector parts[4];
    if constexpr (BITS == 8) {
        std::memcpy(parts, from, sizeof(parts));
    } else {
        const IntVector codes = load_codes<BITS>(from) ^ int32_t(0x80808080);
        std::memcpy(parts, &codes, sizeof(parts));
    }
    MIXQ_UNROLL
    for (int part = 0; part < 4; part++) weights[part] = __builtin_convertvector(widen(parts[part]), FloatVector);
}

// ROWS rows of x times up to 2 weight rows, along K in vectors.
template <int BITS, int ROWS>
void weight_only_rows(const WeightCodes& weight, int64_t n, const float* x, int64_t stride, float (*sums)[2]) {
    FloatVector partial[ROWS][2];
    MIXQ_UNROLL
    for (int r = 0; r < ROWS; r++) partial[r][0] = partial[r][1] = FloatVector{};
    const auto add_step = [&](const uint8_t* from, int64_t weight_stride, int64_t step) __attribute__((always_inline)) {
        FloatVector weights[2][4];
        MIXQ_UNROLL
        for (int c = 0; c < 2; c++) load_weights<BITS>(from + c * weight_stride, weights[c]);
        MIXQ_UNROLL
        for (int part = 0; part < 4; part++) {
            MIXQ_UNROLL
            for (int r = 0; r < ROWS; r++) {
                const FloatVector values = load_floats(x + r * stride + step * STEP + part * LANES);
                MIXQ_UNROLL
                for (int c = 0; c < 2; c++) partial[r][c] = multiply_add(values, weights[c][part], partial[r][c]);
            }
        }
    };
    const int64_t rows = std::min<int64_t>(2, weight.rows - n);
    const int64_t whole = rows == 2 ? weight.row_bytes() / STEP_BYTES<BITS> : 0;
    int64_t step = 0;
    for (; step < whole; step++) add_step(weight.row(n) + step * STEP_BYTES<BITS>, weight.stride, step);
    for (; step < weight.steps(); step++) {
        const PartialStep<BITS> part(weight, n, rows, step * STEP_BYTES<BITS>);
        add_step(part.codes, STEP_BYTES<BITS>, step);
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 2; c++) sums[r][c] = sum_of_lanes(partial[r][c]);
}

inline void weight_only_linear(const WeightOnlyArguments& arguments) {
    const int64_t columns = arguments.weight.columns, stride = arguments.weight.steps() * STEP;
    const int64_t width = arguments.weight.rows;
#pragma omp parallel num_threads(arguments.threads)
    {
        static thread_local Scratch memory;
        float* x = memory.reserve<float>(arguments.rows * stride);
        with_type(arguments.type, [&](auto* element) {
            const auto* from = (decltype(element))arguments.x;
            for (int64_t row = 0; row < arguments.rows; row++) {
                for (int64_t column = 0; column < stride; column++)
                    x[row * stride + column] = column < columns ? to_float(from[row * arguments.x_stride + column]) : 0;
            }
        });
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < (width + 1) / 2; pair++) {
            for_strips<4>(arguments.rows, 0, [&](auto strip, int64_t row) {
                constexpr int ROWS = decltype(strip)::value;
                const auto multiply_rows =
                    arguments.weight.bits == 4 ? weight_only_rows<4, ROWS> : weight_only_rows<8, ROWS>;
                float sums[ROWS][2];
                multiply_rows(arguments.weight, 2 * pair, x + row * stride, stride, sums);
                for (int64_t n = 2 * pair; n < std::min(2 * pair + 2, width); n++) {
                    float bias = 0;
                    if (arguments.bias) {
                        with_type(arguments.bias_type, [&](auto* element) {
                            bias = to_float(((decltype(element))arguments.bias)[n]);
                        });
                    }
                    with_type(arguments.type, [&](auto* element) {
                        auto* result = (decltype(element))arguments.result + row * width + n;
                        for (int r = 0; r < ROWS; r++)
                            from_float(sums[r][n % 2] * arguments.weight_scale[n] + bias, result[r * width]);
                    });
                }
            });
        }
    }
}

// Writes codes * scale of all weight rows as fp32 [N, K].
template <int BITS>
void expand_weight(const WeightCodes& weight, const float* scale, float* result, int threads) {
    const int64_t whole = weight.row_bytes() / STEP_BYTES<BITS>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < weight.rows; n++) {
        float* to = result + n * weight.columns;
        FloatVector weights[4];
        for (int64_t step = 0; step < whole; step++, to += STEP) {
            load_weights<BITS>(weight.row(n) + step * STEP_BYTES<BITS>, weights);
            for (int part = 0; part < 4; part++) store(to + part * LANES, weights[part] * scale[n]);
        }
        if (whole < weight.steps()) {
            const PartialStep<BITS> part(weight, n, 1, whole * STEP_BYTES<BITS>);
            load_weights<BITS>(part.codes, weights);
            for (int each = 0; each < 4; each++) weights[each] *= scale[n];
            std::memcpy(to, weights, (weight.columns - whole * STEP) * sizeof(float));
        }
    }
}

}  // namespace mixq
