"""Stage 3b: semantic segmentation. UPerNet (1807.10221) on a pre-trained ViT (PeCo, supplement).

    python segment.py --recipe demo
    torchrun --nproc-per-node 8 segment.py
    python segment.py --eval --init runs/paper/segment

PeCo trains with mmsegmentation, as BEiT does: what PeCo does not say is BEiT's.
"""
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import Conv2dNormActivation as ConvNormReLU
from torchvision.transforms import v2 as T
from torchvision.utils import draw_segmentation_masks, save_image

import data
from model import VisionTransformer, ViTPyramid, param_groups
from support import checkpoint, flags, launch, recipes, weights
from support import run as logbook
from support.flags import amount, count, within
from support.launch import InputError
from support.run import Run
from support.scenes import Scenes, palette, synthetic_number

PAPER = dict(
    data="data/ade20k",         # ADE20K [PeCo]
    classes=150,                # ADE20K's
    init="runs/paper/pretrain",
    image_size=512,             # [PeCo]
    model="base",               # ViT-B [PeCo, Table 3]
    patch_size=16,              # [PeCo]
    drop_path=0.2,              # [PeCo]
    layer_scale=0.0,            # [PeCo]: the original ViT has none
    aux_weight=0.4,             # [BEiT]
    batch_size=16,              # [PeCo]
    steps=160_000,              # [PeCo]
    warmup_steps=1500,          # [PeCo]
    lr=3e-4,                    # [PeCo]; a linear decay to 0 [PeCo]
    layer_decay=0.65,           # [PeCo]
    betas=[0.9, 0.999],         # [BEiT]
    weight_decay=0.05,          # [PeCo]
    save_every=12,              # our choice: 15,156 steps
)
RECIPES = recipes.of("segment", PAPER)
UNLABELLED = 255                # in an annotation, as 0 [mmsegmentation], of under 255 classes
PICTURES = 8                    # images saved at each evaluation; our choice


def get_args(argv=None):
    p = flags.parser("segment", __doc__)
    p.add_argument("--eval", action="store_true", help="only evaluate --init")
    p.add_argument("--classes", type=within(int, "[1, 10000]"),
                   help="number of classes of a folder; 0 is ignored")
    p.add_argument("--aux-weight", type=amount, help="weight of the auxiliary head's loss")
    p.add_argument("--warmup-steps", type=count, help="steps of linear warm-up of the lr")
    weights.add_arguments(p, also="none: from scratch; with --eval: a run of segment.py")
    data.add_arguments(p, augment=False, layout="synthetic[:IMAGES], or a folder in ADE20K's "
                                                "layout: images/ and annotations/")
    return flags.parse(p, RECIPES, argv)


# ------------------------------------------------------------------------------------------------
# Data: (PIL image, map of classes (H, W)). Classes count from 1; pixels of 0 are ignored.

def load_dataset(name, split, image_size, classes):
    """The dataset of --data for "train" or "val". image_size: of scenes; classes: of a folder."""
    if name.partition(":")[0] == "synthetic":
        return Scenes(split, synthetic_number(name, split), image_size, target="masks")
    return Ade20k(name, dict(train="training", val="validation")[split], classes)


class Ade20k(Dataset):
    """ADE20K's layout: images/SPLIT/NAME.jpg, annotations/SPLIT/NAME.png of one channel."""

    def __init__(self, root, split, classes):
        self.classes = [f"class {i}" for i in range(1, classes + 1)]
        images = data.subfolder(root, "images", split)
        annotations = data.subfolder(root, "annotations", split)
        self.samples = [(file, annotations / f"{file.stem}.png")
                        for file in sorted(images.iterdir()) if data.is_image(file)]
        if not self.samples:
            raise InputError(f"{images}: no images in it")
        for _, annotation in self.samples:
            if not annotation.exists():
                raise InputError(f"{annotation}: missing; each image has its annotation")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        file, annotation = self.samples[index]
        image = data.decode(file)
        try:
            labels = np.array(Image.open(annotation))
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(
                f"{annotation}: not a readable image ({error}); restore or remove it") from error
        if labels.dtype == np.uint16:
            labels = labels.astype(np.int32)                # which PyTorch can compare
        if len(self.classes) < UNLABELLED:
            labels[labels == UNLABELLED] = 0
        if labels.shape != image.size[::-1]:
            raise InputError(
                f"{annotation}: its shape is {labels.shape}, the image's {image.size[::-1]}")
        if labels.max() > len(self.classes):
            raise InputError(
                f"{annotation}: has class {labels.max()}; --classes is {len(self.classes)}")
        return image, tv_tensors.Mask(labels)


