"""The peers, one module per library, each in its fastest form.

A module adds its peers by itself: it declares them as literals, so that nobody needs a library that is not there.

    PEERS = (("name", "Class", ("step", "forward")),)   # the class, and the kernels of --kernel that it is timed in
    NEEDS = ("package",)                                # what it imports

A class derives from one in :mod:`benchmarks.contender`: ``NetworkContender`` (step, forward), ``NeuronContender`` (lif,
synaptic), ``LinearContender`` (linear, linear-dense) or ``UpdateContender`` (dst). Its results are compared with the
float64 reference before it is timed.
"""
