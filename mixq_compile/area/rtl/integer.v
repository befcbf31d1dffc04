// Integer units of two's complement: product, sum, register and accumulator.
//
// Each is a module of its own and synthesis keeps the module boundaries: written as one expression,
// `sum <= sum + a * b` becomes a multi-operand adder of carry-save rows, almost half as large again as the
// multiplier, the adder and the register that a datapath library would place.

// Exact signed product; no rounding.
module mul #(
    parameter N = 8,
    parameter M = 8
) (
    input signed [N-1:0] a,
    input signed [M-1:0] b,
    output signed [N+M-1:0] y
);
    assign y = a * b;
endmodule

// Sum of N bits; the carry out is dropped, so callers extend the operands where it matters.
module add #(
    parameter N = 16
) (
    input [N-1:0] a,
    input [N-1:0] b,
    output [N-1:0] y
);
    assign y = a + b;
endmodule

// Register without reset.
module register #(
    parameter N = 16
) (
    input clock,
    input [N-1:0] d,
    output reg [N-1:0] q
);
    always @(posedge clock) q <= d;
endmodule

// Running sum of N bits: `first` starts a new sum with x.
module accumulate #(
    parameter N = 24
) (
    input clock,
    input first,
    input [N-1:0] x,
    output [N-1:0] sum
);
    wire [N-1:0] next;
    add #(.N(N)) adder (.a(first ? {N{1'b0}} : sum), .b(x), .y(next));
    register #(.N(N)) state (.clock(clock), .d(next), .q(sum));
endmodule
