// Whole quantized linears of LANES elements a cycle, one dot product wide, in which every stage beside the
// main dot product has LANES lanes too. Memories are outside: weights, scales, and what is buffered between
// two stages that do not run at the same pace enter and leave by ports. GROWTH is log2 of the cycles of a sum.

// fp16 to integers of N bits, one scale for all lanes.
module quantize_lanes #(
    parameter LANES = 16,
    parameter N = 8
) (
    input [LANES*16-1:0] x,
    input [15:0] inverse_scale,
    output [LANES*N-1:0] codes
);
    genvar i;
    generate
        for (i = 0; i < LANES; i = i + 1) begin : lane
            quant #(.N(N)) cast (
                .x(x[i*16 +: 16]), .inverse_scale(inverse_scale), .q(codes[i*N +: N])
            );
        end
    endgenerate
endmodule

// Activations quantized, stored codes of weights, sums cast to fp16 and scaled: w8a8.
module integer_linear #(
    parameter LANES = 16,
    parameter N = 8,
    parameter M = 8,
    parameter GROWTH = 8,
    parameter TOTAL = N + M + $clog2(LANES) + GROWTH
) (
    input clock,
    input first,
    input [LANES*16-1:0] x,
    input [15:0] x_inverse_scale,
    input [LANES*N-1:0] w,
    input [LANES*TOTAL-1:0] buffered,
    input [LANES*16-1:0] scales,
    output [TOTAL-1:0] sum,
    output [LANES*16-1:0] y
);
    wire [LANES*M-1:0] codes;
    quantize_lanes #(.LANES(LANES), .N(M)) quantize (
        .x(x), .inverse_scale(x_inverse_scale), .codes(codes)
    );
    fixed_dot #(.LANES(LANES), .N(N), .M(M), .GROWTH(GROWTH)) main (
        .clock(clock), .first(first), .w(w), .x(codes), .sum(sum)
    );
    genvar i;
    generate
        for (i = 0; i < LANES; i = i + 1) begin : lane
            wire [15:0] number;
            int_to_fp16 #(.N(TOTAL)) cast (.x(buffered[i*TOTAL +: TOTAL]), .y(number));
            fp16_mul multiplier (.a(number), .b(scales[i*16 +: 16]), .y(y[i*16 +: 16]));
        end
    endgenerate
endmodule

// Outliers in fp16 beside integers. Activations of at least `threshold` are scattered to the dot product in
// fp16, the others are quantized; both sums are gathered. CASTS_WEIGHT: weights arrive in fp16 and are
// quantized as they pass (llm_int8, llm_int4), else as codes, with fp16 for the outliers' columns (mixq).
module mixed_linear #(
    parameter LANES = 16,
    parameter N = 8,
    parameter M = 8,
    parameter GROWTH = 8,
    parameter CASTS_WEIGHT = 1,
    parameter TOTAL = N + M + $clog2(LANES) + GROWTH
) (
    input clock,
    input first,
    input [LANES*16-1:0] x,
    input [15:0] threshold,
    input [15:0] x_inverse_scale,
    input [LANES*16-1:0] w_high,
    input [LANES*N-1:0] w_codes,
    input [15:0] w_inverse_scale,
    input [LANES*TOTAL-1:0] buffered,
    input [LANES*16-1:0] buffered_high,
    input [LANES*16-1:0] scales,
    output [LANES-1:0] is_high,
    output [TOTAL-1:0] sum,
    output [15:0] high_sum,
    output [LANES*16-1:0] y
);
    wire [LANES*16-1:0] high;
    wire [LANES*16-1:0] low;
    wire [LANES*M-1:0] x_codes;
    wire [LANES*N-1:0] codes;
    quantize_lanes #(.LANES(LANES), .N(M)) quantize_x (
        .x(low), .inverse_scale(x_inverse_scale), .codes(x_codes)
    );
    genvar i;
    generate
        if (CASTS_WEIGHT) begin : cast_weight
            quantize_lanes #(.LANES(LANES), .N(N)) quantize_w (
                .x(w_high), .inverse_scale(w_inverse_scale), .codes(codes)
            );
        end else begin : stored_weight
            assign codes = w_codes;
        end
        for (i = 0; i < LANES; i = i + 1) begin : lane
            compare_demux scatter (
                .x(x[i*16 +: 16]), .threshold(threshold), .is_high(is_high[i]),
                .high(high[i*16 +: 16]), .low(low[i*16 +: 16])
            );
            gather #(.N(TOTAL)) merge (
                .x(buffered[i*TOTAL +: TOTAL]), .scale(scales[i*16 +: 16]),
                .y(buffered_high[i*16 +: 16]), .out(y[i*16 +: 16])
            );
        end
    endgenerate
    fixed_dot #(.LANES(LANES), .N(N), .M(M), .GROWTH(GROWTH)) main (
        .clock(clock), .first(first), .w(codes), .x(x_codes), .sum(sum)
    );
    float_dot #(.LANES(LANES)) high_precision (
        .clock(clock), .first(first), .w(w_high), .x(high), .sum(high_sum)
    );
