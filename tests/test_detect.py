"""Detection: the data, the figures, torchvision's Mask R-CNN on the ViT.

Its command line is tested with the other stages' in test_stages.py.
"""
import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, OWN, run
from PIL import Image
from test_stages import fails, log, newest

import data
import detect
import model

pytestmark = pytest.mark.skipif(
    detect.COCO is None, reason="pycocotools is not installed: requirements-extra.txt")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_coco(folder, images=6):
    """A dataset in COCO's layout, with all that occurs in the real one: categories 3, 7 and 90.

    In each split image 10 has no objects, image 11 only a crowd, image 12 is grey, image 13 has a
    box without height.
    """
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"{split}2017").mkdir()
        files, annotations = [], []
        for number in range(10, 10 + images):
            name = f"{number:012}.jpg"
            files.append(dict(id=number, file_name=name, height=48, width=64))
            for annotation in annotations_of(number):
                annotations.append(dict(annotation, id=len(annotations) + 1, image_id=number))
            pixels = rng.integers(0, 90, (48, 64, 3)).astype(np.uint8)
            if number > 11:
                pixels[10:26, 8:28] += 130
                pixels[20:44, 40:56, number % 3] += 130
            image = Image.fromarray(pixels)
            if number == 12:
                image = image.convert("L")
            image.save(folder / f"{split}2017" / name)
        names = {90: "toothbrush", 3: "car", 7: "train"}
        categories = [dict(id=i, name=name) for i, name in names.items()]
        whole = dict(images=files, annotations=annotations, categories=categories)
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(whole))
    return folder


def annotations_of(number):
    """What make_coco's image of that number holds."""
    if number == 10:
        return []
    if number == 11:                                # the upper 20 rows: 20 and 28 of each column
        counts = [0] + [20, 28] * 64
        crowd = dict(size=[48, 64], counts=counts)
        return [annotation(7, [0, 0, 64, 20], iscrowd=1, segmentation=crowd)]
    found = [annotation((3, 90)[number % 2], [8, 10, 20, 16]), annotation(7, [40, 20, 16, 24])]
    if number == 13:
        flat = [[30, 30, 40, 30, 40, 30, 30, 30]]
        found.append(annotation(90, [30, 30, 10, 0], segmentation=flat))
    return found


def test_a_polygon_of_two_points_is_left_out(folder):
    file = make_coco(folder / "coco") / "annotations" / "instances_train2017.json"
    contents = json.loads(file.read_text())
    outline = contents["annotations"][2]["segmentation"]
    contents["annotations"][2]["segmentation"] = [*outline, [1, 2, 3, 4]]
    contents.pop("info", None)                              # pycocotools 2.0.10 asks for it
    file.write_text(json.dumps(contents))
    coco = detect.load_dataset("coco", "train", 64).coco
    assert coco.anns[contents["annotations"][2]["id"]]["segmentation"] == outline
    assert "info" in coco.dataset


def annotation(category, box, **more):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    plain = dict(category_id=category, bbox=box, area=w * h, iscrowd=0, segmentation=[polygon])
    return plain | more


# ------------------------------------------------------------------------------------------------
# Data

def test_coco_layout(folder):
    make_coco(folder / "coco")
    dataset = detect.load_dataset("coco", "train", 0)
    assert dataset.classes == ["car", "train", "toothbrush"] and dataset.category_ids == [3, 7, 90]
    assert len(dataset) == 6
    assert dataset.with_objects() == [2, 3, 4, 5]           # not the one with a crowd alone
    samples = data.Samples(dataset, detect.transform(train=False), 0)
    expected = [[], [], [1, 2], [3, 2], [1, 2], [3, 2]]     # without the flat box of image 13
    for index, labels in enumerate(expected):
        pixels, target = samples[0, index]
        assert pixels.shape == (3, 48, 64) and pixels.min() >= -1       # grey ones too
        assert target["labels"].tolist() == labels
        assert target["masks"].shape == (len(labels), 48, 64)
        if labels:
            assert target["boxes"].tolist() == [[8, 10, 28, 26], [40, 20, 56, 44]]
            mask = target["masks"][0]
            assert mask[10:26, 8:28].all() and mask.sum() == 20 * 16
        else:
            assert target["boxes"].shape == (0, 4)


