r"""Google Speech Commands v0.02 (Warden 2018) as mel bands: the tree of ``.wav`` files, 35 words, 16 kHz, 16 bits.

A time step is a window of 25 ms that begins at t·dt. With s its samples, from −1 to 1, times a Hann window (zeros after
the end of a recording), and F the triangular mel filters between 20 Hz and 8 kHz, a value is

    ln(max(F·|FFT(s)|², ε) / ε),    ε = 1e-6,

so that silence is 0. The mel scale is 2595·log₁₀(1 + f/700 Hz). ``testing_list.txt`` and ``validation_list.txt`` name
the test and validation recordings; the others are for training.
"""

import functools
import warnings
from collections.abc import Set
from pathlib import Path

import numpy as np
from scipy.io import wavfile

from g2gnet.base.files import open_file, read_file
from g2gnet.base.messages import reason
from g2gnet.data.binned import Grid, Recordings, folder_of, of_files
from g2gnet.data.catalog import DATASETS
from g2gnet.data.image_data import DataError

FORM = "log mel bands, 25 ms, 20 Hz to 8 kHz, floor 1e-6"
COUNTS = {"train": 84843, "val": 9981, "test": 11005}
LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}
#: the folders of words, whose order numbers the classes, and the folder of other sounds
WORDS = DATASETS["gsc"].classes
NOISE = "_background_noise_"
RATE = 16000  # Hz
WINDOW, FFT = 400, 1024  # samples
LOWEST, HIGHEST = 20.0, 8000.0  # Hz
FLOOR = 1e-6


def parts(name: str, data_dir: Path) -> dict[str, Recordings]:
    """The recordings, in ``data_dir`` or where torchaudio puts them."""
    places = ("SpeechCommands/speech_commands_v0.02", "speech_commands_v0.02", ".")
    remedy = f"unpack speech_commands_v0.02.tar.gz into {data_dir / places[1]}"
    root = folder_of(name, data_dir, places, list(LISTS.values()), remedy)
    others = {file for file in root.glob("*/[!.]*.wav") if file.parent.name != NOISE}  # macOS leaves hidden ones
    listed = {}
    for part, file in LISTS.items():  # each takes its recordings from the others
        listed[part] = _listed(root, file, others)
        others -= listed[part]
    if not others:
        raise DataError(f"{root} holds no recordings for training, <word>/*.wav; {remedy}")
    found = {}
    for part, members in {"train": others, **listed}.items():
        # by speakers, in an order in which words take turns
        files = sorted(members, key=lambda file: (file.name, file.parent.name))
        found[part] = of_files(files, [file.parent.name for file in files], WORDS, COUNTS[part], _bands)
    return found


def _listed(root: Path, file: str, among: Set[Path]) -> set[Path]:
    """The recordings that a list names, which must be ``among`` these."""
    try:
        files = {root / line.strip() for line in read_file(root / file).decode().splitlines() if line.strip()}
        if not files:
            raise ValueError("it is empty")
        if missing := files - among:
            raise ValueError(f"it names {min(missing)}, which is missing or in another list")
    except (OSError, ValueError) as error:
        raise DataError(f"{root / file} is damaged: {reason(error)}; unpack it again") from error
    return files


def _bands(file: Path, grid: Grid) -> np.ndarray:
    with open_file(file) as content, warnings.catch_warnings():
        warnings.simplefilter("error", wavfile.WavFileWarning)  # of a file that ends too early
        warnings.filterwarnings("ignore", "Chunk", wavfile.WavFileWarning)  # of one that holds no samples
        rate, samples = wavfile.read(content)
    if rate != RATE or samples.dtype != np.int16 or samples.ndim != 1 or not len(samples):
        raise ValueError(f"it has {samples.dtype} {list(samples.shape)} at {rate} Hz, not int16 [n] at {RATE}")
    return mel_bands(samples / 2**15, mel_filters(grid.bins), grid.shape[0], round(RATE / 1000 * grid.dt))


def mel_bands(samples: np.ndarray, filters: np.ndarray, steps: int, hop: int) -> np.ndarray:
    """The logarithm of the power in each band, of windows that begin ``hop`` samples apart: float16 [steps, bands]."""
    padded = np.zeros((steps - 1) * hop + WINDOW, np.float32)
    length = min(len(samples), len(padded))
    padded[:length] = samples[:length]
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::hop]
    power = np.abs(np.fft.rfft(windows * np.hanning(WINDOW + 1)[:-1], FFT)) ** 2
    return np.log(np.maximum(power @ filters, FLOOR) / FLOOR).astype(np.float16)


@functools.cache
def mel_filters(bands: int) -> np.ndarray:
    """The weights of a transform's frequencies in each band, triangles that overlap by half: [FFT / 2 + 1, bands]."""
    low, high = (2595 * np.log10(1 + f / 700) for f in (LOWEST, HIGHEST))
    corners = np.linspace(low, high, bands + 2)
    mel = 2595 * np.log10(1 + np.fft.rfftfreq(FFT, 1 / RATE) / 700)[:, None]
    rising = (mel - corners[:-2]) / np.diff(corners)[:-1]
    falling = (corners[2:] - mel) / np.diff(corners)[1:]
    return np.maximum(0, np.minimum(rising, falling))
