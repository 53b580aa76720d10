"""Target networks that are tensors and no modules: torchrl's delayed targets."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import OneHot
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss, HardUpdate, SoftUpdate

from g2gnet import DSTScheduler, G2GNet

LAYERS = ("fc1", "fc2", "fc3")


class Values(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = G2GNet(8, 64, 4, "mixer", block_size=4, T=6, enc_scale=3.0)

    def forward(self, x):
        return self.net(x)


def transitions(size):
    done = torch.zeros(size, 1, dtype=torch.bool)
    after = {"observation": torch.rand(size, 8), "reward": torch.rand(size, 1), "done": done, "terminated": done}
    actions = nn.functional.one_hot(torch.randint(4, (size,)), 4)
    return TensorDict({"observation": torch.rand(size, 8), "action": actions, "next": after}, [size])


@pytest.mark.parametrize(
    ("update", "options"), [(SoftUpdate, {"tau": 0.1}), (HardUpdate, {"value_network_update_interval": 2})]
)
def test_delayed_targets_follow_if_they_are_copied_after_an_update_of_the_graph(update, options):
    values = Values()
    actor = QValueActor(values, in_keys=["observation"], spec=OneHot(4))
    loss = DQNLoss(actor, delay_value=True, action_space="one-hot")
    loss.make_value_estimator(gamma=0.9)
    updater = update(loss, **options)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    dst = DSTScheduler(values, optimizer, interval=5, fraction=0.3, prune="random", grow="random")
    twin = Values()  # dense weights, and what else the target has
    twin.load_state_dict(values.state_dict())
    dense = {name: values.net.get_submodule(name).dense_weight().detach() for name in LAYERS}
    for _ in range(18):
        optimizer.zero_grad()
        loss(transitions(16))["loss"].backward()
        optimizer.step()
        updater.step()
        for name, weight in dense.items():
            now = values.net.get_submodule(name).dense_weight().detach()
            if update is SoftUpdate:
                weight.lerp_(now, 0.1)
            elif updater.counter == 0:
                weight.copy_(now)
        if dst.step():  # parameters and buffers
            loss.target_value_network_params.data.update_(loss.value_network_params.data)
            dense = {name: values.net.get_submodule(name).dense_weight().detach() for name in LAYERS}
    assert dst.pruned > 0
    target = {key[-2:]: tensor for key, tensor in loss.target_value_network_params.items(True, True)}
    with torch.no_grad():
        for name in LAYERS:
            layer = twin.net.get_submodule(name)
            layer.mask.become_(values.net.get_submodule(name).mask)
            layer.values.copy_(layer.mask.pack(dense[name]))
        for name, parameter in twin.net.named_parameters():
            if not name.endswith("values"):
                parameter.copy_(target[tuple(name.split("."))])
        x = torch.rand(64, 8)
        with loss.target_value_network_params.to_module(loss.value_network):
            got = loss.value_network(TensorDict({"observation": x}, [64]))["action_value"]
    assert torch.equal(got, twin(x))
