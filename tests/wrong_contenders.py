"""Contenders for the benchmarks' gate, which imports them by name in processes of their own."""

from benchmarks.ours import Network


class HalfTheGradient(Network):
    """A wrong contender: one of its gradients is half of what it should be."""

    def gradients(self):
        gradients = super().gradients()
        return {**gradients, "lif1.threshold": gradients["lif1.threshold"] / 2}


class CannotBeBuilt(Network):
    """A contender that says it cannot do this."""

    def build(self, prepared):
        raise RuntimeError("there is no such instruction here")
