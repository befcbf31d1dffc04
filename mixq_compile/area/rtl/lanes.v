// Lanes that stand beside the dot products, one element wide each. Floating-point details as in
// floating_point.v: subnormals are zero, rounding is to nearest with ties to even.

// Dequantization: (q - zero) * scale in fp16, rounded once. ASYMMETRIC: q and zero are unsigned and zero is
// subtracted exactly; else q is signed and `zero` is not read. An infinite or NaN scale gives infinity.
module dequant #(
    parameter N = 4,
    parameter ASYMMETRIC = 1
) (
    input [N-1:0] q,
    input [N-1:0] zero,
    input [15:0] scale,
    output [15:0] y
);
    localparam W = N + 11;
    localparam STAGES = $clog2(N + 1);

    wire [N:0] difference = ASYMMETRIC ? {1'b0, q} - {1'b0, zero} : {q[N-1], q};
    wire [N-1:0] magnitude = difference[N] ? -difference[N-1:0] : difference[N-1:0];
    wire sign = difference[N] ^ scale[15];
    wire [W-1:0] product = magnitude * {1'b1, scale[9:0]};
    reg [W-1:0] normal;
    reg [STAGES-1:0] zeros;
    integer k;
    always @(*) begin
        normal = product;
        zeros = 0;
        for (k = STAGES - 1; k >= 0; k = k - 1)
            if ((normal >> (W - (1 << k))) == 0) begin
                normal = normal << (1 << k);
                zeros[k] = 1'b1;
            end
    end
    wire up = normal[N-1] & ((|(normal & ((1 << (N - 1)) - 1))) | normal[N]);
    wire signed [6:0] exponent = $signed({2'b00, scale[14:10]}) + N - $signed({1'b0, zeros});
    wire [16:0] rounded = {exponent, normal[W-2:N]} + up;
    wire signed [6:0] final_exponent = rounded[16:10];
    wire none = (magnitude == 0) | (scale[14:10] == 0) | (final_exponent <= 0);
    assign y = none ? {sign, 15'b0}
        : (final_exponent >= 31) ? {sign, 5'h1f, 10'b0}
        : {sign, rounded[14:0]};
endmodule

// Quantization: x * inverse_scale, rounded to fp16, then to an integer of N bits with saturation.
module quant #(
    parameter N = 8
) (
    input [15:0] x,
    input [15:0] inverse_scale,
    output [N-1:0] q
);
    wire [15:0] scaled;
    fp16_mul multiplier (.a(x), .b(inverse_scale), .y(scaled));
    fp16_to_int #(.N(N)) cast (.x(scaled), .y(q));
endmodule

// Gathering: x * scale + y with an integer sum x of N bits. The cast has fp16's fraction and seven exponent
// bits, since sums exceed fp16's range before they are scaled; cast, product and sum each round.
module gather #(
    parameter N = 32
) (
    input [N-1:0] x,
    input [15:0] scale,
    input [15:0] y,
    output [15:0] out
);
    wire [17:0] number;
    wire [15:0] scaled;
    int_to_fp #(.N(N), .E(7)) cast (.x(x), .y(number));
    fp_mul #(.EA(7)) multiplier (.a(number), .b(scale), .y(scaled));
    fp16_add adder (.a(scaled), .b(y), .y(out));
endmodule

// Scattering of fp16: |x| >= threshold goes to `high`, everything else to `low`; the other one is zero.
// The threshold is not negative. Infinities and NaN are high.
module compare_demux (
    input [15:0] x,
    input [15:0] threshold,
    output is_high,
    output [15:0] high,
    output [15:0] low
);
    assign is_high = x[14:0] >= threshold[14:0];
    assign high = is_high ? x : 16'b0;
    assign low = is_high ? 16'b0 : x;
endmodule
