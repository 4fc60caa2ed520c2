"""Detection: the data, the figures, torchvision's package on the ViT. Its command line is tested with the other stages' too."""
import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import detect
import model
from conftest import COMMON, OWN, run
from test_stages import fails, log, newest

pytestmark = pytest.mark.skipif(detect.COCO is None, reason="pycocotools is not installed: requirements-extra.txt")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_coco(folder, images=6):
    """A data set in COCO's layout, with all that occurs in the real one: categories 3, 7 and 90; per split image 10 has
    no objects, image 11 only a crowd, image 12 is grey, image 13 has a box without height."""
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"{split}2017").mkdir()
        files, annotations = [], []

        def add(image, category, box, **more):
            x, y, w, h = box
            annotations.append(dict(id=len(annotations) + 1, image_id=image, category_id=category, bbox=box, area=w * h, iscrowd=0,
                                    segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]]) | more)

        for number in range(10, 10 + images):
            pixels = rng.integers(0, 90, (48, 64, 3)).astype(np.uint8)
            files.append(dict(id=number, file_name=f"{number:012}.jpg", height=48, width=64))
            if number == 11:
                crowd = np.zeros((48, 64), np.uint8)
                crowd[:20] = 1
                counts = [0, *np.diff(np.flatnonzero(np.diff(np.concatenate([[1 - crowd.T.flat[0]], crowd.T.ravel(), [2]]))))]
                add(number, 7, [0, 0, 64, 20], iscrowd=1, segmentation=dict(size=[48, 64], counts=[int(c) for c in counts]))
            if number > 11:
                add(number, (3, 90)[number % 2], [8, 10, 20, 16])
                add(number, 7, [40, 20, 16, 24])
                pixels[10:26, 8:28] += 130
                pixels[20:44, 40:56, number % 3] += 130
            if number == 13:
                add(number, 90, [30, 30, 10, 0], segmentation=[[30, 30, 40, 30, 40, 30, 30, 30]])
            image = Image.fromarray(pixels)
            (image.convert("L") if number == 12 else image).save(folder / f"{split}2017" / files[-1]["file_name"])
        categories = [dict(id=i, name=name) for i, name in ((90, "toothbrush"), (3, "car"), (7, "train"))]
        (folder / "annotations" / f"instances_{split}2017.json").write_text(
            json.dumps(dict(images=files, annotations=annotations, categories=categories)))
    return folder


# ------------------------------------------------------------------------------------------------
# Data

def test_coco_layout(folder):
    make_coco(folder / "coco")
    dataset = detect.load_dataset("coco", "train", 0)
    assert dataset.classes == ["car", "train", "toothbrush"] and dataset.category_ids == [3, 7, 90]
    assert len(dataset) == 6 and dataset.with_objects() == [2, 3, 4, 5]         # not the one with a crowd alone
    samples = data.Samples(dataset, detect.transform(train=False), 0)
    for index, labels in enumerate([[], [], [1, 2], [3, 2], [1, 2], [3, 2]]):   # without the flat box of image 13
        pixels, target = samples[0, index]
        assert pixels.shape == (3, 48, 64) and pixels.min() >= -1               # grey ones too
        assert target["labels"].tolist() == labels and target["masks"].shape == (len(labels), 48, 64)
        if labels:
            assert target["boxes"].tolist() == [[8, 10, 28, 26], [40, 20, 56, 44]]
            assert target["masks"][0, 10:26, 8:28].all() and target["masks"][0].sum() == 20 * 16
        else:
            assert target["boxes"].shape == (0, 4)


def test_boxes_and_masks_are_flipped_with_the_image(folder):
    dataset = detect.load_dataset(str(make_coco(folder / "coco")), "train", 0)
    samples, seen = data.Samples(dataset, detect.transform(train=True), 0), set()
    for epoch in range(8):
        pixels, target = samples[epoch, 3]
        left, top, right, bottom = map(int, target["boxes"][0])
        seen.add(left)
        inside = pixels[:, top:bottom, left:right].mean()
        assert (left, right) in ((8, 28), (36, 56)) and inside > pixels.mean() + 0.3
        assert target["masks"][0, top:bottom, left:right].all() and target["masks"][0].sum() == 320
    assert len(seen) == 2


