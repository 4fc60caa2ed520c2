"""Stage 0: the perceptual network, a ViT trained by MoCo v3 (arXiv 2104.02057) for 100 epochs.

PeCo measures L_percep with it; the 100-epoch weights were never published. Written from the paper's
Algorithm 1: queries q and keys k of two views of each image, temperature τ, momentum m.

    python teacher.py --recipe demo
    torchrun --nproc-per-node 8 teacher.py
"""
import copy
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import runtime
from model import IMAGENET_MEAN, IMAGENET_STD, SIZES, VisionTransformer

RECIPES = {
    "paper": dict(                 # MoCo v3, sec. 5 and 6, ViT-B; PeCo: 100 epochs
        data="data/imagenet", augment="batch", model="base", image_size=224, patch_size=16, crop_min=0.08,
        batch_size=4096, epochs=100, lr=2.4e-3,                     # 1.5e-4 · 4096 / 256
        warmup_epochs=40, weight_decay=0.1, momentum=0.99, temperature=0.2, hidden=4096, features=256),
    "cifar": dict(                 # our choice
        data="data/cifar10", augment="batch", model="tiny", image_size=32, patch_size=4, crop_min=0.2,
        batch_size=512, epochs=200, lr=6e-4, warmup_epochs=10, weight_decay=0.1, momentum=0.99,
        temperature=0.2, hidden=1024, features=128),
    "cifar-cpu": dict(             # our choice
        data="data/cifar10", augment="batch", model="nano", image_size=32, patch_size=8, crop_min=0.2,
        batch_size=256, epochs=24, lr=2e-3, warmup_epochs=0.5, weight_decay=0.05, momentum=0.99,
        temperature=0.2, hidden=256, features=64),
    "demo": dict(                  # our choice
        data="synthetic:8000", model="nano", image_size=32, patch_size=8, crop_min=0.3,
        batch_size=128, epochs=2, lr=1.5e-3, warmup_epochs=0, weight_decay=0.1, momentum=0.99,
        temperature=0.2, hidden=256, features=64),
}


def get_args(argv=None):
    p = runtime.parser(__doc__, "teacher")
    p.model.add_argument("--model", choices=SIZES)
    p.model.add_argument("--patch-size", type=int, help="pixels")
    p.data.add_argument("--crop-min", type=float, help="smallest random crop, share of the image's area")
    p.schedule.add_argument("--warmup-epochs", type=float)
    p.schedule.add_argument("--weight-decay", type=float)
    p.model.add_argument("--momentum", type=float, help="of the key encoder at the start; rises to 1 by a cosine")
    p.model.add_argument("--temperature", type=float, help="τ of the contrastive loss")
    p.model.add_argument("--hidden", type=int, help="width of the heads' hidden layers")
    p.model.add_argument("--features", type=int, help="dimension of q and k")
    p.hardware.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass: less memory")
    return runtime.parse(p, RECIPES, argv)


class BatchNorm(nn.Module):
    """Batch norm over the batch of all ranks, on any device (SyncBatchNorm needs a GPU). It has no running
    averages: the heads are thrown away after training."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x):                                                           # (B, features)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            x = x - global_mean(x)
            return x * (global_mean(x.square()) + 1e-5).rsqrt() * self.weight + self.bias


class AllReduce(torch.autograd.Function):
    """Sum over the ranks; so is the sum of their losses' gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


@torch.compiler.disable                                    # the graph breaks at collectives
def global_mean(x):
    mean = x.mean(0)
    return AllReduce.apply(mean) / runtime.world_size() if dist.is_initialized() else mean


