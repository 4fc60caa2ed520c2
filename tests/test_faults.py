"""Faults that a long run meets, each injected. The long ones are run by `make test-faults`.

"Alike" is by SHA-256 over all that is trained and the optimizer; each has a control that shows that
the test would see a difference.
"""
import contextlib
import errno
import functools
import json
import os
import pty
import random
import resource
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import faulty
import numpy as np
import pytest
import torch
from conftest import COMMON, ROOT, STAGES, run
from helpers import fails, files, log, newest, printed, process_group, torchrun, weights
from PIL import Image
from test_data import make_folder
from test_logbook import Stage, trained

import data
import finetune
import tokenizer
from support import checkpoint, launch
from support import run as logbook
from support.run import Run
from support.weights import network_of

pytestmark = pytest.mark.faults
long = pytest.mark.long


@contextlib.contextmanager
def forked(function, *arguments):
    """A child process that calls function(*arguments), in a session of its own; its pid.

    What it prints is in output.txt. It is gone at the end.
    """
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.setsid()
            output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)   # pytest has its own
            function(*arguments)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)                  # its loader's workers too
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def wait_for(condition, seconds=120):
    deadline = time.time() + seconds                        # else a failure would hang
    while not condition():
        assert time.time() < deadline, printed()[-2000:]
        time.sleep(0.002)


def wait(pid):
    """Exit status of a child; negative: killed by that signal."""
    def ended():
        nonlocal status
        done, status = os.waitpid(pid, os.WNOHANG)
        return done

    status = None
    wait_for(ended, seconds=600)
    return os.waitstatus_to_exitcode(status)


def finish_forked(stage, faults, flags):
    """A stage with faults in a child process, to its end."""
    with forked(faulty.main, stage, faults, flags) as pid:
        assert wait(pid) == 0, printed()[-2000:]


