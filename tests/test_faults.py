"""Twelve faults that a long run meets, each injected. The long ones are run by `make test-faults`.

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
import subprocess
import sys
import time
from pathlib import Path

import faulty
import numpy as np
import pytest
import torch
from conftest import COMMON, OWN, ROOT, STAGES, run
from PIL import Image
from test_data import make_folder
from test_logbook import Stage, files, rows, trained
from test_stages import fails, newest, weights

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


def printed():
    return Path("output.txt").read_text()


def wait(pid, seconds=120):
    """Exit status of a child; negative: killed by that signal."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    raise TimeoutError(printed()[-2000:])


def wait_for(condition, *arguments, seconds=120):
    deadline = time.time() + seconds
    while not condition(*arguments):
        assert time.time() < deadline, printed()[-2000:]
        time.sleep(0.002)


def finish_forked(stage, faults, flags):
    """A stage with faults in a child process, to its end."""
    with forked(faulty.main, stage, faults, flags) as pid:
        assert wait(pid, 600) == 0, printed()[-2000:]


def start(stage, *flags):
    """A stage as its script runs it, in this process."""
    module = STAGES[stage]
    launch.start(module.main, module.get_args([*COMMON, *OWN[stage], *flags]))


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
# 1. Killed at any moment

MORE_TO_KEEP = {"tokenizer": ["--adversarial-weight", "0.1"]}


def steps_done(folder):
    path = Path(folder) / "rank-0.jsonl"
    if not path.exists():
        return 0
    return sum('"digest"' in line for line in path.read_text().splitlines())


def has_done(folder, steps):
    return steps_done(folder) >= steps


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
            wait_for(has_done, "killed.rec", target)
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


@pytest.mark.parametrize("stage", ["tokenizer", "finetune"])
def test_killed_and_resumed(stage, chain, monkeypatch):
    narrow = functools.partial(tokenizer.PatchDiscriminator, 16)    # a sixteenth of the weights
    monkeypatch.setattr(tokenizer, "PatchDiscriminator", narrow)    # the processes are forks
    kill_and_go_on(stage, chain, kills=2, workers=1)


@long
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_twenty_times_and_resumed(stage, workers, chain):
    kill_and_go_on(stage, chain, kills=20, workers=workers)


# ------------------------------------------------------------------------------------------------
# 2. Killed in a save

def train_for_ever():
    trained(10 ** 9, steps=10 ** 9)


def last_file():
    """The newest checkpoint's name, as the folder has it at this moment."""
    return max((path.name for path in Path("run").glob("step-*.pt")), default="")


def has_file_after(name):
    return last_file() > name


def test_killed_twenty_times_while_saving():
    rng = random.Random(0)
    steps = []
    for _ in range(20):
        before = last_file()
        with forked(train_for_ever):
            wait_for(has_file_after, before)
            time.sleep(rng.uniform(0, 0.1))
        steps.append(checkpoint.load("run")["step"])
        assert len(list(Path("run").glob("step-*.pt"))) <= 3    # two, and one that was to go
    assert all(after > before for before, after in zip(steps, steps[1:], strict=False))
    stage = Stage(steps=10 ** 9)
    assert stage.begin() == steps[-1]
    assert not list(Path("run").glob("*.tmp"))
    stage.train(steps[-1] + 5)
    assert len(files()) == 2


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


# ------------------------------------------------------------------------------------------------
# 3. Damaged files

def damage(path, how):
    """Cut the file to a percentage, or write zeros, or flip a bit, within its largest tensor."""
    if how.endswith("%"):
        with open(path, "r+b") as file:
            file.truncate(int(path.stat().st_size * float(how[:-1]) / 100))
        return
    state = torch.load(path, weights_only=True)
    tensors = list(state["model"].values())
    for moments in state["optimizer"]["state"].values():
        tensors += moments.values()
    largest = max(tensors, key=lambda tensor: tensor.nbytes).numpy().tobytes()
    place = path.read_bytes().index(largest)
    wrong = bytes(min(len(largest), 64 * 1024))
    if how == "bit":
        wrong = bytes([largest[0] ^ 16])
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(wrong)
    torch.load(path, weights_only=True)             # the control: torch itself notices nothing here


