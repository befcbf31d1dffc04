// The mixed linear over all rows and columns: cutting it into tasks, packing, threads.
#pragma once

#include <algorithm>
#include <vector>

#include "scratch.h"
#include "tile.h"

namespace mixq {

constexpr int SMALL_ROWS = 2;                // up to here weight rows are read where they lie, unpacked
constexpr int64_t PACKED_BYTES = 448 << 10;  // what a thread packs at once: about half of a level-2 cache
constexpr int64_t BLOCK_BYTES = 192 << 10;   // codes that stay in the level-2 cache beside it
constexpr int64_t LARGEST_ROWS = 1024;       // rows of one task: enough to forget the packing

// Sums of ROWS activation rows times up to 4 weight rows, along K in vectors: [ROWS, TILE_COLUMNS] in memory.
template <int BITS, int ROWS>
void dot_rows(const WeightCodes& weight, int64_t n, const int8_t* codes, int64_t stride, int32_t* sums) {
    IntVector partial[ROWS][4];
    MIXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
        MIXQ_UNROLL
        for (int c = 0; c < 4; c++) partial[r][c] = IntVector{};
    }
    const auto add_step = [&](const uint8_t* from, int64_t weight_stride, int64_t step) __attribute__((always_inline)) {
        IntVector columns[4];
        MIXQ_UNROLL
        for (int c = 0; c < 4; c++) columns[c] = load_codes<BITS>(from + c * weight_stride);
        MIXQ_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const IntVector row = load<IntVector>(codes + r * stride + step * STEP);
            MIXQ_UNROLL
            for (int c = 0; c < 4; c++) partial[r][c] = dot4(partial[r][c], columns[c], row);
        }
    };
    const int64_t rows = std::min<int64_t>(4, weight.rows - n);
    const int64_t whole = rows == 4 ? weight.row_bytes() / STEP_BYTES<BITS> : 0;
    int64_t step = 0;
    for (; step < whole; step++) add_step(weight.row(n) + step * STEP_BYTES<BITS>, weight.stride, step);
    for (; step < weight.steps(); step++) {
        const PartialStep<BITS> part(weight, n, rows, step * STEP_BYTES<BITS>);
        add_step(part.codes, STEP_BYTES<BITS>, step);
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 4; c++) sums[r * TILE_COLUMNS + c] = sum_of_lanes(partial[r][c]);
}

// How the work is cut into tasks: each is some panels times some rows, a block of rows at a time.
struct Plan {
    int64_t panels, panels_per_task, block_rows, rows_per_task, groups, splits;

    explicit Plan(const LinearArguments& arguments) {
        const int64_t padded = arguments.weight.quads() * QUAD, tasks = 4 * arguments.threads;
        panels = (arguments.weight.rows + TILE_COLUMNS - 1) / TILE_COLUMNS;
        panels_per_task = std::clamp<int64_t>(PACKED_BYTES / (padded * TILE_COLUMNS), 1, panels);
        block_rows = std::clamp<int64_t>(BLOCK_BYTES / padded, 48, 96) / TILE_ROWS * TILE_ROWS;
        groups = (panels + panels_per_task - 1) / panels_per_task;
        const int64_t blocks = (arguments.rows + block_rows - 1) / block_rows;
        const int64_t blocks_per_task = std::clamp<int64_t>(blocks * groups / tasks, 1, LARGEST_ROWS / block_rows);
        rows_per_task = blocks_per_task * block_rows;
        splits = (blocks + blocks_per_task - 1) / blocks_per_task;
        if (groups * splits < tasks) {
            panels_per_task = std::max<int64_t>(1, panels * splits / tasks);
            groups = (panels + panels_per_task - 1) / panels_per_task;
        }
    }
};

struct ThreadMemory {
    Scratch panels, codes, outliers, surplus, sums, result;
};

inline ThreadMemory& thread_memory() {
    static thread_local ThreadMemory memory;
    return memory;
}

// Rows from `first` on, with their codes zero-padded to a multiple of `alignment` where they are not.
inline RowBlock prepare_rows(
    const LinearArguments& arguments, int64_t first, int64_t rows, int64_t alignment, ThreadMemory& memory) {
    const int64_t columns = arguments.weight.columns;
    RowBlock block;
    block.first = first;
    block.codes = arguments.codes + first * arguments.codes_stride;
    block.stride = arguments.codes_stride;
    block.surplus = memory.surplus.reserve<int32_t>(rows);
    block.result = (char*)arguments.result + first * arguments.weight.rows * arguments.result_bytes();
    for (int64_t row = 0; row < rows; row++)
        block.surplus[row] = 128 * sum_of_codes(block.codes + row * block.stride, columns);
    if (columns % alignment) {
        const int64_t stride = (columns + alignment - 1) / alignment * alignment;
        int8_t* padded = memory.codes.reserve<int8_t>(rows * stride);
        for (int64_t row = 0; row < rows; row++) {
            std::memcpy(padded + row * stride, block.codes + row * block.stride, columns);
            std::memset(padded + row * stride + columns, 0, stride - columns);
        }
        block.codes = padded;
        block.stride = stride;
    }
    if (arguments.outliers_type == FLOAT32) {
        block.outliers = (const float*)arguments.outliers + first * arguments.outliers_stride;
        block.outliers_stride = arguments.outliers_stride;
        return block;
    }
    const int64_t count = arguments.count();
    float* outliers = memory.outliers.reserve<float>(rows * count);
    with_type(arguments.outliers_type, [&](auto* element) {
        const auto* from = (decltype(element))arguments.outliers + first * arguments.outliers_stride;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t slot = 0; slot < count; slot++)
                outliers[row * count + slot] = to_float(from[row * arguments.outliers_stride + slot]);
    });
    block.outliers = outliers;
    block.outliers_stride = count;
    return block;
}

