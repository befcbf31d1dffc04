// The C interface of the kernels, called from Python through interface.py.
//
// Types are the numbers of `Type` in numbers.h; strides count elements, and the last dimension of every
// matrix is adjacent in memory.

#include "mixed_linear.h"
#include "quantize.h"
#include "quantized_linear.h"
#include "refresh.h"
#include "weight_only.h"
#include "weight_rounding.h"

using namespace mixq;

#define MIXQ_EXPORT extern "C" __attribute__((visibility("default")))

constexpr int64_t ELEMENTS_WORTH_THREADS = 1 << 15;
constexpr int64_t PRODUCTS_WORTH_THREADS = 1 << 19;

template <typename Arguments>
static Arguments with_threads(Arguments arguments, bool worth_threads) {
    if (!worth_threads) arguments.threads = 1;
    return arguments;
}

// Quantizes x [rows, columns]; returns 1 where its rows ask for learning.
MIXQ_EXPORT int mixq_quantize(
    const QuantizeArguments& arguments, const void* x, int type, int64_t stride, int64_t rows) {
    const bool worth_threads = rows * arguments.columns >= ELEMENTS_WORTH_THREADS;
    return arguments.finish(quantize(with_threads(arguments, worth_threads), x, type, stride, rows));
}

MIXQ_EXPORT void mixq_mixed_linear(const LinearArguments& arguments) {
    const WeightCodes& weight = arguments.weight;
    mixed_linear(with_threads(arguments, arguments.rows * weight.columns * weight.rows >= PRODUCTS_WORTH_THREADS));
}

// The mixed linear with the quantization of its result; returns 1 where the result's rows ask for learning.
MIXQ_EXPORT int mixq_quantized_linear(const LinearArguments& arguments, const QuantizeArguments& quantized, int type) {
    return quantized.finish(quantized_linear(arguments, quantized, type));
}

MIXQ_EXPORT void mixq_weight_only_linear(const WeightOnlyArguments& arguments) {
    const WeightCodes& weight = arguments.weight;
    weight_only_linear(
        with_threads(arguments, arguments.rows * weight.columns * weight.rows >= PRODUCTS_WORTH_THREADS));
}

// Writes the weight that codes and scales stand for as fp32 [N, K].
MIXQ_EXPORT void mixq_expand_weight(const WeightCodes& weight, const float* scale, float* result, int threads) {
    weight.bits == 4 ? expand_weight<4>(weight, scale, result, threads)
                     : expand_weight<8>(weight, scale, result, threads);
}

MIXQ_EXPORT void mixq_refresh(const RefreshArguments& arguments) {
    with_type(arguments.outlier_weight_type, [&](auto* element) {
        refresh<std::remove_pointer_t<decltype(element)>>(arguments);
    });
}

// Rounds the rows of a weight; returns how many were left out because a value is not finite.
MIXQ_EXPORT int64_t mixq_round_weight(const WeightRoundingArguments& arguments) {
    return arguments.bits == 4 ? round_rows<4>(arguments) : round_rows<8>(arguments);
}
