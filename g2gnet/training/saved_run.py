"""A training run read from its checkpoint: settings, history, and its initial and current network."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from g2g_kernels import BlockMask, select_device
from g2g_kernels.choices import check_choice
from g2g_kernels.dispatch import require_backend
from g2gnet.encoding import CONTENT, SampleForm
from g2gnet.images import Shape
from g2gnet.network import G2GNet
from g2gnet.network_settings import SettingsError
from g2gnet.notation import placed
from g2gnet.training.checkpoints import CheckpointError, read_checkpoint
from g2gnet.training.cross_validation import FoldSettings
from g2gnet.training.evaluation import build_network
from g2gnet.training.held_out import best_of
from g2gnet.training.run_settings import TrainSettings
from g2gnet.training.saved_state import POSITION, UNFIT, check_form, check_history, check_tested, load_model

logger = logging.getLogger("g2gnet")

#: entries of every epoch's record that have a number for each layer
BY_LAYER = ("units_kept", "initial_units_kept")


@contextlib.contextmanager
def _as_trained() -> Iterator[None]:
    """While entered, new tensors are float32 on the CPU, as in training, whatever PyTorch's defaults are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class SavedRun:
    """A run as its checkpoint describes it (:func:`read_run`).

    ``epoch`` and ``step`` count finished epochs and steps; each epoch has a record in the history. A run that was
    ``interrupted`` inside an epoch has the network of its last step, to which no record belongs. A finished run with
    held-out images has ``tested``, the test accuracies of its last and of its best epoch (:func:`run_epochs`).
    ``samples`` describes its samples; None in files of earlier versions.

    Example:
        >>> run = read_run("checkpoints/fashionmnist-mini_mixer_p0.15_T5_current.pth")
        >>> run.epoch, run.settings.model, len(run.history)
        (1, 'mixer', 1)
        >>> run.network().T
        5
        >>> list(run.masks())
        ['fc1', 'fc2', 'fc3']
    """

    path: Path
    settings: TrainSettings
    epoch: int
    step: int
    interrupted: bool
    history: list[dict[str, Any]]
    state: dict[str, Any]
    tested: dict[str, Any]
    samples: SampleForm | None

    @property
    def result(self) -> dict[str, Any]:
        """The record of the last finished epoch, with the test accuracies of the end (:func:`run_epochs`)."""
        return {**self.history[-1], **self.tested}

    @property
    def position(self) -> str:
        """When the network was saved, as text."""
        if self.interrupted:
            return f"inside epoch {self.epoch + 1} of {self.settings.epochs}, after step {self.step} of the run"
        return f"after epoch {self.epoch} of {self.settings.epochs}"

    @_as_trained()
    def initial_network(self, backend: str | None = None) -> G2GNet:
        """The network before the first step, on the CPU."""
        masks = {name: mask for name, mask in self.masks().items() if name.startswith(("fc", "conv"))}
        *_, num_classes = [mask.shape[0] for mask in masks.values()]
        forms, found = self.settings.layer_forms(num_classes), []
        for name, mask in masks.items():
            *_, side = self.state[f"{name}.values"].shape
            found.append((mask.shape[0], side if name.startswith("conv") else None))
        # the settings alone could require any amount of memory
        if found != [(form.size, form.kernel) for form in forms]:
            sizes = ", ".join(f"{size}" if side is None else f"{size}C{side}" for size, side in found[:-1])
            which = "hidden_dim" if self.settings.layers is None else "layers"
            raise ValueError(f"{which} is {getattr(self.settings, which)}, the network has {sizes}")
        inputs: int | Shape = next(iter(masks.values())).shape[1]
        if self.settings.layers is not None:
            inputs = self.settings.input_shape(self.samples.shape if self.samples else ())
            weights = [each.weight for each in placed(forms, inputs)]
            if weights != [mask.shape for mask in masks.values()]:
                raise ValueError(f"samples of {self.samples} do not fit layers={self.settings.layers}")
        return build_network(self.settings, inputs, num_classes, backend)

    def network(self, device: torch.device | str = "cpu", backend: str | None = None) -> G2GNet:
        """The saved network: after the last finished epoch, or after ``step`` of an interrupted one."""
        with _as_trained():
            net = self.initial_network(backend)
            load_model(net, self.state)
            net.trained_on = self.samples
        return net.to(device)

    @_as_trained()
    def masks(self) -> dict[str, BlockMask]:
        """The mask of each connection (``fc1``, ``rec1``, …) of the saved network."""
        end = ".mask.wiring"
        return {
            name.removesuffix(end): BlockMask.from_state({"wiring": row})
            for name, row in self.state.items()
            if name.endswith(end)
        }


