"""The paper's claim at a small size: do perceptual codes pre-train a better ViT than pixel codes?

    python -m tools.cifar10                 # --recipe cifar on a GPU, cifar-cpu elsewhere
    python -m tools.cifar10 --ablations     # the paper's ablations too

Only the target of pre-training differs. Runs the stages by the command lines that it prints, into
runs/RECIPE/; what is finished is not run again, what was stopped goes on where it was. At its end,
and when stopped, it writes the figures of what is finished to results/RECIPE.json, and from these
RESULTS.md and the README's table. So seeds may be run one after another; on another machine too, if
it has the perceptual networks and the search of the first in its runs/. With --steps or --epochs,
to try it, it has a folder of its own and only prints its table.
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
import tokenizer
from model import SIZES
from support.flags import Parser, count, positive

ROOT = Path(__file__).parent.parent
ARMS = {
    "scratch": "fine-tuning alone",
    "scratch-long": "the same, for as long as pre-training and fine-tuning together",
    "random": "codes of an untrained tokenizer",
    "pixel": "codes of a tokenizer with λ = 0",
    "peco": "**PeCo**, codes with λ = 1: self-supervised network",
    "supervised": "**PeCo**, codes with λ = 1: supervised network",
    "teacher": "the self-supervised network itself, fine-tuned with each seed",
}
TOKENIZERS = {                  # arm → flags of tokenizer.py
    # At lr 0 only the codebook moves: from vectors of the first batch towards means of the next.
    "random": "--perceptual-weight 0 --lr 0 --steps 50",
    "pixel": "--perceptual-weight 0",
    "peco": "--perceptual {folder}/teacher",
    "supervised": "--perceptual {folder}/supervised",
}
# Epochs of the supervised network, which is trained on all labels of the training images; its seed
# is that of no fine-tuning.
SUPERVISED = {"cifar": "--epochs 200 --seed 1000", "cifar-cpu": "--epochs 30 --seed 1000"}
FEW_LABELS = {                  # job → flags of finetune.py; our choice of lengths
    "cifar": {
        "finetune-10": "--label-fraction 0.1 --epochs 100",
        "finetune-1": "--label-fraction 0.01 --epochs 200 --batch-size 250",
    },
    "cifar-cpu": {
        "finetune-10": "--label-fraction 0.1 --epochs 15",
        "finetune-1": "--label-fraction 0.01 --epochs 50 --batch-size 50",
    },
}
SEARCH = {                      # (lr, drop path) tried for training from scratch
    "cifar": [(1e-3, 0.0), (1e-3, 0.1), (2e-3, 0.0), (2e-3, 0.1)],
    "cifar-cpu": [(1.5e-3, 0.0), (3e-3, 0.0), (6e-3, 0.0), (1.2e-2, 0.0)],
}
KINDS = {                       # jobs that evaluate an arm → column of the main table
    "finetune": "all labels",
    "finetune-10": "10 % of labels",
    "finetune-1": "1 %",
    "linear": "linear probe",
    "knn": "kNN",
}
JUDGE = "scratch-long"          # whose classifier judges reconstructions: no perceptual network
ATTACKED = 1000                 # test images that are attacked; our choice
CHANCE = 10.0                   # % of ten classes
NOT_RUN = "*not run*"


def ablations(recipe):
    """Tables as the paper's: {title: {entry: (name, flags of tokenizer.py, of pretrain.py)}}.

    The flags of tokenizer.py are None where the tokenizer is one of the main table's, of seed 0.
    """
    codes = tokenizer.RECIPES[recipe]["codebook_size"]
    depth = SIZES[pretrain.RECIPES[recipe]["model"]]["depth"]
    quarters = [depth * i // 4 for i in (1, 2, 3, 4)]
    peco = ("peco", None, "")
    weights = {"0": ("pixel", None, "")}
    for weight in ("0.1", "0.3", "1", "3", "10"):
        flags = f"--perceptual-weight {weight}"
        weights[weight] = peco if weight == "1" else (f"lambda-{weight}", flags, "")
    layers = {" ".join(map(str, quarters)): peco}
    for layer in quarters:
        layers[str(layer)] = (f"layer-{layer}", f"--perceptual-layers {layer}", "")
    sizes = {}
    for size in (codes // 2, codes, codes * 2):
        flags = f"--codebook-size {size}"
        sizes[f"{size}"] = peco if size == codes else (f"codes-{size}", flags, "")
    return {
        "Weight λ (Table 10)": weights,
        "Layers": layers,
        "Perceptual network (Table 5)": {
            "none": ("pixel", None, ""),
            "self-supervised": peco,
            "supervised": ("supervised", None, ""),
        },
        "Adversarial weight (Table 7)": {
            "0": peco,
            "0.4": ("adversarial", "--adversarial-weight 0.4", ""),
        },
        "Codebook size": sizes,
        "Encoder and decoder (Table 8)": {
            "PeCo": peco,
            "PeCo_MAE": ("mae", None, "--mae --mask-ratio 0.75"),
            "the same on pixel codes": ("mae-pixel", "--perceptual-weight 0",
                                        "--mae --mask-ratio 0.75"),
        },
    }


# ------------------------------------------------------------------------------------------------
# Running

class Runner:
    """Runs command lines, `jobs` side by side, each in runs/RECIPE/NAME/, and reads their logs.

    data: --data of the stages; None: the recipe's. length: two words, --steps or --epochs and how
    many, of every job, whose figures are then no results; empty: their own. extra: more flags for
    every stage.

    A job's folder has a job.json: its command, its seconds so far, whether it is finished. To run a
    job anew (another stage before it was, say), delete the folder.
    """

    def __init__(self, recipe, jobs=1, data=None, length=(), extra=()):
        self.recipe, self.jobs = recipe, jobs
        self.data = ["--data", data] if data else []
        self.length, self.extra = list(length), list(extra)
        self.folder = Path("runs", recipe + "".join(length))        # say, cifar-cpu--steps20
        self.running = {}                                   # name → (process, command, start time)
        self.stopped, self.told = False, set()              # the names of those told to end
        self.failed = None                                  # (name, status, command) of the first

    def stop(self, *_):
        self.stopped = True

    def job(self, name):
        file = self.folder / name / "job.json"
        if not file.exists():
            return dict(command=None, seconds=0.0, finished=False)
        return json.loads(file.read_text())

    def note(self, name, command, seconds, finished):
        job = dict(command=shlex.join(command), seconds=seconds, finished=finished, jobs=self.jobs)
        (self.folder / name / "job.json").write_text(json.dumps(job))

    def command(self, name, script, flags):
        """A job's command line, a list. Tools read recipe and data from the run."""
        flags = flags.format(folder=self.folder)
        if script.startswith("tools."):
            return ["python", "-m", script, *flags.split()]
        if self.length:
            flags = re.sub(r"--(epochs|steps) \S+", "", flags)
        own = ["--recipe", self.recipe, "--output", f"{self.folder}/{name}"]
        return ["python", script, *own, *flags.split(), *self.length, *self.extra, *self.data]

    def run(self, jobs):
        """Run those of {name: (script, flags)} that are not finished, in this order.

        A job whose command names the folders of others waits for these.
        """
        waiting, finished = {}, self.finished()
        for name, (script, flags) in jobs.items():
            command = self.command(name, script, flags)
            if name not in finished or not same(finished[name]["command"], shlex.join(command)):
                waiting[name] = command
        threads = max(1, (os.cpu_count() or 1) // max(1, min(self.jobs, len(waiting))))
        while waiting or self.running:
            for name in self.ready(waiting):
                if len(self.running) < self.jobs and not self.stopped:
                    self.start(name, waiting.pop(name), threads)
            time.sleep(0.2)
            for name in list(self.running):
                self.look_after(name)
            if self.stopped and not self.running:
                self.end()

    def ready(self, waiting):
        """Names of the waiting whose commands name no folder of another unfinished job."""
        unfinished = waiting.keys() | self.running.keys()
        named = {name: {Path(word).name for word in command if word.startswith(f"{self.folder}/")}
                 for name, command in waiting.items()}
        return [name for name in waiting if named[name] & unfinished <= {name}]

    def start(self, name, command, threads):
        print(f"{time.strftime('%H:%M:%S')}  {shlex.join(command)}", flush=True)
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        self.note(name, command, self.job(name)["seconds"], finished=False)
        with open(folder / "output.txt", "a") as output:
            process = subprocess.Popen(
                [sys.executable, *command[1:]], stdout=output, stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        self.running[name] = (process, command, time.time())

    def look_after(self, name):
        """Note a job that ended; one that failed stops the others."""
        process, command, begun = self.running[name]
        if self.stopped and name not in self.told:
            process.terminate()                             # a stage then writes a checkpoint
            self.told.add(name)
        status = process.poll()
        if status is None:
            return
        del self.running[name]
        seconds = self.job(name)["seconds"] + time.time() - begun
        self.note(name, command, seconds, finished=status == 0)
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
        """The lines of a job's log; a tool's are in the log of the run that it looked at."""
        kind, _, run = name.partition("-")
        tools = ("codewords", "attack")
        log = self.folder / (run if kind in tools else name) / "log.jsonl"
        if not log.exists():
            return []
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        if kind in tools:
            return [row for row in rows if kind in row]
        return [row for row in rows if not row.keys() & {*tools}]

    def finished(self):
        """{name: command, seconds, hardware, figures (the last line of the log)} of jobs here."""
        jobs = {}
        for file in sorted(self.folder.glob("*/job.json")):
            name, job = file.parent.name, json.loads(file.read_text())
            rows = self.rows(name)
            if not job["finished"] or not rows:             # a tool's log goes with another folder
                continue
            about = next((row for row in rows if "args" in row), {})
            jobs[name] = dict(
                command=job["command"], seconds=round(job["seconds"]), jobs=job["jobs"],
                hardware=about.get("hardware"), torch=about.get("torch"), figures=rows[-1])
        return jobs


def same(one, other):
    """Whether two command lines do the same: loader processes change nothing."""
    return re.sub(r" --workers \d+", "", one) == re.sub(r" --workers \d+", "", other)


# ------------------------------------------------------------------------------------------------
# The experiment: a seed is a whole chain of tokenizer, pre-training and fine-tuning

def networks(runner):
    """What all seeds share: both perceptual networks, and the search for training from scratch."""
    jobs = {
        "supervised": ("finetune.py", f"{scratch(3e-3, 0.0)} {SUPERVISED[runner.recipe]}"),
        "teacher": ("teacher.py", ""),
    }
    for network in ("supervised", "teacher"):
        for probe in ("linear", "knn"):
            flags = f"--init {{folder}}/{network} --probe {probe}"
            jobs[f"{probe}-{network}"] = ("finetune.py", flags)
    for setting in SEARCH[runner.recipe]:
        jobs[search_name(*setting)] = ("finetune.py", f"{scratch(*setting)} --holdout 0.1")
    return jobs


def scratch(lr, drop_path):
    """Flags of finetune.py."""
    return f"--init none --layer-decay 1 --lr {lr:g} --drop-path {drop_path:g}"


def search_name(lr, drop_path):
    return f"search-{lr:g}-{drop_path:g}"


def search(figures, recipe):
    """{(lr, drop path) from scratch: top-1 in % on held-out training images, or None}"""
    return {setting: figure(figures, search_name(*setting), "top1") for setting in SEARCH[recipe]}


def chain(runner, arms, seed, best):
    """Jobs of a seed, {name: (script, flags)}: tokenizers, pre-training, evaluation.

    best: (lr, drop path) of training from scratch.
    """
    tokenizers, pretraining, evaluation, judged = {}, {}, {}, {}
    for arm in arms:
        if arm in TOKENIZERS:
            run = f"tokenizer-{arm}-{seed}"
            tokenizers[run] = ("tokenizer.py", f"{TOKENIZERS[arm]} --seed {seed}")
            pretraining[f"pretrain-{arm}-{seed}"] = pretrain_on(run, seed)
            judged[f"codewords-{run}"] = codewords(run, seed)
            evaluation |= evaluations(runner.recipe, JUDGE, seed, best)
        evaluation |= evaluations(runner.recipe, arm, seed, best)
        run = f"finetune-{arm}-{seed}"
        judged[f"attack-{run}"] = ("tools.attack", f"{{folder}}/{run} --images {ATTACKED}")
    return tokenizers | pretraining | evaluation | judged


def pretrain_on(run, seed):
    return "pretrain.py", f"--tokenizer {{folder}}/{run} --seed {seed}"


def codewords(run, seed):
    return "tools.codewords", (f"{{folder}}/{run} --perceptual {{folder}}/teacher "
                               f"--classifier {{folder}}/finetune-{JUDGE}-{seed}")


def evaluations(recipe, arm, seed, best):
    """Jobs of an arm by KINDS, those that it has."""
    if arm == "scratch-long":
        epochs = pretrain.RECIPES[recipe]["epochs"] + finetune.RECIPES[recipe]["epochs"]
        flags = f"{scratch(*best)} --seed {seed} --epochs {epochs}"
        return {f"finetune-{arm}-{seed}": ("finetune.py", flags)}
    init = "{folder}/teacher" if arm == "teacher" else f"{{folder}}/pretrain-{arm}-{seed}"
    flags = f"--init {init} --seed {seed}"
    if arm == "scratch":
        flags = f"{scratch(*best)} --seed {seed}"
    jobs = {f"finetune-{arm}-{seed}": ("finetune.py", flags)}
    for kind, few in FEW_LABELS[recipe].items():
        jobs[f"{kind}-{arm}-{seed}"] = ("finetune.py", f"{flags} {few}")
    if arm in TOKENIZERS:
        for probe in ("linear", "knn"):
            jobs[f"{probe}-{arm}-{seed}"] = ("finetune.py", f"{flags} --probe {probe}")
    return jobs


def best_setting(runner):
    """(lr, drop path) of training from scratch"""
    scores = search(collect(runner), runner.recipe)
    return max(scores, key=scores.get)


def run_seeds(runner, arms, seeds):
    runner.run(networks(runner))
    best, jobs = best_setting(runner), {}
    for seed in seeds:
        jobs |= chain(runner, arms, seed, best)
    runner.run(jobs)


def run_ablations(runner):
    """A tokenizer, its codewords, one pre-training and one fine-tuning for each entry.

    They are compared with PeCo of seed 0, and judged by its judge.
    """
    jobs = chain(runner, ["peco"], 0, best_setting(runner))
    for entries in ablations(runner.recipe).values():
        for name, flags, pretrain_flags in entries.values():
            own = flags is not None
            if not own and not pretrain_flags:              # an arm of the main table
                continue
            run = f"tokenizer-{name}-0" if own else "tokenizer-peco-0"
            if own:
                flags = f"--perceptual {{folder}}/teacher {flags}"
                jobs[run] = ("tokenizer.py", flags)
                jobs[f"codewords-{run}"] = codewords(run, 0)
            script, flags = pretrain_on(run, 0)
            jobs[f"pretrain-{name}-0"] = (script, f"{flags} {pretrain_flags}")
            init = f"--init {{folder}}/pretrain-{name}-0"
            jobs[f"finetune-{name}-0"] = ("finetune.py", init)
            jobs[f"linear-{name}-0"] = ("finetune.py", f"{init} --probe linear")
    runner.run(jobs)


# ------------------------------------------------------------------------------------------------
# Tables, of {name of a job: what Runner.finished says of it}

def store(recipe):
    return ROOT / "results" / f"{recipe}.json"


def collect(runner):
    """The figures in results/RECIPE.json, and over them those of the jobs that are finished here.

    They are written there, a job a line. Those of shortened jobs are not. Stored ones of other
    commands, on other data say, do not go with these: then they are left out.
    """
    own = runner.finished()
    if runner.length:
        return own
    file = store(runner.recipe)
    jobs = json.loads(file.read_text()) if file.exists() else {}
    shared = own.keys() & jobs.keys()
    if not all(same(own[name]["command"], jobs[name]["command"]) for name in shared):
        print(f"{file}: of other commands, so it is written anew")
        jobs = {}
    jobs |= own
    if jobs:
        file.parent.mkdir(exist_ok=True)
        lines = [f"{json.dumps(name)}: {json.dumps(jobs[name])}" for name in sorted(jobs)]
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return jobs


def figure(jobs, name, key):
    return jobs[name]["figures"].get(key) if name in jobs else None


def of_seeds(jobs, prefix, key):
    """{seed: figure} of all seeds that have it, in order. prefix: the name without the seed."""
    figures = {}
    for name in jobs:
        if re.fullmatch(rf"{re.escape(prefix)}-\d+", name):
            figures[int(name.rpartition("-")[2])] = figure(jobs, name, key)
    return dict(sorted(figures.items()))


def mean_and_error(values):
    """Mean and standard error of the mean; the error of one value is NaN."""
    values = list(values)
    if len(values) == 1:
        return values[0], float("nan")
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def show(values, form=".1f"):
    """Mean ± standard error of some values, or of the one."""
    if not values:
        return NOT_RUN
    mean, error = (format(value, form) for value in mean_and_error(values))
    return mean if len(values) == 1 else f"{mean} ± {error}"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def arms_table(recipe, jobs):
    rows = []
    for arm, text in ARMS.items():
        cells, seeds = [], []
        for kind in KINDS:
            planned = f"{kind}-{arm}-0" in evaluations(recipe, arm, 0, best=(0, 0))
            figures = of_seeds(jobs, f"{kind}-{arm}", "top1")
            if planned:
                seeds.append(len(figures))
            cells.append(show(figures.values()) if planned else "")
        if arm == "teacher":                                # its own features, without fine-tuning
            cells[-2:] = network_cells(jobs, arm)
        fewest, most = min(seeds), max(seeds)
        cells.append(f"{most}" if fewest == most else f"{fewest} to {most}")
        rows.append([text, *cells])
    epochs = SUPERVISED[recipe].split()[1]
    top1 = show([jobs["supervised"]["figures"]["top1"]] if "supervised" in jobs else [])
    rows.append([f"the supervised network itself: from scratch for {epochs} epochs", top1, "", "",
                 *network_cells(jobs, "supervised"), "1" if "supervised" in jobs else "0"])
    return table(["pre-training", *KINDS.values(), "seeds"], rows)


def network_cells(jobs, network):
    """Linear probe and kNN of a perceptual network."""
    values = [figure(jobs, f"{probe}-{network}", "top1") for probe in ("linear", "knn")]
    return [NOT_RUN if value is None else f"{value:.1f}" for value in values]


CODES = {                       # column → (job without tokenizer and seed, key, format)
    "PSNR, dB": ("", "psnr", ".1f"),
    "perceptual distance": ("codewords-", "distance", ".3f"),
    "codes used": ("", "usage", ".0%"),
    "perplexity": ("", "perplexity", ".0f"),
    "linear on codewords": ("codewords-", "linear", ".1f"),
    "on reconstructions": ("codewords-", "reconstructions", ".1f"),
}


def codes_row(jobs, name):
    return [show(of_seeds(jobs, f"{job}tokenizer-{name}", key).values(), form)
            for job, key, form in CODES.values()]


COMPARED = [("peco", "pixel"), ("supervised", "pixel"), ("pixel", "scratch"), ("pixel", "random"),
            ("peco", "random"), ("pixel", "scratch-long"), ("peco", "scratch-long")]


def comparisons(jobs):
    """A table of arms compared: the differences of the seeds that both have, a pair a seed."""
    rows = []
    for one, two in COMPARED:
        cells = []
        for kind in KINDS:
            first = of_seeds(jobs, f"{kind}-{one}", "top1")
            second = of_seeds(jobs, f"{kind}-{two}", "top1")
            gaps = [first[seed] - second[seed] for seed in first.keys() & second.keys()]
            cells.append(verdict(gaps) if gaps else "")
        rows.append([f"{one} − {two}", *cells])
    return table(["difference", *KINDS.values()], rows)


def verdict(gaps):
    """Mean ± standard error, in bold where it is more than two errors away from zero; seeds.

    The error of two values is hardly known, so those are never bold.
    """
    mean, error = mean_and_error(gaps)
    text = f"{mean:+.1f}" if len(gaps) == 1 else f"{mean:+.1f} ± {error:.1f}"
    if len(gaps) > 2 and abs(mean) > 2 * error:
        text = f"**{text}**"
    return f"{text} ({len(gaps)})".replace("-", "−")


def above_chance(jobs):
    """How many times pixel codes' linear accuracy, above chance, that of PeCo's codewords is."""
    pixel = of_seeds(jobs, "codewords-tokenizer-pixel", "linear")
    parts = []
    for arm in ("peco", "supervised"):
        own = of_seeds(jobs, f"codewords-tokenizer-{arm}", "linear")
        ratios = [(own[seed] - CHANCE) / (pixel[seed] - CHANCE)
                  for seed in own.keys() & pixel.keys()]
        parts.append(f"{show(ratios, '.2f')} ({arm})")
    return "Linear above chance, PeCo's over pixel codes': " + ", ".join(parts) + " times."


HEAD = """# Results on CIFAR-10
Written by `python -m tools.cifar10` (`make cifar10`) from the logs of the runs, never by hand; the
remarks are results/RECIPE.md."""


def section(recipe, jobs):
    """This recipe's part of RESULTS.md."""
    if not jobs:
        return f"## `--recipe {recipe}`\n\n{NOT_RUN}"
    originals = of_seeds(jobs, "codewords-tokenizer-peco", "originals").values()
    remarks = store(recipe).with_suffix(".md")
    on_originals = f" ({show(originals)} on the images themselves)" if originals else ""
    searched = []
    for (lr, drop_path), top1 in search(jobs, recipe).items():
        searched.append([f"{lr:g}", f"{drop_path:g}", NOT_RUN if top1 is None else f"{top1:.1f}"])
    parts = [
        f"## `--recipe {recipe}`",
        setting(recipe, jobs),
        remarks.read_text().strip() if remarks.exists() else "",
        "Top-1 in % on the test images after the last epoch, mean ± standard error over seeds. A "
        "seed is a whole chain: tokenizer, pre-training and fine-tuning have that seed. The two "
        "perceptual networks were trained once, and their own spread is not in the error. The "
        "supervised one has seen **all** labels of the training images, so every column flatters "
        "codes that come of it. The longer fine-tuning does not count the epochs of perceptual "
        "network and tokenizer, which PeCo takes besides: see the seconds below.",
        f"<!-- {recipe} table -->\n{arms_table(recipe, jobs)}\n<!-- end -->",
        "Arms of one seed share its labels and order, those that are pre-trained also the weights "
        "that pre-training begins from. So they are compared seed by seed. In bold what is more "
        "than two standard errors, of three seeds at least; in brackets the seeds.",
        comparisons(jobs),
        "### Codewords",
        "On the 10,000 test images. Linear: top-1 of a linear classifier on the average-pooled "
        "codewords (the paper's Table 4). On reconstructions: top-1 of the longer fine-tuning from "
        f"scratch of the same seed{on_originals}. The distance is the self-supervised network's, "
        "which PeCo's tokenizers learn to lower. The untrained tokenizer's decoder is untrained.",
        table(["tokenizer", *CODES],
              [[ARMS[name], *codes_row(jobs, name)] for name in TOKENIZERS]),
        above_chance(jobs),
        *pictures(recipe),
        "### Attacks (Table 11)",
        f"Top-1 in %, fine-tuned on all labels, on {ATTACKED} of the test images.",
        attacks_table(jobs),
        "### Search from scratch",
        "Top-1 in % on a tenth of the training images, held out. The best is used by all "
        "fine-tuning from scratch, of any length and share of labels, but not by the supervised "
        "network. The other arms' values were not searched.",
        table(["lr", "drop path", "top-1"], searched),
        "### Ablations",
        "Seed 0 alone: read no small difference into them.",
    ]
    for title, entries in ablations(recipe).items():
        rows = []
        for entry, (name, flags, pretrain_flags) in entries.items():
            tokenizer_name = "peco" if flags is None and pretrain_flags else name
            first = {job: value for job, value in jobs.items() if job.endswith("-0")}
            cells = [show(of_seeds(first, f"{kind}-{name}", "top1").values())
                     for kind in ("finetune", "linear")]
            rows.append([entry, *cells, *codes_row(first, tokenizer_name)])
        parts.append(table([title, "all labels", "linear probe", *CODES], rows))
    parts += times(jobs)
    return "\n\n".join(part for part in parts if part)


def setting(recipe, jobs):
    """The sentences on network, epochs, hardware and data."""
    vit = pretrain.RECIPES[recipe]
    size = SIZES[vit["model"]]
    lengths = []                                            # of the runs, not of today's recipes
    for prefix in ("teacher", "tokenizer-peco", "pretrain-peco", "finetune-peco"):
        epochs = [job["figures"]["epoch"] for name, job in jobs.items()
                  if re.fullmatch(rf"{prefix}(-\d+)?", name)]
        stage = prefix.partition("-")[0]
        lengths.append(f"{stage} {epochs[0]:g}" if epochs else f"{stage} {NOT_RUN}")
    few = ", ".join(f"`{flags}`" for flags in FEW_LABELS[recipe].values())
    machines = {f"{job['hardware']}, PyTorch {job['torch']}": None for job in jobs.values()
                if job["hardware"]}
    return (f"ViT-{vit['model']} ({size['dim']} wide, {size['depth']} blocks), patches of "
            f"{vit['patch_size']} of 32 pixels. Epochs: {', '.join(lengths)}; the rest: `RECIPES` "
            f"in each script. Few labels: {few}. Hardware: {'; '.join(machines) or NOT_RUN}.")


def attacks_table(jobs):
    rows = []
    for arm, text in ARMS.items():
        cells = [show(of_seeds(jobs, f"attack-finetune-{arm}", key).values())
                 for key in ("clean", "bim", "mim")]
        rows.append([text, *cells])
    return table(["pre-training", "clean", "BIM", "MIM"], rows)


def pictures(recipe):
    """Copies the first seed's pictures to results/; the paragraphs that show them."""
    captions = {"reconstructions": "originals over reconstructions",
                "codes": "a row of patches for each of the most used codes"}
    parts = []
    for picture, caption in captions.items():
        for name in ("pixel", "peco"):
            source = Path("runs", recipe, f"tokenizer-{name}-0", f"{picture}.png")
            target = f"results/{recipe}-{name}-{picture}.png"
            if source.exists():
                shutil.copy(source, ROOT / target)
            if (ROOT / target).exists():
                parts.append(f"{ARMS[name]}: {caption}\n\n![{name} {picture}]({target})")
    return parts


def times(jobs):
    """Paragraphs on the jobs' seconds, by stage."""
    seconds = {}
    for name, job in jobs.items():
        stage = name.split("-")[0]
        seconds[stage] = seconds.get(stage, 0) + job["seconds"]
    if not seconds:
        return []
    side_by_side = max(job["jobs"] for job in jobs.values())
    seconds["all"] = sum(seconds.values())
    return ["### Time",
            f"Seconds of the jobs from start to end, up to {side_by_side} side by side.",
            table(["", "seconds"], [[name, f"{value}"] for name, value in seconds.items()])]


def replace(text, name, new):
    """A text with `new` between <!-- name --> and the next <!-- end -->, if it has them."""
    found = re.search(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", text, re.S)
    if not found:
        return text
    return text[:found.end(1)] + new + "\n" + text[found.start(2):]


def write(runner):
    """Write RESULTS.md, and the README's tables, from results/ and what is finished here."""
    jobs = collect(runner)
    if runner.length:
        return print(arms_table(runner.recipe, jobs))
    readme = ROOT / "README.md"
    text, parts = readme.read_text(), [HEAD]
    for recipe in SEARCH:
        jobs = json.loads(store(recipe).read_text()) if store(recipe).exists() else {}
        parts.append(section(recipe, jobs))
        text = replace(text, f"{recipe} table", arms_table(recipe, jobs))
    (ROOT / "RESULTS.md").write_text("\n\n".join(parts) + "\n")
    readme.write_text(text)


def main(argv=None):
    p = Parser("tools.cifar10", __doc__,
                       epilog="Flags not known here go to every stage.")
    p.add_argument("--recipe", choices=SEARCH,
                   default="cifar" if torch.cuda.is_available() else "cifar-cpu",
                   help="default: by the hardware")
    p.add_argument("--data", help="dataset, as the stages' --data; default: the recipe's")
    p.add_argument("--seeds", type=count, nargs="+",
                   default=[0, 1, 2, 3, 4], help="which to run")
    p.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="which to run")
    p.add_argument("--jobs", type=positive, default=2,
                   help="command lines side by side")
    length = p.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, help="of every job, to try it")
    length.add_argument("--epochs", type=positive, help="the same")
    p.add_argument("--ablations", action="store_true", help="also the paper's ablations")
    p.add_argument("--report", action="store_true",
                   help="run nothing, only write RESULTS.md and the README's table")
    args, extra = p.parse_known_args(argv)
    os.chdir(ROOT)
    length = []
    for flag in ("steps", "epochs"):
        if getattr(args, flag):
            length = [f"--{flag}", str(getattr(args, flag))]
    runner = Runner(args.recipe, args.jobs, args.data, length, extra)
    if args.report:
        return write(runner)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, runner.stop)
    try:
        run_seeds(runner, args.arms, args.seeds)
        if args.ablations:
            run_ablations(runner)
    finally:
        write(runner)


if __name__ == "__main__":
    main()
