"""Datasets, the stream of samples, and what is said of bad input."""
import itertools
import urllib.error
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from helpers import seeded
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

import data
from model import block_mask
from pretrain import AugmentAndMask
from support import scenes
from support.checkpoint import digest
from support.launch import InputError
from support.scenes import Synthetic

CROP = data.crop_and_flip(16)

# ------------------------------------------------------------------------------------------------
# The embedded dataset

def test_synthetic_is_deterministic_by_seed_split_and_index():
    first, again = Synthetic("train", 20, 32), Synthetic("train", 5, 32)
    drawn = {i: again[i] for i in (4, 0, 3)}                # in another order, of another number
    scenes.drawn.cache_clear()
    assert all(first[i] == sample for i, sample in drawn.items())
    others = (first[13], Synthetic("val", 20, 32)[3], Synthetic("train", 20, 32, seed=1)[3])
    assert first[3] not in others                           # of the same class


def test_synthetic_classes_number_and_size():
    for split, name, number in (("train", "synthetic", 10_000), ("val", "synthetic:2000", 400)):
        dataset = data.load_dataset(name, split, 50)
        assert len(dataset) == len(dataset.targets) == number
        assert [dataset[i][1] for i in range(12)] == dataset.targets[:12]
        assert np.bincount(dataset.targets).tolist() == [number / 10] * len(dataset.classes)
        assert dataset[0][0].size == (50, 50) and dataset[0][0].mode == "RGB"


def test_label_subset_is_balanced():
    targets = [0] * 100 + [1] * 50 + [2] * 3
    subset = data.label_subset(targets, 0.1, seed=0)
    assert np.bincount(np.asarray(targets)[subset]).tolist() == [10, 5, 1]  # one at least
    assert subset == sorted(set(subset)) == data.label_subset(targets, 0.1, seed=0)
    assert subset != data.label_subset(targets, 0.1, seed=1)
    assert data.label_subset(targets, 1.0, seed=0) == list(range(153))


# ------------------------------------------------------------------------------------------------
# Pixels

def test_pixels_are_in_minus_one_to_one():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    pixels = data.to_pixels(Image.fromarray(ramp))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert torch.allclose(pixels[0].flatten(), torch.linspace(-1, 1, 256), atol=1e-6)
    for transform in (CROP, *data.teacher_views(16), data.eval_transform(16),
                      data.finetune_transform(16, erasing=0)):
        image = data.to_float(transform(Synthetic(number=1)[0][0]))       # as train_batches does
        assert image.shape == (3, 16, 16) and image.dtype == torch.float32
        assert -1 <= image.min() < image.max() <= 1


def test_evaluation_sees_the_centre():
    image = Image.new("RGB", (64, 32))
    image.paste((255, 255, 255), (16, 0, 48, 32))           # the central square
    assert (data.eval_transform(32, crop=1.0)(image) == 1).all()


