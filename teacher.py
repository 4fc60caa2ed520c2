"""Stage 0: the perceptual network, a ViT trained by MoCo v3 (arXiv 2104.02057) for 100 epochs.

PeCo measures L_percep with it; the weights of 100 epochs were never published. Written from the
paper's Algorithm 1: queries q and keys k of two views of each image, temperature τ, momentum m.

    python teacher.py --recipe demo
    torchrun --nproc-per-node 8 teacher.py
"""
import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
from model import IMAGENET_MEAN, IMAGENET_STD, SIZES, VisionTransformer
from support import flags, launch, recipes
from support.flags import amount, share, within
from support.run import Run

PAPER = dict(
    data="data/imagenet",       # ImageNet-1K [PeCo]
    image_size=224,             # [MoCo v3]
    crop_min=0.08,              # [MoCo v3]
    model="base",               # ViT-B [PeCo]
    patch_size=16,              # [MoCo v3]
    hidden=4096,                # [MoCo v3]
    features=256,               # [MoCo v3]
    temperature=0.2,            # τ [MoCo v3]
    momentum=0.99,              # m [MoCo v3]
    batch_size=4096,            # [MoCo v3]
    epochs=100,                 # [PeCo]
    warmup_epochs=40,           # [MoCo v3]
    lr=2.4e-3,                  # 1.5e-4 · 4096 / 256 [MoCo v3]
    weight_decay=0.1,           # [MoCo v3]
)
RECIPES = recipes.of("teacher", PAPER)


def get_args(argv=None):
    p = flags.parser("teacher", __doc__)
    p.add_argument("--model", choices=SIZES, help="size of the ViT")
    p.add_argument("--patch-size", type=within(int, "[1, 256]"), help="side of a patch, pixels")
    p.add_argument("--hidden", type=within(int, "[1, 16384]"), help="width of the heads' layers")
    p.add_argument("--features", type=within(int, "[1, 16384]"), help="dimension of q and k")
    p.add_argument("--temperature", type=within(float, "(0, inf)"),
                   help="τ, by which the contrastive loss divides the similarities")
    p.add_argument("--momentum", type=share,
                   help="m, the share of its weights that the key encoder keeps in the first step; "
                        "it rises to 1 by a cosine")
    p.add_argument("--weight-decay", type=amount, help="AdamW's weight decay, of matrices")
    p.add_argument("--warmup-epochs", type=amount, help="epochs of linear warm-up of the lr")
    p.add_argument("--checkpoint-activations", action="store_true",
                   help="recompute blocks in the backward pass: less memory, a forward pass more")
    data.add_arguments(p, layout=data.ANY_LAYOUT)
    return flags.parse(p, RECIPES, argv)


# ------------------------------------------------------------------------------------------------
# MoCo v3