def record(folder, rank=0):
    """What a rank's record holds: {step: the samples' digests}, {step: the weights' digest}.

    What was done twice was done alike.
    """
    batches, digests = {}, {}
    for line in (Path(folder) / f"rank-{rank}.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "batch" in row:
            step = row["batch"]
            assert batches.setdefault(step, row["samples"]) == row["samples"], step
        else:
            step = row["step"]
            assert digests.setdefault(step, row["digest"]) == row["digest"], step
    return batches, digests


# ------------------------------------------------------------------------------------------------
# Killed at any moment

MORE_TO_KEEP = {"tokenizer": ["--adversarial-weight", "0.1"]}


def steps_done(folder):
    path = Path(folder) / "rank-0.jsonl"
    return path.read_text().count('"digest"') if path.exists() else 0


def kill_and_go_on(stage, chain, kills, workers):
    """Kills come at random moments: before, in or after a checkpoint, which is due every 4 steps.

    Each comes within about the next eight steps, and the run is so long that it is never over
    before the last kill.
    """
    steps = 5 * kills + 10
    flags = [*chain.inputs[stage], *MORE_TO_KEEP.get(stage, []), "--steps", str(steps),
             "--workers", str(workers)]
    begun = time.time()
    finish_forked(stage, ["record=whole.rec"], [*flags, "--output", "whole"])
    seconds = (time.time() - begun) / steps                 # of a step here and now
    rng = random.Random(0)
    at = []
    for _ in range(kills):
        arguments = (stage, ["record=killed.rec"], [*flags, "--output", "killed"])
        with forked(faulty.main, *arguments) as pid:
            target = steps_done("killed.rec") + rng.randrange(7)
            wait_for(lambda target=target: steps_done("killed.rec") >= target)
            time.sleep(rng.uniform(0, 2 * seconds))
            os.killpg(pid, signal.SIGKILL)
            assert wait(pid) == -signal.SIGKILL             # it was alive
        at.append(newest("killed")["step"] if list(Path("killed").glob("step-*.pt")) else 0)
    assert max(at) < steps
    assert kills < 5 or len(set(at)) > 2
    finish_forked(stage, ["record=killed.rec"], [*flags, "--output", "killed"])

    whole, killed = newest("whole"), newest("killed")
    assert killed["step"] == steps
    assert weights(killed) == weights(whole)
    assert killed["best"] == whole["best"]
    assert record("killed.rec") == record("whole.rec")
    assert len(record("whole.rec")[0]) == steps
    assert steps_done("killed.rec") > steps                 # the kills cost something
    if Path("whole/best.pt").exists():
        best, killed_best = [checkpoint.load(f"{run}/best.pt") for run in ("whole", "killed")]
        assert weights(killed_best) == weights(best)
        assert killed_best["best"] == best["best"]
    # the control
    finish_forked(stage, ["record=other.rec"], [*flags, "--output", "other", "--seed", "1"])
    assert weights(newest("other")) != weights(whole)
    assert record("other.rec") != record("whole.rec")


def test_killed_and_resumed(chain, monkeypatch):
    narrow = functools.partial(tokenizer.PatchDiscriminator, 16)    # a sixteenth of the weights
    monkeypatch.setattr(tokenizer, "PatchDiscriminator", narrow)    # the processes are forks
    kill_and_go_on("tokenizer", chain, kills=2, workers=1)


@long
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_twenty_times_and_resumed(stage, workers, chain):
    kill_and_go_on(stage, chain, kills=20, workers=workers)


# ------------------------------------------------------------------------------------------------
# Stopped in a save, or before an evaluation

POINTS = {"write": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace"),
          "unlink": (Path, "unlink")}


@pytest.mark.parametrize("point", POINTS)
def test_stopped_at_each_point_of_a_save(point):
    owner, name = POINTS[point]
    original = getattr(owner, name)

    def die(*arguments, **keywords):
        original(*arguments, **keywords)
        os._exit(9)

    def doomed():
        stage = trained(14)                                 # two are there: the third is doomed
        setattr(owner, name, die)
        stage.train(15)

    with forked(doomed) as pid:
        assert wait(pid) == 9
    expected = 10 if point in ("fsync", "write") else 15
    assert checkpoint.load("run")["step"] == expected
    assert bool(list(Path("run").glob("*.tmp"))) == (expected == 10)    # the control: in its midst
    stage = Stage(seed=1)
    assert stage.begin() == expected
    assert not list(Path("run").glob("*.tmp"))
    stage.train(20)
    assert files() == ["step-00000015.pt", "step-00000020.pt"]
    assert stage.digest() == trained(20, output="whole").digest()
    assert stage.digest() != trained(20, output="other", seed=1).digest()


def evaluations(folder):
    """Rows of a run's evaluations without the time."""
    return [{key: value for key, value in row.items() if key != "time"}
            for row in log(folder, "val")]


def test_stopped_at_an_epochs_end_it_is_evaluated_when_it_goes_on(chain, monkeypatch):
    def interrupted(self):
        agree(self)
        if self.step == 3:
            self.signal = signal.SIGTERM

    agree = Run.agree
    flags = [*chain.inputs["finetune"], "--output", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "agree", interrupted)
        with pytest.raises(SystemExit):
            run("finetune", *flags)
    assert newest("run")["step"] == 4
    assert evaluations("run") == []
    assert not Path("run/best.pt").exists()
    run("finetune", *flags)
    assert evaluations("run") == evaluations(chain.finetune)
    for name in ("best.pt", "step-00000004.pt", "step-00000006.pt"):
        one, whole = checkpoint.load(f"run/{name}"), checkpoint.load(chain.finetune / name)
        assert weights(one) == weights(whole)
        assert one["best"] == whole["best"]


# ------------------------------------------------------------------------------------------------
# Damaged files

def damage(path, how):
    """Cut the file to a percentage, or write zeros, or flip a bit, within a tensor."""
    whole = bytearray(path.read_bytes())
    if how.endswith("%"):
        path.write_bytes(whole[:int(len(whole) * float(how[:-1]) / 100)])
        return
    raw = torch.load(path, weights_only=True)["model"]["0.weight"].numpy().tobytes()
    place = whole.index(raw)
    if how == "zeros":
        whole[place:place + len(raw)] = bytes(len(raw))
    else:
        whole[place] ^= 16
    path.write_bytes(whole)
    torch.load(path, weights_only=True)             # the control: torch itself notices nothing here


@pytest.mark.parametrize("how", ["0%", "50%", "99.9%", "zeros", "bit"])
def test_the_newest_file_damaged(how, capsys):
    whole = trained()
    damage(Path("run/step-00000010.pt"), how)
    stage = Stage(seed=1)
    assert stage.begin() == 5
    assert "run/step-00000010.pt" in capsys.readouterr().err
    assert stage.train(10).digest() == whole.digest()
    for path in Path("run").glob("step-*.pt"):
        damage(path, how)
    with pytest.raises(launch.InputError, match="run: no sound checkpoint"):
        Stage().begin()


# ------------------------------------------------------------------------------------------------
# No room, no right

def test_a_file_that_grows_too_large():
    """A limit of the system in place of a full disk: a real write that fails half way."""
    def limited():
        stage = trained(9)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        half = Path("run/step-00000005.pt").stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
        try:
            stage.train(10)
        except launch.InputError as error:
            os.write(1, str(error).encode())
            os._exit(2)

    with forked(limited) as pid:
        assert wait(pid) == 2
    assert "run/step-00000010.pt: not written" in printed()
    assert "run/step-00000005.pt is intact" in printed()
    assert files() == ["step-00000005.pt"]
    again = Stage(seed=1)
    assert again.begin() == 5
    assert again.train(10).digest() == trained(10, output="whole").digest()


def test_a_disk_that_fills_between_checkpoints(monkeypatch):
    def full(path, mode):
        raise OSError(errno.ENOSPC, "No space left on device")

    stage = trained(7)
    monkeypatch.setattr(logbook, "open", full, raising=False)
    with pytest.raises(launch.InputError, match="run/log.jsonl: .* run/step-00000005.pt"):
        stage.run.log_evaluation(7, split="val")
    assert newest("run")["step"] == 5


def test_an_unwritable_output_fails_before_the_first_step(capsys, monkeypatch):
    monkeypatch.setattr(data.TrainLoader, "__iter__", None)  # it comes to no step
    Path("file").write_text("")
    for output in ("file", "file/run"):
        assert f"--output {output}" in fails(capsys, "teacher", "--output", output)


# ------------------------------------------------------------------------------------------------
# Two ranks

def two_ranks(stage, faults, *flags, **keywords):
    """A stage with faults under torchrun."""
    script = ROOT / "tests" / "faulty.py"
    return torchrun(script, stage, *faults, "--", *flags, **keywords)


def finish(*arguments, **keywords):
    """The same to its end."""
    with two_ranks(*arguments, **keywords) as process:
        assert process.wait(240) == 0, printed()


def last_file():
    """The newest checkpoint's name, as the folder has it at this moment."""
    return max((path.name for path in Path("run").glob("step-*.pt")), default="")


@long
@pytest.mark.parametrize("where", ["step", "evaluation", "save"])
def test_sigterm_to_two_ranks_with_workers(where, chain):
    flags = [*chain.inputs["finetune"], "--workers", "2"]
    with two_ranks("finetune", [f"touch={where}"], *flags, "--output", "run") as process:
        wait_for(lambda: Path("touched").exists() or process.poll() is not None)
        assert process.poll() is None, printed()
        os.killpg(process.pid, signal.SIGTERM)
        wait_for(last_file, seconds=5)
        assert process.wait(30) != 0                        # before torchrun kills
    # else the step after the evaluation, or the save, which are at the 4th
    assert newest("run")["step"] == (1 if where == "step" else 5)
    finish("finetune", [], *flags, "--output", "run")
    finish("finetune", [], *flags, "--output", "whole")
    one, whole = newest("run"), newest("whole")
    assert one["step"] == 6
    assert weights(one) == weights(whole)
    assert one["best"] == whole["best"]


@long
def test_a_killed_rank_ends_the_job_and_a_restart_finishes_it(chain):
    flags = chain.inputs["pretrain"]
    with two_ranks("pretrain", ["kill=5"], *flags, "--output", "run") as process:
        wait_for(Path("struck").exists)
        assert process.wait(10) != 0
    assert newest("run")["step"] == 4
    Path("struck").unlink()
    finish("pretrain", ["kill=5"], *flags, "--output", "again",
           launcher=["--max-restarts", "1"])
    assert Path("struck").exists()
    finish("pretrain", [], *flags, "--output", "whole")
    assert weights(newest("again")) == weights(newest("whole"))


@long
def test_a_rank_that_hangs_ends_the_job_in_the_stated_time(chain):
    flags = [*chain.inputs["pretrain"], "--output", "run"]
    with two_ranks("pretrain", ["stop=3", "timeout=8"], *flags) as process:
        wait_for(Path("struck").exists)
        assert process.wait(8 + 35) != 0            # torchrun kills the one that hangs after 30 s


# Flags without which two ranks draw other numbers than one.
SAME = {
    "finetune": ["--mixup", "0", "--drop-path", "0"],
    "pretrain": ["--drop-path", "0"],
    "segment": ["--drop-path", "0"],
    "detect": ["--drop-path", "0"],
}


def seen(name, weight, stage):
    """What of a weight the loss depends on.

    Of the rest the gradient is 0 but for rounding, of which Adam makes steps: of the keys' bias,
    and of a bias that batch norm takes away.
    """
    if name.endswith("qkv.bias"):
        queries, _, values = weight.chunk(3)
        return torch.cat([queries, values])
    if stage == "teacher" and name == "norm.bias":
        return weight[:0]
    return weight


@long
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_are_alike_and_as_one_in_float64(stage, chain):
    flags = [*chain.inputs[stage], *SAME.get(stage, [])]
    finish(stage, ["double", "record=two.rec"], *flags, "--output", "two")
    finish_forked(stage, ["double", "record=one.rec"], [*flags, "--output", "one"])
    (batches, first), (more, second) = [record("two.rec", rank) for rank in (0, 1)]
    assert {step: batches[step] + more[step] for step in batches} == record("one.rec")[0]
    assert first == second
    assert set(first) == {1, 2, 3, 4, 5, 6, -1}
    assert len(set(first.values())) == 6                    # the control
    assert first[6] == first[-1]
    worst = 0.0
    one, two = newest("one")["model"], newest("two")["model"]
    for name, weight in one.items():
        if weight.is_floating_point():
            expected = seen(name, weight, stage)
            found = seen(name, two[name], stage)
            error = (expected - found).norm() / expected.norm().clamp(min=1e-3)
            worst = max(worst, error.item())
    if stage in ("segment", "detect"):      # dropout; sampled anchors, boxes: seeded by the rank
        assert worst > 1e-12                                # the control: the figure can be larger
    else:
        assert worst < 1e-12


# ------------------------------------------------------------------------------------------------
# Images

def test_an_unreadable_image_is_named(folder):
    """By a real process, which must not wait for its loader's worker that ignores SIGTERM."""
    path = make_folder(folder / "set", images=10) / "train" / "bee" / "0.jpg"
    path.write_bytes(path.read_bytes()[:300])
    flags = [*COMMON, "--data", "set", "--workers", "1"]
    with process_group(ROOT / "teacher.py", *flags) as process:
        assert process.wait(600) == 2
    message = printed().splitlines()[-1]
    assert message.startswith("teacher.py: set/train/bee/0.jpg: ")
    assert "Traceback" not in printed()


def image_of_kind(kind):
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64)     # from black at the top to white
    if kind == "1×1":
        return Image.new("RGB", (1, 1), (99, 0, 0))
    if kind == "I;16":
        return Image.fromarray((ramp * 257).astype(np.uint16))
    if kind == "CMYK":
        return Image.fromarray(np.stack([ramp] * 3, 2).astype(np.uint8)).convert("CMYK")
    return Image.fromarray(ramp.astype(np.uint8)).convert(kind)


