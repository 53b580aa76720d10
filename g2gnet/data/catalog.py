"""The data sets by name. A new one is an entry here and a module that reads it."""

import importlib
from pathlib import Path
from typing import NamedTuple

from g2g_kernels.choices import check_choice
from g2gnet.data import binned, npz
from g2gnet.data.binned import Binning
from g2gnet.data.image_data import ImageData


class Dataset(NamedTuple):
    """What is known about a data set before it is read.

    Attributes:
        shape: of a sample: an image, (height, width) or (channels, height, width), or a sequence (T, …).
        module: of this package, imported when data are read (torchvision takes a second). Its ``load(name, data_dir)``
            gives the :class:`ImageData`, or its ``parts`` the recordings (:mod:`g2gnet.data.binned`).
        crops: whether ``augment="auto"`` shifts and mirrors its images.
        classes: their names, by number.
        sequences: whether samples are sequences, with time first, such as event frames (T, 2, height, width).
        binning: how recordings become sequences; ``shape`` is then that of the defaults.
    """

    shape: tuple[int, ...]
    num_classes: int
    module: str
    crops: bool = False
    classes: tuple[str, ...] = ()
    sequences: bool = False
    binning: Binning | None = None


def _recordings(module: str, binning: Binning, classes: tuple[str, ...]) -> Dataset:
    shape = binning.shape(binning.steps(binning.dt), binning.bins)
    return Dataset(shape, len(classes), module, classes=classes, sequences=True, binning=binning)


_CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
#: in alphabetical order, which numbers them; an underscore is a space
_HUNDRED = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ZIFFERN = ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
_COMMANDS = """
    backward bed bird cat dog down eight five follow forward four go happy house learn left marvin nine no off on one
    right seven sheila six stop three tree two up visual wow yes zero
"""
_GESTURES = """
    hand_clapping right_hand_wave left_hand_wave right_arm_clockwise right_arm_counter_clockwise left_arm_clockwise
    left_arm_counter_clockwise arm_roll air_drums air_guitar other_gestures
"""


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in text.split())


#: every data set by name
DATASETS = {
    "fashionmnist": Dataset((28, 28), 10, "fashion_mnist", classes=_CLOTHES),
    "fashionmnist-mini": Dataset((28, 28), 10, "fashion_mnist", classes=_CLOTHES),
    "cifar10": Dataset((3, 32, 32), 10, "cifar", crops=True, classes=_THINGS),
    "cifar100": Dataset((3, 32, 32), 100, "cifar", crops=True, classes=_names(_HUNDRED)),
    "shd": _recordings("heidelberg", Binning(700, 140, 10, 1400), _DIGITS + _ZIFFERN),
    "ssc": _recordings("heidelberg", Binning(700, 140, 10, 1000), tuple(map(str, range(35)))),
    "gsc": _recordings("speech_commands", Binning(200, 40, 10, 1000, 1 / 16, bands=True), _names(_COMMANDS)),
    "nmnist": _recordings("cameras", Binning(34, 34, 10, 340, camera=True), _DIGITS),
    "dvsgesture": _recordings("cameras", Binning(128, 32, 25, 1500, camera=True), _names(_GESTURES)),
}


def dataset_name(given: Path | str) -> str:
    """The name of a data set: one of :data:`DATASETS`, or of your own file. Raises DataError for an unreadable file.

    Example:
        >>> dataset_name("fashionmnist")
        'fashionmnist'
    """
    return npz.name_of(given) if str(given).endswith(npz.SUFFIX) else str(given)


def load_dataset(
    name: str,
    data_dir: Path | str = "data",
    *,
    bins: int | None = None,
    dt: float | None = None,
    steps: int | None = None,
) -> ImageData:
    """Reads a data set from ``data_dir`` or the system's copy, or downloads it.

    Your own data (:func:`dataset_name`) come from the given file, or the file of that name in ``data_dir``. Recordings
    (``"shd"``, …) become ``steps`` time steps of ``dt`` milliseconds, in ``bins`` along each side of their sensor; None
    takes the data set's :class:`~g2gnet.data.binned.Binning`. Raises ValueError for an unknown name, or for these
    numbers without recordings; DataError if the data cannot be found, downloaded or read.

    Example:
        >>> data = load_dataset("fashionmnist-mini")
        >>> data.train_images.shape, data.num_classes
        (torch.Size([6000, 28, 28]), 10)
    """
    if not npz.is_name(name):
        check_choice("dataset", name, DATASETS, "the name of your own .npz file (dataset_name)")
    dataset = DATASETS.get(name)
    given = [each for each, value in {"bins": bins, "dt": dt, "steps": steps}.items() if value is not None]
    if given and not (dataset and dataset.binning):
        raise ValueError(f"{name} holds no recordings that {given[0]} could count; leave {' and '.join(given)} out")
    if dataset is None:
        return npz.load(name, Path(data_dir))
    module = importlib.import_module(f"{__package__}.{dataset.module}")
    if dataset.binning is None:
        return module.load(name, Path(data_dir))
    bins, dt = dataset.binning.or_usual(bins, dt)
    return binned.load(name, Path(data_dir), module, dataset.num_classes, dataset.binning, bins, dt, steps)
