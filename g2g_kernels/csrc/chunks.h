// How the rows of a call are divided: into chunks that stay in cache, and a chunk into tasks.
#pragma once

#include "parallel.h"

namespace g2g::G2G_ISA {

constexpr int64_t kChunkRows = 800;  // (sample, t) rows of a chunk: 2048 neurons × 800 rows × 4 B = 6.5 MB, L3-sized
constexpr int64_t kGroupRows = 24;   // samples are grouped to at least so many rows: four full register tiles

constexpr int64_t kStepChunk = 36;   // samples of a chunk of a recurrent layer, which runs step by step: each step reads
                                     // all its weights
constexpr int64_t kMostRows = 1 << 16;  // of a chunk: they are numbered in 16 bits

// Chunks of a batch of samples and groups of samples in them depend on T alone (and on whether a layer is recurrent), never
// on the threads.
struct Chunks {
    int64_t batch, steps, samples, group;
    Chunks(int64_t b, int64_t t, bool recurrent = false)
        : batch(b), steps(t), samples(least(b, most(1, kChunkRows / t))), group(divide_up(kGroupRows, t)) {
        if (recurrent) samples = most(samples, least(b, least(kStepChunk, kMostRows / t)));
    }
    int64_t rows() const { return samples * steps; }
};

}  // namespace g2g::G2G_ISA
