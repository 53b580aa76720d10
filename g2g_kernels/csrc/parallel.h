// Loops over tasks on the team of threads, what every loop needs, and how a batch is divided into tasks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pool.h"

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

// f(i, k, worker) for all i < count and k < each, those of one i after the other.
template <class F>
void parallel_pairs(int threads, int64_t count, int64_t each, int64_t grain, const F& f) {
    parallel(threads, count * each, grain, [&](int64_t task, int worker) { f(task / each, task % each, worker); });
}

// f(first, last) for parts of 0 … count − 1.
template <class F>
void each_part(int64_t count, int64_t part, int threads, const F& f) {
    parallel(threads, divide_up(count, part), 1, [&](int64_t i, int) { f(i * part, least(count, (i + 1) * part)); });
}

constexpr int64_t kCopied = 1 << 16;  // numbers of a task that only copies or clears them

inline void zero_floats(float* p, int64_t count, int threads) {
    each_part(count, kCopied, threads, [&](int64_t first, int64_t last) { zero(p + first, (last - first) * sizeof(float)); });
}

// --- how the rows of a call are divided: into slices that stay in cache, and a slice into tasks ----------------------

constexpr int64_t kSliceRows = 800;  // (sample, t) rows of a slice: 2048 neurons × 800 rows × 4 B = 6.5 MB, L3-sized
constexpr int64_t kGroupRows = 24;   // samples are grouped to at least so many rows: four full register tiles

// Samples of a slice at least, of a recurrent layer and of layers in a cycle, which run a few steps at a time: each time all
// their weights are read.
constexpr int64_t kStepSlice = 36, kCycleSlice = 72;
constexpr int64_t kCachedCycleSlice = 16, kCachedTiles = 128;  // of a cycle whose weights are at most so many tiles (2 MB)
constexpr int64_t kMostRows = 1 << 16;  // of a slice: they are numbered in 16 bits

// Slices of a batch of samples and groups of samples in them depend on T and on the kind of layers, never on the threads.
struct Slices {
    int64_t batch, steps, at_least = 1;  // so many samples of a slice
    int64_t samples = least(batch, most(kSliceRows / steps, most(1, least(at_least, kMostRows / steps))));
    int64_t group = divide_up(kGroupRows, steps);
    int64_t rows() const { return samples * steps; }
};

// (sample, t) rows of a thread in a block of steps, at least: so many pay for reading all weights alone.
constexpr int64_t kPartRows = 64;

// Blocks of `steps` steps, each of which needs all of the one before: f(first sample, samples, threads, number of the first of
// these threads). Each thread has samples of its own; or, where that is too little work, all threads have all samples.
template <class F>
void each_part_of_batch(int64_t batch, int64_t steps, int threads, const F& f) {
    const int64_t part = divide_up(batch, threads);
    if (part * steps < kPartRows) return f(0, batch, threads, 0);
    parallel(threads, divide_up(batch, part), 1,
             [&](int64_t i, int worker) { f(i * part, least(part, batch - i * part), 1, worker); });
}

}  // namespace g2g::G2G_ISA