endmodule

// Codes of weights, dequantized before a dot product in fp16: awq, gptq. The group's scale and zero point are
// registered.
module weight_only_linear #(
    parameter LANES = 16,
    parameter N = 4,
    parameter ASYMMETRIC = 1
) (
    input clock,
    input first,
    input [LANES*16-1:0] x,
    input [LANES*N-1:0] w,
    input [N-1:0] zero,
    input [15:0] scale,
    output [15:0] sum
);
    wire [15:0] scale_held;
    wire [N-1:0] zero_held;
    wire [LANES*16-1:0] values;
    register #(.N(16)) scale_state (.clock(clock), .d(scale), .q(scale_held));
    genvar i;
    generate
        if (ASYMMETRIC) begin : with_zero
            register #(.N(N)) zero_state (.clock(clock), .d(zero), .q(zero_held));
        end else begin : without_zero
            assign zero_held = 0;
        end
        for (i = 0; i < LANES; i = i + 1) begin : lane
            dequant #(.N(N), .ASYMMETRIC(ASYMMETRIC)) cast (
                .q(w[i*N +: N]), .zero(zero_held), .scale(scale_held), .y(values[i*16 +: 16])
            );
        end
    endgenerate
    float_dot #(.LANES(LANES)) main (.clock(clock), .first(first), .w(values), .x(x), .sum(sum));
endmodule

