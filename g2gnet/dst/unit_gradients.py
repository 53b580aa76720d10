"""The gradients of all units of a layer in a training step, absent ones included, for rules that read them."""

import functools

import torch

from g2g_kernels.ops.g2g_stack.population import ProductObserver
from g2g_kernels.tracing import is_transformed
from g2gnet.dst.rules import Pair

#: the number of the backward pass that is running, −1 outside of one
_backward_pass = torch._C._current_graph_task_id

_BATCHES = "gradients in batches (torch.func.vmap, is_grads_batched, jacobian(vectorize=True))"
_TWICE = "the gradient of a gradient (create_graph=True)"


def _is_batch(gradient: torch.Tensor) -> bool:
    """Whether a tensor stands for several gradients."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(gradient):
        if functorch.is_batchedtensor(gradient):
            return True
        gradient = functorch.get_unwrapped(gradient)
    return functorch.is_legacy_batchedtensor(gradient)


class UnitGradients:
    """Observes a layer in a training step, which may have several backward passes: ∂L/∂W = Σ over samples of g·xᵀ, with
    the inputs x of the layer's products and the gradients g of their outputs. A product counts where a backward pass
    forms the gradient of the layer's weights, not where it forms that of the inputs alone."""

    def __init__(self) -> None:
        self.close()

    def close(self) -> None:
        """Forgets everything. Graphs that someone keeps refer to the inputs through this object alone."""
        #: x and g of each product, and of each read of the dense weight, whose product is with the identity
        self.pairs: list[Pair] = []
        #: a kind of gradient in this step that is not seen
        self.unseen: str | None = None
        #: inputs by the number of their product
        self.inputs: dict[int, torch.Tensor] = {}

    def of_call(self, values: torch.Tensor) -> tuple[torch.Tensor, ProductObserver]:
        """The packed weights for the products of one call, and the observer of these products."""
        if not values.requires_grad:
            return values, lambda _, y: y
        call = _Call(self)
        values = values.view_as(values)
        values.register_hook(call.reach_weights)
        return values, call.observe

    def of_dense(self, weight: torch.Tensor) -> None:
        """Counts the gradient of a dense weight [out, in], or of kernels, that was read."""
        if weight.requires_grad:
            weight.register_hook(self._count_dense)

    def _count_dense(self, gradient: torch.Tensor) -> None:
        if _is_batch(gradient):
            self.unseen = _BATCHES
        else:
            self.pairs.append((torch.eye(gradient.shape[1], device=gradient.device), gradient.detach().transpose(0, 1)))

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of the layer takes no part in the step

    def seen(self) -> list[Pair]:
        """The pairs, as :func:`~g2gnet.dst.rules.unit_gradient` takes them. Raises RuntimeError if gradients of the
        weights were formed in batches, or with ``create_graph=True``: the pairs then lack parts of the gradient."""
        if self.unseen is not None:
            raise RuntimeError(
                f"rules that read gradients do not see {self.unseen} of this step; use grow='random' or 'hebb'"
            )
        return self.pairs


class _Call:
    """The products of one call of a layer. A backward pass reaches their outputs first (:meth:`_reach_output`). If it
    forms the gradient of the weights, it then reaches these (:meth:`reach_weights`), and its pairs count."""

    def __init__(self, gradients: UnitGradients) -> None:
        self._gradients = gradients
        self._called_in = _backward_pass()
        #: by product: the backward pass that may reach the weights, and the pair
        self._reached: dict[int, tuple[int, Pair]] = {}

    def observe(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Notes the input of a product, and returns its output, whose gradient will be noted, too."""
        if not y.requires_grad:  # in the forward pass of chunks
            return y
        product = len(self._gradients.inputs)
        self._gradients.inputs[product] = x.detach().clone()  # the caller may use the memory for the next samples
        # a node of its own has the gradient after all hooks on y, also if y is changed in place
        y = y.clone()
        assert y.grad_fn is not None
        y.grad_fn.register_prehook(functools.partial(self._reach_output, product, _backward_pass()))
        return y

    def _reach_output(self, product: int, computed_in: int, gradients: tuple[torch.Tensor | None, ...]) -> None:
        received, (gradient,) = self._gradients.inputs.get(product), gradients
        if received is None or gradient is None or _is_batch(gradient):
            return
        # a chunk is computed again, and its gradients are formed, in a pass inside the one that reaches the weights
        recomputed = computed_in != self._called_in
        to_weights = computed_in if recomputed else _backward_pass()
        self._reached[product] = to_weights, (received, gradient.detach())
        if torch.is_grad_enabled() and not is_transformed():
            self._gradients.unseen = _TWICE

    def reach_weights(self, gradient: torch.Tensor) -> None:
        """Counts the products whose outputs this backward pass has reached."""
        this = _backward_pass()
        if _is_batch(gradient):
            self._reached.clear()
            self._gradients.unseen = _BATCHES
        self._gradients.pairs.extend(pair for to_weights, pair in self._reached.values() if to_weights == this)
        self._reached.clear()
