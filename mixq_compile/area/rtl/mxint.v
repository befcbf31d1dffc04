// MXINT: blocks of signed mantissas with one exponent for the block; an element is mantissa * 2 ** exponent
// up to a constant that depends on the mantissas' width only.

// Larger of two exponents and, recursively, the largest of L.
module max_tree #(
    parameter L = 16,
    parameter W = 5
) (
    input [L*W-1:0] x,
    output [W-1:0] y
);
    localparam LEFT = (L + 1) / 2;
    localparam RIGHT = L - LEFT;
    generate
        if (L == 1) begin : leaf
            assign y = x;
        end else begin : node
            wire [W-1:0] left;
            wire [W-1:0] right;
            max_tree #(.L(LEFT), .W(W)) lower (.x(x[LEFT*W-1:0]), .y(left));
            max_tree #(.L(RIGHT), .W(W)) upper (.x(x[L*W-1:LEFT*W]), .y(right));
            assign y = (left > right) ? left : right;
        end
    endgenerate
endmodule

// fp16 to a signed mantissa of N bits (2 to 11) under a given biased exponent, which is at least x's:
// x = mantissa * 2 ** (shared - 15 - (N - 2)). The magnitude is rounded to nearest, ties away from zero,
// and saturates at 2 ** (N - 1) - 1. Subnormals are zero; an exponent of 31 counts as an ordinary one.
module mxint_lane #(
    parameter N = 8
) (
    input [15:0] x,
    input [4:0] shared,
    output [N-1:0] mantissa
);
    localparam A = N - 1;
    wire [4:0] distance = shared - x[14:10];
    // Integer bits and one guard bit.
    wire [A:0] significand;
    generate
        if (A <= 10) begin : narrow
            assign significand = {1'b1, x[9:10-A]};
        end else begin : wide
            assign significand = {1'b1, x[9:0], {(A-10){1'b0}}};
        end
    endgenerate
    wire [A:0] aligned = significand >> distance;
    wire [A:0] rounded = {1'b0, aligned[A:1]} + aligned[0];
    wire [A-1:0] magnitude = (x[14:10] == 0) ? {A{1'b0}} : rounded[A] ? {A{1'b1}} : rounded[A-1:0];
    assign mantissa = x[15] ? -{1'b0, magnitude} : {1'b0, magnitude};
endmodule

// A block of fp16 to mantissas of N bits under the largest exponent of the block (biased by 15).
module mxint_cast #(
    parameter N = 8,
    parameter LANES = 16
) (
    input [LANES*16-1:0] x,
    output [4:0] exponent,
    output [LANES*N-1:0] mantissas
);
    wire [LANES*5-1:0] exponents;
    genvar i;
    generate
        for (i = 0; i < LANES; i = i + 1) begin : lane
            assign exponents[i*5 +: 5] = x[i*16+10 +: 5];
            mxint_lane #(.N(N)) align (
                .x(x[i*16 +: 16]), .shared(exponent), .mantissa(mantissas[i*N +: N])
            );
        end
    endgenerate
    max_tree #(.L(LANES)) largest (.x(exponents), .y(exponent));
endmodule

// Running sum of block sums of W bits with exponents of E bits: the one with the smaller exponent is shifted
// right (rounding down) before they are added. `first` starts a new sum. GROWTH more bits hold the sum.
module mxint_accumulate #(
    parameter W = 20,
    parameter GROWTH = 4,
    parameter E = 9
) (
    input clock,
    input first,
    input [W-1:0] x,
    input [E-1:0] exponent,
    output [W+GROWTH-1:0] sum,
    output [E-1:0] sum_exponent
);
    localparam N = W + GROWTH;
    localparam STAGES = $clog2(N);
    wire [N-1:0] extended;
    generate
        if (GROWTH == 0) begin : same
            assign extended = x;
        end else begin : wider
            assign extended = {{GROWTH{x[W-1]}}, x};
        end
    endgenerate
    wire newer = first | (exponent >= sum_exponent);
    wire [E-1:0] larger = newer ? exponent : sum_exponent;
    wire [E-1:0] distance = larger - (newer ? sum_exponent : exponent);
    wire [N-1:0] kept = newer ? extended : sum;
    wire [N-1:0] shifted = newer ? (first ? {N{1'b0}} : sum) : extended;
    wire [STAGES-1:0] shift = (|(distance >> STAGES)) ? {STAGES{1'b1}} : distance[STAGES-1:0];
    wire [N-1:0] aligned = $signed(shifted) >>> shift;
    wire [N-1:0] next;
    add #(.N(N)) adder (.a(kept), .b(aligned), .y(next));
    register #(.N(N)) mantissa_state (.clock(clock), .d(next), .q(sum));
    register #(.N(E)) exponent_state (.clock(clock), .d(larger), .q(sum_exponent));
endmodule

// Sum and exponent to fp16 with ties to even: the value is x * 2 ** (exponent - OFFSET).
module mxint_to_fp16 #(
    parameter N = 24,
    parameter E = 9,
    parameter OFFSET = 30
) (
    input [N-1:0] x,
    input [E-1:0] exponent,
    output [15:0] y
);
    wire [18:0] number;
    wire signed [E+2:0] scaled = $signed({1'b0, number[17:10]}) - 112 - OFFSET + $signed({1'b0, exponent});
    int_to_fp #(.N(N), .E(8)) cast (.x(x), .y(number));
    assign y = ((number[17:10] == 0) | (scaled <= 0)) ? {number[18], 15'b0}
        : (scaled >= 31) ? {number[18], 5'h1f, 10'b0}
        : {number[18], scaled[4:0], number[9:0]};
endmodule
