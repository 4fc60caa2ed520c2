"""Computations on this rank's share of a fixed global batch: test_distributed.py runs them in one process, and
under torchrun (python -m torch.distributed.run … ranks.py FOLDER), where each rank saves what it got."""
import copy
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import detect
import finetune
import runtime
import segment
import teacher
from model import Quantizer, VisionTransformer

CPU = torch.device("cpu")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def share(batch):
    """This rank's rows of a global batch."""
    return batch.chunk(runtime.world_size())[runtime.rank()]


def quantizer():
    """Initialise, then three updates of two micro-batches each; codes are revived, as a twin shows that revives none."""
    q, history = Quantizer(size=24, dim=4, decay=0.5, revive=0.9).double(), {}
    for step in range(4):
        for micro_batch in range(2):
            q(share(torch.randn(8, 4, 3, 3, generator=seeded(10 * step + micro_batch)).double() + step))
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
    whole = torch.randn(12, 5, generator=seeded(1)).double() * 3 + 2
    x = share(whole).requires_grad_()
    y = norm(x)
    weights = share(torch.randn(12, 5, generator=seeded(2)).double())
    (y * weights).sum().backward()                         # summed over ranks: the gradient of the whole
    for parameter in norm.parameters():
        if dist.is_initialized():
            dist.all_reduce(parameter.grad)
    return dict(share=y.detach(), gradient=x.grad, weight=norm.weight.grad, bias=norm.bias.grad)


def moco():
    """Loss and gradients of a step, in a DDP wrapper where there are ranks."""
    torch.manual_seed(0)
    encoder = VisionTransformer(8, 4, dim=16, depth=2, heads=2, positions="absolute", layer_scale=0.0)
    network = teacher.MoCo(encoder, 32, 8, 0.2).double()
    x1, x2 = (share(torch.rand(8, 3, 8, 8, generator=seeded(s)).double() * 2 - 1) for s in (1, 2))
    wrapped = runtime.distribute(network, CPU)             # kept until the backward pass: it averages the gradients
    loss, hits = wrapped(x1, x2)
    loss.backward()
    values = torch.stack([loss.detach(), hits])
    if dist.is_initialized():
        dist.all_reduce(values)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    return dict(values=values / runtime.world_size(), **gradients)


def evaluation():
    """23 images over the ranks: top-1 and top-5 of a random network, and the features that probes see."""
    args = Namespace(image_size=16, eval_crop=1.0, batch_size=8, accumulate=1, workers=0, amp="fp32", probe_layer=None,
                     pool="mean")
    torch.manual_seed(0)
    network = VisionTransformer(16, 4, dim=16, depth=1, heads=2, positions="block", classes=10)
    torch.nn.init.normal_(network.head.weight, generator=seeded(1))
    dataset = data.Synthetic("val", 23, 16)
    row = finetune.evaluate(args, network, dataset, CPU)
    features, labels = finetune.extract(args, network.eval(), dataset, CPU)
    order = features[:, 0].argsort()                       # those of all ranks come to rank 0, rank by rank
    row = torch.tensor([row["top1"], row["top5"], row["images"]])
    return dict(row=row, features=features[order], labels=labels[order])


class Oracle(torch.nn.Module):
    """Detects what is there."""

    def __init__(self, dataset):
        super().__init__()
        samples = data.Samples(dataset, detect.transform(train=False), 0)
        self.known = {pixels.numpy().tobytes(): target for pixels, target in (samples[0, i] for i in range(len(dataset)))}

    def forward(self, images):
        targets = [self.known[image.numpy().tobytes()] for image in images]
        return [dict(target, scores=torch.ones(len(target["labels"])), masks=target["masks"][:, None].float()) for target in targets]


def dense():
    """7 images over the ranks: the scores of a random segmenter, the AP of a perfect detector."""
    args = Namespace(image_size=16, batch_size=4, accumulate=1, workers=0, amp="fp32", eval_mode="slide", pictures=0,
                     output=tempfile.mkdtemp())
    torch.manual_seed(0)
    vit = VisionTransformer(16, 4, dim=16, depth=1, heads=2, positions="block")
    masks = segment.evaluate(args, segment.Segmenter(vit, 11), data.Scenes("val", 7, 16, target="masks"), CPU)
    if detect.COCO is None:
        return dict(masks=masks)
    boxes = data.Scenes("val", 7, 16, target="instances")
    return dict(masks=masks, boxes=detect.evaluate(args, Oracle(boxes), boxes, CPU))


def trouble():
    """On the last rank only: a signal, then a loss and a gradient that are not finite."""
    last = runtime.rank() == runtime.world_size() - 1
    caught, found = [15] if last else [], []
    terms = dict(loss=torch.tensor(runtime.rank() + 1.0), grad_norm=torch.tensor(1.0))
    images = lambda step, rank: [step, 10 + rank]
    found.append(runtime.check_step(3, terms, caught, CPU, images))
    for bad in (float("nan"), float("inf")):
        for loss, norm in ((bad, 1.0), (1.0, bad)):
            values = torch.tensor([loss, norm]) if last else torch.ones(2)
            try:
                found.append(runtime.check_step(3, dict(loss=values[0], grad_norm=values[1]), caught, CPU, images))
            except FloatingPointError as error:
                found.append(str(error))
    return found


def checks():
    return dict(quantizer=quantizer(), batch_norm=batch_norm(), moco=moco(), evaluation=evaluation(), dense=dense(), trouble=trouble())


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(checks(), Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
