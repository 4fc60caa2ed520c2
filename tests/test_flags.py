"""Every flag is read, has a value in every recipe, and a range. What is refused is named."""
import re
from functools import partial

import pytest
import torch
from conftest import ROOT, STAGES
from helpers import fails, newest

import support.flags
from support import launch
from support.launch import InputError
from tools import attack, bench, figures, probe

# Read the flags that stages share.
LIBRARY = ("support/flags.py", "support/launch.py", "support/run.py", "support/weights.py",
           "data.py")
WITHOUT_DEFAULT = {"statistics", "steps", "epochs", "perceptual_layers", "decoder_channels",
                   "decoder_blocks", "vit"}

# ------------------------------------------------------------------------------------------------
# All flags of all stages

def flags_of(stage, monkeypatch):
    """A stage's flags, as argparse has them: {name: action}."""
    with monkeypatch.context() as patch:
        patch.setattr(support.flags, "parse", lambda p, *_: p)
        return {action.dest: action for action in STAGES[stage].get_args([])._actions}


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_is_read(stage, monkeypatch):
    unread = set(flags_of(stage, monkeypatch)) - {"help", "recipe"}     # parse() reads them
    for file in (f"{stage}.py", *LIBRARY):
        unread -= set(re.findall(r"\bargs\.(\w+)\b(?! = )", (ROOT / file).read_text()))
    assert not unread


@pytest.mark.parametrize("stage", STAGES)
def test_recipes_are_of_flags_and_fill_them_all(stage, monkeypatch):
    dense = stage in ("segment", "detect")
    recipes = STAGES[stage].RECIPES
    assert list(recipes) == (["paper", "demo"] if dense else ["paper", "photos", "cifar", "demo"])
    for name, recipe in recipes.items():
        assert set(recipe) <= set(flags_of(stage, monkeypatch))
        args = vars(STAGES[stage].get_args(["--recipe", name]))
        assert args == args | recipe
        empty = {key for key, value in args.items() if value is None}
        assert empty <= WITHOUT_DEFAULT
        assert len(empty & {"steps", "epochs"}) == 1


# ------------------------------------------------------------------------------------------------
# Numbers

VALUES = ["0", "-1", "nan", "inf", "abc"]
# What these must refuse, whatever else they do.
REFUSED = {
    "--seed": [str(2 ** 63)], "--steps": ["0", "2.5"], "--lr": ["-1"],
    "--temperature": ["0", "-1"], "--momentum": ["1.5"],
    "--codebook-size": ["1"], "--decay": ["1"], "--clip": ["0"], "--drop-path": ["1"],
    "--label-fraction": ["0", "1.1"], "--smoothing": ["1"], "--boxes": ["0"],
    "--channels": ["0"], "--workers": ["1000"], "--eval-crop": ["0", "1.5"], "--betas": ["1"],
    "--mask-ratio": ["0", "1"], "--crop-min": ["0", "1.5"], "--randaugment": ["31"],
    "--jitter": ["2"], "--erasing": ["1.5"], "--layer-decay": ["0", "2"],
}


def refused(capsys, call, *arguments):
    """The line on stderr of a call that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("stage", STAGES)
def test_every_number_is_within_its_range_or_refused(stage, capsys, monkeypatch):
    numbers = [action for action in flags_of(stage, monkeypatch).values() if action.type]
    assert len(numbers) > 15
    for action in numbers:
        flag = action.option_strings[0]
        assert action.type not in (int, float), f"{flag}: without a range"
        count = action.nargs if isinstance(action.nargs, int) else 1
        for value in VALUES + REFUSED.get(flag, []):
            try:
                args = STAGES[stage].get_args([flag, *[value] * count])
            except SystemExit as stop:
                assert stop.code == 2
                (line,) = capsys.readouterr().err.splitlines()
                assert line.startswith(f"{stage}.py: {flag} {value}: "), line
            else:
                assert value == "0" and value not in REFUSED.get(flag, [])
                found = vars(args)[action.dest]
                assert found == ([0] * count if isinstance(found, list) else 0)


@pytest.mark.parametrize("parse, flags", [
    (attack.get_args, ["run", "--images", "0"]),
    (figures.main, ["masked", "run", "--masked", "0"]),
    (bench.get_args, ["--repeats", "0"]),
    (probe.get_args, ["run", "knn", "--label-fraction", "0"]),
])
def test_numbers_of_the_tools(parse, flags, capsys):
    line = refused(capsys, parse, flags)
    assert line.startswith("tools.") and f"{flags[-2]} {flags[-1]}: " in line


@pytest.mark.parametrize("text", ["abc", "0", "1.5", str(10 ** 12)])
def test_numbers_of_drawn_scenes(text, capsys):
    assert f"--data synthetic:{text}" in fails(capsys, "teacher", "--data", f"synthetic:{text}")


@pytest.mark.parametrize("stage, flag, longest", [
    ("teacher", "--warmup-epochs", 2), ("tokenizer", "--warmup-steps", 8)])
def test_a_warm_up_is_no_longer_than_the_run(stage, flag, longest):
    def steps(*flags):
        flags = ["--recipe", "demo", "--batch-size", "16", *map(str, flags)]
        return launch.total_steps(STAGES[stage].get_args(flags), 64)

    assert steps("--epochs", 2, flag, longest) == (4, 8)
    with pytest.raises(InputError, match=f"{flag} {longest + 1}"):
        steps("--epochs", 2, flag, longest + 1)
    assert steps("--steps", 7, flag, longest + 1) == (4, 7)     # cut short in it: to measure speed


# ------------------------------------------------------------------------------------------------
# Files and folders of something else

@pytest.mark.parametrize("contents", [{}, dict(model={}), dict(epoch=3)])
def test_a_file_without_weights_is_not_from_scratch(contents, capsys):
    torch.save(contents, "empty.pt")
    assert "--init empty.pt: " in fails(capsys, "finetune", "--init", "empty.pt")


@pytest.mark.parametrize("stage, flag, source, name", [
    ("finetune", "--init", "pretrain", "blocks.1.mlp.fc1.bias"),
    ("tokenizer", "--perceptual", "teacher", "blocks.0.norm1.weight")])
def test_weights_of_others_that_are_not_finite(stage, flag, source, name, chain, capsys):
    weights = newest(getattr(chain, source))["model"]
    weights[name][0] = torch.nan
    torch.save(dict(state_dict=weights), "other.pth")
    message = fails(capsys, stage, flag, "other.pth")
    assert f"{flag} other.pth: " in message and name in message


def test_a_tool_names_a_run_that_is_not_there(capsys):
    main = partial(figures.main, ["reconstructions", "nowhere"])
    line = refused(capsys, launch.launch_tool, "figures", main)
    assert line.startswith("tools.figures: ") and "nowhere" in line
