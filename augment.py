"""Augmentation of a whole batch where the network is.

Augmenting one image after the other in a loader's workers (data.py's other form) takes longer than training on it at
32 px, and most of a worker's time at 224. Here a worker draws an image's random numbers, from the image's own seed, and
crops what does not come at its size; the functions below turn a batch of them into the images' augmentations, each image
its own. So a batch is the same for any number of workers and ranks.

Each function here returns (number of draws, step); step(x, *draws) augments x (B, 3, H, W), pixels in
[0, 1], by that many draws u (B,), uniform in [0, 1). Forms and constants are those of torchvision's
transforms of the same name; where one differs, it is said.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

GREY = (0.2989, 0.587, 0.114)                              # ITU-R 601, as in torchvision
YIQ = torch.tensor([GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])  # NTSC: luma, the plane of the hue
RGB = torch.linalg.inv(YIQ)


class Batch:
    """A transform in two halves. Called on a PIL image, in a worker: pixels of the size, uint8, and its draws. finish: a
    batch of both, on any device → float32 (B, 3, H, W) in [-1, 1]. Each begins with a random crop of an area of
    `smallest` to 1 and a flip, then come the steps."""

    def __init__(self, size, smallest, *steps):
        self.size, self.smallest, self.steps = size, smallest, [crop_and_flip(smallest), *steps]
        self.draws = sum(number for number, _ in self.steps)

    def __call__(self, image):
        draws = torch.rand(self.draws)
        if image.size == (self.size, self.size):
            return TF.pil_to_tensor(image), draws
        area, aspect, left, top = draws[:4].tolist()       # cropped here, as bytes: a batch needs one size
        shares = crop_box(area, aspect, self.smallest, image.height / image.width)
        w, h = (max(1, round(min(share, 1) * side)) for share, side in zip(shares, image.size))
        x, y = int(left * (image.width - w + 1)), int(top * (image.height - h + 1))
        crop = torch.from_numpy(np.array(image.crop((x, y, x + w, y + h))))                  # (h, w, 3)
        crop = F.interpolate(crop.permute(2, 0, 1)[None], (self.size, self.size), mode="bicubic", antialias=True)
        draws[0], draws[1] = 1.0, 0.5                      # the batch's own crop leaves it whole
        return crop[0].contiguous(), draws

    def finish(self, batch):
        pixels, draws = batch                                                       # (B, 3, H, W), (B, draws)
        x, columns = pixels.float() / 255, list(draws.unbind(1))
        for number, step in self.steps:
            x = step(x, *columns[:number])
            columns = columns[number:]
        return 2 * x - 1


def per_image(v):
    return v[:, None, None, None]


def uniform(u, low, high):
    return low + (high - low) * u


def grey(x):
    return (x * torch.tensor(GREY, device=x.device).view(3, 1, 1)).sum(1, keepdim=True)  # (B, 1, H, W)


def crop_box(area, aspect, smallest, shape=1.0):
    """RandomResizedCrop's box of an area of `smallest` to 1, aspect 3/4 to 4/3: its width and height, shares of the image's,
    whose height is `shape` times its width. One too wide or too high is for the caller to cut, not drawn again."""
    area, aspect = uniform(area, smallest, 1), (4 / 3) ** (2 * aspect - 1)
    return (area * aspect * shape) ** 0.5, (area / aspect / shape) ** 0.5


def crop_and_flip(smallest):
    """RandomResizedCrop of square images back to the same size, bicubic, boxes not rounded to pixels; flip at even odds."""
    def step(x, area, aspect, left, top, flip):
        width, height = (side.clamp(max=1) for side in crop_box(area, aspect, smallest))
        theta = torch.zeros(len(x), 2, 3, device=x.device)                          # the image is [-1, 1] each way
        theta[:, 0, 0], theta[:, 0, 2] = torch.where(flip < 0.5, -width, width), uniform(left, -1, 1) * (1 - width)
        theta[:, 1, 1], theta[:, 1, 2] = height, uniform(top, -1, 1) * (1 - height)
        grid = F.affine_grid(theta, x.shape, align_corners=False)
        return F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 1)
    return 5, step


def color_jitter(brightness, contrast, saturation, hue=0.0, p=1.0):
    """ColorJitter with probability p, always in this order; the hue turns in YIQ, a product with a matrix, not in HSV."""
    def step(x, chosen, b, c, s, h):
        y = (x * per_image(uniform(b, 1 - brightness, 1 + brightness))).clamp(0, 1)
        mean = grey(y).mean((2, 3), keepdim=True)
        y = torch.lerp(mean, y, per_image(uniform(c, 1 - contrast, 1 + contrast))).clamp(0, 1)
        y = torch.lerp(grey(y), y, per_image(uniform(s, 1 - saturation, 1 + saturation))).clamp(0, 1)
        if hue:
            angle = 2 * math.pi * uniform(h, -hue, hue)
            turn = torch.eye(3, device=x.device).repeat(len(x), 1, 1)
            turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
            turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
            y = torch.einsum("bij,bjhw->bihw", RGB.to(x.device) @ turn @ YIQ.to(x.device), y).clamp(0, 1)
        return torch.where(per_image(chosen < p), y, x)
    return 5, step


def random_grey(p):
    """RandomGrayscale."""
    return 1, lambda x, chosen: torch.where(per_image(chosen < p), grey(x), x)


def blur(p, size):
    """GaussianBlur by a kernel of a tenth of the image (BYOL), σ 0.1 to 2, with probability p."""
    reach = max(3, int(0.1 * size) // 2 * 2 + 1) // 2

    def step(x, chosen, sigma):
        offsets = torch.arange(-reach, reach + 1, device=x.device)
        kernels = (-0.5 * (offsets / uniform(sigma, 0.1, 2.0)[:, None]).square()).softmax(1)
        kernels = kernels.repeat_interleave(3, 0)[:, None, None]                    # (3·B, 1, 1, k), a group a channel
        y = F.pad(x, [reach] * 4, mode="reflect").flatten(0, 1)[None]               # (1, 3·B, ·, ·)
        y = F.conv2d(F.conv2d(y, kernels, groups=len(kernels)), kernels.mT, groups=len(kernels))
        return torch.where(per_image(chosen < p), y.view_as(x), x)
    return 2, step


def solarize(p):
    """RandomSolarize, at half."""
    return 1, lambda x, chosen: torch.where(per_image(chosen < p) & (x >= 0.5), 1 - x, x)


def rand_augment(magnitude):
    """RandAugment of two ops, each taken with probability ½, at a magnitude of 30; the images that drew the same op go
    through torchvision's function together. Shears are about the centre; bilinear, for tensors torchvision has no bicubic."""
    m = magnitude / 30

    def affine(angle=0.0, translate=(0, 0), shear=(0.0, 0.0)):
        return lambda x: TF.affine(x, angle, list(translate), 1.0, list(shear), InterpolationMode.BILINEAR, [0.5] * 3)

    def table(sign, size):                                 # the 14 ops and their ranges
        shift, shear = sign * int(150 / 331 * size * m), sign * math.degrees(math.atan(0.3 * m))
        return [lambda x: x, affine(shear=(shear, 0.0)), affine(shear=(0.0, shear)), affine(translate=(shift, 0)),
                affine(translate=(0, shift)), affine(angle=sign * 30.0 * m),
                lambda x: TF.adjust_brightness(x, 1 + sign * 0.9 * m), lambda x: TF.adjust_saturation(x, 1 + sign * 0.9 * m),
                lambda x: TF.adjust_contrast(x, 1 + sign * 0.9 * m), lambda x: TF.adjust_sharpness(x, 1 + sign * 0.9 * m),
                lambda x: TF.posterize(x, 8 - round(4 * m)), lambda x: TF.solarize(x, 1 - m), TF.autocontrast, TF.equalize]

    def step(x, *draws):
        functions = table(1, x.shape[-1]) + table(-1, x.shape[-1])
        for chosen, op, sign in (draws[:3], draws[3:]):
            which = (op * 14).long() * (chosen < 0.5) + 14 * (sign >= 0.5)          # (B,); 0: the image as it is
            order, counts = which.argsort(), which.bincount(minlength=28).tolist()
            groups = zip(functions, x[order].split(counts))
            x = torch.cat([function(group) for function, group in groups if len(group)])[order.argsort()]
        return x
    return 6, step


def erase(p):
    """RandomErasing of 2 to 33 % of the image, aspect 0.3 to 1/0.3, by one random colour (not noise)."""
    def step(x, chosen, area, aspect, top, left, *colour):
        area, aspect = uniform(area, 0.02, 0.33), uniform(aspect, math.log(0.3), -math.log(0.3)).exp()
        height, width = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        top, left = top * (1 - height), left * (1 - width)
        place = (torch.arange(x.shape[-1], device=x.device) + 0.5) / x.shape[-1]    # of pixels, in [0, 1]
        rows = (place >= top[:, None]) & (place < (top + height)[:, None])          # (B, H)
        columns = (place >= left[:, None]) & (place < (left + width)[:, None])      # (B, W)
        box = rows[:, None, :, None] & columns[:, None, None, :] & per_image(chosen < p)
        return torch.where(box, torch.stack(colour, 1)[:, :, None, None], x)
    return 8, step
