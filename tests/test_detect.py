"""Detection: the data, the figures, torchvision's Mask R-CNN on the ViT."""
import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, run
from helpers import fails, log, newest, pixels, seeded, tiny_vit
from PIL import Image

import data
import detect
from support import weights
from support.launch import InputError

pytestmark = pytest.mark.skipif(
    detect.COCO is None, reason="pycocotools is not installed: requirements-extra.txt")


# ------------------------------------------------------------------------------------------------
# Data

@pytest.fixture
def coco(folder):
    """COCO's layout, with what occurs in the real one, such as categories 3, 7 and 90.

    Image 10 has no objects, 11 only a crowd; 12 is grey; 13 has a box without height.
    """
    rng = np.random.default_rng(0)
    root = folder / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        files, annotations = [], []
        for number in range(10, 20):
            name = f"{number:012}.jpg"
            files.append(dict(id=number, file_name=name, height=48, width=64))
            for annotation in annotations_of(number):
                annotations.append(dict(annotation, id=len(annotations) + 1, image_id=number))
            image = rng.integers(0, 90, (48, 64, 3), np.uint8)
            if number > 11:
                image[10:26, 8:28] += 130
                image[20:44, 40:56, number % 3] += 130
            image = Image.fromarray(image).convert("L" if number == 12 else "RGB")
            image.save(root / f"{split}2017" / name)
        names = {90: "toothbrush", 3: "car", 7: "train"}
        categories = [dict(id=i, name=name) for i, name in names.items()]
        whole = dict(images=files, annotations=annotations, categories=categories)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(whole))
    return root


def annotations_of(number):
    """What coco's image of that number holds."""
    if number == 10:
        return []
    if number == 11:                                # the upper 20 rows: 20 and 28 of each column
        crowd = dict(size=[48, 64], counts=[0] + [20, 28] * 64)
        return [rectangle(7, 0, 0, 64, 20) | dict(iscrowd=1, segmentation=crowd)]
    flat = [rectangle(90, 30, 30, 10, 0)] if number == 13 else []
    return [rectangle((3, 90)[number % 2], 8, 10, 20, 16), rectangle(7, 40, 20, 16, 24), *flat]


def rectangle(category, x, y, w, h):
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return dict(category_id=category, bbox=[x, y, w, h], area=w * h, iscrowd=0,
                segmentation=[polygon])


def load(split="train"):
    return detect.load_dataset("coco", split, 0)


def test_coco_layout(coco):
    dataset = load()
    assert dataset.classes == ["car", "train", "toothbrush"] and dataset.category_ids == [3, 7, 90]
    assert dataset.with_objects() == [2, 3, 4, 5, 6, 7, 8, 9]       # not that with a crowd alone
    samples = data.Samples(dataset, detect.transform(train=False), 0)
    expected = [[], [], [1, 2], [3, 2], [1, 2], [3, 2]]     # without the flat box of image 13
    for index, labels in enumerate(expected):
        image, target = samples[0, index]
        assert image.shape == (3, 48, 64) and image.min() >= -1         # grey ones too
        assert target["labels"].tolist() == labels
        assert target["masks"].shape == (len(labels), 48, 64)
        assert target["boxes"].shape == (len(labels), 4)
        if labels:
            assert target["boxes"].tolist() == [[8, 10, 28, 26], [40, 20, 56, 44]]


def test_boxes_and_masks_are_flipped_with_the_image(coco):
    samples = data.Samples(load(), detect.transform(train=True), 0)
    seen = set()
    for epoch in range(8):
        image, target = samples[epoch, 3]
        left, top, right, bottom = map(int, target["boxes"][0])
        seen.add((left, right))
        assert image[:, top:bottom, left:right].mean() > image.mean() + 0.3
        mask = target["masks"][0]
        assert mask[top:bottom, left:right].all() and mask.sum() == 20 * 16
    assert seen == {(8, 28), (36, 56)}


