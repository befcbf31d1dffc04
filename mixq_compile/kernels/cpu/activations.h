// Functions applied to a linear's result before it leaves the registers.
#pragma once

#include "vectors.h"

namespace mixq {

enum Activation { NONE = 0, RELU = 1, GELU = 2 };

MIXQ_INLINE FloatVector smaller(FloatVector a, FloatVector b) { return a < b ? a : b; }
MIXQ_INLINE FloatVector larger(FloatVector a, FloatVector b) { return a > b ? a : b; }

// x * (1 + erf(x / sqrt(2))) / 2. The normal distribution less a half is x times a polynomial in x * x,
// fitted to within 2e-7 on [-5.5, 5.5]; beyond, it is as good as constant.
MIXQ_INLINE FloatVector gelu(FloatVector x) {
    constexpr float LIMIT = 5.5f;
    constexpr float COEFFICIENTS[] = {
        5.140368012e-04f,  -1.357238390e-03f, 1.102342736e-03f,  -1.264312887e-03f, 4.136267584e-03f,
        -7.634507027e-03f, 1.053150278e-02f,  -1.469336171e-02f, 2.026787028e-02f,  -2.610667050e-02f,
        3.208477423e-02f,  -3.878791258e-02f, 4.773681983e-02f,  -6.417245418e-02f, 1.285519451e-01f};
    const FloatVector bounded = larger(smaller(x, splat(LIMIT)), splat(-LIMIT));
    const FloatVector place = multiply_add(bounded, bounded * (2 / (LIMIT * LIMIT)), splat(-1.0f));
    FloatVector value = splat(COEFFICIENTS[0]);
    MIXQ_UNROLL
    for (int degree = 1; degree < 15; degree++) value = multiply_add(value, place, splat(COEFFICIENTS[degree]));
    return x * multiply_add(bounded, value, splat(0.5f));
}

}  // namespace mixq
