"""Computations on this rank's share of a fixed global batch.

test_distributed.py runs them in one process, and under torchrun (torchrun … ranks.py FOLDER), where
each rank saves what it got.
"""
import copy
import math
import os
import signal
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import pixels, randomize, seeded, tiny_vit
from test_logbook import Stage, trained

import data
import detect
import finetune
import segment
import teacher
from model import Quantizer
from support import launch
from support.scenes import Scenes, Synthetic

CPU = torch.device("cpu")


def normal(*shape, seed):
    return torch.randn(*shape, generator=seeded(seed)).double()


def share(batch):
    """This rank's rows of a global batch."""
    return batch.chunk(launch.world_size())[launch.rank()]


def total(tensor):
    """The sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def quantizer():
    """Three updates of two micro-batches each; a twin without revival shows what is revived."""
    q = Quantizer(size=24, dim=4, decay=0.5, revive=0.9).double()
    history = {}
    for step in range(4):
        for micro_batch in range(2):
            q(share(normal(8, 4, 3, 3, seed=10 * step + micro_batch) + step))
        if step == 0:
            q.initialize(seeded(step))
        else:
            twin = copy.deepcopy(q)
            twin.revive = 0.0
            twin.update(seeded(step))
            q.update(seeded(step))
            history[f"revived {step}"] = (q.codebook != twin.codebook).any(1)
        history |= {f"{name} {step}": value.clone() for name, value in q.state_dict().items()}
    return history


def batch_norm(norm):
    """Outputs and gradients of a BatchNorm1d(5), in double precision."""
    norm = randomize(norm.double())
    x = share(3 * normal(12, 5, seed=1) + 2).requires_grad_()
    y = norm(x)
    weights = share(normal(12, 5, seed=2))
    (y * weights).sum().backward()                          # its gradient, summed over ranks …
    weight, bias = [total(p.grad) for p in norm.parameters()]       # … is that of the whole batch
    return dict(output=y.detach(), gradient=x.grad, weight=weight, bias=bias)


def moco():
    """Loss and gradients of a step, in a DDP wrapper where there are ranks."""
    torch.manual_seed(0)
    encoder = tiny_vit(image_size=8, positions="absolute", layer_scale=0.0)
    network = teacher.MoCo(encoder, 32, 8, 0.2).double()
    views = [share(pixels(8, 3, 8, 8, seed=seed)).double() for seed in (1, 2)]
    wrapped = launch.ddp(network)                           # kept: it averages in the backward pass
    loss, hits = wrapped(*views)
    loss.backward()
    values = total(torch.stack([loss.detach(), hits])) / launch.world_size()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    return dict(values=values, **gradients)


class Oracle(torch.nn.Module):
    """Detects what is there."""

    def __init__(self, dataset):
        super().__init__()
        samples = data.Samples(dataset, detect.transform(train=False), 0)
        pairs = [samples[0, i] for i in range(len(dataset))]
        self.known = {image.numpy().tobytes(): target for image, target in pairs}

    def forward(self, images):
        targets = [self.known[image.numpy().tobytes()] for image in images]
        return [dict(target, scores=torch.ones(len(target["labels"])),
                     masks=target["masks"][:, None].float()) for target in targets]


def evaluations(folder):
    """Of a random classifier on 23 images, of a random segmenter and a perfect detector on 7."""
    args = Namespace(image_size=16, eval_crop=1.0, batch_size=4, accumulate=1, workers=0,
                     amp="fp32", output=str(folder))
    classifier = tiny_vit(classes=10)
    found = dict(labels=finetune.evaluate(args, classifier, Synthetic("val", 23, 16), CPU))
    torch.manual_seed(0)
    segmenter = segment.Segmenter(tiny_vit(), 11)
    if launch.rank() > 0:                                   # the first one's count
        segmenter.head.fuse[1].running_mean += 1
        segmenter.backbone.up4[1].running_mean += 1
    scenes = Scenes("val", 7, 16, target="masks")
    found["masks"] = segment.evaluate(args, segmenter, scenes, CPU)
    if detect.COCO is not None:
        scenes = Scenes("val", 7, 16, target="instances")
        found["boxes"] = detect.evaluate(args, Oracle(scenes), scenes, CPU)
    return found


def trouble(folder):
    """On the last rank only: a signal, then a loss and a gradient norm that are not finite.

    The means and the signal that each rank finds, then the messages.
    """
    def check(**values):
        run.add(**{name: torch.tensor(value) for name, value in values.items()})
        run.agree()

    run = trained(3, output=folder).run
    last = launch.rank() == launch.world_size() - 1
    if last:
        os.kill(os.getpid(), signal.SIGTERM)
    check(loss=launch.rank() + 1.0, grad_norm=1.0)
    found = [(run.means, run.signal)]
    for name, bad in (("loss", math.nan), ("grad_norm", math.inf)):
        values = dict(loss=1.0, grad_norm=1.0)
        if last:
            values[name] = bad
        with pytest.raises(FloatingPointError) as error:
            check(**values)
        found.append(str(error.value))
    return found


def storage_that_is_not_shared(folder):
    """A checkpoint that rank 0 alone finds: what each rank says, or where it goes on."""
    trained(5, output=folder)
    try:
        return Stage(output=folder).begin()
    except launch.InputError as error:
        return str(error)


def checks(folder):
    """All of them, by name. folder: this rank's own; each run has one in it."""
    found = dict(quantizer=quantizer(), moco=moco(), batch_norm=batch_norm(teacher.BatchNorm(5)))
    for one in (evaluations, trouble, storage_that_is_not_shared):
        (folder / one.__name__).mkdir(parents=True)
        found[one.__name__] = one(str(folder / one.__name__))
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    found = checks(folder / f"rank-{dist.get_rank()}")
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
