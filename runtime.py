"""What every stage needs and the paper does not speak of: arguments, process group, schedule, one check a
step, checkpoints, log. Knows nothing of models or data."""
import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

FREE = {"output", "resume", "workers", "log_every", "save_every", "skip_bad_images", "pictures", "tensorboard", "dry_run",
        "checkpoint_activations"}  # do not change the weights
MEMORY = "out of memory", "can't allocate memory", "ALLOC_FAILED"  # CUDA, the CPU's allocator, cuBLAS
UNSOUND = []                                               # of this rank's gradients in a step: whether a bucket has NaN or ∞
WRITERS = {}                                               # of event files, by folder
TIMEOUT = timedelta(minutes=10)                            # for a rank that hangs: NCCL's default, for gloo too


class InputError(ValueError):
    """Bad input: one line that names the culprit and the remedy; the process exits with status 2."""

    def __str__(self):                                     # a loader's worker wraps it in a traceback
        return super().__str__().rpartition("InputError: ")[2].strip()


def launch(main, args):
    """Run a stage's main(args), under torchrun in a process group. Bad input ends it with one line and status 2, a
    loss or gradient that is not finite with one line and status 3, on every rank; too little memory with status 4."""
    try:
        if "RANK" in os.environ:                           # set by torchrun
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
        if args.dry_run is not None:
            main = importlib.import_module("tools.plan").main
        main(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (InputError, FloatingPointError) as error:
        print(f"{args.stage}.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 3)
    except (RuntimeError, MemoryError) as error:           # only some have a class of their own
        why = (str(error) or type(error).__name__).splitlines()[0]
        if not isinstance(error, MemoryError) and not any(text in why for text in MEMORY):
            raise
        lower = ["take --checkpoint-activations"] * hasattr(args, "checkpoint_activations") + ["raise --accumulate with --resume force"]
        print(f"{args.stage}.py: out of memory ({why}); the last checkpoint is intact: {', or '.join(lower)}", file=sys.stderr)
        sys.exit(4)
    finally:                                               # a loader's workers ignore SIGTERM: an error would wait for them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()


def parser(doc, stage, data="synthetic[:IMAGES], cifar10, cifar100, or a folder with train/ and val/ (ImageFolder)"):
    """A parser with the flags that all stages share, in groups (p.data, p.model, …) by what one decides; their defaults
    come from the recipe. data: what --data may be."""
    p = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    for name in ("data", "model", "schedule", "hardware", "output"):
        setattr(p, name, p.add_argument_group(name))
    p.set_defaults(stage=stage, augment="image")
    p.add_argument("--recipe", default="paper", help="bundle of defaults, from RECIPES at the top of the script")
    p.data.add_argument("--data", help=data)
    p.output.add_argument("--output", default=f"runs/RECIPE/{stage}", help="folder of checkpoints and log")
    p.data.add_argument("--image-size", type=int, help="pixels")
    p.schedule.add_argument("--batch-size", type=int, help="images of a step, over all ranks and accumulation steps")
    if stage not in ("segment", "detect"):
        p.data.add_argument("--augment", choices=["image", "batch"], default="image", help="image: each in a loader's worker, by "
                       "torchvision; batch: whole batches where the model is, a worker only decodes and crops")
    p.data.add_argument("--skip-bad-images", type=int, default=0, help="so many training images that cannot be read are replaced by others, on "
                   "each rank; one more ends the run")
    p.schedule.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step on each rank")
    p.schedule.add_argument("--epochs", type=int, help="passes over the training set")
    p.schedule.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    p.schedule.add_argument("--lr", type=float, help="peak, at the recipe's batch size; scaled in proportion to --batch-size")
    p.schedule.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and masks")
    p.hardware.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 2) - 1), help="loader processes of a rank")
    p.hardware.add_argument("--amp", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    p.hardware.add_argument("--dry-run", type=float, nargs="?", const=1000.0, metavar="IMAGES/S", help="only say what the run will "
                            "cost: weights, FLOPs, memory, steps, and hours at that rate")
    p.hardware.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.output.add_argument("--save-every", type=int, default=1, help="epochs between checkpoints, and evaluations")
    p.output.add_argument("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
    p.output.add_argument("--tensorboard", action="store_true", help="also write what is logged as event files (pip install tensorboard)")
    p.output.add_argument("--resume", choices=["auto", "force"], default="auto",
                   help="a run found in --output goes on; force: even with other arguments")
    return p


def parse(p, recipes, argv=None):
    """Arguments over the recipe's defaults; args.lr is scaled by batch / the recipe's batch, RECIPE replaced."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", default="paper")
    name = first.parse_known_args(argv)[0].recipe
    if name not in recipes:
        p.error(f"--recipe {name}: choose from {', '.join(recipes)}")
    p.set_defaults(**recipes[name])
    for action in p._actions:                              # --help: the default, of each recipe where they say
        shown = {key: recipe[action.dest] for key, recipe in recipes.items() if action.dest in recipe}
        if shown or action.default is not None and action.default is not False and action.default != argparse.SUPPRESS:
            default = "; ".join(f"{key}: {value}" for key, value in shown.items()) or action.default
            action.help = f"{action.help or ''} [{default}]".strip().replace("%", "%%")
    args = p.parse_args(argv)
    args.lr *= args.batch_size / recipes[name]["batch_size"]
    if args.epochs and "steps" in recipes[name]:           # --epochs over a recipe in steps
        if args.steps != recipes[name]["steps"]:
            p.error("--epochs and --steps: one of them")
        args.steps = None
    for key, value in vars(args).items():
        if isinstance(value, str):
            setattr(args, key, value.replace("RECIPE", name))
    return args


# ---- Ranks and hardware

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def device():
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def hardware():
    """What a log's figures were taken on."""
    if torch.cuda.is_available():
        return f"{world_size()} × {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return f"{os.cpu_count()} CPU cores ({names[0] if names else 'model unknown'})"


def autocast(args, device):
    """bf16 autocast where asked for, or (auto) where the hardware has it; fp32 otherwise."""
    info = Path("/proc/cpuinfo")                           # Linux: AVX512-BF16 or AMX on x86, bf16 on Arm
    native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
              info.exists() and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(info.read_text().split()))
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16" or (args.amp == "auto" and native))


def distribute(module, device):
    """DDP in a process group, else the module itself. Buffers are left alone: model.Quantizer keeps its own alike."""
    if not dist.is_initialized():
        return module
    network = DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None,
                                      broadcast_buffers=False, gradient_as_bucket_view=True)
    network.register_comm_hook(None, average)
    return network


