"""Whole-batch augmentation: each image its own, and what torchvision makes of the same draws."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as TF

import augment
import transforms
from support.scenes import Synthetic

SIZE = 32
FORMS = {
    "pretrain": lambda: transforms.pretrain(SIZE, form="batch"),
    "tokenizer": lambda: transforms.tokenizer(SIZE, form="batch"),
    "teacher 1": lambda: transforms.teacher(SIZE, form="batch")[0],
    "teacher 2": lambda: transforms.teacher(SIZE, form="batch")[1],
    "finetune": lambda: finetune(SIZE, form="batch"),
}


def finetune(size, form):
    """What both forms have of it."""
    return transforms.finetune(size, magnitude=0, erasing=0.0, form=form)


def scenes(number):
    """uint8 (number, 3, 32, 32)"""
    dataset = Synthetic(number=number)
    return torch.stack([TF.pil_to_tensor(dataset[i][0]) for i in range(number)])


def drawn(transform, number, seed=0):
    """What the worker makes of so many scenes: their pixels and draws."""
    dataset = Synthetic(number=number)
    torch.manual_seed(seed)
    pixels, draws = zip(*(transform(dataset[i][0]) for i in range(number)), strict=True)
    return torch.stack(pixels), torch.stack(draws)


def apply(transform, x, *values):
    """One transform, by the same draws for every image."""
    assert transform.draws == len(values)
    return transform(x, *(torch.full((len(x),), value) for value in values))


@pytest.fixture
def x():
    return scenes(6).float() / 255


@pytest.mark.parametrize("name", FORMS)
def test_every_image_is_augmented_by_its_own_draws_alone(name):
    transform = FORMS[name]()
    pixels, draws = drawn(transform, 8)
    assert torch.equal(pixels, scenes(8))
    out = transform.finish((pixels, draws))
    assert out.shape == (8, 3, SIZE, SIZE) and out.dtype == torch.float32
    assert -1 <= out.min() < -0.5 and 0.5 < out.max() <= 1
    order = torch.tensor([3, 1, 7, 0])
    assert torch.allclose(transform.finish((pixels[order], draws[order])), out[order], atol=1e-6)
    assert not torch.allclose(transform.finish((pixels, draws.flip(0))), out, atol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FORMS)
def test_the_gpu_makes_the_same_of_the_same_draws(name):
    transform = FORMS[name]()
    pixels, draws = drawn(transform, 8)
    out = transform.finish((pixels.cuda(), draws.cuda())).cpu()
    near = (out - transform.finish((pixels, draws))).abs() < 0.02
    assert near.float().mean() > 0.99       # a pixel at the edge of a box may fall either way


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_whole_image_unflipped_is_the_image_itself(x, interpolation):
    crop = augment.RandomResizedCrop(SIZE, (0.5, 1), interpolation=InterpolationMode(interpolation))
    flip = augment.RandomHorizontalFlip()
    assert torch.equal(apply(crop, x, 0.0, 0.0, 1.0, 1.0), x)
    columns = [torch.full((6,), value) for value in (0.0, 0.0, 1.0, 1.0)]
    assert torch.allclose(crop.crop(x, *columns), x, atol=1e-5)
    assert torch.equal(apply(flip, x, 0.9), x)
    assert torch.equal(apply(flip, x, 0.1), x.flip(3))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_is_torchvisions_resized_crop(x, interpolation):
    """A quarter of the area, square, at the bottom left: rows 16…31, columns 0…15."""
    crop = augment.RandomResizedCrop(SIZE, interpolation=InterpolationMode(interpolation))
    ours = apply(crop, x, 0.0, 0.5, 0.5, 0.5)
    theirs = F.interpolate(x[:, :, 16:, :16], (SIZE, SIZE), mode=interpolation,
                           align_corners=False).clamp(0, 1)
    # at an inner edge ours sees the pixels beyond
    assert torch.allclose(ours[:, :, 4:, :-4], theirs[:, :, 4:, :-4], atol=1e-4)
    # neither square nor in a corner: 12 × 20 pixels from row 7, column 5
    ours = apply(crop, x, 5 / 32, 7 / 32, 20 / 32, 12 / 32)
    theirs = F.interpolate(x[:, :, 7:19, 5:25], (SIZE, SIZE), mode=interpolation,
                           align_corners=False).clamp(0, 1)
    assert torch.allclose(ours[:, :, 6:-6, 6:-6], theirs[:, :, 6:-6, 6:-6], atol=1e-4)


def boxes(transform, size, number, monkeypatch):
    """The crops (left, top, width, height), in pixels, of so many images of a size."""
    image = Image.new("RGB", size)
    found = []

    def crop(self, box):
        left, top, right, bottom = box
        found.append((left, top, right - left, bottom - top))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(Image.Image, "crop", crop)          # in the worker, of another size
    for _ in range(number):
        _, draws = transform(image)
        if size == (SIZE, SIZE):                            # with the batch
            found.append((SIZE * draws[:4]).tolist())
    assert len(found) == number
    return np.array(found)


@pytest.mark.parametrize("smallest", [0.08, 0.4])
@pytest.mark.parametrize("size", [(375, 500), (1024, 256), (32, 32)])
def test_crops_are_drawn_as_torchvisions(size, smallest, monkeypatch):
    """By the total variation of the histograms of area, aspect and place."""
    torch.manual_seed(0)
    ours = boxes(transforms.tokenizer(SIZE, smallest, "batch"), size, 12_000, monkeypatch)
    reference, theirs = T.RandomResizedCrop(SIZE, (smallest, 1)), []
    image = Image.new("RGB", size)
    for _ in range(12_000):
        box = reference.make_params([image])
        theirs.append((box["left"], box["top"], box["width"], box["height"]))
    theirs = np.array(theirs)
    assert np.abs(ours - ours.round()).max() < 1e-4
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= np.array(size) + 1e-4).all()

    def features(boxes):
        left, top, width, height = boxes.T
        yield "area", width * height / (size[0] * size[1]), 10, (0, 1.001)
        yield "aspect", np.log(width / height), 16, (-0.5, 0.5)
        yield "centre, across", (left + width / 2) / size[0], 10, (0, 1)
        yield "centre, down", (top + height / 2) / size[1], 10, (0, 1)

    pairs = zip(features(ours), features(theirs), strict=True)
    for (name, one, bins, span), (_, other, _, _) in pairs:
        counts = [np.histogram(values, bins, span)[0] for values in (one, other)]
        assert counts[0].sum() == counts[1].sum() == 12_000
        variation = np.abs(counts[0] - counts[1]).sum() / 2 / 12_000
        assert variation <= 0.03, (name, variation)


@pytest.mark.parametrize("size", [(64, 32), (48, 80), (20, 31), (32, 31)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_image_of_another_size_is_cropped_in_the_worker(size, interpolation):
    """As torchvision does it under the same seed; then the batch leaves it whole."""
    interpolation = InterpolationMode(interpolation)
    image = Image.fromarray(scenes(1)[0].permute(1, 2, 0).numpy()).resize(size)
    crop = augment.RandomResizedCrop(SIZE, (0.3, 1), interpolation=interpolation)
    transform = augment.Batch([crop, augment.RandomHorizontalFlip()])
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, draws = transform(image)
        torch.manual_seed(seed)
        box = T.RandomResizedCrop(SIZE, (0.3, 1)).make_params([image])
        flip = torch.rand(1)
        expected = TF.resized_crop(TF.pil_to_tensor(image), **box, size=[SIZE, SIZE],
                                   interpolation=interpolation, antialias=True)
        assert pixels.dtype == torch.uint8
        assert (pixels.int() - expected.int()).abs().max() <= 1
        out = transform.finish((pixels[None], draws[None]))[0]
        whole = 2 * pixels.float() / 255 - 1
        assert torch.allclose(out, whole.flip(2) if flip < 0.5 else whole, atol=1e-4)


def test_the_crops_of_the_stages_are_the_papers():
    """Bilinear for MoCo v3, bicubic for BEiT, in both forms; BEiT's jitter comes first."""
    for form in ("image", "batch"):
        jitter, crop, *_ = steps_of(transforms.pretrain(SIZE, form=form))
        assert type(jitter).__name__ == "ColorJitter" and mode(crop) == "bicubic"
        for view in transforms.teacher(SIZE, form=form):
            assert mode(steps_of(view)[0]) == "bilinear"
        for transform in (transforms.tokenizer, finetune):
            assert mode(steps_of(transform(SIZE, form=form))[0]) == "bicubic"


