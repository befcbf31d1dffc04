// IEEE 754 binary arithmetic of E exponent bits and F fraction bits, rounded to nearest, ties to even.
//
// Subnormal operands are read as zero of their sign; a result that is below the least normal number after
// rounding to F + 1 bits with an unbounded exponent becomes zero of its sign. Overflow gives infinity.
// Infinities and NaN are computed with as IEEE 754 says; every NaN result is the quiet NaN with sign 0 and
// only the top fraction bit set.

// Product of formats that may differ in their exponents' widths: EA and EB in, EO out.
module fp_mul #(
    parameter EA = 5,
    parameter EB = 5,
    parameter EO = 5,
    parameter F = 10
) (
    input [EA+F:0] a,
    input [EB+F:0] b,
    output [EO+F:0] y
);
    localparam EMAX = (EA > EB) ? ((EA > EO) ? EA : EO) : ((EB > EO) ? EB : EO);
    localparam EW = EMAX + 3;
    localparam signed [EW-1:0] OFFSET = (1 << (EO - 1)) - (1 << (EA - 1)) - (1 << (EB - 1)) + 1;
    localparam signed [EW-1:0] LARGEST = (1 << EO) - 1;

    wire sign = a[EA+F] ^ b[EB+F];
    wire [EA-1:0] exponent_a = a[EA+F-1:F];
    wire [EB-1:0] exponent_b = b[EB+F-1:F];
    wire zero_a = exponent_a == 0;
    wire zero_b = exponent_b == 0;
    wire infinite_a = &exponent_a;
    wire infinite_b = &exponent_b;
    wire nan_a = infinite_a & |a[F-1:0];
    wire nan_b = infinite_b & |b[F-1:0];

    wire [2*F+1:0] product = {1'b1, a[F-1:0]} * {1'b1, b[F-1:0]};
    wire top = product[2*F+1];
    wire [F-1:0] fraction = top ? product[2*F:F+1] : product[2*F-1:F];
    wire guard = top ? product[F] : product[F-1];
    wire sticky = (|product[F-2:0]) | (top & product[F-1]);
    wire up = guard & (sticky | fraction[0]);
    wire signed [EW-1:0] exponent = $signed({1'b0, exponent_a}) + $signed({1'b0, exponent_b}) + OFFSET
        + $signed({1'b0, top});
    wire [EW+F-1:0] rounded = {exponent, fraction} + up;
    wire signed [EW-1:0] final_exponent = rounded[EW+F-1:F];

    wire nan = nan_a | nan_b | (infinite_a & zero_b) | (infinite_b & zero_a);
    wire infinite = infinite_a | infinite_b | ((final_exponent >= LARGEST) & ~zero_a & ~zero_b);
    wire zero = zero_a | zero_b | (final_exponent <= 0);
    assign y = nan ? {1'b0, {EO{1'b1}}, 1'b1, {(F-1){1'b0}}}
        : infinite ? {sign, {EO{1'b1}}, {F{1'b0}}}
        : zero ? {sign, {(EO+F){1'b0}}}
        : {sign, rounded[EO+F-1:0]};
endmodule

// Sum, by one path: order by magnitude, align with guard, round and sticky bits, add, normalise, round.
module fp_add #(
    parameter E = 5,
    parameter F = 10
) (
    input [E+F:0] a,
    input [E+F:0] b,
    output [E+F:0] y
);
    // One carry, the significand, three bits for rounding.
    localparam W = F + 5;
    localparam STAGES = $clog2(W);
    localparam signed [E+1:0] LARGEST = (1 << E) - 1;

    wire swap = b[E+F-1:0] > a[E+F-1:0];
    wire [E+F:0] major = swap ? b : a;
    wire [E+F:0] minor = swap ? a : b;
    wire [E-1:0] exponent_major = major[E+F-1:F];
    wire [E-1:0] exponent_minor = minor[E+F-1:F];
    wire zero_major = exponent_major == 0;
    wire zero_minor = exponent_minor == 0;
    wire subtract = major[E+F] ^ minor[E+F];
    wire [E-1:0] distance = exponent_major - exponent_minor;

    reg [W-1:0] aligned;
    reg sticky;
    reg [W-1:0] sum;
    reg [W-1:0] normal;
    reg [STAGES-1:0] zeros;
    integer k;
    always @(*) begin
        aligned = {1'b0, ~zero_minor, zero_minor ? {F{1'b0}} : minor[F-1:0], 3'b000};
        sticky = 1'b0;
        for (k = 0; k < E; k = k + 1)
            if (distance[k]) begin
                if ((1 << k) >= W) begin
                    sticky = sticky | (|aligned);
                    aligned = 0;
                end else begin
                    sticky = sticky | (|(aligned & ((1 << (1 << k)) - 1)));
                    aligned = aligned >> (1 << k);
                end
            end
        aligned[0] = aligned[0] | sticky;
        sum = {1'b0, ~zero_major, major[F-1:0], 3'b000} + (aligned ^ {W{subtract}}) + subtract;
        normal = sum;
        zeros = 0;
        for (k = STAGES - 1; k >= 0; k = k - 1)
            if ((normal >> (W - (1 << k))) == 0) begin
                normal = normal << (1 << k);
                zeros[k] = 1'b1;
            end
    end

    // normal is 1.F and four more bits, of which the last two are sticky.
    wire up = normal[3] & ((|normal[2:0]) | normal[4]);
    wire signed [E+1:0] exponent = $signed({1'b0, exponent_major}) + 1 - $signed({1'b0, zeros});
    wire [E+F+1:0] rounded = {exponent, normal[W-2:4]} + up;
    wire signed [E+1:0] final_exponent = rounded[E+F+1:F];

    wire infinite_major = &exponent_major;
    wire nan = infinite_major & ((|major[F-1:0]) | (subtract & (&exponent_minor)));
    wire infinite = infinite_major | (final_exponent >= LARGEST);
    wire cancelled = ~normal[W-1];
    wire zero = zero_major | cancelled | (final_exponent <= 0);
    wire sign = (zero_major | cancelled) ? (major[E+F] & minor[E+F]) : major[E+F];
    assign y = nan ? {1'b0, {E{1'b1}}, 1'b1, {(F-1){1'b0}}}
        : infinite ? {sign, {E{1'b1}}, {F{1'b0}}}
        : zero ? {sign, {(E+F){1'b0}}}
        : {sign, rounded[E+F-1:0]};
endmodule

module fp16_mul (
    input [15:0] a,
    input [15:0] b,
    output [15:0] y
);
    fp_mul product (.a(a), .b(b), .y(y));
endmodule

module fp16_add (
    input [15:0] a,
    input [15:0] b,
    output [15:0] y
);
    fp_add sum (.a(a), .b(b), .y(y));
endmodule

module fp32_add (
    input [31:0] a,
    input [31:0] b,
    output [31:0] y
);
    fp_add #(.E(8), .F(23)) sum (.a(a), .b(b), .y(y));
endmodule

// Product of two fp16 as fp32: exact, so nothing is rounded and nothing over- or underflows.
module fp16_mul_exact (
    input [15:0] a,
    input [15:0] b,
    output [31:0] y
);
    wire sign = a[15] ^ b[15];
    wire zero = (a[14:10] == 0) | (b[14:10] == 0);
    wire infinite = (&a[14:10]) | (&b[14:10]);
    wire nan = ((&a[14:10]) & (|a[9:0])) | ((&b[14:10]) & (|b[9:0])) | (infinite & zero);
    wire [21:0] product = {1'b1, a[9:0]} * {1'b1, b[9:0]};
    wire top = product[21];
    // The biases: 127 - 2 * 15.
    wire [7:0] exponent = {3'b000, a[14:10]} + {3'b000, b[14:10]} + 8'd97 + {7'b0, top};
    wire [22:0] fraction = top ? {product[20:0], 2'b00} : {product[19:0], 3'b000};
    assign y = nan ? 32'h7fc00000
        : infinite ? {sign, 8'hff, 23'b0}
        : zero ? {sign, 31'b0}
        : {sign, exponent, fraction};
endmodule

// a * b + c with the product rounded to fp16 before the sum.
module fp16_mac_fp16 (
    input [15:0] a,
    input [15:0] b,
    input [15:0] c,
    output [15:0] y
);
    wire [15:0] product;
    fp16_mul multiplier (.a(a), .b(b), .y(product));
    fp16_add adder (.a(product), .b(c), .y(y));
endmodule

// a * b + c with an exact product of fp16 factors and a sum in fp32.
module fp16_mac_fp32 (
    input [15:0] a,
    input [15:0] b,
    input [31:0] c,
    output [31:0] y
);
    wire [31:0] product;
    fp16_mul_exact multiplier (.a(a), .b(b), .y(product));
    fp32_add adder (.a(product), .b(c), .y(y));
endmodule
