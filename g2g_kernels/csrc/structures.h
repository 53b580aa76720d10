// The structures that Python fills for a call. This is the only list of their fields: Python reads it here and makes its
// ctypes structures from it (cpu/interface.py), and the library carries its text, so that a library that was compiled
// from another list is refused. A new field is one line here; Python then fills it by its name, and what it does not
// fill is 0 or null.
//
// Layouts, with lanes, blocks and tiles as in plan.h, b the sample and t the time step:
//   spike words  uint64 [samples][blocks][T]             bit i: lane i of the block spiked
//   states       float  [samples][blocks][T][states][64] of every step, in the order of the model
#pragma once

#include <cstdint>

namespace g2g {

struct Plan;
struct Lists;
struct Spikes;

// Defines the structures, and keeps their text without comments.
#define G2G_STRUCTURES(...) \
    __VA_ARGS__             \
    constexpr const char* kStructures = #__VA_ARGS__;

// Only int32_t, int64_t, float, double, pointers, other structures, and arrays of them.
G2G_STRUCTURES(

constexpr int kMostParameters = 6;

// One side of a mask.
struct Side {
    int32_t size, num_units, width;
    const int64_t* order;   // [size] the neurons, group by group
    const int32_t* bounds;  // [num_units + 1] where each unit's range begins in `order`
};

// One number for all neurons, or one per neuron.
struct Parameter {
    const float* value;
    float* grad;  // out, null: not wanted
    int32_t per_neuron;
};

// A population of neurons, without its size. Options are numbered by their order in Python and in neurons.h.
struct Neurons {
    int32_t model, reset, surrogate;
    float alpha;
    Parameter parameters[kMostParameters];  // in the order of the model
};

// A layer of a stack: a connection, the population that it feeds, and that one's recurrent connection. Pointers not needed by
// a call are null.
struct Layer {
    const Plan* plan;
    const float *values, *bias;  // bias null: none
    Neurons neurons;
    uint64_t* spikes;       // out: [B][row blocks][T]
    uint64_t* inputs;       // [B][column blocks][T]: its inputs, if they are spikes; may be the last layer's `spikes`
    const int64_t* delays;  // [in]: by how many steps what each input sends arrives later; null: at once
    float* grad_delays;     // out: [in], if the delays are learned; null: not wanted
    int32_t delay_width;    // σ, how many steps on either side that gradient sees
    const float* sent;      // [sent_steps][B][N]: its neurons' spikes before the first step, for the layer above; null: none
    int32_t sent_steps;
    float* states;          // out, for the backward pass: of every step; null: not kept
    float* currents;        // out, in place of states if the input is held: [row blocks][B][64]; null: not kept
    float* rates;           // out: [N]
    const float* grad_rates;
    float *grad_values, *grad_bias;
    const uint8_t* dropped;  // [B][N], 1 where a neuron stays silent in a sample; null: none does
    double input_rate;      // share of ones among its input spikes: set by the forward pass, read by the backward pass
    const float* state;     // [states][B][N] before the first step; null: zeros
    float* last;            // out: [states][B][N] after the last step; null: not wanted
    const float* grad_last;  // null: zeros
    float* grad_state;      // out, null: not wanted
    float gradient_event_limit;  // 0: its input gradient takes the product; else see gradient_events.h
    const Plan* recurrent;  // V, its lanes on both sides those of the plan's rows; null: none
    const float* recurrent_values;
    float* grad_recurrent;  // out: of its values
};

struct Stack {
    Layer* layers;
    int32_t count, batch, steps, threads, bf16;
    int32_t held;           // x is [B, in], held for all steps
    float event_cost, batch_cost, subset_cost, needed_cost;  // of products by events, with vectors over the batch, by sums of
                            // subsets, and of input gradients where they are needed, relative to what the kernels assume
    const float* x;         // [B, in] or [T, B, in]
    float* counts;          // out: [B, N] of the last layer
    const float* grad_counts;
    float* grad_x;
    int32_t x_spikes;       // in/out: x is spikes, packed in layers[0].inputs
};

// A connection between populations of a graph.
struct Connection {
    const Plan* plan;       // its row lanes are those of the target
    const float* values;
    float* grad_values;     // out
    const int64_t* delays;  // [N of the source]
    float* grad_delays;     // out: [N of the source], if the delays are learned; null: not wanted
    int32_t source, target;
    int32_t delay_width;    // σ, how many steps on either side that gradient sees
};

// What a population of a graph gets from outside, and gives.
struct Outer {
    const float* current;    // [T][B][N], or [B][N], held for all steps
    float* tail;             // out: [tail_steps][B][N], its spikes in the last steps; null: not wanted
    const float* grad_tail;  // null: zeros
    float *grad_current, *grad_sent;  // out, null: not wanted; grad_sent [sent_steps][B][N]
    int32_t held, tail_steps;
};

// Some steps of a population of a graph.
struct GraphBlock {
    int32_t population, first, last;  // last: after the last
};

// Populations that may reach one another (graph.h): a stack without `values`, `bias`, `inputs`, `recurrent` and `x`, of whose
// plans the rows are read.
struct Graph {
    Stack stack;
    const Outer* outer;     // of each population
    const Connection* connections;
    const GraphBlock* blocks;
    int32_t connection_count, block_count;
};

struct Linear {
    const Plan* plan;
    const Lists* lists;     // in place of a plan: by row forward, by column backward
    const float *values, *bias;
    const void *x, *grad_y;
    void *y, *grad_x;
    float *grad_values, *grad_bias;  // out, null: not wanted
    int64_t rows, weights;  // weights: of the packed values, with their padding
    int32_t threads, bf16;  // bf16: factors of products are rounded to bfloat16; not those of lists
    int32_t x_half, y_half;  // x and grad_x, or y and grad_y, are bfloat16, not float
    float event_limit;      // of a plan
};

// A convolution of images, zeros around them.
struct Convolution {
    const float *x, *weight, *bias, *grad_y;  // weight [out][in of a group][kernel rows][kernel columns]
    float *y, *grad_x, *grad_weight;  // out
    int64_t images;
    int32_t channels, out_channels, groups, threads;
    int32_t height, width, out_height, out_width, kernel_rows, kernel_columns;
    int32_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
    int32_t x_last, y_last;   // x and grad_x, or y and grad_y, have the channels last
    float event_cost;         // relative to what the kernels assume
    int32_t y_by_events, grad_x_by_events, grad_weight_by_events;  // in: wanted; out: computed, as events are few enough
    int32_t sample;           // only find out, by a few numbers, which of these will be
};

// LIF neurons that are images, the convolution that they receive, and the maxima over windows of their spikes (image_layer.h). A
// frame is an image of a sample in a step: number t · samples + b. Images that only layers read have their channels last, `lanes` of them
// for each pixel, with numbers of no meaning behind the last channel; others are [C][H][W].
struct ImageLayer {
    // of frames of x, or of spikes; with `sample`, only which products are computed by events is found out
    Convolution convolution;
    Neurons neurons;          // with one β and one θ
    int32_t samples, steps, lanes, in_lanes;
    int32_t rows, columns;    // of the neurons, whose current is the maximum over a window of what the convolution gives
    int32_t merged_rows, merged_columns;  // of that window; 1: there is none
    uint8_t* choices;         // out: which of its window, [frames][pixels][lanes]; null: not wanted
    int32_t window_rows, window_columns, pooled_rows, pooled_columns;
    uint64_t* inputs;         // the spikes that it receives, [frames][pixels][words]; null: x is given
    const float* current;     // in place of a convolution, images of all frames, or `held` of all samples; null: there is one
    int32_t held;
    uint64_t *spikes, *pooled;  // out: [frames][pixels][words], and behind the windows; pooled null: there are none
    float* states;            // out: the membranes of every frame, [frames][pixels][lanes]; null: not wanted
    float* rates;             // out: [N]
    float* last;              // out: [samples][N]
    const float* state;       // [samples][N] before the first step; null: zeros
    // the backward pass, of the samples from `first` on, `count` of them, as frames t · count + b − first
    int32_t first, count;
    ImageLayer* below;        // the layer that it receives, whose pass runs with this one, sample by sample; null: none
    const float* grad_spikes;  // without a layer above, [frames][pixels behind the windows][lanes]; null: zeros, or
    const float* grad_sent;   // [steps][samples][channels][pixels behind the windows]
    const float *grad_rates, *grad_last;  // null: zeros
    float *grad_weight, *grad_bias;  // in and out: this is added; null: not wanted
    float* grad_current;      // out, null: not wanted; images of frames t · current_samples + b − first, or `held` of samples b − first
    int32_t current_samples;
    float* grad_state;        // out, null: not wanted
    double* grad_neurons;     // in and out: of β and of θ, this is added; null: not wanted
};

// Neurons that are joined to one another by weights in lists, which carry spikes some steps on.
struct ListLoop {
    Neurons neurons;
    const Lists* by_cols;   // in one range
    const float* weights;   // [entries], in the order of the lists
    const float* current;   // [T][B][N], or [B][N], held for all steps
    const float* to_membrane;  // the same, onto the membrane; null: nothing
    int64_t values;         // of the packed weights, with their padding
    int32_t size, samples, steps, threads, held, membrane_held;
    int32_t delay;          // D, 1 at least
    int32_t width, window;  // samples of a group and steps of a window, backward: powers of 2, 16 lanes in all at most, D steps at most
    const float* sent;      // [D][B][N]: the spikes before the first step; null: none
    const uint8_t* dropped; // [B][N], 1 where nothing comes from a neuron in a sample; null: none is
    const float* state;     // [states][B][N] before the first step; null: zeros
    float *spikes, *last;   // out: [T][B][N], or [B][N], summed over the steps, [states][B][N]
    int32_t summed;
    uint64_t* words;        // out: [T][B][N / 64, rounded up], the spikes as bits
    float* kept;            // out, for the backward pass: [T][B][states][N, rounded up to whole words]; null: not wanted
    const float *grad_spikes, *grad_last;  // null: zeros
    int32_t grad_held;      // grad_spikes is [B][N], the same for all steps
    float *grad_current, *grad_membrane, *grad_sent, *grad_state, *grad_values;  // out, null: not wanted
};

// A connection of a network in lists. Numbers behind `void` pointers are floats, or doubles with `doubles`.
struct ListConnection {
    const Lists* lists;     // by column, in one range
    const void* weights;    // [entries], in the order of the lists
    const void* bias;       // [N of the target], null: none
    const int64_t* delays;  // [N of the source], null: `least` for all
    int32_t least, most;    // the bounds of all delays
    int32_t source, target;  // source −1: the inputs
    int32_t to_membrane;
    void *grad_values, *grad_bias;  // out, null: not wanted; [values] as they are packed, [N of the target]
    int64_t values;
};

struct ListPopulation {
    Neurons neurons;
    const uint8_t* dropped;  // [B][N], 1 where nothing comes from a neuron in a sample; null: none is
    const void* state;      // [states][B][N] before the first step; null: zeros
    const void* sent;       // [sent_steps][B][N], what it sent before the first step; null: nothing
    void* last;             // out: [states][B][N] after the last step
    int32_t size, sent_steps;
    const int32_t* shown;   // [shown_count], neurons
    void* membranes;        // out: [T][B][shown_count], theirs after each step
    int32_t shown_count;
    // Gradient events are the steps in which a neuron's surrogate derivative is not 0: |U − θ| < slack; 0: none are noted. The backward
    // pass is given them, and spikes: how many in each sample and step, [B][T], and these in order.
    float slack;
    const int32_t *spike_counts, *spike_neurons, *event_counts, *event_neurons;
    const void* slopes;     // of each gradient event, the surrogate derivative
    const void *grad_rates, *grad_last, *grad_tail;  // null: zeros; of a spike in any step [B][N]; [states][B][N]; of one in the last
    int32_t tail_steps;                              // steps [tail_steps][B][N]
    void *grad_state, *grad_sent;  // out, null: not wanted
};

// Populations whose connections are lists (list_network.h, list_gradients.h).
struct ListNetwork {
    const ListPopulation* populations;
    const ListConnection* connections;
    const int32_t* order;   // in which populations receive in a step: one that another reaches without a delay comes after it
    const void* x;          // [T][B][in], or [B][in], held for all steps; or of each input event its number
    const int32_t *input_counts, *input_neurons;  // input events: how many in each sample and step, [B][T], and these in order; null: none
    const void* before;     // [before_steps][B][in], the inputs before the first step; null: none
    Spikes *spikes, *events;  // out: of each population and sample; gradient events with U − θ, null: not wanted
    int32_t population_count, connection_count, inputs, samples, steps, before_steps, threads, held;
    int32_t doubles;
    void *grad_x, *grad_before;  // out, null: not wanted
    int32_t truncate;       // at each multiple of so many steps, states and delayed spikes are constants; 0: never
    float visit_cost;       // a factor on what visits to neurons are assumed to cost; 0: always these, infinity: never
};

// Neurons alone.
struct NeuronLoop {
    Neurons neurons;
    const float* current;   // [T][samples][N], or [samples][N], held for all steps
    int64_t samples;        // everything between T and N
    int32_t size, steps, threads, held;  // size = N
    int32_t every;          // `kept` has the states after every `every` steps, except the last
    float *spikes, *kept;   // kept: [(T − 1) / every][states][samples][N], null: not wanted
    const float* state;     // [states][samples][N] before the first step; null: zeros
    float* last;            // out: [states][samples][N] after the last step; null: not wanted
    const float *grad_spikes, *grad_last;  // grad_last null: zeros
    float *grad_current, *grad_state;      // grad_state: out, null: not wanted
};

)

}  // namespace g2g
