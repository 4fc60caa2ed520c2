"""What the paper does not speak of: start, end, ranks, precision, seeds, schedule."""
import contextlib
import functools
import hashlib
import math
import multiprocessing
import os
import re
import signal
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# A rank that hangs ends the job after this time. NCCL's default, here for gloo too.
TIMEOUT = timedelta(minutes=10)

# How PyTorch words it when a loader's worker is killed, or /dev/shm or the file handles run out.
WORKERS_FAILED = re.compile(
    r"DataLoader worker \(pid|</torch_|Too many open files|ancdata|Pin memory thread|"
    "Cannot allocate memory")

# What asks a run to end: kill and torchrun, Ctrl-C, a terminal that closes, Slurm's warning.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class InputError(ValueError):
    """Bad input. Its message is one line that names the culprit and the remedy.

    Whatever reads what a user has named may raise it.
    """


# ------------------------------------------------------------------------------------------------
# Starting and ending

def start(main, args):
    """Run a stage's main(args), under torchrun in a process group.

    What a user can mend ends with one line and a status of its own on every rank: 2 for bad input,
    3 for a loss or gradient that is not finite, 130 for a Ctrl-C that writes no checkpoint.
    """
    try:
        if "RANK" in os.environ:
            lacking = sorted({"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ))
            if lacking:                                     # RANK alone is not torchrun's
                raise InputError(f"the environment has RANK but not {', '.join(lacking)}: unset "
                                 "RANK, or start with torchrun")
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=TIMEOUT)
        micro_batch(args)                                # refused now, not after minutes of loading
        cleans_up(main)(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except InputError as error:
        # A loader's worker wraps the message in a traceback: only the message counts.
        message, status = str(error).rpartition("InputError: ")[2].strip(), 2
    except FloatingPointError as error:
        message, status = error, 3
    except (OSError, RuntimeError) as error:
        if not WORKERS_FAILED.search(str(error)):
            raise
        reason = str(error).strip().splitlines()[-1]
        message, status = (
            f"the loader's workers failed ({reason}): memory, /dev/shm or file handles ran out; "
            "take fewer --workers (--workers 0: none), in Docker a larger --shm-size, or a higher "
            "ulimit -n"), 2
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from the last checkpoint, if any"
        status = 128 + signal.SIGINT
    else:
        return
    warn(f"{args.stage}.py: {message}")
    sys.exit(status)


def cleans_up(main):
    """Decorates a stage's main(args): whatever ends it, its loaders' workers end with it.

    The signal handlers are put back too, as main may be called from a notebook.
    """
    @functools.wraps(main)
    def clean(args):
        for name, value in vars(args).items():              # a notebook's: a checkpoint holds none
            if isinstance(value, os.PathLike):
                setattr(args, name, os.fspath(value))
            elif isinstance(value, np.generic):
                setattr(args, name, value.item())
        workers_before = multiprocessing.active_children()
        handlers = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGCHLD)}
        try:
            return main(args)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            # They ignore SIGTERM: after an error the process would wait for them.
            for worker in multiprocessing.active_children():
                if worker not in workers_before:
                    worker.kill()
                    worker.join()
    return clean


def launch_tool(name, main):
    """Run a tool's main(). Bad input, or a place that cannot be written, ends with one line."""
    try:
        main()
    except (InputError, OSError) as error:
        warn(f"tools.{name}: {error}")
        sys.exit(2)


@contextlib.contextmanager
def as_input_error():
    """Around what builds a network from flags: a ValueError of model.py is the user's to mend."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


@contextlib.contextmanager
def first_of_machine():
    """Around a download: the first rank of a machine makes it, then the others find the files."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if dist.is_initialized() and not first:
        dist.barrier()
    yield
    if dist.is_initialized() and first:
        dist.barrier()


def one_process(tool):
    """Refuse torchrun for a tool that does not share its work out."""
    if world_size() > 1:
        raise InputError(f"this counts on one process: python -m tools.{tool}")


