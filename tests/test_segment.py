"""Segmentation: the data, the network, the figures.

Its command line is tested with the other stages' in test_stages.py.
"""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COMMON, OWN, run
from PIL import Image
from test_stages import fails, log, newest
from torchvision import tv_tensors
from torchvision.transforms import v2 as T

import data
import detect
import model
import segment
from support import checkpoint, launch, scenes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------
# Data

class WithoutNoise(np.random.Generator):
    def standard_normal(self, shape, dtype):
        return np.zeros(shape, dtype)


def test_masks_of_drawn_scenes_are_exact(monkeypatch):
    """All pixels within a texture have its class; those on an edge the most frequent one's."""
    colours = []                                            # of each texture one, of its own
    texture = scenes.texture

    def plain(rng, u, v, darkest, lightest):
        texture(rng, u, v, darkest, lightest)               # the same draws as without
        colours.append(np.array([0.618, 0.414, 0.732]) * (len(colours) + 1) % 1)
        return np.broadcast_to(colours[-1], (*u.shape, 3)).astype(np.float32)

    monkeypatch.setattr(scenes, "texture", plain)
    for index in range(8):
        colours.clear()
        one = scenes.scene(WithoutNoise(np.random.PCG64(index)), 32)
        monkeypatch.setattr(scenes, "drawn", lambda *_, one=one: one)
        image, target = scenes.Scenes("train", 100, 32, target="instances")[index]
        owners, number = one[1], len(one[2])
        pixels = np.asarray(image)[..., None, :] / 255
        distance = np.abs(pixels - colours).max(-1)                     # (H, W, colours)
        whole = distance.min(-1) < 1 / 255
        # 1… for the shapes in their order, ≤ 0 for what is below
        seen = distance.argmin(-1) + 1 - (len(colours) - number)
        assert set(np.unique(seen[whole & (seen > 0)])) <= set(np.unique(owners))
        owner = np.zeros(seen.shape, int)
        numbers = sorted(set(owners.flat) - {0})
        for i, mask in zip(numbers, target["masks"].numpy(), strict=True):
            owner[mask.astype(bool)] = i
        assert (owner[whole] == seen[whole].clip(0)).all()
        assert whole.mean() > 0.8
        for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
            ys, xs = torch.where(mask.bool())
            assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_the_two_targets_of_a_scene_agree():
    masks = segment.load_dataset("synthetic:50", "train", 32, 0)
    objects = detect.load_dataset("synthetic:50", "train", 32)
    assert masks.classes == ["ground", *objects.classes]
    assert len(objects.classes) == 10 and len(masks) == 50
    hidden = 0
    for index in range(50):
        one, classes = masks[index]
        other, target = objects[index]
        assert one.tobytes() == other.tobytes()
        assert 1 <= len(target["labels"]) <= 4
        expected = torch.ones(32, 32, dtype=torch.uint8)
        for label, mask in zip(target["labels"], target["masks"], strict=True):
            assert (expected[mask.bool()] == 1).all()       # no pixel has two owners
            expected[mask.bool()] = label + 1
        assert torch.equal(classes, expected)
        hidden += len(target["labels"]) < len(scenes.drawn(0, "train", index, 32, None)[2])
    first = masks[3][0].tobytes()
    scenes.drawn.cache_clear()
    again = scenes.Scenes("train", 50, 32, target="masks")
    assert first == again[3][0].tobytes() != masks[4][0].tobytes()
    val = segment.load_dataset("synthetic:50", "val", 32, 0)
    assert val[3][0].tobytes() != masks[3][0].tobytes()


