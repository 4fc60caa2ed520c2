"""Segmentation: the data, the network, the figures."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COMMON, run
from helpers import fails, log, newest, pixels, seeded, tiny_vit
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2 as T

import data
import detect
import segment
from support import weights
from support.launch import InputError

# ------------------------------------------------------------------------------------------------
# Data

def test_the_two_targets_of_a_scene_agree():
    masks = segment.load_dataset("synthetic:20", "train", 32, 0)
    objects = detect.load_dataset("synthetic:20", "train", 32)
    assert masks.classes == ["ground", *objects.classes]
    assert len(masks) == len(objects) == 20
    for (image, classes), (same, target) in zip(masks, objects, strict=True):
        assert image.tobytes() == same.tobytes()
        boxes, found = target["boxes"].tolist(), target["masks"].bool()
        expected = torch.ones(32, 32, dtype=torch.uint8)
        for label, box, mask in zip(target["labels"], boxes, found, strict=True):
            assert (expected[mask] == 1).all()              # no pixel has two owners
            expected[mask] = label + 1
            ys, xs = torch.where(mask)
            assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert torch.equal(classes, expected)


@pytest.fixture
def ade(folder):
    """ADE20K's layout: noise, its lighter upper half class 1, the rest 2 but for a corner of 0.

    Each image of a split is wider than the one before.
    """
    rng = np.random.default_rng(0)
    for split, number in (("training", 8), ("validation", 4)):
        images, annotations = (folder / "ade" / kind / split for kind in ("images", "annotations"))
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for i in range(number):
            labels = np.full((30, 40 + 4 * i), 2, np.uint8)
            labels[:15] = 1
            labels[:5, :5] = 0
            image = rng.integers(0, 100, (*labels.shape, 3), np.uint8)
            image[labels == 1] += 120
            Image.fromarray(image).save(images / f"{i}.jpg")
            Image.fromarray(labels).save(annotations / f"{i}.png")
    return folder / "ade"


def load(split="train", classes=2):
    return segment.load_dataset("ade", split, 32, classes)


def rewrite(ade, change):
    """Put change(labels) in place of each annotation's labels."""
    for path in ade.glob("annotations/*/*.png"):
        labels = np.array(Image.open(path))
        Image.fromarray(change(labels)).save(path)


def test_ade20k_layout(ade):
    """Its images are what all stages take for images."""
    images = ade / "images" / "training"
    (images / "7.jpg").rename(images / "7.TIF")
    for other in ("._0.jpg", "notes.txt"):                  # macOS's
        (images / other).touch()
    dataset = load()
    assert len(dataset) == 8 and len(load("val")) == 4
    assert [str(file) for file, _ in dataset.samples] == data.image_files("ade/images/training")
    image, labels = data.Samples(dataset, segment.eval_transform(16), 0)[0, 1]
    assert image.shape == (3, 16, 23) and labels.shape == (30, 44)
    assert labels.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("number, classes, expected", [(300, 300, {0, 1, 300}), (255, 2, {0, 1})])
def test_classes_above_255_and_255_as_unlabelled(number, classes, expected, ade):
    rewrite(ade, lambda labels: np.where(labels == 2, number, labels.astype(np.uint16)))
    samples = data.Samples(load(classes=classes), segment.eval_transform(32), 0)
    assert set(samples[0, 0][1].unique().tolist()) == expected


def test_one_class_alone_is_warned_of(ade, capsys):
    """As masks of 0 and 1 have it, where 0 is meant as a class."""
    args = segment.get_args(["--data", "ade"])
    rewrite(ade, lambda labels: (labels == 1).astype(np.uint8))
    segment.check_classes(args, "training", load())
    assert "--data ade" in capsys.readouterr().err
    rewrite(ade, lambda labels: 0 * labels)
    with pytest.raises(InputError, match="--data ade: .* training"):
        segment.check_classes(args, "training", load())


def test_bad_annotations_are_named(ade, capsys):
    flags = ["--data", "ade", "--init", "none", "--batch-size", "2", "--steps", "1"]
    assert "--classes is 1" in fails(capsys, "segment", *flags, "--classes", "1")
    annotations = ade / "annotations" / "training"
    (annotations / "1.png").write_bytes((annotations / "1.png").read_bytes()[:60])
    Image.new("L", (9, 9)).save(annotations / "2.png")
    for index in (1, 2):
        with pytest.raises(InputError, match=f"ade/annotations/training/{index}.png"):
            data.read(load(), index)
    (annotations / "3.png").unlink()
    with pytest.raises(InputError, match="3.png"):
        load()
    (ade / "images" / "validation").rename(ade / "images" / "test")
    with pytest.raises(InputError, match="ade: .*images/validation"):
        load("val")
    (ade / "images" / "validation").mkdir()
    with pytest.raises(InputError, match="ade/images/validation: no images"):
        load("val")