def say(text, stream="stdout"):
    """Print a line. Never ends a run: the reader of a pipe may be gone, or a disk full."""
    try:
        print(text, file=getattr(sys, stream), flush=True)
    except (OSError, ValueError):
        setattr(sys, stream, open(os.devnull, "w"))         # nothing more is flushed there


def warn(text):
    """The same, to stderr."""
    say(text, "stderr")


def catch_signals():
    """A list that collects the numbers of SIGNALS. A second SIGINT ends it all."""
    caught = []

    def catch(number, frame):
        if number == signal.SIGINT and signal.SIGINT in caught:
            raise KeyboardInterrupt
        caught.append(number)
        if rank() == 0:
            with contextlib.suppress(OSError):              # the reader of a pipe may be gone
                os.write(2, b"a checkpoint is written after this step or evaluation; "
                            b"Ctrl-C again ends at once\n")    # print may be what it interrupts

    for number in SIGNALS:
        # nohup has SIGHUP ignored: so it stays. (A script's "&" has SIGINT ignored, but kill -INT
        # may still ask for the checkpoint.)
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, catch)
    return caught


# ------------------------------------------------------------------------------------------------
# Ranks and hardware

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def device():
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def ddp(module):
    """DDP under torchrun, else the module itself.

    Buffers are left alone: model.Quantizer keeps its codes the same on all ranks itself.
    """
    if not dist.is_initialized():
        return module
    device = next(module.parameters()).device
    gpu = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(module, device_ids=gpu)
    wrapped.broadcast_buffers = False           # as an argument it is deprecated since PyTorch 2.14
    return wrapped


def sync_batch_norm(model, device):
    """Batch norm over the images of all GPUs; on a CPU PyTorch has none: each rank has its own."""
    if device.type == "cuda" and dist.is_initialized():
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def broadcast_buffers(model):
    """Give all ranks the first one's batch norm statistics, which its checkpoint stores."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def hardware():
    """What a log's figures were taken on."""
    if torch.cuda.is_available():
        return f"{world_size()} × {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")                            # Linux has it
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} CPU cores ({names[0] if names else 'model unknown'})"


def precision(args, device):
    """Of the forward passes, by --amp: "bf16" or "fp32"."""
    if args.amp != "auto":
        return args.amp
    gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if gpu else "fp32"


def autocast(args, device):
    """The context of the forward passes: bf16 autocast by --amp, else nothing."""
    enabled = precision(args, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


# ------------------------------------------------------------------------------------------------
# Steps, seeds, schedules

def micro_batch(args):
    """Images of a micro-batch on one rank."""
    parts = world_size() * args.accumulate
    if args.batch_size % parts:
        raise InputError(
            f"--batch-size {args.batch_size} does not divide into {world_size()} ranks × "
            f"{args.accumulate} micro-batches: try {max(args.batch_size // parts, 1) * parts}")
    return args.batch_size // parts


def total_steps(args, images):
    """Steps of an epoch and of the run over so many images; an incomplete batch is dropped."""
    if images < args.batch_size:
        raise InputError(
            f"--batch-size {args.batch_size} is more than the {images} training images")
    epoch_steps = images // args.batch_size
    steps = args.steps or args.epochs * epoch_steps
    lengths = dict(warmup_epochs=args.epochs, warmup_steps=steps)
    for name, length in lengths.items():
        warmup = getattr(args, name, None) or 0
        if not args.steps and warmup > length:              # --steps may cut a run short in it
            raise InputError(f"--{name.replace('_', '-')} {warmup:g} is longer than the run: take "
                             f"{length} or less, or train longer")
    return epoch_steps, steps


def derive_seed(*numbers):
    """A 63-bit seed from numbers, unlike that of any others."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def cosine(step, total, warmup, peak, final=0.0):
    """Linear warm-up to `peak` over `warmup` steps (may be fractional), then half a cosine down."""
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    progress = (step - warmup) / max(total - warmup, 1)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer, lr):
    """lr for every group, times the group's own "lr_scale" (model.param_groups: layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def gather(own):
    """A list of every rank's `own`, of plain data, on all ranks: they go on alike."""
    parts = [own] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(parts, own)
    return parts
