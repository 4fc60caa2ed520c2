"""Every test runs in an empty folder of its own, so that runs/ and data/ lie there."""
import multiprocessing
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import detect
import finetune
import pretrain
import segment
import teacher
import tokenizer

# Bits depend on the number of threads, and the tensors are too small to share out.
torch.set_num_threads(1)

STAGES = {stage.__name__: stage for stage in (teacher, tokenizer, pretrain, finetune, segment)}
if detect.COCO is not None:                                 # pycocotools is optional
    STAGES["detect"] = detect

# An epoch is 4 steps, the run 6: one evaluation in its midst, one at its end.
COMMON = ["--recipe", "demo", "--data", "synthetic:64", "--batch-size", "16", "--steps", "6",
          "--log-every", "2", "--save-every", "1", "--workers", "0"]
# Whatever is random is on: revived codes, jitter, drop path, mixing.
OWN = {
    "teacher": [],
    "tokenizer": ["--perceptual", "runs/demo/teacher", "--codebook-size", "32", "--decay", "0.8",
                  "--revive", "0.3"],
    "pretrain": ["--drop-path", "0.1", "--jitter", "0.4"],
    "finetune": ["--label-fraction", "1", "--mixup", "0.8", "--drop-path", "0.1"],
    "segment": ["--image-size", "32", "--drop-path", "0.1"],
    "detect": ["--image-size", "32", "--max-size", "32", "--channels", "16",
               "--boxes", "16", "--drop-path", "0.1"],
}


def pytest_configure(config):
    config.addinivalue_line("markers", "faults: what a long run meets")
    config.addinivalue_line("markers", "long: takes minutes; only run where -m names it")


def pytest_collection_modifyitems(config, items):
    if "long" in config.option.markexpr:
        return
    config.hook.pytest_deselected(items=[item for item in items if "long" in item.keywords])
    items[:] = [item for item in items if "long" not in item.keywords]


def pytest_sessionfinish():
    """A loader's workers ignore SIGTERM: after an error in one, its iterator would wait for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def run(stage, *flags):
    """A stage by its command line, in this process; later flags win."""
    module = STAGES[stage]
    return module.main(module.get_args([*COMMON, *OWN[stage], *flags]))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """All stages, trained once.

    .root: the folder of all; .teacher, .tokenizer, …: their runs; .inputs: the flags by which a
    stage that runs elsewhere reads the one before.
    """
    root = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage in STAGES:
            run(stage)
    runs = {stage: root / "runs" / "demo" / stage for stage in STAGES}
    inputs = {
        "teacher": [],
        "tokenizer": ["--perceptual", str(runs["teacher"])],
        "pretrain": ["--tokenizer", str(runs["tokenizer"])],
        "finetune": ["--init", str(runs["pretrain"])],
        "segment": ["--init", str(runs["pretrain"])],
        "detect": ["--init", str(runs["pretrain"])],
    }
    return SimpleNamespace(root=root, inputs=inputs, **runs)
