"""A run: its checkpoints, its log, the check of a step."""
import errno
import io
import json
import math
import os
import pickle
import signal
import stat
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.utils import save_image

from support import checkpoint
from support import run as logbook
from support.launch import InputError
from support.run import Run


class Stage:
    """A stage that trains a tiny module in epochs of five steps, a loop like those of the others.

    It begins as the folder says (begin), and can be stopped anywhere (train), as if it were killed.
    """

    def __init__(self, seed=0, identity=None, **changes):
        torch.manual_seed(seed)
        self.identity = identity or {}
        arguments = dict(stage="pretrain", output="run", seed=0, batch_size=4, epochs=None,
                         steps=100, save_every=1, log_every=50, resume="auto", lr=0.1,
                         data="set", amp="fp32")
        self.args = Namespace(**(arguments | changes))
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.modules = dict(model=model, other=nn.BatchNorm1d(4))
        parameters = [*model.named_parameters(), *self.modules["other"].named_parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.1)

    def begin(self, images=22):
        """Begin, or go on; the first step."""
        identity = dict(images=images) | self.identity
        self.run = Run(self.args, self.optimizer, dict(dim=3), self.modules, identity)
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


def files(folder="run"):
    """Names of a run's files that are neither of its log nor its lock."""
    names = {path.name for path in Path(folder).iterdir()}
    return sorted(name for name in names if not name.startswith(("log", "lock", "events.")))


def rows(folder="run"):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------
# The check of a step

def check(run, step=7, **values):
    """What a stage does after the backward pass; each value: of a step, or of its micro-batches."""
    run.due(step)
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            run.add(**{name: torch.tensor(one, requires_grad=True)})
    run.agree()
    return run.means, run.signal


def new_run(**changes):
    stage = Stage(**changes)
    stage.begin()
    return stage.run


