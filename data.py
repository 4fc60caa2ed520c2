"""What goes in: data sets, transforms, samplers, loaders. Knows nothing of models.

Every image comes out as float32 (3, H, W) with pixels in [-1, 1]. All randomness of a sample, its
augmentation and its mask, is seeded by (seed, epoch, index): it depends neither on the number of
workers or ranks, nor on where a run was stopped and resumed.
"""
import colorsys
import math
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

import augment
from runtime import InputError, derive_seed, rank, world_size


# ------------------------------------------------------------------------------------------------
# The embedded data set: scenes drawn by code

def polygon(*corners):
    """Inside test of a polygon in the plane, by crossing number."""
    def inside(u, v):
        odd = np.zeros(u.shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
            if y0 != y1:
                odd ^= ((y0 > v) != (y1 > v)) & (u < (x1 - x0) * (v - y0) / (y1 - y0) + x0)
        return odd
    return inside


def star(points, inner):
    return polygon(*((r * math.sin(a), -r * math.cos(a)) for i in range(2 * points)
                     for r, a in [((1, inner)[i % 2], math.pi * i / points)]))


def halve(image):
    return (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4


SHAPES = {                                                 # each about the unit disk
    "disk": lambda u, v: u * u + v * v < 0.8,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) < 0.22,
    "triangle": star(3, 0.5),
    "square": polygon((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "bar": polygon((-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)),
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.28) & (np.maximum(np.abs(u), np.abs(v)) < 0.95),
    "star": star(5, 0.4),
    "crescent": lambda u, v: (u * u + v * v < 0.95) & ((u - 0.5) ** 2 + v * v > 0.6),
    "arrow": polygon((0, -1), (0.8, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.8, 0)),
    "corner": polygon((-0.8, -0.8), (-0.2, -0.8), (-0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (-0.8, 0.8)),
}


class Synthetic(Dataset):
    """Scenes of one textured shape over a textured ground with clutter → (PIL image, class).

    The class is the shape; colours, textures, place, size, tilt, ground and clutter say nothing of it.
    Shapes tend to be lighter than the ground. Deterministic by (seed, split, index).
    """

    classes = list(SHAPES)

    def __init__(self, split="train", number=10_000, image_size=32, seed=0):
        self.split, self.number, self.size, self.seed = split, number, image_size, seed
        self.targets = [i % len(SHAPES) for i in range(number)]
        self.drawn = {}                                    # kept while few and small: drawing costs more than augmenting

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return Image.fromarray(self.scene(index)), self.targets[index]

    def scene(self, index):
        if index in self.drawn:
            return self.drawn[index]
        n = 2 * self.size                                  # drawn at twice the size, then averaged
        rng = np.random.default_rng([self.seed, {"train": 1, "val": 2}[self.split], index])
        y, x = np.mgrid[0:n, 0:n].astype(np.float32) / (n / 2) - 1  # [-1, 1) across the image
        scene = self.draw(rng, x, y, index)
        if self.size <= 64 and self.number <= 50_000:
            self.drawn[index] = scene
        return scene

    def draw(self, rng, x, y, index):
        image = self.ground(rng, x, y)
        self.shape(rng, image, x, y, self.targets[index], 0.55, 0.85)
        return self.pixels(rng, image)

    def ground(self, rng, x, y):
        image = self.texture(rng, x, y, 0.0, 0.6)
        for _ in range(rng.integers(2, 5)):                # clutter: small disks, bars and corners
            piece = SHAPES[("disk", "bar", "corner")[rng.integers(3)]]
            self.paste(rng, image, x, y, piece, rng.uniform(0.06, 0.14), rng.uniform(-1, 1, 2), math.pi, 0.0)
        return image

    def shape(self, rng, image, x, y, label, smallest, largest):
        """Paste a shape of that size, in half sides, all within the image; returns where it lies."""
        size = rng.uniform(smallest, largest)
        return self.paste(rng, image, x, y, list(SHAPES.values())[label], size, rng.uniform(size - 1, 1 - size, 2), 0.35, 0.4)

    @staticmethod
    def pixels(rng, image):
        image = halve(image)
        image = image + 0.02 * rng.standard_normal(image.shape, np.float32)
        return (image.clip(0, 1) * 255).round().astype(np.uint8)

    def paste(self, rng, image, x, y, shape, size, centre, tilt, darkest):
        n = len(image)
        box = tuple(slice(*np.clip([(c - 1.5 * size + 1) * n / 2, (c + 1.5 * size + 1) * n / 2 + 1], 0, n).astype(int))
                    for c in centre[::-1])                 # all that the shape can reach
        angle, x, y = rng.uniform(-tilt, tilt), x[box] - centre[0], y[box] - centre[1]
        c, s = math.cos(angle) / size, math.sin(angle) / size
        u, v = c * x + s * y, c * y - s * x
        inside = shape(u, v)
        image[box][inside] = self.texture(rng, u[inside], v[inside], darkest, 1.0)
        return box, inside

    @staticmethod
    def texture(rng, u, v, darkest, lightest):
        """Stripes, checks, dots or a gradient between two random colours → (…, 3)."""
        first, second = rng.uniform(darkest, lightest, (2, 3)).astype(np.float32)
        angle, frequency, kind = rng.uniform(0, math.pi), rng.uniform(2, 6), rng.integers(4)
        c, s = math.cos(angle), math.sin(angle)
        a, b = u * c + v * s, v * c - u * s
        if kind == 0:
            weight = a * frequency % 1 < 0.5
        elif kind == 1:
            weight = (a * frequency % 1 < 0.5) ^ (b * frequency % 1 < 0.5)
        elif kind == 2:
            weight = (a * frequency % 1 - 0.5) ** 2 + (b * frequency % 1 - 0.5) ** 2 < 0.1
        else:
            weight = (0.5 * a + 0.5).clip(0, 1)
        return first + weight[..., None] * (second - first)


def instances(boxes, labels, masks):
    """Detection's target, as torchvision's Mask R-CNN takes it: boxes (n, 4), left, top, right, bottom in pixels;
    labels (n,) from 1; masks (n, H, W)."""
    boxes = tv_tensors.BoundingBoxes(boxes.float(), format="XYXY", canvas_size=masks.shape[1:])
    return dict(boxes=boxes, labels=labels, masks=tv_tensors.Mask(masks.to(torch.uint8)))


class Scenes(Synthetic):
    """The same with one to four shapes, later ones over earlier ones, and what is seen of each. target: "masks" →
    (PIL image, map of classes: 1 is the ground, 2… the shapes), "instances" → (PIL image, as instances() makes it)."""

    def __init__(self, *args, target, **kwargs):
        super().__init__(*args, **kwargs)
        self.target, self.ids, self.category_ids = target, range(self.number), range(1, len(SHAPES) + 1)  # as of COCO
        if target == "masks":
            self.classes = ["ground", *self.classes]

    def with_objects(self):
        return range(self.number)

    def draw(self, rng, x, y, index):
        image = self.ground(rng, x, y)
        labels, owner = rng.integers(len(SHAPES), size=rng.integers(1, 5)), np.zeros(image.shape[:2], int)
        for i, label in enumerate(labels, 1):
            box, inside = self.shape(rng, image, x, y, label, 0.2, 0.5)
            owner[box][inside] = i                         # the shape seen at each place, 0 for none
        owner = np.argmax([halve((owner == i).astype(int)) for i in range(len(labels) + 1)], 0)
        return self.pixels(rng, image), owner.astype(np.uint8), labels

    def __getitem__(self, index):
        image, owner, labels = self.scene(index)
        if self.target == "masks":
            return Image.fromarray(image), tv_tensors.Mask(np.concatenate([[1], labels + 2]).astype(np.uint8)[owner])
        masks = torch.from_numpy(owner == np.arange(1, len(labels) + 1)[:, None, None])
        seen = masks.any((1, 2))
        boxes = torchvision.ops.masks_to_boxes(masks[seen]) + torch.tensor([0, 0, 1, 1])
        return Image.fromarray(image), instances(boxes, torch.from_numpy(labels + 1)[seen], masks[seen])


# ------------------------------------------------------------------------------------------------
# Data sets by name

def load_dataset(name, split, image_size, root="data"):
    """The data set of --data: yields (PIL image, class) and has .classes and .targets.

    split: "train" or "val". Raises InputError where it is not there.
    """
    if name.partition(":")[0] == "synthetic":
        return Synthetic(split, synthetic_number(name, split), image_size)
    if name in ("cifar10", "cifar100"):
        kind = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if dist.is_initialized() and not first:
            dist.barrier()                                 # one rank a machine downloads
        try:
            dataset = kind(root, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"--data {name}: not in {root}/ and not to be downloaded ({error}); put the archive of its "
                             f"python version into {root}/, or pass a folder with train/ and val/") from error
        if dist.is_initialized() and first:
            dist.barrier()
        return dataset
    folder = Path(name) / split
    if not folder.is_dir():
        why = f"it has no {split}/ folder" if Path(name).is_dir() else "no such folder"
        raise InputError(f"--data {name}: {why}; pass the folder that holds train/ and val/, each with a folder a class")
    try:
        dataset = torchvision.datasets.ImageFolder(folder, loader=Image.open)  # read() decodes it
    except (OSError, RuntimeError) as error:               # no class folders, or an empty one
        raise InputError(f"--data {folder}: {str(error).splitlines()[0]}") from error
    train = Path(name) / "train"                           # not there: an evaluation needs none
    if train.is_dir() and dataset.classes != sorted(entry.name for entry in train.iterdir() if entry.is_dir()):
        raise InputError(f"--data {name}: train/ and val/ have different classes")
    return dataset


def synthetic_number(name, split):
    """Images of --data synthetic[:IMAGES]; a fifth as many for validation."""
    number = int(name.partition(":")[2] or 10_000)
    return number if split == "train" else max(number // 5, 100)


def palette(number):
    """Colours for masks in pictures, neighbours far apart (torchvision's own begin with black)."""
    hues = [colorsys.hsv_to_rgb(0.618 * i % 1, 0.9, 1.0) for i in range(number)]
    return [tuple(round(255 * part) for part in hue) for hue in hues]


def subfolder(root, *parts):
    folder = Path(root, *parts)
    if not folder.is_dir():
        why = f"it has no {'/'.join(parts)}/ folder" if Path(root).is_dir() else "no such folder"
        raise InputError(f"--data {root}: {why}; see the README for the layout")
    return folder


def label_subset(targets, fraction, seed):
    """Indices of a random `fraction` of the images, the same number of each class (at least one)."""
    order = np.random.default_rng(seed).permutation(len(targets))
    targets = np.asarray(targets)[order]
    keep = [order[targets == c][:max(1, round(fraction * (targets == c).sum()))] for c in np.unique(targets)]
    return np.sort(np.concatenate(keep)).tolist()


# ------------------------------------------------------------------------------------------------
# Transforms: PIL image → float32 (3, H, W) in [-1, 1]

BICUBIC = InterpolationMode.BICUBIC


def to_rgb(image):
    """A decoded RGB image of a PIL image of any mode."""
    image.load()
    if image.mode.startswith("I"):                         # 16 bits: PIL would clip them to the first 255 values
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def to_pixels(image):
    """The one place where pixels get their range: PIL image → float32 (3, H, W), [0, 255] → [-1, 1]."""
    return T.functional.pil_to_tensor(image).float() / 127.5 - 1


class Each(T.Compose):
    """--augment image: each image by itself in a loader's worker. augment.Batch is the other form."""

    @staticmethod
    def finish(batch):
        return batch


class Joint(Each):
    """Image and target under the same draws."""

    def __call__(self, image, target):
        image, target = super().__call__(image, target)
        return to_pixels(image), target


def pretrain_transform(size, crop_min=0.08, jitter=0.4, form="image"):
    """BEiT's: random resized crop, flip, colour jitter. form: "image" or "batch", as --augment."""
    if form == "batch":
        return augment.Batch(size, crop_min, *([augment.color_jitter(jitter, jitter, jitter)] if jitter else []))
    return Each([T.RandomResizedCrop(size, (crop_min, 1), interpolation=BICUBIC), T.RandomHorizontalFlip(),
                 T.ColorJitter(jitter, jitter, jitter), to_pixels])


def tokenizer_transform(size, crop_min=0.08, form="image"):
    """Random resized crop and flip; our choice, the paper is silent."""
    if form == "batch":
        return augment.Batch(size, crop_min)
    return Each([T.RandomResizedCrop(size, (crop_min, 1), interpolation=BICUBIC), T.RandomHorizontalFlip(), to_pixels])


def teacher_transform(size, crop_min=0.08, form="image"):
    """MoCo v3's two views, which are BYOL's (appendix B) with a crop of at least 8 %. Returns two transforms.
    The blur's kernel is a tenth of the image, as there; below 64 px there is no blur (our choice)."""
    def view(blur, solarize):
        if form == "batch":
            return augment.Batch(size, crop_min, augment.color_jitter(0.4, 0.4, 0.2, 0.1, p=0.8), augment.random_grey(0.2),
                                 *([augment.blur(blur, size)] if size >= 64 else []), augment.solarize(solarize))
        kernel = max(3, int(0.1 * size) // 2 * 2 + 1)
        return Each([
            T.RandomResizedCrop(size, (crop_min, 1), interpolation=BICUBIC),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            *([T.RandomApply([T.GaussianBlur(kernel, (0.1, 2.0))], p=blur)] if size >= 64 else []),
            T.RandomSolarize(128, p=solarize),
            T.RandomHorizontalFlip(), to_pixels])
    return view(1.0, 0.0), view(0.1, 0.2)


def finetune_transform(size, crop_min=0.08, magnitude=27, erasing=0.25, form="image"):
    """BEiT's: random resized crop, flip, RandAugment, random erasing by noise.

    Its RandAugment is timm's: two ops, each taken with probability ½, at magnitude 9 of 10. Here the ops are
    torchvision's, at 27 of 30, without timm's noise of 0.5 on the magnitude.
    """
    if form == "batch":
        return augment.Batch(size, crop_min, *([augment.rand_augment(magnitude)] if magnitude else []),
                             *([augment.erase(erasing)] if erasing else []))
    grey = [128] * 3
    return Each([T.RandomResizedCrop(size, (crop_min, 1), interpolation=BICUBIC), T.RandomHorizontalFlip(),
                 *([T.RandomApply([T.RandAugment(1, magnitude, interpolation=BICUBIC, fill=grey)])] * 2 if magnitude else []),
                 to_pixels, *([T.RandomErasing(erasing, value="random")] if erasing else [])])


def eval_transform(size, crop=0.875):
    """The shorter side to size / crop, then the centre; crop = 1 for images that come at their size. Takes any mode."""
    return T.Compose([to_rgb, T.Resize(round(size / crop), BICUBIC), T.CenterCrop(size), to_pixels])


# ------------------------------------------------------------------------------------------------
# Loaders

def name_of(dataset, index):
    return dataset.samples[index][0] if hasattr(dataset, "samples") else f"image {index}"


class ImageInputError(InputError):
    """An image that cannot be read. (InputError finds its own text in a worker's traceback by the end of the name.)"""


def read(dataset, index):
    """(RGB image, label) of a data set, or an InputError that names the file."""
    try:
        image, label = dataset[index]
        return to_rgb(image), label
    except InputError:                                     # of the data set itself: it has named the culprit
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageInputError(f"{name_of(dataset, index)}: not a readable image ({error}); restore or remove it") from error


class Samples(Dataset):
    """A data set under a transform, indexed by (epoch, index) → (transformed image, label).

    skip: so many unreadable images may be replaced, each by one of `indices` that is drawn by (seed, epoch, index).
    """

    def __init__(self, dataset, transform, seed, indices=(), skip=0):
        self.dataset, self.transform, self.seed, self.held = dataset, transform, seed, {}
        self.indices, self.skip, self.bad = indices, skip, torch.zeros(len(dataset) if skip else 0, dtype=torch.bool).share_memory_()

    def hold(self):
        """Decode all `indices` now and keep them; workers share the memory."""
        for index in self.indices:
            self.held[index] = self.read(0, index)

    def read(self, epoch, index):
        draw = np.random.default_rng(derive_seed(self.seed, epoch, index, -1))
        while True:                                        # until one can be read, or too many cannot
            try:
                return read(self.dataset, index)
            except ImageInputError as error:
                if not self.skip:
                    raise
                if not self.bad[index]:
                    self.bad[index] = True
                    print(f"{error}; skipped, {int(self.bad.sum())} of at most {self.skip}", file=sys.stderr)
                if self.bad.sum() > min(self.skip, len(self.indices) - 1):
                    raise InputError(f"{error}: more than --skip-bad-images {self.skip}") from error
                index = self.indices[draw.integers(len(self.indices))]

    def __getitem__(self, key):
        epoch, index = key
        image, label = self.held.get(index) or self.read(epoch, index)
        seed = derive_seed(self.seed, epoch, index)
        random.seed(seed)                                  # block masks
        torch.default_generator.manual_seed(seed)          # torchvision's transforms; manual_seed would touch CUDA too
        return self.transform(image, label) if isinstance(self.transform, Joint) else (self.transform(image), label)


class GlobalBatches(Sampler):
    """This rank's micro-batches of (epoch, index), from step `start` to step `stop`.

    A step's global batch is the same whatever the number of ranks: the epoch's permutation, seeded by
    (seed, epoch), is cut into batches, and those into micro-batches in the order accumulation, rank.
    """

    def __init__(self, indices, batch_size, micro_batch, start, stop, seed):
        self.indices, self.batch_size, self.micro_batch = indices, batch_size, micro_batch
        self.start, self.stop, self.seed, self.epoch = start, stop, seed, None

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
            self.order = np.random.default_rng(derive_seed(self.seed, epoch)).permutation(len(self.indices))
        batch = [(epoch, self.indices[i]) for i in self.order[place * self.batch_size:(place + 1) * self.batch_size]]
        return [batch[first:first + self.micro_batch]
                for first in range(rank * self.micro_batch, self.batch_size, world_size() * self.micro_batch)]


def ignore_signals(worker):
    """torchrun and Ctrl-C signal every process: a worker that died of it would cost the checkpoint."""
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def as_lists(batch):
    """Collates images of any sizes: a list of them, a list of their targets."""
    return tuple(map(list, zip(*batch)))


def make_loader(samples, batches, workers, collate=None):
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_signals, collate_fn=collate,
                      pin_memory=torch.cuda.is_available(), generator=torch.Generator(),
                      multiprocessing_context="fork" if workers else None)  # memory is shared, transforms need no pickling


def to_device(batch, device):
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return [to_device(part, device) for part in batch]


class TrainLoader:
    """Batches (what the transform makes, labels) on the device, for the whole run, from step `start` on: workers live
    through all epochs."""

    def __init__(self, dataset, transform, args, micro_batch, start, stop, device, indices=None, collate=None):
        indices = range(len(dataset)) if indices is None else indices
        self.batches = GlobalBatches(indices, args.batch_size, micro_batch, start, stop, args.seed)
        samples = Samples(dataset, transform, args.seed, indices, args.skip_bad_images)
        small = len(indices) * 4 * args.image_size ** 2 < 2 ** 30          # bytes: PIL takes four a pixel
        if args.augment == "batch" and small and start < stop:  # images that come at their size are kept, decoded
            if samples.read(0, indices[0])[0].size == (args.image_size, args.image_size):
                samples.hold()
        self.loader, self.transform, self.device = make_loader(samples, self.batches, args.workers, collate), transform, device

    def __iter__(self):
        for inputs, labels in self.loader:
            yield self.transform.finish(to_device(inputs, self.device)), to_device(labels, self.device)

    def samples(self, step, rank):
        """Indices of the images of a step on a rank."""
        return [index for batch in self.batches.of_step(step, rank) for _, index in batch]


def eval_loader(dataset, transform, batch_size, workers, indices=None, collate=None):
    """Every image exactly once over all ranks, with no padding: each rank its own share."""
    keys = [(0, i) for i in (range(len(dataset)) if indices is None else indices)][rank()::world_size()]
    batches = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    return make_loader(Samples(dataset, transform, 0), batches, workers, collate)
