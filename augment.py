"""Augmentation of a whole batch on the GPU: --augment batch.

At 32 px augmenting image after image in a loader's workers (--augment image) takes longer than
training on them. Here a transform has two halves: `draw`, in the worker, draws an image's random
numbers, from the image's own seed; the call, on a whole batch, applies them, each image its own. So
a batch is the same for any number of workers and ranks.

Names, arguments, ranges and probabilities are those of torchvision.transforms.v2; where a transform
differs, it is said. Calls take x (B, 3, H, W), pixels in [0, 1] if nothing else is said, and the
drawn numbers, a column (B,) each.
"""
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

GREY = (0.2989, 0.587, 0.114)                               # ITU-R 601, as in torchvision
# NTSC's colour space: luma, and the plane in which the hue turns.
YIQ = torch.tensor([GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
RGB = torch.linalg.inv(YIQ)


# ------------------------------------------------------------------------------------------------
# The two halves

class Transform:
    """Subclasses have the other half: the call, on a batch and the numbers drawn for it."""
    draws = 0                                               # numbers that it draws for an image

    def draw(self, image):
        """In the worker: (image, numbers (draws,), uniform in [0, 1) if nothing else is said)."""
        return image, torch.rand(self.draws)


class Batch:
    """The steps, then pixels to [-1, 1].

    One of the steps is a RandomResizedCrop to a size. The call, in a worker, on a PIL image, or on
    uint8 (3, size, size): (uint8 (3, size, size), the numbers drawn).
    finish: a batch of both, on any device → float32 (B, 3, size, size).
    """

    def __init__(self, steps):
        self.steps = [*steps, ToPixels()]

    def __call__(self, image):
        drawn = []
        for step in self.steps:
            if step.draws:
                image, numbers = step.draw(image)
                drawn.append(numbers)
        return image, torch.cat(drawn)

    def finish(self, batch):
        pixels, drawn = batch                                           # uint8, (B, all draws)
        return apply(self.steps, pixels.float() / 255, *drawn.unbind(1))


def apply(steps, x, *columns):
    """Apply the steps in their order, each with its own columns."""
    for step in steps:
        x = step(x, *columns[:step.draws])
        columns = columns[step.draws:]
    return x


def apply_to_some(function, x, chosen, columns):
    """function(x, *columns) of the chosen images (chosen: bool (B,)); the others as they are."""
    rows = chosen.nonzero()[:, 0]
    if len(rows) == 0:
        return x
    return x.index_copy(0, rows, function(x[rows], *(column[rows] for column in columns)))


def per_image(column):
    return column[:, None, None, None]                                  # (B, 1, 1, 1)


def uniform(u, low, high):
    """From [0, 1) to [low, high)."""
    return low + (high - low) * u


class ToPixels(Transform):
    """The range of transforms.to_pixels: [0, 1] → [-1, 1]."""

    def __call__(self, x):
        return 2 * x - 1


class WithProbability(Transform):
    """With probability p what change(x) makes of x."""
    draws = 1

    def __init__(self, p=0.5):
        self.p = p

    def __call__(self, x, chosen):
        return torch.where(per_image(chosen < self.p), self.change(x), x)


class RandomApply(Transform):
    def __init__(self, transforms, p=0.5):
        self.transforms, self.p = transforms, p
        self.draws = 1 + sum(transform.draws for transform in transforms)

    def __call__(self, x, chosen, *columns):
        return apply_to_some(partial(apply, self.transforms), x, chosen < self.p, columns)


# ------------------------------------------------------------------------------------------------
# Where: crop and flip

class RandomResizedCrop(Transform):
    """Crop and resize to a square.

    Images that come at that size are cropped with the batch, by grid_sample: bicubic by a = -0.75
    where PIL's is -0.5, and at an inner edge of the crop it sees the pixels beyond. Others are
    cropped and resized in the worker, since a batch needs one size, and so before any step that
    stands before the crop.
    """
    draws = 4                           # the crop's left, top, width, height, shares of the image's
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0])

    def __init__(self, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3),
                 interpolation=InterpolationMode.BILINEAR):
        self.size, self.mode = size, interpolation.value
        self.boxes = T.RandomResizedCrop(size, scale, ratio)

    def draw(self, image):
        box = self.boxes.make_params([image])
        left, top, width, height = box["left"], box["top"], box["width"], box["height"]
        n = self.size
        if isinstance(image, torch.Tensor) or image.size == (n, n):     # tensors are of that size
            return to_bytes(image), torch.tensor([left / n, top / n, width / n, height / n])
        crop = to_bytes(image.crop((left, top, left + width, top + height)))[None]
        crop = F.interpolate(crop, (n, n), mode=self.mode, antialias=True)
        return crop[0].contiguous(), self.whole

    def __call__(self, x, *box):
        left, top, width, height = box
        return apply_to_some(self.crop, x, width * height < 1, box)

    def crop(self, x, left, top, width, height):
        place = centres(self.size, x.device)
        across = (left[:, None] + width[:, None] * place)[:, None, :]               # (B, 1, W)
        down = (top[:, None] + height[:, None] * place)[:, :, None]                 # (B, H, 1)
        grid = torch.stack(torch.broadcast_tensors(across, down), 3)                # (B, H, W, 2)
        x = F.grid_sample(x, 2 * grid - 1, self.mode, padding_mode="border", align_corners=False)
        return x.clamp(0, 1)


