"""Arguments, schedule, seeds, how a stage starts and ends."""
import contextlib
import math
import multiprocessing
import os
import signal
from argparse import Namespace

import pytest
import torch
from conftest import run
from helpers import fails

import segment
import teacher
from support import launch
from support.launch import InputError
from support.run import Run

PAPER, DEMO = teacher.RECIPES["paper"], teacher.RECIPES["demo"]

# ------------------------------------------------------------------------------------------------
# Arguments

def test_flags_win_over_the_recipe():
    args = teacher.get_args(["--recipe", "demo", "--epochs", "7"])
    assert (args.epochs, args.image_size) == (7, DEMO["image_size"])
    assert args.output == "runs/demo/teacher"
    assert teacher.get_args([]).recipe == "paper"


def test_the_recipes_lr_scales_with_the_batch_and_the_users_does_not():
    quarter = ["--batch-size", str(PAPER["batch_size"] // 4)]
    assert teacher.get_args([]).lr == PAPER["lr"]
    assert teacher.get_args(quarter).lr == PAPER["lr"] / 4
    assert teacher.get_args([*quarter, "--lr", "0.3"]).lr == 0.3


def test_epochs_or_steps():
    """Also where the recipe counts in steps."""
    assert segment.RECIPES["paper"]["steps"]
    lengths = [segment.get_args([flag, "3"]) for flag in ("--epochs", "--steps")]
    assert [(args.epochs, args.steps) for args in lengths] == [(3, None), (None, 3)]


@pytest.mark.parametrize("flags, named", [
    (["--epochs", "3", "--steps", "9"], "--epochs and --steps"),
    (["--recipe", "imaginary"], "--recipe imaginary"),
])
def test_flags_that_make_no_sense_are_refused(flags, named, capsys):
    assert named in fails(capsys, "teacher", *flags)


def test_help_shows_the_defaults_of_the_recipe(capsys):
    with pytest.raises(SystemExit) as stop:
        teacher.get_args(["--recipe", "demo", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"all ranks and micro-batches (default: {DEMO['batch_size']})" in text
    assert "(default: runs/demo/teacher)" in text


def test_auto_is_fp32_on_a_cpu_whatever_it_has():
    cpu = torch.device("cpu")
    assert launch.precision(Namespace(amp="auto"), cpu) == "fp32"
    assert launch.precision(Namespace(amp="bf16"), cpu) == "bf16"


def test_a_download_is_made_once_on_a_machine(monkeypatch):
    done = []
    monkeypatch.setattr(launch.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(launch.dist, "barrier", lambda: done.append("barrier"))
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with launch.first_of_machine():
            done.append(f"rank {rank} loads")
    assert done == ["rank 0 loads", "barrier", "barrier", "rank 1 loads"]


@pytest.mark.parametrize("ranks, fits, size, advice", [(1, 12, 4, 9), (4, 24, 2, 12)])
def test_batches_that_do_not_divide_are_refused(ranks, fits, size, advice, monkeypatch):
    monkeypatch.setattr(launch, "world_size", lambda: ranks)
    assert launch.micro_batch(Namespace(batch_size=fits, accumulate=3)) == size
    with pytest.raises(InputError, match=f"--batch-size 10 .*: try {advice}"):
        launch.micro_batch(Namespace(batch_size=10, accumulate=3))


def test_a_tool_that_does_not_share_its_work_refuses_torchrun(monkeypatch):
    launch.one_process("attack")
    monkeypatch.setattr(launch, "world_size", lambda: 2)
    with pytest.raises(InputError, match="tools.attack"):
        launch.one_process("attack")


# ------------------------------------------------------------------------------------------------
# Starting and ending

def start(error):
    """Launch a stage that raises an error."""
    def main(args):
        raise error

    launch.start(main, Namespace(stage="teacher", batch_size=8, accumulate=1))


@pytest.mark.parametrize("error, status, line", [
    (FloatingPointError("loss not finite"), 3, "loss not finite"),
    (KeyboardInterrupt(), 130, "interrupted; the same command goes on from the last checkpoint"),
])
def test_what_is_no_bug_ends_with_one_line_and_a_status(error, status, line, capsys):
    with pytest.raises(SystemExit) as stop:
        start(error)
    assert stop.value.code == status
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"teacher.py: {line}")


@pytest.fixture
def handlers():
    """Puts back what catch_signals sets outside a stage's main()."""
    before = {number: signal.getsignal(number) for number in (*launch.SIGNALS, signal.SIGCHLD)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("error", [None, KeyError("a bug")])
def test_whatever_ends_a_stage_nothing_of_it_is_left(error, handlers, monkeypatch):
    """As when its main() is called in a notebook: no handler of its signals, no worker."""
    def watched(self):
        seen.append((signal.getsignal(signal.SIGINT) != handlers[signal.SIGINT],
                     len(multiprocessing.active_children())))
        if error:
            raise error
        agree(self)

    seen, agree = [], Run.agree
    monkeypatch.setattr(Run, "agree", watched)
    with pytest.raises(KeyError) if error else contextlib.nullcontext():
        run("finetune", "--init", "none", "--workers", "1", "--steps", "1")
    assert seen == [(True, 1)]                              # the control
    assert multiprocessing.active_children() == []
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_signal_is_remembered_and_a_second_ctrl_c_ends_at_once(handlers):
    caught = launch.catch_signals()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    assert caught == [signal.SIGTERM, signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_nohup_keeps_a_run_from_the_terminals_end_and_nothing_else(handlers):
    for number in launch.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    launch.catch_signals()
    ignored = {n for n in launch.SIGNALS if signal.getsignal(n) == signal.SIG_IGN}
    assert ignored == {signal.SIGHUP}


# ------------------------------------------------------------------------------------------------
# Steps

def test_cosine_schedule():
    rates = [launch.cosine(step, 110, 10, 3.0) for step in range(111)]
    assert rates[:10] == pytest.approx([0.3 * i for i in range(1, 11)], rel=0, abs=1e-12)
    assert rates[9] == rates[10] == 3.0                     # the warm-up ends at the peak
    for step, expected in ((35, 1.5 + 1.5 * math.sqrt(0.5)), (60, 1.5), (110, 0.0)):
        assert rates[step] == pytest.approx(expected, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert launch.cosine(60, 110, 10, 3.0, final=1.0) == pytest.approx(2.0)
    assert launch.cosine(0, 10, 0, 2.0) == 2.0              # no warm-up
    assert launch.cosine(5, 5, 5, 2.0) == 2.0               # only warm-up: no division by zero
    # a fraction of a step: at or under the peak
    assert all(0 < launch.cosine(step, 20, 2.5, 1.0) <= 1.0 for step in range(20))
