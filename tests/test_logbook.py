"""A run: its checkpoints, its log, the check of a step."""
import math
import os
import signal
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import files, rows
from torch import nn
from torchvision.utils import save_image

from support import checkpoint, launch
from support import run as logbook
from support.launch import InputError
from support.run import Run


class Stage:
    """A stage that trains a tiny module in epochs of five steps, a loop like those of the others.

    It begins as the folder says (begin), and can be stopped anywhere (train), as if it were killed.
    """

    def __init__(self, seed=0, identity=None, **changes):
        torch.manual_seed(seed)
        self.identity = dict(images=22) | (identity or {})
        arguments = dict(stage="pretrain", output="run", seed=0, batch_size=4, epochs=None,
                         steps=100, save_every=1, log_every=50, resume="auto", lr=0.1,
                         data="set", amp="fp32")
        self.args = Namespace(**(arguments | changes))
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.modules = dict(model=model, other=nn.BatchNorm1d(4))
        parameters = [*model.named_parameters(), *self.modules["other"].named_parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.1)

    def begin(self):
        """Begin, or go on; the first step."""
        self.run = Run(self.args, self.optimizer, dict(dim=3), self.modules, self.identity)
        self.step = self.run.start
        return self.step

    def train(self, stop, metric=None):
        """Train up to the top of an iteration: a checkpoint that is due there is written."""
        run = self.run
        for step in range(self.step, stop + 1):
            if run.due(step):
                run.save(step)
                if metric:
                    run.keep_best(step, metric(step))
            if step == stop:
                break
            run.seed(step)
            loss = self.modules["model"](torch.randn(5, 3)).square().sum()
            loss = loss + self.modules["other"](torch.randn(5, 4)).square().sum()
            loss.backward()
            run.add(loss=loss)
            run.agree()
            self.optimizer.step()
            self.optimizer.zero_grad()
            run.log(step + 1, lr=self.args.lr)
        self.step = stop
        return self

    def digest(self):
        states = [module.state_dict() for module in self.modules.values()]
        return checkpoint.digest([*states, self.optimizer.state_dict()])


def trained(stop=10, seed=0, metric=None, **changes):
    stage = Stage(seed, **changes)
    stage.begin()
    return stage.train(stop, metric)


# ------------------------------------------------------------------------------------------------
# A step

def check(run, step=7, **values):
    """What a stage does after the backward pass; each value: of a step, or of its micro-batches."""
    run.due(step)
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            run.add(**{name: torch.tensor(one, requires_grad=True)})
    run.agree()


def new_run(**changes):
    stage = Stage(**changes)
    stage.begin()
    return stage.run


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_stops_the_run(bad):
    run = new_run()
    for name, values in (("loss", dict(loss=bad, grad_norm=1.0)), ("loss", dict(loss=[1.0, bad])),
                         ("grad_norm", dict(loss=1.0, grad_norm=bad))):
        with pytest.raises(FloatingPointError, match=rf"{name} .* step 7 on ranks \[0\]"):
            check(run, **values)
    check(run, loss=1.0)                                    # the control


def test_draws_are_seeded_by_seed_and_step():
    run = new_run()

    def draws(step, seed=0):
        run.args.seed = seed
        run.seed(step)
        return torch.rand(4).tolist()

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(3) != draws(3, seed=1)


# ------------------------------------------------------------------------------------------------
# Checkpoints

def test_digest_changes_with_any_bit_shape_type_or_name():
    whole = dict(a=torch.arange(6.0).view(2, 3), b=[1, 2.5, "x", None], c=dict(d=torch.ones(2)))
    flipped = torch.arange(6.0).view(2, 3)
    flipped.view(torch.int32)[1, 2] ^= 1                    # the last bit of a mantissa
    others = [
        whole | dict(e=1),
        whole | dict(b=[1, 2.5, "x", 0]),
        whole | dict(b=[1, 2.5, "x"]),
        whole | dict(a=flipped),
        whole | dict(a=torch.arange(6.0).view(3, 2)),
        whole | dict(a=torch.arange(6.0).view(2, 3).double()),
        whole | dict(c=dict(e=torch.ones(2))),
        whole | dict(c=dict(d=torch.ones(2).bfloat16())),
        whole | dict(c=dict(d=torch.ones(2).half())),
    ]
    assert len({checkpoint.digest(one) for one in [whole, *others]}) == 10
    columns = torch.arange(6.0).view(3, 2).T.contiguous().T     # however it lies in memory
    assert checkpoint.digest(columns) == checkpoint.digest(torch.arange(6.0).view(3, 2))


