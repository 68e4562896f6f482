// Transforms of conv3x3.cpp, included there once per instruction set into the namespaces of matrix_kernels.h.

// out = B^T d for one line of six: the input transform at the points 0, A, -A, B, -B and infinity.
VAR_FAST_TARGET inline void input_line(const Vector* d, int step, Vector* out, int out_step) {
    const Vector a = everywhere(POINT_A), b = everywhere(POINT_B);
    const Vector minus_aa = everywhere(-POINT_A * POINT_A), minus_bb = everywhere(-POINT_B * POINT_B);
    const Vector aabb = everywhere(POINT_A * POINT_A * POINT_B * POINT_B);
    const Vector minus_sum = everywhere(-(POINT_A * POINT_A + POINT_B * POINT_B));
    const Vector even_a = fma(minus_bb, d[2 * step], d[4 * step]), odd_a = fma(minus_bb, d[step], d[3 * step]);
    const Vector even_b = fma(minus_aa, d[2 * step], d[4 * step]), odd_b = fma(minus_aa, d[step], d[3 * step]);
    out[0] = fma(aabb, d[0], fma(minus_sum, d[2 * step], d[4 * step]));
    out[out_step] = fma(a, odd_a, even_a);
    out[2 * out_step] = minus_fma(a, odd_a, even_a);
    out[3 * out_step] = fma(b, odd_b, even_b);
    out[4 * out_step] = minus_fma(b, odd_b, even_b);
    out[5 * out_step] = fma(aabb, d[step], fma(minus_sum, d[3 * step], d[5 * step]));
}

// v[6 i + j] (`stride` floats apart) = B^T d B of 6 x 6 pixels of `channels` channels, whole vectors.
VAR_FAST_TARGET void input_tile(const float* x, int64_t row, int64_t pixel, int64_t channels, float* v,
                                int64_t stride) {
    for (int64_t c = 0; c < channels; c += LANES) {
        Vector half[36];
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) {
            Vector column[6];
#pragma GCC unroll 6
            for (int i = 0; i < 6; ++i) column[i] = load(x + i * row + j * pixel + c);
            input_line(column, 1, half + j, 6);
        }
#pragma GCC unroll 1
        for (int i = 0; i < 6; ++i) {
            Vector line[6];
            input_line(half + 6 * i, 1, line, 1);
#pragma GCC unroll 6
            for (int j = 0; j < 6; ++j) store(v + (6 * i + j) * stride + c, line[j]);
        }
    }
}

// out = A^T m for one line
VAR_FAST_TARGET inline void output_line(const Vector* m, Vector* out, int out_step) {
    const Vector a = everywhere(POINT_A), b = everywhere(POINT_B);
    const Vector aa = everywhere(POINT_A * POINT_A), bb = everywhere(POINT_B * POINT_B);
    const Vector aaa = everywhere(POINT_A * POINT_A * POINT_A), bbb = everywhere(POINT_B * POINT_B * POINT_B);
    const Vector even_a = add(m[1], m[2]), odd_a = subtract(m[1], m[2]);
    const Vector even_b = add(m[3], m[4]), odd_b = subtract(m[3], m[4]);
    out[0] = add(m[0], add(even_a, even_b));
    out[out_step] = fma(a, odd_a, multiply(b, odd_b));
    out[2 * out_step] = fma(aa, even_a, multiply(bb, even_b));
    out[3 * out_step] = fma(aaa, odd_a, fma(bbb, odd_b, m[5]));
}

// y (4 x 4 pixels, COLUMNS channels) = A^T m A + bias + residual (nullptr: none); m[6 i + j] are `stride` floats apart.
VAR_FAST_TARGET void output_tile(const float* m, int64_t stride, const float* bias, const float* residual, float* y,
                                 int64_t row, int64_t pixel) {
#pragma GCC unroll 1
    for (int c = 0; c < COLUMNS; c += LANES) {
        Vector half[24];
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) {
            Vector column[6];
#pragma GCC unroll 6
            for (int i = 0; i < 6; ++i) column[i] = load(m + (6 * i + j) * stride + c);
            output_line(column, half + j, 6);
        }
        const Vector start = load(bias + c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            Vector line[4];
            output_line(half + 6 * i, line, 1);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const int64_t at = i * row + j * pixel + c;
                const Vector sum = add(line[j], start);
                store(y + at, residual ? add(sum, load(residual + at)) : sum);
            }
        }
    }
}