@pytest.mark.parametrize("kind", ["CMYK", "L", "P", "LA", "RGBA", "I;16", "1×1"])
def test_images_of_all_kinds(kind, folder):
    suffix = "jpg" if kind == "CMYK" else "png"
    path = folder / "set" / "train" / "thing" / f"image.{suffix}"
    path.parent.mkdir(parents=True)
    image_of_kind(kind).save(path)
    dataset = data.load_dataset("set", "train", 32)
    evaluated = data.eval_transform(32, 1.0)
    for transform in (data.crop_and_flip(32), *data.teacher_views(32), data.finetune_transform(32)):
        pixels, _ = data.Samples(dataset, transform, 0)[0, 0]
        assert pixels.shape == (3, 32, 32)
    pixels = data.Samples(dataset, evaluated, 0)[0, 0][0]
    opened = data.open_image(Image.open(path))              # as weights.load's preprocess takes it
    assert torch.equal(evaluated(opened), pixels)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    if kind != "1×1":                                       # a ramp it still is
        assert pixels[:, :2].mean() < -0.8
        assert pixels[:, -2:].mean() > 0.8


# ------------------------------------------------------------------------------------------------
# Files that are not what they should be

class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_hostile_pickle_is_not_executed(capsys):
    trained()
    torch.save(dict(model=Hostile()), "run/step-00000011.pt")
    assert checkpoint.load("run")["step"] == 10             # passed over
    shutil.copy("run/step-00000011.pt", "hostile.pt")
    assert "hostile.pt" in fails(capsys, "finetune", "--init", "hostile.pt", before=1)
    assert not Path("executed").exists()
    torch.load("hostile.pt", weights_only=False)            # the control: the trap works
    assert Path("executed").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_names_are_converted(prefix, chain):
    state = newest(chain.pretrain)["model"]
    torch.save(dict(model={prefix + key: value for key, value in state.items()}), "wrapped.pt")
    args = finetune.get_args([*COMMON, "--init", "wrapped.pt"])
    network, _ = finetune.build(args, 10, checkpoint.load("wrapped.pt"))
    found = network.blocks[0].mlp.fc1.weight
    assert torch.equal(found, state["blocks.0.mlp.fc1.weight"])