def test_a_checkpoint_holds_all_and_the_run_goes_on_alike():
    stage = trained()
    state = torch.load("run/step-00000010.pt", weights_only=True)
    assert (state["stage"], state["step"], state["epoch"]) == ("pretrain", 10, 2)
    assert state["model_args"] == dict(dim=3)
    assert state["args"] == vars(stage.args)
    again = Stage(seed=1)
    assert again.digest() != stage.digest()
    assert again.begin() == 10
    assert again.digest() == stage.digest()
    assert again.train(13).digest() == stage.train(13).digest()
    assert again.train(14).digest() != stage.digest()       # the control


def test_the_last_two_and_the_best_are_kept():
    metrics = {5: math.nan, 10: 3.0, 15: 2.0, 20: 2.5, 25: 2.9}
    stage = trained(22, metric=metrics.get)
    assert files() == ["best.pt", "step-00000015.pt", "step-00000020.pt"]
    assert checkpoint.load("run/best.pt")["step"] == 10
    assert stage.run.best == 3.0
    again = Stage()
    assert again.begin() == 20
    assert again.run.best == 3.0                            # a resumed run knows the best so far
    again.train(25, metric=metrics.get)
    assert checkpoint.load("run/best.pt")["step"] == 10


def test_checkpoints_are_written_where_they_are_due():
    trained(17, save_every=2)
    assert files() == ["step-00000010.pt"]
    trained(18, save_every=2, steps=18, output="other")     # and at the run's end
    assert files("other") == ["step-00000010.pt", "step-00000018.pt"]


@pytest.mark.parametrize("number", launch.SIGNALS)
def test_a_signal_saves_and_exits(number, capfd):
    stage = trained(7)
    os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as stop:
        stage.train(9)
    assert stop.value.code == 128 + number
    assert files() == ["step-00000005.pt", "step-00000008.pt"]
    assert "run/step-00000008.pt" in capfd.readouterr().err
    assert Stage(seed=1).begin() == 8


def test_a_signal_in_the_last_step_does_not_keep_it_from_its_evaluation():
    stage = trained(7, steps=8)
    os.kill(os.getpid(), signal.SIGTERM)
    stage.train(8, metric={8: 1.0}.get)
    assert stage.run.signal == signal.SIGTERM               # it was seen
    assert files() == ["best.pt", "step-00000005.pt", "step-00000008.pt"]


@pytest.mark.parametrize("changes, named", [
    (dict(lr=0.2), r"\(lr: 0.1, now 0.2\)"),
    (dict(data="moved/other"), r"\(data: set, now other\)"),
    (dict(identity=dict(images=23)), r"\(images: 22, now 23\)"),
])
def test_other_arguments_are_refused_by_name_unless_forced(changes, named):
    trained()
    with pytest.raises(InputError, match=f"{named}.*--resume force"):
        Stage(**changes).begin()
    assert Stage(**changes, resume="force").begin() == 10
    assert Stage(log_every=7, data="moved/set").begin() == 10   # these change no weights


def test_another_batch_size_is_refused_whatever_is_forced():
    trained()
    with pytest.raises(InputError, match="batch_size: 4, now 2"):
        Stage(batch_size=2, resume="force").begin()


def test_an_input_that_has_moved_is_known_by_its_digest():
    trained(init="here", identity=dict(init="0ab"))
    assert Stage(init="there", identity=dict(init="0ab")).begin() == 10
    with pytest.raises(InputError, match="init: 0ab, now 1cd"):
        Stage(init="here", identity=dict(init="1cd")).begin()


