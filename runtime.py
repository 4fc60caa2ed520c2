"""What every stage needs and the paper does not speak of: arguments, process group, schedule, one
check a step, checkpoints, log. Stateless helpers; knows nothing of models or data.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

FREE = {"output", "resume", "workers", "log_every"}        # arguments that change no result


class InputError(Exception):
    """Bad input: one line that names the culprit and the remedy; the process exits with status 2."""

    def __str__(self):                                     # a loader's worker wraps it in its traceback
        return super().__str__().rpartition("InputError: ")[2].strip()


class Interrupted(Exception):
    """Raised on every rank after SIGTERM or Ctrl-C, once the checkpoint is written."""


@contextlib.contextmanager
def input_errors(culprit):
    """Turn a ValueError about what the user passed in (model.py raises them) into an InputError."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{culprit}: {error}") from error


def launch(main, args):
    """Run a stage's main(args) in its process group; bad input ends it with status 2, NaN with 1."""
    try:
        if "RANK" in os.environ:                           # torchrun
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        main(args)
        status = 0
    except InputError as error:
        status, message = 2, str(error)
    except FloatingPointError as error:
        status, message = 1, str(error)
    except Interrupted as error:
        status, message = 128 + error.args[0], error.args[1]
    if status:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
        os._exit(status)                                   # other ranks may wait in a collective: do not join them
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# Arguments

