// The C interface that Python loads with ctypes: plans, and the kernels of the best instruction set this CPU has.
//
// A kernel is called twice: with scratch null it returns how many bytes of scratch memory it needs, then it runs.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#if defined(G2G_X86)
#include <cpuid.h>
#endif

#include "interface.h"
#include "lists.h"
#include "plan.h"
#include "pool.h"

namespace g2g {

namespace baseline { extern const Kernels kernels; }
#if defined(G2G_X86)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
#endif

namespace {

#if defined(G2G_X86)
// Whether the processor has what an instruction set needs, and the system saves its registers. `__builtin_cpu_supports` asks the
// compiler's runtime library, and that of zig answers no to everything.
struct Processor {
    bool avx2 = false, avx512 = false, avx512_bf16 = false;

    Processor() {
        unsigned a, b, c, d, basic, saved;
        if (!__get_cpuid(1, &a, &b, &basic, &d) || !(basic & bit_OSXSAVE) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        asm volatile("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
#if defined(__APPLE__)
        saved |= 0xE0;  // macOS saves these registers from their first use on
#endif
        const auto has = [](unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; };
        avx2 = has(saved, 0x06) && has(basic, bit_FMA) && has(b, bit_AVX2);
        avx512 = avx2 && has(saved, 0xE6) && has(b, bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ);
        avx512_bf16 = avx512 && has(c, bit_AVX512VBMI2) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, bit_AVX512BF16);
    }
};
#endif

// The best set that the CPU has; for tests, the one named by G2G_CPU_ISA if the CPU has it.
const Kernels& choose() {
#if defined(G2G_X86)
    const char* asked = std::getenv("G2G_CPU_ISA");
    const auto allowed = [&](const Kernels& k) { return !asked || !*asked || !std::strcmp(asked, k.name); };
    const Processor has;
    if (has.avx512_bf16 && allowed(avx512_bf16::kernels)) return avx512_bf16::kernels;
    if (has.avx512 && allowed(avx512::kernels)) return avx512::kernels;
    if (has.avx2 && allowed(avx2::kernels)) return avx2::kernels;
#endif
    return baseline::kernels;
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

constexpr int64_t kFailed = -1, kTooLarge = -2, kUnknownOption = -3;

// Neurons times rows of a call, a measure of its time: 5 to 10 ns each.
int64_t size(const Stack& s) {
    int64_t neurons = 0;
    for (int32_t l = 0; l < s.count; ++l) neurons += s.layers[l].plan->rows.size;
    return neurons * s.batch * s.steps;
}
// Of the loops of a block, after each of which the threads wait for one another: about four.
int64_t size(const Graph& g) { return 4 * size(g.stack) / std::max(1, g.block_count); }
int64_t size(const Linear& a) {
    return a.rows * (a.lists ? int64_t{a.lists->owners} + a.lists->others : a.plan->rows.size + a.plan->cols.size);
}
int64_t size(const Convolution& a) {
    if (a.sample) return 0;
    return a.images * (int64_t{a.channels} * a.height * a.width + int64_t{a.out_channels} * a.out_height * a.out_width);
}
int64_t size(const ImageLayer& a) { return size(a.convolution) + (a.below ? size(*a.below) : 0); }
int64_t size(const ListLoop& a) { return int64_t{a.samples} * a.size * a.steps; }
int64_t size(const ListNetwork& a) {
    int64_t neurons = 0;
    for (int32_t p = 0; p < a.population_count; ++p) neurons += a.populations[p].size;
    return neurons * a.samples * a.steps;
}
int64_t size(const NeuronLoop& a) { return a.samples * a.size * a.steps; }

template <class Arguments>
int32_t threads(const Arguments& a) { return a.threads; }
int32_t threads(const Graph& g) { return g.stack.threads; }
int32_t threads(const ImageLayer& a) { return a.convolution.threads; }

// body() with OpenMP's threads, unless waking them (50 us) would take as long as the call.
template <class F>
void with_team_for(int64_t size, int32_t threads, const F& body) {
    constexpr int64_t least = 1 << 14;
    with_team(
        size < least ? 1 : threads, [](void* context) { (*static_cast<const F*>(context))(); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// f(first, last) for parts of 0 … count − 1.
template <class F>
void each_part(int64_t count, int32_t threads, const F& f) {
    constexpr int64_t kPart = 1 << 18;
    const auto part = [&](int64_t i) { f(i * kPart, std::min(count, (i + 1) * kPart)); };
    with_team_for(count, threads, [&] {
        parallel_run(
            threads, (count + kPart - 1) / kPart, 1,
            [](void* context, int64_t i, int) { (*static_cast<decltype(part)*>(context))(i); },
            const_cast<void*>(static_cast<const void*>(&part)));
    });
}

template <class Number>
void order_values(const Lists& lists, const void* values, void* ordered, int32_t threads) {
    const auto from = static_cast<const Number*>(values);
    const auto to = static_cast<Number*>(ordered);
    each_part(lists.entries(), threads, [&](int64_t first, int64_t last) {
        for (int64_t e = first; e < last; ++e) to[e] = from[lists.place[e]];
    });
}

template <class Arguments>
int64_t call(void (*kernel)(Arguments&, Arena&), Arguments* arguments, void* scratch) {
    Arena arena{static_cast<char*>(scratch)};
    int64_t failure = 0;
    with_team_for(scratch ? size(*arguments) : 0, threads(*arguments), [&] {
        try {
            kernel(*arguments, arena);
        } catch (const std::length_error&) {
            failure = kTooLarge;
        } catch (const std::out_of_range&) {
            failure = kUnknownOption;
        } catch (const std::exception&) {
            failure = kFailed;
        }
    });
    return failure ? failure : static_cast<int64_t>(arena.used);
}

// A line "name: a b c" of the names whose `wanted` is true (null: all of them).
std::string line(const std::string& name, const char* const* names, int32_t count, const bool* wanted = nullptr) {
    std::string text = name + ":";
    for (int32_t i = 0; i < count; ++i)
        if (!wanted || wanted[i]) text += std::string(" ") + names[i];
    return text + "\n";
}

// What Python must agree with, a line each: the structures, and the names of all options in their order.
std::string interface_table(const Options& options) {
    std::string text = std::string("structures: ") + kStructures + "\n", models;
    text += line("resets", kResetNames, std::size(kResetNames));
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

G2G_EXPORT int32_t g2g_abi() { return 10; }
// The table that Python compares with what it knows; nullptr if memory runs out.
G2G_EXPORT const char* g2g_interface() try {
    static const std::string text = interface_table(kernels().options);
    return text.c_str();
} catch (const std::exception&) {
    return nullptr;
}
G2G_EXPORT const char* g2g_isa() { return kernels().name; }
// The address of GOMP_parallel in the OpenMP runtime to run on, or null; see use_openmp().
G2G_EXPORT void g2g_use_openmp(GompParallel parallel, double share) { use_openmp(parallel, share); }
G2G_EXPORT int32_t g2g_has_bf16() { return kernels().bf16; }

// nullptr if an index is out of range or memory runs out.
G2G_EXPORT Plan* g2g_plan_new(const Side* rows, const Side* cols, const int32_t* unit_row, const int32_t* unit_col,
                              int32_t units) try {
    return build_plan(*rows, *cols, unit_row, unit_col, units);
} catch (const std::exception&) {
    return nullptr;
}

G2G_EXPORT void g2g_plan_free(Plan* plan) { delete plan; }

// 1 if the plan was built from these coordinates and sides (a mask's buffers change in place).
G2G_EXPORT int32_t g2g_plan_matches(const Plan* plan, const int32_t* unit_row, const int32_t* unit_col, const int64_t* row_order,
                                    const int32_t* row_bounds, const int64_t* col_order, const int32_t* col_bounds) {
    const auto same = [](const auto& built_from, const auto* now) {
        return std::equal(built_from.begin(), built_from.end(), now);
    };
    return same(plan->unit_row, unit_row) && same(plan->unit_col, unit_col) && same(plan->rows.order, row_order) &&
           same(plan->rows.bounds, row_bounds) && same(plan->cols.order, col_order) && same(plan->cols.bounds, col_bounds);
}

// 1 if the spike words of `lower`'s outputs are in the order that `upper` reads.
G2G_EXPORT int32_t g2g_plans_aligned(const Plan* lower, const Plan* upper) {
    return same_order(lower->rows, upper->cols);
}

// 1 if the outputs of both are in the same order.
G2G_EXPORT int32_t g2g_plans_same_rows(const Plan* one, const Plan* other) {
    return same_order(one->rows, other->rows);
}

// nullptr if an index is out of range or memory runs out.
G2G_EXPORT Lists* g2g_lists_new(const Side* rows, const Side* cols, const int32_t* unit_row, const int32_t* unit_col,
                                int32_t units, int32_t by_rows, int32_t length) try {
    return build_lists(*rows, *cols, unit_row, unit_col, units, by_rows, length);
} catch (const std::exception&) {
    return nullptr;
}

G2G_EXPORT void g2g_lists_free(Lists* lists) { delete lists; }

// 1 if the lists were built from these coordinates and sides.
G2G_EXPORT int32_t g2g_lists_match(const Lists* lists, const Side* rows, const Side* cols, const int32_t* unit_row,
                                   const int32_t* unit_col, int32_t units) {
    return lists->fingerprint == fingerprint(*rows, *cols, unit_row, unit_col, units);
}

// Packed values, doubles or floats, in the order of the lists.
G2G_EXPORT void g2g_lists_order(const Lists* lists, const void* values, void* ordered, int32_t doubles, int32_t threads) {
    (doubles ? order_values<double> : order_values<float>)(*lists, values, ordered, threads);
}

// 64 bits that other numbers have with a probability of 2⁻⁶⁴, of `count` words of 4 bytes.
G2G_EXPORT uint64_t g2g_digest(const uint32_t* words, int64_t count, int32_t threads) {
    std::atomic<uint64_t> sum{0};
    each_part(count, threads, [&](int64_t first, int64_t last) { sum += digest(words, first, last); });
    return sum;
}

// Room for the spikes of so many populations and samples; nullptr if memory runs out.
G2G_EXPORT Spikes* g2g_spikes_new(int64_t count) try {
    return new Spikes{std::vector<SampleSpikes>(count)};
} catch (const std::exception&) {
    return nullptr;
}
G2G_EXPORT void g2g_spikes_free(Spikes* spikes) { delete spikes; }
G2G_EXPORT int64_t g2g_spikes_count(const Spikes* spikes, int64_t number) {
    return static_cast<int64_t>(spikes->of[number].neurons.size());
}
// Moves them to counts [T], neurons [count] and, of gradient events, values [count], else null. Each list is freed before the next one.
G2G_EXPORT void g2g_spikes_take(Spikes* spikes, int64_t number, int32_t* counts, int32_t* neurons, char* values) {
    SampleSpikes& of = spikes->of[number];
    const auto take = [](auto& list, auto* to) {
        std::copy(list.begin(), list.end(), to);
        std::remove_reference_t<decltype(list)>().swap(list);
    };
    take(of.counts, counts), take(of.neurons, neurons);
    if (values) take(of.values, values);
}

// pass: 0 forward, 1 backward.
G2G_EXPORT int64_t g2g_stack(Stack* a, int32_t pass, void* scratch) { return call(kernels().stack[pass], a, scratch); }
G2G_EXPORT int64_t g2g_graph(Graph* a, int32_t pass, void* scratch) { return call(kernels().graph[pass], a, scratch); }
G2G_EXPORT int64_t g2g_linear(Linear* a, int32_t pass, void* scratch) { return call(kernels().linear[pass], a, scratch); }
G2G_EXPORT int64_t g2g_convolution(Convolution* a, int32_t pass, void* scratch) {
    return call(kernels().convolution[pass], a, scratch);
}
G2G_EXPORT int64_t g2g_image_layer(ImageLayer* a, int32_t pass, void* scratch) {
    return call(kernels().image_layer[pass], a, scratch);
}
G2G_EXPORT int64_t g2g_list_loop(ListLoop* a, int32_t pass, void* scratch) { return call(kernels().list_loop[pass], a, scratch); }
G2G_EXPORT int64_t g2g_list_network(ListNetwork* a, int32_t pass, void* scratch) {
    return call((a->doubles ? kernels().list_network_of_doubles : kernels().list_network)[pass], a, scratch);
}
G2G_EXPORT int64_t g2g_neurons(NeuronLoop* a, int32_t pass, void* scratch) { return call(kernels().neurons[pass], a, scratch); }

G2G_EXPORT void g2g_unpack(const Plan* plan, const uint64_t* words, int32_t batch, int32_t steps, int32_t threads,
                           float* spikes) {
    with_team_for(int64_t{batch} * steps * plan->rows.size, threads,
                  [&] { kernels().unpack(*plan, words, steps, batch, steps, threads, spikes); });
}

G2G_EXPORT void g2g_unpack_images(const uint64_t* words, int64_t count, int32_t pixels, int32_t channels, int32_t last,
                                  int32_t threads, float* spikes) {
    with_team_for(count * pixels * channels, threads,
                  [&] { kernels().unpack_images(words, count, pixels, channels, last, threads, spikes); });
}

}  // namespace g2g
