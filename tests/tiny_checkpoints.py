"""Checkpoints of tiny runs, written by ``train.py``, for the programs that read them."""

import shlex

import train
from g2gnet.base.tensor_files import write_tensors
from g2gnet.training.checkpoints import read_checkpoint

TINY = shlex.split(
    "--dataset fashionmnist-mini --hidden_dim 64 --block_size 8 --T 6 --enc_scale 3 --limit_train 200 --limit_test 100 "
    "--batch_size 50 --epochs 2"
)


VARIANTS = {
    "mixer": "--model mixer",
    "dense": "--model dense --precision bf16",
    "images": "--hidden_dim 2048 --model mixer --layers 4C3-P4-8C3-P2-16 --num_groups 2 --block_size 1 --delay 1",
    "index, dynamic": "--model index --enc rate --sparsity_mode dynamic --dst_interval 3",
}


def train_tiny(folder, flags="--model mixer"):
    assert train.main([*TINY, *shlex.split(flags), "--checkpoint_dir", str(folder)]) == 0
    (checkpoint,) = set(folder.glob("*.pth")) - set(folder.glob("*.best.pth"))
    return checkpoint


def rewrite(checkpoint, target, **changes):
    write_tensors(target, {**read_checkpoint(checkpoint), **changes})
    return target


def replaced(state, name, value):
    """The state with another entry, "a/b" being entry b of entry a."""
    first, _, rest = name.partition("/")
    first = int(first) if first.isdigit() else first
    return {**state, first: replaced(state[first], rest, value) if rest else value}
