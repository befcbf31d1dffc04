// Dot products of LANES elements a cycle with a registered running sum; `first` starts a new one.
// Nothing but the sum is registered: pipeline registers depend on the clock, not on the number format.

// Fixed point, weights of N bits and activations of M bits, exact. GROWTH is log2 of the number of cycles.
module fixed_dot #(
    parameter LANES = 16,
    parameter N = 8,
    parameter M = 8,
    parameter GROWTH = 8
) (
    input clock,
    input first,
    input [LANES*N-1:0] w,
    input [LANES*M-1:0] x,
    output [N+M+$clog2(LANES)+GROWTH-1:0] sum
);
    localparam W = N + M + $clog2(LANES);
    wire [LANES*(N+M)-1:0] products;
    wire signed [W-1:0] partial;
    genvar i;
    generate
        for (i = 0; i < LANES; i = i + 1) begin : lane
            mul #(.N(N), .M(M)) multiplier (
                .a(w[i*N +: N]), .b(x[i*M +: M]), .y(products[i*(N+M) +: N+M])
            );
        end
    endgenerate
    add_tree #(.L(LANES), .W(N + M)) tree (.x(products), .y(partial));
    wire signed [W+GROWTH-1:0] extended = partial;
    accumulate #(.N(W + GROWTH)) accumulator (.clock(clock), .first(first), .x(extended), .sum(sum));
endmodule

// Sum of L fp16 by a balanced tree of adders, each of which rounds.
module float_tree #(
    parameter L = 16
) (
    input [L*16-1:0] x,
    output [15:0] y
);
    localparam LEFT = (L + 1) / 2;
    generate
        if (L == 1) begin : leaf
            assign y = x;
        end else begin : node
            wire [15:0] left;
            wire [15:0] right;
            float_tree #(.L(LEFT)) lower (.x(x[LEFT*16-1:0]), .y(left));
            float_tree #(.L(L - LEFT)) upper (.x(x[L*16-1:LEFT*16]), .y(right));
            fp16_add adder (.a(left), .b(right), .y(y));
        end
    endgenerate
endmodule

// fp16 with fp16 sums.
module float_dot #(
    parameter LANES = 16
) (
    input clock,
    input first,
    input [LANES*16-1:0] w,
    input [LANES*16-1:0] x,
    output [15:0] sum
);
    wire [LANES*16-1:0] products;
    wire [15:0] partial;
    wire [15:0] next;
    genvar i;
    generate
        for (i = 0; i < LANES; i = i + 1) begin : lane
            fp16_mul multiplier (.a(w[i*16 +: 16]), .b(x[i*16 +: 16]), .y(products[i*16 +: 16]));
        end
    endgenerate
    float_tree #(.L(LANES)) tree (.x(products), .y(partial));
    fp16_add adder (.a(first ? 16'b0 : sum), .b(partial), .y(next));
    register #(.N(16)) state (.clock(clock), .d(next), .q(sum));
endmodule

// MXINT: one block of LANES elements a cycle. Products and their sum are exact, the exponents are added, and
// the running sum is aligned as mxint_accumulate says.
module mxint_dot #(
    parameter LANES = 16,
    parameter N = 8,
    parameter M = 8,
    parameter GROWTH = 8,
    parameter E = 8
) (
    input clock,
    input first,
    input [LANES*N-1:0] w,
    input [E-1:0] w_exponent,
    input [LANES*M-1:0] x,
    input [E-1:0] x_exponent,
    output [N+M+$clog2(LANES)+GROWTH-1:0] sum,
    output [E:0] sum_exponent
);
    localparam W = N + M + $clog2(LANES);
    wire [LANES*(N+M)-1:0] products;
    wire [W-1:0] partial;
    wire [E:0] exponent;
    genvar i;
    generate
        for (i = 0; i < LANES; i = i + 1) begin : lane
            mul #(.N(N), .M(M)) multiplier (
                .a(w[i*N +: N]), .b(x[i*M +: M]), .y(products[i*(N+M) +: N+M])
            );
        end
    endgenerate
    add_tree #(.L(LANES), .W(N + M)) tree (.x(products), .y(partial));
    add #(.N(E + 1)) exponents (.a({1'b0, w_exponent}), .b({1'b0, x_exponent}), .y(exponent));
    mxint_accumulate #(.W(W), .GROWTH(GROWTH), .E(E + 1)) accumulator (
        .clock(clock), .first(first), .x(partial), .exponent(exponent),
        .sum(sum), .sum_exponent(sum_exponent)
    );
endmodule