def test_bad_coco_files(folder, capsys):
    root = make_coco(folder / "coco")
    flags = ["--data", "coco", "--init", "none", "--batch-size", "2", "--steps", "1"]
    path = root / "train2017" / "000000000014.jpg"
    path.write_bytes(path.read_bytes()[:100])
    message = fails(capsys, "detect", *flags, "--batch-size", "4", "--output", "a")
    assert message.startswith("detect.py: coco/train2017/000000000014.jpg: not a readable image")
    path.unlink()
    assert "000000000014.jpg: not a readable image" in fails(capsys, "detect", *flags, "--batch-size", "4", "--output", "a")
    file = root / "annotations" / "instances_train2017.json"
    whole = json.loads(file.read_text())
    for damage in (lambda a: a.pop("segmentation"), lambda a: a.update(category_id=5), lambda a: a.pop("area")):
        changed = json.loads(file.read_text())
        damage(changed["annotations"][2])
        file.write_text(json.dumps(changed))
        assert fails(capsys, "detect", *flags).startswith("detect.py: coco/annotations/instances_train2017.json: not COCO's format")
        file.write_text(json.dumps(whole))
    file.write_text("{")
    assert "instances_train2017.json: not COCO's format" in fails(capsys, "detect", *flags)
    file.unlink()
    assert "it has no annotations/instances_train2017.json" in fails(capsys, "detect", *flags)
    (root / "val2017").rename(root / "test2017")
    assert "coco: it has no val2017/ folder" in fails(capsys, "detect", *flags)
    assert "--batch-size 5 is more than the 4 training images" in fails(
        capsys, "detect", *flags, "--batch-size", "5", "--data", str(make_coco(folder / "two")))


def test_missing_pycocotools(capsys, monkeypatch):
    monkeypatch.setattr(detect, "COCO", None)
    assert fails(capsys, "detect", "--init", "none") == "detect.py: COCO's evaluation is missing: pip install pycocotools"


# ------------------------------------------------------------------------------------------------
# Evaluation

def as_detections(target, noise, generator):
    """The truth as a network would give it: boxes off by up to `noise` pixels, random scores."""
    number = len(target["labels"])
    return dict(boxes=target["boxes"] + noise * (2 * torch.rand(number, 4, generator=generator) - 1), labels=target["labels"],
                scores=torch.rand(number, generator=generator), masks=target["masks"][:, None].float())


