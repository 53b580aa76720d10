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

}  // namespace g2g::G2G_ISA