def parser(doc, stage):
    p = argparse.ArgumentParser(description=doc.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.set_defaults(stage=stage)
    p.add_argument("--recipe", default="paper", help="bundle of defaults from the table at the top of the script")
    p.add_argument("--data", help="synthetic[:IMAGES], cifar10, cifar100, or a folder with train/ and val/ (ImageFolder)")
    p.add_argument("--output", default=f"runs/RECIPE/{stage}", help="folder of checkpoints and log")
    p.add_argument("--image-size", type=int, help="pixels")
    p.add_argument("--batch-size", type=int, help="images of a step, over all ranks and accumulation steps")
    p.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step on each rank")
    p.add_argument("--epochs", type=int, help="passes over the training set")
    p.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    p.add_argument("--lr", type=float, help="peak learning rate at the recipe's batch size; scaled with --batch-size")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 2) - 1), help="loader processes of each rank")
    p.add_argument("--amp", choices=["auto", "bf16", "fp32"], default="auto", help="autocast; auto: bf16 where the hardware has it")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--save-every", type=int, default=1, help="epochs between checkpoints (and evaluations)")
    p.add_argument("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
    p.add_argument("--resume", choices=["auto", "force"], default="auto",
                   help="a run found in --output goes on; force: even with other arguments")
    return p


def parse(p, recipes, argv=None):
    """Parse argv over the recipe's defaults. args.lr comes back scaled: lr · batch / the recipe's batch
    (the linear rule; README states it)."""
    name = p.parse_known_args([a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")])[0].recipe
    if name not in recipes:
        p.error(f"--recipe {name}: choose from {', '.join(recipes)}")
    recipe = recipes[name]
    unknown = set(recipe) - {action.dest for action in p._actions}
    assert not unknown, f"recipe {name} sets {unknown}, which no flag has"
    p.set_defaults(**recipe)
    args = p.parse_args(argv)
    args.lr *= args.batch_size / recipe["batch_size"]
    for key, value in vars(args).items():
        if isinstance(value, str):
            setattr(args, key, value.replace("RECIPE", name))
    return args


# ------------------------------------------------------------------------------------------------
# Process group and hardware

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def device():
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.set_float32_matmul_precision("high")             # TF32 for what stays in fp32
    return torch.device("cuda", torch.cuda.current_device())


def micro_batch(args):
    """Images of a micro-batch on one rank."""
    parts = world_size() * args.accumulate
    if args.batch_size % parts:
        raise InputError(f"--batch-size {args.batch_size} does not divide into {world_size()} ranks × {args.accumulate} "
                         f"accumulation steps: try {max(args.batch_size // parts, 1) * parts}")
    return args.batch_size // parts


def total_steps(args, images):
    """(steps of an epoch, of the run) over `images` training images; the last partial batch is dropped."""
    if images < args.batch_size:
        raise InputError(f"--batch-size {args.batch_size} is more than the training set's {images} images")
    epoch = images // args.batch_size
    return epoch, args.steps or args.epochs * epoch


def autocast(args, device):
    """bf16 autocast where asked for, or (auto) where the hardware has it: an fp32 run otherwise."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:                                                  # x86: AVX512-BF16 or AMX; Arm: bf16
        info = Path("/proc/cpuinfo")
        native = info.exists() and any(flag in info.read_text().split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16" or args.amp == "auto" and native)


def distribute(module, device):
    """DDP over all ranks; the bare module in one process. Buffers are not broadcast: see model.Quantizer."""
    if not dist.is_initialized():
        return module
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None,
                                   broadcast_buffers=False, gradient_as_bucket_view=True)


def accumulating(module, last):
    """Context of one micro-batch: gradients are all-reduced at the step's last one only."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else contextlib.nullcontext()


def derive_seed(*numbers):
    """A 63-bit seed from any numbers, far from that of any others."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def cosine(step, total, warmup, peak, final=0.0):
    """Linear warm-up from 0 over `warmup` steps to `peak`, then half a cosine down to `final`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


class StopSignal:
    """True once SIGTERM or SIGINT has come; the loop then ends at the next step's check."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.set)

    def set(self, number, frame):
        self.signal = number


def check_step(step, loss, norm, stop, device):
    """One small all-gather a step, before the optimizer moves anything: (mean loss, stop signal).

    Raises FloatingPointError on all ranks where the loss or the gradients' norm is not finite on any.
    """
    row = torch.stack([loss.detach().float(), norm.detach().float(), torch.tensor(float(stop.signal), device=device)])
    rows = [torch.empty_like(row) for _ in range(world_size())]
    if dist.is_initialized():
        dist.all_gather(rows, row)
    else:
        rows = [row]
    losses, norms, signals = torch.stack(rows).T.tolist()
    for name, values in (("loss", losses), ("gradient", norms)):
        bad = [r for r, value in enumerate(values) if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"{name} not finite at step {step} on rank {', '.join(map(str, bad))}: stopped before "
                                     "the update, the last checkpoint is intact; try a lower --lr or --amp fp32")
    return sum(losses) / len(losses), int(max(signals))


# ------------------------------------------------------------------------------------------------
# Checkpoints: one file of plain data and tensors, with a digest of them all

def digest(value, sha=None):
    """SHA-256 over nested dicts, lists, tensors and plain values."""
    top, sha = sha is None, sha or hashlib.sha256()
    if isinstance(value, torch.Tensor):
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    elif isinstance(value, (dict, list, tuple)):
        sha.update(f"{len(value)}".encode())
        for item in (value.items() if isinstance(value, dict) else value):
            digest(item, sha)
    else:
        sha.update(repr(value).encode())
    return sha.hexdigest() if top else None


def checkpoint(args, step, steps, epoch_steps, stopped, modules, optimizer, model_args, evaluate=None, best=None):
    """At the end of an epoch due (--save-every), of the run, or on a signal: evaluate and save.

    evaluate(): the stage's metric, higher is better; not called on a signal. Returns the best metric so
    far, given the one before. Raises Interrupted after a signal's checkpoint.
    """
    due = step == steps or step % (epoch_steps * args.save_every) == 0
    if not due and not stopped:
        return best
    metric = evaluate() if due and evaluate else None
    improved = metric is not None and (best is None or metric > best)
    best = metric if improved else best
    save_checkpoint(args, step, step // epoch_steps, modules, optimizer, model_args, best, improved)
    if stopped and step < steps:
        raise Interrupted(stopped, f"stopped at step {step} of {steps}; the same command goes on from there")
    return best


def save_checkpoint(args, step, epoch, modules, optimizer, model_args, best=None, improved=False):
    """Write step-N.pt in args.output on rank 0 (as best.pt too where it improved) and keep the last two.

    modules: {"model": …, and what else the stage trains}, unwrapped. Raises InputError where there is no
    room or no permission. There is no other random state than (seed, step, epoch): every draw of the run
    is seeded by them.
    """
    if rank():
        return
    folder = Path(args.output)
    state = dict(stage=args.stage, step=step, epoch=epoch, args=vars(args), best=best, model_args=model_args,
                 random=dict(seed=args.seed, step=step, epoch=epoch), model=modules["model"].state_dict(),
                 modules={k: v.state_dict() for k, v in modules.items() if k != "model"}, optimizer=optimizer.state_dict())
    state["digest"] = digest(state)
    write_atomically(folder / f"step-{step:08d}.pt", state)
    if improved:
        write_atomically(folder / "best.pt", state)
    for old in sorted(folder.glob("step-*.pt"))[:-2]:
        old.unlink()


def write_atomically(path, state):
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)                                   # the rename itself
        os.close(folder)
    except (OSError, RuntimeError) as error:               # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2 ** 20
        raise InputError(f"{path}: not written ({error}); {free:.0f} MiB free there: make room or choose another --output; "
                         "the checkpoint before it is intact") from error


def load_checkpoint(path, stages=None):
    """The checkpoint at a file, or the newest sound one of a folder, on the CPU.

    stages: names of those that are accepted. Another project's file (no digest in it) comes back as it
    is where stages is None. Raises InputError.
    """
    path = Path(path)
    files = sorted(path.glob("step-*.pt"), reverse=True) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise InputError(f"{path}: no checkpoint there" + (f"; run the stage before it ({' or '.join(stages)}) first, or name its folder"
                                                           if stages else ""))
    for file in files:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError("not a checkpoint")
            found = state.pop("digest", None)
            if found is None and stages:
                raise InputError(f"{file}: not a checkpoint of this project; expected one of {' or '.join(stages)}")
            if found is not None and found != digest(state):
                raise ValueError("its digest differs")
        except InputError:
            raise
        except Exception as error:                         # torch.load raises all kinds on a damaged file
            if rank() == 0:
                print(f"{file} is damaged ({str(error).splitlines()[0]})"
                      + ("; trying the one before" if file != files[-1] else ""), file=sys.stderr)
            continue
        if stages and state["stage"] not in stages:
            raise InputError(f"{file}: a checkpoint of {state['stage']}, expected one of {' or '.join(stages)}")
        state["digest"] = found
        return state
    raise InputError(f"{path}: no readable checkpoint; restore one, or delete it to begin anew")


def resume(args):
    """Make args.output and return its newest sound checkpoint, None in an empty folder.

    Raises InputError where the folder cannot be written or the run was begun with other arguments.
    """
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
            for stale in folder.glob("*.tmp"):
                stale.unlink()
    except OSError as error:
        raise InputError(f"--output {folder}: not writable ({error.strerror})") from error
    if not list(folder.glob("step-*.pt")):
        return None
    state = load_checkpoint(folder)
    now, then = vars(args), state["args"]
    changed = [k for k in sorted(now.keys() | then.keys()) if k not in FREE and now.get(k) != then.get(k)]
    if changed and args.resume != "force":
        raise InputError(f"--output {folder} holds a run begun with other arguments ("
                         + ", ".join(f"{k}: {then.get(k)}, now {now.get(k)}" for k in changed)
                         + "): choose another --output, or --resume force")
    return state


def begin(args, state, modules, optimizer):
    """Load resume()'s checkpoint, if any, into the stage's modules and optimizer; log the arguments.
    Returns the step to go on from and the best metric so far."""
    log(args, args=vars(args), world_size=world_size(), torch=torch.__version__, resumed=state["step"] if state else None)
    if state is None:
        return 0, None
    names = [group["param_names"] for group in optimizer.state_dict()["param_groups"]]
    if names != [group["param_names"] for group in state["optimizer"]["param_groups"]]:
        raise InputError("the checkpoint's optimizer has other parameters than this model: begin in another --output")
    for name, module in modules.items():
        module.load_state_dict(state["model"] if name == "model" else state["modules"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["best"]


def log(args, /, **row):
    """Append one JSON line to log.jsonl in the output folder and print it, on rank 0."""
    if rank() == 0:
        with open(Path(args.output) / "log.jsonl", "a") as file:
            file.write(json.dumps(dict(row, time=round(time.time(), 1))) + "\n")
        if "args" not in row:
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