def make_ade(folder, images=6, size=(40, 30)):
    """A dataset in ADE20K's layout: noise, its lighter upper half class 1, the rest class 2.

    A corner is ignored. Half as many images for validation, each wider than the one before.
    """
    rng = np.random.default_rng(0)
    for split, number in (("training", images), ("validation", images // 2)):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(number):
            width, height = size[0] + 4 * i, size[1]
            labels = np.full((height, width), 2, np.uint8)
            labels[:height // 2] = 1
            labels[:5, :5] = 0
            pixels = rng.integers(0, 100, (height, width, 3)) + 120 * (labels == 1)[..., None]
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(folder / "images" / split / f"{i}.jpg")
            Image.fromarray(labels).save(folder / "annotations" / split / f"{i}.png")
    return folder


def test_ade20k_layout(folder, capsys):
    make_ade(folder / "ade")
    dataset = segment.load_dataset("ade", "train", 32, 3)
    image, labels = dataset[1]
    assert len(dataset) == 6
    assert image.size == (44, 30) and labels.shape == (30, 44)
    assert len(segment.load_dataset("ade", "val", 32, 3)) == 3
    samples = data.Samples(dataset, segment.eval_transform(16), 0)
    pixels, labels = samples[0, 1]
    assert pixels.shape == (3, 16, 23) and labels.shape == (30, 44)
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert labels.unique().tolist() == [0, 1, 2]
    assert not isinstance(labels, tv_tensors.Mask)
    wide = [(Image.new("RGB", (300, 20)), torch.zeros(20, 300))]
    pixels, _ = data.Samples(wide, segment.eval_transform(16), 0)[0, 0]
    assert pixels.shape == (3, 4, 64)                       # the longer side: at most four times 16


def test_annotations_of_16_bits(folder):
    """More than 255 classes need them."""
    make_ade(folder / "ade")
    for path in Path("ade/annotations/training").iterdir():
        labels = np.array(Image.open(path), np.uint16)
        Image.fromarray(np.where(labels == 2, 300, labels).astype(np.uint16)).save(path)
    dataset = segment.load_dataset("ade", "train", 32, 300)
    assert np.array(Image.open(dataset.samples[0][1])).dtype == np.uint16       # the control
    _, labels = data.Samples(dataset, segment.train_transform(32), 0)[0, 0]
    assert set(labels.unique().tolist()) <= {0, 1, 300}
    assert (labels == 300).any()
    _, labels = data.Samples(dataset, segment.eval_transform(32), 0)[0, 0]
    predicted = labels.clamp(min=1)
    assert segment.confusion_matrix(predicted, labels, 300).trace() == (labels > 0).sum()


def test_255_is_not_labelled(folder):
    make_ade(folder / "ade")
    for path in Path("ade/annotations/training").iterdir():
        labels = np.array(Image.open(path))
        Image.fromarray(np.where(labels == 2, 255, labels).astype(np.uint8)).save(path)
    _, labels = segment.load_dataset("ade", "train", 32, 2)[0]
    assert labels.unique().tolist() == [0, 1]


def test_one_class_alone_is_warned_of(folder, capsys):
    """As masks of 0 and 1 have it, where 0 is meant as a class."""
    make_ade(folder / "ade")
    for path in Path("ade/annotations").rglob("*.png"):
        Image.fromarray((np.array(Image.open(path)) == 1).astype(np.uint8)).save(path)
    args = segment.get_args(["--data", "ade"])
    segment.check_classes(args, "training", segment.load_dataset("ade", "train", 32, 2))
    said = capsys.readouterr()
    assert "1 of 2 classes" in said.out
    assert "--data ade" in said.err


def test_bad_ade20k_files(folder, capsys):
    root = make_ade(folder / "ade")
    flags = ["--data", "ade", "--init", "none", "--batch-size", "2"]
    message = fails(capsys, "segment", *flags, "--classes", "1", "--steps", "1")
    assert message.startswith("segment.py: ade/annotations/training/")
    assert message.endswith(".png: has class 2; --classes is 1")
    path = root / "annotations" / "validation" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    message = fails(capsys, "segment", *flags, "--classes", "2", "--steps", "1")
    assert message.startswith("segment.py: ade/annotations/validation/1.png: not a readable image")
    path.write_bytes(whole)
    Image.new("L", (9, 9)).save(root / "annotations" / "validation" / "0.png")
    message = fails(capsys, "segment", *flags, "--classes", "2", "--steps", "1",
                    "--output", "other")
    assert message.startswith("segment.py: ade/annotations/validation/0.png: its shape is (9, 9), "
                              "the image's (30, 40)")
    (root / "annotations" / "training" / "3.png").unlink()
    assert "3.png: missing" in fails(capsys, "segment", *flags, "--classes", "2")
    (root / "images" / "validation").rename(root / "images" / "test")
    assert "ade: it has no images/validation/ folder" in fails(capsys, "segment", *flags)


@pytest.mark.parametrize("split", ["training", "validation"])
def test_annotations_without_any_class(split, folder, capsys):
    root = make_ade(folder / "ade")
    for path in (root / "annotations" / split).iterdir():
        with Image.open(path) as labels:
            Image.new("L", labels.size).save(path)
    flags = ["--data", "ade", "--init", "none", "--batch-size", "2", "--classes", "2"]
    message = fails(capsys, "segment", *flags, "--steps", "1")
    assert f"--data ade: every pixel of its {split} annotations is 0" in message
    assert not Path("runs").exists()


def test_a_grey_image_and_a_truncated_one(folder, capsys):
    root = make_ade(folder / "ade")
    Image.new("L", (44, 30), 77).save(root / "images" / "training" / "1.jpg")
    dataset = segment.load_dataset("ade", "train", 32, 2)
    samples = data.Samples(dataset, segment.train_transform(16), 0)
    assert samples[0, 1][0].shape == (3, 16, 16)
    path = root / "images" / "training" / "2.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(launch.InputError, match="2.jpg: not a readable image"):
        samples[0, 2]


def test_images_are_resized_without_antialiasing():
    """As F.interpolate does it, but for the rounding to whole levels."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    image = Image.fromarray(pixels)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    for size, shape in ((18, (18, 30)), (45, (45, 75)), (30, (30, 50))):
        resized = torch.from_numpy(np.array(segment.rescale(image, size))).permute(2, 0, 1)
        assert resized.shape == (3, *shape)
        assert (resized - F.interpolate(x, shape, mode="bilinear")[0]).abs().max() < 1.01
    assert segment.rescale(image, 30).tobytes() == image.tobytes()
    assert segment.rescale(Image.new("RGB", (1, 900)), 16).size == (1, 64)     # no side is lost


def test_training_crops_follow_the_labels(folder):
    """The same draw for image and labels; what lies outside the image is ignored."""
    dataset = segment.load_dataset(str(make_ade(folder / "ade")), "train", 32, 2)
    samples = data.Samples(dataset, segment.train_transform(48), 0)
    sizes = set()
    outside = compared = 0
    for epoch in range(12):
        pixels, labels = samples[epoch, 2]
        assert pixels.shape == (3, 48, 48)
        assert labels.shape == (48, 48) and labels.dtype == torch.uint8
        sizes.add(int((labels > 0).any(1).sum()))
        light, dark = (pixels.mean(0)[labels == c] for c in (1, 2))
        if len(light) > 20 and len(dark) > 20:
            compared += 1
            assert light.mean() > dark.mean() + 0.1         # jittered or not
        outside += int((labels == 0).sum() > 100)
    assert len(sizes) > 2 and outside and compared > 6
    assert torch.equal(samples[3, 2][0], samples[3, 2][0])
    assert not torch.equal(samples[3, 2][0], samples[4, 2][0])


def test_a_crop_of_one_class_is_drawn_again():
    labels = tv_tensors.Mask(torch.ones(64, 64, dtype=torch.uint8))
    labels[:, :16] = 2
    image = Image.new("RGB", (64, 64))

    def dominated(crop):
        """Of 100 crops those with three quarters of class 1."""
        return sum(int((crop(image, labels)[1] == 1).sum()) >= 0.75 * 1600 for _ in range(100))

    torch.manual_seed(0)
    assert dominated(segment.VariedCrop(40)) < 20 < 60 < dominated(T.RandomCrop(40))
    uniform = tv_tensors.Mask(torch.ones(64, 64))           # it gives up
    assert segment.VariedCrop(40)(image, uniform)[1].shape == (40, 40)


# ------------------------------------------------------------------------------------------------
# Network, loss, schedule

def tiny(classes=3, image_size=16):
    torch.manual_seed(0)
    vit = model.VisionTransformer(image_size, 4, dim=32, depth=4, heads=2, positions="block",
                                  layer_scale=0.1)
    return segment.Segmenter(vit, classes)


def test_segmenter_takes_any_size():
    network = tiny()
    for height, width in ((16, 16), (13, 22), (32, 20)):
        images = torch.rand(2, 3, height, width, generator=seeded()) * 2 - 1
        logits, aux = network.train()(images)
        assert logits.shape == aux.shape == (2, 3, height, width)
        assert network.eval()(images).shape == (2, 3, height, width)


def test_every_weight_has_a_gradient():
    network = tiny()
    logits, aux = network(torch.rand(2, 3, 16, 16, generator=seeded()))
    labels = torch.ones(2, 16, 16)
    (segment.pixel_loss(logits, labels) + segment.pixel_loss(aux, labels)).backward()
    for name, p in network.named_parameters():
        if "relative_position_bias" not in name:
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_pixel_loss_against_a_plain_loop():
    logits = torch.randn(2, 3, 4, 5, generator=seeded())
    labels = torch.randint(0, 4, (2, 4, 5), generator=seeded(1), dtype=torch.uint8)
    expected = 0.0
    for b, y, x in np.ndindex(2, 4, 5):
        if labels[b, y, x]:
            probability = logits[b, :, y, x].softmax(0)[int(labels[b, y, x]) - 1]
            expected -= math.log(probability) / 40
    assert 0 < int((labels == 0).sum()) < 40
    assert segment.pixel_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_schedule():
    values = [segment.schedule(step, 100, 10, 1.0) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and values[9] == pytest.approx(0.91)
    assert max(values) == values[9]
    assert all(values[step] == pytest.approx(1 - step / 100) for step in range(10, 100))
    assert segment.schedule(0, 10, 0, 1.0) == 1.0


def test_layers_learn_at_their_own_rates():
    network = tiny()
    scale, decay = {}, {}
    for group in model.param_groups(network, 0.05, 0.5, vit="backbone.vit"):
        for name, _ in group["params"]:
            scale[name] = group["lr_scale"]
            decay[name] = group["weight_decay"]
    assert len(scale) == len(list(network.parameters()))
    assert scale["backbone.vit.cls_token"] == 0.5 ** 5
    assert scale["backbone.vit.blocks.3.mlp.fc1.weight"] == 0.5
    for name in ("backbone.up2.weight", "head.fuse.0.weight", "aux.0.0.weight"):
        assert scale[name] == 1
    assert decay["backbone.vit.cls_token"] == decay["head.fuse.1.weight"] == 0
    assert decay["head.fuse.0.weight"] == 0.05


# ------------------------------------------------------------------------------------------------
# Evaluation

def test_scores_against_plain_counting():
    predicted = torch.randint(1, 5, (3, 7, 9), generator=seeded())
    labels = torch.randint(0, 4, (3, 7, 9), generator=seeded(1))
    # so class 4 is predicted, but never there, and class 5 neither
    confusion = torch.zeros(5, 5, dtype=torch.int64)
    for one, truth in zip(predicted, labels, strict=True):
        confusion += segment.confusion_matrix(one[None], truth[None], 5)
    both = zip(labels.flatten().tolist(), predicted.flatten().tolist(), strict=True)
    pairs = [(t, p) for t, p in both if t]
    for t in range(1, 6):
        for p in range(1, 6):
            assert confusion[t - 1, p - 1] == pairs.count((t, p))
    ious, accuracies = [], []
    for c in range(1, 6):
        hits = pairs.count((c, c))
        either = sum(c in pair for pair in pairs)
        there = sum(t == c for t, _ in pairs)
        if either:
            ious.append(100 * hits / either)
        if there:
            accuracies.append(100 * hits / there)
    iou, accuracy, row = segment.scores(confusion)
    assert len(ious) == 4 and len(accuracies) == 3
    assert iou[:4].tolist() == pytest.approx(ious) and iou[4].isnan()
    assert accuracy[:3].tolist() == pytest.approx(accuracies) and accuracy[3:].isnan().all()
    assert row["miou"] == pytest.approx(sum(ious) / 4)
    assert row["mean_accuracy"] == pytest.approx(sum(accuracies) / 3)
    right = sum(t == p for t, p in pairs)
    assert row["pixel_accuracy"] == pytest.approx(100 * right / len(pairs))


def test_sliding_windows():
    network = tiny().eval()
    images = torch.rand(1, 3, 16, 16, generator=seeded())
    narrow = images[:, :, :12]
    with torch.no_grad():
        assert torch.equal(segment.slide(network, images, 16), network(images))
        assert torch.equal(segment.slide(network, narrow, 16), network(narrow))     # one window
    windows = []

    def place(crop):                                        # logits that tell the window: its mean
        windows.append((crop[0, 0, 0, 0].item(), tuple(crop.shape[2:])))
        return crop[:, :1] * 0 + crop.mean()

    images = torch.arange(16 * 37.0).view(1, 1, 16, 37).repeat(1, 3, 1, 1)
    logits = segment.slide(place, images, 16)[0, 0]
    lefts = (0, 10, 20, 21)
    assert windows == [(left, (16, 16)) for left in lefts]
    means = {left: images[0, 0, :, left:left + 16].mean() for left in lefts}
    for x in range(37):
        inside = [means[left] for left in lefts if left <= x < left + 16]
        assert torch.allclose(logits[:, x], sum(inside) / len(inside) * torch.ones(16))


class LighterHalf(torch.nn.Module):
    """Class 1 where the image is light, class 2 where it is dark."""

    def forward(self, images):
        return torch.stack([images.mean(1), -images.mean(1)], 1) * 9


def test_evaluation_at_each_images_own_size(folder):
    """A network that sees the lighter half: the scores are those of counting by hand."""
    dataset = segment.load_dataset(str(make_ade(folder / "ade")), "val", 32, 2)
    args = segment.get_args([*COMMON, "--image-size", "30", "--output", "."])
    row = segment.evaluate(args, LighterHalf(), dataset, torch.device("cpu"))
    assert row["images"] == 3 and 95 < row["pixel_accuracy"] < 100
    assert 90 < row["miou"] < row["mean_accuracy"] < 100
    table = Path("classes.md").read_text().splitlines()
    assert len(table) == 4 and table[2].startswith("| class 1 | 9")
    sizes = [Image.open(f"picture-{i}.png").size for i in range(3)]
    assert sizes == [(3 * (40 + 4 * i), 30) for i in range(3)]

    # each pixel by itself: without windows the same
    samples = data.Samples(dataset, segment.eval_transform(30), 0)
    confusion = torch.zeros(2, 2, dtype=torch.int64)
    for index in range(3):
        image, labels = samples[0, index]
        predicted = LighterHalf()(image[None]).argmax(1) + 1
        confusion += segment.confusion_matrix(predicted, labels[None], 2)
    assert row == dict(segment.scores(confusion)[2], images=3)


def test_pictures_are_numbered_over_all_ranks(folder, monkeypatch):
    dataset = segment.load_dataset(str(make_ade(folder / "ade", images=12)), "val", 32, 2)
    args = segment.get_args([*COMMON, "--image-size", "30", "--output", "."])
    for module in (launch, data):                          # as the second of two ranks
        monkeypatch.setattr(module, "rank", lambda: 1)
        monkeypatch.setattr(module, "world_size", lambda: 2)
    segment.evaluate(args, LighterHalf(), dataset, torch.device("cpu"))
    pictures = {int(path.stem[8:]): Image.open(path) for path in Path().glob("picture-*.png")}
    assert {i: picture.width for i, picture in pictures.items()} == {
        i: 3 * (40 + 4 * i) for i in (1, 3, 5)}             # of the whole set, each image its own


# ------------------------------------------------------------------------------------------------
# The stage

def test_training_begins_from_the_pre_trained_weights(chain):
    args = segment.get_args([*COMMON, *OWN["segment"], *chain.inputs["segment"]])
    state = newest(chain.pretrain)
    network, _ = segment.build(args, 11, state)
    vit = network.backbone.vit
    weights = state["model"]
    assert torch.equal(vit.blocks[0].mlp.fc1.weight, weights["blocks.0.mlp.fc1.weight"])
    assert torch.equal(vit.pos_embed, weights["pos_embed"])
    assert vit.blocks[3].drop_path.p == pytest.approx(0.1)
    assert newest(chain.segment)["identity"]["init"] == state["digest"]


def test_a_network_without_weights(chain):
    """Of an empty network."""
    args = segment.get_args([*COMMON, *OWN["segment"], "--checkpoint-activations"])
    state = newest(chain.pretrain)
    network, model_args = segment.build(args, 11, state | dict(model=None))
    assert model_args == newest(chain.segment)["model_args"]
    assert network.state_dict().keys() == newest(chain.segment)["model"].keys()
    assert network.backbone.vit.checkpoint_activations


@pytest.mark.parametrize("init", ["finetune", "teacher", "beit.pth", "none"])
def test_other_beginnings(init, chain):
    if init == "beit.pth":
        torch.save(dict(model=newest(chain.pretrain)["model"]), "beit.pth")
    init = str(getattr(chain, init, init))
    run("segment", "--init", init, "--image-size", "64", "--steps", "1", "--lr", "0",
        "--output", "run")                                  # at another size too
    assert math.isfinite(log("run")[-1]["loss"])
    weights = newest("run")["model"]
    if init != "none":
        source = checkpoint.load(init)["model"]
        assert torch.equal(weights["backbone.vit.blocks.3.mlp.fc2.weight"],
                           source["blocks.3.mlp.fc2.weight"])


def test_an_image_size_that_does_not_fit_is_not_blamed_on_the_checkpoint(chain, capsys):
    message = fails(capsys, "segment", *chain.inputs["segment"], "--image-size", "30")
    assert message.startswith("segment.py: image size 30 is no")


def test_evaluation_repeats_what_the_training_logged(chain, capsys):
    row = run("segment", "--eval", "--init", str(chain.segment), "--output", "again")
    logged = log(chain.segment, "val")[-1]
    assert row == {key: logged[key] for key in row} and row["images"] == 40
    assert (chain.segment / "classes.md").read_text() == Path("again/classes.md").read_text()
    message = fails(capsys, "segment", "--eval", "--init", str(chain.pretrain))
    assert "found a checkpoint of pretrain, expected one of segment" in message
    make_ade(Path("ade"))
    message = fails(capsys, "segment", "--eval", "--init", str(chain.segment), "--data", "ade",
                    "--classes", "3")
    assert "has 11 classes, --data ade 3" in message
    message = fails(capsys, "segment", "--init", str(chain.segment))
    assert "found a checkpoint of segment" in message


def test_it_learns(folder):
    """Light and dark, from scratch, in a few steps."""
    make_ade(Path("ade"), images=8)
    run("segment", "--data", "ade", "--classes", "2", "--init", "none", "--image-size", "32",
        "--batch-size", "8", "--steps", "20", "--warmup-steps", "2", "--lr", "4e-3",
        "--save-every", "20")
    row = log("runs/demo/segment", "val")[-1]
    assert row["miou"] > 80                                 # one class everywhere: 25


def test_a_micro_batch_of_one_image_is_refused(capsys):
    message = fails(capsys, "segment", "--init", "none", "--accumulate", "16")
    assert "--batch-size 16" in message


def test_epochs_in_place_of_a_recipes_steps():
    assert segment.get_args([]).steps == 160_000
    args = segment.get_args(["--epochs", "3"])
    assert (args.epochs, args.steps) == (3, None)
    assert segment.get_args(["--steps", "9"]).steps == 9
    with pytest.raises(SystemExit):
        segment.get_args(["--steps", "9", "--epochs", "3"])