@pytest.mark.parametrize("name", ["coco", "synthetic:40"])
def test_average_precision_is_the_official_evaluators(name, folder):
    """The same predictions through files and pycocotools alone, as its documentation has it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    make_coco(folder / "coco")
    dataset = detect.load_dataset(name, "val", 64)
    samples, generator, results = data.Samples(dataset, detect.transform(train=False), 0), seeded(), []
    for index in range(len(dataset)):
        detections = as_detections(samples[0, index][1], 4.0, generator)
        results += detect.as_results(detections, dataset.ids[index], dataset.category_ids)
    truth = detect.ground_truth(dataset)
    row = detect.average_precision(truth, results)
    assert 5 < row["box_ap"] < row["box_ap50"] <= 100
    assert 80 < row["mask_ap"] < 100 if name == "coco" else row["mask_ap"] == pytest.approx(100)   # the flat box has no mask
    plain = [dict(result, segmentation=dict(result["segmentation"], counts=result["segmentation"]["counts"].decode()))
             for result in results]
    dataset_json = json.loads(json.dumps(truth.dataset, default=lambda value: value.decode()))
    Path("truth.json").write_text(json.dumps(dataset_json))
    Path("results.json").write_text(json.dumps(plain))
    with contextlib.redirect_stdout(None):
        official = COCO("truth.json")
        for kind, prefix in (("bbox", "box"), ("segm", "mask")):
            evaluation = COCOeval(official, official.loadRes("results.json"), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert [row[f"{prefix}_ap{suffix}"] for suffix in ("", "50", "75")] == [100 * v for v in evaluation.stats[:3]]


def test_average_precision_of_nothing_and_of_wrong_classes(folder):
    dataset = detect.load_dataset(str(make_coco(folder / "coco")), "val", 0)
    truth = detect.ground_truth(dataset)
    assert set(detect.average_precision(truth, []).values()) == {0.0}
    target = data.Samples(dataset, detect.transform(train=False), 0)[0, 2][1]
    wrong = dict(as_detections(target, 0, seeded()), labels=torch.tensor([3, 3]))
    assert detect.average_precision(truth, detect.as_results(wrong, 12, dataset.category_ids))["box_ap"] < 1
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0),
                   masks=torch.zeros(0, 1, 48, 64))
    assert detect.as_results(nothing, 12, dataset.category_ids) == []


# ------------------------------------------------------------------------------------------------
# The network

def tiny(**changes):
    torch.manual_seed(0)
    vit = model.VisionTransformer(32, 8, dim=32, depth=4, heads=2, positions="block", layer_scale=0.1)
    return detect.mask_rcnn(vit, **{**dict(classes=3, channels=16, boxes=16, sizes=[24, 32], max_size=48), **changes})


def test_pyramid_and_anchors():
    network = tiny()
    maps = network.backbone(torch.zeros(1, 3, 48, 32))
    assert [(name, *x.shape[1:]) for name, x in maps.items()] == [
        ("0", 16, 24, 16), ("1", 16, 12, 8), ("2", 16, 6, 4), ("3", 16, 3, 2), ("pool", 16, 2, 1)]
    assert network.rpn.anchor_generator.sizes == ((16,), (32,), (64,), (128,), (256,))
    standard = detect.mask_rcnn(model.VisionTransformer(32, 16, dim=32, depth=1, heads=2), 90, 256, 512, [32], 32)
    assert standard.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))    # torchvision's defaults


def test_images_without_objects_train_and_every_weight_has_a_gradient(folder):
    dataset = detect.load_dataset(str(make_coco(folder / "coco")), "train", 0)
    samples, network = data.Samples(dataset, detect.transform(train=True), 0), tiny()
    images, targets = data.as_lists([samples[0, index] for index in (0, 2, 3)])
    losses = network(images, targets)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None]
    images, targets = data.as_lists([samples[0, 0], samples[0, 1]])             # none at all
    assert all(torch.isfinite(loss) for loss in network(images, targets).values())


def test_training_sizes_are_drawn_and_the_last_is_evaluations(monkeypatch):
    network, seen = tiny(), []
    forward = network.backbone.forward
    monkeypatch.setattr(network.backbone, "forward", lambda x: seen.append(tuple(x.shape[2:])) or forward(x))
    image = torch.zeros(3, 30, 40)
    target = dict(boxes=torch.tensor([[2.0, 2, 20, 20]]), labels=torch.tensor([1]), masks=torch.ones(1, 30, 40, dtype=torch.uint8))
    for seed in range(8):
        torch.manual_seed(seed)
        network([image], [target])
    assert set(seen) == {(32, 32), (32, 48)}                # 24 × 32 and 32 × 43, padded to multiples of 16
    network.eval()([image, torch.zeros(3, 16, 48)])         # at most 48 wide
    assert seen[-1] == (32, 48)


def test_boxes_are_in_fp32_under_autocast(monkeypatch):
    """In bf16 a coordinate above 512 would be a multiple of 4."""
    network, seen = tiny(), []
    network.backbone.autocast = torch.autocast("cpu", torch.bfloat16)
    filter_proposals = network.rpn.filter_proposals
    monkeypatch.setattr(network.rpn, "filter_proposals", lambda proposals, *rest: seen.append(proposals.dtype)
                        or filter_proposals(proposals, *rest))
    dtypes = []
    network.backbone.pyramid.vit.blocks[0].mlp.fc1.register_forward_hook(lambda module, x, y: dtypes.append(y.dtype))
    detections = network.eval()([torch.rand(3, 32, 48, generator=seeded())])[0]
    assert dtypes == [torch.bfloat16] and seen == [torch.float32]
    assert detections["boxes"].dtype == detections["scores"].dtype == torch.float32


def test_an_image_is_evaluated_by_itself(folder):
    """Whatever the batch size: beside a larger image it would be padded."""
    dataset, rows = detect.load_dataset(str(make_coco(folder / "coco")), "val", 0), []
    dataset.ids = dataset.ids[2:5]
    for batch_size in ("16", "1"):
        torch.manual_seed(0)
        args = detect.get_args([*COMMON, "--batch-size", batch_size, "--output", ".", "--pictures", "0"])
        seen, network = [], tiny()
        network.forward = lambda images, forward=network.forward: seen.append(len(images)) or forward(images)
        rows.append(detect.evaluate(args, network, dataset, torch.device("cpu")))
        assert seen == [1, 1, 1]
    assert rows[0] == rows[1] and rows[0]["images"] == 3


def test_schedule():
    """Epochs 9 and 11 of 12; 27 and 33 of 36."""
    values = [detect.schedule(step, 120, 10, 1.0) for step in range(120)]
    assert values[:2] == pytest.approx([0.1, 0.2]) and values[9:90] == [1.0] * 81
    assert values[90:110] == pytest.approx([0.1] * 20) and values[110:] == pytest.approx([0.01] * 10)


# ------------------------------------------------------------------------------------------------
# The stage

def test_training_begins_from_the_pre_trained_weights(chain):
    args = detect.get_args([*COMMON, *OWN["detect"], *chain.inputs["detect"]])
    network, _, digest = detect.build(args, 10)
    state = newest(chain.pretrain)
    vit = network.backbone.pyramid.vit
    assert digest == state["digest"] and torch.equal(vit.blocks[0].mlp.fc1.weight, state["model"]["blocks.0.mlp.fc1.weight"])
    assert network.transform.min_size == [24, 32] and network.transform.max_size == 32


def test_evaluation_repeats_what_the_training_logged(chain, capsys):
    row = run("detect", "--eval", "--init", str(chain.detect), "--output", "again")
    logged = log(chain.detect, "val")[-1]
    assert row == {key: logged[key] for key in row} and row["images"] == 100 and "mask_ap" in row
    assert sorted(path.name for path in Path("again").glob("*.png")) == [f"picture-{i}.png" for i in range(8)]
    message = fails(capsys, "detect", "--eval", "--init", str(chain.pretrain))
    assert "found a checkpoint of pretrain, expected one of detect" in message
    make_coco(Path("coco"))
    assert "has 10 classes, --data coco 3" in fails(capsys, "detect", "--eval", "--init", str(chain.detect), "--data", "coco")
    assert "found a checkpoint of detect" in fails(capsys, "detect", "--init", str(chain.detect))


def test_it_learns(folder):
    """Two kinds of rectangles, from scratch."""
    make_coco(Path("coco"), images=10)
    run("detect", "--data", "coco", "--init", "none", "--image-size", "48", "--min-size", "48", "--max-size", "64", "--batch-size", "8",
        "--steps", "60", "--lr", "6e-3", "--warmup-steps", "5", "--save-every", "60", "--drop-path", "0", "--patch-size", "8")
    rows = log("runs/demo/detect")
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert log("runs/demo/detect", "val")[-1]["box_ap50"] > 10 and math.isfinite(rows[-1]["grad_norm"])

