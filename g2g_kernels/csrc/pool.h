// The threads of the kernels: those of the OpenMP runtime that PyTorch has loaded, else a small pool of our own (PERFORMANCE.md).
// One OpenMP region spans a call, in which its threads take tasks of one loop after another as threads of our own would.
// Nothing is linked; Python looks up the runtime's entry point in the process.
#pragma once

#include <cstdint>

namespace g2g {

// GOMP_parallel: calls member(context) on `threads` threads, the caller among them. The same in GNU's and LLVM's runtime.
using GompParallel = void (*)(void (*member)(void*), void* context, unsigned threads, unsigned flags);

// From now on calls run on this runtime's threads, unless waiting for them took more than `share` of the time of the call
// itself; null: on our own.
void use_openmp(GompParallel parallel, double share);

// Calls body(context). Where there is OpenMP, loops of this thread meanwhile run on up to `threads` of its threads, and
// with one thread on the caller alone. `body` must not throw.
void with_team(int threads, void (*body)(void*), void* context);

// Calls run(context, task, worker) for every task 0 … tasks − 1 on at most `threads` threads, `grain` consecutive tasks
// at a time; worker is 0 … threads − 1. Returns when all are done. The order is not fixed, so tasks must own what they
// write. Every task runs in the caller's rounding mode and treats denormal numbers as zero. A loop runs on the caller
// alone while the threads are busy with another Python thread's.
void parallel_run(int threads, int64_t tasks, int64_t grain, void (*run)(void*, int64_t, int), void* context);

}  // namespace g2g
