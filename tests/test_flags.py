"""Numbers that make no sense, files of something else: one line names the culprit, status 2."""
import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import COMMON, OWN, ROOT, STAGES
from test_stages import fails, newest

import support.flags
from support import launch
from support.flags import within
from support.launch import InputError
from tools import attack, bench, cifar10, codewords, export, figures, probe

# ------------------------------------------------------------------------------------------------
# Every numeric flag of every stage

VALUES = ["0", "-1", "nan", "inf", "abc"]
# What these must refuse, whatever else they do.
REFUSED = {
    "--steps": ["0"], "--lr": ["-1"], "--temperature": ["0", "-1"], "--momentum": ["1.5"],
    "--codebook-size": ["1"], "--decay": ["1"], "--clip": ["0"], "--drop-path": ["1"],
    "--label-fraction": ["0", "1.1"], "--smoothing": ["1"], "--boxes": ["0"],
    "--channels": ["0"], "--workers": ["1000"], "--eval-crop": ["0", "1.5"], "--betas": ["1"],
    "--mask-ratio": ["0", "1"], "--crop-min": ["0", "1.5"], "--randaugment": ["31"],
    "--jitter": ["2"], "--erasing": ["1.5"], "--layer-decay": ["0", "2"],
}


def numeric_flags(stage, monkeypatch):
    """{flag: how many values it takes}, of all flags that are not words of their own."""
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(support.flags, "parse", lambda p, *_: kept.append(p))
        STAGES[stage].get_args([])
    counts = {}
    for action in kept[0]._actions:
        assert action.type not in (int, float), f"{action.option_strings}: without a range"
        if action.type is not None:
            counts[action.option_strings[0]] = action.nargs if isinstance(action.nargs, int) else 1
    return counts


@pytest.mark.parametrize("stage", STAGES)
def test_every_number_is_within_its_range_or_refused(stage, capsys, monkeypatch):
    counts = numeric_flags(stage, monkeypatch)
    assert len(counts) > 15
    for flag, count in counts.items():
        name = flag[2:].replace("-", "_")
        for value in VALUES + REFUSED.get(flag, []):
            try:
                args = STAGES[stage].get_args([flag, *[value] * count])
            except SystemExit as stop:
                assert stop.code == 2
                lines = capsys.readouterr().err.splitlines()
                assert len(lines) == 1
                assert lines[0].startswith(f"{stage}.py: {flag} {value}: a "), lines
                assert lines[0].endswith(" is needed")
            else:
                assert value == "0" and value not in REFUSED.get(flag, [])
                found = getattr(args, name)
                assert found == ([0] * count if isinstance(found, list) else 0)


def test_an_interval_is_as_it_is_written():
    def accepted(kind, interval, *texts):
        found = []
        for text in texts:
            try:
                found.append(within(kind, interval)(text))
            except argparse.ArgumentTypeError as error:
                assert text in str(error) and interval in str(error)
        return found

    assert accepted(float, "[0, 1)", "-0.1", "0", "0.9", "1", "nan") == [0, 0.9]
    assert accepted(float, "(0, 1]", "0", "1e-9", "1", "1.1") == [1e-9, 1]
    assert accepted(float, "(0, inf)", "0", "1e300", "inf") == [1e300]
    assert accepted(int, "[2, 8]", "1", "2", "2.5", "8", "9", "many") == [2, 8]
    assert accepted(int, f"[0, {2 ** 63})", str(2 ** 63 - 1), str(2 ** 63)) == [2 ** 63 - 1]


TOOLS = [
    (attack.get_args, ["run", "--images", "0"]),
    (attack.get_args, ["run", "--batch-size", "-1"]),
    (codewords.get_args, ["run", "--workers", "1000"]),
    (figures.main, ["masked", "run", "--masked", "0"]),
    (bench.get_args, ["--repeats", "0"]),
    (cifar10.get_args, ["--seeds", "-1"]),
    (probe.get_args, ["run", "knn", "--label-fraction", "0"]),
]


