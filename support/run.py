"""The logbook of a run: its folder, checkpoints and log, and the check of each step.

A stage's loop calls it; it never calls back: forward, backward, optimizer and evaluation stand in
the stage. A run that was stopped goes on where it was: every random draw is seeded by (seed, epoch,
index) or (seed, step, rank), so there is no random state to keep.
"""
import errno
import fcntl
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support import checkpoint, launch
from support.checkpoint import free_space
from support.launch import InputError, rank, world_size

# Arguments that do not change the weights: a resumed run may have others.
MAY_CHANGE_ON_RESUME = {
    "output", "resume", "workers", "log_every", "save_every",
    "checkpoint_activations",
}
# Paths, and the argument that says what they hold: where that is the same, the path may be another.
CONTENTS = {"data": "images", "tokenizer": "tokenizer_digest", "perceptual": "perceptual_digest",
            "init": "init_digest"}


class Run:
    """A run in args.output: a new one, or the one that was stopped there.

    images: number of training images, of which an epoch is made. It becomes an argument.
    model_args: what is needed to build modules["model"] again, stored with it.
    modules: all that is trained, by name, unwrapped; the next stage reads "model".

    Attributes: start, steps: the first step and the number of steps of the run; epoch_steps: of an
    epoch. Raises InputError where the folder cannot be written, another run is writing there, or it
    holds a run with other arguments.
    """

    def __init__(self, args, images, optimizer, model_args, modules):
        self.args, self.optimizer = args, optimizer
        self.model_args, self.modules = model_args, modules
        self.epoch_steps, self.steps = launch.total_steps(args, images)
        args.images = images                                # a data set that has grown is refused
        self.start = self.step = 0
        self.best = None                                  # best evaluation so far, higher is better
        self.signal = 0                                     # number of a signal that any rank got
        self.caught = launch.catch_signals()               # … that this rank got
        self.not_finite = []                             # of this step's gradients, a bool a bucket
        self.terms = {}                                     # this step's values to log, by name
        self.sums, self.logged_steps, self.seconds = {}, 0, 0.0     # since the last line of the log
        self.clock = self.begun = time.time()

        self.folder = make_folder(args.output)
        if rank() == 0:
            lock(self.folder)
            for temporary in self.folder.glob("*.tmp"):    # of a run that was killed while it wrote
                temporary.unlink(missing_ok=True)
            cut_torn_line(self.folder / "log.jsonl")
        if checkpoint.files(self.folder):
            self.resume()
        self.same_on_all_ranks()
        if rank() == 0:
            for path in checkpoint.files(self.folder):     # damaged ones: not to be counted as kept
                if int(path.stem[5:]) > self.start:
                    path.rename(path.with_suffix(".damaged"))
        append(self.folder, args=vars(args), world_size=world_size(), hardware=launch.hardware(),
               torch=torch.__version__, step=self.start)
        if rank() == 0:
            self.announce()

    def announce(self):
        """What is about to be done, on the screen; log.jsonl has it among the arguments."""
        args = self.args
        classes = self.model_args.get("classes")
        labels = f"of {classes} classes" if classes else "labels not used"
        epochs = self.steps / self.epoch_steps
        precision = launch.precision(args, next(self.modules["model"].parameters()).device)
        begins = f"goes on from step {self.start}" if self.start else "new run"
        if self.start >= self.steps:
            again = ", evaluated again" if (self.folder / "best.pt").exists() else ""
            begins = f"finished already: nothing to train{again}"
        launch.say(f"{args.stage}.py reads {args.data}: {args.images} images, {labels}")
        launch.say(f"{self.steps} steps of {args.batch_size} images, {epochs:.4g} epochs, in "
                    f"{precision} on {launch.hardware()}, ranks: {world_size()}")
        launch.say(f"--output {self.folder}: {begins}")

    # ---- Going on

    def resume(self):
        """Go on from the newest sound checkpoint of the folder."""
        state = checkpoint.load(self.folder)
        self.compare_arguments(state["args"])
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            for group, then in zip(groups, state["optimizer"]["param_groups"], strict=True):
                if group["param_names"] != then["param_names"]:
                    raise ValueError("other parameters")    # moments load by position
                group["lr"] = then["lr"]                    # best.pt may be written before set_lr
            for name, module in self.modules.items():
                module.load_state_dict(state[name])
            # Its own settings: with --resume force the new weight decay counts.
            self.optimizer.load_state_dict(state["optimizer"] | dict(param_groups=groups))
        except checkpoint.UNFIT as error:                   # its last line: expected and found
            detail = str(error).splitlines()[-1].strip()
            raise InputError(f"--output {self.folder} holds a run of another architecture "
                             f"({detail}): choose another --output") from error
        self.start, self.best = state["step"], state["best"]

    def compare_arguments(self, then):
        now = vars(self.args)
        same = {path for path, contents in CONTENTS.items()
                if now.get(contents) and now[contents] == then.get(contents)}
        if Path(now["data"]).name != Path(then["data"]).name:       # cifar10, cifar100: as many
            same.discard("data")
        keys = sorted(now.keys() - MAY_CHANGE_ON_RESUME - same)
        changed = [key for key in keys if now.get(key) != then.get(key)]
        # Steps count batches: with another batch size step N would lie elsewhere.
        if changed and (self.args.resume != "force" or "batch_size" in changed):
            remedy = "choose another --output"
            if "batch_size" not in changed:
                remedy += ", or --resume force"
            listed = ", ".join(f"{key}: {then.get(key)!s:.80}, now {now.get(key)!s:.80}"
                               for key in changed)
            raise InputError(f"--output {self.folder} holds a run with other arguments ({listed}): "
                             f"{remedy}")

    def same_on_all_ranks(self):
        if not dist.is_initialized():
            return
        starts = [0] * world_size()
        dist.all_gather_object(starts, self.start)
        if len(set(starts)) > 1:
            raise InputError(
                f"--output {self.folder}: ranks found different checkpoints, of steps "
                f"{sorted(set(starts))}: it must lie on storage that all machines share")

    # ---- Before a step: what is due

    def progress(self):
        """start … steps, with a progress bar. At the last one nothing is left but to save."""
        hidden = None if rank() == 0 else True              # None: only where there is a terminal
        return tqdm(range(self.start, self.steps + 1), initial=self.start, total=self.steps,
                    disable=hidden)

    def due(self, step):
        """Whether an epoch of --save-every ended before this step, or the run, or a signal came."""
        self.step = step
        self.clock = time.time()
        ended = step > 0 and step % (self.epoch_steps * self.args.save_every) == 0
        return ended or step == self.steps or self.signal > 0

    def save(self, step):
        """Write step-N.pt and keep the last two. After a signal the process ends here."""
        if step > self.start:                               # else it is the one that was resumed
            self.write(f"step-{step:08d}.pt", step)
            if rank() == 0:
                for old in checkpoint.files(self.folder)[2:]:
                    old.unlink()
        if self.signal and step < self.steps:
            if dist.is_initialized():
                dist.barrier()                              # the file is whole before any rank ends
            if rank() == 0:
                launch.warn(f"stopped at step {step} of {self.steps}: the same command goes on "
                             f"from {checkpoint.files(self.folder)[0]}")
            sys.exit(128 + self.signal)
        self.clock = time.time()

    def keep_best(self, step, metric):
        """Write best.pt where an evaluation, higher is better, exceeds all before it."""
        if not math.isnan(metric) and (self.best is None or metric > self.best):
            self.best = metric
            self.write("best.pt", step)
        self.clock = time.time()

    def write(self, name, step):
        if rank() > 0:
            return
        state = dict(
            stage=self.args.stage,
            step=step,
            epoch=step // self.epoch_steps,
            best=self.best,
            args=vars(self.args),
            model_args=self.model_args,
            optimizer=self.optimizer.state_dict(),
        )
        for key, module in self.modules.items():
            state[key] = module.state_dict()
        checkpoint.write(self.folder / name, state)

    # ---- In a step

    def distribute(self, module):
        """DDP under torchrun, else the module itself.

        Buffers are left alone: model.Quantizer keeps its codes the same on all ranks itself.
        """
        if not dist.is_initialized():
            return module
        device = next(module.parameters()).device
        network = DistributedDataParallel(
            module, device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)
        network.register_comm_hook(self.not_finite, average)
        return network

    def seed(self, step):
        """Seed what is drawn on the device: drop path, dropout, mixup."""
        torch.manual_seed(launch.derive_seed(self.args.seed, step, rank()))

    def accumulate(self, micro_batches, *networks):
        """The micro-batches of a step; DDP all-reduces the gradients at the last one."""
        for i, micro_batch in enumerate(micro_batches, 1):
            for network in networks:
                network.require_backward_grad_sync = i == len(micro_batches)
            yield micro_batch

    def add(self, **terms):
        """Note values of this step: of each micro-batch, or once. They are averaged."""
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value.detach().float())

    def check_finite(self, samples):
        """Compare notes with the other ranks, before any weight moves: one small all-reduce.

        samples(step, rank): indices of a rank's images, for the message. Raises FloatingPointError
        on all ranks where a value is not finite on any.
        """
        values = {name: torch.stack(added).mean() for name, added in self.terms.items()}
        device = next(iter(values.values())).device
        signal = torch.tensor(float(self.caught[0]) if self.caught else 0.0, device=device)
        bucket = torch.zeros((), device=device)
        if self.not_finite:
            bucket = torch.stack(self.not_finite).any().float()
        table = torch.zeros(world_size(), 2 + len(values), device=device)       # a row a rank
        table[rank()] = torch.stack([signal, bucket, *values.values()])
        self.not_finite.clear()
        self.terms = {}
        if dist.is_initialized():
            dist.all_reduce(table)
        signals, buckets, *columns = table.T.tolist()
        self.signal = int(max(signals))
        self.means = {}
        for name, column in zip(values, columns, strict=True):
            self.means[name] = sum(column) / len(column)
            ranks = [r for r, value in enumerate(column) if not math.isfinite(value)]
            if len(ranks) == world_size() and any(buckets):     # all have it from these
                ranks = [r for r, bad in enumerate(buckets) if bad]
            if ranks:
                self.fail(name, ranks, samples)

    def fail(self, name, ranks, samples):
        where = []
        for r in ranks:
            images = samples(self.step, r)
            listed = ", ".join(map(str, images[:8]))
            more = f" and {len(images) - 8} more" if len(images) > 8 else ""
            where.append(f"rank {r} (images {listed}{more})")
        remedy = "what was saved is intact: try a lower --lr or --amp fp32"
        if self.step == self.start == 0:                    # no step has moved the weights yet
            remedy = ("at the first step the cause is the input: look at --data, at the "
                      "checkpoints that are read, at the other flags")
        raise FloatingPointError(f"{name} not finite at step {self.step} on {', '.join(where)}; "
                                 f"stopped before the update, {remedy}")

    # ---- After a step

    def log(self, step, **more):
        """End a step; every --log-every steps, and at the end, the averages since the last line."""
        self.seconds += time.time() - self.clock
        self.logged_steps += 1
        for name, value in self.means.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if step % self.args.log_every and step < self.steps:
            return
        row = {name: total / self.logged_steps for name, total in self.sums.items()}
        images = self.logged_steps * self.args.batch_size
        to_go = (time.time() - self.begun) * (self.steps - step) / (step - self.start)     # seconds
        append(self.folder, dict(step=f"{step}/{self.steps}", eta=timedelta(seconds=round(to_go))),
               step=step, epoch=step / self.epoch_steps, **row, **more,
               images_per_s=images / self.seconds)
        self.sums, self.logged_steps, self.seconds = {}, 0, 0.0

    def log_evaluation(self, step, **row):
        append(self.folder, step=step, epoch=step / self.epoch_steps, **row)
        self.clock = time.time()


