// The table that Python compares with what it knows: the text of the structures, and the options of neurons.
#include "interface.h"

#include <string>

namespace g2g {
namespace {

// A line "name: a b c" of the names whose `wanted` is true (null: all of them).
std::string line(const std::string& name, const char* const* names, int32_t count, const bool* wanted = nullptr) {
    std::string text = name + ":";
    for (int32_t i = 0; i < count; ++i)
        if (!wanted || wanted[i]) text += std::string(" ") + names[i];
    return text + "\n";
}

std::string table(const Options& options) {
    std::string text = std::string("structures: ") + kStructures + "\n", models;
    text += line("resets", kResetNames, sizeof kResetNames / sizeof *kResetNames);
    text += line("surrogates", options.surrogate_names, options.surrogate_count);
    for (int32_t i = 0; i < options.model_count; ++i) {
        const ModelInfo& model = options.models[i];
        const std::string name = model.name;
        models += " " + name;
        text += line(name + ".states", model.state_names, model.states);
        text += line(name + ".parameters", model.parameter_names, model.parameters);
        text += line(name + ".decays", model.parameter_names, model.parameters, model.decays);
    }
    return text + "models:" + models + "\n";
}

}  // namespace

const char* interface_table(const Options& options) {
    static const std::string text = table(options);
    return text.c_str();
}

}  // namespace g2g
