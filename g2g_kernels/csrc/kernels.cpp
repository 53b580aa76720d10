// All kernels for one instruction set: compiled once for each, with -DG2G_ISA=<name> and that set's flags. Everything
// lives in namespace g2g::<name>, so that no function compiled for one CPU can be linked in for another.
#if !defined(G2G_ISA)
#error "compile with -DG2G_ISA=<namespace of this instruction set>"
#endif

#include "interface.h"

#if defined(G2G_LEFT_OUT)  // for a CPU that has a better set, by tests/build_kernels.py

namespace g2g::G2G_ISA {
extern const Kernels kernels;
const Kernels kernels = {};
}  // namespace g2g::G2G_ISA

#else

#include "convolution.h"
#include "graph.h"
#include "image_layer.h"
#include "layout.h"
#include "linear.h"
#include "list_loop.h"
#include "neuron_loop.h"
#include "stack_backward.h"
#include "stack_forward.h"

// what networks.cpp has for the same instruction set
#define G2G_JOINED_(x, y) x##y
#define G2G_JOINED(x, y) G2G_JOINED_(x, y)
#define G2G_NETWORKS                                       \
    void list_network_forward(ListNetwork& a, Arena& arena); \
    void list_network_backward(ListNetwork& a, Arena& arena);
namespace g2g::G2G_ISA {
G2G_NETWORKS
}
namespace g2g::G2G_JOINED(G2G_ISA, _doubles) {
G2G_NETWORKS
}

namespace g2g::G2G_ISA {

#define G2G_TEXT_(x) #x
#define G2G_TEXT(x) G2G_TEXT_(x)

extern const Kernels kernels;
const Kernels kernels = {
    G2G_TEXT(G2G_ISA), kBf16, kOptions, {stack_forward, stack_backward}, {graph_forward, graph_backward},
    {linear_forward, linear_backward}, {convolution_forward, convolution_backward},
    {image_layer_forward, image_layer_backward},
    {list_loop_forward, list_loop_backward}, {neurons_forward, neurons_backward},
    {list_network_forward, list_network_backward},
    {G2G_JOINED(G2G_ISA, _doubles)::list_network_forward, G2G_JOINED(G2G_ISA, _doubles)::list_network_backward}, unpack, unpack_images,
};

}  // namespace g2g::G2G_ISA

#endif
