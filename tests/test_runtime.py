"""Arguments, schedule, the check of a step, checkpoints."""
import errno
import json
import math
import os
import pickle
import signal
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

import runtime
from runtime import InputError

# ------------------------------------------------------------------------------------------------
# Arguments

RECIPES = {"paper": dict(data="d", image_size=32, batch_size=64, epochs=2, lr=0.5),
           "demo": dict(data="synthetic", image_size=16, batch_size=8, epochs=1, lr=0.1)}


def parse(*flags):
    return runtime.parse(runtime.parser("A stage.\n\nMore.", "teacher"), RECIPES, flags)


def test_flags_win_over_the_recipe():
    assert parse().recipe == "paper" and parse().epochs == 2 and parse("--recipe", "demo").epochs == 1
    assert parse("--recipe", "demo", "--epochs", "7").epochs == 7 and parse("--epochs", "7").image_size == 32
    assert parse().output == "runs/paper/teacher" and parse("--recipe", "demo").output == "runs/demo/teacher"
    assert parse("--output", "here").output == "here"


def test_lr_scales_with_the_batch():
    assert parse().lr == 0.5
    assert parse("--batch-size", "16").lr == 0.125
    assert math.isclose(parse("--recipe", "demo", "--batch-size", "16", "--lr", "0.3").lr, 0.6)


def test_an_unknown_recipe_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--recipe", "imaginary")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "imaginary" in message and "paper, demo" in message


def test_batches_that_do_not_divide_are_refused(monkeypatch):
    assert runtime.micro_batch(Namespace(batch_size=12, accumulate=3)) == 4
    with pytest.raises(InputError, match="--batch-size 10 .* 1 ranks × 3 .*: try 9"):
        runtime.micro_batch(Namespace(batch_size=10, accumulate=3))
    monkeypatch.setattr(runtime, "world_size", lambda: 4)
    assert runtime.micro_batch(Namespace(batch_size=24, accumulate=3)) == 2
    with pytest.raises(InputError, match="--batch-size 10 .* 4 ranks × 3 .*: try 12"):
        runtime.micro_batch(Namespace(batch_size=10, accumulate=3))


def test_number_of_steps():
    args = Namespace(batch_size=10, epochs=3, steps=None)
    assert runtime.total_steps(args, 29) == (2, 6)          # the epoch's last 9 are left out
    args.steps = 5
    assert runtime.total_steps(args, 29) == (2, 5)
    with pytest.raises(InputError, match="--batch-size 10 .* 9 training images"):
        runtime.total_steps(args, 9)


def test_bad_input_ends_with_one_line_and_status_2(capsys):
    def main(args):
        raise InputError("--patch-size: 5 is odd")

    with pytest.raises(SystemExit) as stop:
        runtime.launch(main, Namespace(stage="teacher", dry_run=None))
    assert stop.value.code == 2 and capsys.readouterr().err == "teacher.py: --patch-size: 5 is odd\n"


def test_other_errors_keep_their_traceback():
    def main(args):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        runtime.launch(main, Namespace(stage="teacher", dry_run=None))


# ------------------------------------------------------------------------------------------------
# Steps

def test_cosine_schedule():
    rates = [runtime.cosine(step, 110, 10, 3.0) for step in range(111)]
    assert [round(rate, 12) for rate in rates[:10]] == [round(0.3 * i, 12) for i in range(1, 11)]
    assert rates[9] == rates[10] == 3.0                     # the warm-up ends at the peak
    assert rates[60] == pytest.approx(1.5) and rates[35] == pytest.approx(3 * (2 + math.sqrt(2)) / 4)
    assert rates[110] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert runtime.cosine(0, 10, 0, 2.0) == 2.0              # no warm-up
    assert runtime.cosine(5, 5, 5, 2.0) == 2.0               # nothing but warm-up: no division by zero


def test_fractional_warm_up_stays_at_or_under_the_peak():
    assert all(0 < runtime.cosine(step, 20, 2.5, 1.0) <= 1.0 for step in range(20))