@pytest.mark.parametrize("key, value", [
    ("segmentation", [[1, 2], [1, 2, 3, 4]]), ("category_id", 5), ("area", None), ("bbox", None)])
def test_a_bad_annotation_is_named(key, value, coco):
    file = coco / "annotations" / "instances_train2017.json"
    whole = json.loads(file.read_text())
    whole["annotations"][2][key] = value
    file.write_text(json.dumps(whole))
    with pytest.raises(InputError, match=f"{file.name}: annotation 3: its {key}"):
        load()


def test_bad_files_are_named(coco):
    image = coco / "train2017" / "000000000014.jpg"
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(InputError, match="coco/train2017/000000000014.jpg"):
        data.read(load(), 4)
    file = coco / "annotations" / "instances_train2017.json"
    file.write_text("{")
    with pytest.raises(InputError, match=file.name):
        load()
    file.unlink()
    with pytest.raises(InputError, match=f"coco: .*annotations/{file.name}"):
        load()
    (coco / "train2017").rename(coco / "train")
    with pytest.raises(InputError, match="coco: .*train2017/"):
        load()


def test_what_cannot_be_detected_is_refused(coco, capsys, monkeypatch):
    few = ["--init", "none", "--data", "coco", "--batch-size", "9"]
    assert "--batch-size 9" in fails(capsys, "detect", *few)        # 8 images have objects
    # torchvision's RoIAlign would read their maps at other places than the boxes'
    assert "14 pixels" in fails(capsys, "detect", "--init", "none", "--patch-size", "14")
    monkeypatch.setattr(detect, "COCO", None)
    assert "pip install pycocotools" in fails(capsys, "detect", "--init", "none")


# ------------------------------------------------------------------------------------------------
# Evaluation

def as_detections(target, seed):
    """The truth as a network would give it: boxes off by up to 4 pixels, random scores."""
    number = len(target["labels"])
    return dict(target, boxes=target["boxes"] + 4 * pixels(number, 4, seed=seed),
                scores=torch.rand(number, generator=seeded(seed)), masks=target["masks"][:, None])


@pytest.mark.parametrize("name", ["coco", "synthetic:40"])
def test_average_precision_is_the_official_evaluators(name, coco):
    """The same predictions through files and pycocotools alone, as its documentation has it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    dataset = detect.load_dataset(name, "val", 64)
    samples = data.Samples(dataset, detect.transform(train=False), 0)
    results = []
    for index in range(len(dataset)):
        detections = as_detections(samples[0, index][1], index)
        results += detect.as_results(detections, dataset.ids[index], dataset.category_ids)
    truth = detect.ground_truth(dataset)
    assert set(detect.average_precision(truth, []).values()) == {0.0}
    row = detect.average_precision(truth, results)
    assert 5 < row["box_ap"] < row["box_ap50"] <= 100
    if name == "coco":
        assert 80 < row["mask_ap"] < 100                    # the flat box has no mask
    else:
        assert row["mask_ap"] == pytest.approx(100)

    for name, contents in (("truth.json", truth.dataset), ("results.json", results)):
        Path(name).write_text(json.dumps(contents, default=bytes.decode))
    with contextlib.redirect_stdout(None):
        official = COCO("truth.json")
        for kind, prefix in (("bbox", "box"), ("segm", "mask")):
            evaluation = COCOeval(official, official.loadRes("results.json"), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            ours = [row[f"{prefix}_ap{suffix}"] for suffix in ("", "50", "75")]
            assert ours == [100 * value for value in evaluation.stats[:3]]


# ------------------------------------------------------------------------------------------------
# The network

def tiny():
    torch.manual_seed(0)
    vit = tiny_vit(image_size=32, patch_size=8, depth=4, positions="block")
    return detect.mask_rcnn(vit, classes=3, channels=16, boxes=16, size=32, max_size=48)


def test_pyramid_and_anchors():
    network = tiny()
    wide = network.transform([torch.zeros(3, 16, 60)])[0].tensors
    assert wide.shape[2:] == (16, 48)                       # its longer side to 48 at most
    images = network.transform([torch.zeros(3, 30, 36)])[0].tensors
    maps = network.backbone(images)                         # 32 × 38, padded to multiples of 16
    assert [(name, *x.shape[1:]) for name, x in maps.items()] == [
        ("0", 16, 16, 24), ("1", 16, 8, 12), ("2", 16, 4, 6), ("3", 16, 2, 3), ("pool", 16, 1, 2)]
    assert network.rpn.anchor_generator.sizes == ((16,), (32,), (64,), (128,), (256,))


def test_images_without_objects_train_and_every_weight_has_a_gradient(coco):
    samples = data.Samples(load(), detect.transform(train=True), 0)
    network = tiny()
    images, targets = data.as_lists([samples[0, index] for index in (0, 2, 3)])
    sum(network(images, targets).values()).backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None]
    images, targets = data.as_lists([samples[0, 0], samples[0, 1]])     # none at all
    assert all(torch.isfinite(loss) for loss in network(images, targets).values())


def test_boxes_are_in_fp32_under_autocast():
    """In bf16 a coordinate above 512 would be a multiple of 4. They take the maps' dtype."""
    backbone = tiny().backbone
    backbone.autocast = torch.autocast("cpu", torch.bfloat16)
    hidden = []
    layer = backbone.pyramid.vit.blocks[0].mlp.fc1
    layer.register_forward_hook(lambda module, x, y: hidden.append(y.dtype))
    maps = backbone(pixels(1, 3, 32, 48))
    assert hidden == [torch.bfloat16]
    assert all(x.dtype == torch.float32 for x in maps.values())


