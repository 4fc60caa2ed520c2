"""tools/cifar10.py and tools/codewords.py: every command line of the plan, the runner, the report."""
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

import tokenizer
from conftest import ROOT
from test_cifar import generate
from tools import cifar10, codewords

TINY = ["--data", "tiny", "--batch-size", "8", "--steps", "2", "--workers", "0", "--amp", "fp32"]


class InProcess(cifar10.Runner):
    """Runs the same command lines in this process."""

    def run(self, jobs):
        for name, (script, flags) in jobs.items():
            if script == "tools.codewords":
                args = codewords.get_args([f"{self.folder}/{name.removeprefix('codewords-')}", "--recipe", self.recipe,
                                           *flags.split(), "--data", "tiny", "--workers", "0"])
                codewords.main(args)
            else:
                stage = importlib.import_module(script.removesuffix(".py"))
                stage.main(stage.get_args(["--recipe", self.recipe, "--output", f"{self.folder}/{name}", *flags.split(), *TINY]))
            (self.folder / name).mkdir(exist_ok=True)
            (self.folder / name / "job.json").write_text(json.dumps(dict(command="", seconds=1.0, finished=True, jobs=1)))


def few_ablations(recipe, whole=cifar10.ablations):
    return {title: dict(list(entries.items())[:2]) for title, entries in whole(recipe).items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The whole plan at a size of nothing, two seeds, the ablations too; the folder it ran in."""
    root, before = tmp_path_factory.mktemp("plan"), os.getcwd()
    os.chdir(root)
    try:
        generate(root / "tiny")
        cifar10.main_table(InProcess("cifar-cpu"), range(2))
        with pytest.MonkeyPatch.context() as patch:        # two entries of each table: the others differ by a number
            patch.setattr(cifar10, "ablations", few_ablations)
            cifar10.ablation_tables(InProcess("cifar-cpu"))
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def finished(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(cifar10, "ROOT", root)
    monkeypatch.setattr(cifar10, "ablations", few_ablations)
    return InProcess("cifar-cpu")


def test_the_whole_plan_and_its_report(finished, root):
    folder = root
    (folder / "README.md").write_text("before\n<!-- cifar-cpu table -->\nold\n<!-- end -->\nafter\n")
    cifar10.write(finished, range(2))
    results = (folder / "RESULTS.md").read_text()
    gpu, cpu = results.split("## `--recipe cifar-cpu`")
    assert "*not run*" not in cpu and not re.search(r"\b(nan|None)\b", results)
    assert gpu.count("*not run*") > 60                     # no log of it: every cell
    for arm, text in cifar10.ARMS.items():
        values = [finished.last(f"finetune-{arm}-{seed}", "top1", split="val") for seed in range(2)]
        mean, error = sum(values) / 2, abs(values[0] - values[1]) / 2
        assert f"| {text} | {mean:.1f} ± {error:.1f} |" in cpu
    readme = (folder / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert cifar10.arms_table(finished, range(2)) in readme and cifar10.arms_table(finished, range(2)) in cpu
    number = len(list(root.glob("runs/cifar-cpu/*/job.json")))
    assert f"| all | {number} |" in cpu                     # a second each
    for picture in ("cifar-cpu-peco-codes.png", "cifar-cpu-pixel-reconstructions.png"):
        assert f"results/{picture}" in cpu and (folder / "results" / picture).exists()
    again = results.replace("## `--recipe cifar-cpu`", "## `--recipe cifar-cpu` stale")
    (folder / "RESULTS.md").write_text(again)              # the other recipe's part is kept, this one written anew
    cifar10.write(finished, range(2))
    assert (folder / "RESULTS.md").read_text() == results


def test_what_is_not_finished_is_no_result(finished):
    Path("runs/cifar-cpu/other").mkdir()                    # a log of another's, not of the plan
    Path("runs/cifar-cpu/other/log.jsonl").write_text(json.dumps(dict(top1=50.0, split="val")) + "\n")
    assert finished.last("other", "top1") is None and finished.last("finetune-peco-0", "top1", split="val") is not None
    file = Path("runs/cifar-cpu/finetune-peco-0/job.json")
    whole = file.read_text()
    file.write_text(whole.replace("true", "false"))
    assert finished.last("finetune-peco-0", "top1", split="val") is None
    file.write_text(whole)


def test_test_images_choose_nothing(finished):
    """The searches see the held-out training images alone."""
    lr, drop = cifar10.SEARCH["cifar-cpu"][0]
    rows = finished.rows(f"search-{lr:g}-{drop:g}")
    assert {row["split"] for row in rows if "split" in row} == {"holdout"} and [row["images"] for row in rows if "top1" in row] == [10]


@pytest.mark.parametrize("recipe", cifar10.SEARCH)
def test_ablations_are_flags_of_the_tokenizer(recipe):
    names = []
    for entries in cifar10.ablations(recipe).values():
        for name, flags in entries.values():
            assert (flags is None) == (name in cifar10.TOKENIZERS)
            tokenizer.get_args(["--recipe", recipe, *(flags or "").split()])
            names += [name] * (flags is not None)
    assert len(names) == len(set(names)) == 2 + 4 + 1 + 1 + 2


def test_mean_and_standard_error():
    assert cifar10.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 3 ** -0.5))
    assert cifar10.show([50.0, 52.0]) == "51.0 ± 1.0" and cifar10.show([50.0]) == "50.0"
    assert cifar10.show([]) == cifar10.show([1.0, None]) == "*not run*"


def test_histograms():
    codes = torch.tensor([[0, 0, 2, 1], [3, 3, 3, 3]])
    assert codewords.histograms(codes, 4).tolist() == [[0.5, 0.25, 0.25, 0], [0, 0, 0, 1]]


class Shades(torch.nn.Module):
    """A tokenizer whose code is an image's shade, and a classifier of it. blank: it reconstructs all images the same."""

    def __init__(self, blank):
        super().__init__()
        self.blank, self.quantizer = blank, Namespace(codebook=torch.zeros(10, 1))

    def encode(self, images):
        shade = ((images.mean((1, 2, 3)) + 1) / 2 * 9).round().long()
        return shade.view(-1, 1, 1).expand(-1, 2, 2)

    def decode(self, codes):
        shade = (0 if self.blank else codes[:, :1, :1]) / 9 * 2 - 1
        return torch.zeros(len(codes), 3, 32, 32) + (shade if self.blank else shade.unsqueeze(1))

    def forward(self, images):
        return torch.nn.functional.one_hot(self.encode(images)[:, 0, 0], 10)


@pytest.mark.parametrize("blank", [False, True])
def test_codewords_of_known_meaning(blank, folder, monkeypatch):
    for split in ("train", "val"):
        for shade in range(10):
            (folder / "shades" / split / str(shade)).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32), (round(shade / 9 * 255),) * 3).save(folder / "shades" / split / str(shade) / f"{i}.png")
    monkeypatch.setattr(codewords, "load", lambda path, stages: Shades(blank))
    monkeypatch.setattr(codewords.stage, "perceptual_network", lambda path: (None, None))
    monkeypatch.setattr(codewords, "PerceptualLoss", lambda network: torch.nn.MSELoss())
    codewords.main(codewords.get_args([str(folder), "--recipe", "cifar-cpu", "--data", "shades", "--classifier", "any", "--workers", "0"]))
    row = json.loads((folder / "log.jsonl").read_text())
    assert (row["linear"], row["originals"], row["reconstructions"], row["images"]) == (100, 100, 10 if blank else 100, 40)
    assert row["distance"] == pytest.approx(sum((2 * i / 9) ** 2 for i in range(10)) / 10 if blank else 0, abs=1e-3)  # in 8 bits


