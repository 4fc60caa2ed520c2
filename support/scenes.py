"""The dataset that needs no files: scenes drawn by code, for the demo and the tests.

Ten shapes, in random colours, textures, places and sizes, over ground and clutter. The class is the
shape; colours, textures, place, size, tilt, ground and clutter say nothing of it. A scene is
deterministic by (seed, split, index). Sixteen other shapes, none of which is one of the ten, are
what ImageNet is to the paper: the demo's perceptual network learns them. All numbers are our
choice.
"""
import functools
import math

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from support.launch import InputError

# ------------------------------------------------------------------------------------------------
# Shapes: inside tests on arrays of points u (to the right), v (down), each about the unit disk

def polygon(*corners):
    """The inside test of a polygon: an odd number of its edges lie to the right of the point."""
    def inside(u, v):
        odd = np.zeros(u.shape, bool)
        for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if v0 == v1:                                    # a level edge is never crossed
                continue
            at_its_height = (v0 > v) != (v1 > v)
            edge = (u1 - u0) * (v - v0) / (v1 - v0) + u0
            odd ^= at_its_height & (u < edge)
        return odd
    return inside


def star(points, inner):
    """A star whose tips lie at radius 1 and the corners between them at radius `inner`."""
    radii = [inner if i % 2 else 1 for i in range(2 * points)]
    angles = [math.pi * i / points for i in range(2 * points)]
    return polygon(*[(r * math.sin(a), -r * math.cos(a))
                     for r, a in zip(radii, angles, strict=True)])


def rect(u, v, width, height):
    """A rectangle of so much to each side."""
    return (np.abs(u) < width) & (np.abs(v) < height)


