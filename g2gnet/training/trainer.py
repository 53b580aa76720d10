"""The training of one network: steps, epochs, evaluation, and a state to resume from."""

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from g2g_kernels import Activity
from g2gnet.base.schedules import SCHEDULES
from g2gnet.base.seeding import draw_device, stream
from g2gnet.data import ImageData, as_samples, random_crop_and_flip, random_erase, random_unit_shift
from g2gnet.dst.gradual_pruning import mean_density
from g2gnet.dst.scheduler import DSTScheduler
from g2gnet.encoding import SampleForm
from g2gnet.images import Shape
from g2gnet.network import G2GNet
from g2gnet.network_settings import NetworkSettings, SettingsError
from g2gnet.neurons import AdLIF
from g2gnet.training.checkpoints import compared, read_checkpoint
from g2gnet.training.checks import LayerWatch, check_images, check_labels, check_rates, order_of
from g2gnet.training.epochs import EpochTrainer, StepCallback
from g2gnet.training.evaluation import autocast, build_network, run_images
from g2gnet.training.machine import Machine, check_memory
from g2gnet.training.regularizer import rate_penalty, rate_target
from g2gnet.training.run_settings import TrainSettings
from g2gnet.training.saved_state import UNFIT, check_form, load_model
from g2gnet.weights.tied_averages import tie_wiring, untie_wiring

#: number of parameters that one thread updates in about a millisecond
ONE_THREAD_UPDATE = 1_000_000
#: largest number whose squares can be summed in float32
_SQUARED = 1e15
#: settings of a network that may differ from those of the run that training starts from
NOT_OF_START = {"quantize", "dropout", "surrogate", "alpha"}


class Evaluation(NamedTuple):
    """The results on images that are not trained on: the share of correctly classified images, and the synaptic
    operations of each connection per image (:class:`~g2g_kernels.ops.g2g_stack.SynapticOperations`).

    Example:
        >>> result = Evaluation(0.9, accumulates={"fc1": 0.0, "fc2": 120.0}, multiplies={"fc1": 800.0, "fc2": 0.0})
        >>> sum(result.accumulates.values())  # additions per image
        120.0
    """

    accuracy: float
    accumulates: dict[str, float]
    multiplies: dict[str, float]


