"""A run: its folder, checkpoints and log, and what the ranks tell each other in each step.

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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from support import checkpoint, launch
from support.launch import InputError, rank, world_size

# Arguments that do not change the weights: a resumed run may have others.
FREE = {"output", "resume", "workers", "log_every", "save_every", "checkpoint_activations"}


class Run:
    """A run in args.output: a new one, or the one that was stopped there.

    model_args: what is needed to build modules["model"] again, stored with it.
    modules: all that is trained, by name, unwrapped; the next stage reads "model".
    identity: what the inputs are, beside args: images, the number of training images, of which an
    epoch is made; digests of networks, under the name of the flag whose path they lie at: a path
    may change if the digest does not. A run is resumed only if args and identity are the same.

    Attributes: start, steps: the first step and the number of steps of the run; epoch_steps: of an
    epoch.
    """

    def __init__(self, args, optimizer, model_args, modules, identity):
        self.args, self.optimizer = args, optimizer
        self.model_args, self.modules = model_args, modules
        self.identity = dict(data=Path(args.data).name) | identity     # the dataset may have moved
        self.epoch_steps, self.steps = launch.total_steps(args, identity["images"])
        self.start = self.step = 0
        self.best = None                                    # best evaluation, higher is better
        self.signal = 0                                     # number of a signal that any rank got
        self.caught = launch.catch_signals()                # … that this rank got
        self.terms = {}                                     # this step's values to log, by name
        self.sums, self.logged_steps, self.seconds = {}, 0, 0.0     # since the last line of the log
        self.clock = time.time()

        self.folder = make_folder(args.output)
        if rank() == 0:
            lock(self.folder)
            for temporary in self.folder.glob("*.tmp"):    # of a run that was killed in a save
                temporary.unlink(missing_ok=True)
        if checkpoint.files(self.folder):
            self.resume()
        self.refuse_other_starts()
        hardware = launch.hardware()
        append(self.folder, args=vars(args), identity=self.identity, world_size=world_size(),
               hardware=hardware, torch=torch.__version__, step=self.start)
        self.board = tensorboard(self.folder, self.start) if rank() == 0 else None
        if rank() == 0:
            begins = f"goes on from step {self.start}" if self.start else "new run"
            if self.start >= self.steps:
                begins = "finished already"
            precision = launch.precision(args, next(modules["model"].parameters()).device)
            launch.say(f"{self.folder}: {begins}; {self.steps} steps of {args.batch_size} images, "
                       f"{self.steps / self.epoch_steps:.4g} epochs, in {precision} on {hardware}")

    # ---- Going on

    def resume(self):
        """Go on from the newest sound checkpoint of the folder.

        Weights, moments and lr are the file's; the optimizer's other settings are the command
        line's, so that with --resume force a new weight decay counts.
        """
        state = checkpoint.load(self.folder)
        self.compare_arguments(state)
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            for group, then in zip(groups, state["optimizer"]["param_groups"], strict=True):
                if group["param_names"] != then["param_names"]:     # moments load by position
                    raise ValueError("other parameters")
                group["lr"] = then["lr"]
            for name, module in self.modules.items():
                module.load_state_dict(state[name])
            self.optimizer.load_state_dict(state["optimizer"] | dict(param_groups=groups))
        except checkpoint.UNFIT as error:                   # its last line: expected and found
            detail = str(error).splitlines()[-1].strip()
            raise InputError(f"--output {self.folder} holds a run of another architecture "
                             f"({detail}): choose another --output") from error
        self.start, self.best = state["step"], state["best"]

    def compare_arguments(self, state):
        now = vars(self.args) | self.identity
        then = state["args"] | state.get("identity", {})    # older checkpoints have no identity
        changed = sorted({key for key in now | then if now.get(key) != then.get(key)} - FREE)
        listed = ", ".join(f"{key}: {then.get(key)!s:.80}, now {now.get(key)!s:.80}"
                           for key in changed)
        message = f"--output {self.folder} holds a run with other arguments ({listed}): "
        if "batch_size" in changed:                         # steps count batches
            raise InputError(message + "choose another --output")
        if changed and self.args.resume != "force":
            raise InputError(message + "choose another --output, or --resume force")

    def refuse_other_starts(self):
        starts = set(launch.gather(self.start))
        if len(starts) > 1:
            raise InputError(
                f"--output {self.folder}: ranks found different checkpoints, of steps "
                f"{sorted(starts)}: it must lie on storage that all machines share")

    # ---- Before a step: what is due

    def progress(self):
        """start … steps, with a progress bar. At the last one nothing is left but to save."""
        hidden = None if rank() == 0 else True              # None: only where there is a terminal
        try:
            yield from tqdm(range(self.start, self.steps + 1), initial=self.start,
                            total=self.steps, disable=hidden)
        finally:
            if self.board:
                self.board.close()

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
            self.best = float(metric)                       # of NumPy's, maybe
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
            identity=self.identity,
            model_args=self.model_args,
            optimizer=self.optimizer.state_dict(),
        )
        for key, module in self.modules.items():
            state[key] = module.state_dict()
        checkpoint.write(self.folder / name, state)

    # ---- In a step

    def seed(self, step):
        """Seed what is drawn on the device: drop path, dropout, mixup."""
        torch.manual_seed(launch.derive_seed(self.args.seed, step, rank()))

    def micro_batches(self, batch, *networks):
        """The micro-batches of a step; DDP all-reduces the gradients at the last one."""
        for i, micro_batch in enumerate(batch, 1):
            for network in networks:
                network.require_backward_grad_sync = i == len(batch)
            yield micro_batch

    def add(self, **terms):
        """Note values of this step: of each micro-batch, or once. They are averaged."""
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value.detach().float())

    def agree(self):
        """One small all-reduce a step: means for the log, any rank's signal; stops all on a NaN.

        Called before any weight moves. FloatingPointError on all ranks where a value is not finite
        on any. A gradient is: DDP has averaged it, so its rank is not known.
        """
        own = {name: torch.stack(values).mean() for name, values in self.terms.items()}
        signal = next(iter(own.values())).new_tensor(self.caught[0] if self.caught else 0)
        table = signal.new_zeros(world_size(), 1 + len(own))        # a row a rank
        table[rank()] = torch.stack([signal, *own.values()])
        if dist.is_initialized():
            dist.all_reduce(table)
        signals, *columns = table.T.tolist()
        self.signal = int(max(signals))
        self.means, self.terms = {}, {}
        for name, column in zip(own, columns, strict=True):
            self.means[name] = sum(column) / len(column)
            if not math.isfinite(self.means[name]):
                ranks = [r for r, value in enumerate(column) if not math.isfinite(value)]
                remedy = "try a lower --lr or --amp fp32" if self.step else "look at --data, --init"
                raise FloatingPointError(
                    f"{name} not finite at step {self.step} on ranks {ranks}; stopped before the "
                    f"update, what was saved is intact: {remedy}")

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
        row |= more | dict(images_per_s=images / self.seconds)
        append(self.folder, step=step, epoch=step / self.epoch_steps, **row)
        self.show("train", step, row)
        self.sums, self.logged_steps, self.seconds = {}, 0, 0.0

    def log_evaluation(self, step, split, **row):
        """Log an evaluation; TensorBoard also gets the pictures that it left in the folder."""
        append(self.folder, step=step, epoch=step / self.epoch_steps, split=split, **row)
        self.show(split, step, row)
        if self.board:
            for path in sorted(self.folder.glob("*.png")):
                pixels = np.asarray(Image.open(path).convert("RGB"))
                self.board.add_image(path.stem, pixels, step, dataformats="HWC")
        self.clock = time.time()

    def show(self, split, step, row):
        """Give a row to TensorBoard: train/loss, val/top1, …"""
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(f"{split}/{name}", value, step)


def tensorboard(folder, step):
    """TensorBoard's writer, for a run that has done so many steps; None if not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:                                     # optional: requirements-extra.txt
        return None
    # purge_step: what a run that was killed wrote after its checkpoint is not shown.
    return SummaryWriter(folder.resolve(), purge_step=step + 1)


# ------------------------------------------------------------------------------------------------
# A run's folder

def make_folder(output):
    """Make the folder, and see that it can be written."""
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


def append(folder, **row):
    """Append a line to a run's log.jsonl and print it, on rank 0."""
    if rank() > 0:
        return
    file = Path(folder) / "log.jsonl"
    try:
        with open(file, "a") as log:
            log.write(json.dumps(dict(row, time=round(time.time(), 1))) + "\n")
    except OSError as error:
        raise InputError(f"{file}: not written ({error.strerror}){checkpoint.intact(folder)}: "
                         "make room and run the same command again") from error
    if "args" not in row:
        shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                 for key, value in row.items())
        with tqdm.external_write_mode():                    # the progress bar makes room
            launch.say("  ".join(shown))


def report(args, row, **context):
    """Log an evaluation without training, and return it."""
    append(make_folder(args.output), **context, **row)
    return row