// x·W + (x·A)·B in fixed point: W of N bits, x, A and B of M bits (lqer_int8, lqer_int4). x·A is rounded to M
// bits, ties upwards, from bit SHIFT on; scales are such that it fits. Then it comes back as `xa`, LANES
// elements of rank at a time. SHIFT is also how much finer the sum of low rank is than the main one.
module low_rank_linear #(
    parameter LANES = 16,
    parameter N = 4,
    parameter M = 16,
    parameter GROWTH = 8,
    parameter RANK_GROWTH = 2,
    parameter SHIFT = 8,
    parameter MAIN = N + M + $clog2(LANES) + GROWTH,
    parameter LEFT = 2 * M + $clog2(LANES) + GROWTH,
    parameter RIGHT = 2 * M + $clog2(LANES) + RANK_GROWTH,
    parameter OUT = (MAIN > RIGHT) ? MAIN : RIGHT
) (
    input clock,
    input first,
    input [LANES*M-1:0] x,
    input [LANES*N-1:0] w,
    input [LANES*M-1:0] a,
    input [LANES*LEFT-1:0] buffered,
    input [LANES*M-1:0] xa,
    input [LANES*M-1:0] b,
    output [LEFT-1:0] left,
    output [LANES*M-1:0] rounded,
    output [OUT-1:0] y
);
    wire signed [MAIN-1:0] main_sum;
    wire signed [RIGHT-1:0] right_sum;
    wire signed [OUT-1:0] main_wide = main_sum;
    wire signed [OUT-1:0] right_wide = right_sum >>> SHIFT;
    fixed_dot #(.LANES(LANES), .N(N), .M(M), .GROWTH(GROWTH)) main (
        .clock(clock), .first(first), .w(w), .x(x), .sum(main_sum)
    );
    fixed_dot #(.LANES(LANES), .N(M), .M(M), .GROWTH(GROWTH)) low_rank_a (
        .clock(clock), .first(first), .w(a), .x(x), .sum(left)
    );
    genvar i;
    generate
        for (i = 0; i < LANES; i = i + 1) begin : lane
            add #(.N(M)) round (
                .a(buffered[i*LEFT+SHIFT +: M]), .b({{(M-1){1'b0}}, buffered[i*LEFT+SHIFT-1]}),
                .y(rounded[i*M +: M])
            );
        end
    endgenerate
    fixed_dot #(.LANES(LANES), .N(M), .M(M), .GROWTH(RANK_GROWTH)) low_rank_b (
        .clock(clock), .first(first), .w(b), .x(xa), .sum(right_sum)
    );
    add #(.N(OUT)) merge (.a(main_wide), .b(right_wide), .y(y));
endmodule

// x·W + (x·A)·B in MXINT: W of N bits, x, A and B of M bits, blocks of LANES elements (lqer_mxint4,
// lqer_mxint2). x arrives in fp16 and is cast; x·A becomes fp16, and comes back as `xa`, a block at a time.
// `takes_low_rank` chooses which of both sums enters the output's accumulator.
module low_rank_mxint_linear #(
    parameter LANES = 16,
    parameter N = 4,
    parameter M = 8,
    parameter GROWTH = 8,
    parameter RANK_GROWTH = 2,
    parameter MAIN = N + M + $clog2(LANES) + GROWTH,
    parameter LEFT = 2 * M + $clog2(LANES) + GROWTH,
    parameter RIGHT = 2 * M + $clog2(LANES) + RANK_GROWTH,
    parameter OUT = (MAIN > RIGHT) ? MAIN : RIGHT
) (
    input clock,
    input first,
    input takes_low_rank,
    input [LANES*16-1:0] x,
    input [LANES*N-1:0] w,
    input [7:0] w_exponent,
    input [LANES*M-1:0] a,
    input [7:0] a_exponent,
    input [LANES*16-1:0] xa,
    input [LANES*M-1:0] b,
    input [7:0] b_exponent,
    output [15:0] left,
    output [OUT-1:0] y,
    output [8:0] y_exponent
);
    wire [4:0] x_exponent;
    wire [4:0] xa_exponent;
    wire [LANES*M-1:0] x_block;
    wire [LANES*M-1:0] xa_block;
    wire signed [MAIN-1:0] main_sum;
    wire [LEFT-1:0] left_sum;
    wire signed [RIGHT-1:0] right_sum;
    wire [8:0] main_exponent;
    wire [8:0] left_exponent;
    wire [8:0] right_exponent;
    wire signed [OUT-1:0] main_wide = main_sum;
    wire signed [OUT-1:0] right_wide = right_sum;
    mxint_cast #(.N(M), .LANES(LANES)) cast_x (.x(x), .exponent(x_exponent), .mantissas(x_block));
    mxint_dot #(.LANES(LANES), .N(N), .M(M), .GROWTH(GROWTH)) main (
        .clock(clock), .first(first), .w(w), .w_exponent(w_exponent), .x(x_block),
        .x_exponent({3'b000, x_exponent}), .sum(main_sum), .sum_exponent(main_exponent)
    );
    mxint_dot #(.LANES(LANES), .N(M), .M(M), .GROWTH(GROWTH)) low_rank_a (
        .clock(clock), .first(first), .w(a), .w_exponent(a_exponent), .x(x_block),
        .x_exponent({3'b000, x_exponent}), .sum(left_sum), .sum_exponent(left_exponent)
    );
    mxint_to_fp16 #(.N(LEFT)) cast_left (.x(left_sum), .exponent(left_exponent), .y(left));
    mxint_cast #(.N(M), .LANES(LANES)) cast_xa (.x(xa), .exponent(xa_exponent), .mantissas(xa_block));
    mxint_dot #(.LANES(LANES), .N(M), .M(M), .GROWTH(RANK_GROWTH)) low_rank_b (
        .clock(clock), .first(first), .w(b), .w_exponent(b_exponent), .x(xa_block),
        .x_exponent({3'b000, xa_exponent}), .sum(right_sum), .sum_exponent(right_exponent)
    );
    mxint_accumulate #(.W(OUT), .GROWTH(0), .E(9)) merge (
        .clock(clock), .first(first), .x(takes_low_rank ? right_wide : main_wide),
        .exponent(takes_low_rank ? right_exponent : main_exponent), .sum(y), .sum_exponent(y_exponent)
    );
endmodule