def test_seeds_are_distinct():
    seeds = [runtime.derive_seed(*numbers) for numbers in
             [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 11), (11, 1), (111,), (0, 10), (10, 0)]]
    seeds += [runtime.derive_seed(0, 0, i) for i in range(1000)]
    assert len(set(seeds)) == len(seeds) - 1                # (0, 0, 0) stands twice
    assert all(0 <= seed < 2 ** 63 for seed in seeds) and runtime.derive_seed(1, 2) == runtime.derive_seed(1, 2)


def check(loss, norm, caught=()):
    terms = dict(loss=torch.tensor(loss, requires_grad=True), grad_norm=torch.tensor(norm))
    return runtime.check_step(7, terms, caught, torch.device("cpu"), lambda step, rank: [step, 10 + rank])


def test_check_step():
    assert check(2.5, 1.0) == (dict(loss=2.5, grad_norm=1.0), 0)
    assert check(2.5, 1.0, [15, 2]) == (dict(loss=2.5, grad_norm=1.0), 15)
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match=r"loss not finite at step 7 on rank 0 \(images 7, 10\);"):
            check(bad, 1.0)
        with pytest.raises(FloatingPointError, match="grad_norm not finite at step 7 on rank 0"):
            check(1.0, bad)


def test_a_signal_is_remembered():
    caught = runtime.catch_signals()
    assert check(1.0, 1.0, caught)[1] == 0
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    assert caught == [signal.SIGTERM, signal.SIGINT] and check(1.0, 1.0, caught)[1] == signal.SIGTERM


# ------------------------------------------------------------------------------------------------
# Checkpoints