def test_boxes_and_masks_are_flipped_with_the_image(folder):
    dataset = detect.load_dataset(str(make_coco(folder / "coco")), "train", 0)
    samples = data.Samples(dataset, detect.transform(train=True), 0)
    seen = set()
    for epoch in range(8):
        pixels, target = samples[epoch, 3]
        left, top, right, bottom = map(int, target["boxes"][0])
        seen.add(left)
        assert (left, right) in ((8, 28), (36, 56))
        assert pixels[:, top:bottom, left:right].mean() > pixels.mean() + 0.3
        mask = target["masks"][0]
        assert mask[top:bottom, left:right].all() and mask.sum() == 320
    assert len(seen) == 2


def test_bad_coco_files(folder, capsys):
    root = make_coco(folder / "coco")
    flags = ["--data", "coco", "--init", "none", "--batch-size", "2", "--steps", "1"]
    path = root / "train2017" / "000000000014.jpg"
    path.write_bytes(path.read_bytes()[:100])
    four = [*flags, "--batch-size", "4", "--output", "a"]
    message = fails(capsys, "detect", *four)
    assert message.startswith(
        "detect.py: coco/train2017/000000000014.jpg: not a readable image")
    path.unlink()
    assert "000000000014.jpg: not a readable image" in fails(capsys, "detect", *four)

    file = root / "annotations" / "instances_train2017.json"
    whole = file.read_text()

    def without_segmentation(annotation):
        del annotation["segmentation"]

    def of_an_unknown_category(annotation):
        annotation["category_id"] = 5

    def without_area(annotation):
        del annotation["area"]

    def with_polygons_of_two_points(annotation):
        annotation["segmentation"] = [[1, 2], [1, 2, 3, 4]]

    def without_a_box(annotation):
        annotation["bbox"] = None

    for damage in (without_segmentation, with_polygons_of_two_points, of_an_unknown_category,
                   without_area, without_a_box):
        changed = json.loads(whole)
        damage(changed["annotations"][2])
        number = changed["annotations"][2]["id"]
        file.write_text(json.dumps(changed))
        message = fails(capsys, "detect", *flags)
        assert f"instances_train2017.json: annotation {number}: " in message
    file.write_text("{")
    assert "instances_train2017.json: not COCO's format" in fails(capsys, "detect", *flags)
    file.unlink()
    message = fails(capsys, "detect", *flags)
    assert "it has no annotations/instances_train2017.json" in message
    (root / "val2017").rename(root / "test2017")
    assert "coco: it has no val2017/ folder" in fails(capsys, "detect", *flags)
    two = str(make_coco(folder / "two"))
    message = fails(capsys, "detect", *flags, "--batch-size", "5", "--data", two)
    assert "--batch-size 5 is more than the 4 training images" in message


def test_missing_pycocotools(capsys, monkeypatch):
    monkeypatch.setattr(detect, "COCO", None)
    message = fails(capsys, "detect", "--init", "none")
    assert message == "detect.py: COCO's evaluation is missing: pip install pycocotools"


# ------------------------------------------------------------------------------------------------
# Evaluation

def as_detections(target, noise, generator):
    """The truth as a network would give it: boxes off by up to `noise` pixels, random scores."""
    number = len(target["labels"])
    offsets = noise * (2 * torch.rand(number, 4, generator=generator) - 1)
    return dict(
        boxes=target["boxes"] + offsets,
        labels=target["labels"],
        scores=torch.rand(number, generator=generator),
        masks=target["masks"][:, None].float())


