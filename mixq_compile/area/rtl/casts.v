// Casts between signed integers and IEEE 754 numbers, rounded to nearest, ties to even.

// Signed integer of N bits to a floating-point number of E exponent and F fraction bits. Magnitudes above
// the format's range become infinity; the format's exponent is at least 1 for every non-zero integer, so
// there are no subnormal results.
module int_to_fp #(
    parameter N = 8,
    parameter E = 5,
    parameter F = 10
) (
    input [N-1:0] x,
    output [E+F:0] y
);
    localparam STAGES = (N > 1) ? $clog2(N) : 1;
    // The exponent of a magnitude with its top bit set, in a field wide enough for any N and E.
    localparam EW = ((E > 6) ? E : 6) + 2;
    localparam [EW-1:0] TOP = (1 << (E - 1)) - 1 + N - 1;
    localparam [EW-1:0] LARGEST = (1 << E) - 1;

    wire sign = x[N-1];
    wire [N-1:0] magnitude = sign ? -x : x;
    reg [N-1:0] normal;
    reg [STAGES-1:0] zeros;
    integer k;
    always @(*) begin
        normal = magnitude;
        zeros = 0;
        for (k = STAGES - 1; k >= 0; k = k - 1)
            if ((normal >> (N - (1 << k))) == 0) begin
                normal = normal << (1 << k);
                zeros[k] = 1'b1;
            end
    end
    // 1.F, a guard bit and the rest; the zeros behind a narrow integer vanish in synthesis.
    wire [N+F+1:0] padded = {normal, {(F+2){1'b0}}};
    wire [F-1:0] fraction = padded[N+F:N+1];
    wire up = padded[N] & ((|padded[N-1:0]) | fraction[0]);
    wire [EW+F-1:0] rounded = {TOP - {{(EW-STAGES){1'b0}}, zeros}, fraction} + up;
    wire infinite = rounded[EW+F-1:F] >= LARGEST;
    assign y = ~normal[N-1] ? {(E+F+1){1'b0}}
        : infinite ? {sign, {E{1'b1}}, {F{1'b0}}}
        : {sign, rounded[E+F-1:0]};
endmodule

module int_to_fp16 #(
    parameter N = 8
) (
    input [N-1:0] x,
    output [15:0] y
);
    int_to_fp #(.N(N)) cast (.x(x), .y(y));
endmodule

// fp16 to a signed integer of N bits (2 to 16), saturating at both ends. Infinities and NaN saturate by
// their sign.
module fp16_to_int #(
    parameter N = 8
) (
    input [15:0] x,
    output [N-1:0] y
);
    // Integer bits of the magnitude, and the bits of the significand behind them.
    localparam A = N - 1;
    localparam R = (A < 11) ? 11 - A : 0;
    localparam W = A + R;
    localparam STAGES = $clog2(A + 1);
    localparam [5:0] WHOLE = 15 + A - 1;

    wire [4:0] exponent = x[14:10];
    wire [5:0] shift = WHOLE - {1'b0, exponent};
    wire above = {1'b0, exponent} > WHOLE;
    // Below one half; this holds zero and subnormals too.
    wire tiny = exponent < 5'd14;

    // The significand at the top of W bits, then a guard bit for A > 10 and the sticky bit.
    reg [W+1:0] aligned;
    reg sticky;
    integer k;
    always @(*) begin
        aligned = {1'b1, x[9:0], {(W-9){1'b0}}};
        sticky = 1'b0;
        for (k = 0; k < STAGES; k = k + 1)
            if (shift[k]) begin
                sticky = sticky | (|(aligned & ((1 << (1 << k)) - 1)));
                aligned = aligned >> (1 << k);
            end
        sticky = sticky | (|aligned[R:0]);
    end
    wire [A-1:0] whole = aligned[W+1:R+2];
    wire up = aligned[R+1] & (sticky | whole[0]);
    wire [A:0] rounded = tiny ? {(A+1){1'b0}} : {1'b0, whole} + up;
    wire [A:0] magnitude = (above | rounded[A]) ? {x[15], {A{~x[15]}}} : rounded;
    assign y = x[15] ? -magnitude : magnitude;
endmodule
