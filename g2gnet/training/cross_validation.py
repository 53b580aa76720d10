"""K-fold cross-validation: each of k parts of the training images validates a model trained on the others."""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from g2gnet.base.distributed import ALONE
from g2gnet.data import ImageData
from g2gnet.network_settings import SettingsError, setting, with_default
from g2gnet.training.machine import Machine
from g2gnet.training.run import EpochCallback, run_training
from g2gnet.training.run_settings import LARGEST_SEED, TrainSettings
from g2gnet.training.trainer import Trainer

ACCURACIES = ("train_acc", "val_acc", "test_acc")


@dataclasses.dataclass(frozen=True)
class FoldSettings(TrainSettings):
    """The settings of the training run of one fold."""

    epochs: int = with_default(TrainSettings, "epochs", 5)
    warmup_epochs: int = with_default(TrainSettings, "warmup_epochs", 2)
    k_folds: int = setting(5, "cross-validation", "parts of the training images; each validates once", low=2)
    fold: int = setting(1, None, "the part that validates, from 1", low=1)

    def _at_odds(self) -> list[str]:
        usual = self.defaults()
        problems = [
            f"{name}={getattr(self, name)} is of single runs: each fold is held out in turn, and epochs have its "
            f"val_acc; leave `{name}` out"
            for name in ("validation", "validation_seed", "patience", "start")
            if getattr(self, name) != usual[name]
        ] or super()._at_odds()
        if self.seed + self.k_folds - self.fold > LARGEST_SEED:
            problems.append(f"seed={self.seed} leaves none to the last of k_folds={self.k_folds}; lower `seed`")
        return problems

    @property
    def given_seed(self) -> int:
        return self.seed + 1 - self.fold

    def of_fold(self, fold: int) -> "FoldSettings":
        """The settings of another fold's run, whose seed is the given seed + ``fold`` - 1."""
        return dataclasses.replace(self, fold=fold, seed=self.given_seed + fold - 1)

    @property
    def stem(self) -> str:
        return f"{super().stem}_fold{self.fold}of{self.k_folds}"

    @property
    def label(self) -> str:
        return f"Fold {self.fold}/{self.k_folds}, seed {self.seed} | "

    @property
    def summary_stem(self) -> str:
        """The name of the results of all folds."""
        return f"{super().stem}_{self.k_folds}folds"


def cross_validate(
    settings: FoldSettings,
    load_data: Callable[[], ImageData],
    checkpoint_dir: Path | str,
    machine: Machine,
    on_epoch: Sequence[EpochCallback[Trainer]] = (),
) -> dict[str, Any]:
    """Trains one model for each fold, from fresh masks and weights; finished folds are skipped.

    The images are shuffled and divided with equal shares of each class (seed s of the settings). The model of fold n is
    drawn and trained with seed s + n − 1, so the spread over the folds includes masks, initial values and the order of
    images. Each fold is a run with its own checkpoint, history and marker. The processes of the ``world`` of
    ``machine`` all call this with the same ``checkpoint_dir`` and share the folds.

    Raises the errors of :func:`g2gnet.training.run_training`, and SettingsError for more folds than a class has images,
    or fewer than there are processes.

    Returns:
        ``folds``, with number, seed and accuracies of each after its last epoch, and ``mean`` and ``std`` (with k − 1)
        of the accuracies.
    """
    world = machine.world
    if world.size > settings.k_folds:
        left = f"some of {world.size} processes without one"
        raise SettingsError(f"k_folds={settings.k_folds} leaves {left}; start fewer processes, or give more folds")
    apart = world.apart()  # a fold of another process may take any time
    whole = functools.cache(lambda: load_data().limited(settings.limit_train, settings.limit_test))
    alone = machine._replace(world=ALONE)
    folds = []
    for fold in range(1, settings.k_folds + 1)[world.rank :: world.size]:
        run = settings.of_fold(fold)

        def data(fold: int = fold) -> ImageData:
            _, held_out = stratified_folds(whole().train_labels, settings.k_folds, settings.seed)[fold - 1]
            return whole().held_out(held_out)

        record = run_training(run, data, checkpoint_dir, alone, on_epoch=on_epoch)
        folds.append({"fold": fold, "seed": run.seed, **{name: record[name] for name in ACCURACIES}})
    apart.stage = "the end of its folds"
    folds = sorted(itertools.chain(*apart.gather(folds)), key=lambda result: result["fold"])
    columns = {name: [result[name] for result in folds] for name in ACCURACIES}
    return {
        "folds": folds,
        "mean": {name: statistics.mean(values) for name, values in columns.items()},
        "std": {name: statistics.stdev(values) for name, values in columns.items()},
    }


def stratified_folds(labels: torch.Tensor, k_folds: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Training and validation indices of each fold, int64: shuffled, with equal shares of each class. Raises
    SettingsError if a class has fewer than ``k_folds`` images."""
    members = labels.bincount()
    label, fewest = min(((label, count) for label, count in enumerate(members.tolist()) if count), key=lambda it: it[1])
    if fewest < k_folds:
        has = f"class {label} has only {fewest} of the {len(labels)} training images"
        raise SettingsError(f"k_folds={k_folds} is out of range: {has}; give fewer, or a larger `limit_train`")
    from sklearn.model_selection import StratifiedKFold  # which takes a second to import

    folds = StratifiedKFold(k_folds, shuffle=True, random_state=seed % 2**32)  # scikit-learn takes seeds of 32 bits
    splits = folds.split(np.zeros(len(labels)), labels.numpy())
    return [(torch.from_numpy(train), torch.from_numpy(val)) for train, val in splits]
