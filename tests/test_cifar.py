"""All stages a few steps at --recipe cifar: on real CIFAR-10 where it lies in data/ or, packed, in ../shared/data,
else on generated images in the same layout."""
import json
import math
import shutil
import tarfile
import time
from pathlib import Path

import pytest
import torch

import data
import runtime
from conftest import ROOT, STAGES

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NUMBER = {"train": 4, "val": 2}                            # images of a class
PACKED = ROOT.parent / "shared" / "data" / "cifar10.tar.xz"


def wanted(path):
    """cifar10/SPLIT/CLASS/NNNN.jpg, of the first few of each class."""
    split, name = path.parts[-3], path.stem
    return path.suffix == ".jpg" and split in NUMBER and name.isdigit() and int(name) < NUMBER[split]


def unpacked(root):
    """Copies from data/cifar10."""
    for path in filter(wanted, (ROOT / "data" / "cifar10").glob("*/*/*.jpg")):
        target = root.joinpath(*path.parts[-3:])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def unpack(root, seconds=20):
    """The wanted members of the archive, read as a stream; stops after some seconds."""
    end = time.time() + seconds
    with tarfile.open(PACKED, "r|xz") as archive:
        for member in archive:
            path = Path(member.name)
            if member.isfile() and wanted(path):
                target = root.joinpath(*path.parts[-3:])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
            if time.time() > end:
                return


def generate(root):
    for split, number in NUMBER.items():
        scenes = data.Synthetic(split, 10 * number)
        for i in range(10 * number):
            image, label = scenes[i]
            target = root / split / CLASSES[label] / f"{i // 10:04}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            image.save(target)


def complete(root):
    return sorted(len(list(folder.iterdir())) for folder in root.glob("*/*")) == [2] * 10 + [4] * 10


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    for make in (unpacked, unpack, generate):
        root = tmp_path_factory.mktemp(make.__name__)
        if make is not unpack or PACKED.exists():
            make(root)
        if complete(root):
            return root


def test_all_stages(cifar):
    for stage, module in STAGES.items():
        if "cifar" not in module.RECIPES:
            continue
        workers = "1" if stage == "teacher" else "0"
        module.main(module.get_args(["--recipe", "cifar", "--data", str(cifar), "--batch-size", "8", "--steps", "2",
                                     "--log-every", "1", "--workers", workers]))
        rows = [json.loads(line) for line in Path(f"runs/cifar/{stage}/log.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
        state = runtime.load_checkpoint(f"runs/cifar/{stage}", [stage])
        assert state["step"] == 2 and all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    images = [row["images"] for row in rows if row.get("split") == "val"]
    assert images == [20]                                   # each of the validation set
    assert sorted(path.name for path in (cifar / "train").iterdir()) == CLASSES


def test_generated_images_have_the_same_layout(folder):
    generate(folder)
    assert complete(folder) and data.load_dataset(str(folder), "val", 32).classes == CLASSES