class Trainer(EpochTrainer):
    """Trains one :class:`G2GNet` on one data set, and rewires it (:class:`~g2gnet.training.epochs.EpochTrainer`).

    Each process of the ``world`` of ``machine`` has such a trainer and computes its part of every batch; their results
    are those of one process, except for the order of floating-point sums.

    Attributes:
        net: the network in training. It adds to the ``progress`` of an epoch ``firing_rates``, Σ over images of the
            rate of each neuron, layer after layer [2·H + C], and ``units``, those of each connection at its start.
        tested: the network that is tested, analysed and saved: ``net``, or with ``settings.average`` its average, which
            is rewired with it.

    Raises:
        SettingsError: if the settings do not fit the data, the number of processes or of steps, or the memory.

    Example:
        >>> from g2gnet.data import load_dataset
        >>> settings = TrainSettings(dataset="fashionmnist-mini", model="mixer", hidden_dim=32, block_size=8, T=5)
        >>> data = load_dataset("fashionmnist-mini").limited(256, 100)
        >>> trainer = Trainer(settings, data, Machine(torch.device("cpu")))
        >>> record = trainer.train_epoch()
        >>> 0 <= record["test_acc"] <= 1
        True
    """

    net: G2GNet
    optimizer_state = ("step", "exp_avg", "exp_avg_sq")

    def __init__(self, settings: TrainSettings, data: ImageData, machine: Machine) -> None:
        device, world = machine.device, machine.world
        super().__init__(settings, data, device)
        self.settings = settings
        self.world = world
        self.lr_schedule, self.lr_warmup = settings.lr_schedule, settings.lr_warmup
        if self.lr_warmup >= self._steps:
            of_all = f"training takes {self._steps} steps"
            raise SettingsError(f"lr_warmup={self.lr_warmup} leaves no step at `lr`: {of_all}; lower `lr_warmup`")
        count = len(self.data.train_labels)
        smallest = count - (self._batches - 1) * settings.batch_size
        if smallest < world.size:
            leaves = f"leaves {smallest} of {count} images to the last batch of an epoch"
            fewer = f"fewer than one for each of {world.size} processes; give another `batch_size`, or start fewer"
            raise SettingsError(f"batch_size={settings.batch_size} {leaves}, {fewer}")
        check_images(settings, data)
        order = None if settings.sequence == "none" else order_of(settings, data)
        input_shape = settings.input_shape(data.train_images.shape[1:])
        in_step = min(count, settings.batch_size)
        check_memory(settings, input_shape, data.num_classes, -(-in_step // world.size), device)
        self._machine = machine
        self._sizes = input_shape, data.num_classes
        self.net = self._build_network(*self._sizes)
        if settings.start is not None:
            self._start_from(Path(settings.start))
        self.net.to(device)
        if order is not None:
            self.net.input_order.copy_(order)
            self.net.settle()  # reads the order now, so that steps do not wait for the device
        if settings.standardize:
            mean, deviation = self.data.moments()
            self.net.input_mean.fill_(mean)
            self.net.input_deviation.fill_(deviation)
        check_labels(self.data)
        check_rates(settings, self.data)
        self.tested = self.net
        if settings.average is not None:
            self.tested = copy.deepcopy(self.net).requires_grad_(False).eval()
            tie_wiring(self.net, self.tested)
        self._neurons = [*self.net.sizes[:-1]]
        self._initial_units = self._units()
        self.optimizer = self._make_optimizer()
        self.dst: DSTScheduler | None = None
        if settings.sparsity_mode == "dynamic":
            final, connections = settings.final_density, list(self.net.connections().values())
            bounded = settings.dst_schedule != "constant" or settings.dst_stop != 1 or final is not None
            if final is not None and final >= (density := mean_density(connections)):
                first = f"the {density:.4g} that training begins with"
                raise SettingsError(f"final_density={final} is no less than {first}; lower it, or raise `p_inter`")
            try:
                self.dst = DSTScheduler(
                    connections,
                    self.optimizer,
                    settings.dst_interval,
                    settings.dst_fraction,
                    settings.cp,
                    settings.cg,
                    settings.seed,
                    world.group,
                    schedule=settings.dst_schedule,
                    stop=settings.dst_stop,
                    total_steps=self._steps if bounded else None,
                    final_density=final,
                    network=self.net,
                )
            except ValueError as error:
                text = re.sub(r"^(fraction|interval)=", r"dst_\1=", str(error))  # the names of settings
                raise SettingsError(f"dynamic sparse training: {text}") from error
        self._watch(settings.lr)
        self._layers = LayerWatch()

    def state_dict(self) -> dict[str, Any]:
        samples = SampleForm.of(self.data.train_images)._asdict()
        state = {**super().state_dict(), "samples": samples, "dst": self.dst.state_dict() if self.dst else None}
        if self.tested is not self.net:
            state |= {"model": self.tested.state_dict(), "trained": state["model"]}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = {name: buffer.clone() for name, buffer in self.net.named_buffers(recurse=False)}
        if self.tested is self.net:
            super().load_state_dict(state)
        else:
            untie_wiring(self.tested)  # until both have the same units
            super().load_state_dict({**state, "model": state["trained"]})
            load_model(self.tested, state["model"])
            tie_wiring(self.net, self.tested)
        # training reads these buffers from the data, with a rounding that depends on the number of threads
        for net in (self.net, self.tested):
            for name, buffer in net.named_buffers(recurse=False):
                if not torch.allclose(buffer, before[name]):
                    raise ValueError(f"{name} is not that of the data")
        if self.dst:
            if state["dst"]["steps"] != state["step"]:
                raise ValueError(f"dst/steps={state['dst']['steps']} and step={state['step']} are at odds")
            check_form("dst", state["dst"], {"pruned": 0, "grown": 0}, low=0)
            self.dst.load_state_dict(state["dst"])

    def _build_network(self, input_shape: Shape, num_classes: int) -> G2GNet:
        net = build_network(self.settings, input_shape, num_classes, self._machine.backend)
        net.trained_on = SampleForm.of(self.data.train_images)
        return net

    def _start_from(self, path: Path) -> None:
        """Gives the network the units, weights and parameters of a checkpoint. Raises SettingsError if it cannot."""
        names = NetworkSettings.defaults().keys() - NOT_OF_START
        try:
            saved = read_checkpoint(path)
            both = self.settings.complete(saved["settings"]), self.settings.as_dict()
            theirs, ours = ({name: each[name] for name in names} for each in both)
            if differing := compared(theirs, ours):
                raise ValueError("\n".join(["its network is another:", *differing]))
            load_model(self.net, saved["model"])
        except UNFIT as error:
            remedy = "give a checkpoint of a run with the same model flags, to resume a run the one that it began with"
            raise SettingsError(f"start={path} cannot be trained on: {error}\n{remedy}") from error

    def _make_optimizer(self) -> torch.optim.Optimizer:
        settings, device = self.settings, self.device
        options: dict[str, Any] = {
            "lr": settings.lr,
            "weight_decay": settings.weight_decay,
            # PyTorch's fused update supports CPU and CUDA; other devices take the plain loop
            "fused": device.type in ("cpu", "cuda"),
            "foreach": False,
        }
        learned = {name: each for name, each in self.net.named_parameters() if each.requires_grad}
        delays = [learned.pop(name) for name in [*learned] if name.endswith("_delay")]
        # delays act in whole steps, and a penalty would draw them to zero
        factor = settings.delay_lr_factor
        faster = {"params": delays, "weight_decay": 0.0, "lr": options["lr"] * factor, "lr_factor": factor}
        groups = [faster] if delays else []
        if settings.optimizer == "adam":
            return torch.optim.Adam([{"params": [*learned.values()]}, *groups], **options)
        # a decay that ignores gradients would draw the neurons' decays and thresholds to zero
        weights = {id(connection.values): connection.values for connection in self.net.connections().values()}
        rest: dict[str, Any] = {"weight_decay": 0.0}
        rest["params"] = [each for each in learned.values() if id(each) not in weights]
        return torch.optim.AdamW([{"params": [*weights.values()]}, rest, *groups], **options)

    def _no_progress(self) -> dict[str, Any]:
        firing_rates = torch.zeros(sum(self._neurons), device=self.device)
        return {**super()._no_progress(), "firing_rates": firing_rates, "units": self._units()}

    def train_epoch(self, on_step: StepCallback | None = None) -> dict[str, Any]:
        if self.world.leads:
            *_, (name, last) = self.net.connections().items()
            self._layers.check_classes(name, last.mask.fan_in())
        return super().train_epoch(on_step)

    def _measures(self, progress: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
        count = len(self.data.train_labels)
        neurons = self.net.neurons()
        rates = dict(zip(neurons, progress["firing_rates"].split(self._neurons), strict=True))
        if self.settings.readout != "counts":
            rates.popitem()  # the last layer has no spikes
        firing_rate = {name: counts.mean().item() / count for name, counts in rates.items()}
        silent = {name: (counts == 0).float().mean().item() for name, counts in rates.items()}
        if self.world.leads:
            self._layers.check(self.epoch, firing_rate, silent, neurons)
        connections = self.net.connections()
        results = {f"{part}_acc": self.evaluate(part) for part in self.judges}
        *_, last = results.values()
        return {name: result.accuracy for name, result in results.items()}, {
            "firing_rate": firing_rate,
            # the share of the neurons that fired for no image of this epoch
            "silent": silent,
            # operations caused by spikes and inputs, per tested image
            "accumulates": last.accumulates,
            "multiplies": last.multiplies,
            "density": {name: layer.mask.density for name, layer in connections.items()},
            "units": {name: layer.mask.num_units for name, layer in connections.items()},
            "units_pruned": self.dst.pruned if self.dst else 0,
            "units_grown": self.dst.grown if self.dst else 0,
            # the share of the units at the start of this epoch, and at the start of training, that still exist
            "units_kept": self._kept(progress["units"]),
            "initial_units_kept": self._kept(self._initial_units),
        }

    def _train_step(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        self.world.stage = f"step {self.step + 1}"
        if self.settings.learn_delay and self.settings.delay_width_schedule != "constant":
            left = SCHEDULES[self.settings.delay_width_schedule](self.step / self._steps)
            self.net.delay_width = 1 + round((self.settings.delay_width - 1) * left)
        labels = self.data.train_labels[index]
        images = self.data.train_images[index]
        if self.settings.shift is not None:
            images = random_crop_and_flip(images, self._stream("augment"), self.settings.shift)
        if self.settings.erase:
            images = random_erase(images, self._stream("erase"), self.settings.erase)
        if self.settings.unit_shift:
            images = random_unit_shift(images, self._stream("unit_shift"), self.settings.unit_shift)
        # from the draws of the whole batch, so that each image gets the same numbers as in one process
        part = self.world.part(len(index))
        inputs = self.net.encode(as_samples(images), self._stream("encode_train"), part)
        labels = labels[part]
        dropped: list[torch.Tensor] | None = None
        if self.settings.dropout:
            drawn = self.net.drop(len(index), self._stream("dropout"))
            dropped = [each[part].to(self.device) for each in drawn]
        results, activity = self._learn(inputs, labels, len(labels) / len(index), dropped)
        self._stepped()
        if self.settings.average is not None:
            share = 1 / min(self.step, self.settings.average)
            for average, now in zip(self.tested.parameters(), self.net.parameters(), strict=True):
                average.data.lerp_(now.data, share)
        if self.dst:
            self.dst.step(inputs, activity)
        loss, correct, firing_rates = results[0], results[1], results[2:]
        return {"loss": loss * len(index), "correct": correct, "firing_rates": firing_rates * len(index)}

    def _learn(
        self, inputs: torch.Tensor, labels: torch.Tensor, share: float, dropped: list[torch.Tensor] | None
    ) -> tuple[torch.Tensor, Activity]:
        """Forward pass, loss, backward pass, update, without waiting for the device. This process has a ``share`` of
        the batch. Returns, for the whole batch, mean cross-entropy, number of correctly classified images and each
        neuron's mean rate, layer after layer [2 + 2·H + C]; and the activity on this process's part."""
        with autocast(self.settings, self.device):
            activity = self.net.simulate(inputs, chunk=self.settings.chunk, dropped=dropped)
        loss = F.cross_entropy(activity.output, labels, label_smoothing=self.settings.label_smoothing)
        objective = share * loss
        epoch, settings = self.epoch + 1, self.settings
        if settings.enforce_sparsity and epoch > settings.warmup_epochs:
            rates = [self._whole_batch(share * rates) for rates in activity.rates[:-1]]
            objective = objective + rate_penalty(rates, *rate_target(epoch, settings.epochs, settings.warmup_epochs))
        self.optimizer.zero_grad(set_to_none=True)  # an interrupted step leaves gradients
        objective.backward()
        with torch.no_grad():
            self._sum_gradients()
            correct = (activity.output.argmax(1) == labels).sum().to(loss.dtype)
            results = self.world.sum_(
                torch.cat([torch.stack([share * loss, correct]), *[share * r for r in activity.rates]])
            )
            self._finite.note(results[0])  # before clipping, which spreads a gradient that is not finite to all others
            if self.settings.clip_grad_norm is not None:
                self._clip_gradient(self.settings.clip_grad_norm)
        self._update()
        self.optimizer.zero_grad(set_to_none=True)  # their memory serves the next forward pass
        return results, activity

    def _sum_gradients(self) -> None:
        """Replaces each gradient by its sum over the processes, in one message."""
        if self.world.size > 1:
            gradients = [each.grad for each in self.net.parameters() if each.grad is not None]
            sums = self.world.sum_(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, each in zip(gradients, sums.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(each.view_as(gradient))

    def _clip_gradient(self, largest: float) -> None:
        """Scales the gradient down to the norm ``largest``, even if its squares overflow (PyTorch returns 0)."""
        gradients = [each.grad for each in self.net.parameters() if each.grad is not None and each.grad.numel()]
        entry = torch.stack([gradient.abs().max() for gradient in gradients]).max()
        shrink = (_SQUARED / entry).clamp(max=1)  # 1 changes no bit
        for gradient in gradients:
            gradient.mul_(shrink)
        norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()
        scale = (largest / (norm + 1e-6)).clamp(max=1 / shrink)
        for gradient in gradients:
            gradient.mul_(scale)

    def _update(self) -> None:
        """The optimizer's step, on one thread for few parameters on a CPU, with equal bits: the fused update is one
        parallel region per parameter, which on a busy machine takes many times as long as the arithmetic."""
        threads = torch.get_num_threads()
        parameters = sum(each.numel() for group in self.optimizer.param_groups for each in group["params"])
        if one_thread := self.device.type == "cpu" and parameters <= ONE_THREAD_UPDATE:
            torch.set_num_threads(1)
        try:
            self.optimizer.step()
            for neurons in self.net.neurons().values():
                if isinstance(neurons, AdLIF):
                    neurons.keep_stable_()
        finally:
            if one_thread:
                torch.set_num_threads(threads)

    def _whole_batch(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, whose gradient goes to this process's part alone: each process sends its own."""
        return part + (self.world.sum_(part.detach().clone()) - part.detach())

    def evaluate(self, part: str = "test") -> Evaluation:
        """The results on the ``"test"`` or ``"val"`` images."""
        return self._evaluate(self.tested, self.epoch, part)

    def test(self, state: dict[str, Any]) -> float:
        return self._evaluate(self.network_of(state), state["epoch"], "test").accuracy

    def network_of(self, state: dict[str, Any]) -> G2GNet:
        """The network of a saved state. Raises an exception in ``saved_state.UNFIT`` if the state does not fit."""
        net = self._build_network(*self._sizes)
        load_model(net, state["model"])
        return net.to(self.device)

    def _evaluate(self, net: G2GNet, epoch: int, part: str) -> Evaluation:
        # the first connection that leads to each population
        layers = [*{each.target: each.name for each in self.net.projections()[::-1]}.values()][::-1]
        # correct images, then additions and multiplications of each layer
        sums = torch.zeros(1 + 2 * len(layers), dtype=torch.int64, device=self.device)
        for batch in run_images(net, self.settings, epoch, self.data, part, world=self.world):
            sums[0] += (batch.activity.output.argmax(1) == batch.labels).sum()
            counted = [count for layer in batch.activity.synaptic_operations() for count in layer[:2]]
            sums[1:] += torch.tensor(counted, device=self.device)
        count = len(self.data.part(part)[1])
        accuracy, *operations = (total / count for total in self.world.sum_(sums).tolist())
        accumulates, multiplies = (dict(zip(layers, operations[kind::2], strict=True)) for kind in range(2))
        return Evaluation(accuracy, accumulates, multiplies)

    def _units(self) -> dict[str, torch.Tensor]:
        """The numbers of the existing units of each connection, row by row, int64 [num_units]."""
        return {name: layer.mask.flat_unit() for name, layer in self.net.connections().items()}

    def _kept(self, units: dict[str, torch.Tensor]) -> dict[str, float]:
        """The share of ``units`` that each connection still has, 0 to 1."""
        now = self._units()
        return {name: int(torch.isin(had, now[name]).sum()) / max(1, len(had)) for name, had in units.items()}

    def _stream(self, purpose: str) -> torch.Generator:
        """This step's stream for a purpose, on the device if it has generators."""
        return stream(self.settings.seed, purpose, self.step, device=draw_device(self.device))
