// The table that Python mirrors: offsets and sizes of all fields, the numbers of all options, the neuron models.
#include "interface.h"

#include <string>

namespace g2g {
namespace {

struct Table {
    std::string text;

    void line(const std::string& name, const std::string& value) { text += name + ": " + value + "\n"; }
    void field(const std::string& name, size_t offset, size_t size) {
        line(name, "offset " + std::to_string(offset) + ", size " + std::to_string(size));
    }
};

// A list of the names whose `wanted` is true (null: all of them).
std::string list(const char* const* names, int32_t count, const bool* wanted = nullptr) {
    std::string text;
    for (int32_t i = 0; i < count; ++i)
        if (!wanted || wanted[i]) text += (text.empty() ? "" : " ") + std::string(names[i]);
    return text;
}

#define G2G_STRUCTURE(S) table.line(#S, "size " + std::to_string(sizeof(S)))
#define G2G_FIELD(S, name) table.field(#S "." #name, offsetof(S, name), sizeof(S::name))

void structures(Table& table) {
    G2G_STRUCTURE(AxisSource);
    G2G_FIELD(AxisSource, size);
    G2G_FIELD(AxisSource, num_units);
    G2G_FIELD(AxisSource, width);
    G2G_FIELD(AxisSource, order);
    G2G_FIELD(AxisSource, bounds);

    G2G_STRUCTURE(Parameter);
    G2G_FIELD(Parameter, value);
    G2G_FIELD(Parameter, grad);
    G2G_FIELD(Parameter, per_neuron);

    G2G_STRUCTURE(Neurons);
    G2G_FIELD(Neurons, model);
    G2G_FIELD(Neurons, reset);
    G2G_FIELD(Neurons, surrogate);
    G2G_FIELD(Neurons, alpha);
    G2G_FIELD(Neurons, parameters);

    G2G_STRUCTURE(Layer);
    G2G_FIELD(Layer, plan);
    G2G_FIELD(Layer, values);
    G2G_FIELD(Layer, bias);
    G2G_FIELD(Layer, neurons);
    G2G_FIELD(Layer, spikes);
    G2G_FIELD(Layer, inputs);
    G2G_FIELD(Layer, kept);
    G2G_FIELD(Layer, rates);
    G2G_FIELD(Layer, grad_rates);
    G2G_FIELD(Layer, grad_values);
    G2G_FIELD(Layer, grad_bias);
    G2G_FIELD(Layer, dropped);
    G2G_FIELD(Layer, input_rate);
    G2G_FIELD(Layer, gradient_event_limit);
    G2G_FIELD(Layer, gradient_event_chunks);
    G2G_FIELD(Layer, gradient_event_rate);

    G2G_STRUCTURE(Stack);
    G2G_FIELD(Stack, layers);
    G2G_FIELD(Stack, count);
    G2G_FIELD(Stack, batch);
    G2G_FIELD(Stack, steps);
    G2G_FIELD(Stack, threads);
    G2G_FIELD(Stack, bf16);
    G2G_FIELD(Stack, held);
    G2G_FIELD(Stack, event_limit);
    G2G_FIELD(Stack, batch_cost);
    G2G_FIELD(Stack, x);
    G2G_FIELD(Stack, counts);
    G2G_FIELD(Stack, grad_counts);
    G2G_FIELD(Stack, grad_x);
    G2G_FIELD(Stack, x_spikes);

    G2G_STRUCTURE(Linear);
    G2G_FIELD(Linear, plan);
    G2G_FIELD(Linear, values);
    G2G_FIELD(Linear, bias);
    G2G_FIELD(Linear, x);
    G2G_FIELD(Linear, grad_y);
    G2G_FIELD(Linear, y);
    G2G_FIELD(Linear, grad_x);
    G2G_FIELD(Linear, grad_values);
    G2G_FIELD(Linear, grad_bias);
    G2G_FIELD(Linear, rows);
    G2G_FIELD(Linear, threads);
    G2G_FIELD(Linear, bf16);
    G2G_FIELD(Linear, x_half);
    G2G_FIELD(Linear, y_half);
    G2G_FIELD(Linear, event_limit);

    G2G_STRUCTURE(NeuronLoop);
    G2G_FIELD(NeuronLoop, neurons);
    G2G_FIELD(NeuronLoop, current);
    G2G_FIELD(NeuronLoop, samples);
    G2G_FIELD(NeuronLoop, size);
    G2G_FIELD(NeuronLoop, steps);
    G2G_FIELD(NeuronLoop, threads);
    G2G_FIELD(NeuronLoop, held);
    G2G_FIELD(NeuronLoop, every);
    G2G_FIELD(NeuronLoop, spikes);
    G2G_FIELD(NeuronLoop, kept);
    G2G_FIELD(NeuronLoop, grad_spikes);
    G2G_FIELD(NeuronLoop, grad_current);
}

void options(Table& table) {
    table.line("Reset.subtract", std::to_string(kSubtract));
    table.line("Reset.zero", std::to_string(kZero));
    table.line("Reset.none", std::to_string(kNone));
    table.line("Surrogate.atan", std::to_string(kAtan));
    table.line("Surrogate.fast_sigmoid", std::to_string(kFastSigmoid));
    table.line("Surrogate.sigmoid", std::to_string(kSigmoid));
    table.line("Surrogate.triangle", std::to_string(kTriangle));
    table.line("Surrogate.boxcar", std::to_string(kBoxcar));
}

void neuron_models(Table& table, const ModelInfo* models, int32_t count) {
    for (int32_t i = 0; i < count; ++i) {
        const ModelInfo& model = models[i];
        const std::string name = std::string("Model.") + model.name;
        table.line(name, std::to_string(i));
        table.line(name + ".states", list(model.state_names, model.states));
        table.line(name + ".parameters", list(model.parameter_names, model.parameters));
        table.line(name + ".decays", list(model.parameter_names, model.parameters, model.decays));
    }
}

}  // namespace

const char* interface_table(const ModelInfo* models, int32_t count) {
    static const std::string text = [&] {
        Table table;
        structures(table);
        options(table);
        neuron_models(table, models, count);
        return table.text;
    }();
    return text.c_str();
}

}  // namespace g2g
