"""The paper's claim in miniature: with only the prediction target changed, do perceptual codes pre-train a better ViT?

    python -m tools.cifar10                    # --recipe cifar on a GPU, cifar-cpu elsewhere; make cifar10 does the same
    python -m tools.cifar10 --ablations        # and the paper's ablations

Runs the stages by the command lines that it prints, into runs/RECIPE/; what is finished is not run again, what was
stopped goes on where it was. Then writes RESULTS.md and the README's table from the logs.
"""
import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import finetune
import pretrain
import teacher
import tokenizer
from model import SIZES

ROOT = Path(__file__).parent.parent
ARMS = {
    "scratch": "fine-tuning alone",
    "scratch-long": "the same, for as long as pre-training and fine-tuning together",
    "pixel": "codes of the tokenizer with λ = 0",
    "peco": "**PeCo**: codes of the tokenizer with λ = 1",
    "random": "codes of an untrained tokenizer",
    "teacher": "the MoCo v3 teacher itself, fine-tuned",
}
# Untrained: at lr 0 only the codebook moves, from vectors of the first batch towards the means of the next ones.
TOKENIZERS = {"pixel": "--perceptual-weight 0", "peco": "", "random": "--perceptual-weight 0 --lr 0 --steps 50"}
FEW_LABELS = {                                             # our choice of lengths
    "cifar": {"10": "--label-fraction 0.1 --epochs 100", "1": "--label-fraction 0.01 --epochs 200 --batch-size 250"},
    "cifar-cpu": {"10": "--label-fraction 0.1 --epochs 15", "1": "--label-fraction 0.01 --epochs 50 --batch-size 50"},
}
SEARCH = {                                                 # from scratch: lr × drop path
    "cifar": [(lr, drop) for lr in (1e-3, 2e-3) for drop in (0.0, 0.1)],
    "cifar-cpu": [(lr, drop) for lr in (3e-3, 6e-3) for drop in (0.0, 0.1)],
}


