// Exact sum of L signed numbers of W bits: a balanced tree whose levels are one bit wider each, so that
// nothing is rounded and nothing overflows.
module add_tree #(
    parameter L = 16,
    parameter W = 16
) (
    input [L*W-1:0] x,
    output [W+$clog2(L)-1:0] y
);
    localparam LEFT = (L + 1) / 2;
    localparam RIGHT = L - LEFT;
    localparam OUT = W + $clog2(L);
    generate
        if (L == 1) begin : leaf
            assign y = x;
        end else begin : node
            localparam WIDTH_LEFT = W + $clog2(LEFT);
            localparam WIDTH_RIGHT = W + $clog2(RIGHT);
            wire [WIDTH_LEFT-1:0] left;
            wire [WIDTH_RIGHT-1:0] right;
            add_tree #(.L(LEFT), .W(W)) lower (.x(x[LEFT*W-1:0]), .y(left));
            add_tree #(.L(RIGHT), .W(W)) upper (.x(x[L*W-1:LEFT*W]), .y(right));
            add #(.N(OUT)) adder (
                .a({{(OUT-WIDTH_LEFT){left[WIDTH_LEFT-1]}}, left}),
                .b({{(OUT-WIDTH_RIGHT){right[WIDTH_RIGHT-1]}}, right}),
                .y(y)
            );
        end
    endgenerate
endmodule
