"""What goes in: datasets, the stages' transforms, samples, loaders. Knows nothing of models.

Loaders yield images (B, 3, H, W), float32, with pixels in [-1, 1]. All randomness of a sample, its
augmentation and its mask, is seeded by (seed, epoch, index): it depends neither on the number of
workers or ranks, nor on where a run was stopped and resumed.
"""
import contextlib
import errno
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T
from torchvision.utils import make_grid, save_image

from support import launch
from support.flags import within
from support.launch import InputError, derive_seed, rank, world_size
from support.scenes import KINDS, Synthetic, synthetic_number

LAYOUT = "synthetic[:IMAGES], cifar10, cifar100, or a folder with train/ and val/, a folder a class"
ANY_LAYOUT = ("synthetic[:IMAGES], cifar10, cifar100, or a folder of images, flat or nested; those "
              "in its val/, or every 20th if it has no val/, are for evaluation, not for training")
CIFAR = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
HELD_OUT = 20                   # every 20th image is evaluated where there is no val/; our choice
BICUBIC = InterpolationMode.BICUBIC                         # BEiT's
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)   # what PIL raises


def add_arguments(p, layout=LAYOUT, augment=True):
    """Add the data flags of a stage to its parser. layout: what --data may be."""
    group = p.add_argument_group("data")
    group.add_argument("--data", help=f"dataset: {layout}")
    group.add_argument("--image-size", type=within(int, "[1, 8192]"),
                       help="side of the images, pixels")
    if augment:
        group.add_argument("--crop-min", type=within(float, "(0, 1]"),
                           help="smallest random crop, share of the image's area")
    add_workers(group)


def add_workers(p):
    p.add_argument("--workers", type=within(int, "[0, 128]"),
                   default=min(8, (os.cpu_count() or 2) - 1),
                   help="loader processes of each rank")


# ------------------------------------------------------------------------------------------------
# Datasets by name

def load_dataset(name, split, image_size, root="data"):
    """The dataset of --data: yields (RGB image, class) and has .classes and .targets.

    split: "train" or "val". image_size: of drawn scenes, pixels. root: the folder of CIFAR.
    """
    kind = name.partition(":")[0]
    if kind in KINDS:
        return Synthetic(split, synthetic_number(name, split), image_size, kind=kind)
    if name in CIFAR:
        return cifar(name, split, root)
    folder = subfolder(name, split, remedy="labels are the names of folders: DIR/train/CLASS/")
    train = Path(name, "train")
    try:
        dataset = ImageFolder(folder, loader=decode, is_valid_file=is_image)
        differing = set()
        if train.is_dir():                                  # an evaluation needs none
            differing = set(dataset.classes) ^ set(find_classes(train)[0])
    except FileNotFoundError as error:                      # no class folders, or an empty one
        raise InputError(f"--data {folder}: {error}; labels are the names of folders, so sort the "
                         "images into them (docs/faq.md: how for ImageNet's val/)") from error
    if differing:
        raise InputError(f"--data {name}: train/ and val/ have different classes: only one of "
                         f"them has {min(differing)}")
    return dataset


def load_images(name, split, image_size):
    """The same for what needs no labels: all images of a folder, with or without class folders.

    "train" are those of its train/, or else of the folder itself; "val" those of its val/. Where it
    has no val/, every 20th image is "val", and not "train".
    """
    if name.partition(":")[0] in KINDS or name in CIFAR:
        return load_dataset(name, split, image_size)
    folder = subfolder(name, remedy="pass a folder of images")
    val, train = folder / "val", folder / "train"
    if not train.is_dir():
        refuse_deeper_splits(folder)
        train = folder
    if split == "val" and val.is_dir():
        paths = image_files(val)
    else:
        paths = image_files(train, leave_out=val)
    if not val.is_dir():
        held_out = paths[::HELD_OUT]
        paths = held_out if split == "val" else sorted(set(paths).difference(held_out))
    if not paths:
        raise InputError(f"--data {name}: no images for {split} in it ({' '.join(IMG_EXTENSIONS)})")
    return Unlabelled(paths)


def cifar(name, split, root):
    try:
        with launch.first_of_machine():
            return CIFAR[name](root, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"--data {name}: not in {root}/ and not to be downloaded ({error}); put the archive of "
            f"its python version into {root}/, or pass a folder with train/ and val/") from error


def label_subset(targets, fraction, seed):
    """Indices of a random `fraction` of the images, the same share of each class (at least one)."""
    order = np.random.default_rng(seed).permutation(len(targets))
    targets = np.asarray(targets)[order]
    kept = []
    for label in np.unique(targets):
        images = order[targets == label]
        kept.append(images[:max(1, round(fraction * len(images)))])
    return np.sort(np.concatenate(kept)).tolist()


class Unlabelled(Dataset):
    """Image files: (RGB image, 0)."""
    classes = ["unlabelled"]

    def __init__(self, paths):
        self.samples = [(path, 0) for path in paths]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return decode(path), label


