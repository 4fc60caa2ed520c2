"""All four stages on the embedded data set in a few minutes on a CPU, and the question that the paper asks:
does the same ViT, fine-tuned the same way on few labels, do better after pre-training on perceptual codes?

    python -m tools.demo

Runs the stages' own command lines, which it prints, in one process. Finished stages are not run again.
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


def run(stage, *flags):
    """Run one stage; returns its seconds, by its log, and the log's rows."""
    args = stage.get_args(["--recipe", "demo", *flags])
    print(f"\n$ python {args.stage}.py --recipe demo {' '.join(flags)}".rstrip(), flush=True)
    runtime.launch(stage.main, args)
    rows = [json.loads(line) for line in (Path(args.output) / "log.jsonl").read_text().splitlines()]
    return max(row["time"] for row in rows if "args" not in row) - rows[0]["time"], rows


def main():
    seconds, accuracy = {}, {"from scratch": [], "pre-trained": []}
    for stage in (teacher, tokenizer, pretrain):
        seconds[stage.__name__], rows = run(stage)
        if stage is tokenizer:
            codes = [row for row in rows if row.get("split") == "val"][-1]
    for seed in SEEDS:
        for arm, init in (("from scratch", "none"), ("pre-trained", "runs/demo/pretrain")):
            name = f"finetune-{arm.replace(' ', '-')}-{seed}"
            time_taken, rows = run(finetune, "--init", init, "--seed", str(seed), "--output", f"runs/demo/{name}")
            seconds["finetune"] = seconds.get("finetune", 0) + time_taken
            val = [row for row in rows if row.get("split") == "val"][-1]
            accuracy[arm].append(val["top1"])
    recipe = finetune.RECIPES["demo"]
    print(f"\nTop-1 on {val['images']} unseen images (chance 10 %), the same ViT fine-tuned the same way on "
          f"{recipe['label_fraction']:.0%} of the labels, {len(SEEDS)} seeds:\n")
    print("| | mean % | standard deviation | each seed |\n| --- | --- | --- | --- |")
    for arm, values in accuracy.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        print(f"| {arm} | {statistics.mean(values):.1f} | {statistics.stdev(values):.1f} | {each} |")
    print("\n| stage | seconds |\n| --- | --- |")
    for stage, value in (seconds | {"all": sum(seconds.values())}).items():
        print(f"| {stage} | {value:.0f} |")
    print(f"\nThe codebook: {codes['psnr']:.1f} dB, {codes['usage']:.0%} of the codes used. Pictures:\n"
          "runs/demo/tokenizer/reconstructions.png (originals over reconstructions)\n"
          "runs/demo/tokenizer/codes.png (a row of patches for each of the most used codes)")
    if min(accuracy["pre-trained"]) <= max(accuracy["from scratch"]):
        sys.exit("pre-training did not win on every seed: please report this output")


if __name__ == "__main__":
    main()
