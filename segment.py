"""Stage 3b: semantic segmentation. UPerNet (1807.10221) on a pre-trained ViT (PeCo, sec. 4; BEiT).

    python segment.py --recipe demo
    torchrun --nproc-per-node 8 segment.py
"""
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2 as T
from torchvision.utils import draw_segmentation_masks, save_image
from tqdm import tqdm

import data
import runtime
from model import SIZES, ViTPyramid, VisionTransformer, param_groups, transfer

RECIPES = {
    "paper": dict(                          # PeCo: UPerNet, 160k iterations, 512 px; the rest BEiT's base, self-supervised
        data="data/ade20k", classes=150, model="base", image_size=512, patch_size=16, batch_size=16, steps=160_000, lr=7e-4,
        betas=[0.9, 0.999], weight_decay=0.05, layer_decay=0.65, warmup_steps=1500, drop_path=0.1, layer_scale=0.1,
        aux_weight=0.4, save_every=12),     # 12 epochs are 15,156 steps
    "demo": dict(                           # our choice
        data="synthetic:2000", classes=11, model="nano", image_size=64, patch_size=8, batch_size=16, epochs=10, lr=2e-3,
        betas=[0.9, 0.999], weight_decay=0.05, layer_decay=0.75, warmup_steps=50, drop_path=0.0, layer_scale=0.1,
        aux_weight=0.4, save_every=10),
}


def get_args(argv=None):
    p = runtime.parser(__doc__, "segment", data="synthetic[:IMAGES], or a folder in ADE20K's layout: images/ and annotations/")
    p.model.add_argument("--init", default="runs/RECIPE/pretrain", help="run or checkpoint of pretrain.py, finetune.py or teacher.py, "
                   "a file of BEiT's, timm's or MoCo v3's ViT-B, or none: from scratch; with --eval: a run of segment.py")
    p.output.add_argument("--eval", action="store_true", help="only evaluate --init")
    p.output.add_argument("--eval-mode", choices=["slide", "whole"], default="slide", help="slide: windows of --image-size, a third of "
                   "which overlaps, their logits averaged; whole: the image at once")
    p.data.add_argument("--classes", type=int, help="of a folder; 0 in its annotations is ignored")
    p.model.add_argument("--model", choices=SIZES, help="where --init does not say")
    p.model.add_argument("--patch-size", type=int, help="pixels; where --init does not say")
    p.schedule.add_argument("--betas", type=float, nargs=2, help="of AdamW")
    p.schedule.add_argument("--weight-decay", type=float)
    p.schedule.add_argument("--layer-decay", type=float, help="the lr of a block is the next one's times this")
    p.schedule.add_argument("--warmup-steps", type=int)
    p.model.add_argument("--drop-path", type=float, help="rate of the last block, rising from 0")
    p.model.add_argument("--layer-scale", type=float, help="initial value where --init does not say; 0: none")
    p.schedule.add_argument("--aux-weight", type=float, help="of the auxiliary head's loss")
    p.output.add_argument("--pictures", type=int, default=8, help="validation images that are drawn at each evaluation")
    p.hardware.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass: less memory")
    return runtime.parse(p, RECIPES, argv)


# ------------------------------------------------------------------------------------------------
# Data

def load_dataset(name, split, image_size, classes):
    """The data set of segment.py's --data: yields (PIL image, map of classes from 1, 0 is ignored) and has .classes."""
    if name.partition(":")[0] == "synthetic":
        return data.Scenes(split, data.synthetic_number(name, split), image_size, target="masks")
    return Ade20k(name, {"train": "training", "val": "validation"}[split], classes)