def is_image(path):
    """Whether a file is one by its name. Hidden ones, such as macOS's ._x.jpg, do not count."""
    name = os.path.basename(path)
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def image_files(folder, leave_out=None):
    """Sorted paths of the images at any depth. Links are followed, but no folder is entered twice.

    leave_out: a folder whose images do not count.
    """
    entered = {os.path.realpath(leave_out)} if leave_out else set()
    found = []
    for parent, names, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in entered:
            names.clear()                                   # os.walk enters what is left
        else:
            entered.add(place)
            names[:] = sorted(name for name in names if not name.startswith("."))
            found += [os.path.join(parent, name) for name in files if is_image(name)]
    return sorted(found)


def subfolder(root, *parts, remedy="see the README for the layout"):
    """The folder root/parts of --data."""
    folder = Path(root, *parts)
    if not folder.is_dir():
        refuse_deeper_splits(root)
        why = f"it has no {'/'.join(parts)}/ folder" if Path(root).is_dir() else "no such folder"
        raise InputError(f"--data {root}: {why}; {remedy}")
    return folder


def refuse_deeper_splits(root):
    """Refuse a folder around the dataset's own, such as Kaggle's, of ILSVRC/Data/CLS-LOC."""
    for parent, names, _ in os.walk(root):
        if {"train", "val"} <= set(names) and Path(parent) != Path(root):
            raise InputError(f"--data {root}: train/ and val/ lie deeper: take --data {parent}")


# ------------------------------------------------------------------------------------------------
# Images

def decode(image):
    """The upright RGB image of a file or a PIL image; of 16 bits each, the upper 8 count."""
    if not isinstance(image, Image.Image):
        image = Image.open(image)
    image.load()
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("32-bit pixels, of unknown range: convert it to 8 bits")
    with contextlib.suppress(Exception):                    # damaged EXIF; the pixels are sound
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                          # 16 bits; PIL would clip them at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(image):
    """The same, for those who load a network: the InputError names the file."""
    try:
        return decode(image)
    except UNREADABLE as error:
        raise InputError(f"{image}: not a readable image ({error})") from error


def to_pixels(image, *target):
    """PIL image or uint8 tensor → float32, [0, 255] → [-1, 1]; a target passes unchanged."""
    if isinstance(image, Image.Image):
        image = T.functional.pil_to_tensor(image)
    pixels = image.float() / 127.5 - 1
    return (pixels, *target) if target else pixels


def save_rows(rows, file):
    """The way back: write rows of images (B, 3, H, W) under one another, as a PNG."""
    picture = make_grid(torch.cat(rows).float().clamp(-1, 1), len(rows[0]), pad_value=1.0)
    try:
        save_image(picture, file, format="png", normalize=True, value_range=(-1, 1))
    except OSError as error:
        raise InputError(f"{file}: not written ({error})") from error


# ------------------------------------------------------------------------------------------------
# The transforms of each stage, of one image, in a loader's worker. Where a transform ends in uint8,
# train_batches makes floats of it on the device: a quarter of the bytes to hand over.

def crop_and_flip(size, crop_min=0.08):
    """Of tokenizer.py (our choice, the paper is silent) and pretrain.py [BEiT], which jitters."""
    return T.Compose([
        T.PILToTensor(),                                    # whose bicubic is faster than PIL's
        T.RandomResizedCrop(size, (crop_min, 1), interpolation=BICUBIC),
        T.RandomHorizontalFlip(),
    ])


def color_jitter(images, factors):
    """BEiT's colour jitter of a whole batch, each image by its own factors, as in torchvision.

    images: (B, 3, H, W) in [-1, 1]. factors: (B, 3), of brightness, contrast and saturation, in
    this order (torchvision draws the order). BEiT jitters first. After crop and flip it comes to
    the same, but for contrast's pivot: it is the mean of the crop, not that of the image.
    """
    grey = T.functional.rgb_to_grayscale                                        # (B, 1, H, W)
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)    # (B, 1, 1, 1)
    x = (brightness * (images + 1) / 2).clamp(0, 1)
    x = torch.lerp(grey(x).mean((2, 3), keepdim=True), x, contrast).clamp(0, 1)
    x = torch.lerp(grey(x), x, saturation).clamp(0, 1)
    return 2 * x - 1


def teacher_views(size, crop_min=0.08):
    """MoCo v3's two views: BYOL's (its appendix B), with a crop of at least 8 %, bilinear.

    Returns two transforms. The blur's kernel is a tenth of the image, as there; below 64 px there
    is no blur (our choice).
    """
    kernel = int(0.1 * size) // 2 * 2 + 1                   # odd

    def view(blur, solarize):
        return T.Compose([
            T.RandomResizedCrop(size, (crop_min, 1)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.GaussianBlur(kernel, (0.1, 2.0))], p=blur if size >= 64 else 0.0),
            T.RandomSolarize(128, p=solarize),
            T.RandomHorizontalFlip(),
            T.PILToTensor(),
        ])

    return view(blur=1.0, solarize=0.0), view(blur=0.1, solarize=0.2)


