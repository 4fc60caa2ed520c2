"""tools/cifar10.py and tools/codewords.py: the plan's command lines, the runner, the report."""
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from test_cifar import generate
from torch import nn

import finetune
import pretrain
import tokenizer
from model import VQTokenizer
from tools import cifar10, codewords

TINY = ["--batch-size", "8", "--workers", "0", "--amp", "fp32"]
ALL_ABLATIONS = cifar10.ablations


class InProcess(cifar10.Runner):
    """Runs the same command lines in this process, at a size of nothing."""

    def __init__(self, length=()):
        super().__init__("cifar-cpu", data="tiny", length=length, extra=TINY)
        self.folder = Path("runs/cifar-cpu")                # though short, its figures count

    def run(self, jobs):
        for name, (script, flags) in jobs.items():
            if self.job(name)["finished"]:
                continue
            command = self.command(name, script, flags)
            if script.startswith("tools."):
                tool = importlib.import_module(script)
                tool.main(tool.get_args([*command[3:], "--workers", "0"]))
            else:
                stage = importlib.import_module(script.removesuffix(".py"))
                stage.main(stage.get_args(command[2:]))
            (self.folder / name).mkdir(exist_ok=True)
            job = dict(command="", seconds=1.0, finished=True, jobs=1)
            (self.folder / name / "job.json").write_text(json.dumps(job))


def few_ablations(recipe):
    """Two entries of each table: the others differ by a number."""
    return {title: dict(list(entries.items())[:2])
            for title, entries in ALL_ABLATIONS(recipe).items()}


