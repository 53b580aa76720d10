"""Runs of a study by a trainer of its own, with the data, order, optimizer and files of any other run."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from g2gnet.data import load_dataset
from g2gnet.programs.sweep.engine import outcome
from g2gnet.programs.sweep.grid import Run
from g2gnet.training import Machine, Trainer, TrainSettings, run_epochs


def train(
    trainer: type[Trainer], settings: TrainSettings, folder: Path, on_epoch: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Trains a network, or resumes it; returns its last epoch, as :func:`finished`.

    Args:
        trainer: its class.
        settings: of the run whose data, sizes, masks and recipe it takes.
        folder: of its files.
        on_epoch: called with a line after each epoch.
    """
    machine = Machine(torch.device("cpu"))

    def tell(record: dict[str, Any], of: Trainer) -> None:
        on_epoch(f"epoch {record['epoch']}: test accuracy {record['test_acc']:.4f}")

    with contextlib.redirect_stdout(None):  # which is the study's table's
        run_epochs(
            settings,
            lambda: trainer(settings, load_dataset(settings.dataset, "data"), machine),
            folder,
            machine,
            on_epoch=[tell],
        )
    end = finished(settings, folder)
    assert end is not None
    return end


def finished(settings: TrainSettings, folder: Path) -> dict[str, Any] | None:
    """The last epoch's record, times of training and weights, or None if it has not finished in this folder.

    Raises:
        CheckpointError: as :func:`g2gnet.programs.sweep.engine.outcome`.
    """
    return outcome(Run({}, settings, {}, folder))
