"""A G2GNet that is rewired in a loop of accelerate, which saves and loads the scheduler, too."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from g2gnet import DSTScheduler, G2GNet
from g2gnet.data import as_samples, load_dataset

accelerator = Accelerator(cpu=True)
data = load_dataset("fashionmnist-mini")
batches = DataLoader(TensorDataset(as_samples(data.train_images), data.train_labels), 100, shuffle=True)
net = G2GNet(784, 256, 10, model="mixer", block_size=16, T=10)
net, optimizer, batches = accelerator.prepare(net, torch.optim.Adam(net.parameters(), lr=1e-3), batches)
dst = DSTScheduler(accelerator.unwrap_model(net), optimizer, interval=20)
accelerator.register_for_checkpointing(dst)
for x, labels in batches:
    optimizer.zero_grad()
    accelerator.backward(torch.nn.functional.cross_entropy(net(x), labels))
    optimizer.step()
    dst.step()
accelerator.save_state("accelerated")
accelerator.load_state("accelerated")
