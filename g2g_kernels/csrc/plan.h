// The kernels' own view of a BlockMask: a grid of 64 × 64 tiles.
//
// Each side of the weight matrix is laid out in *lanes*: blocks of 64 places, each holding whole unit ranges (several
// small ones side by side, or a part of one larger than 64), padded where they do not fill it. One block of source
// neurons is one 64-bit spike word. A tile exists where at least one unit lies in it; weights of a tile that belong to
// no unit are stored as zeros. Tiles are numbered by (row block, column block), so a row block's tiles are contiguous.
#pragma once

#include <cstdint>
#include <vector>

#include "structures.h"

namespace g2g {

constexpr int kLanes = 64;              // neurons of one block
constexpr int kTile = kLanes * kLanes;  // weights of one tile

struct Axis {
    int32_t size = 0;                 // neurons
    int32_t blocks = 0;               // blocks of 64 lanes
    std::vector<int32_t> neuron;      // [blocks · 64] the neuron of each lane, −1 in padding
    std::vector<int32_t> lane;        // [size] the lane of each neuron
    std::vector<int32_t> contiguous;  // [blocks] n where the block's lanes are neurons n … n + 63 in order, else −1
    int32_t strip = kLanes;           // lanes that always share their units: 16, 32 or 64
    std::vector<int64_t> order;       // the side this was built from
    std::vector<int32_t> bounds;
};

// The part of one unit that lies in one tile.
struct Piece {
    int32_t slot, tile;
    int32_t unit_row, unit_col;  // first row and column inside the unit
    int32_t lane_row, lane_col;  // the same weight's place inside the tile
    int32_t rows, cols;
};

// A run of the sum over k in a product: lanes lane … lane + count − 1 of block `block`. Its weights are in the place-th of
// the product's tiles, which lie by row block in products that give row strips, else by column block (`col_tile`).
struct Segment {
    int32_t place, block, lane, count;
};

// What every strip of an axis has; strip s covers lanes s·strip ….
template <class T>
struct ByStrip {
    std::vector<int32_t> first{0};  // [strips + 1]
    std::vector<T> list;
    void end_strip() { first.push_back(static_cast<int32_t>(list.size())); }
};

// What every output strip of a product sums over.
using Segments = ByStrip<Segment>;

// Weights one by one, by the lane of the sums that they belong to, for products whose vectors are rows of data (batch.h).
struct WeightList {
    std::vector<int32_t> first;   // [lanes + 1] into the entries
    std::vector<int32_t> lane;    // [entries] the lane on the other side, ascending
    std::vector<int32_t> source;  // [entries] index of the weight in the packed values
    bool empty() const { return source.empty(); }
};

constexpr int kGranule = 16;  // lanes
constexpr int kGranules = kLanes / kGranule;

// 16 source lanes of a tile: those from part · 16 on.
struct Granule {
    int32_t tile, part;
};

// The granules that have weights in each strip of the rows.
using Granules = ByStrip<Granule>;

// The 16 × 16 weights between granules of the two sides, where some exist (needed_gradient.h).
struct Patches {
    std::vector<int32_t> first;  // [column granules + 1]
    std::vector<int32_t> row;    // [patches] the granule of the rows, ascending
    std::vector<int32_t> place;  // [tiles][4 of the columns][4 of the rows] which patch, −1: none
};

// Granules first … last − 1 of the rows, whose rows of 64 weights lie one after the other in the order of `col_tile`: that
// of lane i is row i + shift (in 16 bits) from the first tile of the column block on.
struct EventRun {
    int32_t first, last;
    uint16_t shift;
};

// The rows with weights in each strip of the columns, for the input gradient by events.
struct EventRuns : ByStrip<EventRun> {
    int32_t width = kLanes;  // lanes of a strip: fewer than a block's where few rows have weights in all of a block
    double rows = 0;   // of 64 weights that events may have to multiply
    double ratio = 1;  // cost of the product, in rows of 64 weights, per row that events may have to multiply
};

struct Plan {
    Axis rows, cols;
    int32_t units = 0, unit_rows = 0, unit_cols = 0;
    int32_t tiles = 0;
    std::vector<int32_t> tile_row, tile_col;    // [tiles]
    std::vector<uint64_t> tile_sources;         // [tiles] bit i: lane i of the columns has weights in the tile
    std::vector<int32_t> row_first;             // [row blocks + 1]: tiles of a row block
    std::vector<int32_t> col_first, col_tile;   // [column blocks + 1], [tiles]: tiles of a column block, by row
    std::vector<Piece> pieces;                  // by tile
    std::vector<int32_t> piece_first;           // [tiles + 1]
    Segments forward, backward;                 // products that give row strips, and column strips
    Granules granules;                          // of strips narrower than a block
    WeightList sparse;                          // by column lane: weights of tiles with few, for the input gradient
    WeightList by_row;                          // by row lane: all weights, if units are small
    double product_weights = 0;                 // that a forward product multiplies, zeros among them
    int64_t sources = 0;                        // lanes of the columns that have weights in a tile, over all tiles
    EventRuns event_runs;
    Patches patches;
    double gradient_rows = 0;                   // that a backward product multiplies, in rows of 64 weights of a dense tile
    std::vector<int32_t> unit_row, unit_col;    // the coordinates this was built from
};

// Calls f(weight index, lane row, lane column) for every weight of a tile, in the order of the packed values.
template <class F>
inline void for_each_weight(const Plan& plan, int64_t tile, const F& f) {
    for (int64_t p = plan.piece_first[tile]; p < plan.piece_first[tile + 1]; ++p) {
        const Piece& piece = plan.pieces[p];
        for (int32_t r = 0; r < piece.rows; ++r) {
            const int64_t index = (static_cast<int64_t>(piece.slot) * plan.unit_rows + piece.unit_row + r) *
                                      plan.unit_cols + piece.unit_col;
            for (int32_t c = 0; c < piece.cols; ++c) f(index + c, piece.lane_row + r, piece.lane_col + c);
        }
    }
}

// Whether both have the same neurons in the same lanes.
bool same_order(const Axis& a, const Axis& b);

// Whether these describe a mask: the ranges of a side divide its neurons, each of which stands in its order once, and units lie
// between them, with weights that 32 bits number.
bool valid(const Side& rows, const Side& cols, const int32_t* unit_row, const int32_t* unit_col, int32_t units);

// Returns nullptr if an index is out of range.
Plan* build_plan(const Side& rows, const Side& cols, const int32_t* unit_row, const int32_t* unit_col,
                 int32_t units);

}  // namespace g2g
