"""A stage with a fault in it, for test_faults.py: by fork, or under torchrun (faulty.py STAGE FAULT… -- FLAGS…).

A fault is NAME or NAME=VALUE:
    record=FOLDER   writes there what each rank's every batch held, and the digest of all that is trained after each step
                    and at the process's end
    double          computes in float64
    kill=STEP       the last rank kills itself in that step, once
    stop=STEP       the last rank stops itself (SIGSTOP) in that step
    nan=loss|grad   the last rank's loss or one of its gradients is NaN in step 2
    touch=WHERE     creates the file TOUCHED in the first step, in the evaluation or in a save, and waits a little there
    timeout=SECONDS for a rank that hangs
"""
import atexit
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import runtime


def last_rank():
    return runtime.rank() == runtime.world_size() - 1


def before_step(action):
    """Call action(step, terms) before runtime.check_step."""
    check = runtime.check_step

    def wrapped(step, terms, *rest):
        action(step, terms)
        return check(step, terms, *rest)
    runtime.check_step = wrapped


def record(folder):
    """FOLDER/rank-R.jsonl: {"batch": step, "samples": a digest of each} and {"step": step, "digest": of weights and optimizer}."""
    Path(folder).mkdir(exist_ok=True)
    live, resume, iterate, checkpoint = [], runtime.resume, data.TrainLoader.__iter__, runtime.checkpoint

    def write(**row):
        with open(Path(folder) / f"rank-{live[3]}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def keep(args, modules, optimizer):
        live[:] = [args, modules, optimizer, runtime.rank()]    # at the process's end there is no group to ask
        return resume(args, modules, optimizer)

    def watched(self):
        step, parts = self.batches.start, 0
        for inputs, labels in iterate(self):
            tensors = inputs if isinstance(inputs, (list, tuple)) else [inputs]
            detection = isinstance(labels, list)            # a list of images, not one of views
            rows = ([runtime.digest([image, label]) for image, label in zip(inputs, labels)] if detection else
                    [runtime.digest([tensor[i] for tensor in tensors]) for i in range(len(labels))])
            write(batch=step, samples=rows)
            parts += 1
            step, parts = (step + 1, 0) if parts == live[0].accumulate else (step, parts)
            yield inputs, labels

    def digest(step):
        write(step=step, digest=runtime.digest([*(m.state_dict() for m in live[1].values()), live[2].state_dict()["state"]]))

    def digests(args, step, *rest):                        # called at each step's end
        digest(step)
        return checkpoint(args, step, *rest)
    runtime.resume, data.TrainLoader.__iter__, runtime.checkpoint = keep, watched, digests
    atexit.register(lambda: digest(-1))


def double():
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double               # the losses are taken in fp32 otherwise
    to_device = data.to_device

    def moved(batch, device):
        batch = to_device(batch, device)
        return batch.double() if torch.is_tensor(batch) and batch.is_floating_point() else batch
    data.to_device = moved


def inject(fault):
    name, _, value = fault.partition("=")
    if name == "record":
        record(value)
    elif name == "double":
        double()
    elif name in ("kill", "stop"):
        def strike(step, terms):
            if step == int(value) and last_rank() and not Path("struck").exists():
                Path("struck").touch()
                os.kill(os.getpid(), signal.SIGKILL if name == "kill" else signal.SIGSTOP)
        before_step(strike)
    elif name == "nan":
        now, distribute = [0], runtime.distribute

        def count(step, terms):
            if step == 2 and last_rank() and value == "loss":
                terms["loss"] = torch.tensor(math.nan)
            now[0] = step + 1                              # the step that comes next

        def poisoned(module, device):
            parameter = [p for p in module.parameters() if p.requires_grad][-1]
            parameter.register_hook(lambda grad: grad * math.nan if now[0] == 2 and last_rank() and value == "grad" else grad)
            return distribute(module, device)
        before_step(count)
        runtime.distribute = poisoned
    elif name == "timeout":
        runtime.TIMEOUT = timedelta(seconds=float(value))
    elif name == "touch":
        def touch():
            if not Path("touched").exists():
                Path("touched").touch()
                time.sleep(2)
        if value == "step":
            before_step(lambda step, terms: touch() if step == 0 else None)
        else:
            owner, attribute = (torch, "save") if value == "save" else (data, "eval_loader")
            original = getattr(owner, attribute)

            def wrapped(*arguments, **keywords):
                touch()
                return original(*arguments, **keywords)
            setattr(owner, attribute, wrapped)
    else:
        raise ValueError(fault)


def main(stage, faults, flags):
    from conftest import COMMON, OWN, STAGES
    for fault in faults:
        inject(fault)
    runtime.launch(STAGES[stage].main, STAGES[stage].get_args([*COMMON, *OWN[stage], *flags]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = sys.argv.index("--")
    main(sys.argv[1], sys.argv[2:place], sys.argv[place + 1:])