@pytest.mark.parametrize("how", ["0%", "50%", "99.99%", "zeros", "bit"])
def test_the_newest_file_damaged(how, chain, capsys):
    shutil.copytree(chain.pretrain, "run")
    # force: the chain's paths of output and tokenizer are others
    flags = [*chain.inputs["pretrain"], "--output", "run", "--resume", "force"]
    damage(Path("run/step-00000006.pt"), how)
    run("pretrain", *flags)
    assert "step-00000006.pt: not loaded: " in capsys.readouterr().err
    assert weights(newest("run")) == weights(newest(chain.pretrain))
    for path in Path("run").glob("step-*.pt"):
        damage(path, how)
    assert "run: no sound checkpoint" in fails(capsys, "pretrain", *flags, before=2)


# ------------------------------------------------------------------------------------------------
# 4. No room, no right

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
    assert "run/step-00000010.pt: not written (" in printed()
    assert files() == ["step-00000005.pt"]
    assert Stage().begin() == 5


def test_an_unwritable_output_fails_before_the_first_step(capsys, monkeypatch):
    def somebody():
        if os.getuid() == 0:                                # whom no right is denied
            os.setuid(65534)
        start("teacher", "--output", "run")

    Path("file").write_text("")
    message = fails(capsys, "teacher", "--output", "file/run")
    assert "--output file/run: not writable" in message
    Path("output.txt").touch()
    Path(".").chmod(0o555)
    monkeypatch.setattr(data.TrainLoader, "__iter__", None)  # it comes to no step
    with forked(somebody) as pid:
        assert wait(pid) == 2
    expected = "--output run: not writable (Permission denied); choose another"
    assert expected in printed()
    Path(".").chmod(0o755)


# ------------------------------------------------------------------------------------------------
# 5. to 9. Two ranks

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # torchrun keeps one store through all restarts, and gloo may find there the address of a
    # process that has died (torch 2.14). With this each restart has a store of its own.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