def ablations(recipe):
    """The paper's tables: {title: {entry: (tokenizer's name, its flags, or None for one of the arms)}}."""
    size, depth = tokenizer.RECIPES[recipe]["codebook_size"], SIZES[pretrain.RECIPES[recipe]["model"]]["depth"]
    quarters = [depth * i // 4 for i in (1, 2, 3, 4)]
    return {
        "Weight λ": {"0": ("pixel", None), "0.3": ("lambda-0.3", "--perceptual-weight 0.3"), "1": ("peco", None),
                     "3": ("lambda-3", "--perceptual-weight 3")},
        "Layers": {" ".join(map(str, quarters)): ("peco", None), **{
            str(layer): (f"layer-{layer}", f"--perceptual-layers {layer}") for layer in quarters}},
        "Perceptual network": {"self-supervised": ("peco", None),  # not the network that judges the reconstructions
                               "supervised": ("supervised", f"--perceptual runs/{recipe}/finetune-scratch-0")},
        "Adversarial loss": {"none": ("peco", None), "PatchGAN, 0.1": ("adversarial", "--adversarial-weight 0.1")},
        "Codebook size": {str(size // 2): (f"codes-{size // 2}", f"--codebook-size {size // 2}"), str(size): ("peco", None),
                          str(size * 2): (f"codes-{size * 2}", f"--codebook-size {size * 2}")},
    }


# ------------------------------------------------------------------------------------------------
# Running

class Runner:
    """Runs command lines, `jobs` at a time, each in runs/RECIPE/NAME/; reads their logs. data: as --data of the stages;
    extra: more flags for every stage.

    A job's folder has a job.json: its command, its seconds so far, whether it is finished. To run it anew (another
    stage before it was, say), delete the folder.
    """

    def __init__(self, recipe, jobs=1, data=None, extra=()):
        self.recipe, self.jobs, self.folder = recipe, jobs, Path("runs") / recipe
        self.data, self.extra = ["--data", data] if data else [], list(extra)
        self.running, self.stopped = {}, False

    def stop(self, *_):
        self.stopped = True

    def job(self, name):
        file = self.folder / name / "job.json"
        return json.loads(file.read_text()) if file.exists() else dict(command=None, seconds=0.0, finished=False)

    def run(self, jobs):
        """Run {name: (script, flags)}, in any order."""
        todo = []
        for name, (script, flags) in jobs.items():
            if script == "tools.codewords":
                command = ["-m", script, f"{self.folder}/{name.removeprefix('codewords-')}", "--recipe", self.recipe, *flags.split()]
            else:
                command = [script, "--recipe", self.recipe, "--output", f"{self.folder}/{name}", *flags.split(), *self.extra]
            command = " ".join(["python", *command, *self.data])
            job = self.job(name)
            if job["command"] != command or not job["finished"]:
                todo.append((name, command))
        threads, failed = max(1, (os.cpu_count() or 1) // max(1, min(self.jobs, len(todo)))), None
        while todo or self.running:
            while todo and len(self.running) < self.jobs and not self.stopped:
                name, command = todo.pop(0)
                print(f"{time.strftime('%H:%M:%S')}  {command}", flush=True)
                (self.folder / name).mkdir(parents=True, exist_ok=True)
                with open(self.folder / name / "output.txt", "a") as output:
                    process = subprocess.Popen([sys.executable, *command.split()[1:]], stdout=output, stderr=output,
                                               env=os.environ | {"OMP_NUM_THREADS": str(threads)})
                self.running[name] = process, command, time.time()
            time.sleep(0.2)
            for name, (process, command, begun) in list(self.running.items()):
                if self.stopped:
                    process.terminate()                    # a stage then writes a checkpoint
                if process.poll() is not None:
                    del self.running[name]
                    job = dict(command=command, seconds=self.job(name)["seconds"] + time.time() - begun,
                               finished=process.returncode == 0, jobs=self.jobs)
                    (self.folder / name / "job.json").write_text(json.dumps(job))
                    if process.returncode and not self.stopped:
                        failed = failed or (name, process.returncode, command)
                        self.stop()
            if self.stopped and not self.running:
                if failed is None:
                    sys.exit("stopped: the same command goes on from here")
                print(*(self.folder / failed[0] / "output.txt").read_text().splitlines()[-10:], sep="\n")
                sys.exit(f"failed with status {failed[1]}: {failed[2]}")

    def rows(self, name):
        log = self.folder / name / "log.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def last(self, name, key, **match):
        """The newest value of `key` in a finished job's log, of the rows that match; None where there is none."""
        if not self.job(f"codewords-{name}" if "codewords" in match else name)["finished"]:
            return None
        found = [row[key] for row in self.rows(name) if key in row and all(row.get(k) == v for k, v in match.items())]
        return found[-1] if found else None

    def best_search(self):
        """(lr, drop path) of the best accuracy on the held-out training images."""
        scores = {(lr, drop): self.last(f"search-{lr:g}-{drop:g}", "top1", split="holdout") for lr, drop in SEARCH[self.recipe]}
        return max(scores, key=lambda setting: scores[setting] or 0.0)


def init(runner, arm, seed):
    if arm.startswith("scratch"):
        return "none"
    return f"{runner.folder}/teacher" if arm == "teacher" else f"{runner.folder}/pretrain-{arm}-{seed}"


def main_table(runner, seeds):
    """All jobs of the main table, level by level."""
    recipe, folder = runner.recipe, runner.folder
    runner.run({"teacher": ("teacher.py", "")})
    runner.run({f"tokenizer-{name}": ("tokenizer.py", flags) for name, flags in TOKENIZERS.items()}
               | {f"search-{lr:g}-{drop:g}": (
                   "finetune.py", f"--init none --holdout 0.1 --layer-decay 1 --lr {lr:g} --drop-path {drop:g}")
                  for lr, drop in SEARCH[recipe]})
    lr, drop = runner.best_search()
    runner.run({f"pretrain-{name}-{seed}": ("pretrain.py", f"--tokenizer {folder}/tokenizer-{name} --seed {seed}")
                for seed in seeds for name in TOKENIZERS})
    epochs = pretrain.RECIPES[recipe]["epochs"] + finetune.RECIPES[recipe]["epochs"]
    probed = [(arm, seed) for arm in TOKENIZERS for seed in seeds] + [("teacher", seeds[0])]
    jobs = {}
    for seed in seeds:
        for arm in ARMS:
            flags = f"--init {init(runner, arm, seed)} --seed {seed}"
            if arm.startswith("scratch"):
                flags += f" --layer-decay 1 --lr {lr:g} --drop-path {drop:g}"
            if arm == "scratch-long":
                jobs[f"finetune-{arm}-{seed}"] = ("finetune.py", f"{flags} --epochs {epochs}")
                continue
            jobs[f"finetune-{arm}-{seed}"] = ("finetune.py", flags)
            for percent, few in FEW_LABELS[recipe].items():
                jobs[f"finetune-{arm}-{seed}-{percent}"] = ("finetune.py", f"{flags} {few}")
            for kind in ("linear", "knn") if (arm, seed) in probed else ():
                jobs[f"{kind}-{arm}-{seed}"] = ("finetune.py", f"--init {init(runner, arm, seed)} --seed {seed} --probe {kind}")
    runner.run(jobs)
    runner.run({f"codewords-tokenizer-{name}": codewords(runner) for name in TOKENIZERS})


def codewords(runner):
    return "tools.codewords", f"--classifier {runner.folder}/finetune-scratch-long-0 --perceptual {runner.folder}/teacher"


def ablation_tables(runner):
    """Tokenizer, its codes, one pre-training and one fine-tuning each."""
    extra = {name: flags for table in ablations(runner.recipe).values() for name, flags in table.values() if flags is not None}
    runner.run({f"tokenizer-{name}": ("tokenizer.py", flags) for name, flags in extra.items()})
    runner.run({f"codewords-tokenizer-{name}": codewords(runner) for name in extra}
               | {f"pretrain-{name}-0": ("pretrain.py", f"--tokenizer {runner.folder}/tokenizer-{name} --seed 0") for name in extra})
    runner.run({f"finetune-{name}-0": ("finetune.py", f"--init {runner.folder}/pretrain-{name}-0 --seed 0") for name in extra})


# ------------------------------------------------------------------------------------------------
# Reporting

NOT_RUN = "*not run*"


def mean_and_error(values):
    """Mean and standard error of the mean over seeds; None where a seed is missing."""
    if not values or None in values:
        return None
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def show(values):
    pair = mean_and_error(values)
    return NOT_RUN if pair is None else f"{pair[0]:.1f} ± {pair[1]:.1f}" if len(values) > 1 else f"{pair[0]:.1f}"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracies(runner, arm, seeds, kind):
    """Top-1 in % of each seed. kind: "" (all labels), "-10", "-1", "linear" or "knn"."""
    if kind in ("linear", "knn"):
        return [runner.last(f"{kind}-{arm}-{seed}", "top1", probe=kind) for seed in (seeds[:1] if arm == "teacher" else seeds)]
    return [runner.last(f"finetune-{arm}-{seed}{kind}", "top1", split="val") for seed in seeds]


def arms_table(runner, seeds):
    rows = []
    for arm, text in ARMS.items():
        blank = {"scratch": ("linear", "knn"), "scratch-long": ("-10", "-1", "linear", "knn")}.get(arm, ())
        cells = ["" if kind in blank else show(accuracies(runner, arm, seeds, kind)) for kind in ("", "-10", "-1", "linear", "knn")]
        rows.append([text, *cells])
    return table(["pre-training", "top-1", "10 % of labels", "1 %", "linear probe", "kNN"], rows)


def codes_row(runner, name):
    folder, number = f"tokenizer-{name}", "{:.1f}"
    values = [(runner.last(folder, "psnr", split="val"), number), (runner.last(folder, "distance", codewords=True), "{:.3f}"),
              (runner.last(folder, "usage", split="val"), "{:.0%}"), (runner.last(folder, "perplexity", split="val"), "{:.0f}"),
              (runner.last(folder, "linear", codewords=True), number), (runner.last(folder, "reconstructions", codewords=True), number)]
    return [NOT_RUN if value is None else form.format(value) for value, form in values]


CODES_HEADER = ["PSNR, dB", "perceptual distance", "codes used", "perplexity", "linear on codes", "on reconstructions"]


def orderings(runner, seeds):
    """The claims that the table is to bear out, each with its verdict."""
    lines = []
    for better, worse in (("peco", "pixel"), ("pixel", "scratch"), ("peco", "scratch-long"), ("pixel", "random")):
        for kind, label in (("", "all labels"), ("-10", "10 %"), ("-1", "1 %")):
            if kind and worse == "scratch-long":
                continue
            one, two = (mean_and_error(accuracies(runner, arm, seeds, kind)) for arm in (better, worse))
            if one and two and len(seeds) > 1:
                gap, error = one[0] - two[0], (one[1] ** 2 + two[1] ** 2) ** 0.5
                verdict = "more than two standard errors" if gap > 2 * error else "**not** more than two standard errors"
                lines.append(f"- {better} over {worse}, {label}: {gap:+.1f} ± {error:.1f}, {verdict}")
    linear = {name: runner.last(f"tokenizer-{name}", "linear", codewords=True) for name in TOKENIZERS}
    if linear["peco"] and linear["pixel"]:
        lines.append(f"- a linear classifier on the codes: {linear['peco']:.1f} (peco) / {linear['pixel']:.1f} (pixel) = "
                     f"{linear['peco'] / linear['pixel']:.2f} times")
    return "\n".join(lines)


def section(runner, seeds):
    """This recipe's part of RESULTS.md."""
    recipe, first = runner.recipe, next((row for row in runner.rows("finetune-peco-0") if "args" in row), None)
    vit = pretrain.RECIPES[recipe]
    epochs = {stage.__name__: stage.RECIPES[recipe]["epochs"] for stage in (teacher, tokenizer, pretrain, finetune)}
    size = SIZES[vit["model"]]
    jobs = {path.parent.name: runner.job(path.parent.name) for path in sorted(runner.folder.glob("*/job.json"))}
    seconds = {}
    for name, job in jobs.items():
        seconds[name.split("-")[0]] = seconds.get(name.split("-")[0], 0.0) + job["seconds"]
    lines = [
        f"## `--recipe {recipe}`",
        f"ViT-{vit['model']} ({size['dim']} wide, {size['depth']} blocks), patches of {vit['patch_size']} of 32 pixels. Epochs: "
        + ", ".join(f"{stage} {number}" for stage, number in epochs.items()) + "; the rest: `RECIPES` in each script. "
        + (f"Hardware: {first['hardware']}, PyTorch {first['torch']}. Data: {describe(first['args']['data'])}." if first
           else f"Hardware: {NOT_RUN}."),
        f"Top-1 in % on the test images after the last epoch, mean ± standard error over {len(seeds)} seeds. A seed's pre-training "
        "and its fine-tuning have that seed; teacher and tokenizers were trained once, and their own spread is not in the error. "
        "The longer fine-tuning does not count the epochs of teacher and tokenizer, which PeCo takes besides.",
        f"<!-- {recipe} table -->\n{arms_table(runner, seeds)}\n<!-- end -->",
        orderings(runner, seeds),
        "### Codewords",
        "On the 10,000 validation images. Linear: top-1 of a linear classifier on an image's histogram of codes. On "
        "reconstructions: top-1 of the first seed of the longer fine-tuning from scratch"
        + (f" ({original:.1f} on the images themselves)." if (original := runner.last("tokenizer-peco", "originals", codewords=True))
           else "."),
        table(["tokenizer", *CODES_HEADER], [[ARMS[name], *codes_row(runner, name)] for name in TOKENIZERS]),
    ]
    pictures = ROOT / "results"
    for picture, text in (("reconstructions", "originals over reconstructions"),
                          ("codes", "a row of patches for each of the most used codes")):
        for name in ("pixel", "peco"):
            source = runner.folder / f"tokenizer-{name}" / f"{picture}.png"
            if runner.job(source.parent.name)["finished"]:
                pictures.mkdir(exist_ok=True)
                shutil.copy(source, pictures / f"{recipe}-{name}-{picture}.png")
                lines.append(f"{ARMS[name]}: {text}\n\n![{name} {picture}](results/{recipe}-{name}-{picture}.png)")
    searched = {(lr, drop): runner.last(f"search-{lr:g}-{drop:g}", "top1", split="holdout") for lr, drop in SEARCH[recipe]}
    lines += ["### Search from scratch",
              "Top-1 in % on a tenth of the training images, held out; the best is used by all fine-tuning from scratch.",
              table(["lr", "drop path", "top-1"], [[f"{lr:g}", f"{drop:g}", NOT_RUN if top1 is None else f"{top1:.1f}"]
                                                   for (lr, drop), top1 in searched.items()]),
              "### Ablations", "One seed each: read no small difference into them."]
    for title, entries in ablations(recipe).items():
        rows = [[entry, show([runner.last(f"finetune-{name}-0", "top1", split="val")]), *codes_row(runner, name)]
                for entry, (name, _) in entries.items()]
        lines.append(table([title, "top-1", *CODES_HEADER], rows))
    if seconds:
        side = max(job.get("jobs", 1) for job in jobs.values())
        lines += ["### Time", f"Seconds of the jobs from start to end, {side} side by side.",
                  table(["", "seconds"], [[name, f"{value:.0f}"] for name, value in (seconds | {"all": sum(seconds.values())}).items()])]
    return "\n\n".join(line for line in lines if line)


def describe(source):
    """--data, and whether its files are JPEG: CIFAR-10's own images are not."""
    jpeg = next(Path(source).glob("train/*/*.jpg"), None) if Path(source).is_dir() else None
    return f"`{source}`" + (", re-encoded as JPEG" if jpeg else "")


HEAD = """# Results on CIFAR-10
Written by `python -m tools.cifar10` (`make cifar10`) from the logs of the runs, never by hand.

From scratch, the lr and the drop path were searched on held-out training images; every other value is our choice, by
pilots on held-out training images. The test images chose nothing."""


def replace(text, name, new):
    """The part of a text between <!-- name --> and the next <!-- end -->."""
    found = re.search(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", text, re.S)
    return text[:found.end(1)] + new + "\n" + text[found.start(2):]


def write(runner, seeds):
    recipes, results, readme = ("cifar", "cifar-cpu"), ROOT / "RESULTS.md", ROOT / "README.md"
    parts = {recipe: section(Runner(recipe, runner.jobs), seeds) for recipe in recipes if recipe == runner.recipe}
    old = results.read_text() if results.exists() else ""
    for recipe in recipes:                                 # the other recipe's part stays as it is
        found = re.search(rf"^## `--recipe {recipe}`.*?(?=^## |\Z)", old, re.S | re.M)
        parts.setdefault(recipe, found[0].strip() if found else section(Runner(recipe, runner.jobs), seeds))
    results.write_text("\n\n".join([HEAD, *(parts[recipe] for recipe in recipes)]) + "\n")
    readme.write_text(replace(readme.read_text(), f"{runner.recipe} table", arms_table(runner, seeds)))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Flags not known here go to every stage.")
    gpu = torch.cuda.is_available()
    p.add_argument("--recipe", choices=SEARCH, default="cifar" if gpu else "cifar-cpu", help="default: by the hardware")
    p.add_argument("--data", default=None if Path(ROOT, "data/cifar10").is_dir() else "cifar10",
                   help="as of the stages; default: the recipe's data/cifar10 where it is a folder, else torchvision's download")
    p.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    p.add_argument("--jobs", type=int, default=2, help="command lines side by side")
    p.add_argument("--ablations", action="store_true", help="also the paper's ablations")
    p.add_argument("--report", action="store_true", help="run nothing, only write RESULTS.md and the README's table")
    args, extra = p.parse_known_args(argv)
    os.chdir(ROOT)
    runner, seeds = Runner(args.recipe, args.jobs, args.data, extra), range(args.seeds)
    if not args.report:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, runner.stop)
        main_table(runner, seeds)
        if args.ablations:
            ablation_tables(runner)
    write(runner, seeds)


if __name__ == "__main__":
    main()