def read_run(checkpoint: Path | str) -> SavedRun:
    """Reads the checkpoint of a training run, or of one fold of a cross-validation. Executes nothing in the file.
    Raises CheckpointError if it is missing, damaged, or not the checkpoint of a training run.

    Example:
        >>> run = read_run("checkpoints/fashionmnist-mini_mixer_p0.15_T5_current.pth")
        >>> run.history[-1]["epoch"]
        1
    """
    path = Path(checkpoint)
    content = read_checkpoint(path)
    try:
        kind = FoldSettings if "fold" in content["settings"] else TrainSettings
        later = content["settings"].keys() - {field.name for field in dataclasses.fields(kind)}
        if later:
            raise ValueError(f"the setting {', '.join(sorted(later))} is unknown; a later version of g2g may know it")
        settings = kind.from_saved(content["settings"])
        check_form("state", content, POSITION, low=0)
        epoch, history, tested = content["epoch"], content["history"], content.get("tested", {})
        check_history(history, epoch)
        check_tested(tested)
        if settings.validation is not None and history:
            best_of(history)
        for record in history:
            for name in BY_LAYER:
                check_form(name, record[name], dict.fromkeys(record[name], 0.0), low=0)
        interrupted = content["progress"] is not None
        saved = content.get("samples")
        samples = None if saved is None else SampleForm(tuple(saved["shape"]), saved["kind"])
        run = SavedRun(path, settings, epoch, content["step"], interrupted, history, content["model"], tested, samples)
        net = run.network()
        if samples is not None:
            net._check_shape((1, *samples.shape))
            check_choice("samples/kind", samples.kind, tuple(CONTENT))
    except (SettingsError, *UNFIT) as error:
        summary = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path} is not the checkpoint of a training run ({summary}).") from error
    return run


def load(checkpoint: Path | str, device: torch.device | str = "cpu", backend: str | None = None) -> G2GNet:
    """The network that ``train.py`` or ``crossval.py`` saved, in evaluation mode.

    It is the network of the last finished epoch; of a run that was stopped inside an epoch, that of its last step,
    which was never tested, as the logger ``g2gnet`` warns. :meth:`~g2gnet.G2GNet.predict` scales, standardises and
    encodes samples as the run did, and refuses samples of another shape or dtype than its data (``net.trained_on``).
    It computes in float32; a run with ``precision="bf16"`` classified under ``torch.autocast``. Nothing in the file is
    executed.

    Args:
        checkpoint: the ``.pth`` file, of a finished run or not.
        device: the device of the network; ``"auto"`` takes the fastest.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None: the device decides.

    Raises:
        ValueError, BackendError: for a device or a backend that is unknown, or cannot be used here.
        CheckpointError: if the file is missing, damaged, or not the checkpoint of a training run.

    Example:
        >>> net = load("checkpoints/fashionmnist-mini_mixer_p0.15_T5_current.pth")
        >>> net.predict(torch.randint(256, (2, 28, 28), dtype=torch.uint8)).classes.shape
        torch.Size([2])
    """
    device = select_device(device) if isinstance(device, str) else device
    require_backend(backend)
    run = read_run(checkpoint)
    if run.interrupted:
        text = "%s was saved %s: no accuracy in its history is that of this network; run its command again to go on"
        logger.warning(text, run.path, run.position)
    return run.network(device, backend).eval()
