"""Datasets, the stream of samples, and what is said of bad input."""
import urllib.error
from argparse import Namespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

import data
from model import block_mask
from pretrain import AugmentAndMask
from support import scenes
from support.launch import InputError
from support.scenes import Synthetic

CROP = data.crop_and_flip(16)


def as_array(sample):
    return np.asarray(sample[0])


# ------------------------------------------------------------------------------------------------
# The embedded dataset

def test_synthetic_is_deterministic_by_seed_split_and_index():
    first, again = Synthetic("train", 20, 32), Synthetic("train", 5, 32)
    drawn = {i: as_array(again[i]) for i in (4, 0, 3)}      # in another order, of another number
    scenes.drawn.cache_clear()
    assert all(np.array_equal(as_array(first[i]), image) for i, image in drawn.items())
    others = (Synthetic("val", 20, 32)[3], Synthetic("train", 20, 32, seed=1)[3], first[13])
    assert not any(np.array_equal(as_array(first[3]), as_array(other)) for other in others)


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
        image = data.to_float(transform(Synthetic(number=1)[0][0]))         # as TrainLoader does
        assert image.shape == (3, 16, 16) and image.dtype == torch.float32
        assert -1 <= image.min() < image.max() <= 1


def test_evaluation_sees_the_centre():
    image = Image.new("RGB", (64, 32))
    image.paste((255, 255, 255), (16, 0, 48, 32))           # the central square
    assert (data.eval_transform(32, crop=1.0)(image) == 1).all()
    assert data.eval_transform(32)(Image.new("RGB", (40, 90))).shape == (3, 32, 32)