def test_an_image_is_decoded_upright(folder):
    """A camera's photo says in its EXIF how it was held."""
    half = np.zeros((8, 16, 3), np.uint8)
    half[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6                                        # turn it right by 90°
    Image.fromarray(half).save("photo.png", exif=exif)
    image = data.open_image("photo.png")
    assert image.size == (8, 16)
    assert image.getpixel((4, 2)) == (255, 255, 255) and image.getpixel((4, 14)) == (0, 0, 0)


def test_16_bits_become_8_and_32_are_refused():
    grey = np.linspace(0, 2 ** 16 - 1, 64 * 64).reshape(64, 64).astype(np.uint16)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(grey).save(name)
        assert np.array_equal(np.asarray(data.decode(name)), np.stack([grey >> 8] * 3, 2))
    Image.fromarray(grey.astype(np.float32)).save("float.tif")
    with pytest.raises(InputError, match="float.tif.*32-bit"):
        data.open_image("float.tif")


def test_colour_jitter_is_torchvisions_by_each_images_own_factors():
    x = torch.rand(6, 3, 20, 24, generator=seeded())
    factors = torch.tensor([[1.4, 0.6, 1.2], [0.6, 1.4, 0.7], [1, 1, 1],
                            [1.3, 1, 1], [1, 0.7, 1], [1, 1, 0.0]])
    out = data.color_jitter(2 * x - 1, factors)
    for i, (brightness, contrast, saturation) in enumerate(factors.tolist()):
        image = TF.adjust_brightness(x[i], brightness)
        image = TF.adjust_contrast(image, contrast)
        image = TF.adjust_saturation(image, saturation)
        assert torch.allclose(out[i], 2 * image - 1, atol=5e-4)             # its grey is rounded
    assert torch.allclose(out[2], 2 * x[2] - 1, atol=1e-6)


def test_the_augmentations_of_the_stages_are_the_papers():
    """BEiT's crops are bicubic, MoCo v3's bilinear; its blur's kernel is a tenth of the image."""
    crop, _, *operations, _, _ = data.finetune_transform(32, magnitude=27).transforms
    assert crop.interpolation == data.crop_and_flip(32).transforms[1].interpolation == data.BICUBIC
    assert len(operations) == 2
    for operation in operations:
        (augment,) = operation.transforms
        assert (operation.p, augment.num_ops, augment.magnitude) == (0.5, 1, 27)    # as timm's
    for size, kernel, odds in ((32, 3, (0, 0)), (64, 7, (1, 0.1)), (224, 23, (1, 0.1))):
        for view, p in zip(data.teacher_views(size), odds, strict=True):
            crop, _, _, blur, *_ = view.transforms
            assert InterpolationMode(crop.interpolation) == InterpolationMode.BILINEAR
            assert (blur.transforms[0].kernel_size[0], blur.p) == (kernel, p)


# ------------------------------------------------------------------------------------------------
# The stream of samples

def stream(start=0, stop=7, **changes):
    """The steps of a run over 20 images, 2 an epoch: each [images, masks, factors, labels]."""
    args = Namespace(**dict(batch_size=8, accumulate=1, image_size=16, seed=0, workers=0) | changes)
    # torch's randomness and Python's
    transform = AugmentAndMask(CROP, lambda: block_mask(4, 6, 4), jitter=0.4)
    dataset = Synthetic(number=20, image_size=16)
    cpu = torch.device("cpu")
    steps = []
    for step in data.train_batches(dataset, transform, args, start, stop, cpu):
        parts = zip(*[(*inputs, labels) for inputs, labels in step], strict=True)
        steps.append([torch.cat(part) for part in parts])
    assert len(steps) == stop - start
    return steps


def test_samples_depend_on_the_seed_alone():
    """Not on the process' own randomness, the workers, the micro-batches, or where a run began."""
    torch.manual_seed(1)
    whole = stream()
    torch.manual_seed(2)
    assert digest(stream(workers=3)) == digest(stream(accumulate=4)) == digest(whole)
    for start in (1, 2, 6):
        assert digest(stream(start=start)) == digest(whole[start:])
    assert digest(stream(seed=1)) != digest(whole)          # the control
    for images, _, factors, _ in whole:
        assert images.dtype == torch.float32 and images.min() >= -1 and images.max() > 0.5
        assert factors.shape == (8, 3) and 0.6 <= factors.min() < 0.8 < 1.2 < factors.max() <= 1.4


def test_every_epoch_has_another_order_and_other_augmentation():
    steps = list(data.global_batches(range(100, 120), 10, 10, 0, 4, 0))
    assert [epoch for step in steps for epoch, _ in step] == [0] * 20 + [1] * 20
    orders = [[index for step in steps[i:i + 2] for _, index in step] for i in (0, 2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(100, 120))
    assert orders[0] != orders[1]
    samples = data.Samples(Synthetic(number=1, image_size=16), CROP, 0)
    assert not torch.equal(samples[0, 0][0], samples[1, 0][0])


@pytest.mark.parametrize("world, accumulate", [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_global_batches_do_not_depend_on_ranks_and_accumulation(world, accumulate, monkeypatch):
    whole = list(data.global_batches(range(20), 8, 8, 0, 5, 0))
    monkeypatch.setattr(data, "world_size", lambda: world)
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
        ranks.append(list(data.global_batches(range(20), 8, 8 // world // accumulate, 0, 5, 0)))
    # micro-batch by micro-batch, in each rank by rank
    assert sum(itertools.chain(*zip(*ranks, strict=True)), []) == sum(whole, [])


# ------------------------------------------------------------------------------------------------
# Folders

def make_folder(root, classes=("ant", "bee"), images=2, splits=("train", "val")):
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                noise = np.random.default_rng([label, i]).integers(0, 255, (20, 24, 3), np.uint8)
                Image.fromarray(noise).save(root / split / name / f"{i}.jpg")
    return root


def touch(*files):
    for file in map(Path, files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_image_folder(folder):
    make_folder(folder / "set")
    touch("set/train/ant/._0.jpg")                          # macOS's do not count
    dataset = data.load_dataset("set", "train", 16)
    assert len(data.load_images("set", "train", 16)) == 4
    assert dataset.classes == ["ant", "bee"] and dataset.targets == [0, 0, 1, 1]
    images, labels = next(iter(data.eval_loader(dataset, data.eval_transform(16), 4, 0)))
    assert images.shape == (4, 3, 16, 16) and labels.tolist() == [0, 0, 1, 1]
    (folder / "set" / "train").rename("other")              # an evaluation does without
    assert data.load_dataset("set", "val", 16).classes == ["ant", "bee"]


LABELLED, ANY = data.load_dataset, data.load_images         # what a stage needs
KAGGLES = "CLS-LOC/train/ant/1.jpg CLS-LOC/val/ant/1.jpg"   # around the dataset's own folder


@pytest.mark.parametrize("load, split, files, message", [
    (LABELLED, "train", "", "--data set: "),
    (LABELLED, "train", "ant/1.jpg", "--data set: it has no train/"),
    (LABELLED, "train", "train/ant/notes.txt", "--data set/train: "),
    (LABELLED, "val", "train/ant/1.jpg val/cow/1.jpg", "--data set: .*classes"),
    (LABELLED, "val", "train/ant/1.jpg val/1.JPEG", "--data set/val: .*docs/faq.md"),   # ImageNet's
    (LABELLED, "train", KAGGLES, "--data set/CLS-LOC"),
    (ANY, "train", "", "--data set: "),
    (ANY, "train", "deep/notes.txt", "--data set: "),
    (ANY, "train", "1.jpg", "--data set: "),                # it is held out
    (ANY, "train", KAGGLES, "--data set/CLS-LOC"),          # else val/ would be trained on
])
def test_a_folder_that_will_not_do_is_refused_in_one_line(load, split, files, message):
    touch(*[f"set/{file}" for file in files.split()])
    with pytest.raises(InputError, match=message) as error:
        load("set", split, 16)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------
# Folders without labels

def listed(name, split):
    return [path for path, _ in data.load_images(name, split, 16).samples]


def test_any_folder_of_images_is_split():
    touch(*[f"flat/{i:02}.jpg" for i in range(30)], "flat/notes.txt", "flat/.hidden.jpg")
    touch(*[f"deep/{i % 3}/x/{i:02}.jpg" for i in range(30)], "deep/01.jpg")
    for name, number in (("flat", 30), ("deep", 31)):
        val, train = listed(name, "val"), listed(name, "train")
        assert len(val) == 2
        assert len({*val, *train}) == len(val) + len(train) == number
    touch("flat/train/1.jpg")                               # with train/ nothing beside it counts
    assert listed("flat", "val") == ["flat/train/1.jpg"]


@pytest.mark.parametrize("where", ["train", "some"])
def test_val_is_evaluated_and_never_trained_on(where):
    train = [f"set/{where}/{i}.jpg" for i in range(3)]
    val = [f"set/val/deep/{i}.jpg" for i in range(3)]
    touch(*train, *val)
    Path("set", where, "link").symlink_to(Path("set/val").absolute())
    assert listed("set", "val") == val
    assert listed("set", "train") == train


# ------------------------------------------------------------------------------------------------
# CIFAR through torchvision

def test_cifar_is_torchvisions(monkeypatch):
    monkeypatch.setitem(data.CIFAR, "cifar100", lambda root, **keywords: (root, keywords))
    for split, train in (("train", True), ("val", False)):
        found = data.load_dataset("cifar100", split, 32)
        assert found == ("data", dict(train=train, download=True))


def test_cifar_that_is_not_there_is_refused(monkeypatch):
    no_route = mock.Mock(side_effect=urllib.error.URLError("no route"))
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_route)
    with pytest.raises(InputError, match="cifar10.*no route"):
        data.load_dataset("cifar10", "train", 16)
