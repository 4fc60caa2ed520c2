"""The dataset that needs no files: scenes drawn by code, for the demo and the tests.

Ten shapes, in random colours, textures, places and sizes, over ground and clutter. A scene is
deterministic by (seed, split, index).
"""
import colorsys
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
    corners = []
    for i in range(2 * points):
        radius = inner if i % 2 else 1
        angle = math.pi * i / points
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return polygon(*corners)


def disk(u, v):
    return u * u + v * v < 0.8


def ring(u, v):
    return np.abs(np.hypot(u, v) - 0.75) < 0.22


def cross(u, v):
    near = np.minimum(np.abs(u), np.abs(v))
    far = np.maximum(np.abs(u), np.abs(v))
    return (near < 0.28) & (far < 0.95)


def crescent(u, v):
    return (u * u + v * v < 0.95) & ((u - 0.5) ** 2 + v * v > 0.6)


SHAPES = {
    "disk": disk,
    "ring": ring,
    "triangle": star(3, 0.5),
    "square": polygon((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "bar": polygon((-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)),
    "cross": cross,
    "star": star(5, 0.4),
    "crescent": crescent,
    "arrow": polygon((0, -1), (0.8, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.8, 0)),
    "corner": polygon((-0.8, -0.8), (-0.2, -0.8), (-0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (-0.8, 0.8)),
}
CLUTTER = ("disk", "bar", "corner")
SPLITS = {"train": 1, "val": 2}                             # what a split's scenes are seeded by
DRAWN = {}                                                  # scenes kept, for all of a process
MOST = 10_000_000                                           # images; our choice


# ------------------------------------------------------------------------------------------------
# Scenes of one shape

class Synthetic(Dataset):
    """Scenes of one textured shape over a textured ground with clutter → (PIL image, class).

    The class is the shape; colours, textures, place, size, tilt, ground and clutter say nothing of
    it. Shapes tend to be lighter than the ground.

    split: "train" or "val". number: of images. image_size: pixels.
    """

    classes = list(SHAPES)

    def __init__(self, split="train", number=10_000, image_size=32, seed=0):
        self.split, self.number, self.size, self.seed = split, number, image_size, seed
        self.targets = [i % len(SHAPES) for i in range(number)]
        # Few and small scenes are kept: drawing one costs more than augmenting it.
        self.keep = image_size <= 64 and number <= 50_000

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return Image.fromarray(self.scene(index)), self.targets[index]

    def scene(self, index):
        """What draw() makes for an image, from the image's own seed."""
        key = (type(self), self.seed, self.split, self.size, index)
        if key in DRAWN:
            return DRAWN[key]
        rng = np.random.default_rng([self.seed, SPLITS[self.split], index])
        n = 2 * self.size                                   # drawn at twice the size, then averaged
        y, x = np.mgrid[0:n, 0:n].astype(np.float32) / (n / 2) - 1      # [-1, 1) across the image
        scene = self.draw(rng, x, y, index)
        if self.keep:
            DRAWN[key] = scene
        return scene

    def draw(self, rng, x, y, index):
        """The image, uint8 (size, size, 3)."""
        image = self.ground(rng, x, y)
        self.shape(rng, image, x, y, self.targets[index], 0.55, 0.85)
        return self.pixels(rng, image)

    def ground(self, rng, x, y):
        """A textured ground and two to four small pieces of clutter, (n, n, 3) in [0, 1]."""
        image = self.texture(rng, x, y, 0.0, 0.6)
        for _ in range(rng.integers(2, 5)):
            piece = SHAPES[CLUTTER[rng.integers(3)]]
            size = rng.uniform(0.06, 0.14)
            centre = rng.uniform(-1, 1, 2)
            self.paste(rng, image, x, y, piece, size, centre, tilt=math.pi, darkest=0.0)
        return image

    def shape(self, rng, image, x, y, label, smallest, largest):
        """Paste a shape, all within the image, of a size in half sides; returns where it lies."""
        size = rng.uniform(smallest, largest)
        centre = rng.uniform(size - 1, 1 - size, 2)
        shape = list(SHAPES.values())[label]
        return self.paste(rng, image, x, y, shape, size, centre, tilt=0.35, darkest=0.4)

    @staticmethod
    def pixels(rng, image):
        """Average to half the size, add a little noise, and round: uint8 (size, size, 3)."""
        image = halve(image)
        image = image + 0.02 * rng.standard_normal(image.shape, np.float32)
        return (image.clip(0, 1) * 255).round().astype(np.uint8)

    def paste(self, rng, image, x, y, shape, size, centre, tilt, darkest):
        """Paste a textured shape, turned by at most `tilt`.

        Returns (box, inside): the part of the image that it can reach, and where it lies in there.
        """
        centre_x, centre_y = centre
        box = reach(centre_y, size, len(image)), reach(centre_x, size, len(image))
        angle = rng.uniform(-tilt, tilt)
        cos = math.cos(angle) / size
        sin = math.sin(angle) / size
        x = x[box] - centre_x
        y = y[box] - centre_y
        u = cos * x + sin * y                               # the shape's own coordinates
        v = cos * y - sin * x
        inside = shape(u, v)
        image[box][inside] = self.texture(rng, u[inside], v[inside], darkest, 1.0)
        return box, inside

    @staticmethod
    def texture(rng, u, v, darkest, lightest):
        """Stripes, checks, dots or a gradient between two random colours → (*u.shape, 3)."""
        first, second = rng.uniform(darkest, lightest, (2, 3)).astype(np.float32)
        angle = rng.uniform(0, math.pi)
        frequency = rng.uniform(2, 6)
        kind = rng.integers(4)
        cos, sin = math.cos(angle), math.sin(angle)
        a = u * cos + v * sin
        b = v * cos - u * sin
        if kind == 0:
            weight = a * frequency % 1 < 0.5
        elif kind == 1:
            weight = (a * frequency % 1 < 0.5) ^ (b * frequency % 1 < 0.5)
        elif kind == 2:
            weight = (a * frequency % 1 - 0.5) ** 2 + (b * frequency % 1 - 0.5) ** 2 < 0.1
        else:
            weight = (0.5 * a + 0.5).clip(0, 1)
        return first + weight[..., None] * (second - first)


def reach(centre, size, n):
    """The slice of n pixels, which go from -1 to 1, that a shape of that size can touch."""
    first = (centre - 1.5 * size + 1) * n / 2
    last = (centre + 1.5 * size + 1) * n / 2
    return slice(*np.clip([first, last + 1], 0, n).astype(int))


def halve(image):
    """The mean of each 2 × 2 pixels."""
    return (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4


def synthetic_number(name, split):
    """Images of --data synthetic[:IMAGES]; a fifth as many, 40 at least, for validation.

    Raises InputError.
    """
    try:
        number = int(name.partition(":")[2] or 10_000)
    except ValueError:
        number = 0
    if not 1 <= number <= MOST:
        raise InputError(
            f"--data {name}: synthetic:IMAGES needs a whole number of images from 1 to {MOST}")
    return number if split == "train" else max(number // 5, 40)


# ------------------------------------------------------------------------------------------------
# Scenes of several shapes, for segmentation and detection

class Scenes(Synthetic):
    """The same with one to four shapes, later ones over earlier ones, and what is seen of each.

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

    def draw(self, rng, x, y, index):
        """(image, the number of the shape seen at each pixel, the shapes' labels)."""
        image = self.ground(rng, x, y)
        labels = rng.integers(len(SHAPES), size=rng.integers(1, 5))
        owner = np.zeros(image.shape[:2], int)              # 0: the ground
        for i, label in enumerate(labels, 1):
            box, inside = self.shape(rng, image, x, y, label, 0.2, 0.5)
            owner[box][inside] = i
        shares = [halve((owner == i).astype(int)) for i in range(len(labels) + 1)]
        owner = np.argmax(shares, 0).astype(np.uint8)       # at half the size: the most frequent
        return self.pixels(rng, image), owner, labels

    def __getitem__(self, index):
        image, owner, labels = self.scene(index)
        if self.target == "masks":
            classes = np.concatenate([[1], labels + 2]).astype(np.uint8)
            return Image.fromarray(image), tv_tensors.Mask(classes[owner])
        numbers = np.arange(1, len(labels) + 1)[:, None, None]
        masks = torch.from_numpy(owner == numbers)                                  # (n, H, W)
        seen = masks.any((1, 2))
        boxes = torchvision.ops.masks_to_boxes(masks[seen]) + torch.tensor([0, 0, 1, 1])
        labels = torch.from_numpy(labels + 1)
        return Image.fromarray(image), instances(boxes, labels[seen], masks[seen])


def instances(boxes, labels, masks):
    """The target of detection, as torchvision's Mask R-CNN takes it.

    boxes (n, 4): left, top, right, bottom in pixels; labels (n,): from 1; masks (n, H, W).
    """
    boxes = tv_tensors.BoundingBoxes(boxes.float(), format="XYXY", canvas_size=masks.shape[1:])
    return dict(boxes=boxes, labels=labels, masks=tv_tensors.Mask(masks.to(torch.uint8)))


def palette(number):
    """Colours for masks in pictures, neighbours far apart (torchvision's own begin with black)."""
    colours = []
    for i in range(number):
        hue = 0.618 * i % 1                                 # the golden ratio spreads them
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, 1.0)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours
