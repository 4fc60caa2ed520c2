"""A stage with faults in it, for test_faults.py: by fork, or under torchrun.

    torchrun … faulty.py STAGE FAULT… -- FLAGS…

A fault is NAME or NAME=VALUE:
    record=FOLDER   writes there what each rank's every batch held, and the digest of all that is
                    trained after each step and at the process's end
    double          computes in float64
    kill=STEP       the last rank kills itself in that step, once
    stop=STEP       the last rank stops itself (SIGSTOP) in that step
    touch=WHERE     creates the file TOUCHED in the first step, in the evaluation or in a save, and
                    waits a little there
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from support import launch
from support.checkpoint import digest
from support.run import Run


def last_rank():
    return launch.rank() == launch.world_size() - 1


def before_check(action):
    """Call action(run) before Run.agree."""
    agree = Run.agree

    def wrapped(self):
        action(self)
        agree(self)
    Run.agree = wrapped


def record(folder):
    """Two kinds of rows in FOLDER/rank-R.jsonl, which test_faults.record reads."""
    Path(folder).mkdir(exist_ok=True)
    number = None                                    # at the process's end there is no group to ask
    begin = Run.__init__
    iterate = data.TrainLoader.__iter__
    log = Run.log

    def write(**row):
        with open(Path(folder) / f"rank-{number}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def write_digest(run, step):
        trained = [module.state_dict() for module in run.modules.values()]
        if "RANK" in os.environ:            # on CPUs each rank's batch norm has its own averages
            trained = [{key: value for key, value in state.items() if ".running_" not in key}
                       for state in trained]
        write(step=step, digest=digest([*trained, run.optimizer.state_dict()["state"]]))

    def watched_begin(self, *arguments, **keywords):
        nonlocal number
        number = launch.rank()
        begin(self, *arguments, **keywords)
        atexit.register(write_digest, self, -1)

    def watched_iterate(self):
        for step, batch in enumerate(iterate(self), self.batches.start):
            samples = []
            for inputs, labels in batch:
                samples += digests(inputs, labels)
            write(batch=step, samples=samples)
            yield batch

    def watched_log(self, step, **more):                    # called at each step's end
        write_digest(self, step)
        log(self, step, **more)

    Run.__init__ = watched_begin
    data.TrainLoader.__iter__ = watched_iterate
    Run.log = watched_log


def digests(inputs, labels):
    """A digest of each sample of a micro-batch."""
    if isinstance(labels, list):                            # detection: images and targets in lists
        return [digest([image, target]) for image, target in zip(inputs, labels, strict=True)]
    tensors = inputs if isinstance(inputs, (list, tuple)) else [inputs]     # several: views, masks
    return [digest([tensor[i] for tensor in tensors]) for i in range(len(labels))]


def double(_):
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double                # the losses are taken in fp32 otherwise
    to_device = data.to_device

    def moved(batch, device):
        batch = to_device(batch, device)
        if torch.is_tensor(batch) and batch.is_floating_point():
            return batch.double()
        return batch
    data.to_device = moved


def strike(number, step):
    """The last rank sends itself a signal in a step, once."""
    def act(run):
        if run.step == int(step) and last_rank() and not Path("struck").exists():
            Path("struck").touch()
            os.kill(os.getpid(), number)
    before_check(act)


def touch(where):
    def once():
        if not Path("touched").exists():
            Path("touched").touch()
            time.sleep(2)

    def in_first_step(run):
        if run.step == 0:
            once()

    if where == "step":
        before_check(in_first_step)
        return
    owner, attribute = (torch, "save") if where == "save" else (data, "eval_loader")
    original = getattr(owner, attribute)

    def wrapped(*arguments, **keywords):
        once()
        return original(*arguments, **keywords)
    setattr(owner, attribute, wrapped)


def hang_shorter(seconds):
    launch.TIMEOUT = timedelta(seconds=float(seconds))


FAULTS = {
    "record": record,
    "double": double,
    "kill": functools.partial(strike, signal.SIGKILL),
    "stop": functools.partial(strike, signal.SIGSTOP),
    "touch": touch,
    "timeout": hang_shorter,
}


def main(stage, faults, flags):
    from conftest import COMMON, OWN, STAGES
    for fault in faults:
        name, _, value = fault.partition("=")
        FAULTS[name](value)
    args = STAGES[stage].get_args([*COMMON, *OWN[stage], *flags])
    launch.start(STAGES[stage].main, args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = sys.argv.index("--")
    main(sys.argv[1], sys.argv[2:place], sys.argv[place + 1:])