def test_another_codebook_size_is_refused_in_one_line(chain, capsys):
    shutil.copytree(chain.tokenizer, "run")
    flags = [*chain.inputs["tokenizer"], "--output", "run", "--resume", "force"]
    message = fails(capsys, "tokenizer", *flags, "--codebook-size", "16")
    assert "--output run" in message
    assert "[32" in message and "[16" in message


def golden_loss(state):
    """Cross-entropy of a fixed batch: a wave, every third patch masked, codes in turn."""
    network = network_of(state)
    network.load_state_dict(state["model"])
    images = torch.linspace(0, 60, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16)
    mask = (torch.arange(2 * 16) % 3 == 0).view(2, 4, 4)
    target = torch.arange(int(mask.sum())) % 8
    return torch.nn.functional.cross_entropy(network(images, mask), target).item()


def test_golden_checkpoint():
    """tests/golden.pt was written by the first version that had this test; its loss is in it."""
    state = checkpoint.load(ROOT / "tests" / "golden.pt", ["pretrain"])
    assert golden_loss(state) == pytest.approx(state["best"], rel=1e-5)     # other kernels
    state["model"]["lm_head.bias"][0] += 0.5                # the control
    assert golden_loss(state) != pytest.approx(state["best"], rel=1e-5)


# ------------------------------------------------------------------------------------------------
# Two runs, Ctrl-C

