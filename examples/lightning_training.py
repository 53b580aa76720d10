"""A G2GNet that is rewired while Lightning trains it, resumed, and averaged by Lightning's own callback.

A callback calls the scheduler after each optimizer step; Lightning's checkpoints contain its state. For data-parallel
training: ``devices=2, strategy="ddp"``.
"""

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader, TensorDataset

from g2gnet import DSTScheduler, G2GNet
from g2gnet.data import as_samples, load_dataset


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = G2GNet(784, 256, 10, model="mixer", block_size=16, T=10)

    def training_step(self, batch, batch_index):
        x, labels = batch
        return torch.nn.functional.cross_entropy(self.net(x), labels)

    def validation_step(self, batch, batch_index):
        x, labels = batch
        self.log("accuracy", (self.net(x).argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Rewire(L.Callback):
    def __init__(self, **options):
        self.options, self.state = options, None

    def on_fit_start(self, trainer, module):
        self.dst = DSTScheduler(module.net, trainer.optimizers[0], **self.options)
        if self.state:
            self.dst.load_state_dict(self.state)

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > self.dst.steps:  # not after a batch whose gradients are only accumulated
            self.dst.step()

    def state_dict(self):
        return self.dst.state_dict()

    def load_state_dict(self, state):
        self.state = state


class RewireAverage(Rewire):
    def on_fit_start(self, trainer, module):
        average = trainer.callbacks[0]._average_model  # Lightning gives no public access to it
        self.options["averages"] = [average.module.net]
        super().on_fit_start(trainer, module)


if __name__ == "__main__":
    L.seed_everything(0)  # every process must create the same network
    data = load_dataset("fashionmnist-mini")
    train = DataLoader(TensorDataset(as_samples(data.train_images), data.train_labels), 100, shuffle=True)
    test = DataLoader(TensorDataset(as_samples(data.test_images), data.test_labels), 100)
    module, rewire = Classifier(), Rewire(interval=20)
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", devices=1, callbacks=[rewire])
    trainer.fit(module, train, test)
    trainer.save_checkpoint("two-epochs.ckpt")

    # resume: bitwise equal to an uninterrupted run if the images come in the same order
    again = L.Trainer(max_epochs=3, accelerator="cpu", devices=1, callbacks=[Rewire(interval=20)])
    again.fit(Classifier(), train, test, ckpt_path="two-epochs.ckpt")

    # averaged weights
    averaged = Classifier()
    callbacks = [EMAWeightAveraging(decay=0.99), RewireAverage(interval=20)]
    L.Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=callbacks).fit(averaged, train, test)