@pytest.mark.parametrize("parse, flags", TOOLS)
def test_numbers_of_the_tools(parse, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("tools.") and f"{flags[-2]} {flags[-1]}: a " in message


WORST = [
    ("teacher", ["--lr", "1e9", "--weight-decay", "1e9"]),
    ("teacher", ["--log-every", "1000000000", "--save-every", "1000000000"]),
    ("tokenizer", ["--perceptual-weight", "0", "--commitment-weight", "1e9"]),
    ("tokenizer", ["--perceptual-weight", "0", "--decoder-channels", "8192"]),
    ("tokenizer", ["--perceptual-weight", "0", "--codebook-size", "2", "--revive", "0.999"]),
    ("finetune", ["--init", "none", "--layer-scale", "1e9", "--smoothing", "0.999"]),
    ("finetune", ["--init", "none", "--mixup", "1e9"]),
    ("finetune", ["--init", "none", "--crop-min", "1e-300", "--seed", str(2 ** 63 - 1)]),
    ("finetune", ["--init", "none", "--patch-size", "256"]),
    ("finetune", ["--init", "none", "--accumulate", "1000000000"]),
    ("segment", ["--init", "none", "--aux-weight", "1e9"]),
]


@pytest.mark.parametrize("stage, flags", WORST)
def test_extreme_flag_values_exit_cleanly(stage, flags, capsys):
    module = STAGES[stage]
    try:
        args = module.get_args([*COMMON, *OWN[stage], "--steps", "2", *flags])
        launch.start(module.main, args)
    except SystemExit as stop:
        assert stop.code in (2, 3)
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["abc", "0", "-3", "1.5", str(10 ** 12), "nan"])
def test_numbers_of_drawn_scenes(text, capsys):
    for stage in ("teacher", "segment"):
        flags = ["--init", "none"] if stage == "segment" else []
        message = fails(capsys, stage, "--data", f"synthetic:{text}", *flags)
        assert f"--data synthetic:{text}: " in message


def test_a_warm_up_is_no_longer_than_the_run(capsys):
    recipe = ["--recipe", "demo", "--data", "synthetic:64", "--batch-size", "16"]
    for stage, flag, longest in (
            ("teacher", "--warmup-epochs", 2), ("tokenizer", "--warmup-steps", 8)):
        args = STAGES[stage].get_args([*recipe, "--epochs", "2", flag, str(longest)])
        assert launch.total_steps(args, 64) == (4, 8)
        setattr(args, flag[2:].replace("-", "_"), longest + 1)
        message = f"{flag} {longest + 1} .* take {longest} or less"
        with pytest.raises(InputError, match=message):
            launch.total_steps(args, 64)


def test_steps_cut_a_run_short_in_its_warm_up():
    args = STAGES["segment"].get_args(["--steps", "100"])   # to measure the speed, say
    assert args.warmup_steps == 1500
    assert launch.total_steps(args, 160)[1] == 100


# ------------------------------------------------------------------------------------------------
# Files that hold something else

@pytest.mark.parametrize("contents", [{}, dict(model={}), dict(state_dict={}), dict(epoch=3)])
def test_a_file_without_weights_is_not_from_scratch(contents, capsys):
    torch.save(contents, "empty.pt")
    assert "--init empty.pt: " in fails(capsys, "finetune", "--init", "empty.pt")


def test_weights_of_others_that_are_not_finite(chain, capsys):
    weights = newest(chain.pretrain)["model"]
    weights["blocks.1.mlp.fc1.bias"][3] = torch.nan
    torch.save(dict(model=weights), "beit.pth")
    message = fails(capsys, "finetune", "--init", "beit.pth")
    assert "--init beit.pth: blocks.1.mlp.fc1.bias is not finite" in message
    weights = newest(chain.teacher)["model"]
    weights["blocks.0.norm1.weight"][0] = torch.inf
    torch.save(dict(state_dict=weights), "moco.pth")
    message = fails(capsys, "tokenizer", "--perceptual", "moco.pth")
    assert "--perceptual moco.pth: blocks.0.norm1.weight is not finite" in message


# ------------------------------------------------------------------------------------------------
# Other surroundings

def outcome(command, **environment):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ | environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("module", [
    *STAGES.values(), attack, bench, cifar10, codewords, export, figures, probe,
], ids=lambda module: module.__name__)
def test_without_docstrings(module, monkeypatch, capsys):
    """As under python -OO."""
    monkeypatch.setattr(module, "__doc__", None)
    get_args = getattr(module, "get_args", module.main)
    with pytest.raises(SystemExit) as stop:
        get_args(["--help"])
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.long                                           # it compiles all of PyTorch
@pytest.mark.parametrize("module", [["teacher.py"], ["-m", "tools.export"]], ids=" ".join)
def test_without_docstrings_in_a_process(module):
    status, _, err = outcome([sys.executable, "-OO", *module, "--help"])
    assert (status, err) == (0, b"")


def test_places_that_cannot_be_written(chain, capsys):
    Path("file").touch()
    for name, main, flags in (
            ("export", export.main, [str(chain.teacher), "file/out"]),
            ("figures", figures.main, ["reconstructions", "nowhere"])):
        with pytest.raises(SystemExit) as stop:
            launch.launch_tool(name, lambda main=main, flags=flags: main(flags))
        message = capsys.readouterr().err
        assert stop.value.code == 2
        assert message.count("\n") == 1
        assert message.startswith(f"tools.{name}: ")
