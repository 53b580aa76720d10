"""From 6,000 images to a microcontroller: trains, exports, compiles and runs a network, here and as a Cortex-M7.

    python examples/cortex_m.py

It needs gcc, and from Debian gcc-arm-none-eabi, libnewlib-arm-none-eabi and qemu-system-arm. The outputs of both
machines and of PyTorch are compared; instructions are those of qemu, which counts no cycles."""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import g2gnet
from g2gnet.data import load_dataset
from g2gnet.interop import quantize, to_c
from g2gnet.programs import train

TEXTS = Path(__file__).parent / "cortex_m"
#: 784-128-128-10 neurons; 85 % with 30,000 weights after half a minute
NETWORK = (
    "--dataset fashionmnist-mini --model mixer --hidden_dim 128 --block_size 4 --T 10 --readout last --standardize"
)
WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O2")
ARM = ("arm-none-eabi-gcc", "-mcpu=cortex-m7", "-mthumb", "--specs=rdimon.specs", f"-T{TEXTS}/an500.ld")
QEMU = ("qemu-system-arm", "-M", "mps2-an500", "-nographic", "-icount", "shift=0", "-semihosting-config")


def missing() -> list[str]:
    """The programs that this machine does not have."""
    return [each for each in ("cc", ARM[0], QEMU[0]) if shutil.which(each) is None]


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def on_both_machines(net: Any, images: torch.Tensor, folder: Path) -> dict[str, Any]:
    """What the network answers to ``images``, uint8 [N, …], here and as a Cortex-M7; instructions of an image, and the
    bytes of flash and RAM of the network."""
    to_c(net, folder / "network.c")
    rows = (f"    {{{', '.join(map(str, row))}}}," for row in images.flatten(1).tolist())
    begin = f"#define IMAGES {len(images)}\nstatic const unsigned char images[][{images[0].numel()}] = {{"
    (folder / "images.h").write_text("\n".join([begin, *rows, "};\n"]))
    sources = ("network.c", TEXTS / "main.c")
    run("cc", *WARNINGS, "-I.", *sources, "-o", "here", folder=folder)
    run(*ARM, *WARNINGS, "-I.", *sources, TEXTS / "start.c", "-o", "cortex.elf", folder=folder)
    run(ARM[0], *ARM[1:3], *WARNINGS, "-c", "network.c", "-o", "network.o", folder=folder)
    text, data, _ = run("arm-none-eabi-size", "network.o", folder=folder).stdout.splitlines()[1].split()[:3]
    ram = run("arm-none-eabi-nm", "-S", "cortex.elf", folder=folder).stdout
    state = next(line.split()[1] for line in ram.splitlines() if line.endswith(" state"))
    here = run(folder / "here", folder=folder).stdout
    board = run(*QEMU, "enable=on,target=native", "-kernel", "cortex.elf", folder=folder)
    counted = [int(line) for line in board.stderr.split()]
    return {
        "here": here, "board": board.stdout, "flash": int(text) + int(data), "ram": int(state, 16),
        "instructions": sum(counted) // len(counted),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("cortex_m"))
    given = parser.parse_args(argv)
    if lacks := missing():
        print(f"{', '.join(lacks)} cannot be found; on Debian:", file=sys.stderr)
        print("apt install gcc gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm", file=sys.stderr)
        return 1
    if status := train.main([*NETWORK.split(), "--epochs", str(given.epochs), "--checkpoint_dir", str(given.folder)]):
        return status
    (checkpoint,) = given.folder.glob("*_current.pth")
    data = load_dataset("fashionmnist-mini")
    for bits in (8, 4):
        net = quantize(g2gnet.load(checkpoint), bits, data.train_images)
        expected = net(data.test_images[: given.images])
        found = on_both_machines(net, data.test_images[: given.images], given.folder)
        assert found["here"] == found["board"], "the machines differ"
        assert found["here"] == "".join(" ".join(map(str, row)) + "\n" for row in expected.tolist()), "PyTorch differs"
        print(f"{bits} bits: the outputs for {given.images} images are those of PyTorch, here and as a Cortex-M7:")
        print("".join(found["board"].splitlines(keepends=True)[:3]), end="")
        sizes = f"{found['flash']:,} bytes of flash, {found['ram']:,} of RAM"
        print(f"{found['instructions']:,} instructions an image, {sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
