"""The paper's claim at a small size: do perceptual codes pre-train a better ViT than pixel codes?

    python -m tools.cifar10
    python -m tools.cifar10 --ablations                     # the paper's ablations too
    python -m tools.cifar10 --arms pixel peco --seeds 0     # a part of it

Only the target of pre-training differs. It prints the stages' command lines, runs them one after
another, into runs/cifar/, and then prints tables of their logs in Markdown. The same command goes
on where it was stopped: a stage that has finished says so, and a tool whose line is in the log is
not run again.
"""
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import finetune
import pretrain
from support import flags, launch

FOLDER = Path("runs/cifar")
ARMS = {
    "scratch": "fine-tuning alone",
    "scratch-long": "the same, for as long as pre-training and fine-tuning together",
    "random": "codes of an untrained tokenizer",
    "pixel": "codes of a tokenizer with λ = 0",
    "peco": "**PeCo**, codes with λ = 1: self-supervised network",
    "supervised": "**PeCo**, codes with λ = 1: supervised network",
    "mae": "**PeCo_MAE**, codes with λ = 1: self-supervised network",   # the paper's Table 8
    "mae-pixel": "PeCo_MAE, codes of a tokenizer with λ = 0",
    "teacher": "the self-supervised network itself, fine-tuned with each seed",
}
TOKENIZERS = {                  # arm → flags of tokenizer.py
    # At lr 0 only the codebook moves: from vectors of the first batch towards means of the next.
    "random": "--perceptual-weight 0 --lr 0 --steps 50",
    "pixel": "--perceptual-weight 0",
    "peco": f"--perceptual {FOLDER}/teacher",
    "supervised": f"--perceptual {FOLDER}/supervised",
}
MAE = {"mae": "peco", "mae-pixel": "pixel"}     # arm → the arm whose codes it predicts
# Our choice, searched on a held-out tenth of the training images.
SCRATCH = "--init none --layer-decay 1 --lr 6e-3 --drop-path 0"
SCRATCH_1 = "--lr 2.34e-3"      # of "finetune-1": in proportion to its batch, 50 of 128
# Our choice: the supervised network, on all labels. Its seed is that of no fine-tuning.
SUPERVISED = "--init none --layer-decay 1 --drop-path 0 --epochs 30 --seed 1000"
LABELS = {                      # prefix of the run → flags of finetune.py; our choice of lengths
    "finetune": "",
    "finetune-10": "--label-fraction 0.1 --epochs 15",
    "finetune-1": "--label-fraction 0.01 --epochs 50 --batch-size 50",
}
JUDGE = "scratch-long"          # whose classifier judges reconstructions: no perceptual network
ATTACKED = 1000                 # test images that are attacked; our choice

VARIANTS = {                    # PeCo's tokenizer but for these flags of tokenizer.py
    **{f"lambda-{weight}": f"--perceptual-weight {weight}"              # Table 10
       for weight in ("0.1", "0.3", "3", "10")},
    **{f"layer-{layer}": f"--perceptual-layers {layer}" for layer in (1, 2, 3, 4)},
    **{f"codes-{size}": f"--codebook-size {size}" for size in (128, 512)},
    "adversarial": "--adversarial-weight 0.4",                          # Table 7
}
COMPARED = ("pixel", "peco", "supervised")      # arms beside the ablations: Table 5, and λ = 0 or 1
# Column → (run, a value that its line of the log has, the figure, its format)
EVALUATED, JUDGED = ("split", "val"), ("codewords", True)
ACCURACY = {
    "all labels": ("finetune-{}", EVALUATED, "top1", ".1f"),
    "10 % of labels": ("finetune-10-{}", EVALUATED, "top1", ".1f"),
    "1 %": ("finetune-1-{}", EVALUATED, "top1", ".1f"),
    "linear probe": ("pretrain-{}", ("probe", "linear"), "top1", ".1f"),
    "kNN": ("pretrain-{}", ("probe", "knn"), "top1", ".1f"),
    "BIM": ("finetune-{}", ("attack", True), "bim", ".1f"),
    "MIM": ("finetune-{}", ("attack", True), "mim", ".1f"),
}
CODES = {
    "PSNR, dB": ("tokenizer-{}", EVALUATED, "psnr", ".1f"),
    "perceptual distance": ("tokenizer-{}", JUDGED, "distance", ".3f"),
    "codes used": ("tokenizer-{}", EVALUATED, "usage", ".0%"),
    "perplexity": ("tokenizer-{}", EVALUATED, "perplexity", ".0f"),
    "linear on codewords": ("tokenizer-{}", JUDGED, "linear", ".1f"),
    "on reconstructions": ("tokenizer-{}", JUDGED, "reconstructions", ".1f"),
}


# The experiment, as command lines: a seed is a whole chain of tokenizer, pre-training, fine-tuning

def stage(name, run, own=""):
    return f"{name}.py --recipe cifar --output {FOLDER}/{run} {own}"


def probes(run):
    """The teacher's run names no crop of evaluation, so all are told the recipe's."""
    return [f"tools.probe {FOLDER}/{run} {kind} --eval-crop 1" for kind in ("linear", "knn")]