TWICE = ["scratch-long", "pixel", "peco"]
README = "before\n<!-- cifar-cpu table -->\nold\n<!-- end -->\nafter\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder in which the whole plan ran: a seed, of some arms two, the ablations too."""
    root, before = tmp_path_factory.mktemp("plan"), os.getcwd()
    os.chdir(root)
    try:
        generate(root / "tiny")
        (root / "README.md").write_text(README)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cifar10, "ROOT", root)
            patch.setattr(cifar10, "ablations", few_ablations)
            patch.setattr(finetune, "linear_probe", partial(finetune.linear_probe, steps=20))
            runner = InProcess(["--steps", "2"])
            cifar10.run_seeds(runner, list(cifar10.ARMS), [0])
            cifar10.run_seeds(runner, TWICE, [1])
            cifar10.run_ablations(runner)
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def finished(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(cifar10, "ROOT", root)
    monkeypatch.setattr(cifar10, "ablations", few_ablations)
    return InProcess()


# ------------------------------------------------------------------------------------------------
# The plan and its report

def test_the_whole_plan_and_its_report(finished, root):
    cifar10.write(finished)
    results = (root / "RESULTS.md").read_text()
    gpu, cpu = results.split("## `--recipe cifar-cpu`")
    assert "*not run*" not in cpu
    assert not re.search(r"\b(nan|None)\b", results)
    assert gpu.endswith("## `--recipe cifar`\n\n*not run*\n\n")     # it has no log
    for arm in TWICE:
        text, values = cifar10.ARMS[arm], []
        for seed in (0, 1):
            rows = finished.rows(f"finetune-{arm}-{seed}")
            values += [row["top1"] for row in rows if row.get("split") == "val"]
        mean, error = sum(values) / 2, abs(values[0] - values[1]) / 2
        assert f"| {text} | {mean:.1f} ± {error:.1f} |" in cpu

    table = cifar10.arms_table("cifar-cpu", finished.finished())
    assert table in cpu
    assert table in (root / "README.md").read_text()
    jobs = list(root.glob("runs/cifar-cpu/*/job.json"))
    assert f"| all | {len(jobs)} |" in cpu                  # a second each
    for picture in ("cifar-cpu-peco-codes.png", "cifar-cpu-pixel-reconstructions.png"):
        assert f"results/{picture}" in cpu
        assert (root / "results" / picture).exists()


def test_the_report_needs_no_runs(finished, root, monkeypatch, folder):
    """Figures of other machines count: RESULTS.md is made again from results/ alone."""
    cifar10.write(finished)
    first = (root / "RESULTS.md").read_text()
    monkeypatch.chdir(folder)                               # no runs/ in it
    cifar10.write(InProcess())
    assert (root / "RESULTS.md").read_text() == first


def test_what_is_not_finished_is_no_result(finished):
    other = Path("runs/cifar-cpu/other")                    # its log is not of the plan
    other.mkdir()
    (other / "log.jsonl").write_text(json.dumps(dict(top1=50.0, split="val")) + "\n")
    assert "other" not in finished.finished()
    assert finished.finished()["finetune-peco-0"]["figures"]["split"] == "val"
    file = Path("runs/cifar-cpu/finetune-peco-0/job.json")
    whole = file.read_text()
    file.write_text(whole.replace("true", "false"))
    assert "finetune-peco-0" not in finished.finished()
    file.write_text(whole)


def test_a_shortened_run_writes_no_results(finished, root, capsys):
    runner = cifar10.Runner("cifar-cpu", length=["--steps", "2"])
    whole = runner.folder.with_name("cifar-cpu")
    runner.folder.symlink_to(whole.absolute())              # as if these runs had been its own
    cifar10.write(finished)
    files = {file: file.read_bytes() for file in root.rglob("*.md")}
    Path("results/cifar-cpu.json").unlink()
    cifar10.write(runner)
    assert not Path("results/cifar-cpu.json").exists()
    assert files == {file: file.read_bytes() for file in root.rglob("*.md")}
    table = cifar10.arms_table("cifar-cpu", finished.finished())
    assert capsys.readouterr().out == f"{table}\n"
    other = cifar10.Runner("cifar-cpu", length=["--epochs", "1"])
    assert len({runner.folder, other.folder, whole}) == 3


@pytest.mark.parametrize("flags", [["--steps=2"], ["--step", "2"], ["--epochs", "2"]])
def test_a_length_in_any_spelling_is_one(flags, monkeypatch):
    runners = []
    monkeypatch.setattr(cifar10, "run_seeds", lambda runner, *_: runners.append(runner))
    monkeypatch.setattr(cifar10, "write", lambda runner: None)
    cifar10.main([*flags, "--lr", "1e-3"])
    runner = runners[0]
    assert runner.length and runner.extra == ["--lr", "1e-3"]
    command = runner.command("job", "finetune.py", "--epochs 15 --seed 1")
    assert "15" not in command and command[command.index("--seed") + 2] in ("--steps", "--epochs")


def test_figures_of_other_commands_are_not_mixed_in(finished, root, capsys):
    """The stored ones of a seed that is not here go with those that are, or all of them go."""
    def of_commands(change):
        file = Path("results/cifar-cpu.json")
        cifar10.write(finished)
        jobs = json.loads(file.read_text())
        jobs["elsewhere"] = dict(jobs["teacher"])
        jobs["teacher"]["command"] += change
        file.write_text(json.dumps(jobs))
        return "elsewhere" in cifar10.collect(finished)

    assert of_commands(" --workers 4")
    assert not capsys.readouterr().out
    assert not of_commands(" --data other")
    assert "results/cifar-cpu.json: of other commands" in capsys.readouterr().out


def test_few_labels_are_few(finished):
    """The columns of the table are of runs that saw so many labels."""
    for kind, fraction in (("finetune", 1.0), ("finetune-10", 0.1), ("finetune-1", 0.01)):
        rows = finished.rows(f"{kind}-peco-0")
        assert rows[0]["args"]["label_fraction"] == fraction
        assert rows[0]["args"]["init"] == "runs/cifar-cpu/pretrain-peco-0"


def test_test_images_choose_nothing(finished):
    """The searches see the held-out training images alone."""
    for setting in cifar10.SEARCH["cifar-cpu"]:
        rows = finished.rows(cifar10.search_name(*setting))
        assert {row["split"] for row in rows if "split" in row} == {"holdout"}
        assert {row["images"] for row in rows if "top1" in row} == {10}


@pytest.mark.parametrize("recipe", cifar10.SEARCH)
def test_ablations_are_flags_of_the_stages(recipe):
    own = []
    for entries in cifar10.ablations(recipe).values():
        for name, flags, pretrain_flags in entries.values():
            if flags is None and not pretrain_flags:
                assert name in cifar10.TOKENIZERS
                continue
            tokenizer.get_args(["--recipe", recipe, *(flags or "").split()])
            pretrain.get_args(["--recipe", recipe, *pretrain_flags.split()])
            own.append(name)
    assert len(own) == len(set(own)) == 4 + 4 + 1 + 2 + 2


def test_mean_and_standard_error():
    assert cifar10.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 3 ** -0.5))
    assert cifar10.show([50.0, 52.0]) == "51.0 ± 1.0"
    assert cifar10.show([50.0]) == "50.0"
    assert cifar10.show([]) == "*not run*"


