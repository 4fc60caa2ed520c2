"""All four stages on drawn scenes in a few minutes on a CPU, and the question that the paper asks.

    python -m tools.demo

Does the same ViT, fine-tuned the same way on few labels, do better after pre-training, and better
on perceptual codes than on pixel codes? Runs the stages' own command lines, which it prints, in one
process.
"""
import json
import statistics
import sys
from pathlib import Path

import finetune
import pretrain
import teacher
import tokenizer
from support import launch

SEEDS = (0, 1, 2)                                           # of fine-tuning
ARMS = {                                                    # name → (in words, --init)
    "scratch": ("from scratch", "none"),
    "pixel": ("pre-trained on pixel codes, λ = 0", "runs/demo/pretrain-pixel"),
    "peco": ("pre-trained on PeCo's codes, λ = 1", "runs/demo/pretrain"),
}


class Demo:
    """Runs stages; keeps their seconds, by stage."""

    def __init__(self):
        self.seconds = {}

    def run(self, stage, *flags):
        """Run a stage; returns the last evaluation in its log, or None."""
        flags = ["--recipe", "demo", "--workers", "0", *flags]      # so the scenes are drawn once
        args = stage.get_args(flags)
        print(f"\n$ python {args.stage}.py {' '.join(flags)}", flush=True)
        launch.start(stage.main, args)
        lines = (Path(args.output) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        begun = max(row["time"] for row in rows if "args" in row)       # of this time, if repeated
        self.seconds[args.stage] = self.seconds.get(args.stage, 0.0) + rows[-1]["time"] - begun
        evaluations = [row for row in rows if row.get("split") == "val"]
        return evaluations[-1] if evaluations else None


def main():
    demo = Demo()
    demo.run(teacher)
    codes = demo.run(tokenizer)
    demo.run(pretrain)
    pixel = "runs/demo/tokenizer-pixel"
    demo.run(tokenizer, "--perceptual-weight", "0", "--output", pixel)
    demo.run(pretrain, "--tokenizer", pixel, "--output", "runs/demo/pretrain-pixel")
    top1 = {arm: [] for arm in ARMS}
    for seed in SEEDS:
        for arm, (_, init) in ARMS.items():
            output = f"runs/demo/finetune-{arm}-{seed}"
            row = demo.run(finetune, "--init", init, "--seed", str(seed), "--output", output)
            top1[arm].append(row["top1"])
    print_results(demo, top1, codes, row["images"])
    if min(top1["pixel"] + top1["peco"]) <= max(top1["scratch"]):
        sys.exit("pre-training did not win on every seed: please report this output")


def print_results(demo, top1, codes, images):
    fraction = finetune.RECIPES["demo"]["label_fraction"]
    print(f"\nTop-1 on {images} unseen images (chance 10 %), the same ViT fine-tuned the same way "
          f"on {fraction:.0%} of the labels, {len(SEEDS)} seeds:\n")
    print("| | mean % | standard error | each seed |\n| --- | --- | --- | --- |")
    means, errors = {}, {}
    for arm, values in top1.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        means[arm] = statistics.mean(values)
        errors[arm] = statistics.stdev(values) / len(values) ** 0.5
        print(f"| {ARMS[arm][0]} | {means[arm]:.1f} | {errors[arm]:.1f} | {each} |")
    gap = means["peco"] - means["pixel"]
    error = (errors["peco"] ** 2 + errors["pixel"] ** 2) ** 0.5
    print(f"\nPeCo's codes over pixel codes: {gap:+.1f} ± {error:.1f}, of one pre-training each.")
    print("\n| stage | seconds |\n| --- | --- |")
    for stage, seconds in demo.seconds.items():
        print(f"| {stage} | {seconds:.0f} |")
    print(f"| all | {sum(demo.seconds.values()):.0f} |")
    print(f"\nThe codebook: {codes['psnr']:.1f} dB, {codes['usage']:.0%} of the codes used. "
          "Pictures:\n"
          "runs/demo/tokenizer/reconstructions.png (originals over reconstructions)\n"
          "runs/demo/tokenizer/codes.png (a row of patches for each of the most used codes)\n"
          "runs/demo/pretrain/masked.png (images, masked, predicted and true codes decoded)")


if __name__ == "__main__":
    main()
