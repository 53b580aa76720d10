"""A G2GNet as a classifier of skorch, rewired while it trains; scikit-learn's grid search varies its arguments."""

import torch
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback

from g2gnet import DSTScheduler, G2GNet
from g2gnet.data import as_samples, load_dataset


class Rewire(Callback):
    def __init__(self, interval=20):
        self.interval = interval

    def on_train_begin(self, net, **_):
        self.dst = DSTScheduler(net.module_, net.optimizer_, self.interval)

    def on_batch_end(self, net, batch, training, **_):
        if training:
            self.dst.step()


classifier = NeuralNetClassifier(
    G2GNet, module__input_dim=784, module__hidden_dim=256, module__num_classes=10, module__block_size=16, module__T=10,
    criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.Adam, lr=1e-3, batch_size=100, max_epochs=2,
    iterator_train__shuffle=True, callbacks=[Rewire()], verbose=0,
)  # fmt: skip
data = load_dataset("fashionmnist-mini").limited(2000, 500)
x, labels = as_samples(data.train_images).numpy(), data.train_labels.numpy()
search = GridSearchCV(classifier, {"module__model": ["index", "mixer"], "module__p_inter": [0.05, 0.3]}, cv=3)
search.fit(x, labels)
print(search.best_params_, search.best_score_)