@contextlib.contextmanager
def torchrun(stage, faults, *flags, ranks=2, launcher=()):
    """A stage with faults under torchrun; the process, its output in output.txt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", str(ranks), *launcher,
               str(ROOT / "tests" / "faulty.py"), stage, *faults, "--", *flags]
    with open("output.txt", "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True,
                                   env=os.environ | ENVIRONMENT)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(stage, faults, *flags, **keywords):
    """A stage with faults under torchrun, to its end: its status and output."""
    with torchrun(stage, faults, *flags, **keywords) as process:
        status = process.wait(240)
    return status, printed()


@long
@pytest.mark.parametrize("where", ["step", "evaluation", "save"])
def test_sigterm_to_two_ranks_with_workers(where, chain):
    flags = [*chain.inputs["finetune"], "--workers", "2"]
    with torchrun("finetune", [f"touch={where}"], *flags, "--output", "run") as process:
        wait_for(lambda: Path("touched").exists() or process.poll() is not None)
        assert process.poll() is None, printed()
        os.killpg(process.pid, signal.SIGTERM)
        begun = time.time()
        wait_for(last_file, seconds=5)
        process.wait(60)
    assert process.returncode != 0
    # else the step after the evaluation, or the save, which are at the 4th
    assert newest("run")["step"] == (1 if where == "step" else 5)
    assert time.time() - begun < 30                         # before torchrun kills
    assert finish("finetune", [], *flags, "--output", "run")[0] == 0
    assert finish("finetune", [], *flags, "--output", "whole")[0] == 0
    one, whole = newest("run"), newest("whole")
    assert one["step"] == 6
    assert weights(one) == weights(whole)
    assert one["best"] == whole["best"]


@long
def test_a_killed_rank_ends_the_job_and_a_restart_finishes_it(chain):
    flags = chain.inputs["pretrain"]
    with torchrun("pretrain", ["kill=5"], *flags, "--output", "run") as process:
        wait_for(Path("struck").exists)
        begun = time.time()
        assert process.wait(60) != 0
        assert time.time() - begun < 10
    assert newest("run")["step"] == 4
    Path("struck").unlink()
    status, output = finish("pretrain", ["kill=5"], *flags, "--output", "again",
                            launcher=["--max-restarts", "1"])
    assert status == 0, output
    assert Path("struck").exists()
    assert finish("pretrain", [], *flags, "--output", "whole")[0] == 0
    assert weights(newest("again")) == weights(newest("whole"))


@long
def test_a_rank_that_hangs_ends_the_job_in_the_stated_time(chain):
    flags = [*chain.inputs["pretrain"], "--output", "run"]
    with torchrun("pretrain", ["stop=3", "timeout=8"], *flags) as process:
        wait_for(Path("struck").exists)
        begun = time.time()
        assert process.wait(60) != 0
        assert time.time() - begun < 8 + 35         # torchrun kills the one that hangs after 30 s


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
    status, output = finish(stage, ["double", "record=two.rec"], *flags, "--output", "two")
    assert status == 0, output
    finish_forked(stage, ["double", "record=one.rec"], [*flags, "--output", "one"])
    first, second = record("two.rec", 0)[1], record("two.rec", 1)[1]
    assert first == second
    assert set(first) == {1, 2, 3, 4, 5, 6, -1}
    assert len(set(first.values())) == 6
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


@long
def test_two_ranks_then_one_then_two(chain):
    flags = [*chain.inputs["pretrain"], "--steps", "9"]
    parts = [(2, "part-1", ["kill=5"]), (1, "part-2", ["kill=8"]), (2, "part-3", [])]
    for ranks, folder, kill in parts:
        Path("struck").unlink(missing_ok=True)
        status, output = finish("pretrain", [f"record={folder}", *kill], *flags,
                                "--output", "run", ranks=ranks)
        assert (status == 0) == (not kill), output
    status, output = finish("pretrain", ["record=whole"], *flags, "--output", "whole", ranks=1)
    assert status == 0, output
    whole, _ = record("whole")
    found = set()
    for ranks, folder, _ in parts:
        shares = [record(folder, rank)[0] for rank in range(ranks)]
        for step in set.intersection(*map(set, shares)):
            assert sum((share[step] for share in shares), []) == whole[step]
            found.add(step)
    assert found == set(range(9)) == set(whole)
    assert newest("run")["step"] == 9
    status, output = finish("pretrain", [], *flags, "--output", "run", "--batch-size", "15",
                            "--resume", "force")
    assert status != 0
    assert "--batch-size 15 does not divide into 2 ranks" in output


@long
@pytest.mark.parametrize(
    "what, name, ranks", [("loss", "loss", [1]), ("grad", "grad_norm", [0, 1])])
def test_nan_on_one_rank_stops_both_alike(what, name, ranks, chain):
    flags = [*chain.inputs["pretrain"], "--drop-path", "0"]
    status, output = finish("pretrain", ["record=rec", f"nan={what}"], *flags, "--output", "run")
    assert status != 0
    message = f"pretrain.py: {name} not finite at step 2 on ranks {ranks}"
    assert output.count(message) == 2
    assert output.count("exitcode  : 3") >= 1
    assert "exitcode  : 1" not in output
    first, second = [record("rec", rank)[1] for rank in range(2)]
    assert first == second
    assert sorted(first) == [-1, 1, 2]
    assert first[-1] == first[2] != first[1]                # at the end as after two steps
    assert not list(Path("run").glob("step-*.pt"))


# ------------------------------------------------------------------------------------------------
# 10. Images

def bad_image(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:400])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_text("not an image")


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_an_unreadable_image_is_named(how, folder, capsys):
    bad_image(make_folder(folder / "set", images=10) / "train" / "bee" / "0.jpg", how)
    flags = ["--data", "set", "--batch-size", "8", "--steps", "4"]
    message = fails(capsys, "teacher", *flags, "--output", "run")
    assert "set/train/bee/0.jpg: not a readable image" in message


AS_JPEG = ("CMYK", "L", "1×1", "huge")


def image_of_kind(kind):
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64)     # from black at the top to white
    if kind == "1×1":
        return Image.new("RGB", (1, 1), (99, 0, 0))
    if kind == "huge":
        return Image.new("RGB", (10_000, 9_000), (9, 200, 9))
    if kind == "I;16":
        return Image.fromarray((ramp * 257).astype(np.uint16))
    if kind == "CMYK":
        return Image.fromarray(np.stack([ramp] * 3, 2).astype(np.uint8)).convert("CMYK")
    return Image.fromarray(ramp.astype(np.uint8)).convert(kind)


@pytest.mark.parametrize("kind", ["CMYK", "L", "P", "LA", "RGBA", "I;16", "1×1", "huge"])
def test_images_of_all_kinds(kind, folder):
    image = image_of_kind(kind)
    for split in ("train", "val"):
        path = folder / "set" / split / "thing" / f"image.{'jpg' if kind in AS_JPEG else 'png'}"
        path.parent.mkdir(parents=True)
        image.save(path)
    dataset = data.load_dataset("set", "train", 32)
    evaluated = data.evaluation(32, 1.0)
    for transform in (evaluated, data.crop_and_flip(32), *data.teacher(32), data.finetune(32)):
        pixels, _ = data.Samples(dataset, transform, 0)[0, 0]
        assert pixels.shape == (3, 32, 32)
    pixels = evaluated(data.open_image(Image.open(path)))   # as weights.load's preprocess takes it
    assert torch.equal(pixels, data.Samples(dataset, evaluated, 0)[0, 0][0])
    assert pixels.shape == (3, 32, 32)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    if kind not in ("1×1", "huge"):                         # a ramp it still is
        assert pixels[:, :2].mean() < -0.8
        assert pixels[:, -2:].mean() > 0.8


# ------------------------------------------------------------------------------------------------
# 11. Files that are not what they should be

class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


READS = {"tokenizer": "--perceptual", "pretrain": "--tokenizer", "finetune": "--init",
         "segment": "--init", "detect": "--init"}


def test_a_hostile_pickle_in_every_script(capsys):
    torch.save(dict(model=Hostile()), "hostile.pt")
    for stage in STAGES:
        if stage in READS:
            message = fails(capsys, stage, READS[stage], "hostile.pt")
            assert "hostile.pt: no sound" in message
    Path("runs/demo/teacher").mkdir(parents=True)
    shutil.copy("hostile.pt", "runs/demo/teacher/step-00000001.pt")
    assert "no sound checkpoint" in fails(capsys, "teacher", before=1)
    assert not Path("executed").exists()
    torch.load("hostile.pt", weights_only=False)            # the control: the trap works
    assert Path("executed").exists()


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrapped_names_are_converted(prefix, chain):
    state = newest(chain.pretrain)["model"]
    torch.save(dict(model={prefix + key: value for key, value in state.items()}), "wrapped.pt")
    args = finetune.get_args([*COMMON, "--init", "wrapped.pt"])
    network, _ = finetune.build(args, 10, checkpoint.load("wrapped.pt"))
    found = network.blocks[0].mlp.fc1.weight
    assert torch.equal(found, state["blocks.0.mlp.fc1.weight"])


# ------------------------------------------------------------------------------------------------
# 12. A golden checkpoint, two runs, Ctrl-C

def test_a_second_run_in_a_live_folder_is_refused():
    def hold():
        Stage().begin()
        Path("ready").touch()
        signal.pause()

    with forked(hold) as pid:
        wait_for(Path("ready").exists)
        expected = "--output run: a run that is still alive writes there"
        with pytest.raises(launch.InputError, match=expected):
            Stage().begin()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert Stage().begin() == 0                         # the control: the lock went with it


def test_a_disk_that_fills_between_checkpoints(chain, capsys, monkeypatch):
    def full(path, *rest):
        if str(path).endswith("log.jsonl") and Path("run/step-00000004.pt").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(path, *rest)

    monkeypatch.setattr(logbook, "open", full, raising=False)
    message = fails(capsys, "pretrain", *chain.inputs["pretrain"], "--output", "run")
    assert "run/log.jsonl: not written (No space left on device)" in message
    assert newest("run")["step"] == 4


def test_another_codebook_size_or_width_is_refused_in_one_line(chain, capsys):
    flags = [*chain.inputs["tokenizer"], "--output", "run"]
    run("tokenizer", *flags, "--steps", "1")
    message = fails(capsys, "tokenizer", *flags, "--codebook-size", "16", "--resume", "force")
    assert "--output run holds a run of another architecture" in message
    assert "[32" in message
    assert "[16" in message
    flags = ["--init", "none", "--output", "other"]
    run("finetune", *flags, "--steps", "1")
    message = fails(capsys, "finetune", *flags, "--model", "tiny", "--resume", "force")
    assert "holds a run of another architecture" in message


def test_ctrl_c_says_how_it_goes_on(chain):
    flags = [*chain.inputs["finetune"], "--output", "run"]
    with forked(faulty.main, "finetune", ["touch=step"], flags) as pid:
        wait_for(Path("touched").exists)
        os.kill(pid, signal.SIGINT)
        assert wait(pid) == 128 + signal.SIGINT
    assert "run/step-00000001.pt" in printed()
    assert "Traceback" not in printed()


def test_ctrl_c_in_a_pipe_to_tee(chain):
    """As on a terminal: Ctrl-C ends tee first, and what the run says finds no reader."""
    stage = [sys.executable, str(ROOT / "pretrain.py"), *COMMON, *chain.inputs["pretrain"],
             "--output", "run", "--steps", "1000000000", "--save-every", "1000000"]
    script = (f"trap : INT; {shlex.join(stage)} 2>&1 | tee output.txt >/dev/null; "
              "echo ${PIPESTATUS[@]} >status.txt")
    environment = os.environ | ENVIRONMENT
    pid, terminal = pty.fork()
    if pid == 0:
        for one in (signal.SIGINT, signal.SIGHUP):          # ignored where the tests run behind "&"
            signal.signal(one, signal.SIG_DFL)
        os.execvpe("bash", ["bash", "-c", script], environment)
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


def test_moved_inputs_are_the_same_run(chain):
    shutil.copytree(chain.pretrain, "run")
    shutil.copytree(chain.tokenizer, "moved")
    run("pretrain", "--tokenizer", "moved", "--output", "run")
    assert rows("run")[-1]["step"] == 6


def evaluations(folder):
    """Rows of a run's log without what it took."""
    found = [row for row in rows(folder) if "split" in row]
    return [{key: value for key, value in row.items() if key != "time"} for row in found]


