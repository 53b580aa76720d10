// The kernels of doubles for one instruction set: compiled as kernels.cpp, with -DG2G_DOUBLE and -DG2G_ISA=<name>_doubles, so that
// vectors hold doubles and everything is in a namespace of its own.
#if !defined(G2G_ISA) || !defined(G2G_DOUBLE)
#error "compile with -DG2G_DOUBLE and -DG2G_ISA=<namespace of this instruction set>_doubles"
#endif

#if !defined(G2G_LEFT_OUT)

#include "list_network.h"

namespace g2g::G2G_ISA {

void list_network_of_doubles(ListNetwork& a, Arena& arena);
void list_network_of_doubles(ListNetwork& a, Arena& arena) { list_network(a, arena); }

}  // namespace g2g::G2G_ISA

#endif
