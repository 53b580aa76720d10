"""A training run as its checkpoint has it: settings, history, and its network at the start and now."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from g2gnet.network import G2GNet
from g2gnet.training.cross_validation import FoldSettings
from g2gnet.training.evaluation import build_network
from g2gnet.training.run_files import CheckpointError, read_checkpoint
from g2gnet.training.settings import SettingsError, TrainSettings

#: what every epoch's record has to hold: numbers, and numbers by layer
MEASURES = ("epoch", "train_loss", "train_acc", "test_acc", "seconds")
MEASURES_BY_LAYER = ("units_kept", "initial_units_kept")


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says of a run; :func:`read_run` reads it.

    Attributes:
        path: the checkpoint.
        settings: of the run.
        epoch: the number of finished epochs.
        history: one record an epoch.
        state: of the network.
    """

    path: Path
    settings: TrainSettings
    epoch: int
    history: list[dict[str, Any]]
    state: dict[str, Any]

    def initial_network(self, backend: str | None = None) -> G2GNet:
        """The network before the first step, on the CPU."""
        input_dim = len(self.state["fc1.mask.in_group_of"])
        num_classes = len(self.state["fc3.mask.out_group_of"])
        hidden_dim = len(self.state["fc1.mask.out_group_of"])
        if hidden_dim != self.settings.hidden_dim:  # the settings alone could ask for any amount of memory
            raise ValueError(f"hidden_dim is {self.settings.hidden_dim}, the network has {hidden_dim}")
        return build_network(self.settings, input_dim, num_classes, backend)

    def network(self, device: torch.device | str = "cpu", backend: str | None = None) -> G2GNet:
        """The network after the last finished epoch."""
        net = self.initial_network(backend)
        net.load_state_dict(self.state)
        return net.to(device)


def read_run(checkpoint: Path | str) -> SavedRun:
    """Reads the checkpoint of a training run, or of one fold of a cross-validation; nothing in the file is executed.

    Raises:
        CheckpointError: if it is missing, damaged, or not the checkpoint of a training run.
    """
    path = Path(checkpoint)
    content = read_checkpoint(path)
    try:
        kind = FoldSettings if "fold" in content["settings"] else TrainSettings
        settings = kind(**content["settings"])
        run = SavedRun(path, settings, content["epoch"], content["history"], content["model"])
        if not run.history:
            raise ValueError("it holds no finished epoch")
        for record in run.history:
            by_layer = [value for name in MEASURES_BY_LAYER for value in record[name].values()]
            if not all(isinstance(value, int | float) for value in (*(record[name] for name in MEASURES), *by_layer)):
                raise ValueError(f"the record of an epoch lacks numbers: {record}")
        run.network()
    except (SettingsError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        summary = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path} is not the checkpoint of a training run ({summary}).") from error
    return run
