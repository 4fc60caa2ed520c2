"""Faults that a long run meets, each injected. The long ones are run by `make test-faults`.

"Alike" is by SHA-256 over all that is trained and the optimizer; each has a control that shows that
the test would see a difference.
"""
import contextlib
import functools
import json
import multiprocessing
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
from conftest import COMMON, OWN, ROOT, STAGES, run
from helpers import fails, files, log, newest, printed, process_group, torchrun, weights
from PIL import Image
from test_data import make_folder
from test_logbook import Stage, trained

import data
import finetune
import tokenizer
from support import checkpoint, launch
from support.weights import network_of

pytestmark = pytest.mark.faults
long = pytest.mark.long


@contextlib.contextmanager
def forked(function, *arguments):
    """As helpers.process_group, but of a fork that calls function(*arguments)."""
    def child():
        output = open("output.txt", "a", buffering=1)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = sys.stderr = output                    # pytest has its own
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    os.setpgid(process.pid, process.pid)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)          # its loader's workers too
        process.join()


def ended(function, *arguments):
    """The exit status of such a process; negative: killed by that signal."""
    with forked(function, *arguments) as process:
        process.join(600)                                   # else a failure would hang
    return process.exitcode


def finish_forked(stage, faults, flags):
    """A stage with faults in a child process, to its end."""
    assert ended(faulty.main, stage, faults, flags) == 0, printed()[-2000:]


