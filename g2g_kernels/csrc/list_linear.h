// One linear layer with its weights in lists (lists.h): y = x·Wᵀ + b.
//
// Matrices lie by neuron, [neurons][rows of a slice], so that a weight is one multiply-add of all rows:
//
//   y_i = b_i + Σ w_ij·x_j,   ∂x_j = Σ w_ij·∂y_i,   ∂w_ij = x_j·∂y_i
//
// The sums of a neuron stay in registers while its list is read once. Nothing has the size of the matrix.
#pragma once

#include "interface.h"
#include "layout.h"
#include "lists.h"
#include "parallel.h"
#include "vec.h"

namespace g2g::G2G_ISA {

constexpr int64_t kListPanel = 1 << 18;  // floats of a slice of the larger side: 1 MB, the size of an L2 cache;
constexpr int64_t kMostPanel = 1 << 22;  // up to 16 MB, which L3 holds, for slices of
constexpr int64_t kFewRows = 64;         // rows: a weight should be read for several vectors
constexpr int64_t kListOwners = 32;      // lists of a task
constexpr int64_t kSquare = 16;

// Rows of a slice, a multiple of 16, whatever the threads.
inline int64_t list_slice(const Linear& a) {
    const int64_t widest = most(a.lists->owners, a.lists->others);
    const int64_t wanted = most(kListPanel / widest, least(kFewRows, kMostPanel / widest));
    const int64_t fitting = most(least(wanted, 512) / kSquare, 1) * kSquare;
    return least(fitting, divide_up(most(1, a.rows), kSquare) * kSquare);
}

// f(first row, its count, first neuron, its count) for squares of a matrix: along the rows of the matrix first, whose pages
// and lines follow one another.
template <class F>
void for_each_square(int64_t rows, int64_t size, int threads, const F& f) {
    constexpr int64_t kWide = 16 * kSquare;
    each_part(size, kWide, threads, [&](int64_t first, int64_t last) {
        for (int64_t r = 0; r < rows; r += kSquare)
            for (int64_t n = first; n < last; n += kSquare) f(r, least(kSquare, rows - r), n, least(kSquare, last - n));
    });
}

// panel[n][r] = x[first + r][n], 0 beyond the last row; rows of the panel are `slice` apart.
inline void load_by_neuron(const void* matrix, int32_t half, int64_t first, int64_t rows, int64_t size, int64_t slice,
                           int threads, float* panel) {
    with_elements(matrix, half, first * size, [&](const auto* x) {
        for_each_square(slice, size, threads, [&](int64_t r, int64_t, int64_t n, int64_t width) {
            const int64_t height = most(0, least(kSquare, rows - r));
            if constexpr (sizeof *x == sizeof(float))
                if (height == kSquare && width == kSquare)
                    return transpose_16(x + r * size + n, size, panel + n * slice + r, slice);
            for (int64_t k = 0; k < width; ++k)
                for (int64_t i = 0; i < kSquare; ++i)
                    panel[(n + k) * slice + r + i] = i < height ? get(x + (r + i) * size + n + k) : 0.0f;
        });
    });
}

// x[first + r][n] = panel[n][r].
inline void store_by_neuron(const float* panel, int64_t rows, int64_t size, int64_t slice, int threads, void* matrix,
                            int32_t half, int64_t first) {
    with_elements(matrix, half, first * size, [&](auto* x) {
        for_each_square(rows, size, threads, [&](int64_t r, int64_t height, int64_t n, int64_t width) {
            if constexpr (sizeof *x == sizeof(float))
                if (height == kSquare && width == kSquare)
                    return transpose_16(panel + n * slice + r, slice, x + r * size + n, size);
            for (int64_t i = 0; i < height; ++i)
                for (int64_t k = 0; k < width; ++k) put(x + (r + i) * size + n + k, panel[(n + k) * slice + r + i]);
        });
    });
}

// A list of weights and what they multiply.
struct WeightedRows {
    const Lists& lists;
    int32_t range;
    int64_t owner;
    const float *values, *all_rows;
    int64_t slice;
    const int64_t first = lists.of_range(range)[owner], count = lists.of_range(range)[owner + 1] - first;
    const Numbers other = lists.other().from(first);
    const int32_t* place = lists.place.data() + first;
    const float* panel = all_rows + int64_t{range} * lists.length * slice;