class Ade20k(Dataset):
    """ADE20K's layout: images/SPLIT/NAME.jpg, annotations/SPLIT/NAME.png of one channel, where 0 is ignored and the
    classes count from 1."""

    def __init__(self, root, split, classes):
        self.classes = [f"class {i}" for i in range(1, classes + 1)]
        images, annotations = data.subfolder(root, "images", split), data.subfolder(root, "annotations", split)
        files = sorted(file for file in images.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
        self.samples = [(file, annotations / f"{file.stem}.png") for file in files]
        missing = [annotation for _, annotation in self.samples if not annotation.exists()]
        if missing or not files:
            raise runtime.InputError(f"{missing[0]}: missing; each image has its annotation" if missing else
                                     f"{images}: no images in it")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, annotation = self.samples[index]
        image = Image.open(image)
        try:
            labels = np.array(Image.open(annotation))
        except (OSError, SyntaxError, ValueError) as error:
            raise runtime.InputError(f"{annotation}: not a readable image ({error}); restore or remove it") from error
        if labels.shape != image.size[::-1]:
            raise runtime.InputError(f"{annotation}: its shape is {labels.shape}, the image's {image.size[::-1]}")
        if labels.max() > len(self.classes):
            raise runtime.InputError(f"{annotation}: has class {labels.max()}; --classes is {len(self.classes)}")
        return image, tv_tensors.Mask(labels)


class VariedCrop(T.RandomCrop):
    """A random crop, drawn again, up to ten times, while one class has three quarters of it (mmsegmentation, so BEiT)."""

    def forward(self, *pair):
        for _ in range(10):
            image, labels = super().forward(*pair)
            counts = labels[labels > 0].unique(return_counts=True)[1]
            if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
                break
        return image, labels


def train_transform(size):
    """BEiT's (mmsegmentation's for ADE20K): the shorter side to 0.5…2 × size, crop, flip, photometric distortion, each
    kind at even odds. Labels as they are: 0 outside the image too. README says where it differs."""
    # its "brightness" adds up to 32 of 255; its "contrast" multiplies, which here is called brightness
    jitters = [T.ColorJitter(brightness=32 / 255), T.ColorJitter(brightness=0.5), T.ColorJitter(saturation=0.5),
               T.ColorJitter(hue=18 / 180)]
    crop = VariedCrop(size, pad_if_needed=True, fill={tv_tensors.Mask: 0, "others": 128})
    return data.Joint([T.RandomResize(size // 2, 2 * size), crop, T.RandomHorizontalFlip(),
                       *(T.RandomApply([jitter]) for jitter in jitters), T.ToPureTensor()])


def eval_transform(size):
    """The image's shorter side to size, its longer at most four times that (BEiT's 2048 × 512); labels stay as they are."""
    def transform(image, labels):
        short, long = sorted(image.size)
        scale = min(size / short, 4 * size / long)
        return T.functional.resize(image, [round(image.height * scale), round(image.width * scale)]), labels

    return data.Joint([transform, T.ToPureTensor()])


# ------------------------------------------------------------------------------------------------
# The network

def conv(inputs, outputs, kernel):
    """Convolution, norm, ReLU; GroupNorm of 16 channels a group for BEiT's SyncBatchNorm (our choice, as in ViTPyramid)."""
    return Conv2dNormActivation(inputs, outputs, kernel, norm_layer=lambda channels: nn.GroupNorm(channels // 16, channels))


def resize(x, size):
    return F.interpolate(x, size, mode="bilinear")


class UPerHead(nn.Module):
    """Pyramid pooling of the coarsest map, then a feature pyramid, all of it fused at the finest (UPerNet, sec. 3.1);
    mmsegmentation's form, with as many channels as the ViT is wide (BEiT)."""

    def __init__(self, dim, classes, scales=(1, 2, 3, 6)):
        super().__init__()
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv(dim, dim, 1)) for scale in scales)
        self.pooled = conv((1 + len(scales)) * dim, dim, 3)
        self.lateral = nn.ModuleList(conv(dim, dim, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv(dim, dim, 3) for _ in range(3))
        self.fuse = conv(4 * dim, dim, 3)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(dim, classes, 1))

    def forward(self, maps):                                                        # of ViTPyramid, (B, D, 4h, 4w) first
        coarsest = maps[3]                                                          # (B, D, h/2, w/2)
        pooled = [resize(pool(coarsest), coarsest.shape[2:]) for pool in self.pools]
        top = self.pooled(torch.cat([coarsest, *pooled], 1))
        pyramid = [top]
        for level in (2, 1, 0):                                                     # from coarse to fine
            top = self.lateral[level](maps[level]) + resize(top, maps[level].shape[2:])
            pyramid.append(self.smooth[level](top))
        fused = self.fuse(torch.cat([resize(x, maps[0].shape[2:]) for x in pyramid], 1))
        return self.classify(fused)                                                 # (B, classes, 4h, 4w)


class Segmenter(nn.Module):
    """Images (B, 3, H, W) → logits (B, classes, H, W); in training also those of an auxiliary head, an FCN of 256
    channels (BEiT) on the third map. vit: a VisionTransformer, or its arguments."""

    def __init__(self, vit, classes):
        super().__init__()
        vit = VisionTransformer(**vit) if isinstance(vit, dict) else vit
        dim = vit.cls_token.shape[-1]
        self.backbone, self.head = ViTPyramid(vit), UPerHead(dim, classes)
        self.aux = nn.Sequential(conv(dim, 256, 3), nn.Dropout2d(0.1), nn.Conv2d(256, classes, 1))

    def forward(self, images):
        vit, (height, width) = self.backbone.vit, images.shape[2:]
        padded = [n * vit.patch_size for n in vit.grid_of(images)]                  # to whole patches
        maps = self.backbone(images)
        heads = [self.head(maps), self.aux(maps[2])] if self.training else [self.head(maps)]
        logits = [resize(x.float(), padded)[..., :height, :width] for x in heads]   # fp32, as in mmsegmentation
        return logits if self.training else logits[0]


def pixel_loss(logits, labels):
    """Cross-entropy; pixels of label 0 have none, but count in the mean (mmsegmentation, so BEiT)."""
    return F.cross_entropy(logits, labels.long() - 1, ignore_index=-1, reduction="sum") / labels.numel()


def build(args, classes):
    """The network that --init asks for → (model, its arguments, digest of --init)."""
    if args.eval:
        state = runtime.load_checkpoint(args.init, ["segment"])
        if state["model_args"]["classes"] != classes:
            raise runtime.InputError(f"--init {args.init}: has {state['model_args']['classes']} classes, --data {args.data} {classes}")
        model = Segmenter(**state["model_args"])
        model.load_state_dict(state["model"])
        return model, state["model_args"], state["digest"]
    state = runtime.load_checkpoint(args.init) if args.init != "none" else {}
    own = dict(SIZES[args.model], patch_size=args.patch_size, positions="block", layer_scale=args.layer_scale)
    vit, own, _ = transfer(f"--init {args.init}", state, own, image_size=args.image_size, drop_path=args.drop_path, classes=0)
    return Segmenter(vit, classes), dict(vit=own, classes=classes), state.get("digest")


def schedule(step, total, warmup, peak):
    """Linear decay to 0 (poly of power 1), times a linear warm-up (BEiT)."""
    return peak * (1 - step / total) * min(1.0, (step + 1) / max(warmup, 1))


# ------------------------------------------------------------------------------------------------
# Evaluation

def slide(model, images, size):
    """Logits of windows of `size` pixels, two thirds of it apart (BEiT: 341 of 512), averaged where they overlap."""
    height, width = images.shape[2:]
    tops, lefts = ([min(start, max(n - size, 0)) for start in range(0, max(n - size, 0) + size * 2 // 3, size * 2 // 3)]
                   for n in (height, width))
    places = [(..., slice(top, top + size), slice(left, left + size)) for top in tops for left in lefts]
    windows = [model(images[place]) for place in places]                            # (B, classes, size, size) each
    total, count = windows[0].new_zeros(*windows[0].shape[:2], height, width), windows[0].new_zeros(height, width)
    for place, logits in zip(places, windows):
        total[place] += logits
        count[place] += 1
    return total / count


def confusion_matrix(predicted, labels, classes):
    """Pixels of each true class (row) and predicted class (column); both count from 1, true 0 is ignored."""
    kept = labels > 0
    pairs = (labels[kept].long() - 1) * classes + predicted[kept].long() - 1
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def scores(confusion):
    """In %: IoU and accuracy of each class (NaN where it is absent), then mIoU, mean and pixel accuracy."""
    hits, truth, predicted = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    iou, accuracy = 100 * hits / (truth + predicted - hits), 100 * hits / truth
    return iou, accuracy, dict(miou=iou.nanmean().item(), mean_accuracy=accuracy.nanmean().item(),
                               pixel_accuracy=(100 * hits.sum() / truth.sum()).item())


def draw(images, labels, predicted, classes, path):
    """Image, truth and prediction side by side."""
    image = ((resize(images, labels.shape[1:])[0] + 1) * 127.5).clamp(0, 255).byte().cpu()
    numbers = torch.arange(1, classes + 1)[:, None, None]
    painted = [draw_segmentation_masks(image, one.cpu() == numbers, alpha=0.6, colors=data.palette(classes))
               for one in (labels[0], predicted[0])]
    save_image(torch.cat([image, *painted], 2) / 255, path)


@torch.no_grad()
def evaluate(args, model, dataset, device):
    """Scores over every validation image at its own size, counted once whatever the number of ranks; a table of the
    classes and pictures in --output."""
    model.eval()
    classes, autocast, folder = len(dataset.classes), runtime.autocast(args, device), Path(args.output)
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    loader = data.eval_loader(dataset, eval_transform(args.image_size), 1, args.workers)
    for number, (images, labels) in enumerate(loader):
        images, labels = images.to(device), labels.to(device)
        with autocast:
            logits = slide(model, images, args.image_size) if args.eval_mode == "slide" else model(images)
        predicted = resize(logits, labels.shape[1:]).argmax(1) + 1
        confusion += confusion_matrix(predicted, labels, classes)
        index = runtime.rank() + number * runtime.world_size()                      # eval_loader's order
        if index < args.pictures:
            draw(images, labels, predicted, classes, folder / f"picture-{index}.png")
    if dist.is_initialized():
        dist.all_reduce(confusion)
    model.train()
    iou, accuracy, row = scores(confusion)
    if runtime.rank() == 0:
        lines = [f"| {name} | {i:.1f} | {a:.1f} |\n" for name, i, a in zip(dataset.classes, iou, accuracy)]
        (folder / "classes.md").write_text("| class | IoU | accuracy |\n| --- | --- | --- |\n" + "".join(lines))
    return dict(row, images=len(dataset))


# ------------------------------------------------------------------------------------------------

def main(args):
    device, micro_batch = runtime.device(), runtime.micro_batch(args)
    val = load_dataset(args.data, "val", args.image_size, args.classes)
    torch.manual_seed(args.seed)
    model, model_args, args.init_digest = build(args, len(val.classes))
    model.to(device)
    if args.eval:
        runtime.make_folder(args)
        return runtime.report(args, evaluate(args, model, val, device), init=args.init, split="val")
    model.backbone.vit.checkpoint_activations = args.checkpoint_activations
    dataset = load_dataset(args.data, "train", args.image_size, args.classes)
    epoch_steps, steps = runtime.total_steps(args, len(dataset))
    groups = param_groups(model, args.weight_decay, args.layer_decay, vit="backbone.vit")
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)
    modules = dict(model=model)
    start, best, pending = runtime.resume(args, modules, optimizer)

    loader = data.TrainLoader(dataset, train_transform(args.image_size), args, micro_batch, start, steps, device)
    if args.compile:
        model.compile()
    network, autocast, caught = runtime.distribute(model, device), runtime.autocast(args, device), runtime.catch_signals()

    def validate():
        row = evaluate(args, model, val, device)
        runtime.log(args, step=done, epoch=done / epoch_steps, split="val", **row)
        return row["miou"]

    done = start
    if pending:                                                     # the run was stopped before it was evaluated
        best = runtime.checkpoint(args, done, steps, epoch_steps, 0, modules, optimizer, model_args, validate, best)
    batches, spent, seen, sums = iter(loader), 0.0, 0, {}
    for step in tqdm(range(start, steps), initial=start, total=steps, disable=None if runtime.rank() == 0 else True):
        begun = time.time()
        lr = schedule(step, steps, args.warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        micro_batches = [next(batches) for _ in range(args.accumulate)]
        torch.manual_seed(runtime.derive_seed(args.seed, step, runtime.rank()))    # dropout, drop path
        terms = {}
        for i, (images, labels) in enumerate(micro_batches):                        # labels (B, H, W)
            network.require_backward_grad_sync = i == args.accumulate - 1          # DDP: all-reduce at the step's end
            with autocast:
                logits, aux_logits = network(images)                                # (B, classes, H, W)
            main_loss, aux_loss = pixel_loss(logits, labels), pixel_loss(aux_logits, labels)
            loss = main_loss + args.aux_weight * aux_loss
            (loss / args.accumulate).backward()
            for name, term in dict(loss=loss, main=main_loss, aux=aux_loss).items():
                terms[name] = terms.get(name, 0.0) + term.detach() / args.accumulate
        terms["grad_norm"] = nn.utils.get_total_norm([p.grad for p in model.parameters()])  # BEiT does not clip here
        terms, stopped = runtime.check_step(step, terms, caught, device, loader.samples)
        optimizer.step()
        optimizer.zero_grad()

        sums, seen, done = {k: sums.get(k, 0.0) + v for k, v in terms.items()}, seen + 1, step + 1
        spent += time.time() - begun                                # without evaluations and checkpoints
        if done % args.log_every == 0 or done == steps:
            runtime.log(args, step=done, epoch=done / epoch_steps, **{k: v / seen for k, v in sums.items()}, lr=lr,
                        images_per_s=seen * args.batch_size / spent)
            spent, seen, sums = 0.0, 0, {}
        best = runtime.checkpoint(args, done, steps, epoch_steps, stopped, modules, optimizer, model_args, validate, best)


if __name__ == "__main__":
    runtime.launch(main, get_args())
