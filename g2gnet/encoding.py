"""From real-valued samples to what the first layer receives at each time step."""

import torch

ENCODINGS = ("current", "rate")


def encode(
    x: torch.Tensor,
    enc: str,
    steps: int,
    scale: float = 1.0,
    bias: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Encodes samples x [B, D] as input currents, with x' = scale·x + bias.

    ``"current"``: x' itself, [B, D], held at every step. ``"rate"``: spikes [steps, B, D], Bernoulli with probability
    clamp(x', 0, 1), drawn anew at each step from ``generator`` (PyTorch's global one if None; its device may differ
    from x's).

    Raises:
        ValueError: for an unknown encoding.
    """
    if enc not in ENCODINGS:
        raise ValueError(f"enc={enc!r} is unknown; choose one of {', '.join(ENCODINGS)}")
    x = x * scale + bias
    if enc == "current":
        return x
    device = generator.device if generator is not None else x.device
    draws = torch.rand((steps, *x.shape), generator=generator, device=device, dtype=x.dtype).to(x.device)
    return (draws < x).to(x.dtype)