def test_an_image_is_evaluated_by_itself(coco):
    """Whatever the batch size: beside a larger image it would be padded."""
    args = detect.get_args([*COMMON, "--batch-size", "16", "--output", "."])
    network = tiny()
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    row = detect.evaluate(args, network, load("val"), torch.device("cpu"))
    assert seen == [1] * 10 and row["images"] == 10
    assert len(list(Path().glob("picture-*.png"))) == 8


def test_schedule():
    """Epochs 8 and 11 of 12; 24 and 33 of 36."""
    values = [detect.schedule(step, 120, 10, 1.0) for step in range(120)]
    assert values[:2] == pytest.approx([0.1, 0.2]) and values[9:80] == [1.0] * 71
    assert values[80:110] == pytest.approx([0.1] * 30)
    assert values[110:] == pytest.approx([0.01] * 10)
    longer = [detect.schedule(step, 360, 10, 1.0) for step in range(360)]
    assert longer[239:241] == pytest.approx([1.0, 0.1])
    assert longer[329:331] == pytest.approx([0.1, 0.01])


# ------------------------------------------------------------------------------------------------
# The stage

def test_training_begins_from_the_pre_trained_weights(chain):
    args = detect.get_args([*COMMON, *chain.inputs["detect"], "--image-size", "60"])
    state, digest = weights.read(args)
    network, _ = detect.build(args, 10, state)
    fc1 = "blocks.0.mlp.fc1.weight"
    assert torch.equal(network.backbone.pyramid.vit.get_parameter(fc1), state["model"][fc1])
    assert network.transform.min_size == (60,)
    assert newest(chain.detect)["identity"]["init"] == digest


def test_evaluation_repeats_what_the_training_logged(chain):
    row = run("detect", "--eval", "--init", str(chain.detect), "--output", "again")
    logged = log(chain.detect, "val")[-1]
    assert row == {key: logged[key] for key in row}
    assert row["images"] == 40 and "mask_ap" in row


def test_it_learns(coco):
    """Two kinds of rectangles, from scratch."""
    run("detect", "--data", "coco", "--init", "none", "--image-size", "32",
        "--max-size", "64", "--batch-size", "8", "--steps", "30", "--lr", "8e-3",
        "--warmup-steps", "5", "--save-every", "30", "--drop-path", "0", "--patch-size", "8")
    assert log("runs/demo/detect", "val")[-1]["box_ap50"] > 30
