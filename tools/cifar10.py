"""The paper's claim at a small size: do perceptual codes pre-train a better ViT than pixel codes?

    python -m tools.cifar10                 # --recipe cifar on a GPU, cifar-cpu elsewhere
    python -m tools.cifar10 --ablations     # the paper's ablations too

Only the target of pre-training differs. Runs the stages by the command lines that it prints, into
runs/RECIPE/; what is finished is not run again, what was stopped goes on where it was. Then writes
RESULTS.md and the README's table from the logs.
"""
import json
import os
import re
import shlex
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
import runtime
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
TOKENIZERS = {                  # arm → flags of tokenizer.py
    "pixel": "--perceptual-weight 0",
    "peco": "",
    # At lr 0 only the codebook moves: from vectors of the first batch towards means of the next.
    "random": "--perceptual-weight 0 --lr 0 --steps 50",
}
FEW_LABELS = {                  # % of the labels → flags of finetune.py; our choice of lengths
    "cifar": {
        "10": "--label-fraction 0.1 --epochs 100",
        "1": "--label-fraction 0.01 --epochs 200 --batch-size 250",
    },
    "cifar-cpu": {
        "10": "--label-fraction 0.1 --epochs 15",
        "1": "--label-fraction 0.01 --epochs 50 --batch-size 50",
    },
}
SEARCH = {                      # (lr, drop path) tried for training from scratch
    "cifar": [(1e-3, 0.0), (1e-3, 0.1), (2e-3, 0.0), (2e-3, 0.1)],
    "cifar-cpu": [(3e-3, 0.0), (3e-3, 0.1), (6e-3, 0.0), (6e-3, 0.1)],
}
NOT_RUN = "*not run*"