def centres(pixels, device):
    """Where the centres of a row of pixels lie, all of the row being 1 → (pixels,)."""
    return (torch.arange(pixels, device=device) + 0.5) / pixels


def to_bytes(image):
    """PIL image → uint8 (3, H, W)."""
    if isinstance(image, torch.Tensor):                     # it was done before
        return image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class RandomHorizontalFlip(WithProbability):
    def change(self, x):
        return x.flip(3)


# ------------------------------------------------------------------------------------------------
# Colours

def grey(x):
    return (x * x.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)              # (B, 1, H, W)


class ColorJitter(Transform):
    """Always in this order (torchvision draws it), and the hue turns in YIQ, not in HSV."""
    draws = 4

    def __init__(self, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0):
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation
        self.hue = hue                                      # in turns

    def __call__(self, x, brightness, contrast, saturation, hue):
        x = (x * self.factor(brightness, self.brightness)).clamp(0, 1)
        mean = grey(x).mean((2, 3), keepdim=True)
        x = torch.lerp(mean, x, self.factor(contrast, self.contrast)).clamp(0, 1)
        x = torch.lerp(grey(x), x, self.factor(saturation, self.saturation)).clamp(0, 1)
        return self.turn(x, hue) if self.hue else x

    @staticmethod
    def factor(u, strength):
        return per_image(uniform(u, max(0, 1 - strength), 1 + strength))

    def turn(self, x, hue):
        angle = 2 * math.pi * uniform(hue, -self.hue, self.hue)
        rotation = torch.eye(3, device=x.device).repeat(len(x), 1, 1)               # (B, 3, 3)
        rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
        rotation[:, 2, 1] = angle.sin()
        rotation[:, 1, 2] = -angle.sin()
        matrix = RGB.to(x.device) @ rotation @ YIQ.to(x.device)
        return torch.einsum("bij,bjhw->bihw", matrix, x).clamp(0, 1)


class RandomGrayscale(WithProbability):
    def __init__(self, p=0.1):
        super().__init__(p)

    def change(self, x):
        return grey(x)


class RandomSolarize(WithProbability):
    """threshold: of 255, as for PIL images."""

    def __init__(self, threshold, p=0.5):
        super().__init__(p)
        self.threshold = threshold / 255

    def change(self, x):
        return torch.where(x >= self.threshold, 1 - x, x)


class GaussianBlur(Transform):
    draws = 1

    def __init__(self, kernel_size, sigma=(0.1, 2.0)):
        self.reach, self.sigma = kernel_size // 2, sigma

    def __call__(self, x, sigma):
        offsets = torch.arange(-self.reach, self.reach + 1, device=x.device)
        sigma = uniform(sigma, *self.sigma)[:, None]                                # (B, 1)
        kernels = (-0.5 * (offsets / sigma).square()).softmax(1)                    # (B, k)
        kernels = kernels.repeat_interleave(3, 0)[:, None, None]                    # (3·B, 1, 1, k)
        y = F.pad(x, [self.reach] * 4, mode="reflect")
        y = y.flatten(0, 1)[None]                                               # (1, 3·B, ·, ·)
        y = F.conv2d(y, kernels, groups=len(kernels))       # across
        y = F.conv2d(y, kernels.mT, groups=len(kernels))    # down
        return y.view_as(x)
