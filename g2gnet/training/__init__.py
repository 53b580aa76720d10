"""The training engine: settings, the optimisation of one network, and a run's files."""

from g2gnet.training.run import run_epochs, run_training
from g2gnet.training.run_files import CheckpointError
from g2gnet.training.settings import Settings, SettingsError, TrainSettings
from g2gnet.training.trainer import Trainer, TrainingError

__all__ = [
    "CheckpointError",
    "Settings",
    "SettingsError",
    "TrainSettings",
    "Trainer",
    "TrainingError",
    "run_epochs",
    "run_training",
]
