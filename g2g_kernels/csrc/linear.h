// One linear layer alone: y = x·Wᵀ + b on rows in neuron order, in slices of 800 rows that stay in cache. Rows that turn
// out to be spikes (0 and 1 only, at a low rate) take the event-driven products.
#pragma once

#include <optional>

#include "events.h"
#include "input_gradient.h"
#include "interface.h"
#include "layout.h"
#include "list_linear.h"
#include "parallel.h"
#include "product.h"

namespace g2g::G2G_ISA {

struct LinearInput {
    DualPanel panel;
    uint64_t* words;  // [column blocks][rows]
    int64_t* ones;    // [column blocks]
    bool events;      // of the slice loaded last

    LinearInput(const Plan& plan, int64_t rows, bool bf16, Arena& arena)
        : panel(plan.cols.blocks, rows, bf16, arena),
          words(arena.take<uint64_t>(plan.cols.blocks * rows)),
          ones(arena.take<int64_t>(plan.cols.blocks)) {}

    void load(const Linear& a, int64_t begin, int64_t rows) {
        const Axis& axis = a.plan->cols;
        const Rows at{0, 1, a.rows, axis.size};
        with_elements(a.x, a.x_half, begin * axis.size, [&](const auto* x) {
            parallel(a.threads, axis.blocks, 1, [&](int64_t block, int) {
                ones[block] = pack_block(axis, block, x, at, rows, words + block * panel.floats.rows);
            });
        });
        events = true;
        int64_t total = 0;
        for (int64_t block = 0; block < axis.blocks; ++block) {
            events = events && ones[block] != kNoSpikes;
            total += ones[block];
        }
        events = events && total <= a.event_limit * static_cast<double>(rows) * axis.size;
        if (events) return;
        with_elements(a.x, a.x_half, begin * axis.size, [&](const auto* x) {
            parallel(a.threads, axis.blocks, 1,
                     [&](int64_t block, int) { load_block(axis, block, x, at, rows, panel.floats.at(block, 0)); });
        });
        panel.convert(axis.blocks, rows, a.threads);
    }
};

inline void linear_forward(Linear& a, Arena& arena) {
    if (a.lists) return list_linear_forward(a, arena);
    const Plan& plan = *a.plan;
    const Axis& axis = plan.rows;
    const int64_t slice = least(kSliceRows, most(1, a.rows)), group = 2 * kGroupRows;
    float* bias = arena.take<float>(static_cast<size_t>(axis.blocks) * kLanes);
    float* tiles = arena.take<float>(static_cast<size_t>(plan.tiles) * kTile);
    uint16_t* pairs = a.bf16 ? arena.take<uint16_t>(static_cast<size_t>(plan.tiles) * kTile) : nullptr;
    LinearInput input(plan, slice, a.bf16, arena);
    float* scratch = arena.take<float>(group * kLanes * a.threads);
    if (!arena.base) return;

    for (int64_t i = 0; i < axis.blocks * kLanes; ++i)
        bias[i] = a.bias && axis.neuron[i] >= 0 ? a.bias[axis.neuron[i]] : 0.0f;
    load_tiles<kByRow>(plan, a.values, a.threads, tiles);
    if (a.bf16) load_tiles<kByRow>(plan, a.values, a.threads, pairs);
    const SpikeCurrents spikes(plan, tiles);
    const Weights weights{&plan.forward, plan.rows.strip, tiles, pairs, kForwardPartial};
    for (int64_t begin = 0; begin < a.rows; begin += slice) {
        const int64_t rows = least(slice, a.rows - begin), groups = divide_up(rows, group);
        input.load(a, begin, rows);
        parallel_pairs(a.threads, axis.blocks, groups, 2, [&](int64_t r, int64_t part, int worker) {
            const int64_t first = part * group, count = least(group, rows - first);
            float* out = scratch + worker * group * kLanes;
            if (!input.events)
                product(weights, r, input.panel.floats, input.panel.halves, first, count, {bias + r * kLanes, 0}, out);
            for (int64_t i = 0; input.events && i < count; ++i)
                SpikeCurrents::add<EventCurrent>(spikes, r, input.words + first, slice, i, bias + r * kLanes, out + i * kLanes);
            with_elements(a.y, a.y_half, (begin + first) * axis.size, [&](auto* y) {
                store_block(axis, r, out, Rows{0, 1, a.rows, axis.size}, count, y);
            });
        });
    }
}

inline void linear_backward(Linear& a, Arena& arena) {
    if (a.lists) return list_linear_backward(a, arena);
    const Plan& plan = *a.plan;
    const int64_t slice = least(kSliceRows, most(1, a.rows)), R = plan.rows.blocks;
    const int64_t lanes = R * kLanes;
    const DualPanel grad(R, slice, a.bf16 && a.grad_x, arena);
    double* bias = arena.take<double>(lanes);
    std::optional<InputGradient> down;
    if (a.grad_x) down.emplace(plan, a.values, a.bf16, false, arena);
    Bands bands{nullptr, lanes};
    if (down && down->sparse()) bands.data = arena.take<float>(Bands::size(lanes, slice));
    float* grad_tiles = a.grad_values ? arena.take<float>(static_cast<size_t>(plan.tiles) * kTile) : nullptr;
    LinearInput input(plan, slice, false, arena);
    const EventsByLane events(plan.cols.blocks, 1, slice, a.threads, arena);
    float* scratch = arena.take<float>(kTile * a.threads);
    if (!arena.base) return;

    zero(bias, lanes * sizeof(double));
    if (down) down->load_product(a.threads);
    if (a.grad_values) zero_floats(grad_tiles, int64_t{plan.tiles} * kTile, a.threads);
    for (int64_t begin = 0; begin < a.rows; begin += slice) {
        const int64_t rows = least(slice, a.rows - begin);
        parallel(a.threads, R, 1, [&](int64_t r, int) {
            float* panel = grad.floats.at(r, 0);
            with_elements(a.grad_y, a.y_half, begin * plan.rows.size, [&](const auto* grad_y) {
                load_block(plan.rows, r, grad_y, Rows{0, 1, a.rows, plan.rows.size}, rows, panel);
            });
            if (grad.halves.data) convert_bf16(panel, rows * kLanes, grad.halves.at(r, 0));
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t lane = 0; lane < kLanes; ++lane) bias[r * kLanes + lane] += panel[i * kLanes + lane];
        });
        if (a.grad_values) {
            input.load(a, begin, rows);
            if (input.events)
                parallel(a.threads, plan.cols.blocks, 1, [&](int64_t c, int worker) {
                    events.load(c, input.words + c * slice, 1, rows, slice, worker);
                });
            parallel(a.threads, plan.tiles, 2, [&](int64_t tile, int) {
                const float* dy = grad.floats.at(plan.tile_row[tile], 0);
                if (input.events)
                    event_gradient(events, plan, tile, dy, grad_tiles + tile * kTile);
                else
                    outer(input.panel.floats.at(plan.tile_col[tile], 0), dy, rows, grad_tiles + tile * kTile);
            });
        }
        if (!down) continue;
        if (down->sparse()) bands.fill(grad.floats, rows, a.threads);
        down->each_task(rows, kLanes, down->sparse(), a.threads, 1, [&](int64_t block, int64_t row, int64_t height, int worker) {
            float* out = scratch + worker * kTile;
            down->run(block, grad, bands, row, height, out);
            with_elements(a.grad_x, a.x_half, (begin + row) * plan.cols.size, [&](auto* grad_x) {
                store_block(plan.cols, block, out, Rows{0, 1, a.rows, plan.cols.size}, height, grad_x);
            });
        });
    }
    if (a.grad_values) unpack_gradient(plan, grad_tiles, a.threads, a.grad_values);
    if (a.grad_bias)
        for (int64_t i = 0; i < lanes; ++i)
            if (plan.rows.neuron[i] >= 0) a.grad_bias[plan.rows.neuron[i]] = static_cast<float>(bias[i]);
}

}  // namespace g2g::G2G_ISA