def average(group, bucket):
    """DDP's own all-reduce, after a look at this rank's gradients: an average does not tell whose was not finite."""
    UNSOUND.append(~bucket.buffer().isfinite().all())
    return allreduce_hook(group, bucket)


# ---- Steps

def micro_batch(args):
    """Images of a micro-batch on one rank."""
    parts = world_size() * args.accumulate
    if args.batch_size % parts:
        raise InputError(f"--batch-size {args.batch_size} does not divide into {world_size()} ranks × {args.accumulate} "
                         f"accumulation steps: try {max(args.batch_size // parts, 1) * parts}")
    return args.batch_size // parts


def total_steps(args, images):
    """Steps (of an epoch, of the run) over `images` training images; an epoch drops its last partial batch."""
    if images < args.batch_size:
        raise InputError(f"--batch-size {args.batch_size} is more than the {images} training images")
    return images // args.batch_size, args.steps or args.epochs * (images // args.batch_size)


def derive_seed(*numbers):
    """A 63-bit seed from numbers, unlike that of any others."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def cosine(step, total, warmup, peak):
    """Linear warm-up over `warmup` steps to `peak`, then half a cosine down to 0."""
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)        # warmup may be fractional
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def catch_signals():
    """A list that the numbers of SIGTERM and SIGINT are appended to, for check_step to look at. A second SIGINT ends it all."""
    caught = []

    def catch(number, frame):
        if signal.SIGINT in caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)
        if rank() == 0:                                    # not by print: the signal may have come within one
            os.write(2, b"a checkpoint is written when this step is done, or this evaluation; Ctrl-C again ends at once\n")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, catch)
    return caught


def check_step(step, terms, caught, device, samples):
    """One small all-reduce a step, before anything moves: (terms averaged over ranks, a signal any rank got or 0).

    terms: this rank's loss, gradient norm and what else is logged, by name; samples(step, rank): indices of the images
    that a rank saw. Raises FloatingPointError on all ranks where a term is not finite on any.
    """
    table = torch.zeros(world_size(), len(terms) + 2, device=device)  # a row a rank
    unsound = torch.stack(UNSOUND).any().float() if UNSOUND else torch.zeros((), device=device)
    table[rank()] = torch.stack([torch.as_tensor(float(caught[0]) if caught else 0.0, device=device), unsound,
                                 *(term.detach().float() for term in terms.values())])
    UNSOUND.clear()
    if dist.is_initialized():
        dist.all_reduce(table)
    signals, unsound, *columns = table.T.tolist()
    for name, values in zip(terms, columns):
        ranks = [r for r, value in enumerate(values) if not math.isfinite(value)]
        if len(ranks) == world_size() and any(unsound):    # averaged: all have it from these
            ranks = [r for r, value in enumerate(unsound) if value]
        bad = [f"rank {r} (images {', '.join(map(str, samples(step, r)))})" for r in ranks]
        if bad:
            raise FloatingPointError(f"{name} not finite at step {step} on {', '.join(bad)}; stopped before the update, "
                                     "the last checkpoint is intact: try a lower --lr or --amp fp32")
    return {name: sum(values) / len(values) for name, values in zip(terms, columns)}, int(max(signals))


# ---- Checkpoints: one file of plain data and tensors, with a digest of it all

def digest(value):
    """SHA-256 over nested dicts, lists, tensors and plain values, in their order."""
    sha = hashlib.sha256()
    if isinstance(value, torch.Tensor):
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    else:
        nested = isinstance(value, (dict, list, tuple))
        items = value.items() if isinstance(value, dict) else value
        sha.update(repr([digest(item) for item in items] if nested else value).encode())
    return sha.hexdigest()


def checkpoint(args, step, steps, epoch_steps, stopped, modules, optimizer, model_args, evaluate=None, best=None):
    """At the end of an epoch that is due (--save-every), of the run, or on a signal: write step-N.pt in args.output.

    The last two are kept, and best.pt where evaluate(), higher is better, exceeds `best`; returns the new
    best. modules: {"model": …, and what else is trained}, unwrapped. There is no random state: every draw of a run is
    seeded by (seed, epoch, index) or (seed, step, rank). Raises InputError where it cannot be written; exits with
    status 128 + signal after a signal's checkpoint.
    """
    due = step == steps or step % (epoch_steps * args.save_every) == 0
    if not due and not stopped:
        return best

    def save(name, evaluated):
        if rank() == 0:
            state = dict(stage=args.stage, step=step, epoch=step // epoch_steps, best=best, evaluated=evaluated, args=vars(args),
                         model_args=model_args, optimizer=optimizer.state_dict(), **{key: module.state_dict() for key, module in modules.items()})
            state["digest"] = digest(state)
            write_atomically(Path(args.output, name), state)

    name, evaluate = f"step-{step:08d}.pt", evaluate if due else None
    save(name, evaluated=evaluate is None)                 # before the evaluation: in its minutes a signal may become a kill
    if rank() == 0:
        for old in sorted(Path(args.output).glob("step-*.pt"))[:-2]:
            old.unlink()
    if stopped and step < steps:
        if dist.is_initialized():
            dist.barrier()                                 # the file is whole before any rank ends
        if rank() == 0:
            print(f"stopped at step {step} of {steps}: the same command goes on from {Path(args.output, name)}", file=sys.stderr)
        sys.exit(128 + stopped)
    if evaluate:
        metric = evaluate()
        if not math.isnan(metric) and (best is None or metric > best):
            best = metric
            save("best.pt", evaluated=True)
        save(name, evaluated=True)
    return best


def write_atomically(path, state):
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)                                   # the renaming itself
        os.close(folder)
    except (OSError, RuntimeError) as error:               # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path}: not written ({error}), {shutil.disk_usage(path.parent).free / 2 ** 20:.0f} MiB free there; "
                         "the one before is intact: make room and run the same command again") from error


def load_checkpoint(path, stages=None):
    """The checkpoint in a file, or the newest sound one of a folder, on the CPU. Raises InputError.

    stages: those it may be of; None: any, and files of other projects too, which have no "stage".
    """
    path = Path(path)
    files = sorted(path.glob("step-*.pt"), reverse=True) if path.is_dir() else [path]
    wanted = f"expected one of {' or '.join(stages)}" if stages else "expected a checkpoint"
    if not files or not files[0].exists():
        raise InputError(f"{path}: nothing there, {wanted}")
    for file in files:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}")
            ours = "digest" in state
            if ours and state["digest"] != digest({k: v for k, v in state.items() if k != "digest"}):
                raise ValueError("its digest differs")
        except Exception as error:                         # torch.load raises all kinds on a damaged or hostile file
            print(f"{file}: not loaded: {(str(error) or type(error).__name__).splitlines()[0]}", file=sys.stderr)
            continue
        if stages and (not ours or state["stage"] not in stages):
            raise InputError(f"{file}: found {'a checkpoint of ' + state['stage'] if ours else 'another file'}, {wanted}")
        return state
    raise InputError(f"{path}: no sound checkpoint, {wanted}; restore one or name another path")


def resume(args, modules, optimizer):
    """Make args.output; go on from the newest sound checkpoint in it. Returns (step, best metric so far, whether that
    step is still to be evaluated).

    Raises InputError where the folder cannot be written, another run is writing there, or it holds a run begun with
    other arguments.
    """
    folder, step, best, pending = make_folder(args), 0, None, False
    if rank() == 0:
        lock(folder)
        for temporary in folder.glob("*.tmp"):             # of a run that was killed while it wrote
            temporary.unlink(missing_ok=True)
    if list(folder.glob("step-*.pt")):
        state = load_checkpoint(folder)
        now, then = vars(args), state["args"]
        changed = [k for k in sorted(now.keys() | then.keys()) if k not in FREE and now.get(k) != then.get(k)]
        if changed and (args.resume != "force" or "batch_size" in changed):  # steps count batches: it would change the epoch
            raise InputError(f"--output {folder} holds a run with other arguments ("
                             + ", ".join(f"{k}: {then.get(k)}, now {now.get(k)}" for k in changed)
                             + "): choose another --output" + ", or --resume force" * ("batch_size" not in changed))
        names, own_names = ([group["param_names"] for group in saved["param_groups"]]
                            for saved in (state["optimizer"], optimizer.state_dict()))
        if names != own_names or not modules.keys() <= state.keys():  # the optimizer's state loads by position
            raise InputError(f"--output {folder} holds a run of another architecture: choose another --output")
        try:
            for name, module in modules.items():
                module.load_state_dict(state[name])
        except RuntimeError as error:                      # its second line says what was expected and found
            raise InputError(f"--output {folder} holds a run of another architecture ({str(error).splitlines()[-1].strip()}): choose "
                             "another --output") from error
        own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(optimizer.param_groups, own):
            group.update(values)                           # --resume force: the new weight decay counts
        step, best, pending = state["step"], state["best"], not state["evaluated"]
    everyone = [step] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(everyone, step)
    if len(set(everyone)) > 1:
        raise InputError(f"--output {folder}: ranks found different checkpoints, of steps {sorted(set(everyone))}: "
                         "it must lie on storage that all machines share")
    if rank() == 0:
        for path in folder.glob("step-*.pt"):              # not to be counted among those that are kept
            if int(path.stem[5:]) > step:
                path.rename(path.with_suffix(".damaged"))
    log(args, args=vars(args), world_size=world_size(), hardware=hardware(), torch=torch.__version__, step=step)
    return step, best, pending


def make_folder(args):
    """Make args.output, and see that it can be written. Raises InputError."""
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"write-{rank()}.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)                      # rank 0 may have cleared it away, in resume
        with open(folder / "log.jsonl", "a"):
            return folder
    except OSError as error:
        raise InputError(f"--output {folder}: not writable ({error.strerror}); choose another") from error


def lock(folder):
    """Refuse a folder that another live process has locked; the lock ends with this process, however it ends."""
    try:
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)  # never closed: that would release it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"{folder}: not locked against a second run ({error.strerror})", file=sys.stderr)
        else:
            raise InputError(f"--output {folder}: a run that is still alive writes there; stop it (ranks may outlive their "
                             "torchrun) or choose another") from error


def report(args, row, **context):
    """An evaluation without training goes to the log of --output all the same."""
    make_folder(args)
    log(args, **context, **row)
    return row


def log(args, /, **row):
    """Append one JSON line to log.jsonl in args.output and print it, on rank 0; with --tensorboard also to an event file."""
    if rank():
        return
    try:
        with open(Path(args.output) / "log.jsonl", "a") as file:
            file.write(json.dumps(dict(row, time=round(time.time(), 1))) + "\n")
    except OSError as error:
        raise InputError(f"{args.output}/log.jsonl: not written ({error.strerror}), {shutil.disk_usage(args.output).free / 2 ** 20:.0f} "
                         "MiB free there; the last checkpoint is intact: make room and run the same command again") from error
    if args.tensorboard and "step" in row:
        write_events(args.output, row)
    if "args" not in row:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def write_events(folder, row):
    """A log's row as event files have it; the first one, with "args", opens them and drops what lies after its step."""
    if "args" in row:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(f"--tensorboard: {error.name} is missing: pip install tensorboard") from error
        WRITERS[folder] = SummaryWriter(folder, purge_step=row["step"] + 1)
        return
    for key, value in row.items():
        if isinstance(value, (int, float)) and key != "step":
            WRITERS[folder].add_scalar(f"{row['split']}/{key}" if "split" in row else key, value, row["step"])
    WRITERS[folder].flush()
