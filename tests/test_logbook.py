"""A run: its checkpoints, its log, the check of a step."""
import math
import os
import signal
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import files, log, rows
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

    def __init__(self, seed=0, images=22, **changes):
        torch.manual_seed(seed)
        self.identity = dict(images=images)
        arguments = dict(stage="pretrain", output="run", seed=0, batch_size=4, accumulate=1,
                         epochs=None, steps=100, save_every=1, log_every=50, resume="auto",
                         lr=0.1, data="set", amp="fp32")
        self.args = Namespace(**(arguments | changes))
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.modules = nn.ModuleDict(dict(model=model, other=nn.BatchNorm1d(4)))
        self.optimizer = torch.optim.AdamW(self.modules.named_parameters(), lr=0.1)

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
        return checkpoint.digest([self.modules.state_dict(), self.optimizer.state_dict()])


def trained(stop=10, seed=0, metric=None, **changes):
    stage = Stage(seed, **changes)
    stage.begin()
    return stage.train(stop, metric)


# ------------------------------------------------------------------------------------------------
# A step

def test_draws_are_seeded_by_seed_and_step():
    run, draws = trained(0).run, []
    for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3)):
        run.args.seed = seed
        run.seed(step)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


# ------------------------------------------------------------------------------------------------
# Checkpoints

def test_digest_changes_with_any_value_shape_type_or_name():
    whole = dict(a=torch.arange(6.0).view(2, 3), b=[1, 2.5, "x", None], c=dict(d=torch.zeros(2)))
    others = [
        whole | dict(e=1),
        whole | dict(b=[1, 2.5, "x", 0]),
        whole | dict(b=[1, 2.5, "x"]),
        whole | dict(a=torch.arange(6.0).view(3, 2)),
        whole | dict(c=dict(e=torch.zeros(2))),
        whole | dict(c=dict(d=torch.zeros(2).int())),       # the same bytes
    ]
    assert len({checkpoint.digest(one) for one in [whole, *others]}) == 7
    columns = torch.arange(6.0).view(3, 2).T.contiguous().T     # however it lies in memory
    assert checkpoint.digest(columns) == checkpoint.digest(torch.arange(6.0).view(3, 2))


def test_the_last_two_and_the_best_are_kept():
    metrics = {5: math.nan, 10: 3.0, 15: 2.0, 20: 2.5, 25: 2.9}
    trained(22, metric=metrics.get)
    assert files() == ["best.pt", "step-00000015.pt", "step-00000020.pt"]
    trained(25, metric=metrics.get)                         # a resumed run knows the best so far
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


def test_a_signal_in_the_last_step_does_not_keep_it_from_its_evaluation():
    stage = trained(7, steps=8)
    os.kill(os.getpid(), signal.SIGTERM)
    stage.train(8, metric={8: 1.0}.get)
    assert stage.run.signal == signal.SIGTERM               # it was seen
    assert files() == ["best.pt", "step-00000005.pt", "step-00000008.pt"]


@pytest.mark.parametrize("changes, named", [
    (dict(lr=0.2), r"\(lr: 0.1, now 0.2\)"),
    (dict(data="moved/other"), r"\(data: set, now other\)"),
    (dict(images=23), r"\(images: 22, now 23\)"),
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


def test_a_forced_run_takes_the_new_hyperparameters():
    trained()
    stage = Stage(resume="force")
    stage.optimizer.param_groups[0]["weight_decay"] = 0.7
    assert stage.begin() == 10
    assert stage.optimizer.param_groups[0]["weight_decay"] == 0.7


def test_parameters_in_another_order_are_another_architecture():
    """An optimizer loads its moments by position."""
    trained()
    other = Stage()
    other.optimizer = torch.optim.AdamW(list(other.modules.named_parameters())[::-1])
    with pytest.raises(InputError, match="--output run .* another architecture"):
        other.begin()


# ------------------------------------------------------------------------------------------------
# The log

def test_a_line_is_the_average_since_the_one_before():
    run = trained(0, log_every=2, steps=3).run
    for step, losses in enumerate(([1.0, 3.0], [6.0, 8.0], [4.0, 8.0])):
        run.due(step)
        for loss in losses:                                 # of its micro-batches
            run.add(loss=torch.tensor(loss))
        run.add(grad_norm=torch.tensor(float(step)))
        run.agree()
        run.log(step + 1, lr=10.0 + step)
    keys = ("step", "epoch", "loss", "grad_norm", "lr")
    assert [[row[key] for key in keys] for row in rows()[1:]] == [
        [2, 0.4, 4.5, 0.5, 11.0],
        [3, 0.6, 6.0, 2.0, 12.0],                           # the run's end
    ]


def test_images_per_second_are_of_training_alone(monkeypatch):
    """Two seconds a step of four images; what a save or an evaluation takes does not count."""
    now = 1000.0
    monkeypatch.setattr(logbook.time, "time", lambda: now)
    run = trained(0, log_every=5, steps=20).run
    slow = [run.save, lambda step: run.log_evaluation(step, split="val"),
            lambda step: run.keep_best(step, 1.0)]
    for step in range(20):
        if run.due(step):
            for call in slow[:step // 5]:                   # the ways of stages: a save alone, …
                now += 100
                call(step)
        now += 2
        run.add(loss=torch.tensor(1.0))
        run.agree()
        run.log(step + 1)
    assert [row["images_per_s"] for row in log("run")] == [2.0] * 4


def test_curves_and_pictures_for_tensorboard():
    """Also of a run that goes on: what it had done after its checkpoint is not shown twice."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for stop in (8, 10):                                    # the second from step 5 on
        run = trained(stop, steps=20, log_every=1).run
        save_image(torch.rand(3, 8, 8), "run/sheet.png")
        run.log_evaluation(stop, split="val", top1=10.0 + stop)
        run.board.close()
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
