// Which of several tensors hold inf or NaN: those whose largest magnitude, as bits, has the exponent of both.

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t LENGTH = 1 << 14;  // values that a thread looks at in one go

template <class Bits>
void nonfinite(const Bits *const *tensors, const int64_t *numel, int64_t count, Bits infinity, uint8_t *found,
               int threads) {
    int64_t total = 0;
    for (int64_t k = 0; k < count; ++k) total += (numel[k] + LENGTH - 1) / LENGTH;
    #pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        int64_t first = total * thread / threads, last = total * (thread + 1) / threads;
        for (int64_t k = 0; k < count; ++k) {
            const int64_t pieces = (numel[k] + LENGTH - 1) / LENGTH;
            const int64_t from = std::max<int64_t>(first, 0) * LENGTH, to = std::min(last * LENGTH, numel[k]);
            const Bits *values = tensors[k];
            Bits largest = 0;
            #pragma omp simd reduction(max : largest)
            for (int64_t i = from; i < to; ++i) {
                const Bits magnitude = values[i] & (Bits(-1) >> 1);
                largest = magnitude > largest ? magnitude : largest;
            }
            if (largest >= infinity) {
                #pragma omp atomic write
                found[k] = 1;
            }
            first -= pieces;
            last -= pieces;
        }
    }
}

}  // namespace

extern "C" void nonfinite32(const uint32_t *const *tensors, const int64_t *numel, int64_t count, uint32_t infinity,
                            uint8_t *found, int threads) {
    nonfinite(tensors, numel, count, infinity, found, threads);
}

extern "C" void nonfinite16(const uint16_t *const *tensors, const int64_t *numel, int64_t count, uint32_t infinity,
                            uint8_t *found, int threads) {
    nonfinite(tensors, numel, count, uint16_t(infinity), found, threads);
}
