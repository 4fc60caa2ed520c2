"""A stage with faults in it, for test_faults.py: by fork, or under torchrun.

    torchrun … faulty.py STAGE FAULT… -- FLAGS…

A fault is NAME or NAME=VALUE:
    record=FOLDER   writes there what each rank's every batch held, and the digest of all that is
                    trained after each step and at the process's end
    double          computes in float64
    kill=STEP       the last rank sends itself SIGKILL in that step, once; so with stop and term
    touch=WHERE     creates the file "touched" in the first step, evaluation or save; waits 2 s
    timeout=SECONDS for a rank that hangs
"""
import atexit
import functools
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from conftest import COMMON, OWN, STAGES

import data
from support import launch
from support.checkpoint import digest
from support.run import Run


def before(owner, name, action):
    """From now on owner.name(…) begins with action(…)."""
    original = getattr(owner, name)

    def wrapped(*arguments, **keywords):
        action(*arguments, **keywords)
        return original(*arguments, **keywords)
    setattr(owner, name, wrapped)


def record(folder):
    """[kind, step, value] a line in FOLDER/rank-R.jsonl, which test_faults.record reads."""
    Path(folder).mkdir(exist_ok=True)
    number = None                                    # at the process's end there is no group to ask
    train_batches = data.train_batches

    def write(*row):
        with open(Path(folder) / f"rank-{number}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def write_digest(run, step, **_):
        trained = [module.state_dict() for module in run.modules.values()]
        if "RANK" in os.environ:            # on CPUs each rank's batch norm has its own averages
            trained = [{key: value for key, value in state.items() if ".running_" not in key}
                       for state in trained]
        write("weights", step, digest([*trained, run.optimizer.state_dict()["state"]]))

    def begin(run, *_, **__):
        nonlocal number
        number = launch.rank()
        atexit.register(write_digest, run, -1)

    def watched(dataset, transform, args, start, *more, **keywords):
        batches = train_batches(dataset, transform, args, start, *more, **keywords)
        for step, batch in enumerate(batches, start):
            write("samples", step, [sample for part in batch for sample in digests(*part)])
            yield batch

    before(Run, "__init__", begin)
    before(Run, "log", write_digest)                        # it is called at each step's end
    data.train_batches = watched


def digests(inputs, labels):
    """A digest of each sample of a micro-batch."""
    several = isinstance(inputs, list) and torch.is_tensor(labels)          # views; image and mask
    columns = [*inputs, labels] if several else [inputs, labels]
    return [digest(sample) for sample in zip(*columns, strict=True)]


def double(_):
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double                # the losses are taken in fp32 otherwise
    to_device = data.to_device

    def moved(batch, device):
        batch = to_device(batch, device)
        return batch.double() if torch.is_tensor(batch) and batch.is_floating_point() else batch
    data.to_device = moved


def strike(number, step):
    def act(run):
        last = launch.rank() == launch.world_size() - 1
        if run.step == int(step) and last and not Path("struck").exists():
            Path("struck").touch()
            os.kill(os.getpid(), number)
    before(Run, "agree", act)


def touch(where):
    def once(*_, **__):
        if not Path("touched").exists():
            Path("touched").touch()
            time.sleep(2)

    places = dict(step=(Run, "agree"), evaluation=(data, "eval_loader"), save=(torch, "save"))
    before(*places[where], once)


def hang_shorter(seconds):
    launch.TIMEOUT = timedelta(seconds=float(seconds))


FAULTS = {
    "record": record,
    "double": double,
    "kill": functools.partial(strike, signal.SIGKILL),
    "stop": functools.partial(strike, signal.SIGSTOP),
    "term": functools.partial(strike, signal.SIGTERM),
    "touch": touch,
    "timeout": hang_shorter,
}


def main(stage, faults, flags):
    for fault in faults:
        name, _, value = fault.partition("=")
        FAULTS[name](value)
    launch.start(STAGES[stage].main, STAGES[stage].get_args([*COMMON, *OWN[stage], *flags]))


if __name__ == "__main__":
    place = sys.argv.index("--")
    main(sys.argv[1], sys.argv[2:place], sys.argv[place + 1:])