def test_an_image_is_decoded_upright(folder):
    """A camera's photo says in its EXIF how it was held."""
    half = np.zeros((8, 16, 3), np.uint8)
    half[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6                                        # turn it right by 90°
    Image.fromarray(half).save("photo.png", exif=exif)
    for image in (data.decode("photo.png"), data.open_image(Image.open("photo.png"))):
        assert image.size == (8, 16)
        assert image.getpixel((4, 2)) == (255, 255, 255) and image.getpixel((4, 14)) == (0, 0, 0)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_16_bits_become_8(name, folder):
    pixels = np.linspace(0, 2 ** 16 - 1, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(pixels).save(name)
    rgb = np.asarray(data.decode(name))
    assert rgb.shape == (64, 64, 3) and (rgb == (pixels >> 8)[..., None]).all()


def test_32_bits_are_refused(folder):
    path = make_folder(folder / "set") / "train" / "bee" / "2.tif"
    Image.fromarray(np.ones((20, 24), np.float32)).save(path)
    with pytest.raises(InputError, match="bee/2.tif"):
        data.read(data.load_images("set", "train", 16), 4)


def test_colour_jitter_is_torchvisions_by_each_images_own_factors():
    x = torch.rand(6, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([[1.4, 0.6, 1.2], [0.6, 1.4, 0.7], [1, 1, 1],
                            [1.3, 1, 1], [1, 0.7, 1], [1, 1, 0.0]])
    expected = []
    for image, (brightness, contrast, saturation) in zip(x, factors.tolist(), strict=True):
        image = TF.adjust_brightness(image, brightness)
        image = TF.adjust_contrast(image, contrast)
        expected.append(TF.adjust_saturation(image, saturation))
    out = data.color_jitter(2 * x - 1, factors)
    assert torch.allclose(out, 2 * torch.stack(expected) - 1, atol=5e-4)     # its grey is rounded
    assert torch.allclose(out[2], 2 * x[2] - 1, atol=1e-6)


def test_rand_augment_takes_each_op_half_of_the_time():
    """As timm's."""
    operations = data.finetune_transform(32, magnitude=27).transforms[2:4]
    assert [operation.p for operation in operations] == [0.5, 0.5]
    for operation in operations:
        (augment,) = operation.transforms
        assert (augment.num_ops, augment.magnitude) == (1, 27)


def test_the_crops_and_blurs_of_the_stages_are_the_papers():
    """Bilinear for MoCo v3, bicubic for BEiT; the blur's kernel is a tenth of the image."""
    def of(transform, name):
        return [step for step in transform.transforms if name in repr(step)]

    def mode(transform):
        return InterpolationMode(of(transform, "RandomResizedCrop")[0].interpolation).value

    assert mode(data.crop_and_flip(32)) == mode(data.finetune_transform(32)) == "bicubic"
    for size, kernel, odds in ((32, 3, (0, 0)), (64, 7, (1, 0.1)), (224, 23, (1, 0.1))):
        for view, p in zip(data.teacher_views(size), odds, strict=True):
            assert mode(view) == "bilinear"
            (blur,) = of(view, "GaussianBlur")
            assert blur.transforms[0].kernel_size[0] == kernel and blur.p == p


# ------------------------------------------------------------------------------------------------
# The stream of samples

def arguments(**changes):
    args = dict(batch_size=8, accumulate=1, image_size=16, seed=0, workers=0)
    return Namespace(**{**args, **changes})


def stream(start=0, stop=7, **changes):
    """All micro-batches of a run over 20 images, 2 steps an epoch: [inputs, labels]."""
    args = arguments(**changes)
    # torch's randomness and Python's
    transform = AugmentAndMask(CROP, lambda: block_mask(4, 6, 4), jitter=0.4)
    dataset = Synthetic(number=20, image_size=16)
    steps = list(data.TrainLoader(dataset, transform, args, start, stop, torch.device("cpu")))
    assert len(steps) == stop - start
    assert all(len(step) == args.accumulate for step in steps)
    return sum(steps, [])


def equal(one, other):
    assert len(one) == len(other) > 0
    return all(torch.equal(labels, labels2) and all(map(torch.equal, inputs, inputs2))
               for (inputs, labels), (inputs2, labels2) in zip(one, other, strict=True))


def test_samples_depend_on_the_seed_alone():
    """Neither on the workers nor on the process' own randomness."""
    torch.manual_seed(1)
    one = stream()
    torch.manual_seed(2)
    assert equal(one, stream(workers=3))
    assert not equal(one, stream(seed=1))


def test_micro_batches_are_the_parts_of_a_steps_batch():
    whole, parts = stream(), stream(accumulate=4)
    for i, (inputs, labels) in enumerate(whole):
        own, own_labels = zip(*parts[4 * i:4 * i + 4], strict=True)
        assert all(map(torch.equal, map(torch.cat, zip(*own, strict=True)), inputs))
        assert torch.equal(torch.cat(own_labels), labels)
        images, _, factors = inputs
        assert images.dtype == torch.float32 and images.min() >= -1 and images.max() > 0.5
        assert factors.shape == (8, 3) and 0.6 <= factors.min() < 0.8 < 1.2 < factors.max() <= 1.4


def test_a_resumed_stream_is_the_tail_of_the_full_one():
    whole = stream()
    for start in (1, 2, 6):
        assert equal(whole[start:], stream(start=start))


def test_every_epoch_is_another_permutation():
    batches = data.GlobalBatches(range(100, 120), 10, 10, 0, 4, 0)
    steps = list(batches)
    assert len(steps) == len(batches) == 4
    assert [epoch for step in steps for epoch, _ in step] == [0] * 20 + [1] * 20
    orders = [[index for step in steps[i:i + 2] for _, index in step] for i in (0, 2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(100, 120))
    assert orders[0] != orders[1]


def test_augmentation_changes_with_the_epoch():
    samples = data.Samples(Synthetic(number=1, image_size=16), CROP, 0)
    assert not torch.equal(samples[0, 0][0], samples[1, 0][0])


@pytest.mark.parametrize("world, accumulate", [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_global_batches_do_not_depend_on_ranks_and_accumulation(world, accumulate, monkeypatch):
    whole = list(data.GlobalBatches(range(20), 8, 8, 0, 5, 0))
    monkeypatch.setattr(data, "world_size", lambda: world)
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
        batches = data.GlobalBatches(range(20), 8, 8 // world // accumulate, 0, 5, 0)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches) == 5 * accumulate
    for step, batch in enumerate(whole):    # micro-batch by micro-batch, in each rank by rank
        parts = [ranks[r][step * accumulate + i] for i in range(accumulate) for r in range(world)]
        assert sum(parts, []) == batch


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_once(world, monkeypatch):
    dataset = [(torch.zeros(1), index) for index in range(23)]
    monkeypatch.setattr(data, "world_size", lambda: world)
    for indices in (None, [2, 3, 5, 7, 11]):
        seen = []
        for rank in range(world):
            monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
            for _, labels in data.eval_loader(dataset, torch.clone, 4, 0, indices):
                seen += labels.tolist()
        assert sorted(seen) == (indices or list(range(23)))


def test_iterating_does_not_touch_the_global_random_state():
    """Else an added evaluation would change the training."""
    before = torch.get_rng_state()
    iter(data.eval_loader(Synthetic("val", 4, 16), data.to_pixels, 2, 0))
    assert torch.equal(torch.get_rng_state(), before)


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


def test_image_folder(folder):
    touch(make_folder(folder / "set") / "train" / "ant" / "._0.jpg")    # macOS's do not count
    dataset = data.load_dataset("set", "train", 16)
    assert len(data.load_images("set", "train", 16)) == 4
    assert dataset.classes == ["ant", "bee"] and dataset.targets == [0, 0, 1, 1]
    images, labels = next(iter(data.eval_loader(dataset, data.eval_transform(16), 4, 0)))
    assert images.shape == (4, 3, 16, 16) and labels.tolist() == [0, 0, 1, 1]


def refused(*arguments, load=data.load_dataset):
    with pytest.raises(InputError) as error:
        load(*arguments, 16)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_folders_are_refused_by_name(folder):
    assert "--data nowhere: " in refused("nowhere", "train")
    (folder / "flat" / "ant").mkdir(parents=True)           # not in train/
    assert "flat: it has no train/" in refused("flat", "train")
    make_folder(folder / "val", splits=["val"])             # enough for an evaluation
    assert data.load_dataset("val", "val", 16).classes == ["ant", "bee"]
    make_folder(folder / "two", splits=["train"])
    make_folder(folder / "two", ("ant", "cow"), splits=["val"])
    assert "--data two: " in refused("two", "val")                   # other classes
    make_folder(folder / "raw", splits=["train"])
    touch(folder / "raw" / "val" / "ILSVRC2012_val_00000001.JPEG")      # as ImageNet's come
    message = refused("raw", "val")
    assert "--data raw/val: " in message and "docs/faq.md" in message
    (folder / "bare" / "train" / "ant").mkdir(parents=True)
    assert "bare/train" in refused("bare", "train")


# ------------------------------------------------------------------------------------------------
# Folders without labels

def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def listed(name, split):
    return [path for path, _ in data.load_images(name, split, 16).samples]


def test_any_folder_of_images_is_split(folder):
    for i in range(30):
        touch(folder / "flat" / f"{i:02}.jpg")
        touch(folder / "deep" / f"{i % 3}" / "x" / f"{i:02}.jpg")
    touch(folder / "flat" / "notes.txt")
    touch(folder / "flat" / ".hidden.jpg")
    touch(folder / "deep" / "01.jpg")                       # beside the folders
    for name, number in (("flat", 30), ("deep", 31)):
        val, train = listed(name, "val"), listed(name, "train")
        assert len(val) == 2
        assert len({*val, *train}) == len(val) + len(train) == number
    touch(folder / "flat" / "train" / "1.jpg")              # with train/ nothing beside it counts
    assert listed("flat", "val") == ["flat/train/1.jpg"]


@pytest.mark.parametrize("where", ["train", "some"])
def test_val_is_evaluated_and_never_trained_on(where, folder):
    for i in range(3):
        touch(folder / "set" / where / f"{i}.jpg")
        touch(folder / "set" / "val" / "deep" / f"{i}.jpg")
    (folder / "set" / where / "link").symlink_to(folder / "set" / "val")
    assert listed("set", "val") == [f"set/val/deep/{i}.jpg" for i in range(3)]
    assert listed("set", "train") == [f"set/{where}/{i}.jpg" for i in range(3)]


def test_splits_that_lie_deeper_are_named(folder):
    """Kaggle's ImageNet; else all of it, val/ too, would count as training images."""
    make_folder(folder / "kaggle" / "ILSVRC" / "CLS-LOC")
    for load in (data.load_images, data.load_dataset):
        assert "--data kaggle/ILSVRC/CLS-LOC" in refused("kaggle", "train", load=load)


def test_folders_without_images_are_refused(folder):
    (folder / "empty" / "deep").mkdir(parents=True)
    touch(folder / "one" / "1.jpg")                         # held out
    for name in ("nowhere", "empty", "one"):
        assert f"--data {name}: " in refused(name, "train", load=data.load_images)


# ------------------------------------------------------------------------------------------------
# CIFAR through torchvision

def test_cifar_is_torchvisions(monkeypatch):
    monkeypatch.setitem(data.CIFAR, "cifar100", lambda root, **keywords: (root, keywords))
    assert data.load_dataset("cifar100", "train", 32) == ("data", dict(train=True, download=True))
    assert data.load_dataset("cifar100", "val", 32) == ("data", dict(train=False, download=True))


def test_cifar_that_is_not_there_is_refused(monkeypatch):
    def fail(*arguments, **keywords):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)
    message = refused("cifar10", "train")
    assert "cifar10" in message and "no route" in message