def test_images_are_resized_without_antialiasing():
    """As F.interpolate does it, but for the rounding to whole levels."""
    image = T.functional.to_pil_image(torch.rand(3, 30, 50, generator=seeded()))
    x = T.functional.pil_to_tensor(image)[None].float()
    for size, shape in ((18, (18, 30)), (45, (45, 75)), (30, (30, 50))):
        resized = T.functional.pil_to_tensor(segment.rescale(image, size))
        assert resized.shape == (3, *shape)
        assert (resized - F.interpolate(x, shape, mode="bilinear")[0]).abs().max() < 1.01
    assert segment.rescale(Image.new("RGB", (1, 900)), 16).size == (1, 64)     # no side is lost


def test_training_crops_follow_the_labels(ade):
    """The same draw for image and labels; what lies outside the image is ignored."""
    samples = data.Samples(load(), segment.train_transform(48), 0)
    heights, outside, compared = set(), 0, 0
    for epoch in range(12):
        image, labels = samples[epoch, 2]
        assert image.shape == (3, 48, 48)
        assert labels.shape == (48, 48)
        heights.add(int((labels > 0).any(1).sum()))
        outside += int((labels == 0).sum() > 100)
        light, dark = (image.mean(0)[labels == c] for c in (1, 2))
        if len(light) > 20 and len(dark) > 20:
            compared += 1
            assert light.mean() > dark.mean() + 0.1         # jittered or not
    assert len(heights) > 2 and outside and compared > 6


def test_a_crop_of_one_class_is_drawn_again():
    labels = tv_tensors.Mask(torch.ones(64, 64, dtype=torch.uint8))
    labels[:, :16] = 2
    image = Image.new("RGB", (64, 64))

    def dominated(crop):
        """Of 100 crops those with three quarters of class 1."""
        return sum(int((crop(image, labels)[1] == 1).sum()) >= 0.75 * 1600 for _ in range(100))

    torch.manual_seed(0)
    assert dominated(segment.VariedCrop(40)) < 20 < 60 < dominated(T.RandomCrop(40))


# ------------------------------------------------------------------------------------------------
# Network, loss, schedule

