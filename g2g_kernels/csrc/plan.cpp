#include "plan.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace g2g {

namespace {

bool valid(const Side& side) {
    if (side.size < 1 || side.num_units < 1 || side.width < 1) return false;
    if (side.bounds[0] != 0 || side.bounds[side.num_units] != side.size) return false;
    std::vector<bool> seen(side.size, false);
    for (int32_t u = 0; u < side.num_units; ++u) {
        const int32_t begin = side.bounds[u], end = side.bounds[u + 1];
        if (end < begin || end - begin > side.width) return false;
        for (int32_t i = begin; i < end; ++i) {
            const int64_t neuron = side.order[i];
            if (neuron < 0 || neuron >= side.size || seen[neuron]) return false;
            seen[neuron] = true;
        }
    }
    return true;
}

// Where unit range u of an axis of that unit width starts, in lanes.
struct Placing {
    int32_t width;
    int32_t per_block = std::max(1, kLanes / width);  // ranges side by side in a block
    int32_t blocks_each = (width - 1) / kLanes + 1;   // blocks that one range spans
    int32_t operator()(int32_t u) const { return u / per_block * blocks_each * kLanes + u % per_block * width; }
    int64_t blocks(int64_t units) const { return (units + per_block - 1) / per_block * blocks_each; }
};

bool lay_out(const Side& source, Axis& axis) {
    const Placing place{source.width};
    axis.size = source.size;
    if (place.blocks(source.num_units) * kLanes > INT32_MAX) return false;  // lanes are numbered in 32 bits
    axis.blocks = static_cast<int32_t>(place.blocks(source.num_units));
    axis.neuron.assign(static_cast<size_t>(axis.blocks) * kLanes, -1);
    axis.lane.assign(axis.size, -1);
    for (int32_t u = 0; u < source.num_units; ++u) {
        const int32_t begin = source.bounds[u], end = source.bounds[u + 1];
        for (int32_t i = begin; i < end; ++i) {
            const int64_t neuron = source.order[i];
            const int32_t lane = place(u) + i - begin;
            axis.neuron[lane] = static_cast<int32_t>(neuron);
            axis.lane[neuron] = lane;
        }
    }
    for (int32_t b = 0; b < axis.blocks; ++b) {
        const int32_t* neuron = &axis.neuron[b * kLanes];
        bool run = neuron[0] >= 0;
        for (int32_t i = 1; run && i < kLanes; ++i) run = neuron[i] == neuron[0] + i;
        axis.contiguous.push_back(run ? neuron[0] : -1);
    }
    axis.order.assign(source.order, source.order + source.size);
    axis.bounds.assign(source.bounds, source.bounds + source.num_units + 1);
    axis.strip = source.width == 16 || source.width == 32 ? source.width : kLanes;
    return true;
}

// Numbers 0 … size − 1 in the order of their keys, stably: those of key k are order[first[k]] ….
struct Sorted {
    std::vector<int32_t> first, order;
};

template <class Key>
Sorted sort_by(int32_t keys, size_t size, const Key& key) {
    Sorted result{std::vector<int32_t>(keys + 1, 0), std::vector<int32_t>(size)};
    for (size_t i = 0; i < size; ++i) ++result.first[key(i) + 1];
    std::partial_sum(result.first.begin(), result.first.end(), result.first.begin());
    std::vector<int32_t> next(result.first.begin(), result.first.end() - 1);
    for (size_t i = 0; i < size; ++i) result.order[next[key(i)]++] = static_cast<int32_t>(i);
    return result;
}

constexpr int32_t kGap = 4;  // shorter gaps become part of a run (zeros are stored there): cheaper than a new run

// For every strip of the output side, the runs of source lanes of its units. `by_row`: the output is the rows.
Segments segments(const Plan& plan, bool by_row, const std::vector<char>& skip) {
    const Axis& out = by_row ? plan.rows : plan.cols;
    const int32_t strips = kLanes / out.strip;
    Segments result;
    for (int32_t block = 0; block < out.blocks; ++block) {
        const int32_t begin = (by_row ? plan.row_first : plan.col_first)[block];
        const int32_t end = (by_row ? plan.row_first : plan.col_first)[block + 1];
        std::vector<std::vector<Segment>> runs(strips);
        for (int32_t i = begin; i < end; ++i) {
            const int32_t tile = by_row ? i : plan.col_tile[i];
            if (skip[tile]) continue;
            std::array<std::array<bool, kLanes>, 4> used{};
            for (int64_t p = plan.piece_first[tile]; p < plan.piece_first[tile + 1]; ++p) {
                const Piece& piece = plan.pieces[p];
                const int32_t lane = by_row ? piece.lane_row : piece.lane_col;
                const int32_t length = by_row ? piece.rows : piece.cols;
                const int32_t from = by_row ? piece.lane_col : piece.lane_row;
                const int32_t count = by_row ? piece.cols : piece.rows;
                for (int32_t s = lane / out.strip; s <= (lane + length - 1) / out.strip; ++s)
                    std::fill_n(used[s].begin() + from, count, true);
            }
            for (int32_t s = 0; s < strips; ++s)
                for (int32_t k = 0; k < kLanes; ++k) {
                    if (!used[s][k]) continue;
                    int32_t stop = k + 1;
                    for (int32_t i = k; i < kLanes && i <= stop + kGap; ++i)
                        if (used[s][i]) stop = i + 1;
                    runs[s].push_back({i, by_row ? plan.tile_col[tile] : plan.tile_row[tile], k, stop - k});
                    k = stop;
                }
        }
        for (const auto& strip : runs) {
            result.list.insert(result.list.end(), strip.begin(), strip.end());
            result.end_strip();
        }
    }
    return result;
}

constexpr double kSparseCost = 2.3;  // of a single weight, in weights of a dense tile

// Which tiles the input gradient visits weight by weight: those of units too small for a strip, where that costs less.
std::vector<char> sparse_tiles(const Plan& plan) {
    std::vector<char> sparse(plan.tiles, 0);
    const bool fitting = (plan.unit_rows >= 16) && (plan.cols.strip < kLanes || plan.unit_cols > 32);
    for (int32_t tile = 0; tile < plan.tiles && !fitting; ++tile) {
        int32_t weights = 0;
        for (int64_t p = plan.piece_first[tile]; p < plan.piece_first[tile + 1]; ++p)
            weights += plan.pieces[p].rows * plan.pieces[p].cols;
        sparse[tile] = weights * kSparseCost < kTile;
    }
    return sparse;
}

// The weights of the chosen tiles.
WeightList list_weights(const Plan& plan, const std::vector<char>& chosen, bool by_row) {
    struct Entry {
        int32_t own, other, source;  // lanes, and the index in the packed values
    };
    std::vector<Entry> list;
    for (int32_t tile = 0; tile < plan.tiles; ++tile) {
        if (!chosen[tile]) continue;
        for_each_weight(plan, tile, [&](int64_t source, int32_t lane_row, int32_t lane_col) {
            const int32_t row = plan.tile_row[tile] * kLanes + lane_row, col = plan.tile_col[tile] * kLanes + lane_col;
            list.push_back({by_row ? row : col, by_row ? col : row, static_cast<int32_t>(source)});
        });
    }
    const int32_t rows = plan.rows.blocks * kLanes, cols = plan.cols.blocks * kLanes;
    const Sorted others = sort_by(by_row ? cols : rows, list.size(), [&](size_t i) { return list[i].other; });
    Sorted sorted = sort_by(by_row ? rows : cols, list.size(), [&](size_t i) { return list[others.order[i]].own; });
    WeightList result{std::move(sorted.first), {}, {}};
    for (const int32_t i : sorted.order) {
        result.lane.push_back(list[others.order[i]].other);
        result.source.push_back(list[others.order[i]].source);
    }
    return result;
}

// From the segments of the product that gives row strips.
Granules granules(const Plan& plan) {
    Granules result;
    if (plan.rows.strip == kLanes) return result;
    for (size_t strip = 0; strip + 1 < plan.forward.first.size(); ++strip) {
        const size_t begin = result.list.size();
        for (int32_t i = plan.forward.first[strip]; i < plan.forward.first[strip + 1]; ++i) {
            const Segment& segment = plan.forward.list[i];
            for (int32_t part = segment.lane / kGranule; part * kGranule < segment.lane + segment.count; ++part)
                if (result.list.size() == begin || result.list.back().tile != segment.place || result.list.back().part < part)
                    result.list.push_back({segment.place, part});
        }
        result.end_strip();
    }
    return result;
}

Patches patches(const Plan& plan) {
    constexpr int32_t pairs = kGranules * kGranules;
    Patches result;
    result.place.assign(static_cast<size_t>(plan.tiles) * pairs, -1);
    for (const Piece& piece : plan.pieces)
        for (int32_t col = piece.lane_col / kGranule; col * kGranule < piece.lane_col + piece.cols; ++col)
            for (int32_t row = piece.lane_row / kGranule; row * kGranule < piece.lane_row + piece.rows; ++row)
                result.place[piece.tile * pairs + col * kGranules + row] = 0;
    result.first.push_back(0);
    for (int32_t granule = 0; granule < plan.cols.blocks * kGranules; ++granule) {
        const int32_t block = granule / kGranules;
        for (int32_t i = plan.col_first[block]; i < plan.col_first[block + 1]; ++i)
            for (int32_t row = 0; row < kGranules; ++row) {
                int32_t& place = result.place[plan.col_tile[i] * pairs + granule % kGranules * kGranules + row];
                if (place < 0) continue;
                place = static_cast<int32_t>(result.row.size());
                result.row.push_back(plan.tile_row[plan.col_tile[i]] * kGranules + row);
            }
        result.first.push_back(static_cast<int32_t>(result.row.size()));
    }
    return result;
}

constexpr double kBandCost = 13;  // of a block that is brought into bands or back, in rows of 64 weights

// The rows of 64 weights that cost as much as the product of the input gradient.
double gradient_rows(const Plan& plan) {
    const double strip = plan.cols.strip == 16 ? 1.1 * 16 : plan.cols.strip;  // narrow ones load more for each multiply-add
    double rows = kSparseCost / kLanes * static_cast<double>(plan.sparse.source.size());
    if (!plan.sparse.empty()) rows += kBandCost * (plan.rows.blocks + plan.cols.blocks);
    for (const Segment& segment : plan.backward.list) rows += segment.count * strip / kLanes;
    return rows;
}

// Cost of an event that visits so many lanes, relative to one that visits 64: its place is copied all the same.
double event_cost(int32_t lanes) { return lanes == 16 ? 0.38 : lanes == 32 ? 0.45 : 1; }

// What lists of events cost, in rows of 64 weights of the product: of a granule, and of a strip.
constexpr double kGranuleCost = 0.3, kStripCost = 12;

EventRuns event_runs(const Plan& plan, int32_t width) {
    EventRuns result;
    const int32_t strips = kLanes / width;
    double lists = plan.cols.blocks * strips * kStripCost;
    result.width = width;
    for (int32_t strip = 0; strip < plan.cols.blocks * strips; ++strip) {
        const int32_t block = strip / strips, lane = strip % strips * width;
        const size_t begin = result.list.size();
        for (int32_t i = plan.col_first[block]; i < plan.col_first[block + 1]; ++i) {
            const int32_t tile = plan.col_tile[i], row = plan.tile_row[tile];
            for (int32_t g = 0; g < kGranules; ++g) {
                const int32_t* place = &plan.patches.place[(tile * kGranules + lane / kGranule) * kGranules + g];
                bool used = false;
                for (int32_t col = 0; col < width / kGranule; ++col) used |= place[col * kGranules] >= 0;
                if (!used) continue;
                const auto shift = static_cast<uint16_t>((i - plan.col_first[block] - row) * kLanes);
                const EventRun run{row * kGranules + g, row * kGranules + g + 1, shift};
                result.rows += kGranule * event_cost(width);
                lists += kGranuleCost;
                if (result.list.size() > begin && result.list.back().last == run.first &&
                    result.list.back().shift == run.shift)
                    result.list.back().last = run.last;
                else
                    result.list.push_back(run);
            }
        }
        result.end_strip();
    }
    constexpr double least = 0.05;  // a few events are always fewer than the product
    if (result.rows > 0) result.ratio = std::max(least, (plan.gradient_rows - lists) / result.rows);
    return result;
}

}  // namespace