SHAPES = {
    "disk": lambda u, v: u * u + v * v < 0.8,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) < 0.22,
    "triangle": star(3, 0.5),
    "square": polygon((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "bar": polygon((-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)),
    "cross": lambda u, v: rect(u, v, 0.28, 0.95) | rect(u, v, 0.95, 0.28),
    "star": star(5, 0.4),
    "crescent": lambda u, v: (u * u + v * v < 0.95) & ((u - 0.5) ** 2 + v * v > 0.6),
    "arrow": polygon((0, -1), (0.8, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.8, 0)),
    "corner": polygon((-0.8, -0.8), (-0.2, -0.8), (-0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (-0.8, 0.8)),
}
OTHERS = {
    "heart": lambda u, v: (u * u + v * v - 0.55) ** 3 < -u * u * v ** 3,
    "T": polygon((-0.8, -0.9), (0.8, -0.9), (0.8, -0.4), (0.25, -0.4), (0.25, 0.9), (-0.25, 0.9),
                 (-0.25, -0.4), (-0.8, -0.4)),
    "Y": polygon((-0.9, -0.9), (-0.45, -0.9), (0, -0.3), (0.45, -0.9), (0.9, -0.9), (0.25, 0.05),
                 (0.25, 0.9), (-0.25, 0.9), (-0.25, 0.05)),
    "H": lambda u, v: rect(u, v, 0.8, 0.9) & ((np.abs(u) > 0.35) | (np.abs(v) < 0.25)),
    "E": lambda u, v: rect(u, v, 0.7, 0.9) & ((u < -0.25) | (np.abs(np.abs(v) - 0.45) > 0.22)),
    "S": lambda u, v: rect(u, v, 0.7, 0.9) & ((np.abs(np.abs(v) - 0.45) > 0.22) | (u * v > 0.15)),
    "bolt": polygon((0.2, -1), (-0.6, 0.2), (-0.05, 0.2), (-0.2, 1), (0.6, -0.25), (0.05, -0.25)),
    "arch": lambda u, v: rect(u, v, 0.85, 0.85) & ((np.abs(u) > 0.4) | (v < -0.35)),
    "dumbbell": lambda u, v: ((np.abs(u) - 0.65) ** 2 + v * v < 0.12) | rect(u, v, 0.65, 0.14),
    "hourglass": lambda u, v: (np.abs(v) < 0.85) & (np.abs(u) < 0.12 + 0.7 * np.abs(v)),
    "wedge": lambda u, v: (u * u + v * v < 0.85) & (u < 0.8 * np.abs(v)),
    "chevron": polygon((-0.9, 0.3), (0, -0.7), (0.9, 0.3), (0.9, 0.8), (0, -0.1), (-0.9, 0.8)),
    "frame": lambda u, v: rect(u, v, 0.85, 0.85) & ~rect(u, v, 0.4, 0.4),
    "house": polygon((0, -0.95), (0.7, -0.15), (0.7, 0.85), (-0.7, 0.85), (-0.7, -0.15)),
    "trapezoid": polygon((-0.3, -0.6), (0.3, -0.6), (0.95, 0.6), (-0.95, 0.6)),
    "drop": lambda u, v: (u * u + (v - 0.3) ** 2 < 0.4) | ((v < 0.1) & (np.abs(u) < 0.5 * (v + 1))),
}
# --data → its shapes, and those that lie about as clutter
KINDS = {
    "synthetic": (SHAPES, ("disk", "bar", "corner")),
    "synthetic-others": (OTHERS, ("drop", "dumbbell", "chevron")),
}
SPLITS = {"train": 1, "val": 2}                             # what a split's scenes are seeded by
MOST = 10_000_000                                           # images


# ------------------------------------------------------------------------------------------------
# A scene

def scene(rng, size, label=None, kind="synthetic"):
    """A ground with clutter and one shape of that label, or else one to four of any.

    size: pixels. kind: one of KINDS. Returns the image, uint8 (size, size, 3); the number of the
    shape that is seen at each pixel, from 1, 0 for the ground, uint8 (size, size); the shapes'
    labels, in their order.
    """
    shapes, clutter = KINDS[kind]
    insides = list(shapes.values())
    n = 2 * size                                            # drawn at twice the size, then averaged
    y, x = np.mgrid[0:n, 0:n].astype(np.float32) / size - 1             # [-1, 1) across the image
    image = texture(rng, x, y, 0.0, 0.6)
    for _ in range(rng.integers(2, 5)):
        piece = shapes[clutter[rng.integers(3)]]
        radius, centre = rng.uniform(0.06, 0.14), rng.uniform(-1, 1, 2)
        paste(rng, image, (x, y), piece, radius, centre, tilt=math.pi, darkest=0.0)
    smallest, largest, labels = 0.55, 0.85, np.array([label])
    if label is None:
        smallest, largest = 0.2, 0.5
        labels = rng.integers(len(shapes), size=rng.integers(1, 5))
    owner = np.zeros((n, n), int)
    for i, one in enumerate(labels, 1):
        radius = rng.uniform(smallest, largest)
        centre = rng.uniform(radius - 1, 1 - radius, 2)     # all of it lies within the image
        box, inside = paste(
            rng, image, (x, y), insides[one], radius, centre, tilt=0.35, darkest=0.4)
        owner[box][inside] = i
    shares = [halve((owner == i).astype(int)) for i in range(len(labels) + 1)]
    image = halve(image)
    image = image + 0.02 * rng.standard_normal(image.shape, np.float32)
    image = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return image, np.argmax(shares, 0).astype(np.uint8), labels        # the most frequent owner


def paste(rng, image, points, shape, radius, centre, tilt, darkest):
    """Paste a textured shape into the image, turned by at most `tilt`.

    points: x and y of the pixels. shape: its inside test. Returns the part of the image that the
    shape can reach, two slices, and where it lies in there.
    """
    n, (x, y), (centre_x, centre_y) = len(image), points, centre
    ends = np.multiply.outer((centre_y, centre_x), (1, 1)) + (-1.5 * radius, 1.5 * radius)
    ends = np.clip((ends + 1) * n / 2 + (0, 1), 0, n).astype(int)
    box = slice(*ends[0]), slice(*ends[1])
    angle = rng.uniform(-tilt, tilt)
    cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
    x, y = x[box] - centre_x, y[box] - centre_y
    u, v = cos * x + sin * y, cos * y - sin * x             # the shape's own coordinates
    inside = shape(u, v)
    image[box][inside] = texture(rng, u[inside], v[inside], darkest, 1.0)
    return box, inside


def texture(rng, u, v, darkest, lightest):
    """Stripes, checks, dots or a gradient between two random colours → (*u.shape, 3)."""
    first, second = rng.uniform(darkest, lightest, (2, 3)).astype(np.float32)
    angle = rng.uniform(0, math.pi)
    frequency = rng.uniform(2, 6)
    kind = rng.integers(4)
    a = u * math.cos(angle) + v * math.sin(angle)
    b = v * math.cos(angle) - u * math.sin(angle)
    if kind == 0:
        weight = a * frequency % 1 < 0.5
    elif kind == 1:
        weight = (a * frequency % 1 < 0.5) ^ (b * frequency % 1 < 0.5)
    elif kind == 2:
        weight = (a * frequency % 1 - 0.5) ** 2 + (b * frequency % 1 - 0.5) ** 2 < 0.1
    else:
        weight = (0.5 * a + 0.5).clip(0, 1)
    return first + weight[..., None] * (second - first)


def halve(image):
    """The mean of each 2 × 2 pixels."""
    return (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4


# ------------------------------------------------------------------------------------------------
# Datasets

@functools.lru_cache(maxsize=50_000)                        # drawing costs more than a demo's step
def drawn(seed, split, index, size, label, kind="synthetic"):
    return scene(np.random.default_rng([seed, SPLITS[split], index]), size, label, kind)


class Synthetic(Dataset):
    """Scenes of one shape → (PIL image, class). kind: one of KINDS."""

    def __init__(self, split="train", number=10_000, image_size=32, seed=0, kind="synthetic"):
        self.split, self.number, self.size, self.seed = split, number, image_size, seed
        self.kind = kind
        self.drawn = drawn if image_size <= 64 else drawn.__wrapped__   # larger ones fill memory
        self.classes = list(KINDS[kind][0])
        self.targets = [i % len(self.classes) for i in range(number)]

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        label = self.targets[index]
        image, _, _ = self.drawn(self.seed, self.split, index, self.size, label, self.kind)
        return Image.fromarray(image), label


class Scenes(Synthetic):
    """Scenes of one to four shapes, later ones over earlier ones, and what is seen of each.

    target: "masks" → (PIL image, map of classes: 1 is the ground, 2 … the shapes);
    "instances" → (PIL image, as instances() makes it).
    """

    def __init__(self, *args, target, **kwargs):
        super().__init__(*args, **kwargs)
        self.target = target
        self.ids = range(self.number)                       # as of COCO
        self.category_ids = range(1, len(SHAPES) + 1)       # as of COCO
        if target == "masks":
            self.classes = ["ground", *self.classes]

    def with_objects(self):
        """Indices of the images that have any: all of them."""
        return range(self.number)

    def __getitem__(self, index):
        index = self.ids[index]                             # past the end: IndexError, as of a list
        image, owner, labels = self.drawn(self.seed, self.split, index, self.size, None)
        if self.target == "masks":
            classes = np.concatenate([[1], labels + 2]).astype(np.uint8)
            return Image.fromarray(image), tv_tensors.Mask(classes[owner])
        masks = torch.from_numpy(owner == np.arange(1, len(labels) + 1)[:, None, None])  # (n, H, W)
        seen = masks.any((1, 2))
        boxes = torchvision.ops.masks_to_boxes(masks[seen]) + torch.tensor([0, 0, 1, 1])
        return Image.fromarray(image), instances(boxes, torch.from_numpy(labels + 1)[seen],
                                                 masks[seen])


def instances(boxes, labels, masks):
    """The target of detection, as torchvision's Mask R-CNN takes it.

    boxes (n, 4): left, top, right, bottom in pixels; labels (n,): from 1; masks (n, H, W).
    """
    boxes = tv_tensors.BoundingBoxes(boxes.float(), format="XYXY", canvas_size=masks.shape[1:])
    return dict(boxes=boxes, labels=labels, masks=tv_tensors.Mask(masks.to(torch.uint8)))


def palette(number):
    """Colours for masks in pictures, neighbours far apart (torchvision's own begin with black)."""
    return [f"hsl({222 * i % 360}, 100%, 55%)" for i in range(number)]      # by the golden angle


def synthetic_number(name, split):
    """Images of --data synthetic[:IMAGES]; a fifth as many, 40 at least, for validation."""
    kind = name.partition(":")[0]
    try:
        number = int(name.partition(":")[2] or 10_000)
    except ValueError:
        number = 0
    if not 1 <= number <= MOST:
        raise InputError(
            f"--data {name}: {kind}:IMAGES needs a whole number of images from 1 to {MOST}")
    return number if split == "train" else max(number // 5, 40)
