"""Trials of the fly-brain model of Shiu et al. (2024): random spikes excite some neurons, others are silenced. The
files are those of github.com/philshiu/Drosophila_brain_model; reading and writing them takes pandas and pyarrow.

    python examples/fly_trials.py Completeness_783.csv Connectivity_783.parquet --excite 720575940621039145
"""

import argparse
import pathlib
import signal

import pandas
import torch

from g2gnet import CubaLIF, Projection, SpikingNetwork

DT, RATE, WEIGHT, PART = 0.1, 150.0, 0.275, 1000  # ms; Hz; mV a synapse, rest is 0; steps of one call
COLUMNS = ["Presynaptic_Index", "Postsynaptic_Index", "Excitatory x Connectivity"]


def fly(neurons: int, connections: pandas.DataFrame, excited: list[int]) -> SpikingNetwork:
    """The network; an input is worth 250 synapses, onto the membrane of a neuron that is never refractory."""
    pre, post, synapses = (connections[column] for column in COLUMNS)
    refractory = torch.full((neurons,), 2.2).index_fill(0, torch.tensor(excited), 0.0)
    cells = CubaLIF(neurons, tau=20.0, tau_syn=5.0, dt=DT, threshold=7.0, refractory=refractory, reset_current=True)
    brain = Projection.from_edges("brain", "brain", pre, post, WEIGHT * synapses, round(1.8 / DT), (neurons, neurons))
    to_each = range(len(excited)), excited, 250 * WEIGHT, 0, (len(excited), neurons)
    inputs = Projection.from_edges("input", "brain", *to_each, onto="membrane")
    return SpikingNetwork({"brain": cells}, [*inputs, *brain], output="brain")


@torch.no_grad()
def spikes_of(net: SpikingNetwork, steps: int, trials: int, silent: list[int]) -> pandas.DataFrame:
    """The spikes of all trials, one sample each: t in seconds, trial, and the number of the neuron."""
    state, spikes = None, []
    for first in range(0, steps, PART):
        x = (torch.rand(min(PART, steps - first), trials, net.sizes[-1]) < RATE * DT / 1000).float()
        activity = net.simulate(x, state, silenced={"brain": silent})
        state = activity.state
        spikes.append(activity.spikes["brain"].events() + torch.tensor([first, 0, 0]))
    step, trial, neuron = torch.cat(spikes).T.numpy()
    return pandas.DataFrame({"t": step * DT / 1000, "trial": trial, "neuron": neuron})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs=2, metavar="FILE", help="completeness (CSV), then connectivity (Parquet)")
    for flag, required, help in (
        ("--excite", True, "IDs of FlyWire"),
        ("--silence", False, "likewise (default: none)"),
    ):
        parser.add_argument(flag, type=int, nargs="+", default=[], required=required, metavar="ID", help=help)
    for flag, default in (("--trials", 30), ("--seconds", 1.0), ("--out", "spikes.parquet")):
        parser.add_argument(flag, type=type(default), default=default, help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.trials < 1 or not 1e-4 <= args.seconds <= 1e4 or not pathlib.Path(args.out).absolute().parent.is_dir():
        parser.error("--trials must be 1 or more, --seconds from 0.0001 to 10000, --out a file in an existing folder")
    if missing := [name for name in args.files if not pathlib.Path(name).is_file()]:
        parser.error(f"{missing[0]} is no file; the model's repository has it")
    try:
        ids = pandas.read_csv(args.files[0], index_col=0).index
        number = pandas.Series(range(len(ids)), ids)  # of the FlyWire ID of a neuron
        if unknown := {*args.excite, *args.silence}.difference(ids):
            parser.error(f"{args.files[0]} has no neuron {min(unknown)}")
        net = fly(len(ids), pandas.read_parquet(args.files[1], columns=COLUMNS), number[args.excite].tolist())
    except (OSError, ValueError, ImportError) as error:  # those of pandas, and of edges that are none
        parser.error(f"no network of {' and '.join(args.files)}: {str(error).splitlines()[0]}")
    spikes = spikes_of(net, round(args.seconds * 1000 / DT), args.trials, number[args.silence].tolist())
    spikes.assign(flywire_id=ids[spikes.pop("neuron")]).to_parquet(args.out)
    print((pandas.read_parquet(args.out).flywire_id.value_counts() / (args.trials * args.seconds)).head(10))  # Hz


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C shows no traceback
    main()
