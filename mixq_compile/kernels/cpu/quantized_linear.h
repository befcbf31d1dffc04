// A linear whose result is quantized for the next one at once: it never goes to memory as numbers.
#pragma once

#include "mixed_linear.h"
#include "quantize.h"

namespace mixq {

// Rows whose results stay in a cache until they are quantized. Each such block reads all packed codes
// again, which from the level-3 cache costs little beside so many products.
constexpr int64_t BLOCK_ROWS = 16 * TILE_ROWS;

using RowQuantizer = int32_t (*)(const QuantizeArguments&, const float*, int64_t, int64_t);

inline RowQuantizer row_quantizer(bool masked, int stored_type) {
    return with_type(stored_type, [&](auto* element) -> RowQuantizer {
        using Stored = std::remove_pointer_t<decltype(element)>;
        return masked ? quantize_row<true, float, Stored> : quantize_row<false, float, Stored>;
    });
}

// Returns the largest of what the result rows that teach are compared by.
inline float quantized_linear(const LinearArguments& arguments, const QuantizeArguments& quantized, int stored_type) {
    const RowQuantizer quantize_one = row_quantizer(quantized.masked(), stored_type);
    const int64_t width = arguments.weight.rows;
    const int64_t panel_count = (width + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const int64_t panel_vectors = arguments.panel_vectors();
    static thread_local Scratch packed;
    IntVector* space = packed.reserve<IntVector>(panel_count * panel_vectors);
    std::vector<Panel> panels(panel_count);
    int32_t largest = 0;
#pragma omp parallel num_threads(arguments.threads) reduction(max : largest)
    {
#pragma omp for schedule(static)
        for (int64_t number = 0; number < panel_count; number++) {
            Panel& panel = panels[number];
            panel.first = number * TILE_COLUMNS;
            IntVector* codes = prepare_panel(arguments, space + number * panel_vectors, panel);
            pack_codes(arguments.weight, panel.first, codes);
            panel.codes = codes;
        }
        ThreadMemory& memory = thread_memory();
        float* result = memory.result.reserve<float>(BLOCK_ROWS * width);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < arguments.rows; first += BLOCK_ROWS) {
            const int64_t rows = std::min(BLOCK_ROWS, arguments.rows - first);
            RowBlock block = prepare_rows(arguments, first, rows, QUAD, memory);
            block.result = result;
            for (const Panel& panel : panels) multiply(arguments, block, panel, rows);
            for (int64_t row = 0; row < rows; row++)
                largest = std::max(largest, quantize_one(quantized, result + row * width, width, first + row));
        }
    }
    return as_float(largest);
}

}  // namespace mixq
