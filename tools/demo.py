"""All four stages on drawn scenes in a few minutes on a CPU, and the question that the paper asks.

    python -m tools.demo

Does the same ViT, fine-tuned the same way on few labels, do better after pre-training on perceptual
codes? Runs the stages' own command lines, which it prints, in one process.
"""
import json
import statistics
import sys
from pathlib import Path

import finetune
import pretrain
import runtime
import teacher
import tokenizer

SEEDS = (0, 1, 2)
ARMS = {"from scratch": "none", "pre-trained": "runs/demo/pretrain"}    # name → --init


class Demo:
    """Runs stages; keeps their seconds, by stage."""

    def __init__(self):
        self.seconds = {}

    def run(self, stage, *flags):
        """Run a stage; returns the last evaluation in its log, or None."""
        args = stage.get_args(["--recipe", "demo", *flags])
        print(f"\n$ python {args.stage}.py --recipe demo {' '.join(flags)}".rstrip(), flush=True)
        runtime.launch(stage.main, args)
        lines = (Path(args.output) / "log.jsonl").read_text().splitlines()
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
    accuracy = {arm: [] for arm in ARMS}
    for seed in SEEDS:
        for arm, init in ARMS.items():
            output = f"runs/demo/finetune-{arm.replace(' ', '-')}-{seed}"
            row = demo.run(finetune, "--init", init, "--seed", str(seed), "--output", output)
            accuracy[arm].append(row["top1"])

    fraction = finetune.RECIPES["demo"]["label_fraction"]
    print(f"\nTop-1 on {row['images']} unseen images (chance 10 %), the same ViT fine-tuned the "
          f"same way on {fraction:.0%} of the labels, {len(SEEDS)} seeds:\n")
    print("| | mean % | standard deviation | each seed |\n| --- | --- | --- | --- |")
    for arm, values in accuracy.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        print(f"| {arm} | {mean:.1f} | {deviation:.1f} | {each} |")
    print("\n| stage | seconds |\n| --- | --- |")
    for stage, seconds in demo.seconds.items():
        print(f"| {stage} | {seconds:.0f} |")
    print(f"| all | {sum(demo.seconds.values()):.0f} |")
    print(f"\nThe codebook: {codes['psnr']:.1f} dB, {codes['usage']:.0%} of the codes used. "
          "Pictures:\n"
          "runs/demo/tokenizer/reconstructions.png (originals over reconstructions)\n"
          "runs/demo/tokenizer/codes.png (a row of patches for each of the most used codes)")
    if min(accuracy["pre-trained"]) <= max(accuracy["from scratch"]):
        sys.exit("pre-training did not win on every seed: please report this output")


if __name__ == "__main__":
    main()