def chain(arm, seed):
    """The command lines of an arm, each after those that it reads."""
    end, commands = f"{arm}-{seed}", []
    attack = f"tools.attack {FOLDER}/finetune-{end} --images {ATTACKED}"
    start = f"--init {FOLDER}/pretrain-{end}"
    if arm in TOKENIZERS or arm in MAE:
        codes = MAE.get(arm, arm)
        commands += tokenized(f"{codes}-{seed}", f"{TOKENIZERS[codes]} --seed {seed}", seed)
        own = f"--tokenizer {FOLDER}/tokenizer-{codes}-{seed} --seed {seed}"
        if arm in MAE:
            own += " --mae --mask-ratio 0.75"
        commands.append(stage("pretrain", f"pretrain-{end}", own))
        commands += probes(f"pretrain-{end}")
    elif arm == "teacher":
        start = f"--init {FOLDER}/teacher"
    elif arm == JUDGE:
        return [judge(seed), attack]
    else:
        start = SCRATCH
    for run, few in LABELS.items():
        if start == SCRATCH and run == "finetune-1":
            few += f" {SCRATCH_1}"
        commands.append(stage("finetune", f"{run}-{end}", f"{start} --seed {seed} {few}".strip()))
    return [*commands, attack]


def judge(seed):
    epochs = pretrain.RECIPES["cifar"]["epochs"] + finetune.RECIPES["cifar"]["epochs"]
    own = f"{SCRATCH} --seed {seed} --epochs {epochs}"
    return stage("finetune", f"finetune-{JUDGE}-{seed}", own)


def tokenized(end, own, seed):
    codewords = (f"tools.codewords {FOLDER}/tokenizer-{end} --perceptual {FOLDER}/teacher "
                 f"--classifier {FOLDER}/finetune-{JUDGE}-{seed}")
    return [stage("tokenizer", f"tokenizer-{end}", own), judge(seed), codewords]


def ablations():
    commands = [line for arm in COMPARED for line in chain(arm, 0)]
    for name, own in VARIANTS.items():
        commands += tokenized(f"{name}-0", f"{TOKENIZERS['peco']} {own}", 0)
        tokens = f"{FOLDER}/tokenizer-{name}-0"
        commands += [
            stage("pretrain", f"pretrain-{name}-0", f"--tokenizer {tokens}"),
            *probes(f"pretrain-{name}-0"),
            stage("finetune", f"finetune-{name}-0", f"--init {FOLDER}/pretrain-{name}-0")]
    return commands


def run(command, data=None):
    """Run a command line; where it fails, or is stopped, this ends with its status."""
    script, *words = command.split()
    if script.startswith("tools."):
        tool = {"tools.probe": ("probe", words[1]), "tools.attack": ("attack", True)}
        if last_line(Path(words[0]).name, tool.get(script, JUDGED)):
            return
        words = ["-m", script, *words]
    else:
        words = [script, *words, *(["--data", data] if data else [])]
    print("$ python", *words, flush=True)
    process = subprocess.Popen([sys.executable, *words])
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())       # it writes a checkpoint
    try:
        status = process.wait()
    except KeyboardInterrupt:                               # which the stage was sent, too
        status = process.wait()
    if status:
        launch.warn(f"tools.cifar10: ended with status {status}: python {' '.join(words)}")
        sys.exit(status if status > 0 else 128 - status)    # negative: of a signal


def last_line(run, wanted):
    """The last line of a run's log that has (key, value) `wanted`; {} where there is none."""
    log = FOLDER / run / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    rows = [json.loads(line) for line in lines]
    return next((row for row in reversed(rows) if wanted in row.items()), {})


def show(values, form):
    """Mean ± standard error of the mean, of those that are there."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return f"{values[0]:{form}}" if values else ""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):{form}} ± {error:{form}}"


def cells(columns, ends):
    """A row's cells. ends: of the runs' names, such as peco-0."""
    return [show([last_line(run.format(end), wanted).get(key) for end in ends], form)
            for run, wanted, key, form in columns.values()]


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def tables(arms, seeds, with_ablations):
    rows = []
    for arm in arms:
        ends = [f"{arm}-{seed}" for seed in seeds]
        rows.append([ARMS[arm], *cells(ACCURACY, ends), *cells(CODES, ends), str(len(seeds))])
    found = [table(["pre-training", *ACCURACY, *CODES, "seeds"], rows)]
    own = {name: ("{}", *ACCURACY[name][1:]) for name in ("all labels", "linear probe", "kNN")}
    rows = [[network, *cells(own, [network])] for network in ("teacher", "supervised")]
    found.append(table(["perceptual network", *own], rows))
    if with_ablations:
        rows = [[name, *cells(ACCURACY, [f"{name}-0"]), *cells(CODES, [f"{name}-0"])]
                for name in (*COMPARED, *VARIANTS)]
        found.append(table(["ablation, seed 0", *ACCURACY, *CODES], rows))
    return "\n".join(found)


def get_args(argv=None):
    p = flags.Parser("tools.cifar10", __doc__)
    p.add_argument("--data", help="dataset, as the stages' --data; default: the recipe's, cifar10")
    p.add_argument("--seeds", type=flags.count, nargs="+", default=[0, 1, 2, 3, 4],
                   help="which to run")
    p.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="which to run")
    p.add_argument("--ablations", action="store_true", help="also the paper's ablations")
    return p.parse_args(argv)


def main(args):
    commands = [stage("finetune", "supervised", SUPERVISED), stage("teacher", "teacher"),
                *probes("supervised"), *probes("teacher")]
    for seed in args.seeds:
        for arm in args.arms:
            commands += chain(arm, seed)
    if args.ablations:
        commands += ablations()
    for command in dict.fromkeys(commands):                 # each once
        run(command, args.data)
    print("\n" + tables(args.arms, args.seeds, args.ablations))


if __name__ == "__main__":
    launch.launch_tool("cifar10", lambda: main(get_args()))