def test_arms_are_compared_seed_by_seed():
    """Over the seeds that both have; the seeds' own spread, common to both, is no error."""
    values = {"finetune-peco": [40.0, 51.0, 62.0], "finetune-pixel": [38.0, 48.0, 58.0, 10.0]}
    jobs = {f"{name}-{seed}": dict(figures=dict(top1=top1))
            for name, seeds in values.items() for seed, top1 in enumerate(seeds)}
    assert "| peco − pixel | **+3.0 ± 0.6** (3) |  |" in cifar10.comparisons(jobs)
    assert cifar10.verdict([2.0, 2.1]) == "+2.0 ± 0.1 (2)"
    assert cifar10.verdict([-2.0, 4.0]) == "+1.0 ± 3.0 (2)"
    assert cifar10.verdict([-2.0]) == "−2.0 (1)"


def test_seeds_are_told_from_other_numbers():
    """finetune-10-peco-0 is a run on 10 % of the labels, of seed 0; not of an arm "10-peco"."""
    jobs = {name: dict(figures=dict(top1=value)) for name, value in (
        ("finetune-peco-10", 1.0), ("finetune-peco-2", 2.0), ("finetune-10-peco-0", 3.0))}
    assert list(cifar10.of_seeds(jobs, "finetune-peco", "top1").items()) == [(2, 2.0), (10, 1.0)]
    assert cifar10.of_seeds(jobs, "finetune-10-peco", "top1") == {0: 3.0}


def test_epochs_are_those_of_the_runs():
    """And not the recipe's of today, with which they need not have run."""
    jobs = {"teacher": dict(figures=dict(epoch=7.0), hardware=None),
            "pretrain-peco-3": dict(figures=dict(epoch=2.5), hardware=None)}
    sentences = cifar10.setting("cifar-cpu", jobs)
    assert "teacher 7, tokenizer *not run*, pretrain 2.5, finetune *not run*;" in sentences


def test_the_readme_shows_the_table_of_results():
    """Both are written by the tool: neither was edited by hand."""
    tables = []
    for file in ("README.md", "RESULTS.md"):
        text = (ROOT / file).read_text()
        start = text.split("<!-- cifar-cpu table -->\n")[1]
        tables.append(start.split("\n<!-- end -->")[0])
    assert tables[0] == tables[1]


# ------------------------------------------------------------------------------------------------
# Codewords

def test_codewords_are_average_pooled():
    """PeCo's Table 4: the mean of the vectors of an image's codes."""
    torch.manual_seed(0)
    network = VQTokenizer(32, channels=(16, 16, 16), codebook_size=8, code_dim=4)
    args = SimpleNamespace(data="synthetic:20", image_size=32, eval_crop=1.0, batch_size=8,
                           workers=0, amp="fp32")
    images = torch.cat([images for images, _ in codewords.batches(args, "train")])
    network(images)
    network.quantizer.initialize(torch.Generator())         # so that images have several codes
    network.eval()
    cpu = torch.device("cpu")
    features, labels = codewords.pooled_codewords(args, network, "train", cpu)
    assert features.shape == (20, 4)
    assert labels.tolist() == 2 * list(range(10))
    for codes, feature in zip(network.encode(images), features, strict=True):
        assert len(codes.unique()) > 1
        expected = sum(network.quantizer.codebook[code] for code in codes.flatten()) / 64
        torch.testing.assert_close(feature, expected)


class Shades(nn.Module):
    """A tokenizer whose code is an image's shade, and a classifier of it.

    blank: it reconstructs all images the same.
    """

    def __init__(self, blank):
        super().__init__()
        self.blank = blank
        self.quantizer = SimpleNamespace(lookup=self.lookup)

    def encode(self, images):
        shade = ((images.mean((1, 2, 3)) + 1) / 2 * 9).round().long()
        return shade.view(-1, 1, 1).expand(-1, 2, 2)

    def lookup(self, codes):
        return F.one_hot(codes, 10).float().permute(0, 3, 1, 2)

    def decode(self, codes):
        shade = torch.zeros(len(codes)) if self.blank else codes[:, 0, 0]
        return (shade / 9 * 2 - 1).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)

    def forward(self, images):
        return F.one_hot(self.encode(images)[:, 0, 0], 10)