@pytest.mark.parametrize("name", ["coco", "synthetic:40"])
def test_average_precision_is_the_official_evaluators(name, folder):
    """The same predictions through files and pycocotools alone, as its documentation has it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    make_coco(folder / "coco")
    dataset = detect.load_dataset(name, "val", 64)
    samples = data.Samples(dataset, detect.transform(train=False), 0)
    generator = seeded()
    results = []
    for index in range(len(dataset)):
        detections = as_detections(samples[0, index][1], 4.0, generator)
        results += detect.as_results(detections, dataset.ids[index], dataset.category_ids)
    truth = detect.ground_truth(dataset)
    row = detect.average_precision(truth, results)
    assert 5 < row["box_ap"] < row["box_ap50"] <= 100
    if name == "coco":
        assert 80 < row["mask_ap"] < 100                    # the flat box has no mask
    else:
        assert row["mask_ap"] == pytest.approx(100)

    plain = []
    for result in results:
        mask = result["segmentation"]
        plain.append(dict(result, segmentation=dict(mask, counts=mask["counts"].decode())))
    Path("truth.json").write_text(json.dumps(truth.dataset, default=lambda value: value.decode()))
    Path("results.json").write_text(json.dumps(plain))
    with contextlib.redirect_stdout(None):
        official = COCO("truth.json")
        for kind, prefix in (("bbox", "box"), ("segm", "mask")):
            evaluation = COCOeval(official, official.loadRes("results.json"), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            ours = [row[f"{prefix}_ap{suffix}"] for suffix in ("", "50", "75")]
            assert ours == [100 * value for value in evaluation.stats[:3]]


def test_average_precision_of_nothing_and_of_wrong_classes(folder):
    dataset = detect.load_dataset(str(make_coco(folder / "coco")), "val", 0)
    truth = detect.ground_truth(dataset)
    assert set(detect.average_precision(truth, []).values()) == {0.0}
    target = data.Samples(dataset, detect.transform(train=False), 0)[0, 2][1]
    wrong = dict(as_detections(target, 0, seeded()), labels=torch.tensor([3, 3]))
    results = detect.as_results(wrong, 12, dataset.category_ids)
    assert detect.average_precision(truth, results)["box_ap"] < 1
    nothing = dict(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        scores=torch.zeros(0),
        masks=torch.zeros(0, 1, 48, 64))
    assert detect.as_results(nothing, 12, dataset.category_ids) == []


# ------------------------------------------------------------------------------------------------
# The network

def tiny():
    torch.manual_seed(0)
    vit = model.VisionTransformer(32, 8, dim=32, depth=4, heads=2, positions="block",
                                  layer_scale=0.1)
    return detect.mask_rcnn(vit, classes=3, channels=16, boxes=16, size=32, max_size=48)


def test_pyramid_and_anchors():
    network = tiny()
    maps = network.backbone(torch.zeros(1, 3, 48, 32))
    assert [(name, *x.shape[1:]) for name, x in maps.items()] == [
        ("0", 16, 24, 16), ("1", 16, 12, 8), ("2", 16, 6, 4), ("3", 16, 3, 2), ("pool", 16, 2, 1)]
    assert network.rpn.anchor_generator.sizes == ((16,), (32,), (64,), (128,), (256,))
    vit = model.VisionTransformer(32, 16, dim=32, depth=1, heads=2)
    standard = detect.mask_rcnn(vit, 90, 256, 512, 32, 32)
    # torchvision's defaults
    assert standard.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))


def test_images_without_objects_train_and_every_weight_has_a_gradient(folder):
    dataset = detect.load_dataset(str(make_coco(folder / "coco")), "train", 0)
    samples = data.Samples(dataset, detect.transform(train=True), 0)
    network = tiny()
    images, targets = data.as_lists([samples[0, index] for index in (0, 2, 3)])
    losses = network(images, targets)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness",
                           "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None]
    images, targets = data.as_lists([samples[0, 0], samples[0, 1]])     # none at all
    assert all(torch.isfinite(loss) for loss in network(images, targets).values())


def test_patches_of_no_power_of_two_are_refused(capsys):
    """torchvision's RoIAlign would read their maps at other places than the boxes'."""
    message = fails(capsys, "detect", "--init", "none", "--patch-size", "14")
    assert "patches of 14 pixels: detection needs 2, 4, 8, 16 or 32" in message


def test_one_size_in_training_and_evaluation(monkeypatch):
    network = tiny()
    forward = network.backbone.forward
    seen = []

    def watched(images):
        seen.append(tuple(images.shape[2:]))
        return forward(images)

    monkeypatch.setattr(network.backbone, "forward", watched)
    image = torch.zeros(3, 30, 40)
    target = dict(
        boxes=torch.tensor([[2.0, 2, 20, 20]]),
        labels=torch.tensor([1]),
        masks=torch.ones(1, 30, 40, dtype=torch.uint8))
    network([image], [target])
    assert seen[-1] == (32, 48)                             # 32 × 43, padded to multiples of 16
    network.eval()([image, torch.zeros(3, 16, 48)])         # at most 48 wide
    assert seen[-1] == (32, 48)


def test_boxes_are_in_fp32_under_autocast(monkeypatch):
    """In bf16 a coordinate above 512 would be a multiple of 4."""
    network = tiny()
    network.backbone.autocast = torch.autocast("cpu", torch.bfloat16)
    filter_proposals = network.rpn.filter_proposals
    proposed, hidden = [], []

    def watched(proposals, *rest):
        proposed.append(proposals.dtype)
        return filter_proposals(proposals, *rest)

    monkeypatch.setattr(network.rpn, "filter_proposals", watched)
    layer = network.backbone.pyramid.vit.blocks[0].mlp.fc1
    layer.register_forward_hook(lambda module, x, y: hidden.append(y.dtype))
    detections = network.eval()([torch.rand(3, 32, 48, generator=seeded())])[0]
    assert hidden == [torch.bfloat16] and proposed == [torch.float32]
    assert detections["boxes"].dtype == detections["scores"].dtype == torch.float32


def test_an_image_is_evaluated_by_itself(folder, monkeypatch):
    """Whatever the batch size: beside a larger image it would be padded."""
    monkeypatch.setattr(detect, "PICTURES", 0)
    dataset = detect.load_dataset(str(make_coco(folder / "coco")), "val", 0)
    dataset.ids, dataset.samples = dataset.ids[2:5], dataset.samples[2:5]
    rows = []
    for batch_size in ("16", "1"):
        torch.manual_seed(0)
        args = detect.get_args([*COMMON, "--batch-size", batch_size, "--output", "."])
        network, seen = tiny(), []

        def watched(images, forward=network.forward, seen=seen):
            seen.append(len(images))
            return forward(images)

        network.forward = watched
        rows.append(detect.evaluate(args, network, dataset, torch.device("cpu")))
        assert seen == [1, 1, 1]
    assert rows[0] == rows[1] and rows[0]["images"] == 3
    assert not list(Path().glob("picture-*.png"))


def test_schedule():
    """Epochs 8 and 11 of 12; 24 and 33 of 36."""
    values = [detect.schedule(step, 120, 10, 1.0) for step in range(120)]
    assert values[:2] == pytest.approx([0.1, 0.2]) and values[9:80] == [1.0] * 71
    assert values[80:110] == pytest.approx([0.1] * 30)
    assert values[110:] == pytest.approx([0.01] * 10)
    longer = [detect.schedule(step, 360, 10, 1.0) for step in range(360)]
    assert longer[9:240] == [1.0] * 231 and longer[240] == pytest.approx(0.1)
    assert longer[329:331] == pytest.approx([0.1, 0.01])


# ------------------------------------------------------------------------------------------------
# The stage

def test_training_begins_from_the_pre_trained_weights(chain):
    args = detect.get_args([*COMMON, *OWN["detect"], *chain.inputs["detect"]])
    state = newest(chain.pretrain)
    network, _ = detect.build(args, 10, state)
    vit = network.backbone.pyramid.vit
    assert torch.equal(vit.blocks[0].mlp.fc1.weight, state["model"]["blocks.0.mlp.fc1.weight"])
    assert network.transform.min_size == (32,) and network.transform.max_size == 32
    assert newest(chain.detect)["identity"]["init"] == state["digest"]


def test_a_network_without_weights(chain):
    """Of an empty network."""
    args = detect.get_args([*COMMON, *OWN["detect"], "--checkpoint-activations"])
    state = newest(chain.pretrain)
    network, model_args = detect.build(args, 10, state | dict(model=None))
    assert model_args == newest(chain.detect)["model_args"]
    assert network.state_dict().keys() == newest(chain.detect)["model"].keys()
    assert network.backbone.pyramid.vit.checkpoint_activations


def test_evaluation_repeats_what_the_training_logged(chain, capsys):
    row = run("detect", "--eval", "--init", str(chain.detect), "--output", "again")
    logged = log(chain.detect, "val")[-1]
    assert row == {key: logged[key] for key in row}
    assert row["images"] == 40 and "mask_ap" in row
    pictures = sorted(path.name for path in Path("again").glob("*.png"))
    assert pictures == [f"picture-{i}.png" for i in range(8)]
    message = fails(capsys, "detect", "--eval", "--init", str(chain.pretrain))
    assert "found a checkpoint of pretrain, expected one of detect" in message
    make_coco(Path("coco"))
    message = fails(capsys, "detect", "--eval", "--init", str(chain.detect), "--data", "coco")
    assert "has 10 classes, --data coco 3" in message
    message = fails(capsys, "detect", "--init", str(chain.detect))
    assert "found a checkpoint of detect" in message


def test_it_learns(folder):
    """Two kinds of rectangles, from scratch."""
    make_coco(Path("coco"), images=10)
    run("detect", "--data", "coco", "--init", "none", "--image-size", "48",
        "--max-size", "64", "--batch-size", "8", "--steps", "60", "--lr", "6e-3",
        "--warmup-steps", "5", "--save-every", "60", "--drop-path", "0", "--patch-size", "8")
    rows = log("runs/demo/detect")
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert log("runs/demo/detect", "val")[-1]["box_ap50"] > 10
    assert math.isfinite(rows[-1]["grad_norm"])
