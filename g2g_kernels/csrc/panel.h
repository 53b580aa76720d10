// Panels: the dense sides of products, in lane order.
#pragma once

#include "interface.h"
#include "layout.h"
#include "parallel.h"

namespace g2g::G2G_ISA {

// [blocks][rows][64], in float32 or bfloat16.
template <class T>
struct Panel {
    T* data = nullptr;
    int64_t rows = 0;
    T* at(int64_t block, int64_t row) const { return data + (block * rows + row) * kLanes; }
    operator Panel<const T>() const { return {data, rows}; }
};

// A panel in float32, and in bfloat16 beside it where products take that.
struct DualPanel {
    Panel<float> floats;
    Panel<uint16_t> halves;

    DualPanel() = default;
    DualPanel(int64_t blocks, int64_t rows, bool bf16, Arena& arena)
        : floats{arena.take<float>(blocks * rows * kLanes), rows} {
        if (bf16) halves = {arena.take<uint16_t>(blocks * rows * kLanes), rows};
    }

    // Fills the bfloat16 panel, if there is one, from the first rows of the other.
    void convert(int64_t blocks, int64_t rows, int threads) const {
        if (!halves.data) return;
        parallel(threads, blocks, 1, [&](int64_t block, int) {
            convert_bf16(floats.at(block, 0), rows * kLanes, halves.at(block, 0));
        });
    }
};

}  // namespace g2g::G2G_ISA
