"""All stages a few steps at --recipe cifar.

On real CIFAR-10 where it lies in data/, else on drawn images in the same layout.
"""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, STAGES

import data
from support import checkpoint
from support.scenes import Synthetic

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NUMBER = {"train": 4, "val": 2}                             # images of a class


def files():
    """The first few images of each class: SPLIT/CLASS/NNNN.jpg."""
    for split, number in NUMBER.items():
        for name in CLASSES:
            for i in range(number):
                yield f"{split}/{name}/{i:04}.jpg"


def copy(source, root):
    for file in files():
        target = root / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / file, target)


def generate(root):
    """The same files with drawn scenes in them."""
    for split, number in NUMBER.items():
        scenes = Synthetic(split, 10 * number)
        for i in range(10 * number):
            image, label = scenes[i]
            target = root / split / CLASSES[label] / f"{i // 10:04}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            image.save(target)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    source = ROOT / "data" / "cifar10"
    if all((source / file).exists() for file in files()):
        copy(source, root)
    else:
        generate(root)
    return root


def test_all_stages(cifar):
    stages = [stage for stage in STAGES if "cifar" in STAGES[stage].RECIPES]
    assert stages == ["teacher", "tokenizer", "pretrain", "finetune"]
    for stage in stages:
        module = STAGES[stage]
        module.main(module.get_args([
            "--recipe", "cifar", "--data", str(cifar), "--batch-size", "8", "--steps", "2",
            "--log-every", "1", "--workers", "1" if stage == "teacher" else "0"]))
        lines = Path(f"runs/cifar/{stage}/log.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        losses = [row["loss"] for row in rows if "loss" in row and "split" not in row]
        assert len(losses) == 2
        assert all(math.isfinite(loss) for loss in losses)
        state = checkpoint.load(f"runs/cifar/{stage}", [stage])
        assert state["step"] == 2
        assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    images = [row["images"] for row in rows if row.get("split") == "val"]
    assert images == [20]                                   # each of the validation set
    assert sorted(path.name for path in (cifar / "train").iterdir()) == CLASSES


def test_generated_images_have_the_same_layout(folder):
    generate(folder)
    assert {str(path.relative_to(folder)) for path in folder.glob("*/*/*")} == set(files())
    assert data.load_dataset(str(folder), "val", 32).classes == CLASSES
