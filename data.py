"""What goes in: datasets, samplers, loaders. Knows nothing of models.

Every image comes out as float32 (3, H, W) with pixels in [-1, 1]. All randomness of a sample, its
augmentation and its mask, is seeded by (seed, epoch, index): it depends neither on the number of
workers or ranks, nor on where a run was stopped and resumed.
"""
import os
import random
import signal

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

import folders
from augment import to_bytes
from support import launch
from support.flags import count, number
from support.launch import InputError, derive_seed, rank, world_size
from support.scenes import Synthetic, synthetic_number
from transforms import Joint, to_rgb

LAYOUT = "synthetic[:IMAGES], cifar10, cifar100, or a folder with train/ and val/, a folder a class"
ANY_LAYOUT = ("synthetic[:IMAGES], cifar10, cifar100, or a folder of images, flat or nested; those "
              "in its val/, or every 20th if it has no val/, are for evaluation, not for training")
CIFAR = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}


def add_arguments(p, layout=LAYOUT, augment=True):
    """Add the data flags of a stage to its parser. layout: what --data may be."""
    group = p.add_argument_group("data")
    group.add_argument("--data", help=f"dataset: {layout}")
    group.add_argument("--image-size", type=number(int, at_least=1, at_most=8192),
                       help="side of the images, pixels")
    if augment:
        group.add_argument("--augment", choices=["image", "batch"],
                           help="image: each image in a loader's worker, by torchvision; "
                                "batch: whole batches on the GPU, a worker only decodes and crops")
        group.add_argument("--crop-min", type=number(float, above=0, at_most=1),
                           help="smallest random crop, share of the image's area")
    add_workers(group)
    group.add_argument("--skip-bad-images", type=count, default=0,
                       help="training images that cannot be read and are replaced by others, on "
                            "each rank; one more ends the run")


def add_workers(p):
    p.add_argument("--workers", type=number(int, at_least=0, at_most=128),
                   default=min(8, (os.cpu_count() or 2) - 1),
                   help="loader processes of each rank")


# ------------------------------------------------------------------------------------------------
# Datasets by name

def load_dataset(name, split, image_size, root="data"):
    """The dataset of --data: yields (PIL image, class) and has .classes and .targets.

    split: "train" or "val". image_size: of drawn scenes, pixels. root: the folder of CIFAR.
    Raises InputError where it is not there.
    """
    if name.partition(":")[0] == "synthetic":
        return Synthetic(split, synthetic_number(name, split), image_size)
    if name in CIFAR:
        return cifar(name, split, root)
    return folders.labelled(name, split)


def load_images(name, split, image_size):
    """The same for what needs no labels: of a folder all images, with or without class folders.

    Where it has no val/, every 20th image is "val" and the others are "train".
    """
    if name.partition(":")[0] == "synthetic" or name in CIFAR:
        return load_dataset(name, split, image_size)
    return folders.unlabelled(name, split)


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


# ------------------------------------------------------------------------------------------------
# Samples

class ImageInputError(InputError):
    """An image that cannot be read. The name ends in InputError's, which looks for that."""


def name_of(dataset, index):
    return dataset.samples[index][0] if hasattr(dataset, "samples") else f"image {index}"


def read(dataset, index):
    """(RGB image, label) of a dataset. Raises ImageInputError, which names the file."""
    try:
        image, label = dataset[index]
        return to_rgb(image), label
    except InputError:                                      # the dataset has named the culprit
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageInputError(f"{name_of(dataset, index)}: not a readable image ({error}); "
                              "restore or remove it") from error


class Samples(Dataset):
    """A dataset under a transform, indexed by (epoch, index) → (transformed image, label).

    skip: how many unreadable images may be replaced, each by one of `indices`, drawn by (seed,
    epoch, index).
    """

    def __init__(self, dataset, transform, seed, indices=(), skip=0):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.indices, self.skip = indices, skip
        self.held = {}                                      # decoded images: hold_small_images
        bad = torch.zeros(len(dataset) if skip else 0, dtype=torch.bool)
        self.bad = bad.share_memory_()                      # unreadable images, of all workers

    def __getitem__(self, key):
        epoch, index = key
        image, label = self.held.get(index) or self.read(epoch, index)
        seed = derive_seed(self.seed, epoch, index)
        random.seed(seed)                                   # block masks
        torch.default_generator.manual_seed(seed)           # transforms; CUDA's is left alone
        if isinstance(self.transform, Joint):
            return self.transform(image, label)
        return self.transform(image), label

    def read(self, epoch, index):
        """(RGB image, label), of other images in place of up to `skip` unreadable ones."""
        if not self.skip:
            return read(self.dataset, index)
        draw = np.random.default_rng(derive_seed(self.seed, epoch, index, -1))
        while True:
            try:
                return read(self.dataset, index)
            except ImageInputError as error:
                self.count(index, error)
            index = self.indices[draw.integers(len(self.indices))]

    def count(self, index, error):
        """Note an unreadable image. Raises InputError where there are too many."""
        if not self.bad[index]:
            self.bad[index] = True
            number = int(self.bad.sum())
            launch.warn(f"{error}; skipped, {number} of at most {self.skip}")
        if self.bad.sum() > min(self.skip, len(self.indices) - 1):
            raise InputError(f"{error}: more than --skip-bad-images {self.skip}") from error