bool same_order(const Axis& a, const Axis& b) { return a.neuron == b.neuron; }

bool valid(const Side& rows, const Side& cols, const int32_t* unit_row, const int32_t* unit_col, int32_t units) {
    if (!valid(rows) || !valid(cols) || int64_t{units} * rows.width * cols.width > INT32_MAX) return false;
    for (int32_t u = 0; u < units; ++u)
        if (unit_row[u] < 0 || unit_row[u] >= rows.num_units || unit_col[u] < 0 || unit_col[u] >= cols.num_units) return false;
    return true;
}

Plan* build_plan(const Side& rows, const Side& cols, const int32_t* unit_row, const int32_t* unit_col,
                 int32_t units) {
    Plan plan;
    if (!valid(rows, cols, unit_row, unit_col, units) || !lay_out(rows, plan.rows) || !lay_out(cols, plan.cols)) return nullptr;
    if (static_cast<int64_t>(plan.rows.blocks) * plan.cols.blocks > INT32_MAX) return nullptr;
    plan.units = units;
    plan.unit_rows = rows.width;
    plan.unit_cols = cols.width;
    plan.unit_row.assign(unit_row, unit_row + units);
    plan.unit_col.assign(unit_col, unit_col + units);

    // Cut the units into pieces, whose tile is at first a place in the grid of blocks.
    const Placing place_row{rows.width}, place_col{cols.width};
    std::vector<Piece> pieces;
    pieces.reserve(units);
    for (int32_t u = 0; u < units; ++u) {
        const int32_t height = rows.bounds[unit_row[u] + 1] - rows.bounds[unit_row[u]];
        const int32_t breadth = cols.bounds[unit_col[u] + 1] - cols.bounds[unit_col[u]];
        const int32_t row = place_row(unit_row[u]), col = place_col(unit_col[u]);
        for (int32_t r = 0; r < height; r += kLanes)
            for (int32_t c = 0; c < breadth; c += kLanes)
                pieces.push_back({u, (row + r) / kLanes * plan.cols.blocks + (col + c) / kLanes, r, c, (row + r) % kLanes,
                                  (col + c) % kLanes, std::min(height - r, kLanes), std::min(breadth - c, kLanes)});
    }

    // Number the tiles that exist and sort the pieces by tile.
    std::vector<int32_t> number(static_cast<size_t>(plan.rows.blocks) * plan.cols.blocks, -1);
    for (const Piece& piece : pieces) number[piece.tile] = 0;
    for (size_t i = 0; i < number.size(); ++i) {
        if (number[i] < 0) continue;
        number[i] = plan.tiles++;
        plan.tile_row.push_back(static_cast<int32_t>(i / plan.cols.blocks));
        plan.tile_col.push_back(static_cast<int32_t>(i % plan.cols.blocks));
    }
    for (Piece& piece : pieces) piece.tile = number[piece.tile];
    Sorted by_tile = sort_by(plan.tiles, pieces.size(), [&](size_t i) { return pieces[i].tile; });
    plan.pieces.reserve(pieces.size());
    plan.piece_first = std::move(by_tile.first);
    plan.tile_sources.assign(plan.tiles, 0);
    for (const int32_t i : by_tile.order) {
        const Piece& piece = plan.pieces.emplace_back(pieces[i]);
        plan.tile_sources[piece.tile] |= ~uint64_t{0} >> (kLanes - piece.cols) << piece.lane_col;
    }
    plan.row_first = sort_by(plan.rows.blocks, plan.tiles, [&](size_t i) { return plan.tile_row[i]; }).first;
    Sorted by_col = sort_by(plan.cols.blocks, plan.tiles, [&](size_t i) { return plan.tile_col[i]; });
    plan.col_first = std::move(by_col.first), plan.col_tile = std::move(by_col.order);

    plan.forward = segments(plan, true, std::vector<char>(plan.tiles, 0));
    const std::vector<char> sparse = sparse_tiles(plan);
    plan.backward = segments(plan, false, sparse);
    plan.sparse = list_weights(plan, sparse, false);
    if (rows.width < kGranule || cols.width < kGranule) plan.by_row = list_weights(plan, std::vector<char>(plan.tiles, 1), true);
    for (const Segment& segment : plan.forward.list) plan.product_weights += segment.count * plan.rows.strip;
    for (const uint64_t tile : plan.tile_sources) plan.sources += __builtin_popcountll(tile);
    plan.granules = granules(plan);
    plan.patches = patches(plan);
    plan.gradient_rows = gradient_rows(plan);
    plan.event_runs = event_runs(plan, kLanes);
    if (plan.cols.strip < kLanes) {
        EventRuns narrow = event_runs(plan, plan.cols.strip);
        if (narrow.ratio > plan.event_runs.ratio) plan.event_runs = std::move(narrow);
    }
    return new Plan(std::move(plan));
}

}  // namespace g2g