def wait_for(condition, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, printed()[-2000:]
        time.sleep(0.002)


def record(folder, rank=0):
    """A rank's digests of "samples" and "weights", by step. What was done twice was done alike."""
    found = dict(samples={}, weights={})
    for line in (Path(folder) / f"rank-{rank}.jsonl").read_text().splitlines():
        kind, step, value = json.loads(line)
        assert found[kind].setdefault(step, value) == value, step
    return found


def newest_file(folder):
    """The newest checkpoint's name, as the folder has it at this moment."""
    return max((path.name for path in Path(folder).glob("step-*.pt")), default="")


def assert_alike(one, other):
    """All that is trained, and the best evaluation so far, in two files or two runs' newest."""
    one, other = newest(one), newest(other)
    assert weights(one) == weights(other)
    assert one["best"] == other["best"]


# ------------------------------------------------------------------------------------------------
# Killed at any moment

def steps_done(folder):
    path = Path(folder) / "rank-0.jsonl"
    return path.read_text().count('"weights"') if path.exists() else 0


def kill_and_go_on(stage, chain, kills, workers):
    """Kills come at random moments: before, in or after a checkpoint, due every four steps."""
    steps = 5 * kills + 10                                  # not over before the last kill
    flags = [*chain.inputs[stage], "--steps", str(steps), "--workers", str(workers)]
    if stage == "tokenizer":
        flags += ["--adversarial-weight", "0.1"]            # a discriminator is to be kept too
    killed = (stage, ["record=killed.rec"], [*flags, "--output", "killed"])
    begun = time.time()
    finish_forked(stage, ["record=whole.rec"], [*flags, "--output", "whole"])
    seconds = (time.time() - begun) / steps                 # of a step here and now
    rng = random.Random(0)
    left = []                                               # the newest file after each kill
    for _ in range(kills):
        with forked(faulty.main, *killed) as process:       # at the block's end it is killed
            target = steps_done("killed.rec") + rng.randrange(7)
            wait_for(lambda target=target: steps_done("killed.rec") >= target)
            time.sleep(rng.uniform(0, 2 * seconds))
        assert process.exitcode == -signal.SIGKILL          # it was alive
        left.append(newest_file("killed"))
    assert max(left) < newest_file("whole")
    assert kills < 5 or len(set(left)) > 2
    finish_forked(*killed)

    for path in Path("whole").glob("*.pt"):
        assert_alike(f"killed/{path.name}", path)
    assert record("killed.rec") == record("whole.rec")
    assert len(record("whole.rec")["samples"]) == steps
    assert steps_done("killed.rec") > steps_done("whole.rec")       # the kills cost something
    # the control
    finish_forked(stage, ["record=other.rec"], [*flags, "--output", "other", "--seed", "1"])
    assert weights(newest("other")) != weights(newest("whole"))
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

@pytest.mark.parametrize("owner, name, saved", [
    (torch, "save", 10), (os, "fsync", 10), (os, "replace", 15), (Path, "unlink", 15)])
def test_stopped_at_each_point_of_a_save(owner, name, saved):
    original = getattr(owner, name)

    def die(*arguments, **keywords):
        original(*arguments, **keywords)
        os._exit(9)

    def doomed():
        stage = trained(14)                                 # two are there: the third is doomed
        setattr(owner, name, die)
        stage.train(15)

    assert ended(doomed) == 9
    assert bool(list(Path("run").glob("*.tmp"))) == (saved == 10)   # the control: in its midst
    stage = Stage(seed=1)
    assert stage.begin() == saved
    assert not list(Path("run").glob("*.tmp"))
    assert stage.train(20).digest() == trained(20, output="whole").digest()
    assert stage.digest() != trained(20, output="other", seed=1).digest()


def test_stopped_at_an_epochs_end_it_is_evaluated_when_it_goes_on(chain):
    flags = [*chain.inputs["finetune"], "--output", "run"]
    assert ended(faulty.main, "finetune", ["term=3"], flags) == 128 + signal.SIGTERM
    assert newest("run")["step"] == 4
    assert log("run", "val") == []
    assert not Path("run/best.pt").exists()
    run("finetune", *flags)
    for row, expected in zip(log("run", "val"), log(chain.finetune, "val"), strict=True):
        assert row == expected | dict(time=row["time"])
    for name in ("best.pt", "step-00000004.pt", "step-00000006.pt"):
        assert_alike(f"run/{name}", chain.finetune / name)


# ------------------------------------------------------------------------------------------------
# Damaged files

def damage(path, how):
    """Cut the file to a share, or write zeros, or flip a bit, within a tensor."""
    if isinstance(how, float):
        os.truncate(path, int(how * path.stat().st_size))
        return
    raw = torch.load(path, weights_only=True)["model"]["0.weight"].numpy().tobytes()
    damaged = bytes(len(raw)) if how == "zeros" else bytes([raw[0] ^ 16]) + raw[1:]
    path.write_bytes(path.read_bytes().replace(raw, damaged))
    torch.load(path, weights_only=True)             # the control: torch itself notices nothing here


@pytest.mark.parametrize("how", [0.0, 0.5, 0.999, "zeros", "bit"])
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
        launch.start(lambda args: stage.train(10), stage.args)

    assert ended(limited) == 2
    assert "run/step-00000010.pt: not written" in printed()
    assert "run/step-00000005.pt is intact" in printed()
    assert files() == ["step-00000005.pt"]
    assert trained(10, seed=1).digest() == trained(10, output="whole").digest()


def test_a_disk_that_fills_between_checkpoints():
    stage = trained(7)
    Path("run/log.jsonl").unlink()
    Path("run/log.jsonl").symlink_to("/dev/full")           # there is never room
    with pytest.raises(launch.InputError, match="run/log.jsonl: .* run/step-00000005.pt"):
        stage.run.log_evaluation(7, split="val")


def test_an_unwritable_output_fails_before_the_first_step(capsys, monkeypatch):
    monkeypatch.setattr(data, "train_batches", None)        # it comes to no step
    Path("file").write_text("")
    for output in ("file", "file/run"):
        assert f"--output {output}" in fails(capsys, "teacher", "--output", output)


# ------------------------------------------------------------------------------------------------
# Two ranks

def two_ranks(stage, faults, *flags, **keywords):
    """A stage with faults under torchrun."""
    return torchrun(ROOT / "tests" / "faulty.py", stage, *faults, "--", *flags, **keywords)


def finish(*arguments, **keywords):
    """The same to its end."""
    with two_ranks(*arguments, **keywords) as process:
        assert process.wait(240) == 0, printed()


@long
@pytest.mark.parametrize("where", ["step", "evaluation", "save"])
def test_sigterm_to_two_ranks_with_workers(where, chain):
    flags = [*chain.inputs["finetune"], "--workers", "2"]
    with two_ranks("finetune", [f"touch={where}"], *flags, "--output", "run") as process:
        wait_for(Path("touched").exists)
        os.killpg(process.pid, signal.SIGTERM)
        wait_for(lambda: newest_file("run"), seconds=5)
        assert process.wait(30) != 0                        # before torchrun kills
    # else the step after the evaluation, or the save, which are at the 4th
    assert newest("run")["step"] == (1 if where == "step" else 5)
    finish("finetune", [], *flags, "--output", "run")
    finish("finetune", [], *flags, "--output", "whole")
    assert_alike("run", "whole")


@long
def test_a_killed_rank_ends_the_job_and_a_restart_finishes_it(chain):
    flags = chain.inputs["pretrain"]
    with two_ranks("pretrain", ["kill=5"], *flags, "--output", "run") as process:
        wait_for(Path("struck").exists)
        assert process.wait(10) != 0
    assert newest("run")["step"] == 4
    Path("struck").unlink()
    finish("pretrain", ["kill=5"], *flags, "--output", "again", launcher=["--max-restarts", "1"])
    assert Path("struck").exists()
    finish("pretrain", [], *flags, "--output", "whole")
    assert_alike("again", "whole")


@long
def test_a_rank_that_hangs_ends_the_job_in_the_stated_time(chain):
    flags = [*chain.inputs["pretrain"], "--output", "run"]
    with two_ranks("pretrain", ["stop=3", "timeout=8"], *flags) as process:
        wait_for(Path("struck").exists)
        assert process.wait(8 + 35) != 0            # torchrun kills the one that hangs after 30 s


def seen(name, weight, stage):
    """What of a weight the loss depends on: not the keys' bias, nor one that batch norm takes away.

    There the gradient is 0 but for rounding, of which Adam makes steps.
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
    drawn = {"--mixup", "--drop-path"} & set(OWN[stage])    # by two ranks otherwise than by one
    off = [word for flag in drawn for word in (flag, "0")]
    flags = [*chain.inputs[stage], *off]
    finish(stage, ["double", "record=two.rec"], *flags, "--output", "two")
    finish_forked(stage, ["double", "record=one.rec"], [*flags, "--output", "one"])
    first, second = [record("two.rec", rank) for rank in (0, 1)]
    samples = {step: own + second["samples"][step] for step, own in first["samples"].items()}
    assert samples == record("one.rec")["samples"]
    digests = first["weights"]
    assert digests == second["weights"]
    assert set(digests) == {1, 2, 3, 4, 5, 6, -1}
    assert len(set(digests.values())) == 6                  # the control
    assert digests[6] == digests[-1]
    one, two = newest("one")["model"], newest("two")["model"]
    worst = 0.0
    for name, weight in one.items():
        if weight.is_floating_point():
            expected, found = seen(name, weight, stage), seen(name, two[name], stage)
            error = (expected - found).norm() / expected.norm().clamp(min=1e-3)
            worst = max(worst, error.item())
    # Dropout, and the sampled anchors and boxes, are seeded by the rank: these are the control.
    assert (worst < 1e-12) == (stage not in ("segment", "detect"))


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


@pytest.mark.parametrize("kind", ["CMYK", "L", "P", "LA", "RGBA", "I;16", "1×1"])
def test_images_of_all_kinds(kind):
    path = Path("set/train/thing") / ("image.jpg" if kind == "CMYK" else "image.png")
    path.parent.mkdir(parents=True)
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64)     # from black at the top to white
    special = {"I;16": Image.fromarray((257 * ramp).astype(np.uint16)),
               "1×1": Image.new("RGB", (1, 1), (99, 0, 0))}
    image = special.get(kind) or Image.fromarray(ramp.astype(np.uint8)).convert(kind)
    image.save(path)
    dataset = data.load_dataset("set", "train", 32)
    evaluated = data.eval_transform(32, 1.0)
    for transform in (data.crop_and_flip(32), *data.teacher_views(32), data.finetune_transform(32)):
        assert data.Samples(dataset, transform, 0)[0, 0][0].shape == (3, 32, 32)
    pixels = data.Samples(dataset, evaluated, 0)[0, 0][0]
    opened = data.open_image(Image.open(path))              # as weights.load's preprocess takes it
    assert torch.equal(evaluated(opened), pixels)
    assert -1 <= pixels.min() <= pixels.max() <= 1
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
    assert torch.equal(network.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])


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

    with forked(hold):
        wait_for(Path("ready").exists)
        with pytest.raises(launch.InputError, match="--output run: .* alive"):
            Stage().begin()
    assert Stage().begin() == 0                             # the control: the lock went with it


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
        wait_for(lambda: os.waitpid(pid, os.WNOHANG)[0])
    finally:
        os.close(terminal)                                  # SIGHUP to whatever is left
    assert Path("status.txt").read_text().split() == ["130", "130"]     # tee: killed by SIGINT
    assert "stopped at" not in printed()                    # the control: tee was gone by then
    saved, = Path("run").glob("step-*.pt")
    assert checkpoint.load(saved)["step"] >= 2