def ablations(recipe):
    """Tables as the paper's: {title: {entry: (name of its tokenizer, flags of tokenizer.py)}}.

    The flags are None where the tokenizer is one of the main table's.
    """
    codes = tokenizer.RECIPES[recipe]["codebook_size"]
    depth = SIZES[pretrain.RECIPES[recipe]["model"]]["depth"]
    quarters = [depth * i // 4 for i in (1, 2, 3, 4)]
    layers = {" ".join(map(str, quarters)): ("peco", None)}
    for layer in quarters:
        layers[str(layer)] = (f"layer-{layer}", f"--perceptual-layers {layer}")
    # Supervised: not by the network that judges the reconstructions.
    supervised = f"--perceptual runs/{recipe}/finetune-scratch-0"
    return {
        "Weight λ": {
            "0": ("pixel", None),
            "0.3": ("lambda-0.3", "--perceptual-weight 0.3"),
            "1": ("peco", None),
            "3": ("lambda-3", "--perceptual-weight 3"),
        },
        "Layers": layers,
        "Perceptual network": {
            "self-supervised": ("peco", None),
            "supervised": ("supervised", supervised),
        },
        "Adversarial weight": {
            "0": ("peco", None),
            "0.4": ("adversarial", "--adversarial-weight 0.4"),
        },
        "Codebook size": {
            f"{codes // 2}": (f"codes-{codes // 2}", f"--codebook-size {codes // 2}"),
            f"{codes}": ("peco", None),
            f"{codes * 2}": (f"codes-{codes * 2}", f"--codebook-size {codes * 2}"),
        },
    }


# ------------------------------------------------------------------------------------------------
# Running

class Runner:
    """Runs command lines, `jobs` side by side, each in runs/RECIPE/NAME/, and reads their logs.

    data: --data of the stages; None: the recipe's. extra: a list of more flags for every stage.

    A job's folder has a job.json: its command, its seconds so far, whether it is finished. To run a
    job anew (another stage before it was, say), delete the folder.
    """

    def __init__(self, recipe, jobs=1, data=None, extra=()):
        self.recipe, self.jobs, self.folder = recipe, jobs, Path("runs") / recipe
        self.data = ["--data", data] if data else []
        self.extra = list(extra)
        self.running = {}                                   # name → (process, command, start time)
        self.stopped = False
        self.failed = None                                  # (name, status, command) of the first

    def stop(self, *_):
        self.stopped = True

    def job(self, name):
        file = self.folder / name / "job.json"
        if not file.exists():
            return dict(command=None, seconds=0.0, finished=False)
        return json.loads(file.read_text())

    def command(self, name, script, flags):
        """A job's command line, a list. tools.codewords reads recipe and data from the run."""
        if script == "tools.codewords":
            return ["python", "-m", script, *flags.split()]
        if {"--epochs", "--steps"} & set(self.extra):       # then all jobs have that length
            flags = re.sub(r"--(epochs|steps) \S+", "", flags)
        own = ["--recipe", self.recipe, "--output", f"{self.folder}/{name}"]
        return ["python", script, *own, *flags.split(), *self.extra, *self.data]

    def run(self, jobs):
        """Run {name: (script, flags)}, in any order, those that are not finished."""
        todo = []
        for name, (script, flags) in jobs.items():
            command = self.command(name, script, flags)
            job = self.job(name)
            if not job["finished"] or job["command"] != shlex.join(command):
                todo.append((name, command))
        threads = max(1, (os.cpu_count() or 1) // max(1, min(self.jobs, len(todo))))
        while todo or self.running:
            while todo and len(self.running) < self.jobs and not self.stopped:
                self.start(*todo.pop(0), threads)
            time.sleep(0.2)
            for name in list(self.running):
                self.look_after(name)
            if self.stopped and not self.running:
                self.end()

    def start(self, name, command, threads):
        print(f"{time.strftime('%H:%M:%S')}  {shlex.join(command)}", flush=True)
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "a") as output:
            process = subprocess.Popen(
                [sys.executable, *command[1:]], stdout=output, stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        self.running[name] = (process, command, time.time())

    def look_after(self, name):
        """Note a job that ended; one that failed stops the others."""
        process, command, begun = self.running[name]
        if self.stopped:
            process.terminate()                             # a stage then writes a checkpoint
        status = process.poll()
        if status is None:
            return
        del self.running[name]
        seconds = self.job(name)["seconds"] + time.time() - begun
        job = dict(command=shlex.join(command), seconds=seconds, finished=status == 0,
                   jobs=self.jobs)
        (self.folder / name / "job.json").write_text(json.dumps(job))
        if status and not self.stopped:
            self.failed = (name, status, shlex.join(command))
            self.stop()

    def end(self):
        if self.failed is None:
            sys.exit("stopped: the same command goes on from here")
        name, status, command = self.failed
        output = (self.folder / name / "output.txt").read_text(encoding="utf-8").splitlines()
        print(*output[-10:], sep="\n")
        sys.exit(f"failed with status {status}: {command}")

    # ---- What was logged

    def rows(self, name):
        log = self.folder / name / "log.jsonl"
        if not log.exists():
            return []
        return [json.loads(line) for line in log.read_text().splitlines()]

    def last(self, name, key, **match):
        """The newest value of `key` in a finished job's log, of rows that match; else None."""
        job = f"codewords-{name}" if "codewords" in match else name     # in the tokenizer's log
        if not self.job(job)["finished"]:
            return None
        for row in reversed(self.rows(name)):
            if key in row and match.items() <= row.items():
                return row[key]
        return None

    def search(self):
        """{(lr, drop path) from scratch: top-1 in % on held-out training images, or None}"""
        return {setting: self.last(search_name(*setting), "top1", split="holdout")
                for setting in SEARCH[self.recipe]}


def search_name(lr, drop_path):
    return f"search-{lr:g}-{drop_path:g}"


def from_scratch(lr, drop_path):
    """Flags of finetune.py."""
    return f"--layer-decay 1 --lr {lr:g} --drop-path {drop_path:g}"


def main_table(runner, seeds):
    """Run all jobs of the main table, level by level."""
    folder = runner.folder
    runner.run({"teacher": ("teacher.py", "")})

    jobs = {f"tokenizer-{arm}": ("tokenizer.py", flags) for arm, flags in TOKENIZERS.items()}
    for setting in SEARCH[runner.recipe]:
        flags = f"--init none --holdout 0.1 {from_scratch(*setting)}"
        jobs[search_name(*setting)] = ("finetune.py", flags)
    runner.run(jobs)
    scores = runner.search()
    best = max(scores, key=lambda setting: scores[setting] or 0.0)

    jobs = {}
    for seed in seeds:
        for arm in TOKENIZERS:
            jobs[f"pretrain-{arm}-{seed}"] = pretraining(runner, arm, seed)
    runner.run(jobs)

    jobs = {}
    for seed in seeds:
        for arm in ARMS:
            jobs |= finetuning(runner, arm, seed, best)
        for arm in TOKENIZERS:
            jobs |= probes(arm, seed, f"{folder}/pretrain-{arm}-{seed}")
    jobs |= probes("teacher", seeds[0], f"{folder}/teacher")
    runner.run(jobs)

    runner.run({f"codewords-tokenizer-{arm}": codewords(runner, arm) for arm in TOKENIZERS})


def pretraining(runner, name, seed):
    flags = f"--tokenizer {runner.folder}/tokenizer-{name} --seed {seed}"
    return "pretrain.py", flags


def finetuning(runner, arm, seed, best):
    """Jobs of an arm: all labels and, but for the longer one from scratch, few of them."""
    recipe, name = runner.recipe, f"finetune-{arm}-{seed}"
    if arm in ("scratch", "scratch-long"):
        flags = f"--init none --seed {seed} {from_scratch(*best)}"
    elif arm == "teacher":
        flags = f"--init {runner.folder}/teacher --seed {seed}"
    else:
        flags = f"--init {runner.folder}/pretrain-{arm}-{seed} --seed {seed}"
    if arm == "scratch-long":
        epochs = pretrain.RECIPES[recipe]["epochs"] + finetune.RECIPES[recipe]["epochs"]
        return {name: ("finetune.py", f"{flags} --epochs {epochs}")}
    jobs = {name: ("finetune.py", flags)}
    for percent, few in FEW_LABELS[recipe].items():
        jobs[f"{name}-{percent}"] = ("finetune.py", f"{flags} {few}")
    return jobs


def probes(arm, seed, init):
    return {f"{kind}-{arm}-{seed}": ("finetune.py", f"--init {init} --seed {seed} --probe {kind}")
            for kind in ("linear", "knn")}


def codewords(runner, name):
    folder = runner.folder
    flags = (f"{folder}/tokenizer-{name} --classifier {folder}/finetune-scratch-long-0 "
             f"--perceptual {folder}/teacher")
    return "tools.codewords", flags


def ablation_tables(runner):
    """Run a tokenizer, its codewords, one pre-training and one fine-tuning for each entry."""
    own = {}                                                # name → flags of tokenizer.py
    for entries in ablations(runner.recipe).values():
        for name, flags in entries.values():
            if flags is not None:
                own[name] = flags
    runner.run({f"tokenizer-{name}": ("tokenizer.py", flags) for name, flags in own.items()})
    jobs = {}
    for name in own:
        jobs[f"codewords-tokenizer-{name}"] = codewords(runner, name)
        jobs[f"pretrain-{name}-0"] = pretraining(runner, name, seed=0)
    runner.run(jobs)
    runner.run({f"finetune-{name}-0": ("finetune.py",
                                       f"--init {runner.folder}/pretrain-{name}-0 --seed 0")
                for name in own})


# ------------------------------------------------------------------------------------------------
# Tables

def mean_and_error(values):
    """Mean and standard error of the mean over seeds; None where a seed is missing."""
    if not values or None in values:
        return None
    if len(values) == 1:
        return values[0], float("nan")
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def show(values):
    pair = mean_and_error(values)
    if pair is None:
        return NOT_RUN
    mean, error = pair
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {error:.1f}"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracies(runner, arm, seeds, kind):
    """Top-1 in % of each seed. kind: "" (all labels), "-10", "-1", "linear" or "knn"."""
    if kind not in ("linear", "knn"):
        names = [f"finetune-{arm}-{seed}{kind}" for seed in seeds]
        return [runner.last(name, "top1", split="val") for name in names]
    if arm == "teacher":                                    # there is only one
        seeds = seeds[:1]
    return [runner.last(f"{kind}-{arm}-{seed}", "top1", probe=kind) for seed in seeds]


def arms_table(runner, seeds):
    kinds = {"": "top-1", "-10": "10 % of labels", "-1": "1 %", "linear": "linear probe",
             "knn": "kNN"}
    blank = {"scratch": ("linear", "knn"), "scratch-long": ("-10", "-1", "linear", "knn")}
    rows = []
    for arm, text in ARMS.items():
        cells = [text]
        for kind in kinds:
            asked = kind not in blank.get(arm, ())
            cells.append(show(accuracies(runner, arm, seeds, kind)) if asked else "")
        rows.append(cells)
    return table(["pre-training", *kinds.values()], rows)


CODES = {                       # column → (key in the tokenizer's log, rows that have it, format)
    "PSNR, dB": ("psnr", dict(split="val"), ".1f"),
    "perceptual distance": ("distance", dict(codewords=True), ".3f"),
    "codes used": ("usage", dict(split="val"), ".0%"),
    "perplexity": ("perplexity", dict(split="val"), ".0f"),
    "linear on codewords": ("linear", dict(codewords=True), ".1f"),
    "on reconstructions": ("reconstructions", dict(codewords=True), ".1f"),
}


def codes_row(runner, name):
    cells = []
    for key, match, form in CODES.values():
        value = runner.last(f"tokenizer-{name}", key, **match)
        cells.append(NOT_RUN if value is None else format(value, form))
    return cells


def claims(runner, seeds):
    """The claims that the table is to bear out, each with its verdict."""
    kinds = {"": "all labels", "-10": "10 %", "-1": "1 %"}
    lines = []
    for better, worse in (("peco", "pixel"), ("pixel", "scratch"), ("peco", "scratch-long"),
                          ("pixel", "random")):
        for kind, label in kinds.items():
            one = mean_and_error(accuracies(runner, better, seeds, kind))
            two = mean_and_error(accuracies(runner, worse, seeds, kind))
            if one is None or two is None or len(seeds) == 1:
                continue
            gap = one[0] - two[0]
            error = (one[1] ** 2 + two[1] ** 2) ** 0.5
            verdict = "" if gap > 2 * error else "**not** "
            lines.append(f"- {better} over {worse}, {label}: {gap:+.1f} ± {error:.1f}, "
                         f"{verdict}more than two standard errors")
    peco = runner.last("tokenizer-peco", "linear", codewords=True)
    pixel = runner.last("tokenizer-pixel", "linear", codewords=True)
    if peco and pixel:
        lines.append(f"- the linear classifier on the codewords: {peco:.1f} (peco) / {pixel:.1f} "
                     f"(pixel) = {peco / pixel:.2f} times")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# RESULTS.md and the README's table

HEAD = """# Results on CIFAR-10
Written by `python -m tools.cifar10` (`make cifar10`) from the logs of the runs, never by hand.

From scratch, the lr and the drop path were searched on held-out training images; every other value
is our choice, by pilots on held-out training images. The test images chose nothing."""


def section(runner, seeds):
    """This recipe's part of RESULTS.md."""
    arms = arms_table(runner, seeds)
    original = runner.last("tokenizer-peco", "originals", codewords=True)
    on_originals = f" ({original:.1f} on the images themselves)" if original else ""
    searched = []
    for (lr, drop_path), top1 in runner.search().items():
        searched.append([f"{lr:g}", f"{drop_path:g}", NOT_RUN if top1 is None else f"{top1:.1f}"])
    parts = [
        f"## `--recipe {runner.recipe}`",
        setting(runner),
        "Top-1 in % on the test images after the last epoch, mean ± standard error over "
        f"{len(seeds)} seeds. A seed's pre-training and its fine-tuning have that seed; teacher "
        "and tokenizers were trained once, and their own spread is not in the error. The longer "
        "fine-tuning does not count the epochs of teacher and tokenizer, which PeCo takes besides.",
        f"<!-- {runner.recipe} table -->\n{arms}\n<!-- end -->",
        claims(runner, seeds),
        "### Codewords",
        "On the 10,000 validation images. Linear: top-1 of a linear classifier on the "
        "average-pooled codewords (the paper's Table 4). On reconstructions: top-1 of the first "
        f"seed of the longer fine-tuning from scratch{on_originals}.",
        table(["tokenizer", *CODES],
              [[ARMS[name], *codes_row(runner, name)] for name in TOKENIZERS]),
        *pictures(runner),
        "### Search from scratch",
        "Top-1 in % on a tenth of the training images, held out; the best is used by all "
        "fine-tuning from scratch.",
        table(["lr", "drop path", "top-1"], searched),
        "### Ablations",
        "One seed each: read no small difference into them.",
    ]
    for title, entries in ablations(runner.recipe).items():
        rows = []
        for entry, (name, _) in entries.items():
            top1 = runner.last(f"finetune-{name}-0", "top1", split="val")
            rows.append([entry, show([top1]), *codes_row(runner, name)])
        parts.append(table([title, "top-1", *CODES], rows))
    parts += times(runner)
    return "\n\n".join(part for part in parts if part)


def setting(runner):
    """The sentences on network, epochs, hardware and data."""
    vit = pretrain.RECIPES[runner.recipe]
    size = SIZES[vit["model"]]
    epochs = ", ".join(f"{stage.__name__} {stage.RECIPES[runner.recipe]['epochs']}"
                       for stage in (teacher, tokenizer, pretrain, finetune))
    text = (f"ViT-{vit['model']} ({size['dim']} wide, {size['depth']} blocks), patches of "
            f"{vit['patch_size']} of 32 pixels. Epochs: {epochs}; the rest: `RECIPES` in each "
            "script. ")
    first = next((row for row in runner.rows("finetune-peco-0") if "args" in row), None)
    if first is None:
        return f"{text}Hardware: {NOT_RUN}."
    source = Path(first["args"]["data"])
    jpeg = ", re-encoded as JPEG" if any(source.glob("train/*/*.jpg")) else ""  # not CIFAR-10's own
    return (f"{text}Hardware: {first['hardware']}, PyTorch {first['torch']}. "
            f"Data: `{source}`{jpeg}.")


def pictures(runner):
    """Copies the tokenizers' pictures to results/; the paragraphs that show them."""
    captions = {"reconstructions": "originals over reconstructions",
                "codes": "a row of patches for each of the most used codes"}
    parts = []
    for picture, caption in captions.items():
        for name in ("pixel", "peco"):
            if not runner.job(f"tokenizer-{name}")["finished"]:
                continue
            target = f"results/{runner.recipe}-{name}-{picture}.png"
            (ROOT / "results").mkdir(exist_ok=True)
            shutil.copy(runner.folder / f"tokenizer-{name}" / f"{picture}.png", ROOT / target)
            parts.append(f"{ARMS[name]}: {caption}\n\n![{name} {picture}]({target})")
    return parts


def times(runner):
    """Paragraphs on the jobs' seconds, by stage."""
    seconds, side_by_side = {}, 1
    for path in sorted(runner.folder.glob("*/job.json")):
        job = json.loads(path.read_text())
        stage = path.parent.name.split("-")[0]
        seconds[stage] = seconds.get(stage, 0.0) + job["seconds"]
        side_by_side = max(side_by_side, job.get("jobs", 1))
    if not seconds:
        return []
    seconds["all"] = sum(seconds.values())
    return ["### Time", f"Seconds of the jobs from start to end, {side_by_side} side by side.",
            table(["", "seconds"], [[name, f"{value:.0f}"] for name, value in seconds.items()])]


def replace(text, name, new):
    """A text with `new` between <!-- name --> and the next <!-- end -->."""
    found = re.search(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", text, re.S)
    return text[:found.end(1)] + new + "\n" + text[found.start(2):]


def write(runner, seeds):
    """Write this recipe's part of RESULTS.md, and the README's table; the other part stays."""
    results, readme = ROOT / "RESULTS.md", ROOT / "README.md"
    old = results.read_text(encoding="utf-8") if results.exists() else ""
    parts = [HEAD]
    for recipe in SEARCH:
        found = re.search(rf"^## `--recipe {recipe}`.*?(?=^## |\Z)", old, re.S | re.M)
        if recipe == runner.recipe or not found:
            parts.append(section(Runner(recipe), seeds))
        else:
            parts.append(found[0].strip())
    results.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    arms = arms_table(runner, seeds)
    text = replace(readme.read_text(encoding="utf-8"), f"{runner.recipe} table", arms)
    readme.write_text(text, encoding="utf-8")


def main(argv=None):
    p = runtime.Parser("tools.cifar10", __doc__,
                       epilog="Flags not known here go to every stage.")
    p.add_argument("--recipe", choices=SEARCH,
                   default="cifar" if torch.cuda.is_available() else "cifar-cpu",
                   help="default: by the hardware")
    p.add_argument("--data", default=None if Path(ROOT, "data/cifar10").is_dir() else "cifar10",
                   help="dataset, as the stages' --data; default: the recipe's data/cifar10 where "
                        "it is a folder, else torchvision's download")
    p.add_argument("--seeds", type=runtime.positive, default=3, help="number of seeds, from 0")
    p.add_argument("--jobs", type=runtime.positive, default=2, help="command lines side by side")
    p.add_argument("--ablations", action="store_true", help="also the paper's ablations")
    p.add_argument("--report", action="store_true",
                   help="run nothing, only write RESULTS.md and the README's table")
    args, extra = p.parse_known_args(argv)
    os.chdir(ROOT)
    runner = Runner(args.recipe, args.jobs, args.data, extra)
    seeds = range(args.seeds)
    if not args.report:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, runner.stop)
        main_table(runner, seeds)
        if args.ablations:
            ablation_tables(runner)
    write(runner, seeds)


if __name__ == "__main__":
    main()
