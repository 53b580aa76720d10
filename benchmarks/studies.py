"""The studies: rows of flags of ``train.py`` that are compared on Fashion-MNIST, as data.

:mod:`benchmarks.study` trains them, :mod:`benchmarks.study_tables` makes their tables.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Study:
    """Rows of flags to be compared."""

    about: str  # what is asked, and what its rows are
    takes: str  # how long all of it takes
    common: str  # flags of every run
    rows: Mapping[str, str]  # the flags of each row, by its name
    epochs: int  # of each run whose row does not say it
    columns: Sequence[str]  # of its table (:data:`benchmarks.study_tables.COLUMNS`)
    default_rows: Sequence[str] = ("*",)  # what ``--rows`` is unless it is given
    seeds: Sequence[int] = (1, 2, 3)
    costs: bool = False  # whether memory and processor time of a training step are measured, too


#: the density at p_intra = 1, p_inter = 0.15 and 8 groups
FULL = 0.25625
#: flags of gradual pruning, and of networks that are rewired by a rule: a share that falls along a cosine
PRUNED = "--sparsity_mode dynamic --dst_interval 100 --dst_fraction 0 --dst_stop 0.75"
SCHEDULE = "--dst_interval 100 --dst_fraction 0.3 --dst_schedule cosine --dst_stop 0.75"
GROWTH = {
    "static": "",
    "random": "--sparsity_mode dynamic --cg random",
    "correlation": "--sparsity_mode dynamic --cg hebb",
    "gradient": "--sparsity_mode dynamic --cg gradient",
}
REWIRED = f"{GROWTH['gradient']} {SCHEDULE}"
PLAIN = "--dataset fashionmnist --T 10 --lr_schedule cosine --weight_decay 0 --standardize --surrogate triangle"


def joined(*flags: str) -> str:
    """Flags in one line; of one that is given twice the later value."""
    return " ".join(f"--{name}{value}" for name, value in dict(_FLAG.findall(" ".join(flags))).items())


_FLAG = re.compile(r"--(\w+)((?: (?!--)\S+)*)")


def crossed(*axes: Mapping[str, str]) -> dict[str, str]:
    """The rows of every combination: names with commas between them, and the flags of all."""
    return {
        ", ".join(name for name, _ in row if name): joined(*(flags for _, flags in row))
        for row in itertools.product(*(axis.items() for axis in axes))
    }


def each(name: str, flag: str, *values: object) -> dict[str, str]:
    """A row for each value of a flag."""
    return {f"{name}{value}": f"--{flag} {value}" for value in values}


widths = functools.partial(each, "H ", "hidden_dim")
units = functools.partial(each, "units of ", "block_size")


def densities(*percents: float) -> dict[str, str]:
    """The probabilities of each density, scaled alike; the default ones for 25 %."""
    shares = {percent: 1.0 if percent == 25 else percent / 100 / FULL for percent in percents}
    return {f"{percent} %": f"--p_intra {p:.4g} --p_inter {0.15 * p:.4g}" for percent, p in shares.items()}


def _dst() -> dict[str, str]:
    rules = {growth: joined(flags, SCHEDULE if flags else "") for growth, flags in GROWTH.items()}
    default = {growth: GROWTH[growth] for growth in ("random", "correlation")}
    return (
        crossed(units(16), densities(25, 10, 5, 2), rules)
        | crossed(units(64), densities(25, 5), rules)
        | crossed(units(1), densities(5), rules)
        | crossed(units(64), {"25 %": ""}, default, {"default schedule": ""})
    )


#: neurons per layer of the dense network that has no more weights
DENSE_WIDTHS = {58_000: 67, 118_000: 127}
#: ways to few weights that begin with few, and those that begin with many
FEW_AT_FIRST = {"": "", "ERK": "--density erk", "rewired": REWIRED, "rewired, ERK": f"{REWIRED} --density erk"}
MANY_AT_FIRST = {
    "gradual": PRUNED,
    "gradual, rewired": REWIRED,
    "from dense": f"{PRUNED} --p_inter 1",
    "from dense, rewired": f"{REWIRED} --p_inter 1",
}
SMOOTHED = "--readout last --label_smoothing 0.1"
#: what is added to any of them
MORE = {
    "": "--augment flip",
    "smoothed": f"{SMOOTHED} --augment flip",
    "smoothed, shifted": f"{SMOOTHED} --augment shift-flip",
    "smoothed, shifted, decayed": f"{SMOOTHED} --augment shift-flip --optimizer adamw --weight_decay 0.1",
}
#: the choice of the held-back images, on which the two of 127 neurons were level; README shows the second one's command
CHOSEN_FEW = (
    "58,000 weights, dense, 67, smoothed",
    "58,000 weights, H 512, units of 1, gradual, smoothed, shifted",
    "58,000 weights, H 512, units of 16, gradual, smoothed, shifted",
    "118,000 weights, dense, 127, smoothed",
    "118,000 weights, dense, 127, smoothed, shifted",
    "118,000 weights, H 512, units of 1, gradual, smoothed, shifted",
    "118,000 weights, H 1024, units of 16, gradual, smoothed, shifted",
)
EXAMPLE = CHOSEN_FEW[1]


def _few() -> dict[str, str]:
    rows: dict[str, str] = {}
    for weights, dense in DENSE_WIDTHS.items():
        about = {f"{weights:,} weights": ""}
        rows |= crossed(about, {f"dense, {dense}": f"--model dense --hidden_dim {dense}"}, MORE)
        for width in (512, 1024):
            share = 0.995 * weights / (width * (28 * 28 + width + 10))  # a little less, as units are drawn
            index, *of_share = {"": "--model index"}, *densities(100 * share).values()
            few = {way: joined(flags, *of_share) for way, flags in FEW_AT_FIRST.items()}
            many = {way: f"--final_density {share:.4g} {flags}" for way, flags in MANY_AT_FIRST.items()}
            # with units as large as 16 the number of weights depends on the draw
            for side, ways in ((1, few | many), (16, many)):
                rows |= crossed(about, index, widths(width), units(side), ways, MORE)
    return rows


#: (width, density in per cent, side of a unit); the last four have as few weights as dense networks of 12, 64 and 128
SPARSE = (
    *((width, 25, 64) for width in (256, 512, 1024, 2048)),
    *((width, percent, 16) for percent in (10, 5) for width in (1024, 2048, 4096)),
    *((width, percent, 1) for percent in (10, 5) for width in (1024, 2048)),
    *((width, percent, 1) for width, percent in ((128, 8), (256, 3), (512, 8), (512, 16))),
)


def _tradeoff() -> dict[str, str]:
    rows = crossed({"dense": "--model dense"}, each("", "hidden_dim", 12, 32, 64, 128, 256, 512, 1024, 2048))
    for width, percent, side in SPARSE:
        rewired = {"": ""} | ({"rewired": REWIRED} if (width, side) == (2048, 16) else {})
        index = {"index": "--model index"}
        rows |= crossed(index, each("", "hidden_dim", width), densities(percent), rewired, units(side))
    return rows


LEARNT = "--T 10 --lr_schedule cosine --standardize --weight_decay 0 --surrogate triangle"
RECIPE = f"--model index --hidden_dim 1024 {LEARNT} --dropout 0.2 --augment flip"
DECAYED = "--label_smoothing 0.1 --optimizer adamw --weight_decay 0.1"
#: parts that help one another
MEMBRANE, SHIFTED = f"--readout last {DECAYED} --density erk", "--augment shift-flip --dropout 0"
SECOND = f"{MEMBRANE} {SHIFTED}"
#: what is changed in rows of 20 epochs
CHANGED = {
    "constant rate": "--lr_schedule constant",
    "two epochs of warm-up": "--lr_warmup 470",
    **each("weight decay ", "weight_decay", "1e-5", "1e-4"),
    **each("decoupled decay ", "optimizer adamw --weight_decay", 0.01, 0.1),
    **each("learning rate ", "lr", "5e-4", "2e-3"),
    "batches of 128": "--batch_size 128",
    "label smoothing 0.1": "--label_smoothing 0.1",
    "averaged over an epoch": "--average 235",
    "averaged over four epochs": "--average 940",
    "ATan": "--surrogate atan",
    "triangle, alpha 4": "--alpha 4",
    "no dropout": "--dropout 0",
    **each("dropout ", "dropout", 0.1, 0.3),
    "no augmentation": "--augment auto",
    "shifted and mirrored": "--augment shift-flip",
    "half of the images occluded": "--erase 0.5",
    **each("T ", "T", 5, 16, 20),
    "last membrane": "--readout last",
    "a beta and threshold per neuron": "--per_neuron",
    "synaptic neurons": "--neuron synaptic",
    "adaptive neurons": "--neuron adlif",
    "initial weights × 3": "--init_gain 3",
    "ERK": "--density erk",
    **widths(512, 2048, 4096),
    "mixer": "--model mixer",
    "dense": "--model dense",
    "last membrane, label smoothing, decay, ERK": MEMBRANE,
    "shifted and mirrored, no dropout": SHIFTED,
}
#: what is changed in rows of 40 epochs: what prevents overfitting pays in long runs, and in wide networks
LONGER = {
    "dropout 0.1": "--dropout 0.1",
    "no augmentation": "--augment auto",
    "H 2048": "--hidden_dim 2048",
    "H 2048, label smoothing, decay": f"--hidden_dim 2048 {DECAYED}",
    "last membrane, label smoothing, decay, ERK": MEMBRANE,
    "H 2048, last membrane, label smoothing, decay, ERK": f"--hidden_dim 2048 {MEMBRANE}",
    "second recipe": SECOND,
    **crossed({"second recipe": SECOND}, widths(2048, 4096)),
    "second recipe, H 2048, dense": f"{SECOND} --hidden_dim 2048 --model dense --density uniform",
    # a part of the first one in the place of the second's
    "second recipe, spike counts": f"{SECOND} --readout counts",
    "second recipe, hard labels": f"{SECOND} --label_smoothing 0",
    "second recipe, no decay": f"{SECOND} --optimizer adam --weight_decay 0",
    "second recipe, uniform": f"{SECOND} --density uniform",
    "second recipe, mirrored": f"{SECOND} --augment flip",
    "second recipe, dropout 0.2": f"{SECOND} --dropout 0.2",
}
#: the best one, which has 80 epochs as well
BEST = "80 epochs, second recipe, H 2048"
#: the word of a row of a conventional network (:mod:`benchmarks.conventional`), and the rows that have one
RELU = "ReLU"
CONVENTIONAL = (
    "the recipe", "20 epochs", "40 epochs, second recipe, H 2048", "40 epochs, second recipe, H 2048, dense", BEST
)  # fmt: skip


def _recipe() -> dict[str, str]:
    recipe, twenty = {"": RECIPE}, {"": "--epochs 20"}
    rows = {"the recipe": RECIPE, "20 epochs": f"{RECIPE} --epochs 20"} | crossed(recipe, twenty, CHANGED)
    rows["input as it is"] = rows["20 epochs"].replace("--standardize ", "")
    rows |= crossed({"40 epochs": RECIPE}, LONGER)
    rows[BEST] = f"{rows[BEST.replace('80', '40')]} --epochs 80"
    dropout = {"dropout 0.2": "", "no dropout": "--dropout 0"}
    rows |= crossed(recipe, {"5 %": f"{densities(5)['5 %']} --block_size 16 {REWIRED}"}, widths(1024, 2048), dropout)
    return rows | {f"{row}, {RELU}": f"{rows[row]} --name {RELU}" for row in CONVENTIONAL}


#: the model of each graph, and what the others are compared with
GRAPHS = {
    "regular": "--model regular", "Erdős–Rényi": "--model erdos_renyi", **each("", "model", "index", "random", "mixer"),
    "small world": "--model small_world", "distance": "--model distance", "image plane": "--model plane",
}  # fmt: skip
CONTROL = "regular"


#: how an image unfolds; where steps are many, a longer memory, and against exploding gradients a lower surrogate and
#: smaller steps
SEQUENCES = {
    "rows": "--sequence rows",
    "permuted": "--sequence permuted --sequence_step 4 --beta 0.97 --alpha 0.05 --lr 0.002",
    "pixels": "--sequence pixels --chunk 56 --beta 0.97 --alpha 0.02 --lr 0.001",
}
NETWORKS = {
    "feed-forward": "",
    "recurrent": "--recurrent",
    "adaptive": "--neuron adlif",
    "both": "--recurrent --neuron adlif",
}
#: which weights a network has; with 5 % in units of 16, 37 % of the second layer never fired
WEIGHTS = {
    "25 %": f"--model index --density erk --block_size 16 {densities(25)['25 %']}",
    "5 %, rewired": f"--model index --density erk --block_size 4 {densities(5)['5 %']} {REWIRED}",
    "dense": "--model dense",
}
#: the word of a row of PyTorch's GRU (:mod:`benchmarks.conventional`), and the best learning rates on held-back images
GRU = "GRU"
GRU_RATES = {"rows": "--lr 0.008", "permuted": "--lr 0.016", "pixels": "--lr 0.032"}
OVER_TIME = (
    "--dataset fashionmnist --hidden_dim 256 --batch_size 128 --lr 0.004 --lr_schedule cosine --weight_decay 0 "
    "--standardize --readout last --per_neuron --surrogate triangle --alpha 0.5"
)


def _sequence() -> dict[str, str]:
    rows: dict[str, str] = {}
    for data, sequence in SEQUENCES.items():
        rows |= crossed({data: sequence}, NETWORKS, WEIGHTS)
        rows[f"{data}, {GRU}"] = joined(rows[f"{data}, recurrent, 25 %"], GRU_RATES[data], f"--name {GRU}")
    return rows


#: at most how many steps late spikes and inputs arrive, chosen on held-back images
LATE = {"rows": 8, "permuted": 60}
#: a tapped delay line, and the best learning rate with and without it, both chosen on held-back images
TAPS = {"lr 0.016": "--lr 0.016", "lr 0.016, 64 taps": "--lr 0.016 --input_taps 64"}
DELAYS = ("no delays", "fixed delays", "learned delays")


def _delays() -> dict[str, str]:
    def of(axis: Mapping[str, str], *names: str) -> dict[str, str]:
        return {name: axis[name] for name in names}

    rows = crossed(of(SEQUENCES, "permuted"), of(NETWORKS, "adaptive"), of(WEIGHTS, "25 %", "dense"), TAPS)
    for data, most in LATE.items():
        late = dict(zip(DELAYS, ("", f"--delay {most}", f"--delay {most} --learn_delay"), strict=True))
        rows |= crossed(of(SEQUENCES, data), NETWORKS, of(WEIGHTS, "25 %", "5 %, rewired"), late)
    return rows


def _images() -> dict[str, str]:
    # ERK keeps the few kernels of the first layer
    shares = {f"{percent} %": f"--p_intra {percent / 100}" for percent in (25, 5)}
    sparse = "--model regular --num_groups 1 --block_size 1 --density erk"
    spiking = crossed({"100 %": "--model conv"}) | crossed(shares, {"": sparse})
    return spiking | {f"{row}, {RELU}": f"{flags} --name {RELU}" for row, flags in spiking.items()}


#: the memory of a network: where a step's input and past go
MEMORIES = {
    "adaptive": "--neuron adlif",
    "both": "--recurrent --neuron adlif",
    "learned delays": "--recurrent --neuron adlif --delay {late} --learn_delay --delay_width 10 "
    "--delay_width_schedule cosine",
    "taps": "--neuron adlif --input_taps {taps}",
    "taps, reset to zero": "--neuron adlif --reset zero --input_taps {taps}",
}
#: what is chosen on held-back images, by as many runs for every row; a membrane that forgets bears a sharper surrogate
CHOICES = crossed(
    {"slow membrane": "--beta 0.97 --alpha 0.05", "fast membrane": "--beta 0.5 --alpha 0.2 --adapt_decay 0.98"},
    each("lr ", "lr", 0.004, 0.016),
)
GRU_CHOICES = each("lr ", "lr", 0.004, 0.008, 0.016, 0.032)


def _memory() -> dict[str, str]:
    rows: dict[str, str] = {}
    few = {name: flags for name, flags in WEIGHTS.items() if name != "dense"}
    fewer = {"20 %": f"{WEIGHTS['25 %']} {densities(20)['20 %']}"}  # no more parameters than the GRU of H 128 has
    for name, taps in (("permuted", 64), ("rows", 28)):
        data = {name: SEQUENCES[name]}
        memories = {memory: flags.format(late=LATE[name], taps=taps) for memory, flags in MEMORIES.items()}
        last = {memory: flags for memory, flags in memories.items() if "taps" in memory}
        rows |= crossed(data, widths(128, 256), few, memories, CHOICES)
        rows |= crossed(data, widths(128), fewer, last, CHOICES)
        rows |= crossed(data, widths(128, 256), {GRU: f"{WEIGHTS['25 %']} --recurrent --name {GRU}"}, GRU_CHOICES)
    single = {"one by one": f"{SEQUENCES['permuted']} --sequence_step 1 --chunk 56"}  # pixels, 784 steps
    rows |= crossed(single, widths(128), fewer, {"taps": MEMORIES["taps"].format(taps=256)}, CHOICES)
    return rows


ACCURACY, TRAINED, SILENT = "test accuracy, %", "training accuracy, %", "never fires, % of layers 1 and 2"
SECONDS, PROCESSOR = "seconds of training", "processor seconds"
STUDIES = {
    "few": Study(
        "Few weights, and better than a small dense network? Dense networks of 67 and 127 neurons per layer "
        "against wider sparse ones of as many weights: static, rewired, ERK, gradual (pruned from a quarter of the "
        "weights), from dense; smoothed labels, shifted images, decayed weights. By default the best on "
        "held-back images. Memory is that of a training step above the process with its imports.",
        "an hour",
        f"--dataset fashionmnist {LEARNT}",
        _few(),
        40,
        ("at most", "weights", ACCURACY, TRAINED, SILENT, PROCESSOR, "memory of a step"),
        default_rows=CHOSEN_FEW,
        costs=True,
    ),
    "tradeoff": Study(
        "Accuracy for time and for weights, dense against sparse, by one recipe. Times are processor seconds of "
        "training without evaluation; with --jobs 1 no other run uses the caches.",
        "six hours",
        PLAIN,
        _tradeoff(),
        20,
        ("network", "weights", PROCESSOR, ACCURACY),
    ),
    "recipe": Study(
        "What does each part of the recipe contribute? Rows of 20 epochs have one part left out or replaced; rows "
        "'40 epochs, …' some of these, alone or together. The second recipe is what came of them; its other rows "
        "have one part of the first instead. Choose with --validation. Rows '5 %, …' have that share of the "
        "weights, in rewired units of 16; rows of ReLU are the same networks without spikes and time.",
        "twenty hours",
        "--dataset fashionmnist",
        _recipe(),
        40,
        ("", "epochs", ACCURACY, "minus the recipe, points", TRAINED, SILENT, SECONDS),
    ),
    "images": Study(
        "Convolutions by few kernels: 16C3-P2-32C3-P2-10 with all of its kernels and weights, a quarter and a "
        "twentieth, and the same networks with ReLU, without time.",
        "two hours",
        f"--dataset fashionmnist --layers 16C3-P2-32C3-P2 {LEARNT.replace('--T 10', '--T 5')} --readout last "
        "--batch_size 128",
        _images(),
        5,
        ("", "weights", ACCURACY, TRAINED, SILENT, PROCESSOR),
    ),
    "dst": Study(
        "Growth rules of dynamic sparse training against static graphs; all prune by magnitude. Spread: standard "
        "deviation over mean of the units of a block row of fc2, and of a block column; inside: units that join "
        "neurons of one group.",
        "eight hours",
        PLAIN.replace("--T 10", "--model index --T 10 --hidden_dim 1024"),
        _dst(),
        20,
        ("", ACCURACY, SILENT, "spread", "rows empty", "inside"),
    ),
    "structure": Study(
        "Does it matter who connects to whom? Groups, a small world of groups and distances against graphs without "
        "modules, seed by seed against regular, which differs in nothing but where units lie. ERK shares the "
        'weights out, so that no class is left without. By default the graphs of one size; --rows "*" trains all '
        "640.",
        "forty minutes, all of it with 2 epochs six and a half hours",
        PLAIN.replace("--dataset fashionmnist", "--dataset fashionmnist --density erk"),
        crossed(GRAPHS, widths(1024, 2048), densities(25, 10, 5, 2), units(16, 1)),
        5,
        (),
        default_rows=("*, H 1024, 5 %, units of 16",),
        seeds=(1, 2, 3, 4, 5),
    ),
    "recurrent_structure": Study(
        "The same over time: recurrent networks that read images row by row, as those of the study sequence.",
        "forty minutes",
        f"{OVER_TIME} --sequence rows --recurrent --density erk",
        crossed(GRAPHS, densities(25), units(16)) | crossed(GRAPHS, densities(5), units(4)),
        3,
        (),
        seeds=(1, 2, 3, 4, 5),
    ),
    "sequence": Study(
        "Sequences with and without recurrence and adaptation: images row by row (T 28), as pixels in a fixed "
        "random order, four at a time (T 196), or pixel by pixel (T 784); sparse, dense, and PyTorch's GRU with as "
        "many weights. Only the rows are trained unless --rows names others.",
        "four hours, with 5 epochs one",
        OVER_TIME,
        _sequence(),
        20,
        ("", "weights", "memory of a step", "its processor time", ACCURACY),
        default_rows=("rows, *",),
        costs=True,
    ),
    "delayed": Study(
        "What delays buy on the sequences of the study of that name: none, fixed ones (drawn for each neuron of each "
        "projection), and learned ones. Only permuted pixels are trained unless --rows names others.",
        "four hours",
        OVER_TIME,
        _delays(),
        5,
        ("", "weights", ACCURACY, TRAINED),
        default_rows=("permuted, *",),
    ),
    "memory": Study(
        "Does a sparse spiking network remember as much as PyTorch's GRU? The GRU has as many weights as the "
        "recurrent network of 25 %. Adaptive neurons, recurrent connections, delays learned with a width that falls "
        "from 10 to 1, and tapped delay lines of the inputs. Initial decays with a surrogate, and the learning rate, "
        "are chosen with --validation: one of four pairs for every row, of four learning rates for the GRU. Only one "
        "size is trained unless --rows names others.",
        "an hour, all of it with one seed five",
        f"{OVER_TIME} --limit_train 20000",
        _memory(),
        5,
        ("", "weights", PROCESSOR, ACCURACY, TRAINED),
        default_rows=("permuted, H 128, 25 %, *", f"permuted, H 128, {GRU}, *"),
    ),
    "surrogate": Study(
        "Surrogate gradients of the hidden neurons; everything else has its default. The rows of the default size "
        'are long runs: --seeds 1 --rows "*default size*" runs each once.',
        "five hours",
        "--dataset fashionmnist --model index",
        crossed(
            {
                f"{name}, alpha {alpha}": f"--surrogate {name.lower()} --alpha {alpha}"
                for name, alpha in (("ATan", 2), ("triangle", 2), ("triangle", 4), ("boxcar", 2))
            },
            {"": "--T 10 --hidden_dim 1024", "default size, 5 epochs": "--epochs 5"},
        ),
        20,
        ("", ACCURACY, "firing rate, % of layers 1 and 2", SILENT, SECONDS),
    ),
    "models": Study(
        "Every model, static graphs, and an unstructured random graph with as many weights.",
        "half an hour",
        "--dataset fashionmnist --T 10 --hidden_dim 1024",
        {
            **each("", "model", "dense", "index", "random", "mixer"),
            **each("index, units of ", "model index --block_size", 32, 16),
            "index, single weights": "--model index --block_size 1",
            "unstructured random graph": f"--model index --block_size 1 --num_groups 1 --p_intra {FULL}",
        },
        5,
        ("model", ACCURACY, TRAINED, "weights of fc2 that exist", "flags"),
    ),
    "rewiring": Study(
        "Does rewiring pay in time? A dense network, a sparse one with a fixed graph, and one that grows by gradient.",
        "ten minutes",
        "--dataset fashionmnist --T 10 --hidden_dim 1024",
        {
            "dense": "--model dense",
            "index, fixed graph": "--model index",
            "index, dynamic": f"--model index {SCHEDULE.replace(' --dst_fraction 0.3', '')} {GROWTH['gradient']}",
        },
        4,
        ("", ACCURACY, "seconds of an epoch"),
    ),
}  # fmt: skip