def test_segmenter_takes_any_size_and_every_weight_learns():
    torch.manual_seed(0)
    network = segment.Segmenter(tiny_vit(depth=4, positions="block"), classes=3)
    for height, width in ((32, 20), (13, 22), (16, 16)):
        images = pixels(2, 3, height, width)
        logits, aux = network.train()(images)
        assert logits.shape == aux.shape == (2, 3, height, width)
        assert network.eval()(images).shape == (2, 3, height, width)
    labels = torch.ones(2, 16, 16)
    (segment.pixel_loss(logits, labels) + segment.pixel_loss(aux, labels)).backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_pixel_loss_against_a_plain_loop():
    logits = torch.randn(2, 3, 4, 5, generator=seeded())
    labels = torch.randint(0, 4, (2, 4, 5), generator=seeded(1), dtype=torch.uint8)
    expected, labelled = 0.0, labels.nonzero().tolist()
    for b, y, x in labelled:
        probability = logits[b, :, y, x].softmax(0)[int(labels[b, y, x]) - 1]
        expected -= math.log(probability) / 40
    assert 0 < len(labelled) < 40
    assert segment.pixel_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_schedule():
    values = [segment.schedule(step, 100, 10, 1.0) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and values[9] == pytest.approx(0.91)
    assert max(values) == values[9]
    assert all(values[step] == pytest.approx(1 - step / 100) for step in range(10, 100))


# ------------------------------------------------------------------------------------------------
# Evaluation

def test_scores_against_plain_counting():
    predicted = torch.randint(1, 5, (3, 7, 9), generator=seeded())
    labels = torch.randint(0, 4, (3, 7, 9), generator=seeded(1))
    # so class 4 is predicted, but never there, and class 5 neither
    confusion = segment.confusion_matrix(predicted, labels, 5)
    both = zip(labels.flatten().tolist(), predicted.flatten().tolist(), strict=True)
    pairs = [(t, p) for t, p in both if t]
    classes = range(1, 6)
    assert confusion.tolist() == [[pairs.count((t, p)) for p in classes] for t in classes]
    hits = {c: 100 * pairs.count((c, c)) for c in classes}
    ious = [hits[c] / sum(c in pair for pair in pairs) for c in range(1, 5)]
    accuracies = [hits[c] / sum(t == c for t, _ in pairs) for c in range(1, 4)]
    iou, accuracy, row = segment.scores(confusion)
    assert iou[:4].tolist() == pytest.approx(ious) and iou[4].isnan()
    assert accuracy[:3].tolist() == pytest.approx(accuracies) and accuracy[3:].isnan().all()
    means = dict(miou=sum(ious) / 4, mean_accuracy=sum(accuracies) / 3,
                 pixel_accuracy=sum(hits.values()) / len(pairs))
    assert row == pytest.approx(means)


def test_sliding_windows():
    """A window's logits are its mean here, which tells it: where windows overlap, theirs count."""
    images = torch.arange(16 * 37.0).view(1, 1, 16, 37)
    logits = segment.slide(lambda crop: 0 * crop + crop.mean(), images, 16)[0, 0]
    for x in range(37):
        lefts = [left for left in (0, 10, 20, 21) if left <= x < left + 16]
        means = torch.stack([images[..., left:left + 16].mean() for left in lefts])
        assert torch.allclose(logits[:, x], means.mean())


def test_evaluation_at_each_images_own_size(ade):
    """It takes each pixel by itself: without windows the scores are the same."""
    network = torch.nn.Conv2d(3, 2, 1, bias=False)          # light is class 1, dark is class 2
    network.weight.data[:] = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    dataset = load("val")
    args = segment.get_args([*COMMON, "--image-size", "30", "--output", "."])
    row = segment.evaluate(args, network, dataset, torch.device("cpu"))
    assert 90 < row["miou"] < row["mean_accuracy"] < 100
    assert len(Path("classes.md").read_text().splitlines()) == 4
    samples = data.Samples(dataset, segment.eval_transform(30), 0)
    confusion = 0
    for index in range(4):
        image, labels = samples[0, index]
        predicted = network(image[None]).argmax(1) + 1
        confusion += segment.confusion_matrix(predicted, labels[None], 2)
        assert Image.open(f"picture-{index}.png").size == (3 * (40 + 4 * index), 30)
    assert row == dict(segment.scores(confusion)[2], images=4)


# ------------------------------------------------------------------------------------------------
# The stage

def test_training_begins_from_the_pre_trained_weights(chain):
    flags = ["--image-size", "64", "--drop-path", "0.1"]    # of another size than pre-training
    args = segment.get_args([*COMMON, *chain.inputs["segment"], *flags])
    state, _ = weights.read(args)
    vit = segment.build(args, 11, state)[0].backbone.vit
    for name in ("blocks.0.mlp.fc1.weight", "blocks.3.mlp.fc2.weight"):
        assert torch.equal(vit.get_parameter(name), state["model"][name])
    assert vit.blocks[3].drop_path.p == pytest.approx(0.1)


def test_layers_learn_at_their_own_rates(chain):
    groups = newest(chain.segment)["optimizer"]["param_groups"]
    decay = newest(chain.segment)["args"]["layer_decay"]
    scales = {group["lr_scale"] for group in groups}        # heads, 4 blocks, embeddings
    assert sorted(scales) == pytest.approx([decay ** i for i in (5, 4, 3, 2, 1, 0)])


def test_evaluation_repeats_what_the_training_logged(chain):
    row = run("segment", "--eval", "--init", str(chain.segment), "--output", "again")
    logged = log(chain.segment, "val")[-1]
    assert row == {key: logged[key] for key in row} and row["images"] == 40
    assert (chain.segment / "classes.md").read_text() == Path("again/classes.md").read_text()


def test_what_cannot_be_segmented_is_refused(chain, ade, capsys):
    own, before = str(chain.segment), str(chain.pretrain)
    flags = ["--data", "ade", "--classes", "3"]
    assert "--data ade" in fails(capsys, "segment", "--eval", "--init", own, *flags)
    assert before in fails(capsys, "segment", "--eval", "--init", before)
    assert own in fails(capsys, "segment", "--init", own)
    flags = ["--init", "none", "--accumulate", "16"]        # batch norm of one image
    assert "--batch-size 16" in fails(capsys, "segment", *flags)


def test_it_learns(ade):
    """Light and dark, from scratch, in a few steps."""
    run("segment", "--data", "ade", "--classes", "2", "--init", "none", "--image-size", "32",
        "--batch-size", "8", "--steps", "20", "--warmup-steps", "2", "--lr", "4e-3",
        "--save-every", "20")
    row = log("runs/demo/segment", "val")[-1]
    assert row["miou"] > 80                                 # one class everywhere: 25
