// A small persistent thread pool of our own, instead of a second OpenMP runtime besides PyTorch's.
#pragma once

#include <cstdint>

namespace g2g {

// Calls run(context, task, worker) for every task 0 … tasks − 1 on at most `threads` threads, `grain` consecutive tasks
// at a time; worker is 0 … threads − 1. Returns when all are done. The order is not fixed, so tasks must own what they
// write. Every task runs in the caller's rounding mode and treats denormal numbers as zero. A call made while the pool
// is busy (from another Python thread) runs on the caller alone.
void parallel_run(int threads, int64_t tasks, int64_t grain, void (*run)(void*, int64_t, int), void* context);

}  // namespace g2g