// Packs scales, bias and outlier columns of the panel's rows at `memory`; returns what follows them.
inline IntVector* prepare_panel(const LinearArguments& arguments, IntVector* memory, Panel& panel) {
    const int64_t first = panel.first, rows = arguments.weight.rows;
    PanelHead* head = (PanelHead*)memory;
    FloatVector* outliers = (FloatVector*)(head + 1);
    fill_vectors(arguments.weight_scale, first, rows, head->scale);
    with_type(arguments.bias_type, [&](auto* element) {
        fill_vectors((decltype(element))arguments.bias, first, rows, head->bias);
    });
    with_type(arguments.outlier_weight_type, [&](auto* element) {
        const auto* weight = (decltype(element))arguments.outlier_weight;
        pack_outliers(weight, first, rows, arguments.outlier_weight_stride, arguments.count(), outliers);
    });
    panel.head = head;
    panel.outliers = outliers;
    return (IntVector*)(outliers + arguments.count() * TILE_VECTORS);
}

inline void few_rows(const LinearArguments& arguments) {
    const int64_t panels = (arguments.weight.rows + TILE_COLUMNS - 1) / TILE_COLUMNS;
#pragma omp parallel num_threads(arguments.threads)
    {
        ThreadMemory& memory = thread_memory();
        const RowBlock block = prepare_rows(arguments, 0, arguments.rows, STEP, memory);
        int32_t* sums = memory.sums.reserve<int32_t>(arguments.rows * TILE_COLUMNS);
        IntVector* space = memory.panels.reserve<IntVector>((2 + arguments.count()) * TILE_VECTORS);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < panels; task++) {
            Panel panel{nullptr, nullptr, nullptr, task * TILE_COLUMNS};
            prepare_panel(arguments, space, panel);
            const int64_t columns = std::min<int64_t>(TILE_COLUMNS, arguments.weight.rows - panel.first);
            for (int64_t column = 0; column < columns; column += 4) {
                for_strips<SMALL_ROWS>(arguments.rows, 0, [&](auto strip, int64_t row) {
                    constexpr int ROWS = decltype(strip)::value;
                    const auto dot = arguments.weight.bits == 4 ? dot_rows<4, ROWS> : dot_rows<8, ROWS>;
                    dot(arguments.weight, panel.first + column, block.codes + row * block.stride, block.stride,
                        sums + row * TILE_COLUMNS + column);
                });
            }
            for_strips<SMALL_ROWS>(arguments.rows, 0, [&](auto strip, int64_t row) {
                store_tile<decltype(strip)::value>(
                    arguments, block, panel, row, (const IntVector*)(sums + row * TILE_COLUMNS));
            });
        }
    }
}

inline void many_rows(const LinearArguments& arguments) {
    const Plan plan(arguments);
    const int64_t panel_vectors = arguments.panel_vectors();
#pragma omp parallel num_threads(arguments.threads)
    {
        ThreadMemory& memory = thread_memory();
        IntVector* space = memory.panels.reserve<IntVector>(plan.panels_per_task * panel_vectors);
        std::vector<Panel> panels(plan.panels_per_task);
        int64_t packed_group = -1;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < plan.groups * plan.splits; task++) {
            const int64_t group = task / plan.splits, first_panel = group * plan.panels_per_task;
            const int64_t panel_count = std::min(plan.panels_per_task, plan.panels - first_panel);
            if (group != packed_group) {
                for (int64_t number = 0; number < panel_count; number++) {
                    Panel& panel = panels[number];
                    panel.first = (first_panel + number) * TILE_COLUMNS;
                    IntVector* codes = prepare_panel(arguments, space + number * panel_vectors, panel);
                    pack_codes(arguments.weight, panel.first, codes);
                    panel.codes = codes;
                }
                packed_group = group;
            }
            const int64_t begin = (task % plan.splits) * plan.rows_per_task;
            const int64_t end = std::min(begin + plan.rows_per_task, arguments.rows);
            for (int64_t first = begin; first < end; first += plan.block_rows) {
                const int64_t rows = std::min(plan.block_rows, end - first);
                const RowBlock block = prepare_rows(arguments, first, rows, QUAD, memory);
                for (int64_t number = 0; number < panel_count; number++)
                    multiply(arguments, block, panels[number], rows);
            }
        }
    }
}

inline void mixed_linear(const LinearArguments& arguments) {
    if (!arguments.rows || !arguments.weight.rows) return;
    prefer_huge_pages(arguments.result, arguments.rows * arguments.weight.rows * arguments.result_bytes());
    arguments.rows > SMALL_ROWS ? many_rows(arguments) : few_rows(arguments);
}

}  // namespace mixq
