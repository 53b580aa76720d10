"""A G2GNet that is rewired while Hugging Face's Trainer trains it, and resumed.

The model returns its loss and its logits. A callback calls the scheduler, which resumes from the global step.
"""

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from g2gnet import DSTScheduler, G2GNet
from g2gnet.data import as_samples, load_dataset


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = G2GNet(784, 256, 10, model="mixer", block_size=16, T=10)

    def forward(self, x, labels=None):
        counts = self.net(x)
        return {"loss": torch.nn.functional.cross_entropy(counts, labels), "logits": counts}


class Rewire(TrainerCallback):
    def __init__(self, **options):
        self.options = options

    def on_train_begin(self, arguments, state, control, model, optimizer, **_):
        self.dst = DSTScheduler(model, optimizer, **self.options)
        self.dst.load_state_dict({"steps": state.global_step, "pruned": 0, "grown": 0})

    def on_optimizer_step(self, *_, **__):
        self.dst.step()


data = load_dataset("fashionmnist-mini")
samples = [{"x": x, "labels": label} for x, label in zip(as_samples(data.train_images), data.train_labels, strict=True)]
arguments = TrainingArguments(
    "hugging-face", num_train_epochs=2, per_device_train_batch_size=100, learning_rate=1e-3, use_cpu=True,
    save_strategy="epoch", report_to="none", disable_tqdm=True,
)  # fmt: skip
rewire = Rewire(interval=20)
trainer = Trainer(Classifier(), arguments, train_dataset=samples, callbacks=[rewire])
trainer.train()
trainer.train(resume_from_checkpoint="hugging-face/checkpoint-60")