def test_digest_changes_with_any_bit():
    def state(**changes):
        return dict(a=torch.arange(6.0).view(2, 3), b=[1, 2.5, "x", None], c=dict(d=torch.tensor([1, 2])), **changes)

    whole = runtime.digest(state())
    assert whole == runtime.digest(state()) and len(whole) == 64
    others = [state(e=1), state() | dict(b=[1, 2.5, "x", 0]), state() | dict(b=[1, 2.5, "x"]),
              state() | dict(a=torch.arange(6.0).view(3, 2)), state() | dict(a=torch.arange(6.0).view(2, 3).double()),
              state() | dict(c=dict(e=torch.tensor([1, 2])))]
    flipped = torch.arange(6.0).view(2, 3)
    flipped.view(torch.int32)[1, 2] ^= 1                    # the last bit of a mantissa
    digests = [runtime.digest(other) for other in others + [state() | dict(a=flipped)]]
    assert len({whole, *digests}) == 8
    assert runtime.digest(torch.arange(6.0).view(2, 3).T) == runtime.digest(torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
    assert runtime.digest(torch.zeros(0)) != runtime.digest(torch.tensor(0.0)) != runtime.digest(0.0)
    assert runtime.digest(torch.ones(3, dtype=torch.bfloat16)) != runtime.digest(torch.ones(3, dtype=torch.float16))


class Run:
    """A run of five-step epochs on a tiny module, as a stage drives it."""

    def __init__(self, seed=0, **changes):
        torch.manual_seed(seed)
        defaults = dict(stage="pretrain", output="run", seed=0, save_every=1, resume="auto", lr=0.1, log_every=1,
                        tensorboard=False)
        self.args = Namespace(**(defaults | changes))
        self.modules = dict(model=nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), other=nn.BatchNorm1d(4))
        self.optimizer = torch.optim.AdamW([p for m in self.modules.values() for p in m.named_parameters()], lr=0.1)
        self.best = None

    def resume(self):
        self.step, self.best, self.pending = runtime.resume(self.args, self.modules, self.optimizer)
        return self.step

    def train(self, stop, steps=100, metric=None, stopped=0):
        for step in range(self.step, stop):
            torch.manual_seed(step)
            self.modules["model"](torch.randn(5, 3)).square().sum().backward()
            self.modules["other"](torch.randn(5, 4)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step = step + 1
            evaluate = metric and (lambda: metric(self.step))
            self.best = runtime.checkpoint(self.args, self.step, steps, 5, stopped if self.step == stop else 0,
                                           self.modules, self.optimizer, dict(dim=3), evaluate, self.best)
        return self

    def digest(self):
        return runtime.digest([m.state_dict() for m in self.modules.values()] + [self.optimizer.state_dict()])


def trained(stop=10, seed=0, metric=None, **changes):
    run = Run(seed, **changes)
    run.resume()
    return run.train(stop, metric=metric)


def files():
    return sorted(path.name for path in Path("run").iterdir() if path.name not in ("log.jsonl", "lock"))


def test_round_trip():
    run = trained()
    state = runtime.load_checkpoint("run", ["pretrain"])
    assert (state["stage"], state["step"], state["epoch"], state["model_args"]) == ("pretrain", 10, 2, dict(dim=3))
    assert state["args"] == vars(run.args) and state["epoch"] == 2
    assert runtime.digest(state["model"]) == runtime.digest(run.modules["model"].state_dict())
    again = Run(seed=1)
    assert again.digest() != run.digest()
    assert again.resume() == 10 and again.digest() == run.digest()
    # and both go on alike
    assert again.train(13).digest() == run.train(13).digest()


def test_a_checkpoint_is_plain_data():
    trained()
    state = torch.load("run/step-00000010.pt", weights_only=True)

    def plain(value):
        if isinstance(value, dict):
            return all(plain(v) for pair in value.items() for v in pair)
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or isinstance(value, (torch.Tensor, str, int, float, bool))

    assert plain(state)
    assert state["optimizer"]["param_groups"][0]["param_names"][:2] == ["0.weight", "0.bias"]


def test_last_two_and_the_best_are_kept():
    metrics = {5: 1.0, 10: 3.0, 15: 2.0, 20: 2.5}
    run = trained(22, metric=metrics.get)
    assert files() == ["best.pt", "step-00000015.pt", "step-00000020.pt"]
    assert runtime.load_checkpoint("run/best.pt")["step"] == 10 and run.best == 3.0
    again = Run()
    assert again.resume() == 20 and again.best == 3.0       # a resumed run knows the best so far
    again.train(25, metric={25: 2.9}.get)
    assert runtime.load_checkpoint("run/best.pt")["step"] == 10


def test_checkpoints_where_they_are_due(folder):
    trained(17, save_every=2)
    assert files() == ["step-00000010.pt"]
    run = trained(17, save_every=2, output="other")
    run.train(18, steps=18)                                 # the run's end
    assert sorted(path.name for path in Path("other").glob("*.pt")) == ["step-00000010.pt", "step-00000018.pt"]


def test_a_signal_saves_and_exits():
    run = trained(7)
    with pytest.raises(SystemExit) as stop:
        run.train(8, stopped=15)
    assert stop.value.code == 143 and files() == ["step-00000005.pt", "step-00000008.pt"]
    assert Run(seed=1).resume() == 8


def damage(path, how):
    whole = bytearray(path.read_bytes())
    if how == "truncated":
        whole = whole[:len(whole) * 2 // 3]
    elif how == "empty":
        whole = b""
    else:                                                   # one bit of the largest tensor
        weights = next(n for n, p in Run().modules["model"].named_parameters())
        raw = torch.load(path, weights_only=True)["model"][weights].numpy().tobytes()
        whole[bytes(whole).index(raw) + 5] ^= 4
    path.write_bytes(bytes(whole))


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(how, capsys):
    trained()
    expected = trained(5, output="reference").digest()
    damage(Path("run/step-00000010.pt"), how)
    run = Run(seed=1)
    assert run.resume() == 5 and run.digest() == expected
    message = capsys.readouterr().err
    assert message.startswith("run/step-00000010.pt: not loaded: ") and message.count("\n") == 1
    damage(Path("run/step-00000005.pt"), how)
    with pytest.raises(InputError, match="run: no sound checkpoint"):
        Run().resume()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_hostile_pickle_is_not_executed(capsys):
    trained()
    for name in ("step-00000011.pt", "plain.pt"):
        torch.save(dict(model=Hostile()), Path("run") / name)
    Path("run/pickle.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("step-00000011.pt", "plain.pt", "pickle.pt"):
        with pytest.raises(InputError, match=f"{name}: no sound checkpoint"):
            runtime.load_checkpoint(Path("run") / name)
    assert runtime.load_checkpoint("run")["step"] == 10     # passed over
    assert not Path("executed").exists()
    torch.load("run/plain.pt", weights_only=False)          # the trap itself works
    assert Path("executed").exists()


def test_the_wrong_file_is_refused_by_what_it_is():
    trained()
    with pytest.raises(InputError, match="10.pt: found a checkpoint of pretrain, expected one of teacher or tokenizer"):
        runtime.load_checkpoint("run", ["teacher", "tokenizer"])
    torch.save(dict(weight=torch.ones(2)), "other.pt")
    assert runtime.load_checkpoint("other.pt")["weight"].tolist() == [1, 1]         # of another project
    with pytest.raises(InputError, match="other.pt: found another file, expected one of teacher"):
        runtime.load_checkpoint("other.pt", ["teacher"])
    for missing in ("nowhere", "nowhere/best.pt"):
        with pytest.raises(InputError, match=f"{missing}: nothing there, expected one of teacher"):
            runtime.load_checkpoint(missing, ["teacher"])


def test_other_arguments_are_refused_by_name():
    trained()
    with pytest.raises(InputError, match=r"run holds a run with other arguments \(lr: 0.1, now 0.2\).*--resume force"):
        Run(lr=0.2).resume()
    assert Run(lr=0.2, resume="force").resume() == 10
    assert Run(log_every=7).resume() == 10                  # does not change the weights


def test_a_forced_run_takes_the_new_hyperparameters():
    trained()
    run = Run(resume="force")
    run.optimizer.param_groups[0]["weight_decay"] = 0.7
    assert run.resume() == 10 and run.optimizer.param_groups[0]["weight_decay"] == 0.7


def test_another_architecture_is_refused():
    trained()
    other = Run(resume="force")
    other.optimizer = torch.optim.AdamW(list(reversed(list(other.modules["model"].named_parameters()))))
    with pytest.raises(InputError, match="run holds a run of another architecture"):
        other.resume()


def fail_after(monkeypatch, what):
    """A disk that is full when a checkpoint is half written."""
    def full(*arguments, **keywords):
        if what == "save":
            arguments[1].write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    def inner(state, file):                                 # as torch.save reports it
        file.write(b"half of it")
        raise RuntimeError("unexpected pos 768 vs 662")

    if what == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(torch, "save", full if what == "save" else inner)


@pytest.mark.parametrize("what", ["save", "torch", "sync"])
def test_a_full_disk_leaves_the_checkpoint_before_intact(what, monkeypatch):
    run = trained(9)
    before = Path("run/step-00000005.pt").read_bytes()
    with monkeypatch.context() as patch:
        fail_after(patch, what)
        with pytest.raises(InputError, match=r"run/step-00000010.pt: not written \(.*MiB free"):
            run.train(10)
    assert files() == ["step-00000005.pt"] and Path("run/step-00000005.pt").read_bytes() == before
    again = Run(seed=1)
    again.resume()
    assert again.train(10).digest() == run.digest()         # the same command goes on


def test_leftovers_of_a_killed_run_are_removed():
    Path("run").mkdir()
    Path("run/step-00000005.tmp").write_bytes(b"half")
    assert Run().resume() == 0 and files() == []


def test_an_output_that_cannot_be_written_is_refused():
    Path("file").write_text("")
    for output in ("file", "file/run"):
        with pytest.raises(InputError, match=f"--output {output}: not writable"):
            Run(output=output).resume()


def test_log_is_a_json_line_each(capsys):
    trained(2)
    args = Namespace(output="run", tensorboard=False)
    runtime.log(args, step=3, loss=0.12347, split="val")
    rows = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert rows[0]["args"]["stage"] == "pretrain" and rows[0]["world_size"] == 1
    assert rows[1]["loss"] == 0.12347 and rows[1]["step"] == 3
    assert capsys.readouterr().out == "step 3  loss 0.1235  split val\n"     # and on the screen, without the arguments
