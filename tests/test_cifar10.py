"""tools/cifar10.py: the command lines, the runs at --recipe cifar, the tables."""
import importlib
import json
from functools import partial
from pathlib import Path

import pytest
from helpers import rows
from test_data import make_folder

from tools import cifar10, codewords, probe


def parsed(command, *more):
    """The script's module, and its arguments."""
    script, *words = command.split()
    module = importlib.import_module(script.removesuffix(".py"))
    return module, module.get_args([*words, *more])


def test_each_command_reads_what_one_before_it_wrote(monkeypatch):
    commands, written = [], set()
    monkeypatch.setattr(cifar10, "run", lambda command, data: commands.append(command))
    cifar10.main(cifar10.get_args(["--ablations"]))
    assert len(commands) == len(set(commands)) > 100
    for command in commands:
        output = getattr(parsed(command)[1], "output", None)
        read = {word for word in command.split() if word.startswith("runs/cifar/")} - {output}
        assert read <= written, command
        written.add(output)


def test_a_small_run_and_its_tables(folder, monkeypatch, capsys):
    def short(command, data):
        more = ["--workers", "0"]
        if not command.startswith("tools."):
            command = command.partition(" --epochs")[0].partition(" --steps")[0]
            more += ["--data", "tiny", "--batch-size", "8", "--steps", "2", "--amp", "fp32"]
        module, args = parsed(command, *more)
        module.main(args)

    make_folder(folder / "tiny", [f"class {i}" for i in range(10)], images=4)
    monkeypatch.setattr(cifar10, "run", short)
    monkeypatch.setattr(probe, "linear_probe", partial(probe.linear_probe, steps=20))
    monkeypatch.setattr(codewords, "linear_probe", probe.linear_probe)
    cifar10.main(cifar10.get_args(["--arms", "pixel", "--seeds", "0"]))
    header, _, row, *_ = capsys.readouterr().out.split("\n| pre-training ")[1].splitlines()
    figures = row.split(" | ")[1:]
    assert len(figures) == len(cifar10.ACCURACY) + len(cifar10.CODES) + 1
    assert all(figures)
    for run, fraction in (("finetune", 1.0), ("finetune-10", 0.1), ("finetune-1", 0.01)):
        assert rows(f"runs/cifar/{run}-pixel-0")[0]["args"]["label_fraction"] == fraction


def test_tables_are_means_and_errors_over_seeds():
    for seed, top1 in enumerate((40.0, 42.0, 47.0)):
        run = Path(f"runs/cifar/finetune-peco-{seed}")
        run.mkdir(parents=True)
        lines = [dict(args={}), dict(split="val", top1=1.0), dict(split="val", top1=top1),
                 dict(attack=True, bim=top1 / 2)]
        (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    row = cifar10.tables(["peco"], [0, 1, 2], False).splitlines()[2].split(" | ")
    assert row[1:7] == ["43.0 ± 2.1", "", "", "", "", "21.5 ± 1.0"]
    assert cifar10.tables(["peco"], [1], False).splitlines()[2].split(" | ")[1] == "42.0"


def test_a_tool_is_run_once_and_a_failure_ends_the_rest(capfd):
    log = Path("runs/cifar/x/log.jsonl")
    log.parent.mkdir(parents=True)
    Path("tools").mkdir()
    Path("tools/attack.py").write_text(
        "open('runs/cifar/x/log.jsonl', 'a').write('{\"attack\": true}\\n')")
    Path("finetune.py").write_text("import sys; sys.exit(3)")
    for _ in range(2):
        cifar10.run("tools.attack runs/cifar/x --images 9")
    assert len(log.read_text().splitlines()) == 1
    with pytest.raises(SystemExit) as stop:
        cifar10.run("finetune.py --seed 1", "tiny")
    assert stop.value.code == 3
    assert "finetune.py --seed 1 --data tiny" in capfd.readouterr().err