def test_values_of_a_step_are_averaged():
    run = new_run()
    assert check(run, loss=2.5, grad_norm=1.0) == (dict(loss=2.5, grad_norm=1.0), 0)
    assert check(run, loss=[2.0, 3.0, 7.0], grad_norm=1.0) == (dict(loss=4.0, grad_norm=1.0), 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stops_the_run(bad):
    run = new_run()
    for name, values in (("loss", dict(loss=bad, grad_norm=1.0)), ("loss", dict(loss=[1.0, bad])),
                         ("grad_norm", dict(loss=1.0, grad_norm=bad))):
        with pytest.raises(FloatingPointError, match=rf"{name} not .* step 7 on ranks \[0\]"):
            check(run, **values)
    assert check(run, loss=1.0) == (dict(loss=1.0), 0)      # the control


def test_the_first_signal_counts():
    run = new_run()
    assert check(run, loss=1.0)[1] == 0
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    assert check(run, loss=1.0) == (dict(loss=1.0), signal.SIGTERM)


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

def test_digest_changes_with_any_bit():
    def state(**changes):
        whole = dict(a=torch.arange(6.0).view(2, 3), b=[1, 2.5, "x", None],
                     c=dict(d=torch.tensor([1, 2])))
        return whole | changes

    whole = checkpoint.digest(state())
    assert whole == checkpoint.digest(state())
    assert len(whole) == 64
    flipped = torch.arange(6.0).view(2, 3)
    flipped.view(torch.int32)[1, 2] ^= 1                    # the last bit of a mantissa
    others = [
        state(e=1),
        state(b=[1, 2.5, "x", 0]),
        state(b=[1, 2.5, "x"]),
        state(a=torch.arange(6.0).view(3, 2)),
        state(a=torch.arange(6.0).view(2, 3).double()),
        state(a=flipped),
        state(c=dict(e=torch.tensor([1, 2]))),
    ]
    assert len({whole, *map(checkpoint.digest, others)}) == 8


def test_digest_is_of_values_and_types():
    digest = checkpoint.digest
    columns = torch.arange(6.0).view(2, 3).T                # however they lie in memory
    assert digest(columns) == digest(torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
    assert digest(torch.zeros(0)) != digest(torch.tensor(0.0))
    assert digest(torch.tensor(0.0)) != digest(0.0)
    ones = torch.ones(3)
    assert digest(ones.bfloat16()) != digest(ones.half())


def test_round_trip():
    stage = trained()
    state = checkpoint.load("run", ["pretrain"])
    assert (state["stage"], state["step"], state["epoch"]) == ("pretrain", 10, 2)
    assert state["model_args"] == dict(dim=3)
    assert state["args"] == vars(stage.args)
    own = stage.modules["model"].state_dict()
    assert checkpoint.digest(state["model"]) == checkpoint.digest(own)
    again = Stage(seed=1)
    assert again.digest() != stage.digest()
    assert again.begin() == 10
    assert again.digest() == stage.digest()
    # and both go on alike
    assert again.train(13).digest() == stage.train(13).digest()
    assert again.train(14).digest() != stage.digest()       # the control


def test_a_checkpoint_is_plain_data():
    trained()
    state = torch.load("run/step-00000010.pt", weights_only=True)

    def plain(value):
        if isinstance(value, dict):
            return all(plain(key) and plain(item) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or isinstance(value, (torch.Tensor, str, int, float, bool))

    assert plain(state)
    names = state["optimizer"]["param_groups"][0]["param_names"]
    assert names[:2] == ["0.weight", "0.bias"]


def test_last_two_and_the_best_are_kept():
    metrics = {5: 1.0, 10: 3.0, 15: 2.0, 20: 2.5, 25: 2.9}
    stage = trained(22, metric=metrics.get)
    assert files() == ["best.pt", "step-00000015.pt", "step-00000020.pt"]
    assert checkpoint.load("run/best.pt")["step"] == 10
    assert stage.run.best == 3.0
    again = Stage()
    assert again.begin() == 20
    assert again.run.best == 3.0                            # a resumed run knows the best so far
    again.train(25, metric=metrics.get)
    assert checkpoint.load("run/best.pt")["step"] == 10


def test_a_checkpoint_holds_the_best_before_its_evaluation():
    trained(11, metric={5: 1.0, 10: 3.0}.get)
    best = {name: checkpoint.load(f"run/{name}")["best"] for name in files()}
    assert best == {"step-00000005.pt": None, "step-00000010.pt": 1.0, "best.pt": 3.0}


def test_an_evaluation_without_a_figure_is_not_the_best():
    stage = trained(16, metric={5: math.nan, 10: -2.0, 15: math.nan}.get)
    assert stage.run.best == -2.0
    assert checkpoint.load("run/best.pt")["step"] == 10


def test_stopped_before_an_evaluation_it_is_evaluated_when_it_goes_on():
    trained(10, steps=10)                                   # killed at the end, before that
    assert "best.pt" not in files()
    before = Path("run/step-00000010.pt").stat()
    again = Stage(steps=10)
    assert again.begin() == 10
    again.train(10, metric={10: 4.0}.get)
    assert Path("run/step-00000010.pt").stat().st_ino == before.st_ino      # not written again
    assert again.run.best == checkpoint.load("run/best.pt")["best"] == 4.0
    assert checkpoint.load("run")["best"] is None


def test_checkpoints_where_they_are_due():
    trained(17, save_every=2)
    assert files() == ["step-00000010.pt"]
    trained(18, save_every=2, steps=18, output="other")     # and at the run's end
    assert files("other") == ["step-00000010.pt", "step-00000018.pt"]


def test_progress_ends_where_nothing_is_left_but_to_save():
    trained(5)
    stage = Stage(steps=8, resume="force")
    stage.begin()
    assert list(stage.run.progress()) == [5, 6, 7, 8]


def test_a_signal_saves_and_exits(capsys):
    stage = trained(7)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        stage.train(9)
    assert stop.value.code == 143
    assert files() == ["step-00000005.pt", "step-00000008.pt"]
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "run/step-00000008.pt" in message
    assert Stage(seed=1).begin() == 8


def test_a_signal_in_the_last_step_does_not_keep_it_from_its_evaluation():
    stage = trained(7, steps=8)
    os.kill(os.getpid(), signal.SIGTERM)
    stage.train(8, metric={8: 1.0}.get)
    assert stage.run.signal == signal.SIGTERM               # it was seen
    assert files() == ["best.pt", "step-00000005.pt", "step-00000008.pt"]


def damage(path, how):
    whole = bytearray(path.read_bytes())
    if how == "truncated":
        whole = whole[:len(whole) * 2 // 3]
    elif how == "empty":
        whole = b""
    else:                                                   # one bit of the largest tensor
        state = torch.load(path, weights_only=True)
        raw = state["model"]["0.weight"].numpy().tobytes()
        whole[bytes(whole).index(raw) + 5] ^= 4
    path.write_bytes(bytes(whole))


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(how, capsys):
    trained()
    expected = trained(5, output="reference").digest()
    damage(Path("run/step-00000010.pt"), how)
    stage = Stage(seed=1)
    assert stage.begin() == 5
    assert stage.digest() == expected
    assert "run/step-00000010.pt" in capsys.readouterr().err
    assert stage.train(10).digest() == trained(10, output="whole").digest()
    for file in Path("run").glob("step-*.pt"):
        damage(file, how)
    with pytest.raises(InputError, match="run: no sound"):
        Stage().begin()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_hostile_pickle_is_not_executed():
    trained()
    for name in ("step-00000011.pt", "plain.pt"):
        torch.save(dict(model=Hostile()), Path("run") / name)
    Path("run/pickle.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("step-00000011.pt", "plain.pt", "pickle.pt"):
        with pytest.raises(InputError, match=f"{name}: no sound checkpoint"):
            checkpoint.load(Path("run") / name)
    assert checkpoint.load("run")["step"] == 10             # passed over
    assert not Path("executed").exists()
    torch.load("run/plain.pt", weights_only=False)          # the control: the trap works
    assert Path("executed").exists()


def test_the_wrong_file_is_refused_by_what_it_is():
    trained()
    with pytest.raises(InputError, match="pretrain, .* teacher or tokenizer"):
        checkpoint.load("run", ["teacher", "tokenizer"])
    torch.save(dict(weight=torch.ones(2)), "other.pt")      # of another project
    assert checkpoint.load("other.pt")["weight"].tolist() == [1, 1]
    with pytest.raises(InputError, match="other.pt: .* teacher"):
        checkpoint.load("other.pt", ["teacher"])
    for missing in ("nowhere", "nowhere/best.pt"):
        with pytest.raises(InputError, match=f"{missing}: nothing there, .* teacher"):
            checkpoint.load(missing, ["teacher"])


def test_other_arguments_are_refused_by_name():
    trained()
    expected = r"run holds a run with other arguments \(lr: 0.1, now 0.2\).*--resume force"
    with pytest.raises(InputError, match=expected):
        Stage(lr=0.2).begin()
    assert Stage(lr=0.2, resume="force").begin() == 10
    assert Stage(log_every=7).begin() == 10                 # does not change the weights


def test_an_input_that_has_moved_is_known_by_its_digest():
    trained(init="here", identity=dict(init="0ab"))
    assert Stage(init="there", identity=dict(init="0ab")).begin() == 10
    with pytest.raises(InputError, match=r"\(init: 0ab, now 1cd\)"):
        Stage(init="here", identity=dict(init="1cd")).begin()
    trained(output="other", init="file")                    # of another project's file: its path
    with pytest.raises(InputError, match=r"\(init: file, now there\)"):
        Stage(output="other", init="there").begin()


def test_a_run_with_arguments_that_are_gone_or_new_is_refused():
    """As a checkpoint from before there was an identity is, unless forced."""
    trained()
    state = checkpoint.load("run")
    del state["identity"], state["digest"]
    state["args"] |= dict(images=22, gone=1)
    checkpoint.write(Path("run/step-00000010.pt"), state)
    with pytest.raises(InputError, match="gone: 1, now None"):
        Stage().begin()
    assert Stage(resume="force").begin() == 10
    del state["args"]["images"], state["args"]["gone"], state["digest"]
    checkpoint.write(Path("run/step-00000010.pt"), state)
    with pytest.raises(InputError, match="images: None, now 22"):
        Stage().begin()


def test_a_dataset_that_has_grown_is_refused_and_one_that_has_moved_is_not():
    trained()
    assert Stage(data="moved/set").begin() == 10
    with pytest.raises(InputError, match=r"\(data: set, now other\)"):
        Stage(data="other").begin()
    with pytest.raises(InputError, match=r"\(images: 22, now 23\).*--resume force"):
        Stage().begin(23)
    assert Stage(resume="force").begin(23) == 10


def test_another_batch_size_is_refused_whatever_is_forced():
    """Steps count batches."""
    trained()
    with pytest.raises(InputError, match=r"\(batch_size: 4, now 2\).* --output$"):
        Stage(batch_size=2, resume="force").begin()


def test_a_forced_run_takes_the_new_hyperparameters():
    trained()
    stage = Stage(resume="force")
    stage.optimizer.param_groups[0]["weight_decay"] = 0.7
    assert stage.begin() == 10
    assert stage.optimizer.param_groups[0]["weight_decay"] == 0.7


def test_another_architecture_is_refused():
    trained()
    other = Stage(resume="force")
    parameters = list(other.modules["model"].named_parameters())
    other.optimizer = torch.optim.AdamW(parameters[::-1])
    with pytest.raises(InputError, match="run holds a run of another architecture"):
        other.begin()


def fail_half_way(monkeypatch, what):
    """A disk that is full when a checkpoint is half written."""
    def full(*arguments):
        if what == "save":
            arguments[1].write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_inside_torch(state, file):                     # as torch.save reports it
        file.write(b"half of it")
        raise RuntimeError("unexpected pos 768 vs 662")

    if what == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(torch, "save", full if what == "save" else full_inside_torch)


@pytest.mark.parametrize("what", ["save", "torch", "sync"])
def test_a_full_disk_leaves_the_checkpoint_before_intact(what, monkeypatch):
    stage = trained(9)
    before = Path("run/step-00000005.pt").read_bytes()
    with monkeypatch.context() as patch:
        fail_half_way(patch, what)
        expected = "run/step-00000010.pt: not written .* run/step-00000005.pt is intact"
        with pytest.raises(InputError, match=expected):
            stage.train(10)
    assert files() == ["step-00000005.pt"]
    assert Path("run/step-00000005.pt").read_bytes() == before
    again = Stage(seed=1)
    again.begin()
    assert again.train(10).digest() == stage.digest()       # the same command goes on


@pytest.mark.parametrize("stop, kept", [(4, ""), (5, "; run/step-00000005.pt is intact")])
def test_a_log_that_cannot_be_written(stop, kept, monkeypatch):
    def full(path, mode):
        raise OSError(errno.ENOSPC, "No space left on device")

    stage = trained(stop)
    monkeypatch.setattr(logbook, "open", full, raising=False)
    with pytest.raises(InputError, match=rf"run/log.jsonl: not written \(No space .*\){kept}: "):
        stage.run.log_evaluation(stop, split="val")


def test_leftovers_of_a_killed_run_are_removed():
    Path("run").mkdir()
    Path("run/step-00000005.tmp").write_bytes(b"half")
    assert Stage().begin() == 0
    assert files() == []


def test_a_copy_of_a_checkpoint_is_none_of_the_runs():
    """It is neither read nor removed."""
    trained(5)
    copy = Path("run/step-00000005-backup.pt")
    copy.write_bytes(Path("run/step-00000005.pt").read_bytes())
    stage = Stage()
    assert stage.begin() == 5
    stage.train(20)
    assert files() == ["step-00000005-backup.pt", "step-00000015.pt", "step-00000020.pt"]


def test_a_file_system_that_cannot_flush_a_folder(monkeypatch):
    def fsync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
    monkeypatch.setattr(os, "fsync", fsync)
    trained(10)
    assert files() == ["step-00000005.pt", "step-00000010.pt"]


def test_an_output_that_cannot_be_written_is_refused():
    Path("file").write_text("")
    for output in ("file", "file/run"):
        with pytest.raises(InputError, match=f"--output {output}: not writable"):
            Stage(output=output).begin()


# ------------------------------------------------------------------------------------------------
# The log

def test_a_run_says_in_one_line_what_begins(capsys):
    def said(**changes):
        capsys.readouterr()
        Stage(**changes).begin()
        line, = capsys.readouterr().out.splitlines()
        return line

    assert "run: new run; 100 steps of 4 images, 20 epochs, in fp32 on" in said()
    assert len(rows()) == 1                                 # and not in log.jsonl
    stage = trained(steps=12)
    assert "from step 10" in said(steps=12)
    stage.train(12)
    assert "finished already" in said(steps=12)


def test_the_progress_bar_does_not_split_a_line(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    run = new_run(steps=1)
    for step in run.progress():
        if step == 1:
            break
        check(run, step, loss=1.0)
        run.log(step + 1)
    shown = screen.getvalue()
    assert "| 0/1 [" in shown                               # the control: there is a bar
    assert "\rstep 1  epoch 0.2  loss 1  " in shown


def test_log_is_a_json_line_each(capsys):
    run = new_run()
    capsys.readouterr()
    run.log_evaluation(3, split="val", loss=0.12347)
    logbook.append("run", step=4, name="x")
    first, *others = rows()
    assert first["args"]["stage"] == "pretrain"
    assert (first["world_size"], first["step"]) == (1, 0)
    times = [row.pop("time") for row in others]
    assert all(isinstance(time, float) for time in times)
    assert others == [dict(step=3, epoch=0.6, split="val", loss=0.12347), dict(step=4, name="x")]
    # and on the screen, without the arguments
    lines = ["step 3  epoch 0.6  split val  loss 0.1235", "step 4  name x"]
    assert capsys.readouterr().out.splitlines() == lines


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


def test_a_report_is_logged_and_returned():
    row = logbook.report(Namespace(output="other/run"), dict(top1=50.0), split="val")
    assert row == dict(top1=50.0)
    logged, = rows("other/run")
    assert (logged["top1"], logged["split"]) == (50.0, "val")


def test_the_folder_of_a_run_or_of_one_of_its_files(folder):
    (folder / "run").mkdir()
    assert checkpoint.folder_of("run") == Path("run")
    assert checkpoint.folder_of("run/best.pt") == Path("run")


def test_curves_and_pictures_for_tensorboard():
    """Also of a run that goes on: what it had done after its checkpoint is not shown twice."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    new_run(steps=20)

    def train(stop):
        stage = Stage(steps=20, log_every=1)
        stage.begin()
        for step in stage.run.progress():
            stage.train(step)
            if step == stop:
                save_image(torch.rand(3, 8, 8), "run/sheet.png")
                stage.run.log_evaluation(stop, split="val", top1=10.0 + stop)
                break

    train(8)
    train(10)                                               # from the checkpoint of step 5 on
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