# ------------------------------------------------------------------------------------------------
# The runner, on scripts of one line

def script(name, line):
    Path(name).write_text(f"import sys, time, pathlib\n{line}\n")
    return name, ""


def test_what_is_finished_is_not_run_again():
    job = script("count.py", "file = pathlib.Path('count'); file.write_text(file.read_text() + 'x' if file.exists() else 'x')")
    for flags in ("", "", "--seed 1"):                     # the third is another command
        cifar10.Runner("cifar", 2).run({"job": (job[0], flags)})
    assert Path("count").read_text() == "xx"


def test_a_failure_ends_the_rest_and_says_why(capsys):
    jobs = {"bad": script("bad.py", "sys.exit('no such data')"), "slow": script("slow.py", "time.sleep(60)"),
            "never": script("never.py", "pathlib.Path('never').touch()")}
    begun = time.time()
    with pytest.raises(SystemExit) as end:
        cifar10.Runner("cifar", 2).run(jobs)
    out = capsys.readouterr()
    assert "no such data" in out.out and str(end.value.code).startswith("failed with status 1: python bad.py")
    assert time.time() - begun < 30 and not Path("never").exists()
    assert {file.parent.name: json.loads(file.read_text())["finished"] for file in Path("runs").glob("*/*/job.json")} == dict(
        bad=False, slow=False)


def test_sigterm_reaches_the_stages():
    script("stage.py", "import signal\nsignal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').touch(), sys.exit(143)))\n"
                       "pathlib.Path('begun').touch()\ntime.sleep(60)")
    code = (f"import sys, signal; sys.path.insert(0, {str(ROOT)!r}); from tools.cifar10 import Runner\n"
            "runner = Runner('cifar', 1); signal.signal(signal.SIGTERM, runner.stop); runner.run({'job': ('stage.py', '')})")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while not Path("begun").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode and "the same command goes on" in error and Path("saved").exists()


def test_the_readme_shows_the_table_of_results():
    """Both are written by the tool: neither was edited by hand."""
    for recipe in cifar10.SEARCH:
        tables = []
        for file in ("README.md", "RESULTS.md"):
            text = (ROOT / file).read_text()
            tables.append(text.split(f"<!-- {recipe} table -->\n")[1].split("\n<!-- end -->")[0])
        assert tables[0] == tables[1]
