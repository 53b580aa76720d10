"""The training engine: settings, the optimisation of one network, and a run's files."""

from g2gnet.training.run import run_epochs, run_training
from g2gnet.training.run_files import CheckpointError
from g2gnet.training.saved_run import SavedRun, read_run
from g2gnet.training.settings import Settings, SettingsError, TrainSettings
from g2gnet.training.trainer import Trainer, TrainingError

__all__ = [
    "CheckpointError",
    "SavedRun",
    "Settings",
    "SettingsError",
    "TrainSettings",
    "Trainer",
    "TrainingError",
    "read_run",
    "run_epochs",
    "run_training",
]
