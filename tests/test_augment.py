"""Whole-batch augmentation: each image its own, and what the same draws make of it in torchvision."""
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import augment
import data

SIZE = 32
FORMS = {"pretrain": lambda: data.pretrain_transform(SIZE, form="batch"),
         "tokenizer": lambda: data.tokenizer_transform(SIZE, form="batch"),
         "teacher 1": lambda: data.teacher_transform(SIZE, form="batch")[0],
         "teacher 2": lambda: data.teacher_transform(SIZE, form="batch")[1],
         "finetune": lambda: data.finetune_transform(SIZE, erasing=1.0, form="batch")}


def scenes(number):
    """uint8 (number, 3, 32, 32)"""
    return torch.stack([TF.pil_to_tensor(data.Synthetic(number=number)[i][0]) for i in range(number)])


def apply(transform, x, *values):
    """One step, by the same draws for every image."""
    number, step = transform
    assert number == len(values)
    return step(x, *(torch.full((len(x),), value) for value in values))


@pytest.fixture
def x():
    return scenes(6).float() / 255


@pytest.mark.parametrize("name", FORMS)
def test_every_image_is_augmented_by_its_own_draws_alone(name):
    transform, pixels = FORMS[name](), scenes(8)
    draws = torch.rand(8, transform.draws, generator=torch.Generator().manual_seed(0))
    out = transform.finish((pixels, draws))
    assert out.shape == (8, 3, SIZE, SIZE) and out.dtype == torch.float32
    assert -1 <= out.min() < -0.5 and 0.5 < out.max() <= 1
    order = torch.tensor([3, 1, 7, 0])
    assert torch.allclose(transform.finish((pixels[order], draws[order])), out[order], atol=1e-6)
    assert not torch.allclose(transform.finish((pixels, draws.flip(0))), out, atol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FORMS)
def test_the_gpu_makes_the_same_of_the_same_draws(name):
    transform, pixels = FORMS[name](), scenes(8)
    draws = torch.rand(8, transform.draws, generator=torch.Generator().manual_seed(0))
    out = transform.finish((pixels.cuda(), draws.cuda())).cpu()
    near = (out - transform.finish((pixels, draws))).abs() < 0.02
    assert near.float().mean() > 0.99                      # a pixel at the edge of a box or a threshold may fall either way


def test_the_whole_image_unflipped_is_the_image_itself(x):
    assert torch.allclose(apply(augment.crop_and_flip(0.5), x, 1.0, 0.5, 0.3, 0.7, 0.9), x, atol=1e-5)
    assert torch.allclose(apply(augment.crop_and_flip(0.5), x, 1.0, 0.5, 0.3, 0.7, 0.1), x.flip(3), atol=1e-5)


