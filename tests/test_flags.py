"""Numbers that make no sense, files of something else: one line names the culprit, status 2."""
import argparse

import pytest
import torch
from conftest import STAGES
from test_stages import fails, newest

import support.flags
from support import launch
from support.flags import within
from support.launch import InputError
from tools import attack, bench, figures, probe

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
                assert lines[0].startswith(f"{stage}.py: {flag} {value}: "), lines
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
                assert text in str(error)
        return found

    assert accepted(float, "[0, 1)", "-0.1", "0", "0.9", "1", "nan") == [0, 0.9]
    assert accepted(float, "(0, 1]", "0", "1e-9", "1", "1.1") == [1e-9, 1]
    assert accepted(float, "(0, inf)", "0", "1e300", "inf") == [1e300]
    assert accepted(int, "[2, 8]", "1", "2", "2.5", "8", "9", "many") == [2, 8]
    assert accepted(int, f"[0, {2 ** 63})", str(2 ** 63 - 1), str(2 ** 63)) == [2 ** 63 - 1]


TOOLS = [
    (attack.get_args, ["run", "--images", "0"]),
    (figures.main, ["masked", "run", "--masked", "0"]),
    (bench.get_args, ["--repeats", "0"]),
    (probe.get_args, ["run", "knn", "--label-fraction", "0"]),
]


@pytest.mark.parametrize("parse, flags", TOOLS)
def test_numbers_of_the_tools(parse, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("tools.") and f"{flags[-2]} {flags[-1]}: " in message


@pytest.mark.parametrize("text", ["abc", "0", "1.5", str(10 ** 12)])
def test_numbers_of_drawn_scenes(text, capsys):
    assert f"--data synthetic:{text}" in fails(capsys, "teacher", "--data", f"synthetic:{text}")


@pytest.mark.parametrize("stage, flag, longest", [
    ("teacher", "--warmup-epochs", 2), ("tokenizer", "--warmup-steps", 8)])
def test_a_warm_up_is_no_longer_than_the_run(stage, flag, longest):
    args = ["--recipe", "demo", "--batch-size", "16", "--epochs", "2", flag]
    args = [STAGES[stage].get_args([*args, str(value)]) for value in (longest, longest + 1)]
    assert launch.total_steps(args[0], 64) == (4, 8)
    with pytest.raises(InputError, match=f"{flag} {longest + 1}"):
        launch.total_steps(args[1], 64)


def test_steps_cut_a_run_short_in_its_warm_up():
    args = STAGES["segment"].get_args(["--steps", "100"])   # to measure the speed, say
    assert launch.total_steps(args, 160)[1] == 100 < args.warmup_steps


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
    with pytest.raises(SystemExit) as stop:
        launch.launch_tool("figures", lambda: figures.main(["reconstructions", "nowhere"]))
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("tools.figures: ") and message.count("\n") == 1
    assert "nowhere" in message