def test_stopped_at_an_epochs_end_it_is_evaluated_when_it_goes_on(chain, monkeypatch):
    agree = Run.agree

    def interrupted(self):
        agree(self)
        if self.step == 3:
            self.signal = signal.SIGTERM

    flags = [*chain.inputs["finetune"], "--output", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "agree", interrupted)
        with pytest.raises(SystemExit):
            run("finetune", *flags)
    assert newest("run")["step"] == 4
    assert newest("run")["best"] is None
    assert evaluations("run") == []
    assert not Path("run/best.pt").exists()
    run("finetune", *flags)
    run("finetune", *chain.inputs["finetune"], "--output", "whole")
    assert evaluations("run") == evaluations("whole")
    assert [row["step"] for row in evaluations("run")] == [4, 6]
    for name in ("best.pt", "step-00000004.pt", "step-00000006.pt"):
        one, whole = checkpoint.load(f"run/{name}"), checkpoint.load(f"whole/{name}")
        assert weights(one) == weights(whole)
        assert one["best"] == whole["best"]


def test_killed_in_the_last_evaluation_it_is_evaluated_when_it_goes_on(chain, monkeypatch):
    def killed(self, step, **row):
        if step == 6:
            raise KeyboardInterrupt
        log_evaluation(self, step, **row)

    log_evaluation = Run.log_evaluation
    flags = [*chain.inputs["finetune"], "--output", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log_evaluation", killed)
        with pytest.raises(KeyboardInterrupt):
            run("finetune", *flags)
    assert newest("run")["step"] == 6
    assert [row["step"] for row in evaluations("run")] == [4]
    run("finetune", *flags)
    run("finetune", *chain.inputs["finetune"], "--output", "whole")
    assert evaluations("run") == evaluations("whole")
    one, whole = checkpoint.load("run/best.pt"), checkpoint.load("whole/best.pt")
    assert weights(one) == weights(whole)
    assert one["best"] == whole["best"]


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