def finetune_transform(size, crop_min=0.08, magnitude=27, erasing=0.25):
    """BEiT's: random resized crop, flip, RandAugment, random erasing by noise.

    Its RandAugment is timm's: two operations, each with probability ½, at magnitude 9 of 10. Here
    they are torchvision's, at `magnitude` of 30, without timm's noise of 0.5 on the magnitude.
    """
    steps = [
        T.RandomResizedCrop(size, (crop_min, 1), interpolation=BICUBIC),
        T.RandomHorizontalFlip(),
    ]
    if magnitude:
        operation = T.RandAugment(1, magnitude, interpolation=BICUBIC, fill=[128] * 3)
        steps += [T.RandomApply([operation]), T.RandomApply([operation])]
    steps.append(to_pixels)
    if erasing:
        steps.append(T.RandomErasing(erasing, value="random"))
    return T.Compose(steps)


def eval_transform(size, crop=0.875):
    """The shorter side to size / crop, then the centre; crop = 1 if images come at their size."""
    return T.Compose([T.Resize(round(size / crop), BICUBIC), T.CenterCrop(size), to_pixels])


# ------------------------------------------------------------------------------------------------
# Samples and loaders

def read(dataset, index):
    """(RGB image, target) of a dataset. Where an image is bad, the InputError names its file."""
    try:
        return dataset[index]
    except InputError:                                      # the dataset has named the culprit
        raise
    except UNREADABLE as error:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise                                           # not the image's fault
        name = dataset.samples[index][0] if hasattr(dataset, "samples") else f"image {index}"
        raise InputError(f"{name}: not a readable image ({error}); restore it, or delete it: a run "
                         "that has begun then needs --resume force") from error


class Samples(Dataset):
    """A dataset under a transform, indexed by (epoch, index) → (transformed image, target)."""

    def __init__(self, dataset, transform, seed):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key):
        epoch, index = key
        image, target = read(self.dataset, index)
        seed = derive_seed(self.seed, epoch, index)
        random.seed(seed)                                   # block masks
        torch.default_generator.manual_seed(seed)           # transforms; CUDA's is left alone
        if isinstance(target, int):                         # a class stays as it is
            return self.transform(image), target
        return self.transform(image, target)                # masks and boxes move with the image


def global_batches(indices, batch_size, micro_batch, start, stop, seed):
    """Yields this rank's micro-batches of (epoch, index), from step `start` to step `stop`.

    A step's global batch is the same on any number of ranks: the epoch's permutation, seeded by
    (seed, epoch), is cut into batches, a batch into micro-batches in the order accumulation, rank.
    """
    for step in range(start, stop):
        epoch, place = divmod(step, len(indices) // batch_size)
        if step == start or place == 0:                     # a new permutation
            order = np.random.default_rng(derive_seed(seed, epoch)).permutation(len(indices))
        own = order[place * batch_size:(place + 1) * batch_size]
        batch = [(epoch, indices[i]) for i in own]
        for i in range(rank() * micro_batch, batch_size, world_size() * micro_batch):
            yield batch[i:i + micro_batch]


def train_batches(dataset, transform, args, start, stop, device, indices=None, collate=None):
    """Yields for each step from `start` to `stop` a list of its micro-batches, on the device.

    These are args.accumulate pairs (inputs, labels); inputs are what the transform makes, uint8
    images turned into floats in [-1, 1]. Workers live through all epochs. indices: of the images to
    train on; None: all.
    """
    indices = range(len(dataset)) if indices is None else indices
    batches = global_batches(
        indices, args.batch_size, launch.micro_batch(args), start, stop, args.seed)
    loader = make_loader(Samples(dataset, transform, args.seed), batches, args.workers, collate)
    step = []
    for inputs, labels in loader:
        step.append((to_float(to_device(inputs, device)), to_device(labels, device)))
        if len(step) == args.accumulate:
            yield step
            step = []


def eval_loader(dataset, transform, batch_size, workers, indices=None, collate=None):
    """Every image exactly once over all ranks, with no padding: each rank its own share."""
    indices = range(len(dataset)) if indices is None else indices
    keys = [(0, index) for index in indices][rank()::world_size()]
    batches = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    return make_loader(Samples(dataset, transform, seed=0), batches, workers, collate)


def make_loader(samples, batches, workers, collate=None):
    return DataLoader(
        samples, batch_sampler=batches, num_workers=workers, collate_fn=collate,
        worker_init_fn=start_worker, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),                        # the global one stays as it is
        multiprocessing_context="fork" if workers else None)            # they share the memory


def start_worker(worker):
    torch.set_num_threads(1)
    # torchrun and Ctrl-C signal every process: a worker that died of it would cost the checkpoint.
    for one in launch.SIGNALS:
        signal.signal(one, signal.SIG_IGN)


def as_lists(batch):
    """Collate images of any sizes: a list of them, a list of their targets."""
    return tuple(map(list, zip(*batch, strict=True)))


def to_device(batch, device):
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return [to_device(part, device) for part in batch]


def to_float(inputs):
    """uint8 images → [-1, 1]; what is not uint8 stays."""
    if isinstance(inputs, list):
        return [to_float(part) for part in inputs]
    return to_pixels(inputs) if inputs.dtype == torch.uint8 else inputs
