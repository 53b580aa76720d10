// Loops over tasks on the team of threads, and the small functions that every loop needs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pool.h"

#if !defined(G2G_ISA)
#error "compile with -DG2G_ISA=<namespace of this instruction set>"
#endif

namespace g2g::G2G_ISA {

// f(task, worker) for every task; see parallel_run().
template <class F>
void parallel(int threads, int64_t tasks, int64_t grain, const F& f) {
    parallel_run(
        threads, tasks, grain,
        [](void* context, int64_t task, int worker) { (*static_cast<const F*>(context))(task, worker); },
        const_cast<void*>(static_cast<const void*>(&f)));
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void zero(void* p, size_t bytes) { __builtin_memset(p, 0, bytes); }

// f(first, last) for parts of 0 … count − 1.
template <class F>
void each_part(int64_t count, int threads, const F& f) {
    constexpr int64_t part = 1 << 16;
    parallel(threads, divide_up(count, part), 1, [&](int64_t i, int) { f(i * part, least(count, (i + 1) * part)); });
}

inline void zero_floats(float* p, int64_t count, int threads) {
    each_part(count, threads, [&](int64_t first, int64_t last) { zero(p + first, (last - first) * sizeof(float)); });
}

}  // namespace g2g::G2G_ISA
