"""A checkpoint: one file of plain values and tensors, with a digest of them all.

Plain, so that torch.load(weights_only=True) takes it and nothing in it is ever executed. With a
digest, since torch.load does not notice a flipped bit or a block of zeros.
"""
import argparse
import contextlib
import hashlib
import os
from pathlib import Path

import torch

from support.launch import InputError, warn

PLAIN = (str, int, float, bool, bytes, type(None))          # what weights_only=True lets pass

# What contents of any kind raise where a network is built of them.
UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def digest(value):
    """SHA-256 over nested dicts, lists, tensors and plain values, in their order."""
    sha = hashlib.sha256()
    if isinstance(value, torch.Tensor):
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        sha.update(repr([digest(item) for item in value.items()]).encode())
    elif isinstance(value, (list, tuple)):
        sha.update(repr([digest(item) for item in value]).encode())
    elif type(value) in PLAIN:
        sha.update(repr(value).encode())
    else:
        raise InputError(f"{value!r} is a {type(value).__name__}, which no checkpoint may hold: "
                         "make a plain number or text of it")
    return sha.hexdigest()


def write(path, state):
    """Write state, a dict, with its digest: whole or not at all, whenever the process dies."""
    state["digest"] = digest(state)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):                  # not every file system can
            os.fsync(folder)                                # the renaming itself
        os.close(folder)
    except (OSError, RuntimeError) as error:               # torch.save: RuntimeError on a full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path}: not written ({error}){intact(path.parent)}: make room and run "
                         "the same command again") from error


def intact(folder):
    """For messages: the newest checkpoint of a run's folder, if there is one."""
    kept = files(folder)
    return f"; {kept[0]} is intact" if kept else ""


def files(folder):
    """The checkpoints of a run's folder, the newest first."""
    digits = "[0-9]" * 8                                    # not a copy under a longer name
    return sorted(Path(folder).glob(f"step-{digits}.pt"), reverse=True)


def folder_of(run):
    """The folder of a run that is named by it or by one of its checkpoints."""
    path = Path(run)
    return path if path.is_dir() else path.parent


def load(path, stages=None, flag=""):
    """The checkpoint in a file, or the newest sound one of a run's folder, on the CPU.

    stages: those that it may be of; None: any, and files of other projects, which have no "stage".
    flag: that names the path, for messages. A damaged file is named and passed over.
    """
    path = Path(path)
    source = f"{flag} {path}".strip()
    candidates = files(path) if path.is_dir() else [path]
    wanted = f"expected one of {' or '.join(stages)}" if stages else "expected a checkpoint"
    if not candidates or not candidates[0].exists():
        raise InputError(f"{source}: nothing there, {wanted}: train it first")
    for file in candidates:
        try:
            state = load_sound(file)
        except Exception as error:            # torch.load raises all kinds on a bad or hostile file
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if "weights_only" in str(error):                # torch advises to execute it
                reason = "not one of plain values and tensors"
            if path.is_dir():
                warn(f"{file}: not loaded: {reason}")
            continue
        stage = state.get("stage")
        if stages and stage not in stages:
            found = f"a checkpoint of {stage}" if stage else "another file"
            raise InputError(f"{source}: found {found}, {wanted}")
        return state
    raise InputError(f"{source}: no sound checkpoint ({reason}): restore one or name another")


def load_sound(file):
    with torch.serialization.safe_globals([argparse.Namespace]):        # beside others' weights
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    if "digest" in state:
        rest = {key: value for key, value in state.items() if key != "digest"}
        if state["digest"] != digest(rest):
            raise ValueError("its digest differs")
    return state


def check_weights(weights):
    """Raise ValueError where the weights of another project's file are no finite tensors."""
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is no tensor")
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite: the training that wrote it had failed")


@contextlib.contextmanager
def built_from(source):
    """Around what builds a network of a checkpoint's contents."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:                             # model.py's: it says what does not fit
        raise InputError(str(error)) from error
    except UNFIT as error:
        lines = str(error).splitlines() or [""]
        # load_state_dict heads a list of the names that it complains of; here the first of them
        reason = lines[min(1, len(lines) - 1)].split(', "')[0].strip()
        raise InputError(f"{source}: of another architecture ({reason}): train it anew, or use the "
                         "version of this code that wrote it") from error
