// qk_norm: splits the packed projection, normalises q and k, and writes k and v into the caches.
#include "device.cuh"

namespace var_fast::cuda {
namespace {

constexpr const char* OP = "qk_norm";

template <int N>
__device__ __forceinline__ float square_sum(const float (&x)[N]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += x[i] * x[i];
    return sum;
}

// LANES lanes share one head of one token, 16 bytes of q, k and v each.
template <class T, int LANES>
__global__ void __launch_bounds__(256)
qk_norm_kernel(const T* qkv, const float* scale_H, float softmax_scale, int S, int64_t R, int64_t l, int H, int D, T* q,
               T* k_cache, T* v_cache, int64_t begin, int64_t capacity) {
    constexpr int N = per_load<T>;
    let_next_start();
    wait_for_previous();
    const int64_t item = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / LANES;  // (image, token, head)
    const int d = threadIdx.x % LANES * N;
    const int64_t head = item % H, token = item / H % l, image = item / H / l;
    const bool active = d < D && image < R;
    float query[N] = {}, key[N] = {};
    Pack<T, N> value{};
    if (active) {
        const int64_t source = image < S ? image : S - 1;
        const T* const from = qkv + ((source * l + token) * 3 * H + head) * D + d;
        load(from, query);
        load(from + int64_t{H} * D, key);
        value = *reinterpret_cast<const Pack<T, N>*>(from + int64_t{2} * H * D);
    }
    float query_factor = softmax_scale, key_factor = 1;
    if (scale_H != nullptr) {
        const float query_square = lanes_sum<LANES>(square_sum(query));
        const float key_square = lanes_sum<LANES>(square_sum(key));
        query_factor *= scale_H[head] / fmaxf(sqrtf(query_square), 1e-12f);
        key_factor = 1 / fmaxf(sqrtf(key_square), 1e-12f);
    }
    if (!active) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        query[i] *= query_factor;
        key[i] *= key_factor;
    }
    const int64_t cached = ((image * H + head) * capacity + begin + token) * D + d;
    store(q + item * D + d, query);
    store(k_cache + cached, key);
    *reinterpret_cast<Pack<T, N>*>(v_cache + cached) = value;
}

}  // namespace

void qk_norm(const void* qkv, Type type, const float* scale_H, float softmax_scale, int64_t S, int64_t R, int64_t l,
             int64_t H, int64_t D, void* q, void* k_cache, void* v_cache, int64_t begin, int64_t capacity,
             void* stream) {
    expect(D % 8 == 0 && D > 0 && D <= 128, OP, "D a multiple of 8 up to 128");
    expect(S > 0 && begin >= 0 && begin + l <= capacity, OP, "S > 0 and begin + l <= capacity");
    if (R * l * H == 0) return;
    for_type(type, [&](auto element) {
        using T = decltype(element);
        const auto run = [&](auto kernel, int64_t lanes) {
            launch_dependent(OP, kernel, grid_of(ceil_div(R * l * H * lanes, 256)), 256, 0, stream,
                             static_cast<const T*>(qkv), scale_H, softmax_scale, S, R, l, H, D, static_cast<T*>(q),
                             static_cast<T*>(k_cache), static_cast<T*>(v_cache), begin, capacity);
        };
        const int64_t lanes = ceil_div(D, per_load<T>);
        if (lanes <= 4) return run(&qk_norm_kernel<T, 4>, 4);
        if (lanes <= 8) return run(&qk_norm_kernel<T, 8>, 8);
        if (lanes <= 16) return run(&qk_norm_kernel<T, 16>, 16);
        run(&qk_norm_kernel<T, 32>, 32);
    });
}

}  // namespace var_fast::cuda
