// How the rows of a call are divided: into chunks that stay in cache, and a chunk into tasks.
#pragma once

#include "parallel.h"

namespace g2g::G2G_ISA {

constexpr int64_t kChunkRows = 800;  // (sample, t) rows of a chunk: 2048 neurons × 800 rows × 4 B = 6.5 MB, L3-sized
constexpr int64_t kGroupRows = 24;   // samples are grouped to at least so many rows: four full register tiles

// Samples of a chunk at least, of a recurrent layer and of layers in a cycle, which run a few steps at a time: each time all
// their weights are read.
constexpr int64_t kStepChunk = 36, kCycleChunk = 72;
constexpr int64_t kMostRows = 1 << 16;  // of a chunk: they are numbered in 16 bits

// Chunks of a batch of samples and groups of samples in them depend on T and on the kind of layers, never on the threads.
struct Chunks {
    int64_t batch, steps, samples, group;
    Chunks(int64_t b, int64_t t, int64_t at_least = 1)
        : batch(b),
          steps(t),
          samples(least(b, most(kChunkRows / t, most(1, least(at_least, kMostRows / t))))),
          group(divide_up(kGroupRows, t)) {}
    int64_t rows() const { return samples * steps; }
};

// (sample, t) rows of a thread in a block of steps, at least: so many pay for reading all weights alone.
constexpr int64_t kPartRows = 64;

// Blocks of `steps` steps, each of which needs all of the one before: f(first sample, samples, threads, number of the first of
// these threads). Each thread has samples of its own, since what it has written another would fetch from its cache in the
// next block; or, where that is too little work, all threads have all samples.
template <class F>
void each_part_of_batch(int64_t batch, int64_t steps, int threads, const F& f) {
    const int64_t part = divide_up(batch, threads);
    if (part * steps < kPartRows) return f(0, batch, threads, 0);
    parallel(threads, divide_up(batch, part), 1,
             [&](int64_t i, int worker) { f(i * part, least(part, batch - i * part), 1, worker); });
}

}  // namespace g2g::G2G_ISA
