"""The paper's claim on drawn scenes, in a few minutes on a CPU: do perceptual codes teach more?

    python -m tools.demo

The same ViT is fine-tuned the same way on few labels: from scratch, after pre-training on pixel
codes (λ = 0), and after pre-training on PeCo's (λ = 1). The perceptual network is a supervised one
(a row of the paper's Table 5), trained on sixteen other shapes: it has seen neither a label nor a
shape of the ten that are asked for. Two chains of stages run side by side, a core each. It fails
unless PeCo's codes beat pixel codes, and those no pre-training, by more than two standard errors
over the seeds of fine-tuning. There is one pre-training for each kind of codes.
"""
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import data
import finetune
import pretrain
import tokenizer
from support import launch
from tools.figures import masked_predictions, reconstructions

FOLDER = Path("runs/demo")
SEEDS = (0, 1, 2)                                           # of fine-tuning
ARMS = {                                                    # name → in words
    "scratch": "from scratch",
    "pixel": "pre-trained on pixel codes, λ = 0",
    "peco": "pre-trained on PeCo's codes, λ = 1",
}
# Our choice: as tools/cifar10 trains its supervised network, on scenes of the other shapes.
NETWORK = ("--data synthetic-others:6000 --init none --layer-decay 1 --label-fraction 1 "
           "--batch-size 128 --lr 3e-3 --warmup-epochs 0.5 --epochs 5 --save-every 5")


def chain(arm):
    """The stages of an arm as (stage, run, its own flags), in their order."""
    if arm == "peco":
        yield finetune, "network", NETWORK
        yield tokenizer, "tokenizer", ""
        yield pretrain, "pretrain", ""
        starts = {"peco": f"{FOLDER}/pretrain"}
    else:                                                   # the shorter chain has time for both
        yield tokenizer, "tokenizer-pixel", "--perceptual-weight 0"
        yield pretrain, "pretrain-pixel", f"--tokenizer {FOLDER}/tokenizer-pixel"
        starts = {"pixel": f"{FOLDER}/pretrain-pixel", "scratch": "none"}
    for name, init in starts.items():
        for seed in SEEDS:
            yield finetune, f"finetune-{name}-{seed}", f"--init {init} --seed {seed}"


def run_chain(arm):
    """Run the stages of an arm in one process, so that the scenes are drawn once.

    Returns the last evaluation of each run, with the seconds that it took.
    """
    torch.set_num_threads(1)                                # more gain nothing at this size
    evaluations = {}
    for stage, run, flags in chain(arm):
        flags = f"--recipe demo --workers 0 --output {FOLDER}/{run} {flags}".split()
        launch.say(f"$ python {stage.__name__}.py {' '.join(flags)}")
        begun = time.time()
        with open(os.devnull, "w") as unseen, contextlib.redirect_stdout(unseen):
            launch.start(stage.main, stage.get_args(flags))
        lines = (FOLDER / run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        row = [row for row in rows if row.get("split") == "val"][-1]
        evaluations[run] = row | dict(seconds=time.time() - begun)
        shown = {key: row[key] for key in ("psnr", "accuracy", "top1") if key in row}
        launch.say(f"{FOLDER}/{run}: {evaluations[run]['seconds']:.0f} s, "
                   + ", ".join(f"{key} {value:.3g}" for key, value in shown.items()))
    return evaluations


def main():
    begun = time.time()
    os.environ["TQDM_DISABLE"] = "1"                        # two bars would overwrite one another
    context = multiprocessing.get_context("spawn")          # a process of its own for the threads
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        evaluations = {}
        for arm in pool.map(run_chain, ("peco", "pixel")):
            evaluations |= arm
    rows = reconstructions([FOLDER / "tokenizer-pixel", FOLDER / "tokenizer"])
    rows += masked_predictions(FOLDER / "pretrain")[1:3]
    data.save_rows(rows, FOLDER / "demo.png")
    top1 = {arm: [evaluations[f"finetune-{arm}-{seed}"]["top1"] for seed in SEEDS] for arm in ARMS}
    images = evaluations["finetune-peco-0"]["images"]
    print(table(top1, images))
    print(f"{FOLDER}/demo.png shows, from the top: images; reconstructions from pixel codes, from\n"
          f"PeCo's codes; what the ViT sees; PeCo's codes that it predicts, decoded.\n"
          f"{time.time() - begun:.0f} s")
    claims = ("peco", "pixel"), ("pixel", "scratch")
    failed = [f"{better} over {worse}" for better, worse in claims
              if not exceeds(top1[better], top1[worse])]
    if failed:
        sys.exit(f"not by two standard errors: {', '.join(failed)}: please report this output")


def error(values):
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5


def exceeds(better, worse):
    """Whether one mean exceeds another by more than two standard errors of the difference."""
    gap = statistics.mean(better) - statistics.mean(worse)
    return gap > 2 * (error(better) ** 2 + error(worse) ** 2) ** 0.5


def table(top1, images):
    fraction = finetune.RECIPES["demo"]["label_fraction"]
    lines = [
        f"\nTop-1 on {images} unseen images (chance 10 %), the same ViT fine-tuned the same way on "
        f"{fraction:.0%} of\nthe labels; {len(SEEDS)} seeds of fine-tuning after one pre-training "
        "for each kind of codes:\n",
        "| | mean % | standard error | each seed |",
        "| --- | --- | --- | --- |",
    ]
    for arm, values in top1.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        mean = statistics.mean(values)
        lines.append(f"| {ARMS[arm]} | {mean:.1f} | {error(values):.1f} | {each} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    launch.launch_tool("demo", main)