def test_a_second_run_in_a_live_folder_is_refused():
    def hold():
        Stage().begin()
        Path("ready").touch()
        signal.pause()

    with forked(hold) as pid:
        wait_for(Path("ready").exists)
        with pytest.raises(launch.InputError, match="--output run: .* alive"):
            Stage().begin()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert Stage().begin() == 0                         # the control: the lock went with it


def test_ctrl_c_in_a_pipe_to_tee(chain):
    """As on a terminal: Ctrl-C ends tee first, and what the run says finds no reader."""
    stage = [sys.executable, str(ROOT / "pretrain.py"), *COMMON, *chain.inputs["pretrain"],
             "--output", "run", "--steps", "1000000000", "--save-every", "1000000"]
    script = (f"trap : INT; {shlex.join(stage)} 2>&1 | tee output.txt >/dev/null; "
              "echo ${PIPESTATUS[@]} >status.txt")
    pid, terminal = pty.fork()
    if pid == 0:
        for one in (signal.SIGINT, signal.SIGHUP):          # ignored where the tests run behind "&"
            signal.signal(one, signal.SIG_DFL)
        os.execvp("bash", ["bash", "-c", script])
    try:
        wait_for(lambda: Path("output.txt").exists() and "\nstep 2 " in printed())
        os.write(terminal, b"\x03")
        wait(pid)
    finally:
        os.close(terminal)                                  # SIGHUP to whatever is left
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert Path("status.txt").read_text().split() == ["130", "130"]     # tee: killed by SIGINT
    assert "stopped at" not in printed()                    # the control: tee was gone by then
    saved, = Path("run").glob("step-*.pt")
    assert checkpoint.load(saved)["step"] >= 2
