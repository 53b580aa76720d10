"""The network of a training run, from its checkpoint."""

import logging
from pathlib import Path

import torch

from g2g_kernels import select_device
from g2g_kernels.dispatch import require_backend
from g2gnet.network import G2GNet

logger = logging.getLogger("g2gnet")


def load(checkpoint: Path | str, device: torch.device | str = "cpu", backend: str | None = None) -> G2GNet:
    """The network that ``train.py`` or ``crossval.py`` saved, in evaluation mode.

    It is the one after the last finished epoch; of a run that was stopped inside an epoch, the one of that step, which
    was never tested, as the logger ``g2gnet`` warns. ``net(x)`` scales, standardises and encodes samples [B, D] as the
    run did; images of uint8 become samples by :func:`g2gnet.data.as_samples`. It computes in float32: a run with
    ``precision="bf16"`` classified under ``torch.autocast``. Nothing in the file is executed.

    Args:
        checkpoint: the ``.pth`` file, of a finished run or not.
        device: where the network is to be; ``"auto"`` takes the fastest.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.

    Raises:
        ValueError: for an unknown device or backend, or a device that this machine does not have.
        BackendError: for a backend that cannot be used here.
        CheckpointError: if the file is missing, damaged, or not the checkpoint of a training run.

    Example:
        >>> net = load("checkpoints/fashionmnist-mini_mixer_p0.15_T5_current.pth")
        >>> net(torch.rand(2, 784)).shape
        torch.Size([2, 10])
    """
    from g2gnet.training import read_run  # which imports this package

    device = select_device(device) if isinstance(device, str) else device
    require_backend(backend)
    run = read_run(checkpoint)
    if run.interrupted:
        logger.warning(
            "%s was saved %s: no accuracy in its history is that of this network; run its command again to finish the "
            "epoch", run.path, run.position,
        )  # fmt: skip
    return run.network(device, backend).eval()
