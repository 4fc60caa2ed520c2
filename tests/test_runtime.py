"""Arguments, schedule, seeds, how a stage starts and ends."""
import math
import multiprocessing
import os
import signal
import threading
from argparse import Namespace

import pytest
import torch

import data
from support import flags, launch
from support.launch import InputError

# ------------------------------------------------------------------------------------------------
# Arguments

RECIPES = {
    "paper": dict(image_size=32, batch_size=64, epochs=2, lr=0.5),
    "demo": dict(image_size=16, batch_size=8, epochs=1, lr=0.1),
    "steps": dict(image_size=32, batch_size=64, steps=9, lr=0.5),
}


def parse(*argv):
    p = flags.parser("teacher", "A stage.\n\nMore.")
    p.add_argument("--image-size", type=int, help="side of the images, pixels")
    return flags.parse(p, RECIPES, argv)


def test_flags_win_over_the_recipe():
    assert parse().recipe == "paper"
    assert parse().epochs == 2
    assert parse("--recipe", "demo").epochs == 1
    args = parse("--recipe", "demo", "--epochs", "7")
    assert (args.epochs, args.image_size) == (7, 16)


def test_the_output_is_named_after_recipe_and_stage():
    assert parse("--recipe", "demo").output == "runs/demo/teacher"
    assert parse("--output", "my/RECIPE").output == "my/RECIPE"     # a path is taken as it is


def test_the_recipes_lr_scales_with_the_batch_and_the_users_does_not():
    assert parse().lr == 0.5
    assert parse("--batch-size", "16").lr == 0.125
    assert parse("--batch-size", "16", "--lr", "0.3").lr == 0.3


def test_auto_is_fp32_on_a_cpu_whatever_it_has():
    args, cpu = parse(), torch.device("cpu")
    assert launch.precision(args, cpu) == "fp32"
    args.amp = "bf16"
    assert launch.precision(args, cpu) == "bf16"


def test_epochs_or_steps():
    def length(*argv):
        args = parse("--recipe", "steps", *argv)
        return args.epochs, args.steps

    assert length() == (None, 9)
    assert length("--epochs", "3") == (3, None)
    assert length("--steps", "3") == (None, 3)


@pytest.mark.parametrize("argv, named", [
    (["--epochs", "3", "--steps", "9"], "--epochs and --steps"),
    (["--recipe", "imaginary"], "imaginary"),
])
def test_flags_that_make_no_sense_are_refused(argv, named, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("recipe, batch", [("paper", 64), ("demo", 8)])
def test_help_shows_the_defaults_of_the_recipe(recipe, batch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--recipe", recipe, "--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"images of a step, over all ranks and micro-batches (default: {batch})" in text
    assert f"(default: runs/{recipe}/teacher)" in text


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


def test_number_of_steps():
    args = Namespace(batch_size=10, epochs=3, steps=None, accumulate=4)
    assert launch.total_steps(args, 29) == (2, 6)          # the epoch's last 9 are left out
    args.steps = 5
    assert launch.total_steps(args, 29) == (2, 5)
    with pytest.raises(InputError, match="--batch-size 10"):
        launch.total_steps(args, 9)


# ------------------------------------------------------------------------------------------------
# Starting and ending

def start(error):
    """Launch a stage that raises an error."""
    def main(args):
        raise error

    launch.start(main, Namespace(stage="teacher", batch_size=8, accumulate=1))


@pytest.mark.parametrize("error, status", [
    (InputError("--patch-size: 5 is odd"), 2),
    # out of a loader's worker
    (InputError("Caught InputError in DataLoader worker process 0.\nTraceback …\n"
                "launch.InputError: --patch-size: 5 is odd\n"), 2),
    (FloatingPointError("--patch-size: 5 is odd"), 3),
])
def test_what_a_user_can_mend_ends_with_one_line_and_a_status(error, status, capsys):
    with pytest.raises(SystemExit) as stop:
        start(error)
    assert stop.value.code == status
    assert capsys.readouterr().err == "teacher.py: --patch-size: 5 is odd\n"


def test_ctrl_c_before_the_first_step_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        start(KeyboardInterrupt())
    assert stop.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        start(error)


@pytest.fixture
def handlers():
    """Puts back what catch_signals sets outside a stage's main()."""
    before = {number: signal.getsignal(number) for number in launch.SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("error", [None, KeyError("a bug")])
def test_whatever_ends_a_stage_nothing_of_it_is_left(error, handlers):
    """As when its main() is called in a notebook."""
    @launch.cleans_up
    def main(args):
        launch.catch_signals()
        dataset = torch.utils.data.TensorDataset(torch.zeros(1000))
        args.batches = iter(data.make_loader(dataset, [[i] for i in range(1000)], workers=2))
        next(args.batches)
        assert len(multiprocessing.active_children()) == 2      # the control
        assert signal.getsignal(signal.SIGINT) != handlers[signal.SIGINT]
        if error:
            raise error
        return "row"

    if error:
        with pytest.raises(type(error)):
            main(Namespace())
    else:
        assert main(Namespace()) == "row"
    assert multiprocessing.active_children() == []
    assert {number: signal.getsignal(number) for number in launch.SIGNALS} == handlers


def test_a_stage_in_a_thread_catches_no_signals(handlers):
    caught = []
    main = launch.cleans_up(lambda args: caught.append(launch.catch_signals()))
    thread = threading.Thread(target=main, args=[Namespace()])
    thread.start()
    thread.join()
    assert caught == [[]]
    assert {number: signal.getsignal(number) for number in launch.SIGNALS} == handlers


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


def test_a_tool_that_does_not_share_its_work_refuses_torchrun(monkeypatch):
    launch.one_process("attack")
    monkeypatch.setattr(launch, "world_size", lambda: 2)
    with pytest.raises(InputError, match="tools.attack"):
        launch.one_process("attack")


# ------------------------------------------------------------------------------------------------
# Steps

def test_cosine_schedule():
    rates = [launch.cosine(step, 110, 10, 3.0) for step in range(111)]
    assert rates[:10] == pytest.approx([0.3 * i for i in range(1, 11)], rel=0, abs=1e-12)
    assert rates[9] == rates[10] == 3.0                     # the warm-up ends at the peak
    assert rates[60] == pytest.approx(1.5)
    assert rates[35] == pytest.approx(3 * (2 + math.sqrt(2)) / 4)
    assert rates[110] == pytest.approx(0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert launch.cosine(60, 110, 10, 3.0, final=1.0) == pytest.approx(2.0)
    assert launch.cosine(110, 110, 10, 3.0, final=1.0) == pytest.approx(1.0)
    assert launch.cosine(0, 10, 0, 2.0) == 2.0             # no warm-up
    assert launch.cosine(5, 5, 5, 2.0) == 2.0              # only warm-up: no division by zero
    # a fraction of a step: at or under the peak
    assert all(0 < launch.cosine(step, 20, 2.5, 1.0) <= 1.0 for step in range(20))


def test_seeds_are_distinct():
    numbers = [(0,), (1,), (0, 1), (1, 0), (1, 11), (11, 1), (111,), (0, 10), (10, 0)]
    numbers += [(0, 0, i) for i in range(1000)]
    seeds = [launch.derive_seed(*one) for one in numbers]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2 ** 63 for seed in seeds)
    assert launch.derive_seed(1, 2) == launch.derive_seed(1, 2)
