"""Images: pinned and split by content, read without a pickle, and made into numbers the same way every time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from llmsys import data, schema
from llmsys.data import images
from llmsys.data.examples import Pixels
from llmsys.data.pixels import Images, crop_and_mirror

DIGITS = schema.Data(kind="digits")


def encode(cfg: schema.Data, **shape: int) -> data.Dataset:
    return data.encode(data.open(cfg), None, schema.Train(), schema.ConvNet(kind="convnet", family="resnet", **shape))


def cifar(folder: Path, records: int = images.CIFAR_RECORDS) -> schema.Data:
    """Six files of the official size, sparse: all black airplanes, but for the first image of each."""
    folder.mkdir()
    for number, name in enumerate((*images.CIFAR_TRAIN, *images.CIFAR_VAL)):
        with (folder / name).open("wb") as file:
            file.write(bytes([number, *[10] * 1024, *[20] * 1024, *[30] * 1023, 31]))
            file.truncate(records * 3073)
    return schema.Data(kind="cifar10", path=str(folder), augment=True)


def test_the_digits_are_all_there_and_every_class_has_its_share() -> None:
    source = data.open(DIGITS)
    assert (len(source.train) + len(source.val), source.labels) == (1797, tuple("0123456789"))
    assert source.hash[:16] == "4692f9ed4b190a5a", "committed, because records of other machines are compared by it"
    for c in range(10):
        val, train = ((split.classes == c).sum() for split in (source.val, source.train))
        assert abs(val - 0.15 * (val + train)) <= 1
    assert not {i.tobytes() for i in source.train.images} & {i.tobytes() for i in source.val.images}


def test_the_digits_of_another_release_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "DIGITS_HASH", "0" * 64)
    with pytest.raises(ValueError, match=r"digits have the hash 0b7e9c3202d7bcd2, not 0000000000000000"):
        data.open(DIGITS)


def test_a_batch_is_normalised_and_has_the_models_shape() -> None:
    dataset = encode(DIGITS)
    batch = dataset.train.batch(list(range(len(dataset.train))))
    x = batch["pixel_values"]
    assert (x.shape[1:], x.dtype, batch["labels"].dtype) == ((3, 32, 32), torch.float32, torch.int64)
    assert x.is_contiguous()
    assert torch.equal(x[:, 0], x[:, 2]), "a grey image has three equal channels"
    small = encode(DIGITS, image_size=8, channels=1).train.batch(list(range(len(dataset.train))))["pixel_values"]
    assert abs(small.mean()) < 0.01
    assert abs(small.std() - 1) < 0.01


def test_resizing_is_bilinear() -> None:
    """Twice the size: each new pixel is 3/4 of the nearest and 1/4 of the next, in each direction."""
    ramp = np.arange(0, 64, 8, dtype=np.uint8)
    stored = np.broadcast_to(ramp, (1, 1, 8, 8)).copy()
    split = Images(Pixels(stored, np.zeros(1, np.int64), (0.0,), (1 / 255,)), size=16, channels=1, augment=False)
    row = split.batch([0])["pixel_values"][0, 0, 5]
    assert row.tolist() == pytest.approx([0, *(2 + 4 * i for i in range(14)), 56], abs=1e-4)


def test_augmentation_is_a_function_of_the_seed_and_the_image() -> None:
    """So that neither micro-batches nor ranks change what a step sees."""
    dataset = encode(dataclasses.replace(DIGITS, augment=True))
    together = dataset.train.batch([3, 8, 5], seed=(7, 1))["pixel_values"]
    for row, i in enumerate([3, 8, 5]):
        assert torch.equal(together[row], dataset.train.batch([i], seed=(7, 1))["pixel_values"][0])
    plain = dataset.train.batch([3, 8, 5])["pixel_values"]
    assert not torch.equal(together, plain)
    assert not torch.equal(together, dataset.train.batch([3, 8, 5], seed=(7, 2))["pixel_values"])
    assert torch.equal(dataset.val.batch([0, 1], seed=1)["pixel_values"], dataset.val.batch([0, 1])["pixel_values"])
    unaugmented = encode(DIGITS).train
    assert torch.equal(unaugmented.batch([3], seed=1)["pixel_values"], unaugmented.batch([3])["pixel_values"])


def test_crops_and_mirrors_reach_every_place_and_change_nothing_else() -> None:
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(crop_and_mirror(x, [(4, 4, 0)]), x), "the middle"
    assert torch.equal(crop_and_mirror(x, [(4, 4, 1)]), x.flip(-1))
    corner = crop_and_mirror(x, [(0, 8, 2)])[0]
    assert torch.equal(corner[:, 4:, :28], x[0, :, :28, 4:])
    assert not corner[:, :4].any()
    assert not corner[:, :, 28:].any()


def test_images_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.num_classes=9: the images have 10 classes"):
        encode(DIGITS, num_classes=9)
    with pytest.raises(ValueError, match=r"model\.channels=1: the images have 3"):
        encode(cifar(tmp_path / "c"), channels=1)


def test_cifars_records_are_red_green_and_blue_planes(tmp_path: Path) -> None:
    cfg = cifar(tmp_path / "cifar-10-batches-bin")
    source = data.open(cfg)
    assert (source.train.images.shape, source.val.images.shape) == ((50_000, 3, 32, 32), (10_000, 3, 32, 32))
    assert source.train.classes[::10_000].tolist() == [0, 1, 2, 3, 4]
    assert (source.val.classes[0], source.labels[5]) == (5, "dog")
    first = source.val.images[0]
    assert [first[c, 0, 0] for c in range(3)] == [10, 20, 30]
    assert first[2, 31, 31] == 31, "the last byte is the blue corner"
    assert source.augment
    before = data.content_hash(cfg)
    with (Path(str(cfg.path)) / "data_batch_3.bin").open("r+b") as file:
        file.seek(3073 * 5000 + 9)
        file.write(b"x")
    assert data.content_hash(cfg) != before


def test_cifar_that_is_not_there_or_cut_short_is_one_line(tmp_path: Path) -> None:
    short = cifar(tmp_path / "short", records=9_999)
    missing = dataclasses.replace(short, path=str(tmp_path / "absent"), make="curl it {path}")
    for function in (data.open, data.content_hash):
        with pytest.raises(
            ValueError, match=r"data_batch_1\.bin: 30726927 bytes, not 30730000.*official binary version"
        ):
            function(short)
        with pytest.raises(ValueError, match=r"absent/data_batch_1\.bin: no such file.*curl it .*absent$") as error:
            function(missing)
        assert "\n" not in str(error.value)


def test_a_label_that_cannot_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test_batch.bin"
    path.write_bytes(bytes([37, *[0] * 3072]))
    with pytest.raises(ValueError, match="a label is 37"):
        images.read_binary([path])


def test_a_cap_takes_a_sample_of_the_images() -> None:
    source = data.open(dataclasses.replace(DIGITS, max_train=100, max_val=20))
    assert (len(source.train), len(source.val)) == (100, 20)
    assert len(set(source.train.classes)) == 10