def check_classes(args, split, dataset, number=100):
    """Say which classes occur in about `number` images (our choice): a wrong convention shows."""
    some = range(0, len(dataset), max(1, len(dataset) // number))
    found = sorted(set().union(*[dataset[index][1].unique().tolist() for index in some]) - {0})
    if not found:
        raise InputError(f"--data {args.data}: every pixel of its {split} annotations is 0, which "
                         "is ignored: classes count from 1")
    if launch.rank() == 0:
        launch.say(f"{split}: {len(found)} of {len(dataset.classes)} classes occur, "
                   f"{found[0]} to {found[-1]}")
        if len(found) == 1:
            launch.warn(f"--data {args.data}: one class alone in {split}, nothing to learn: 0 is "
                        "ignored, so write masks of 0 and 1 as 1 and 2")


class VariedCrop(T.RandomCrop):
    """A random crop, drawn again up to nine times where a class has ¾ of it [mmsegmentation]."""

    def forward(self, *pair):
        for _ in range(10):
            image, labels = super().forward(*pair)
            counts = labels[labels > 0].unique(return_counts=True)[1]
            if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
                break
        return image, labels


def rescale(image, size):
    """A PIL image with its shorter side at size, its longer side at most four times that [BEiT].

    EXTENT is bilinear without antialiasing, as in mmsegmentation; PIL's own resize antialiases.
    """
    short, long = sorted(image.size)
    scale = min(size / short, 4 * size / long)
    shape = [max(1, round(side * scale)) for side in image.size]
    whole = (0, 0, *image.size)
    return image.transform(shape, Image.Transform.EXTENT, whole, Image.Resampling.BILINEAR)


def train_transform(size):
    """[mmsegmentation] Shorter side to ½ … 2 × size, crop, flip, each distortion at even odds."""
    def random_rescale(image, labels):
        image = rescale(image, int(torch.randint(size // 2, 2 * size, ())))
        return image, T.functional.resize(labels, [image.height, image.width])

    # Its brightness adds up to 32 of 255; its contrast multiplies by 0.5 to 1.5, without the mean.
    distortions = [T.ColorJitter(brightness=32 / 255), T.ColorJitter(brightness=0.5),
                   T.ColorJitter(saturation=0.5), T.ColorJitter(hue=18 / 180)]
    return T.Compose([
        random_rescale,
        VariedCrop(size, pad_if_needed=True, fill={tv_tensors.Mask: 0, "others": 128}),
        T.RandomHorizontalFlip(),
        *[T.RandomApply([distortion]) for distortion in distortions],
        T.ToPureTensor(), data.to_pixels])


def eval_transform(size):
    """The image at size; labels keep theirs, to which evaluate() resizes the logits."""
    return T.Compose([
        lambda image, labels: (rescale(image, size), labels), T.ToPureTensor(), data.to_pixels])


# ------------------------------------------------------------------------------------------------
# The network

def resize(x, size):
    return F.interpolate(x, size, mode="bilinear")


class UPerHead(nn.Module):
    """Pyramid pooling of the coarsest map, a feature pyramid, their fusion (UPerNet, sec. 3.1).

    ViTPyramid's four maps → logits (B, classes, 4h, 4w). All maps are as wide as the ViT [BEiT].
    """

    def __init__(self, dim, classes):
        super().__init__()
        self.pools = nn.ModuleList(                         # PSPNet's sides, which UPerNet takes
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvNormReLU(dim, dim, 1))
            for side in (1, 2, 3, 6))
        self.pooled = ConvNormReLU((1 + len(self.pools)) * dim, dim, 3)
        self.lateral = nn.ModuleList(ConvNormReLU(dim, dim, 1) for _ in range(3))
        self.smooth = nn.ModuleList(ConvNormReLU(dim, dim, 3) for _ in range(3))
        self.fuse = ConvNormReLU(4 * dim, dim, 3)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(dim, classes, 1))

    def forward(self, maps):
        coarsest = maps[3]                                                      # (B, D, h/2, w/2)
        pooled = [resize(pool(coarsest), coarsest.shape[2:]) for pool in self.pools]
        top = self.pooled(torch.cat([coarsest, *pooled], 1))
        pyramid = [top]
        for level in (2, 1, 0):                             # from coarse to fine
            top = self.lateral[level](maps[level]) + resize(top, maps[level].shape[2:])
            pyramid.append(self.smooth[level](top))
        finest = [resize(x, maps[0].shape[2:]) for x in pyramid]                # (B, D, 4h, 4w)
        return self.classify(self.fuse(torch.cat(finest, 1)))


class Segmenter(nn.Module):
    """Images (B, 3, H, W) → logits (B, classes, H, W), and in training the auxiliary head's.

    The auxiliary head is an FCN of 256 channels on the third map [BEiT].
    """

    def __init__(self, vit, classes):
        super().__init__()
        dim = vit.cls_token.shape[-1]
        self.backbone = ViTPyramid(vit)
        self.head = UPerHead(dim, classes)
        self.aux = nn.Sequential(
            ConvNormReLU(dim, 256, 3), nn.Dropout2d(0.1), nn.Conv2d(256, classes, 1))

    def forward(self, images):
        maps = self.backbone(images)
        logits = self.to_pixels(self.head(maps), images)
        if not self.training:
            return logits
        return logits, self.to_pixels(self.aux(maps[2]), images)

    def to_pixels(self, logits, images):
        """Logits of a map → of the images' pixels; the ViT has padded them to whole patches."""
        vit = self.backbone.vit
        padded = [patches * vit.patch_size for patches in vit.grid_of(images)]
        logits = resize(logits.float(), padded)             # in fp32, as mmsegmentation's
        return logits[..., :images.shape[2], :images.shape[3]]


def pixel_loss(logits, labels):
    """Cross-entropy of logits (B, classes, H, W) and labels (B, H, W), averaged over all pixels.

    Those of label 0 add nothing, but count in the mean [mmsegmentation].
    """
    total = F.cross_entropy(logits, labels.long() - 1, ignore_index=-1, reduction="sum")
    return total / labels.numel()


def build(args, classes, state):
    """The network on the ViT of a checkpoint's contents (None: from scratch), and its arguments."""
    vit, vit_args, _ = weights.begin(args, state, args.image_size)
    return Segmenter(vit, classes), dict(vit=vit_args, classes=classes)


def load(args, classes):
    """The network of a run of segment.py, which is --init."""
    state = weights.read_own(args, classes)
    with checkpoint.built_from(f"--init {args.init}"):
        model = Segmenter(VisionTransformer(**state["model_args"]["vit"]), classes)
        model.load_state_dict(state["model"])
    return model


def schedule(step, total, warmup, peak):
    """Linear decay to 0, times a linear warm-up of so many steps [PeCo]."""
    return peak * (1 - step / total) * min(1.0, (step + 1) / max(warmup, 1))


# ------------------------------------------------------------------------------------------------
# Evaluation

def slide(model, images, size):
    """Logits of images (B, 3, H, W) by windows of `size` pixels, averaged where they overlap."""
    height, width = images.shape[2:]
    total = count = None
    for top in window_starts(height, size):
        for left in window_starts(width, size):
            place = (..., slice(top, top + size), slice(left, left + size))
            logits = model(images[place])                                       # (B, classes, ·, ·)
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
                count = logits.new_zeros(height, width)
            total[place] += logits
            count[place] += 1
    return total / count                                                        # (B, classes, H, W)


def window_starts(length, size):
    """Where windows begin: two thirds of a window apart [BEiT: 341 of 512], the last at the end."""
    stride, last = size * 2 // 3, max(length - size, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def confusion_matrix(predicted, labels, classes):
    """Pixels of each true class (row) and predicted class (column); both count from 1."""
    kept = labels > 0
    pairs = (labels[kept].long() - 1) * classes + predicted[kept].long() - 1
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def scores(confusion):
    """IoU and accuracy of each class, and a dict of their means, all in %.

    NaN for classes that never occur; the means skip them.
    """
    hits, truth, predicted = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    iou = 100 * hits / (truth + predicted - hits)
    accuracy = 100 * hits / truth
    means = dict(miou=iou.nanmean().item(), mean_accuracy=accuracy.nanmean().item(),
                 pixel_accuracy=(100 * hits.sum() / truth.sum()).item())
    return iou, accuracy, means


@torch.no_grad()
def evaluate(args, model, dataset, device):
    """The scores over all validation images, each at its own size and counted once over all ranks.

    It also writes pictures of the first ones and a table, classes.md, into args.output.
    """
    model.eval()
    launch.broadcast_buffers(model)
    folder, classes = Path(args.output), len(dataset.classes)
    autocast = launch.autocast(args, device)
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    loader = data.eval_loader(dataset, eval_transform(args.image_size), 1, args.workers)
    # batch_sampler: of each batch its (epoch, index) pairs
    for [(_, index)], (image, labels) in zip(loader.batch_sampler, loader, strict=True):
        image, labels = image.to(device), labels.to(device)         # (1, 3, ·, ·), (1, H, W)
        with autocast:
            logits = slide(model, image, args.image_size)
        predicted = resize(logits, labels.shape[1:]).argmax(1) + 1              # (1, H, W)
        confusion += confusion_matrix(predicted, labels, classes)
        if index < PICTURES:
            save_picture(image, labels, predicted, classes, folder / f"picture-{index}.png")
    if dist.is_initialized():
        dist.all_reduce(confusion)
    model.train()

    iou, accuracy, row = scores(confusion)
    if launch.rank() == 0:
        table = "| class | IoU | accuracy |\n| --- | --- | --- |\n"
        for name, i, a in zip(dataset.classes, iou, accuracy, strict=True):
            table += f"| {name} | {i:.1f} | {a:.1f} |\n"
        (folder / "classes.md").write_text(table, encoding="utf-8")
    return dict(row, images=len(dataset))


def save_picture(image, labels, predicted, classes, path):
    """Write image, truth and prediction side by side."""
    image = resize(image, labels.shape[1:])[0]                                  # (3, H, W)
    image = ((image + 1) * 127.5).clamp(0, 255).byte().cpu()
    numbers = torch.arange(1, classes + 1).view(-1, 1, 1)
    pictures = [image]
    for one in (labels, predicted):
        masks = one.cpu() == numbers                                            # (classes, H, W)
        pictures.append(draw_segmentation_masks(image, masks, 0.6, palette(classes)))
    save_image(torch.cat(pictures, 2) / 255, path)


# ------------------------------------------------------------------------------------------------

@launch.cleans_up
def main(args):
    device = launch.device()
    val = load_dataset(args.data, "val", args.image_size, args.classes)
    classes = len(val.classes)
    if args.eval:
        model = load(args, classes).to(device)
        logbook.make_folder(args.output)                    # for the pictures
        row = evaluate(args, model, val, device)
        return logbook.report(args, row, init=args.init, split="val")

    # The model, from a checkpoint; its digest is compared on resuming: another is another start.
    torch.manual_seed(args.seed)
    state, digest = weights.read(args)
    model, model_args = build(args, classes, state)
    model = launch.sync_batch_norm(model.to(device), device)
    if launch.micro_batch(args) == 1 and not (device.type == "cuda" and launch.world_size() > 1):
        raise InputError(f"--batch-size {args.batch_size}: batch norm after the pooling to 1 × 1 "
                         "needs micro-batches of two images or more")
    groups = param_groups(model, args.weight_decay, args.layer_decay, vit="backbone.vit")
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)

    # The data
    dataset = load_dataset(args.data, "train", args.image_size, args.classes)
    transform = train_transform(args.image_size)
    for split, one in (("training", dataset), ("validation", val)):
        check_classes(args, split, one)

    # The run: a new one, or from where it stopped
    run = Run(args, optimizer, model_args, modules=dict(model=model),
              identity=dict(images=len(dataset), init=digest))
    batches = data.train_batches(dataset, transform, args, run.start, run.steps, device)
    if args.compile:
        model.compile()
    network = launch.ddp(model)
    autocast = launch.autocast(args, device)

    for step in run.progress():
        if run.due(step):
            run.save(step)
            row = evaluate(args, model, val, device)
            run.log_evaluation(step, split="val", **row)
            run.keep_best(step, row["miou"])
        if step == run.steps:
            break

        lr = schedule(step, run.steps, args.warmup_steps, args.lr)
        launch.set_lr(optimizer, lr)
        batch = next(batches)
        run.seed(step)                                      # dropout, drop path
        for images, labels in run.micro_batches(batch, network):               # labels (B, H, W)
            with autocast:
                logits, aux_logits = network(images)                            # (B, classes, H, W)
            main_loss = pixel_loss(logits, labels)
            aux_loss = pixel_loss(aux_logits, labels)
            loss = main_loss + args.aux_weight * aux_loss
            (loss / args.accumulate).backward()
            run.add(loss=loss, main=main_loss, aux=aux_loss)
        gradients = [p.grad for p in model.parameters()]
        run.add(grad_norm=nn.utils.get_total_norm(gradients))       # BEiT does not clip here
        run.agree()
        optimizer.step()
        optimizer.zero_grad()
        run.log(step + 1, lr=lr)


if __name__ == "__main__":
    launch.start(main, get_args())
