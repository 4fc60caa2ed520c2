"""The transforms of each stage. In the end every image is float32 (3, H, W), in [-1, 1].

With --augment image a worker makes that; with batch a worker makes bytes and random numbers, and
.finish(batch), on the device, the pixels.

Each is written once, for both forms of --augment: augment.py's steps have the names and arguments
of torchvision's.
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T
from torchvision.utils import make_grid, save_image

import augment
from support.launch import InputError

BICUBIC = InterpolationMode.BICUBIC                         # BEiT's


def open_image(image):
    """A PIL image of a path, a PIL image, or pixels (H, W, 3) uint8, NumPy's or PyTorch's.

    Raises InputError for anything else, and for a file that is not a readable image.
    """
    if isinstance(image, (str, Path)):
        try:
            return to_rgb(Image.open(image))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{image}: not a readable image ({error})") from error
    if isinstance(image, Image.Image):
        return image
    found = type(image).__name__
    if isinstance(image, (np.ndarray, torch.Tensor)):
        pixels = image.cpu().numpy() if isinstance(image, torch.Tensor) else image
        if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3:
            return Image.fromarray(pixels)
        found = f"{found} of {pixels.dtype}, {pixels.shape}"
    raise InputError("an image is a path, a PIL image, or an array or tensor (H, W, 3) of uint8, "
                     f"not {found}")


def to_rgb(image):
    """A decoded RGB image of a PIL image of any mode. Raises ValueError as to_8_bits does."""
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):     # PIL would clip them at 255
        image = to_8_bits(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_8_bits(image):
    """A grey PIL image of 16 or 32 bits, scaled by the range that a TIFF file declares.

    Where none is declared, integers fill their bits, which are 16 in other files than TIFF. Raises
    ValueError where there are 32.
    """
    tags = getattr(image, "tag_v2", {})
    low = np.min(tags.get(340, tags.get(280, 0)))           # SMinSampleValue, MinSampleValue
    high = np.max(tags.get(341, tags.get(281, 0)))          # SMaxSampleValue, MaxSampleValue
    bits = np.max(tags.get(258, 16))                        # BitsPerSample
    if high <= low:
        if bits > 16:
            raise ValueError("32-bit pixels of no declared range: convert it to 8 bits")
        low, high = 0, 2 ** bits - 1
    levels = high - low if image.mode == "F" else high - low + 1
    pixels = (np.asarray(image).astype(np.float64) - low) * 256 / levels
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def to_pixels(image, *target):
    """Where pixels get their range: PIL image → float32 (3, H, W), [0, 255] → [-1, 1]."""
    pixels = T.functional.pil_to_tensor(image).float() / 127.5 - 1
    return (pixels, *target) if target else pixels


def save_rows(rows, file):
    """The way back: rows of images (B, 3, H, W) under one another, as a PNG. InputError: full."""
    picture = make_grid(torch.cat(rows).float().clamp(-1, 1), len(rows[0]), pad_value=1.0)
    try:
        save_image(picture, file, format="png", normalize=True, value_range=(-1, 1))
    except OSError as error:
        raise InputError(f"{file}: not written ({error})") from error


class Each(T.Compose):
    """--augment image: each image by itself, in a worker. augment.Batch is the other form.

    The steps, then to_pixels, then what is applied to pixels.
    """

    def __init__(self, steps, on_pixels=()):
        super().__init__([*steps, to_pixels, *on_pixels])

    @staticmethod
    def finish(batch):
        return batch


class Joint(Each):
    """The same for (PIL image, target), both under the same draws."""


FORMS = {"image": (T, Each), "batch": (augment, augment.Batch)}


def pretrain(size, crop_min=0.08, jitter=0.4, form="image"):
    """BEiT's: colour jitter, random resized crop, flip."""
    t, compose = FORMS[form]
    steps = [
        t.RandomResizedCrop(size, (crop_min, 1), interpolation=BICUBIC),
        t.RandomHorizontalFlip(),
    ]
    if jitter:
        # First, as in BEiT. Form "batch" crops images of another size before it, in the worker:
        # there contrast is about the mean of the crop.
        steps.insert(0, t.ColorJitter(jitter, jitter, jitter))
    return compose(steps)


def tokenizer(size, crop_min=0.08, form="image"):
    """Random resized crop and flip; our choice, the paper is silent."""
    t, compose = FORMS[form]
    crop = t.RandomResizedCrop(size, (crop_min, 1), interpolation=BICUBIC)
    return compose([crop, t.RandomHorizontalFlip()])


def teacher(size, crop_min=0.08, form="image"):
    """MoCo v3's two views: BYOL's (its appendix B), with a crop of at least 8 %, bilinear.

    Returns two transforms. The blur's kernel is a tenth of the image, as there; below 64 px there
    is no blur (our choice).
    """
    t, compose = FORMS[form]
    kernel = int(0.1 * size) // 2 * 2 + 1                   # odd

    def view(blur, solarize):
        steps = [
            t.RandomResizedCrop(size, (crop_min, 1)),
            t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            t.RandomGrayscale(0.2),
        ]
        if size >= 64:
            steps.append(t.RandomApply([t.GaussianBlur(kernel, (0.1, 2.0))], p=blur))
        steps.append(t.RandomSolarize(128, p=solarize))
        steps.append(t.RandomHorizontalFlip())
        return compose(steps)

    return view(blur=1.0, solarize=0.0), view(blur=0.1, solarize=0.2)


def finetune(size, crop_min=0.08, magnitude=27, erasing=0.25, form="image"):
    """BEiT's: random resized crop, flip, RandAugment, random erasing by noise.

    Its RandAugment is timm's: two operations, each with probability ½, at magnitude 9 of 10. Here
    they are torchvision's, at `magnitude` of 30, without timm's noise of 0.5 on the magnitude.
    Raises InputError where these are asked for in form "batch", which has neither.
    """
    if form == "batch" and (magnitude or erasing):
        raise InputError("--augment batch has no RandAugment and no erasing: take --augment image, "
                         "or --randaugment 0 --erasing 0")
    t, compose = FORMS[form]
    steps = [
        t.RandomResizedCrop(size, (crop_min, 1), interpolation=BICUBIC),
        t.RandomHorizontalFlip(),
    ]
    if magnitude:
        operation = T.RandAugment(1, magnitude, interpolation=BICUBIC, fill=[128] * 3)
        steps.append(T.RandomApply([operation]))
        steps.append(T.RandomApply([operation]))
    if erasing:
        return Each(steps, on_pixels=[T.RandomErasing(erasing, value="random")])
    return compose(steps)


def evaluation(size, crop=0.875):
    """The shorter side to size / crop, then the centre; crop = 1 if images come at their size."""
    return T.Compose([to_rgb, T.Resize(round(size / crop), BICUBIC), T.CenterCrop(size), to_pixels])
