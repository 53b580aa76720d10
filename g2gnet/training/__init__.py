"""The training engine: settings, the training of one network, and a run's files."""

from g2gnet.network_settings import NetworkSettings, Settings, SettingsError
from g2gnet.training.checkpoints import CheckpointError
from g2gnet.training.checks import TrainingError
from g2gnet.training.interruption import Interrupted
from g2gnet.training.machine import Machine
from g2gnet.training.run import EpochCallback, run_epochs, run_training
from g2gnet.training.run_settings import RunSettings, TrainSettings
from g2gnet.training.saved_run import SavedRun, read_run
from g2gnet.training.trainer import Evaluation, Trainer

__all__ = [
    "CheckpointError", "EpochCallback", "Evaluation", "Interrupted", "Machine", "NetworkSettings", "RunSettings",
    "SavedRun", "Settings", "SettingsError", "TrainSettings", "Trainer", "TrainingError", "read_run", "run_epochs",
    "run_training",
]  # fmt: skip
