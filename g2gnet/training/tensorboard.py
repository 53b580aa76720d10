"""TensorBoard curves, histograms and heat maps of a training run: a callback of :func:`run_training`."""

from pathlib import Path
from typing import Any

from g2gnet.base.files import make_directory
from g2gnet.base.messages import reason, warn
from g2gnet.base.optional import optional_package
from g2gnet.inspect import group_density
from g2gnet.training.checkpoints import numbers
from g2gnet.training.trainer import Trainer

#: side of a cell of a heat map, in pixels
CELL = 16


class TensorBoardLog:
    """Writes the results of an epoch to ``log_dir/<stem of the run>``, for ``tensorboard --logdir log_dir``: every
    number of its record; histograms of existing weights, and of parameters with one value per neuron; images of the
    mean |w| between each pair of groups (rows: output groups; white: the largest). A resumed run continues its
    curves. Raises MissingPackageError without the package ``tensorboard``, OSError if the directory cannot be made.
    """

    def __init__(self, log_dir: Path | str) -> None:
        optional_package("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter  # which is slow to import

        self._failed = False
        self._make_writer: Any = SummaryWriter
        self._log_dir = Path(log_dir)
        make_directory(self._log_dir)

    def __call__(self, record: dict[str, Any], trainer: Trainer) -> None:
        """Writes one epoch. If that fails (a full disk, say), warns, and training continues without TensorBoard."""
        if self._failed:
            return
        try:
            self._write(record, trainer)
        except OSError as error:
            self._failed = True
            warn(f"warning: cannot write to {self._log_dir} ({reason(error)}); training continues without TensorBoard")

    def _write(self, record: dict[str, Any], trainer: Trainer) -> None:
        epoch = record["epoch"]
        # purges entries after the epoch from which the run resumes
        with self._make_writer(str(self._log_dir / trainer.settings.stem), purge_step=epoch) as writer:
            for name, value in numbers(record):
                if name != "epoch":
                    writer.add_scalar(name, value, epoch)
            for connection_name, connection in trainer.net.connections().items():
                weights = connection.values.detach()[connection.mask.valid()].float().cpu()
                writer.add_histogram(f"weights/{connection_name}", weights, epoch)
                heat = group_density(connection.mask, connection.values)
                image = (heat / heat.max().clamp(min=1e-12)).float()
                pixels = image.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
                writer.add_image(f"weight between groups/{connection_name}", pixels[None], epoch)
            for number, (_, neurons) in enumerate(trainer.net.layers(), 1):
                for name, tensor in neurons.by_name.items():
                    values = tensor.detach().float().cpu()
                    if values.numel() == 1:
                        writer.add_scalar(f"{name}/lif{number}", values, epoch)
                    else:
                        writer.add_histogram(f"{name}/lif{number}", values, epoch)