def average(not_finite, bucket):
    """DDP's own all-reduce, after a look at this rank's gradients: a mean hides whose is bad."""
    not_finite.append(~bucket.buffer().isfinite().all())
    return allreduce_hook(None, bucket)


# ------------------------------------------------------------------------------------------------
# A run's folder

def make_folder(output):
    """Make the folder, and see that it can be written. Raises InputError."""
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"write-{rank()}.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)                       # rank 0 may have cleared it away
        with open(folder / "log.jsonl", "a"):
            return folder
    except OSError as error:
        raise InputError(f"--output {folder}: not writable ({error.strerror}); choose another") \
            from error


def lock(folder):
    """Refuse a folder that another live process has locked. The lock ends with this process."""
    try:
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)  # not closed: that would release it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            launch.warn(f"{folder}: not locked against a second run ({error.strerror})")
            return
        raise InputError(f"--output {folder}: a run that is still alive writes there; stop it "
                         "(ranks may outlive their torchrun) or choose another") from error


def cut_torn_line(file):
    """Cut off the last line of a log where it is not whole: a full disk or a power failure."""
    log = file.read_bytes()
    whole = log.rfind(b"\n") + 1
    if whole < len(log):
        os.truncate(file, whole)


def append(folder, printed=None, /, **row):
    """Append a line to a run's log.jsonl and print it, with what is only printed, on rank 0."""
    if rank() > 0:
        return
    file = Path(folder) / "log.jsonl"
    try:
        with open(file, "a") as log:
            log.write(json.dumps(dict(row, time=round(time.time(), 1))) + "\n")
    except OSError as error:
        raise InputError(
            f"{file}: not written ({error.strerror}), {free_space(folder)} free there"
            f"{checkpoint.intact(folder)}: make room and run the same command again") from error
    if "args" not in row:
        shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                 for key, value in (row | (printed or {})).items())
        with tqdm.external_write_mode():                    # the progress bar makes room
            launch.say("  ".join(shown))


def report(args, row, **context):
    """Log an evaluation without training, and return it."""
    append(make_folder(args.output), **context, **row)
    return row
