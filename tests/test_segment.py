"""Segmentation: the data, the network, the figures. Its command line is tested with the other stages' too."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2 as T

import data
import detect
import model
import runtime
import segment
from conftest import COMMON, OWN, run
from test_stages import fails, log, newest


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------
# Data

@pytest.fixture
def constant_colours(monkeypatch):
    """Each texture one colour of its own, no noise: the image tells what lies where."""
    calls = []

    def texture(rng, u, v, darkest, lightest):
        Scene.texture(rng, u, v, darkest, lightest)         # the same draws as without
        calls.append(np.array([0.618, 0.414, 0.732]) * (len(calls) + 1) % 1)
        return np.broadcast_to(calls[-1], (*u.shape, 3)).astype(np.float32)

    Scene = data.Synthetic
    fake = type("Plain", (data.Scenes,), dict(texture=staticmethod(texture), pixels=staticmethod(
        lambda rng, image: (data.halve(image) * 255).round().astype(np.uint8))))
    return fake, calls


def test_masks_of_drawn_scenes_are_exact(constant_colours):
    """Every pixel within one texture has that texture's class; those on an edge the most frequent one's."""
    plain, calls = constant_colours
    for index in range(8):
        calls.clear()
        scenes = plain("train", 100, 32, target="instances")
        image, target = scenes[index]
        drawn = len(scenes.scene(index)[2])
        distance = np.abs(np.asarray(image)[..., None, :] / 255 - calls).max(-1)           # (H, W, colours)
        whole = distance.min(-1) < 1 / 255
        seen = distance.argmin(-1) + 1 - (len(calls) - drawn)   # 1… for the shapes in their order, ≤ 0 for what is below
        assert set(np.unique(seen[whole & (seen > 0)])) <= set(np.unique(scenes.scene(index)[1]))
        owner = np.zeros(seen.shape, int)
        for i, mask in zip(sorted(set(scenes.scene(index)[1].flat) - {0}), target["masks"].numpy()):
            owner[mask.astype(bool)] = i
        assert (owner[whole] == seen[whole].clip(0)).all() and whole.mean() > 0.8
        for box, mask in zip(target["boxes"].tolist(), target["masks"]):
            ys, xs = torch.where(mask.bool())
            assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_the_two_targets_of_a_scene_agree():
    masks, objects = (segment.load_dataset("synthetic:50", "train", 32, 0), detect.load_dataset("synthetic:50", "train", 32))
    assert masks.classes == ["ground", *objects.classes] and len(objects.classes) == 10 and len(masks) == 50
    overlap = 0
    for index in range(50):
        (one, classes), (other, target) = masks[index], objects[index]
        assert one.tobytes() == other.tobytes() and 1 <= len(target["labels"]) <= 4
        expected = torch.ones(32, 32, dtype=torch.uint8)
        for label, mask in zip(target["labels"], target["masks"]):
            assert (expected[mask.bool()] == 1).all()       # no pixel has two owners
            expected[mask.bool()] = label + 1
        assert torch.equal(classes, expected)
        overlap += len(target["labels"]) < len(objects.scene(index)[2])
    assert masks[3][0].tobytes() == data.Scenes("train", 50, 32, target="masks")[3][0].tobytes() != masks[4][0].tobytes()
    assert segment.load_dataset("synthetic:50", "val", 32, 0)[3][0].tobytes() != masks[3][0].tobytes()


def make_ade(folder, images=6, classes=3, size=(40, 30)):
    """A data set in ADE20K's layout: noise whose upper half is class 1, the rest class 2, a corner ignored."""
    rng = np.random.default_rng(0)
    for split, number in (("training", images), ("validation", images // 2)):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(number):
            width, height = size[0] + 4 * i, size[1]
            labels = np.full((height, width), 2, np.uint8)
            labels[:height // 2], labels[:5, :5] = 1, 0
            pixels = rng.integers(0, 100, (height, width, 3)) + 120 * (labels == 1)[..., None]
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / split / f"{i}.jpg")
            Image.fromarray(labels).save(folder / "annotations" / split / f"{i}.png")
    return folder


def test_ade20k_layout(folder, capsys):
    make_ade(folder / "ade")
    dataset = segment.load_dataset("ade", "train", 32, 3)
    image, labels = dataset[1]
    assert len(dataset) == 6 and image.size == (44, 30) and labels.shape == (30, 44)
    assert len(segment.load_dataset("ade", "val", 32, 3)) == 3
    samples = data.Samples(dataset, segment.eval_transform(16), 0)
    pixels, labels = samples[0, 1]
    assert pixels.shape == (3, 16, 23) and labels.shape == (30, 44) and pixels.min() >= -1 and pixels.max() <= 1
    assert labels.unique().tolist() == [0, 1, 2] and not isinstance(labels, tv_tensors.Mask)
    wide = data.Samples([(Image.new("RGB", (300, 20)), torch.zeros(20, 300))], segment.eval_transform(16), 0)
    assert wide[0, 0][0].shape == (3, 4, 64)                # the longer side at most four times the size


def test_bad_ade20k_files(folder, capsys):
    root = make_ade(folder / "ade")
    flags = ["--data", "ade", "--init", "none", "--batch-size", "2"]
    message = fails(capsys, "segment", *flags, "--classes", "1", "--steps", "1")
    assert message.startswith("segment.py: ade/annotations/training/") and message.endswith(".png: has class 2; --classes is 1")
    path = root / "annotations" / "validation" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    message = fails(capsys, "segment", *flags, "--classes", "2", "--steps", "1")
    assert message.startswith("segment.py: ade/annotations/validation/1.png: not a readable image")
    path.write_bytes(whole)
    Image.new("L", (9, 9)).save(root / "annotations" / "validation" / "0.png")
    assert fails(capsys, "segment", *flags, "--classes", "2", "--steps", "1", "--output", "other").startswith(
        "segment.py: ade/annotations/validation/0.png: its shape is (9, 9), the image's (30, 40)")
    (root / "annotations" / "training" / "3.png").unlink()
    assert "3.png: missing" in fails(capsys, "segment", *flags, "--classes", "2")
    (root / "images" / "validation").rename(root / "images" / "test")
    assert "ade: it has no images/validation/ folder" in fails(capsys, "segment", *flags)


def test_a_grey_image_and_a_truncated_one(folder, capsys):
    root = make_ade(folder / "ade")
    Image.new("L", (44, 30), 77).save(root / "images" / "training" / "1.jpg")
    samples = data.Samples(segment.load_dataset("ade", "train", 32, 2), segment.train_transform(16), 0)
    assert samples[0, 1][0].shape == (3, 16, 16)
    path = root / "images" / "training" / "2.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(runtime.InputError, match="2.jpg: not a readable image"):
        samples[0, 2]


def test_training_crops_follow_the_labels(folder):
    """The same draw for image and labels; what lies outside the image is ignored."""
    dataset = segment.load_dataset(str(make_ade(folder / "ade")), "train", 32, 2)
    samples = data.Samples(dataset, segment.train_transform(48), 0)
    sizes, outside, compared = set(), 0, 0
    for epoch in range(12):
        pixels, labels = samples[epoch, 2]
        assert pixels.shape == (3, 48, 48) and labels.shape == (48, 48) and labels.dtype == torch.uint8
        sizes.add(int((labels > 0).any(1).sum()))
        light, dark = (pixels.mean(0)[labels == c] for c in (1, 2))
        if len(light) > 20 and len(dark) > 20:
            compared += 1
            assert light.mean() > dark.mean() + 0.1         # the upper half is the lighter one, jittered or not
        outside += int((labels == 0).sum() > 100)
    assert len(sizes) > 2 and outside and compared > 6
    assert torch.equal(samples[3, 2][0], samples[3, 2][0]) and not torch.equal(samples[3, 2][0], samples[4, 2][0])


def test_a_crop_of_one_class_is_drawn_again():
    labels = tv_tensors.Mask(torch.ones(64, 64, dtype=torch.uint8))
    labels[:, :16] = 2
    image = Image.new("RGB", (64, 64))
    torch.manual_seed(0)
    crop, plain = segment.VariedCrop(40), T.RandomCrop(40)
    dominated = [sum(int((cropper(image, labels)[1] == 1).sum()) >= 0.75 * 1600 for _ in range(100)) for cropper in (crop, plain)]
    assert dominated[0] < 20 < 60 < dominated[1]
    uniform = tv_tensors.Mask(torch.ones(64, 64))      # it gives up
    assert crop(image, uniform)[1].shape == (40, 40)


# ------------------------------------------------------------------------------------------------
# Network, loss, schedule

def tiny(classes=3, image_size=16):
    torch.manual_seed(0)
    vit = model.VisionTransformer(image_size, 4, dim=32, depth=4, heads=2, positions="block", layer_scale=0.1)
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
    (segment.pixel_loss(logits, torch.ones(2, 16, 16)) + segment.pixel_loss(aux, torch.ones(2, 16, 16))).backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum()
                if "relative_position_bias" not in name]


def test_pixel_loss_against_a_plain_loop():
    logits = torch.randn(2, 3, 4, 5, generator=seeded())
    labels = torch.randint(0, 4, (2, 4, 5), generator=seeded(1), dtype=torch.uint8)
    expected = sum(-math.log(logits[b, :, y, x].softmax(0)[int(labels[b, y, x]) - 1]) for b in range(2) for y in range(4)
                   for x in range(5) if labels[b, y, x]) / 40
    assert 0 < int((labels == 0).sum()) < 40
    assert segment.pixel_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_schedule():
    values = [segment.schedule(step, 100, 10, 1.0) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and values[9] == pytest.approx(0.91) and max(values) == values[9]
    assert all(values[step] == pytest.approx(1 - step / 100) for step in range(10, 100))
    assert segment.schedule(0, 10, 0, 1.0) == 1.0


def test_layers_learn_at_their_own_rates():
    network = tiny()
    groups = model.param_groups(network, 0.05, 0.5, vit="backbone.vit")
    scale = {name: group["lr_scale"] for group in groups for name, _ in group["params"]}
    assert scale["backbone.vit.cls_token"] == 0.5 ** 5 and scale["backbone.vit.blocks.3.mlp.fc1.weight"] == 0.5
    assert scale["backbone.up2.weight"] == scale["head.fuse.0.weight"] == scale["aux.0.0.weight"] == 1
    assert len(scale) == len(list(network.parameters()))
    decays = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert decays["backbone.vit.cls_token"] == decays["head.fuse.1.weight"] == 0 and decays["head.fuse.0.weight"] == 0.05


# ------------------------------------------------------------------------------------------------
# Evaluation

def test_scores_against_plain_counting():
    predicted = torch.randint(1, 5, (3, 7, 9), generator=seeded())
    labels = torch.randint(0, 4, (3, 7, 9), generator=seeded(1))     # class 4 is predicted, never there; 5 neither
    confusion = sum(segment.confusion_matrix(p[None], l[None], 5) for p, l in zip(predicted, labels))
    pairs = [(t, p) for t, p in zip(labels.flatten().tolist(), predicted.flatten().tolist()) if t]
    for t in range(1, 6):
        for p in range(1, 6):
            assert confusion[t - 1, p - 1] == pairs.count((t, p))
    ious, accuracies = [], []
    for c in range(1, 6):
        both, either = sum(t == p == c for t, p in pairs), sum(c in pair for pair in pairs)
        there = sum(t == c for t, _ in pairs)
        ious += [100 * both / either] if either else []
        accuracies += [100 * both / there] if there else []
    iou, accuracy, row = segment.scores(confusion)
    assert iou[:4].tolist() == pytest.approx(ious) and iou[4].isnan() and len(ious) == 4
    assert accuracy[:3].tolist() == pytest.approx(accuracies) and accuracy[3:].isnan().all()
    assert row["miou"] == pytest.approx(sum(ious) / 4) and row["mean_accuracy"] == pytest.approx(sum(accuracies) / 3)
    assert row["pixel_accuracy"] == pytest.approx(100 * sum(t == p for t, p in pairs) / len(pairs))


def test_sliding_windows():
    network = tiny().eval()
    images = torch.rand(1, 3, 16, 16, generator=seeded())
    with torch.no_grad():
        assert torch.equal(segment.slide(network, images, 16), network(images))
        assert torch.equal(segment.slide(network, images[:, :, :12], 16), network(images[:, :, :12]))   # larger than the image
    windows = []

    def place(crop):                                        # logits that tell the window: its mean
        windows.append((crop[0, 0, 0, 0].item(), tuple(crop.shape[2:])))
        return crop[:, :1] * 0 + crop.mean()

    images = torch.arange(16 * 37.0).view(1, 1, 16, 37).repeat(1, 3, 1, 1)
    logits = segment.slide(place, images, 16)[0, 0]
    assert windows == [(0, (16, 16)), (10, (16, 16)), (20, (16, 16)), (21, (16, 16))]
    means = [images[0, 0, :, left:left + 16].mean() for left in (0, 10, 20, 21)]
    for x in range(37):
        inside = [mean for mean, left in zip(means, (0, 10, 20, 21)) if left <= x < left + 16]
        assert torch.allclose(logits[:, x], sum(inside) / len(inside) * torch.ones(16))


def test_evaluation_at_each_images_own_size(folder, monkeypatch):
    """A network that sees the lighter half: the scores are those of counting by hand."""
    dataset = segment.load_dataset(str(make_ade(folder / "ade")), "val", 32, 2)
    network = torch.nn.Module()
    network.forward = lambda images: torch.stack([images.mean(1), -images.mean(1)], 1) * 9
    args = segment.get_args([*COMMON, "--image-size", "30", "--output", "."])
    row = segment.evaluate(args, network, dataset, torch.device("cpu"))
    assert row["images"] == 3 and 95 < row["pixel_accuracy"] < 100 and 90 < row["miou"] < row["mean_accuracy"] < 100
    table = Path("classes.md").read_text().splitlines()
    assert len(table) == 4 and table[2].startswith("| class 1 | 9")
    assert [Image.open(f"picture-{i}.png").size for i in range(3)] == [(3 * (40 + 4 * i), 30) for i in range(3)]
    for i in range(3):
        Path(f"picture-{i}.png").unlink()
    monkeypatch.setattr(runtime, "rank", lambda: 1)
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    segment.evaluate(args, network, dataset, torch.device("cpu"))
    assert {path.name for path in Path().glob("picture-*.png")} == {f"picture-{i}.png" for i in (1, 3, 5)}   # of the whole set
    monkeypatch.undo()
    whole = segment.get_args([*COMMON, "--eval-mode", "whole", "--image-size", "30", "--output", "."])
    assert row == segment.evaluate(whole, network, dataset, torch.device("cpu"))    # each pixel by itself: the same


# ------------------------------------------------------------------------------------------------
# The stage

def test_training_begins_from_the_pre_trained_weights(chain):
    args = segment.get_args([*COMMON, *OWN["segment"], *chain.inputs["segment"]])
    network, _, digest = segment.build(args, 11)
    state = newest(chain.pretrain)
    assert digest == state["digest"]
    vit = network.backbone.vit
    assert torch.equal(vit.blocks[0].mlp.fc1.weight, state["model"]["blocks.0.mlp.fc1.weight"])
    assert torch.equal(vit.blocks[3].attn.relative_position_bias_table,
                       state["model"]["rel_pos_bias.relative_position_bias_table"])
    assert vit.blocks[3].drop_path.p == pytest.approx(0.1)


@pytest.mark.parametrize("init", ["finetune", "teacher", "beit.pth", "none"])
def test_other_beginnings(init, chain):
    if init == "beit.pth":
        torch.save(dict(model=newest(chain.pretrain)["model"]), "beit.pth")
    init = str(getattr(chain, init, init))
    run("segment", "--init", init, "--image-size", "64", "--steps", "1", "--lr", "0", "--output", "run")  # at another size too
    assert math.isfinite(log("run")[-1]["loss"])
    state = newest("run")["model"]
    if init != "none":
        source = newest(init) if Path(init).is_dir() else torch.load(init, weights_only=True)
        assert torch.equal(state["backbone.vit.blocks.3.mlp.fc2.weight"], source["model"]["blocks.3.mlp.fc2.weight"])


def test_an_image_size_that_does_not_fit_is_not_blamed_on_the_checkpoint(chain, capsys):
    assert fails(capsys, "segment", *chain.inputs["segment"], "--image-size", "30").startswith("segment.py: image size 30 is no")


def test_evaluation_repeats_what_the_training_logged(chain, capsys):
    row = run("segment", "--eval", "--init", str(chain.segment), "--output", "again")
    logged = log(chain.segment, "val")[-1]
    assert row == {key: logged[key] for key in row} and row["images"] == 100
    assert (chain.segment / "classes.md").read_text() == Path("again/classes.md").read_text()
    message = fails(capsys, "segment", "--eval", "--init", str(chain.pretrain))
    assert "found a checkpoint of pretrain, expected one of segment" in message
    make_ade(Path("ade"))
    assert "has 11 classes, --data ade 3" in fails(capsys, "segment", "--eval", "--init", str(chain.segment), "--data", "ade",
                                                   "--classes", "3")
    assert "found a checkpoint of segment" in fails(capsys, "segment", "--init", str(chain.segment))


def test_it_learns(folder):
    """Light and dark, from scratch, in a few steps."""
    make_ade(Path("ade"), images=8)
    run("segment", "--data", "ade", "--classes", "2", "--init", "none", "--image-size", "32", "--batch-size", "8", "--steps", "20",
        "--warmup-steps", "2", "--lr", "4e-3", "--save-every", "20")
    row = log("runs/demo/segment", "val")[-1]
    assert row["miou"] > 80                                 # one class everywhere: 25


def test_epochs_in_place_of_a_recipes_steps():
    assert segment.get_args([]).steps == 160_000
    args = segment.get_args(["--epochs", "3"])
    assert (args.epochs, args.steps) == (3, None)
    assert segment.get_args(["--steps", "9"]).steps == 9

    with pytest.raises(SystemExit):
        segment.get_args(["--steps", "9", "--epochs", "3"])