def mlp(layers, inputs, hidden, outputs):
    """MoCo v3's heads (sec. 4): batch norm after every layer, ReLU between."""
    widths = [inputs] + [hidden] * (layers - 1) + [outputs]
    modules = []
    for i in range(layers):
        modules += [nn.Linear(widths[i], widths[i + 1], bias=False), BatchNorm(widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class MoCo(nn.Module):
    """f_q = predictor ∘ projector ∘ encoder; f_k = their momentum copies, without predictor."""

    def __init__(self, encoder, hidden, features, temperature):
        super().__init__()
        dim = encoder.cls_token.shape[-1]
        self.encoder = encoder
        self.projector = mlp(3, dim, hidden, features)
        self.predictor = mlp(2, features, hidden, features)
        encoder.patch_embed.requires_grad_(False)                   # random patch projection (sec. 4)
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.temperature = temperature

    def forward(self, x1, x2):
        """Algorithm 1: the symmetric loss, and how often the right key is the nearest."""
        q1, q2 = (self.predictor(self.projector(self.encoder(x)[:, 0])) for x in (x1, x2))
        with torch.no_grad():
            k1, k2 = (self.momentum_projector(self.momentum_encoder(x)[:, 0]) for x in (x1, x2))
        (loss1, hits1), (loss2, hits2) = self.ctr(q1, k2), self.ctr(q2, k1)
        return loss1 + loss2, (hits1 + hits2) / 2

    def ctr(self, q, k):
        q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)         # (B, features)
        keys = k
        if dist.is_initialized():
            gathered = [torch.empty_like(k) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, k)
            keys = torch.cat(gathered)                                              # of all ranks
        with torch.autocast(q.device.type, enabled=False):                          # in bf16 near keys would tie
            logits = q @ keys.T / self.temperature
        labels = torch.arange(len(q), device=q.device) + len(q) * runtime.rank()
        hits = (logits.argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels) * 2 * self.temperature, hits

    @torch.no_grad()
    def update_momentum(self, m):
        """f_k ← m f_k + (1 − m) f_q"""
        for k, q in ((self.momentum_encoder, self.encoder), (self.momentum_projector, self.projector)):
            for key, query in zip(k.parameters(), q.parameters()):
                key.lerp_(query, 1 - m)


class TwoViews:
    def __init__(self, *transforms):
        self.transforms = transforms

    def __call__(self, image):
        return [transform(image) for transform in self.transforms]

    def finish(self, batches):
        return [transform.finish(batch) for transform, batch in zip(self.transforms, batches)]


def main(args):
    device, micro_batch = runtime.device(), runtime.micro_batch(args)
    dataset = data.load_dataset(args.data, "train", args.image_size)
    epoch_steps, steps = runtime.total_steps(args, len(dataset))

    # model: MoCo v3's ViT: fixed sine-cosine positions, no layer scale
    torch.manual_seed(args.seed)
    model_args = dict(SIZES[args.model], image_size=args.image_size, patch_size=args.patch_size, positions="absolute",
                      layer_scale=0.0, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    encoder = VisionTransformer(**model_args)
    moco = MoCo(encoder, args.hidden, args.features, args.temperature).to(device)
    encoder.checkpoint_activations = args.checkpoint_activations
    modules = dict(moco.named_children())                           # the encoder is what the next stage reads
    modules["model"] = modules.pop("encoder")
    trained = [(n, p) for n, p in moco.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([
        dict(params=[(n, p) for n, p in trained if p.ndim > 1], weight_decay=args.weight_decay),
        dict(params=[(n, p) for n, p in trained if p.ndim == 1], weight_decay=0.0)], fused=True)
    start, *_ = runtime.resume(args, modules, optimizer)

    transform = TwoViews(*data.teacher_transform(args.image_size, args.crop_min, args.augment))
    loader = data.TrainLoader(dataset, transform, args, micro_batch, start, steps, device)
    if args.compile:
        moco.compile()
    network, autocast, caught = runtime.distribute(moco, device), runtime.autocast(args, device), runtime.catch_signals()
    batches, spent, seen, sums = iter(loader), 0.0, 0, {}
    for step in tqdm(range(start, steps), initial=start, total=steps, disable=None if runtime.rank() == 0 else True):
        begun = time.time()
        lr = runtime.cosine(step, steps, args.warmup_epochs * epoch_steps, args.lr)
        m = 1 - (1 - args.momentum) * runtime.cosine(step, steps, 0, 1.0)          # rises to 1
        for group in optimizer.param_groups:
            group["lr"] = lr
        terms = {}
        for i in range(args.accumulate):
            (x1, x2), _ = next(batches)
            network.require_backward_grad_sync = i == args.accumulate - 1          # DDP: all-reduce at the step's end
            with autocast:
                loss, accuracy = network(x1, x2)
            (loss / args.accumulate).backward()
            for name, term in dict(loss=loss, accuracy=accuracy).items():
                terms[name] = terms.get(name, 0.0) + term.detach() / args.accumulate
        terms["grad_norm"] = nn.utils.get_total_norm([p.grad for _, p in trained])  # the paper does not clip
        terms, stopped = runtime.check_step(step, terms, caught, device, loader.samples)
        optimizer.step()
        optimizer.zero_grad()
        moco.update_momentum(m)

        sums, seen, done = {k: sums.get(k, 0.0) + v for k, v in terms.items()}, seen + 1, step + 1
        spent += time.time() - begun                                # without evaluations and checkpoints
        if done % args.log_every == 0 or done == steps:
            runtime.log(args, step=done, epoch=done / epoch_steps, **{k: v / seen for k, v in sums.items()}, lr=lr,
                        images_per_s=seen * args.batch_size / spent)
            spent, seen, sums = 0.0, 0, {}
        runtime.checkpoint(args, done, steps, epoch_steps, stopped, modules, optimizer, model_args)


if __name__ == "__main__":
    runtime.launch(main, get_args())
