"""Optuna looks for the grouping, density, decay and learning rate of a G2GNet."""

import optuna
import torch

from g2gnet import G2GNet
from g2gnet.data import as_samples, load_dataset

data = load_dataset("fashionmnist-mini")
x, labels = as_samples(data.train_images), data.train_labels


def accuracy(trial):
    torch.manual_seed(0)
    options = {
        "model": trial.suggest_categorical("model", ["index", "random", "mixer"]),
        "p_inter": trial.suggest_float("p_inter", 0.02, 0.5, log=True),
        "beta": trial.suggest_float("beta", 0.5, 0.99),
    }
    net = G2GNet(784, 256, 10, block_size=16, T=10, **options)
    optimizer = torch.optim.Adam(net.parameters(), lr=trial.suggest_float("lr", 1e-4, 1e-2, log=True))
    for batch in torch.randperm(len(x)).split(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x[batch]), labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        predicted = net.eval()(as_samples(data.test_images)).argmax(1)
    return (predicted == data.test_labels).float().mean().item()


study = optuna.create_study(direction="maximize")
study.optimize(accuracy, n_trials=10)
print(study.best_params, study.best_value)