def test_a_forced_run_takes_the_new_hyperparameters():
    trained()
    stage = Stage(resume="force")
    stage.optimizer.param_groups[0]["weight_decay"] = 0.7
    assert stage.begin() == 10
    assert stage.optimizer.param_groups[0]["weight_decay"] == 0.7


def test_parameters_in_another_order_are_another_architecture():
    """An optimizer loads its moments by position."""
    trained()
    other = Stage(resume="force")
    parameters = list(other.modules["model"].named_parameters())
    other.optimizer = torch.optim.AdamW(parameters[::-1])
    with pytest.raises(InputError, match="--output run .* another architecture"):
        other.begin()


def test_a_copy_of_a_checkpoint_is_neither_read_nor_removed():
    trained(5)
    copy = Path("run/step-00000005-backup.pt")
    copy.write_bytes(Path("run/step-00000005.pt").read_bytes())
    trained(20)
    assert files() == ["step-00000005-backup.pt", "step-00000015.pt", "step-00000020.pt"]


# ------------------------------------------------------------------------------------------------
# The log

def test_the_log_is_a_json_line_each():
    run = new_run()
    run.log_evaluation(3, split="val", loss=0.12347)
    logbook.append("run", step=4, name="x")
    first, *others = rows()
    assert first["args"]["stage"] == "pretrain"
    assert (first["world_size"], first["step"]) == (1, 0)
    assert all(isinstance(row.pop("time"), float) for row in others)
    assert others == [dict(step=3, epoch=0.6, split="val", loss=0.12347), dict(step=4, name="x")]


def test_a_line_is_the_average_since_the_one_before():
    run = new_run(log_every=2, steps=5)
    for step, loss in enumerate(([1.0, 3.0], [6.0, 8.0], [5.0, 5.0], [7.0, 9.0], [4.0, 8.0])):
        check(run, step, loss=loss, grad_norm=float(step))
        run.log(step + 1, lr=10.0 + step)
    keys = ("step", "epoch", "loss", "grad_norm", "lr")
    assert [[row[key] for key in keys] for row in rows()[1:]] == [
        [2, 0.4, 4.5, 0.5, 11.0],
        [4, 0.8, 6.5, 2.5, 13.0],
        [5, 1.0, 6.0, 4.0, 14.0],                           # the run's end
    ]


def test_images_per_second_are_of_training_alone(monkeypatch):
    """Two seconds a step of four images; what a save or an evaluation takes does not count."""
    now = 1000.0
    monkeypatch.setattr(logbook.time, "time", lambda: now)
    run = new_run(log_every=5, steps=20)
    for step in range(20):
        if run.due(step):                                   # the ways of stages: a save alone, …
            now += 100
            run.save(step)
            if step >= 10:
                now += 100
                run.log_evaluation(step, split="val")
            if step >= 15:
                now += 100
                run.keep_best(step, 1.0)
        now += 2
        run.add(loss=torch.tensor(1.0))
        run.agree()
        run.log(step + 1)
    assert [row["images_per_s"] for row in rows()[1:] if "split" not in row] == [2.0] * 4


def test_curves_and_pictures_for_tensorboard():
    """Also of a run that goes on: what it had done after its checkpoint is not shown twice."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for stop in (8, 10):                                    # the second from step 5 on
        stage = Stage(steps=20, log_every=1)
        stage.begin()
        stage.train(stop)
        save_image(torch.rand(3, 8, 8), "run/sheet.png")
        stage.run.log_evaluation(stop, split="val", top1=10.0 + stop)
        stage.run.board.close()
    # TensorBoard reads files by their names, of which the second tells the order, but not here.
    for file in sorted(Path("run").glob("events.*"), key=lambda file: int(file.suffix[1:])):
        file.rename(f"run/events.out.tfevents.{int(file.suffix[1:]):010d}.host")
    found = accumulator.EventAccumulator("run").Reload()
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, 11))
    assert [event.value for event in found.Scalars("val/top1")][-1] == 20
    assert found.Images("sheet")[-1].step == 10


def test_without_tensorboard_nothing_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trained(5)
    assert capsys.readouterr().err == ""
    assert not list(Path("run").glob("events.*"))
