"""Optuna searches for the grouping, density, decay and learning rate of a G2GNet, judged by held-out images."""

import optuna
import torch

from g2gnet import G2GNet
from g2gnet.data import as_samples, load_dataset

data = load_dataset("fashionmnist-mini")
images, labels = as_samples(data.train_images), data.train_labels
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, held_out = order[1000:], order[:1000]


def accuracy(trial):
    torch.manual_seed(0)
    options = {
        "model": trial.suggest_categorical("model", ["index", "random", "mixer"]),
        "p_inter": trial.suggest_float("p_inter", 0.02, 0.5, log=True),
        "beta": trial.suggest_float("beta", 0.5, 0.99),
    }
    net = G2GNet(784, 256, 10, block_size=16, T=10, **options)
    optimizer = torch.optim.Adam(net.parameters(), lr=trial.suggest_float("lr", 1e-4, 1e-2, log=True))
    for batch in train[torch.randperm(len(train))].split(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
    return (net.predict(images[held_out]).classes == labels[held_out]).float().mean().item()


# for a search that goes on where it ended: study_name="g2g", storage="sqlite:///search.db", load_if_exists=True
study = optuna.create_study(direction="maximize")
study.optimize(accuracy, n_trials=10)
print(study.best_params, study.best_value)
