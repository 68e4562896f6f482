// Kernels of float32 matrix products, included once per instruction set: the surrounding namespace has given
// VAR_FAST_TARGET, Vector, LANES, VECTORS, UNROLL, zero, load, store, everywhere, fma, add and transpose.

constexpr int COLUMNS = LANES * VECTORS;

// out[m][n] = base[m][n] + sum over k of x[m][k] w[k][n] for ROWS rows and COLUMNS columns. x's rows are ROW floats
// apart and its steps STEP; w is (K, COLUMNS), packed; base nullptr: zeros. Every element has one accumulator that adds k
// in order. Meanwhile FETCH rows at `next`, next_stride bytes apart, are called into the second-level cache, as many bytes
// of each as `fetched` says for every 16 steps.
template <int ROWS, int ROW, int STEP, int FETCH>
VAR_FAST_TARGET void tile(const float* x, const float* w, int64_t K, const float* base, int64_t base_stride, float* out,
                          int64_t out_stride, const char* next, int64_t next_stride, int64_t fetched) {
    Vector sum[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[m][v] = zero();
    for (int64_t k = 0; k < K; k += 16, next += fetched) {
        // a little at a time: what the sums wait for must not queue behind it
        const float* written = out + std::min<int64_t>(k / 16, ROWS - 1) * out_stride;
        __builtin_prefetch(written, 1);
        __builtin_prefetch(written + COLUMNS - 1, 1);
        if (FETCH < 16)
#pragma GCC unroll 8
            for (int i = 0; i < FETCH; ++i) __builtin_prefetch(next + i * next_stride, 0, 2);
        const char* line = next;
        const float* end = x + std::min<int64_t>(16, K - k) * STEP;
#pragma GCC unroll UNROLL
        for (; x < end; w += COLUMNS, x += STEP) {
#pragma GCC unroll 2
            for (int i = 0; i < FETCH / 16; ++i, line += next_stride) __builtin_prefetch(line, 0, 2);
            Vector column[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) column[v] = load(w + v * LANES);
#pragma GCC unroll 16
            for (int m = 0; m < ROWS; ++m) {
                const Vector row = everywhere(x[m * ROW]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) sum[m][v] = fma(row, column[v], sum[m][v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const Vector start = base ? load(base + m * base_stride + v * LANES) : zero();
            store(out + m * out_stride + v * LANES, add(start, sum[m][v]));
        }
}

// w (rows n of stride, K) of From -> (K, COLUMNS), zeros where n >= n_count; meanwhile FETCH rows at `next` as above. A
// cache line is used up at once: rows that lie 4096 bytes apart evict each other.
template <class From, int FETCH>
VAR_FAST_TARGET void pack_columns(const void* weights, int64_t stride, int64_t n_count, int64_t K, const void* next,
                                  float* packed) {
    const From *const w = static_cast<const From*>(weights), *const ahead = static_cast<const From*>(next);
    constexpr int LINE = 16;
    int64_t k = 0;
    if (n_count == COLUMNS)
        for (; k + LINE <= K; k += LINE) {
            for (int i = 0; i < FETCH; ++i) __builtin_prefetch(ahead + i * stride + k, 0, 2);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v)
#pragma GCC unroll 4
                for (int i = 0; i < LINE; i += LANES)
                    transpose(w + v * LANES * stride + k + i, stride, packed + (k + i) * COLUMNS + v * LANES, COLUMNS);
        }
    for (; k < K; ++k)
        for (int64_t n = 0; n < COLUMNS; ++n) packed[k * COLUMNS + n] = n < n_count ? to_float(w[n * stride + k]) : 0.0f;
}

// x (rows m of stride, K) -> (K, rows), for a tile of `rows` <= MOST_ROWS. Of x there are `available` rows; where these
// are LANES or more, up to LANES floats behind the result are written too.
VAR_FAST_TARGET inline void pack_rows(const float* x, int64_t stride, int64_t rows, int64_t available, int64_t K,
                                      float* packed) {
    int64_t k = 0;
    if (available >= LANES && rows > 1)
        for (; k + LANES <= K; k += LANES) transpose(x + k, stride, packed + k * rows, rows);  // each line over the last's end
    for (; k < K; ++k)
        for (int64_t m = 0; m < rows; ++m) packed[k * rows + m] = x[m * stride + k];
}
