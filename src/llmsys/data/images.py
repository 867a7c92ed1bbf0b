"""Images: scikit-learn's bundled digits, and CIFAR-10 from its official binary files.

The digits (1,797 of 8x8 pixels with values 0 to 16, ten classes) come with scikit-learn, so they are there without a
network; they are pinned by a hash of their pixels. Within each class, the images with the smallest sha256 are the
validation split: every class has its share on both sides, and equal images are on one side.

CIFAR-10 keeps its own test split. Only the binary version is read, because the "python version" is a pickle, which
runs whatever code is in it: six files of 10,000 records, each one byte of label and 3072 of pixels (1024 red, 1024
green, 1024 blue, row by row).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmsys import schema
from llmsys.data import blocks, corpus
from llmsys.data.examples import Pixels, Source, pixel_digest, sample
from llmsys.errors import MissingPackage

DIGITS_HASH = "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"
"""sha256 over the pixels (uint8, 0 to 255) and the labels (int64) of the digits."""
DIGITS_STATS = ((0.305,), (0.376,))
CIFAR_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
"""(mean, standard deviation) of each channel over the training images."""

CIFAR_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_VAL = ("test_batch.bin",)
CIFAR_RECORDS = 10_000
_RECORD = 1 + 3 * 32 * 32


def open(cfg: schema.Data) -> Source[Pixels]:
    """The images of `data.kind`. ValueError, one line, where the files are missing or are not what they should be."""
    train, val, labels = READERS[cfg.kind](cfg)
    train, val = (_cap(split, cap) for split, cap in ((train, cfg.max_train), (val, cfg.max_val)))
    return Source("images", train, val, labels, pixel_digest(labels, train, val), cfg.augment)


def content_hash(cfg: schema.Data) -> str:
    """See `sources.content_hash`."""
    if cfg.kind == "digits":
        return DIGITS_HASH
    folder = _cifar_folder(cfg)
    return blocks.folder_hash(folder, [folder / name for name in (*CIFAR_TRAIN, *CIFAR_VAL)])


def _digits(cfg: schema.Data) -> tuple[Pixels, Pixels, tuple[str, ...]]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise MissingPackage("data=digits: they come with scikit-learn: pip install 'llmsys[train]'") from None
    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None]  # [N, 1, 8, 8]
    classes = found.target.astype("<i8")
    sha = hashlib.sha256(images.tobytes() + classes.tobytes()).hexdigest()
    if sha != DIGITS_HASH:
        raise ValueError(
            f"data=digits: scikit-learn's digits have the hash {sha[:16]}, not {DIGITS_HASH[:16]} as in every version "
            "so far: pip install --force-reinstall --no-deps scikit-learn"
        )
    keys = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images])
    held_out = [corpus.choose(dict.fromkeys(keys[classes == c], 1), cfg.val_percent) for c in range(10)]
    val = np.isin(keys, list(set().union(*held_out)))
    splits = [Pixels(images[side], classes[side], *DIGITS_STATS) for side in (~val, val)]
    return splits[0], splits[1], tuple(map(str, range(10)))


def _cifar10(cfg: schema.Data) -> tuple[Pixels, Pixels, tuple[str, ...]]:
    folder = _cifar_folder(cfg)
    train, val = (read_binary([folder / name for name in names]) for names in (CIFAR_TRAIN, CIFAR_VAL))
    return train, val, CIFAR_LABELS


def _cifar_folder(cfg: schema.Data) -> Path:
    """Where the six files lie, each of the right size."""
    assert cfg.path is not None, "the schema asks for it"
    folder = Path(cfg.path).expanduser()
    for name in (*CIFAR_TRAIN, *CIFAR_VAL):
        path, size = folder / name, CIFAR_RECORDS * _RECORD
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            fault = "no such file" if found is None else f"{found} bytes, not {size}"
            raise ValueError(
                f"{path}: {fault}; data.path={cfg.path} must be the folder cifar-10-batches-bin of CIFAR-10's official "
                f"binary version (cifar-10-binary.tar.gz){cfg.how_to_make}"
            )
    return folder


def read_binary(paths: list[Path]) -> Pixels:
    """All records of CIFAR-10's binary files. ValueError where a label is not one of ten."""
    records = np.concatenate([np.fromfile(path, dtype=np.uint8) for path in paths]).reshape(-1, _RECORD)
    if records[:, 0].max() >= len(CIFAR_LABELS):
        raise ValueError(f"{paths[0].parent}: a label is {records[:, 0].max()}; CIFAR-10's are 0 to 9")
    return Pixels(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64), *CIFAR_STATS)


def _cap(split: Pixels, cap: int) -> Pixels:
    if not cap or cap >= len(split):
        return split
    chosen = sample(len(split), cap)
    return Pixels(split.images[chosen], split.classes[chosen], split.mean, split.std)


READERS: dict[str, Callable[[schema.Data], tuple[Pixels, Pixels, tuple[str, ...]]]] = {
    "digits": _digits,
    "cifar10": _cifar10,
}
"""Kind -> (training split, validation split, labels)."""
