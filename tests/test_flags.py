"""Numbers that make no sense, and crafted files: one line that names the culprit, status 2."""
import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import COMMON, OWN, ROOT, STAGES, run
from test_stages import fails, newest

import support.flags
from support import checkpoint, launch
from support.flags import number
from support.launch import InputError
from support.run import Run
from tools import attack, bench, cifar10, codewords, export, figures

# ------------------------------------------------------------------------------------------------
# Every numeric flag of every stage

VALUES = ["0", "-1", "nan", "inf", "1e300", "1000000000000", "abc"]
# What these must refuse, whatever else they do.
REFUSED = {
    "--steps": ["0"], "--lr": ["-1"], "--temperature": ["0", "-1"], "--momentum": ["1.5"],
    "--codebook-size": ["1"], "--decay": ["1"], "--clip": ["0"], "--drop-path": ["1"],
    "--label-fraction": ["0", "1.1"], "--holdout": ["1"], "--smoothing": ["1"], "--boxes": ["0"],
    "--channels": ["0"], "--workers": ["1000"], "--eval-crop": ["0", "1.5"], "--betas": ["1"],
    "--mask-ratio": ["0", "1"], "--crop-min": ["0", "1.5"], "--randaugment": ["31"],
    "--jitter": ["2"], "--erasing": ["1.5"], "--layer-decay": ["0", "2"], "--ema-decay": ["1"],
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
                assert value in ("0", "1000000000000")      # nothing else is in any range
                assert value == "0" or flag == "--seed"
                assert value not in REFUSED.get(flag, [])
                found = getattr(args, name)
                assert found == ([float(value)] * count if "[" in str(found) else float(value))


def test_a_range_is_said_as_one_would(capsys):
    def message(kind, text, **limits):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            number(kind, **limits)(text)
        return str(error.value)

    assert message(float, "0", above=0) == "0: a number above 0 is needed"
    assert message(float, "1", at_least=0, below=1) == (
        "1: a number of at least 0 and below 1 is needed")
    assert message(int, "1.5", at_least=2, at_most=8) == (
        "1.5: a whole number of at least 2 and at most 8 is needed")
    assert message(int, "10000000000", at_least=1) == (
        "10000000000: a whole number of at least 1 and at most 1000000000 is needed")


TOOLS = [
    (attack.get_args, ["run", "--images", "0"]),
    (attack.get_args, ["run", "--batch-size", "-1"]),
    (codewords.get_args, ["run", "--workers", "1000"]),
    (figures.main, ["masked", "run", "--masked", "0"]),
    (bench.get_args, ["--repeats", "-1"]),
    (cifar10.main, ["--seeds", "-1"]),
    (cifar10.main, ["--jobs", "0"]),
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
    ("teacher", ["--temperature", "1e-300"]),
    ("teacher", ["--lr", "1e9", "--weight-decay", "1e9"]),
    ("teacher", ["--log-every", "1000000000", "--save-every", "1000000000"]),
    ("tokenizer", ["--perceptual-weight", "0", "--commitment-weight", "1e9"]),
    ("tokenizer", ["--perceptual-weight", "0", "--decoder-channels", "8192"]),
    ("tokenizer", ["--perceptual-weight", "0", "--codebook-size", "2", "--revive", "0.999"]),
    ("finetune", ["--init", "none", "--layer-scale", "1e9", "--smoothing", "0.999"]),
    ("finetune", ["--init", "none", "--mixup", "1e9", "--cutmix", "1e-300"]),
    ("finetune", ["--init", "none", "--crop-min", "1e-300", "--seed", str(2 ** 63 - 1)]),
    ("finetune", ["--init", "none", "--patch-size", "256"]),
    ("finetune", ["--init", "none", "--accumulate", "1000000000"]),
    ("segment", ["--init", "none", "--aux-weight", "1e9"]),
]


@pytest.mark.parametrize("stage, flags", WORST)
def test_what_a_range_lets_pass_runs_or_ends_with_a_status(stage, flags, capsys):
    module = STAGES[stage]
    try:
        args = module.get_args([*COMMON, *OWN[stage], "--steps", "2", *flags])
        launch.start(module.main, args)
    except SystemExit as stop:
        assert stop.code in (2, 3, 4)
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
        message = f"{flag} {longest + 1} is longer than .* take {flag} {longest} or less"
        with pytest.raises(InputError, match=message):
            launch.total_steps(args, 64)


def test_steps_cut_a_run_short_in_the_recipes_warm_up_but_not_in_the_flags(capsys):
    segment = STAGES["segment"]
    assert segment.get_args(["--steps", "100"]).warmup_steps == 1500    # to measure the speed, say
    with pytest.raises(SystemExit):
        segment.get_args(["--steps", "100", "--warmup-steps", "101"])
    assert "--warmup-steps 101 is longer than the run's 100 steps" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Crafted checkpoints

def resealed(source, path, change):
    """A copy of a run's newest checkpoint with a change, under a right digest."""
    state = newest(source)
    change(state)
    state.pop("digest", None)
    Path(path).parent.mkdir(exist_ok=True)
    checkpoint.write(Path(path), state)


def without(key):
    return lambda state: state.pop(key)


def with_value(key, value):
    return lambda state: state.update({key: value})


def with_argument(key, value):
    return lambda state: state["model_args"].update({key: value})


def with_weight(change):
    def apply(state):
        name = next(key for key in state["model"] if key.endswith("fc1.weight"))
        state["model"][name] = change(state["model"][name])
    return apply


CRAFTED = {
    **{f"no {key}": without(key) for key in ("model", "model_args", "args", "optimizer", "step")},
    "a list of arguments": with_value("model_args", [1]),
    "a step in words": with_value("step", "six"),
    "a step before the first": with_value("step", -1),
    "a model of words": with_value("model", dict(cls_token="x")),
    "bytes": with_weight(torch.Tensor.byte),
    "nan": with_weight(lambda weight: weight * torch.nan),
    "inf": with_weight(lambda weight: weight / 0),
}
MISFITS = {
    "dim x": with_argument("dim", "x"),
    "dim -3": with_argument("dim", -3),
    "dim 0": with_argument("dim", 0),
    "dim huge": with_argument("dim", 10 ** 12),
    "patch size 0": with_argument("patch_size", 0),
    "unknown": with_argument("colour", "red"),
}


@pytest.mark.parametrize("kind", CRAFTED | MISFITS)
def test_a_crafted_checkpoint_is_refused_by_name(kind, chain, capsys):
    change = (CRAFTED | MISFITS)[kind]
    resealed(chain.pretrain, "crafted.pt", change)
    message = fails(capsys, "finetune", "--init", "crafted.pt")
    assert "crafted.pt: " in message
    assert "weights_only" not in message
    resealed(chain.teacher, "teacher.pt", change)
    assert "teacher.pt: " in fails(capsys, "tokenizer", "--perceptual", "teacher.pt")
    with pytest.raises((SystemExit, InputError)) as error:
        launch.launch_tool("export", lambda: export.main(["crafted.pt", "out"]))
        figures.masked_predictions("crafted.pt")
    assert error.type is InputError or error.value.code == 2


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_checkpoint_is_not_resumed(kind, chain, capsys):
    resealed(chain.pretrain, "run/step-00000004.pt", CRAFTED[kind])
    message = fails(capsys, "pretrain", *chain.inputs["pretrain"], "--output", "run", before=1)
    assert "run: no sound checkpoint" in message


@pytest.mark.parametrize("optimizer", [{}, dict(param_groups=[3]), dict(param_groups=[{}])])
def test_an_optimizer_of_another_form_is_not_resumed(optimizer, chain, capsys):
    resealed(chain.pretrain, "run/step-00000004.pt", with_value("optimizer", optimizer))
    message = fails(capsys, "pretrain", *chain.inputs["pretrain"], "--output", "run",
                    "--resume", "force")
    assert "--output run holds a run of another architecture" in message


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


def test_torchs_advice_to_execute_a_file_is_not_passed_on(capsys):
    Path("garbage.pt").write_bytes(b"no checkpoint at all")
    message = fails(capsys, "finetune", "--init", "garbage.pt")
    assert "garbage.pt: no sound checkpoint (not one of plain values and tensors)" in message


# ------------------------------------------------------------------------------------------------
# Not finite: what the message says

@pytest.mark.parametrize("step, said", [(0, "look at --data"), (1, "try a lower --lr")])
def test_a_loss_that_is_not_finite_at_the_first_step_is_not_the_lrs_fault(step, said, monkeypatch):
    add = Run.add

    def poisoned(self, **terms):
        if self.step == step and "loss" in terms:
            terms["loss"] = terms["loss"] * torch.nan
        add(self, **terms)

    monkeypatch.setattr(Run, "add", poisoned)
    with pytest.raises(FloatingPointError) as error:
        run("teacher")
    assert said in str(error.value)
    listed = str(error.value).partition("(images ")[2].partition(")")[0]
    assert listed.count(",") == 7
    assert listed.endswith(" and 8 more")


# ------------------------------------------------------------------------------------------------
# Other surroundings

def outcome(command, **environment):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ | environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("module", [
    *STAGES.values(), attack, bench, cifar10, codewords, export, figures,
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


def test_a_locale_of_ascii():
    ascii_only = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    status, out, err = outcome([sys.executable, "tokenizer.py", "--help"], **ascii_only)
    assert (status, err) == (0, b"")
    assert b"\\u03bb, weight of the perceptual loss" in out     # λ


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