    // out[0 … V·W − 1] = start + Σ weight · row, from column `at` on; += in ranges but the first.
    template <int V>
    void sum(float start, int64_t at, float* out) const {
        Vec acc[V];
        unrolled<V>([&](auto v) { acc[v] = range ? load(out + at + v * W) : all(start); });
        for (int64_t e = 0; e < count; ++e) {
            const Vec weight = all(values[place[e]]);
            const float* row = panel + int64_t{other[e]} * slice + at;
            unrolled<V>([&](auto v) { acc[v] = fma(weight, load(row + v * W), acc[v]); });
        }
        unrolled<V>([&](auto v) { store(out + at + v * W, acc[v]); });
    }

    // The same for a whole row.
    void sum_row(float start, float* out) const {
        int64_t at = 0;
        for (; at + 8 * W <= slice; at += 8 * W) sum<8>(start, at, out);
        if (at + 4 * W <= slice) sum<4>(start, at, out), at += 4 * W;
        for (; at < slice; at += W) sum<1>(start, at, out);
    }

    // grad[place] += x · row, for N weights from entry e on.
    template <int N>
    void dot_products(const float* x, int64_t e, float* grad) const {
        Vec dot[4] = {};
        for (int64_t at = 0; at < slice; at += W) {
            const Vec of_x = load(x + at);
            unrolled<N>([&](auto k) { dot[k] = fma(of_x, load(panel + int64_t{other[e + k]} * slice + at), dot[k]); });
        }
        float sums[4];
        sums_of(dot, sums);
        for (int k = 0; k < N; ++k) grad[place[e + k]] += sums[k];
    }

    // The same for all weights.
    void products(const float* x, float* grad) const {
        int64_t e = 0;
        for (; e + 4 <= count; e += 4) dot_products<4>(x, e, grad);
        for (; e < count; ++e) dot_products<1>(x, e, grad);
    }
};

inline void list_linear_forward(Linear& a, Arena& arena) {
    const Lists& lists = *a.lists;
    const int64_t slice = list_slice(a), inputs = lists.others, outputs = lists.owners;
    float* x = arena.take<float>(inputs * slice);
    float* y = arena.take<float>(outputs * slice);
    if (!arena.base) return;
    for (int64_t begin = 0; begin < a.rows; begin += slice) {
        const int64_t rows = least(slice, a.rows - begin);
        load_by_neuron(a.x, a.x_half, begin, rows, inputs, slice, a.threads, x);
        each_part(outputs, kListOwners, a.threads, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i)
                for (int32_t range = 0; range < lists.ranges; ++range)
                    WeightedRows{lists, range, i, a.values, x, slice}.sum_row(a.bias ? a.bias[i] : 0.0f, y + i * slice);
        });
        store_by_neuron(y, rows, outputs, slice, a.threads, a.y, a.y_half, begin);
    }
}

inline void list_linear_backward(Linear& a, Arena& arena) {
    const Lists& lists = *a.lists;
    const int64_t slice = list_slice(a), inputs = lists.owners, outputs = lists.others;
    float* x = arena.take<float>(inputs * slice);
    float* grad_y = arena.take<float>(outputs * slice);
    float* grad_x = arena.take<float>(a.grad_x ? inputs * slice : 0);
    double* bias = arena.take<double>(outputs);
    if (!arena.base) return;
    zero(bias, outputs * sizeof(double));
    if (a.grad_values) zero_floats(a.grad_values, a.weights, a.threads);  // padding of units too
    for (int64_t begin = 0; begin < a.rows; begin += slice) {
        const int64_t rows = least(slice, a.rows - begin);
        load_by_neuron(a.grad_y, a.y_half, begin, rows, outputs, slice, a.threads, grad_y);
        if (a.grad_values) load_by_neuron(a.x, a.x_half, begin, rows, inputs, slice, a.threads, x);
        if (a.grad_bias)
            parallel(a.threads, outputs, 64, [&](int64_t i, int) {
                for (int64_t at = 0; at < slice; at += W) bias[i] += sum_of(load(grad_y + i * slice + at));
            });
        each_part(inputs, kListOwners, a.threads, [&](int64_t first, int64_t last) {
            for (int64_t j = first; j < last; ++j)
                for (int32_t range = 0; range < lists.ranges; ++range) {
                    const WeightedRows list{lists, range, j, a.values, grad_y, slice};
                    if (a.grad_x) list.sum_row(0.0f, grad_x + j * slice);
                    if (a.grad_values) list.products(x + j * slice, a.grad_values);
                }
        });
        if (a.grad_x) store_by_neuron(grad_x, rows, inputs, slice, a.threads, a.grad_x, a.x_half, begin);
    }
    for (int64_t i = 0; a.grad_bias && i < outputs; ++i) a.grad_bias[i] = static_cast<float>(bias[i]);
}

}  // namespace g2g::G2G_ISA