def hold_small_images(samples, args):
    """Decode all images now and keep them, where a worker would do little but decode.

    That is with --augment batch, images that come at their size, and all of them in under 1 GiB.
    """
    by_batch = getattr(args, "augment", "image") == "batch"             # dense stages have no flag
    small = len(samples.indices) * 3 * args.image_size ** 2 < 2 ** 30   # 3 bytes a pixel
    if by_batch and small:
        size = (args.image_size, args.image_size)
        image, _ = samples.read(0, samples.indices[0])
        if image.size == size:
            for index in samples.indices:                   # forked workers share them
                image, label = samples.read(0, index)
                if image.size == size:
                    samples.held[index] = to_bytes(image), label


# ------------------------------------------------------------------------------------------------
# Loaders

class GlobalBatches(Sampler):
    """This rank's micro-batches of (epoch, index), from step `start` to step `stop`.

    A step's global batch is the same on any number of ranks: the epoch's permutation, seeded by
    (seed, epoch), is cut into batches, a batch into micro-batches in the order accumulation, rank.
    """

    def __init__(self, indices, batch_size, micro_batch, start, stop, seed):
        self.indices, self.batch_size, self.micro_batch = indices, batch_size, micro_batch
        self.start, self.stop, self.seed = start, stop, seed
        self.epoch = None                                   # whose permutation self.order is

    def __len__(self):
        return (self.stop - self.start) * (self.batch_size // self.micro_batch // world_size())

    def __iter__(self):
        for step in range(self.start, self.stop):
            yield from self.of_step(step, rank())

    def of_step(self, step, rank):
        """The micro-batches of a step on a rank."""
        epoch, place = divmod(step, len(self.indices) // self.batch_size)
        if epoch != self.epoch:
            self.epoch = epoch
            generator = np.random.default_rng(derive_seed(self.seed, epoch))
            self.order = generator.permutation(len(self.indices))
        order = self.order[place * self.batch_size:(place + 1) * self.batch_size]
        batch = [(epoch, self.indices[i]) for i in order]
        first = rank * self.micro_batch
        between = world_size() * self.micro_batch
        return [batch[i:i + self.micro_batch] for i in range(first, self.batch_size, between)]


class TrainLoader:
    """Of each step from `start` to `stop` the list of its micro-batches, on the device.

    There are args.accumulate of them, each (what the transform makes, labels). Workers live through
    all epochs. indices: of the images to train on; None: all.
    """

    def __init__(self, dataset, transform, args, start, stop, device, indices=None, collate=None):
        if indices is None:
            indices = range(len(dataset))
        self.transform, self.device, self.accumulate = transform, device, args.accumulate
        self.batches = GlobalBatches(
            indices, args.batch_size, launch.micro_batch(args), start, stop, args.seed)
        samples = Samples(dataset, transform, args.seed, indices, args.skip_bad_images)
        if start < stop:
            hold_small_images(samples, args)
        self.loader = make_loader(samples, self.batches, args.workers, collate)

    def __iter__(self):
        step = []
        for inputs, labels in self.loader:
            inputs = self.transform.finish(to_device(inputs, self.device))
            step.append((inputs, to_device(labels, self.device)))
            if len(step) == self.accumulate:
                yield step
                step = []

    def samples(self, step, rank):
        """Indices of the images of a step on a rank."""
        return [index for batch in self.batches.of_step(step, rank) for _, index in batch]


def eval_loader(dataset, transform, batch_size, workers, indices=None, collate=None):
    """Every image exactly once over all ranks, with no padding: each rank its own share."""
    if indices is None:
        indices = range(len(dataset))
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
