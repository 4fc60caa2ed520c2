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

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import detect
import finetune
import segment
import teacher
from model import Quantizer, VisionTransformer
from support import launch
from support.run import Run
from support.scenes import Scenes, Synthetic

CPU = torch.device("cpu")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def share(batch):
    """This rank's rows of a global batch."""
    return batch.chunk(launch.world_size())[launch.rank()]


def last_rank():
    return launch.rank() == launch.world_size() - 1


def new_run(module, folder):
    args = Namespace(stage="pretrain", output=str(folder), batch_size=8, epochs=None, steps=100,
                     seed=0, resume="auto", save_every=100, log_every=100, data="synthetic:8",
                     amp="fp32")
    optimizer = torch.optim.SGD(list(module.named_parameters()), lr=0.1)
    return Run(args, optimizer, model_args={}, modules=dict(model=module), identity=dict(images=8))


def quantizer():
    """Initialise, then three updates of two micro-batches each.

    Codes are revived, as a twin shows that revives none.
    """
    q = Quantizer(size=24, dim=4, decay=0.5, revive=0.9).double()
    history = {}
    for step in range(4):
        for micro_batch in range(2):
            z = torch.randn(8, 4, 3, 3, generator=seeded(10 * step + micro_batch)).double()
            q(share(z + step))
        if step == 0:
            q.initialize(seeded(step))
        else:
            twin = copy.deepcopy(q)
            twin.revive = 0.0
            twin.update(seeded(step))
            q.update(seeded(step))
            history[f"revived {step}"] = (q.codebook != twin.codebook).any(1)
        for name, value in q.state_dict().items():
            history[f"{name} {step}"] = value.clone()
    return history


def batch_norm():
    norm = teacher.BatchNorm(5).double()
    torch.nn.init.normal_(norm.weight, generator=seeded(0))
    x = share(torch.randn(12, 5, generator=seeded(1)).double() * 3 + 2).requires_grad_()
    y = norm(x)
    weights = share(torch.randn(12, 5, generator=seeded(2)).double())
    (y * weights).sum().backward()                          # its gradient, summed over ranks …
    for parameter in norm.parameters():
        if dist.is_initialized():
            dist.all_reduce(parameter.grad)                 # … is that of the whole batch
    return dict(share=y.detach(), gradient=x.grad, weight=norm.weight.grad, bias=norm.bias.grad)


def moco():
    """Loss and gradients of a step, in a DDP wrapper where there are ranks."""
    torch.manual_seed(0)
    encoder = VisionTransformer(8, 4, dim=16, depth=2, heads=2, positions="absolute",
                                layer_scale=0.0)
    network = teacher.MoCo(encoder, 32, 8, 0.2).double()
    x1 = share(torch.rand(8, 3, 8, 8, generator=seeded(1)).double() * 2 - 1)
    x2 = share(torch.rand(8, 3, 8, 8, generator=seeded(2)).double() * 2 - 1)
    wrapped = launch.ddp(network)                           # kept: it averages in the backward pass
    loss, hits = wrapped(x1, x2)
    loss.backward()
    values = torch.stack([loss.detach(), hits])
    if dist.is_initialized():
        dist.all_reduce(values)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    return dict(values=values / launch.world_size(), **gradients)


class Oracle(torch.nn.Module):
    """Detects what is there."""

    def __init__(self, dataset):
        super().__init__()
        samples = data.Samples(dataset, detect.transform(train=False), 0)
        self.known = {}
        for i in range(len(dataset)):
            pixels, target = samples[0, i]
            self.known[pixels.numpy().tobytes()] = target

    def forward(self, images):
        detections = []
        for image in images:
            target = self.known[image.numpy().tobytes()]
            scores = torch.ones(len(target["labels"]))
            masks = target["masks"][:, None].float()
            detections.append(dict(target, scores=scores, masks=masks))
        return detections


def evaluations(folder):
    """Of a random classifier on 23 images, of a random segmenter and a perfect detector on 7."""
    args = Namespace(image_size=16, eval_crop=1.0, batch_size=4, accumulate=1, workers=0,
                     amp="fp32", output=str(folder))
    torch.manual_seed(0)
    vit = VisionTransformer(16, 4, dim=16, depth=1, heads=2, positions="block", classes=10)
    torch.nn.init.normal_(vit.head.weight, generator=seeded(1))
    found = dict(labels=finetune.evaluate(args, vit, Synthetic("val", 23, 16), CPU))
    torch.manual_seed(0)
    vit = VisionTransformer(16, 4, dim=16, depth=1, heads=2, positions="block")
    segmenter = segment.Segmenter(vit, 11)
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

    run = new_run(torch.nn.Linear(1, 1), folder)
    run.due(3)
    if last_rank():
        os.kill(os.getpid(), signal.SIGTERM)
    check(loss=launch.rank() + 1.0, grad_norm=1.0)
    found = [(run.means, run.signal)]
    for name in ("loss", "grad_norm"):
        values = dict(loss=1.0, grad_norm=1.0)
        if last_rank():
            values[name] = math.nan
        try:
            check(**values)
            found.append("nothing")
        except FloatingPointError as error:
            found.append(str(error))
    return found


def storage_that_is_not_shared(folder):
    """A checkpoint that rank 0 alone finds: what each rank says, or where it goes on."""
    module = torch.nn.Linear(1, 1)
    new_run(module, folder).save(5)
    try:
        return new_run(module, folder).start
    except launch.InputError as error:
        return str(error)


def checks(folder):
    """All of them, by name. folder: this rank's own; each run has one in it."""
    found = dict(quantizer=quantizer(), batch_norm=batch_norm(), moco=moco())
    for one in (evaluations, trouble, storage_that_is_not_shared):
        (folder / one.__name__).mkdir(parents=True)
        found[one.__name__] = one(folder / one.__name__)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    found = checks(folder / f"rank-{dist.get_rank()}")
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