class AllReduce(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


@torch.compiler.disable                                     # the graph breaks at collectives
def global_mean(x):
    """Mean over the batch of all ranks: (B, features) → (features,)."""
    mean = x.mean(0)
    return AllReduce.apply(mean) / launch.world_size() if dist.is_initialized() else mean


class BatchNorm(nn.Module):
    """Batch norm over all ranks, also on CPUs. Used in training alone: no running averages."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x):                                                       # (B, features)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            x = x - global_mean(x)
            variance = global_mean(x.square())
            return x * (variance + 1e-5).rsqrt() * self.weight + self.bias


def mlp(layers, inputs, hidden, outputs):
    """MoCo v3's heads (sec. 4): batch norm after every layer, ReLU between."""
    widths = [inputs] + [hidden] * (layers - 1) + [outputs]
    modules = []
    for i in range(layers):
        linear = nn.Linear(widths[i], widths[i + 1], bias=False)
        modules += [linear, BatchNorm(widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class MoCo(nn.Module):
    """f_q = predictor ∘ projector ∘ encoder; f_k = momentum copies of the first two.

    Negatives and batch norm are of one micro-batch of all ranks: --accumulate changes the result.
    """

    def __init__(self, encoder, hidden, features, temperature):
        super().__init__()
        dim = encoder.cls_token.shape[-1]
        self.encoder, self.temperature = encoder, temperature
        self.encoder.patch_embed.requires_grad_(False)      # random patch projection (sec. 4)
        self.projector = mlp(3, dim, hidden, features)
        self.predictor = mlp(2, features, hidden, features)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, x1, x2):
        """Algorithm 1: two views (B, 3, H, W) → the symmetric loss, ctr's share."""
        q1, q2 = self.query(x1), self.query(x2)
        with torch.no_grad():
            k1, k2 = self.key(x1), self.key(x2)
        loss1, accuracy1 = self.ctr(q1, k2)
        loss2, accuracy2 = self.ctr(q2, k1)
        return loss1 + loss2, (accuracy1 + accuracy2) / 2

    def query(self, x):
        return self.predictor(self.projector(self.encoder(x)[:, 0]))            # (B, features)

    def key(self, x):
        return self.momentum_projector(self.momentum_encoder(x)[:, 0])          # (B, features)

    def ctr(self, q, k):
        """Queries among the keys of all ranks → loss, share of those whose own key is nearest."""
        q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)     # (B, features)
        parts = [k] * launch.world_size()
        if dist.is_initialized():
            parts = [torch.empty_like(k) for _ in parts]
            dist.all_gather(parts, k)
        keys = torch.cat(parts)                                                # (ranks·B, features)
        with torch.autocast(q.device.type, enabled=False):                  # in bf16 keys would tie
            logits = q @ keys.T / self.temperature                              # (B, ranks·B)
        labels = torch.arange(len(q), device=q.device) + len(q) * launch.rank()
        accuracy = (logits.argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels) * 2 * self.temperature, accuracy     # Algorithm 1

    @torch.no_grad()
    def update_momentum(self, m):
        """f_k ← m f_k + (1 − m) f_q"""
        for f_k, f_q in ((self.momentum_encoder, self.encoder),
                         (self.momentum_projector, self.projector)):
            for key, query in zip(f_k.parameters(), f_q.parameters(), strict=True):
                key.lerp_(query, 1 - m)


class TwoViews:
    """PIL image → two views of it."""

    def __init__(self, *transforms):
        self.transforms = transforms

    def __call__(self, image):
        return [transform(image) for transform in self.transforms]


# ------------------------------------------------------------------------------------------------

@launch.as_input_error()
def build(args):
    """MoCo around a ViT, and the arguments to build the ViT again."""
    model_args = dict(
        SIZES[args.model], image_size=args.image_size, patch_size=args.patch_size,
        positions="absolute", layer_scale=0.0,              # a plain ViT [MoCo v3]
        mean=IMAGENET_MEAN, std=IMAGENET_STD)
    encoder = VisionTransformer(**model_args)
    encoder.checkpoint_activations = args.checkpoint_activations
    return MoCo(encoder, args.hidden, args.features, args.temperature), model_args


@launch.cleans_up
def main(args):
    device = launch.device()
    dataset = data.load_images(args.data, "train", args.image_size)

    # The model and its optimizer: no weight decay on biases and norms (our choice)
    torch.manual_seed(args.seed)
    moco, model_args = build(args)
    moco.to(device)
    modules = dict(                                         # "model" is what the next stage reads
        projector=moco.projector, predictor=moco.predictor, momentum_encoder=moco.momentum_encoder,
        momentum_projector=moco.momentum_projector, model=moco.encoder)
    trained = [(name, p) for name, p in moco.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in trained if p.ndim > 1]
    vectors = [(name, p) for name, p in trained if p.ndim == 1]
    groups = [dict(params=matrices, weight_decay=args.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, fused=True)

    # The run: a new one, or from where it stopped
    run = Run(args, optimizer, model_args, modules, identity=dict(images=len(dataset)))
    views = data.teacher_views(args.image_size, args.crop_min)
    batches = data.train_batches(dataset, TwoViews(*views), args, run.start, run.steps, device)
    if args.compile:
        moco.compile()
    network = launch.ddp(moco)
    autocast = launch.autocast(args, device)
    warmup = args.warmup_epochs * run.epoch_steps

    for step in run.progress():
        if run.due(step):
            run.save(step)
        if step == run.steps:
            break

        lr = launch.cosine(step, run.steps, warmup, args.lr)
        launch.set_lr(optimizer, lr)
        m = 1 - (1 - args.momentum) * launch.cosine(step, run.steps, 0, 1.0)   # rises to 1
        for (x1, x2), _ in run.micro_batches(next(batches), network):
            with autocast:
                loss, accuracy = network(x1, x2)
            (loss / args.accumulate).backward()
            run.add(loss=loss, accuracy=accuracy)
        gradients = [p.grad for _, p in trained]
        run.add(grad_norm=nn.utils.get_total_norm(gradients))       # the paper does not clip
        run.agree()
        optimizer.step()
        optimizer.zero_grad()
        moco.update_momentum(m)
        run.log(step + 1, lr=lr)


if __name__ == "__main__":
    launch.start(main, get_args())