def test_a_crop_is_torchvisions_resized_crop(x):
    """A quarter of the area, square, at the bottom left: rows 16…31, columns 0…15."""
    ours = apply(augment.crop_and_flip(0.0), x, 0.25, 0.5, 0.0, 1.0, 0.9)
    theirs = F.interpolate(x[:, :, 16:, :16], (SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    assert torch.allclose(ours[:, :, 4:, :-4], theirs[:, :, 4:, :-4], atol=1e-4)    # at an inner edge ours sees the pixels beyond


def test_colour_jitter_is_torchvisions(x):
    up, down = 0.9, 0.2                                    # factors 1 + 0.4 · (2u − 1): 1.32 and 0.76
    for place, function in ((1, TF.adjust_brightness), (2, TF.adjust_contrast), (3, TF.adjust_saturation)):
        for u, factor in ((up, 1.32), (down, 0.76)):
            values = [0.0, 0.5, 0.5, 0.5, 0.5]
            values[place] = u
            assert torch.allclose(apply(augment.color_jitter(0.4, 0.4, 0.4), x, *values), function(x, factor), atol=1e-3)
    assert torch.equal(apply(augment.color_jitter(0.4, 0.4, 0.4, 0.1, p=0.8), x, 0.9, 0.1, 0.1, 0.1, 0.1), x)


def test_the_hue_turns_and_the_grey_stays(x):
    turned = apply(augment.color_jitter(0, 0, 0, 0.5), 0.25 + x / 2, 0.0, 0.5, 0.5, 0.5, 0.6)  # 0.1 of a turn; none clipped
    assert torch.allclose(augment.grey(turned), augment.grey(0.25 + x / 2), atol=0.02)
    assert (turned - 0.25 - x / 2).abs().max() > 0.05
    plain = torch.full((6, 3, 4, 4), 0.3)
    assert torch.allclose(apply(augment.color_jitter(0, 0, 0, 0.5), plain, 0.0, 0.5, 0.5, 0.5, 0.9), plain, atol=1e-3)


def test_grey_and_solarize_are_torchvisions(x):
    assert torch.allclose(apply(augment.random_grey(0.2), x, 0.1), TF.rgb_to_grayscale(x, 3), atol=1e-3)
    assert torch.equal(apply(augment.random_grey(0.2), x, 0.3), x)
    assert torch.equal(apply(augment.solarize(0.2), x, 0.1), TF.solarize(x, 0.5))
    assert torch.equal(apply(augment.solarize(0.2), x, 0.3), x)


def test_rand_augment_has_torchvisions_ops(x):
    """Op by op, at magnitude 15: what torchvision's functions make of the image."""
    expected = {0: x, 6: TF.adjust_brightness(x, 1.45),
                7: TF.adjust_saturation(x, 1.45), 8: TF.adjust_contrast(x, 1.45), 9: TF.adjust_sharpness(x, 1.45),
                10: TF.posterize(x, 6), 11: TF.solarize(x, 0.5), 12: TF.autocontrast(x), 13: TF.equalize(x)}
    for op in range(14):
        out = apply(augment.rand_augment(15), x, 0.4, (op + 0.5) / 14, 0.4, 0.6, 0.9, 0.4)
        assert out.shape == x.shape and torch.equal(out, x) == (op == 0)
        if op in expected:
            assert torch.allclose(out, expected[op], atol=1e-5), op
    right = apply(augment.rand_augment(30), x, 0.6, 0.9, 0.4, 0.4, 3.5 / 14, 0.4)
    assert torch.allclose(right[:, :, :, 14:], x[:, :, :, :-14], atol=1e-5)         # by 150 / 331 of 32
    assert torch.allclose(right[:, :, :, :14], torch.tensor(0.5), atol=1e-5)


def test_rand_augment_takes_each_op_half_of_the_time():
    """In both forms, as timm's; 13 of 14 ops change the image, some of them back."""
    x, images = scenes(1).expand(2000, -1, -1, -1) / 255, [data.Synthetic(number=1)[0][0]] * 2000
    number, step = augment.rand_augment(27)
    batch = (step(x, *torch.rand(number, 2000, generator=torch.Generator().manual_seed(0))) == x).flatten(1).all(1)
    torch.manual_seed(0)
    first, second = data.finetune_transform(SIZE, erasing=0.0).transforms[2:4]
    alone = torch.tensor([second(first(image)) == image for image in images])
    for same in (batch, alone):
        assert 0.25 <= same.float().mean() < 0.36           # neither: a quarter; Identity, and what an op leaves alone


def test_erasing_is_a_box_of_one_colour(x):
    area, height = (0.2 - 0.02) / 0.31, math.sqrt(0.2)
    out = apply(augment.erase(0.25), x, 0.1, area, 0.5, 0.0, 1.0, 0.9, 0.4, 0.1)
    side = round(height * SIZE)
    assert torch.allclose(out[:, :, :side, -side:], torch.tensor([0.9, 0.4, 0.1]).view(3, 1, 1))  # top right
    assert torch.equal(out[:, :, side:], x[:, :, side:]) and torch.equal(out[:, :, :, :-side], x[:, :, :, :-side])
    assert torch.equal(apply(augment.erase(0.25), x, 0.3, area, 0.5, 0.0, 1.0, 0.9, 0.4, 0.1), x)


@pytest.mark.parametrize("size", [(64, 32), (48, 80), (20, 31), (32, 31)])
def test_an_image_of_another_size_is_cropped_in_the_worker(size):
    """The box of the same draws, cut out and resized by torchvision; then the batch leaves it whole."""
    image = Image.fromarray(scenes(1)[0].permute(1, 2, 0).numpy()).resize(size)
    transform = augment.Batch(SIZE, 0.3)
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, draws = transform(image)
        torch.manual_seed(seed)
        area, aspect, left, top, flip = torch.rand(5).tolist()
        area, aspect = (0.3 + 0.7 * area) * size[0] * size[1], 0.75 * (16 / 9) ** aspect
        width, height = min(math.sqrt(area * aspect), size[0]), min(math.sqrt(area / aspect), size[1])
        w, h = round(width), round(height)
        x, y = int(left * (size[0] - w + 1)), int(top * (size[1] - h + 1))
        assert 0 <= x <= size[0] - w and 0 <= y <= size[1] - h
        expected = TF.resized_crop(TF.pil_to_tensor(image), y, x, h, w, [SIZE, SIZE], TF.InterpolationMode.BICUBIC, antialias=True)
        assert (pixels.int() - expected.int()).abs().max() <= 1
        out = transform.finish((pixels[None], draws[None]))[0]
        whole = 2 * pixels.float() / 255 - 1
        assert torch.allclose(out, whole.flip(2) if flip < 0.5 else whole, atol=1e-4)


def test_blur_is_torchvisions(x):
    for sigma, kernel in ((0.4, 7), (1.7, 7)):
        out = apply(augment.blur(0.5, 70), x, 0.4, (sigma - 0.1) / 1.9)
        assert torch.allclose(out, TF.gaussian_blur(x, [kernel, kernel], [sigma, sigma]), atol=1e-4)
    assert torch.equal(apply(augment.blur(0.5, 70), x, 0.6, 0.5), x)
    own = augment.blur(1.0, 70)[1](x, torch.zeros(6), torch.linspace(0, 1, 6))     # each image by its own σ
    assert torch.allclose(own[5], TF.gaussian_blur(x[5], [7, 7], [2.0, 2.0]), atol=1e-4)
    assert torch.allclose(own[0], x[0], atol=1e-3)


def test_a_teachers_view_at_a_photographs_size():
    images = [Image.fromarray(scenes(1)[0].permute(1, 2, 0).numpy()).resize((90, 75)) for _ in range(2)]
    for transform in data.teacher_transform(64, form="batch"):
        pixels, draws = zip(*(transform(image) for image in images))
        assert transform.finish((torch.stack(pixels), torch.stack(draws))).shape == (2, 3, 64, 64)