@pytest.mark.parametrize("blank", [False, True])
def test_codewords_of_known_meaning(blank, folder, monkeypatch):
    for split in ("train", "val"):
        for shade in range(10):
            target = folder / "shades" / split / str(shade)
            target.mkdir(parents=True)
            image = Image.new("RGB", (32, 32), (round(shade / 9 * 255),) * 3)
            for i in range(4):
                image.save(target / f"{i}.png")
    trained = dict(data="shades", image_size=32, eval_crop=1.0, perceptual="any")
    monkeypatch.setattr(codewords.checkpoint, "load", lambda path, stages: dict(args=trained))
    monkeypatch.setattr(codewords, "load", lambda path, stages: Shades(blank))
    monkeypatch.setattr(codewords, "perceptual_network", lambda source: (None, None))
    monkeypatch.setattr(codewords, "PerceptualLoss", lambda network: nn.MSELoss())
    codewords.main(codewords.get_args([str(folder), "--classifier", "any", "--workers", "0"]))
    row = json.loads((folder / "log.jsonl").read_text())
    assert row["codewords"] is True
    assert (row["linear"], row["originals"], row["images"]) == (100, 100, 40)
    assert row["reconstructions"] == (10 if blank else 100)
    distance = sum((2 * i / 9) ** 2 for i in range(10)) / 10 if blank else 0.0
    assert row["distance"] == pytest.approx(distance, abs=1e-3)     # pixels have 8 bits


# ------------------------------------------------------------------------------------------------
# The runner, on scripts of a few lines

def script(name, *lines):
    Path(name).write_text("\n".join(["import pathlib, signal, sys, time", *lines]))
    return name, ""


def test_what_is_finished_is_not_run_again():
    """A tool's job is anew where the run was deleted that it looked at, and its log with it."""
    name, _ = script("count.py",
                     "open('count', 'a').write('x')",
                     "log = pathlib.Path('runs/cifar/tokenizer/log.jsonl')",
                     "log.write_text('{\"codewords\": true}')")
    log = Path("runs/cifar/tokenizer/log.jsonl")
    log.parent.mkdir(parents=True)
    runner = cifar10.Runner("cifar", 2)
    for flags in ("", "--workers 0", "--seed 1"):           # the third is another command
        runner.run({"codewords-tokenizer": (name, flags)})
    assert Path("count").read_text() == "xx"
    log.unlink()
    assert runner.finished() == {}
    runner.run({"codewords-tokenizer": (name, "--seed 1")})
    assert Path("count").read_text() == "xxx"


def test_a_failure_ends_the_rest_and_says_why(capsys):
    jobs = {
        "bad": script("bad.py", "sys.exit('no such data')"),
        "slow": script("slow.py", "time.sleep(60)", "pathlib.Path('slept').touch()"),
        "never": script("never.py", "pathlib.Path('never').touch()"),
    }
    with pytest.raises(SystemExit) as end:
        cifar10.Runner("cifar", 2).run(jobs)
    assert "no such data" in capsys.readouterr().out
    assert str(end.value.code).startswith("failed with status 1: python bad.py")
    assert not Path("slept").exists()                       # it was ended
    assert not Path("never").exists()
    finished = {file.parent.name: json.loads(file.read_text())["finished"]
                for file in Path("runs").glob("*/*/job.json")}
    assert finished == dict(bad=False, slow=False)


def test_jobs_wait_for_those_whose_folders_they_name():
    """In whatever order they are named; the others need not wait."""
    script("tokens.py",
           "while not pathlib.Path('order').exists():",
           "    time.sleep(0.1)",
           "open('order', 'a').write('tokens ')")
    script("student.py", "open('order', 'a').write('student ')")
    script("other.py", "open('order', 'a').write('other ')")
    cifar10.Runner("cifar", 2).run({
        "pretrain": ("student.py", "--tokenizer {folder}/tokenizer"),
        "tokenizer": ("tokens.py", ""),
        "scratch": ("other.py", "--init {folder}/of-an-earlier-sitting"),
    })
    assert Path("order").read_text() == "other tokens student "


def test_sigterm_reaches_the_stages():
    script("stage.py",
           "def save(*_):",
           "    pathlib.Path('saved').touch()",
           "    sys.exit(143)",
           "signal.signal(signal.SIGTERM, save)",
           "pathlib.Path('begun').touch()",
           "time.sleep(60)")
    script("plan.py",
           f"sys.path.insert(0, {str(ROOT)!r})",
           "from tools.cifar10 import Runner",
           "runner = Runner('cifar', 1)",
           "signal.signal(signal.SIGTERM, runner.stop)",
           "runner.run({'job': ('stage.py', '')})")
    process = subprocess.Popen([sys.executable, "plan.py"], stderr=subprocess.PIPE, text=True)
    while not Path("begun").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode
    assert "the same command goes on" in error
    assert Path("saved").exists()
