// Networks in lists, for one instruction set: compiled as kernels.cpp, and once more with -DG2G_DOUBLE and -DG2G_ISA=<name>_doubles, so
// that vectors hold doubles and everything is in a namespace of its own.
#if !defined(G2G_ISA)
#error "compile with -DG2G_ISA=<namespace of this instruction set>, or with -DG2G_DOUBLE and <namespace>_doubles"
#endif

#if !defined(G2G_LEFT_OUT)

#include "list_gradients.h"
#include "list_network.h"

namespace g2g::G2G_ISA {

void list_network_forward(ListNetwork& a, Arena& arena);
void list_network_backward(ListNetwork& a, Arena& arena);
void list_network_forward(ListNetwork& a, Arena& arena) { list_network(a, arena); }
void list_network_backward(ListNetwork& a, Arena& arena) { list_gradients(a, arena); }

}  // namespace g2g::G2G_ISA

#endif
