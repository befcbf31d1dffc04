// Weight codes rearranged for dot4: four consecutive codes of one row in a lane, rows along the lanes.
//
// Packed codes are code + 128, unsigned: dot4 wants one unsigned operand, and the activation's codes
// stay as they are in memory. The surplus, 128 * (sum of the activation row), is taken off at the end.
#pragma once

#include "numbers.h"

namespace mixq {

constexpr int64_t QUAD = 4;
constexpr int64_t STEP = 4 * LANES;  // codes in one vector

struct WeightCodes {
    const uint8_t* codes;  // [N, K] int8, or [N, ceil(K/2)] with two 4-bit codes a byte
    int64_t rows, columns, stride, bits;

    const uint8_t* row(int64_t n) const { return codes + n * stride; }
    int64_t row_bytes() const { return (columns * bits + 7) / 8; }
    int64_t quads() const { return (columns + QUAD - 1) / QUAD; }
    int64_t steps() const { return (columns + STEP - 1) / STEP; }
};

template <int BITS>
constexpr int64_t STEP_BYTES = STEP * BITS / 8;

// STEP codes + 128.
template <int BITS>
MIXQ_INLINE IntVector load_codes(const uint8_t* from) {
    if constexpr (BITS == 8) {
        return load<IntVector>(from) ^ int32_t(0x80808080);
    } else {
        const WideVector wide = __builtin_convertvector(load<PackedVector>(from), WideVector);
        const WideVector nibbles = (wide & 0x0f) | ((wide & 0xf0) << 4);
        // A two's complement nibble plus 128 is (nibble ^ 8) + 120.
        return (IntVector)((nibbles ^ 0x0808) + 0x7878);
    }
}

// Codes of up to LANES rows that end before a whole step, or rows that are missing: zero there.
template <int BITS>
struct PartialStep {
    uint8_t codes[LANES * STEP_BYTES<BITS>] = {};

    __attribute__((noinline)) PartialStep(const WeightCodes& weight, int64_t first, int64_t rows, int64_t byte) {
        const int64_t rest = weight.row_bytes() - byte;
        for (int64_t row = 0; row < rows; row++)
            std::memcpy(
                codes + row * STEP_BYTES<BITS>, weight.row(first + row) + byte,
                rest < STEP_BYTES<BITS> ? rest : STEP_BYTES<BITS>);
    }
};

// Packs a step of LANES rows.
template <int BITS>
MIXQ_INLINE void pack_step(const uint8_t* codes, int64_t stride, IntVector* panel) {
    IntVector block[LANES];
    MIXQ_UNROLL
    for (int lane = 0; lane < LANES; lane++) block[lane] = load_codes<BITS>(codes + lane * stride);
    transpose(block);
    MIXQ_UNROLL
    for (int lane = 0; lane < LANES; lane++) panel[lane * TILE_VECTORS] = block[lane];
}

// Packs TILE_COLUMNS weight rows from `first` on as [steps * LANES][TILE_COLUMNS] lanes.
template <int BITS>
void pack_codes(const WeightCodes& weight, int64_t first, IntVector* panel) {
    for (int vector = 0; vector < TILE_VECTORS; vector++, first += LANES) {
        const int64_t left = weight.rows - first, rows = left < 0 ? 0 : left < LANES ? left : LANES;
        const int64_t whole = rows == LANES ? weight.row_bytes() / STEP_BYTES<BITS> : 0;
        IntVector* to = panel + vector;
        for (int64_t step = 0; step < weight.steps(); step++, to += LANES * TILE_VECTORS) {
            const int64_t byte = step * STEP_BYTES<BITS>;
            if (step < whole) {
                pack_step<BITS>(weight.row(first) + byte, weight.stride, to);
            } else {
                pack_step<BITS>(PartialStep<BITS>(weight, first, rows, byte).codes, STEP_BYTES<BITS>, to);
            }
        }
    }
}

inline void pack_codes(const WeightCodes& weight, int64_t first, IntVector* panel) {
    weight.bits == 4 ? pack_codes<4>(weight, first, panel) : pack_codes<8>(weight, first, panel);
}

// What the end of a tile needs of its TILE_COLUMNS weight rows, followed by [count] outlier columns.
struct PanelHead {
    FloatVector scale[TILE_VECTORS];
    FloatVector bias[TILE_VECTORS];
};

template <typename T>
void fill_vectors(const T* from, int64_t first, int64_t rows, FloatVector* to) {
    for (int vector = 0; vector < TILE_VECTORS; vector++) {
        const int64_t at = first + vector * LANES, rest = from ? rows - at : 0;
        to[vector] = rest >= LANES ? load_floats(from + at)
                     : rest > 0    ? load_floats(from + at, rest)
                                   : FloatVector{};
    }
}

// Packs outlier weights [N, C] as [count][TILE_COLUMNS] fp32.
template <typename T>
__attribute__((noinline)) void pack_outliers(
    const T* weight, int64_t first, int64_t rows, int64_t stride, int64_t count, FloatVector* panel) {
    for (int vector = 0; vector < TILE_VECTORS; vector++) {
        for (int64_t slot = 0; slot < count; slot += LANES) {
            const int64_t rest = count - slot;
            FloatVector block[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                const int64_t n = first + vector * LANES + lane;
                const T* from = weight + n * stride + slot;
                block[lane] = n >= rows      ? FloatVector{}
                              : rest < LANES ? load_floats(from, rest)
                                             : load_floats(from);
            }
            transpose(block);
            FloatVector* to = panel + slot * TILE_VECTORS + vector;
            for (int lane = 0; lane < LANES && lane < rest; lane++) to[lane * TILE_VECTORS] = block[lane];
        }
    }
}

}  // namespace mixq