def steps_of(transform):
    return transform.transforms if hasattr(transform, "transforms") else transform.steps


def mode(crop):
    assert type(crop).__name__ == "RandomResizedCrop"
    form = crop.mode if isinstance(crop, augment.Transform) else crop.interpolation
    return InterpolationMode(form).value


def test_both_forms_have_the_same_steps():
    for make in (transforms.pretrain, transforms.tokenizer, finetune,
                 lambda *args, form: transforms.teacher(*args, form=form)[1]):
        for size in (32, 64):
            names = [[type(step).__name__ for step in steps_of(make(size, form=form))]
                     for form in ("image", "batch")]
            assert [name.replace("function", "ToPixels") for name in names[0]] == names[1]


def test_colour_jitter_is_torchvisions(x):
    up, down = 0.9, 0.2                                     # 1 + 0.4 · (2u − 1): 1.32 and 0.76
    functions = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    for place, function in enumerate(functions):
        for u, factor in ((up, 1.32), (down, 0.76)):
            values = [0.5, 0.5, 0.5, 0.5]
            values[place] = u
            out = apply(augment.ColorJitter(0.4, 0.4, 0.4), x, *values)
            assert torch.allclose(out, function(x, factor), atol=1e-3)
    sometimes = augment.RandomApply([augment.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    assert torch.equal(apply(sometimes, x, 0.9, 0.1, 0.1, 0.1, 0.1), x)
    assert not torch.allclose(apply(sometimes, x, 0.7, 0.1, 0.1, 0.1, 0.1), x, atol=0.1)


def test_the_hue_turns_and_the_grey_stays(x):
    jitter = augment.ColorJitter(0, 0, 0, 0.5)
    x = 0.25 + x / 2                                        # so that none is clipped
    turned = apply(jitter, x, 0.5, 0.5, 0.5, 0.6)           # 0.1 of a turn
    assert torch.allclose(augment.grey(turned), augment.grey(x), atol=0.02)
    assert (turned - x).abs().max() > 0.05
    plain = torch.full((6, 3, 4, 4), 0.3)
    assert torch.allclose(apply(jitter, plain, 0.5, 0.5, 0.5, 0.9), plain, atol=1e-3)


def test_grey_and_solarize_are_torchvisions(x):
    grey = augment.RandomGrayscale(0.2)
    assert torch.allclose(apply(grey, x, 0.1), TF.rgb_to_grayscale(x, 3), atol=1e-3)
    assert torch.equal(apply(grey, x, 0.3), x)
    solarize = augment.RandomSolarize(128, 0.2)
    bytes_ = TF.solarize(scenes(6), 128)
    assert torch.allclose(apply(solarize, x, 0.1), bytes_.float() / 255, atol=1e-6)
    assert torch.equal(apply(solarize, x, 0.3), x)


def test_rand_augment_takes_each_op_half_of_the_time():
    """As timm's; 13 of 14 ops change the image, some of them back."""
    image = Synthetic(number=1)[0][0]
    torch.manual_seed(0)
    first, second = transforms.finetune(SIZE, erasing=0.0).transforms[2:4]
    same = torch.tensor([second(first(image)) == image for _ in range(2000)])
    assert 0.25 <= same.float().mean() < 0.36       # neither: a quarter; identity; without effect


def test_blur_is_torchvisions(x):
    blur = augment.GaussianBlur(7, (0.1, 2.0))
    sometimes = augment.RandomApply([blur], p=0.5)
    for sigma in (0.4, 1.7):
        out = apply(sometimes, x, 0.4, (sigma - 0.1) / 1.9)
        assert torch.allclose(out, TF.gaussian_blur(x, [7, 7], [sigma, sigma]), atol=1e-4)
    assert torch.equal(apply(sometimes, x, 0.6, 0.5), x)
    own = blur(x, torch.linspace(0, 1, 6))                  # each image by its own σ
    assert torch.allclose(own[5], TF.gaussian_blur(x[5], [7, 7], [2.0, 2.0]), atol=1e-4)
    assert torch.allclose(own[0], x[0], atol=1e-3)


def test_the_blurs_kernel_is_a_tenth_of_the_image():
    for form in ("image", "batch"):
        for size, kernel in ((64, 7), (70, 7), (224, 23)):
            for view, p in zip(transforms.teacher(size, form=form), (1.0, 0.1), strict=True):
                apply_blur = steps_of(view)[3]
                blur = apply_blur.transforms[0]
                own = 2 * blur.reach + 1 if form == "batch" else blur.kernel_size[0]
                assert own == kernel and apply_blur.p == p


def test_only_the_chosen_images_are_transformed(x):
    half = augment.RandomApply([augment.RandomSolarize(0, p=1.0)], p=0.5)
    chosen = torch.tensor([0.1, 0.9, 0.4, 0.6, 0.0, 0.5])
    out = half(x, chosen, torch.zeros(6))
    for i in range(6):
        assert torch.equal(out[i], 1 - x[i] if chosen[i] < 0.5 else x[i])


def test_a_teachers_view_at_a_photographs_size():
    array = scenes(1)[0].permute(1, 2, 0).numpy()
    images = [Image.fromarray(array).resize((90, 75)) for _ in range(2)]
    for transform in transforms.teacher(64, form="batch"):
        pixels, draws = zip(*(transform(image) for image in images), strict=True)
        out = transform.finish((torch.stack(pixels), torch.stack(draws)))
        assert out.shape == (2, 3, 64, 64)
