// The rows of many tensors, shared among threads.

#include <algorithm>
#include <cstdint>

// Calls visit(tensor, first value, values) for each row of at most `length` values, a thread with its share of
// consecutive ones, and finish(tensor) after a thread's rows of a tensor; each thread with a copy of the worker.
template <class Numel, class Worker>
void for_rows(Numel numel, int64_t count, int64_t length, int threads, const Worker &worker) {
    int64_t total = 0;
    for (int64_t k = 0; k < count; ++k) total += (numel(k) + length - 1) / length;
    #pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        Worker own = worker;
        int64_t first = total * thread / threads, last = total * (thread + 1) / threads;
        for (int64_t k = 0; k < count; ++k) {
            const int64_t rows = (numel(k) + length - 1) / length, end = std::min(last, rows);
            for (int64_t row = std::max<int64_t>(first, 0); row < end; ++row) {
                own.visit(k, row * length, std::min(length, numel(k) - row * length));
            }
            own.finish(k);
            first -= rows;
            last -= rows;
        }
    }
}
