// Which of several tensors hold inf or NaN: those whose largest magnitude, as bits, has the exponent of both.

#include <cstdint>

#include "rows.h"

namespace {

constexpr int64_t LENGTH = 1 << 14;  // of a row

template <class Bits>
struct Nonfinite {
    const Bits *const *tensors;
    Bits infinity;
    uint8_t *found;
    Bits largest = 0;

    void visit(int64_t tensor, int64_t at, int64_t n) {
        const Bits *values = tensors[tensor] + at;
        Bits of_row = 0;
        #pragma omp simd reduction(max : of_row)
        for (int64_t i = 0; i < n; ++i) {
            const Bits magnitude = values[i] & (Bits(-1) >> 1);
            of_row = magnitude > of_row ? magnitude : of_row;
        }
        largest = std::max(largest, of_row);
    }
    void finish(int64_t tensor) {
        if (largest >= infinity) {
            #pragma omp atomic write
            found[tensor] = 1;
        }
        largest = 0;
    }
};

}  // namespace

extern "C" void nonfinite32(const uint32_t *const *tensors, const int64_t *numel, int64_t count, uint32_t infinity,
                            uint8_t *found, int threads) {
    const auto size = [=](int64_t tensor) { return numel[tensor]; };
    for_rows(size, count, LENGTH, threads, Nonfinite<uint32_t>{tensors, infinity, found});
}

extern "C" void nonfinite16(const uint16_t *const *tensors, const int64_t *numel, int64_t count, uint32_t infinity,
                            uint8_t *found, int threads) {
    const auto size = [=](int64_t tensor) { return numel[tensor]; };
    for_rows(size, count, LENGTH, threads, Nonfinite<uint16_t>{tensors, uint16_t(infinity), found});
}
