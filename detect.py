"""Stage 3c: detection and instance masks. Mask R-CNN on a pre-trained ViT (PeCo, supplement).

    python detect.py --recipe demo
    torchrun --nproc-per-node 8 detect.py
    python detect.py --eval --init runs/paper/detect

PeCo trains with mmdetection. Here proposals, heads and losses are torchvision's, and COCO's own
evaluation measures AP (pip install pycocotools).
"""
import contextlib
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms import v2 as T
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image

import data
from model import VisionTransformer, ViTPyramid, param_groups
from support import checkpoint, flags, launch, recipes, weights
from support import run as logbook
from support.flags import count, within
from support.launch import InputError
from support.run import Run
from support.scenes import Scenes, instances, palette, synthetic_number

try:
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:             # optional (requirements-extra.txt); main() asks for it
    COCO = None

PAPER = dict(
    data="data/coco",           # COCO 2017 [PeCo]
    init="runs/paper/pretrain",
    image_size=800,             # of the shorter side: a single scale [PeCo]
    max_size=1333,              # of the longer one at most [PeCo]
    model="base",               # ViT-B [PeCo, Table 3]
    patch_size=16,              # [PeCo]
    drop_path=0.1,              # [PeCo]
    layer_scale=0.0,            # [PeCo]: the original ViT has none
    channels=256,               # [mmdetection]
    boxes=512,                  # [mmdetection]
    batch_size=16,              # [PeCo]
    epochs=12,                  # [PeCo]
    warmup_steps=500,           # [mmdetection]
    lr=4e-4,                    # [PeCo]; × 0.1 at epochs 8 and 11 [PeCo]
    layer_decay=0.75,           # [PeCo]
    betas=[0.9, 0.999],         # our choice: PyTorch's
    weight_decay=0.05,          # [PeCo]
)
RECIPES = recipes.of("detect", PAPER)
PICTURES = 8                    # images saved at each evaluation; our choice


def get_args(argv=None):
    p = flags.parser("detect", __doc__)
    p.add_argument("--eval", action="store_true", help="only evaluate --init")
    p.add_argument("--max-size", type=within(int, "[1, 8192]"),
                   help="largest longer side, pixels; --image-size is the shorter one")
    p.add_argument("--channels", type=within(int, "[1, 4096]"),
                   help="channels of the feature pyramid and the heads")
    p.add_argument("--boxes", type=within(int, "[4, inf)"),       # a quarter are of objects
                   help="boxes sampled of an image in training, to classify")
    p.add_argument("--warmup-steps", type=count, help="steps of linear warm-up of the lr")
    weights.add_arguments(p, also="none: from scratch; with --eval: a run of detect.py")
    data.add_arguments(p, augment=False, layout="synthetic[:IMAGES], or a folder in COCO's layout: "
                                                "train2017/, val2017/, annotations/")
    return flags.parse(p, RECIPES, argv)


# ------------------------------------------------------------------------------------------------
# Data: (PIL image, target), as scenes.instances makes it. Labels count from 1.

def load_dataset(name, split, image_size):
    """The dataset of --data for a split, "train" or "val"; image_size: pixels, of drawn scenes.

    Its .classes are their names; .ids and .category_ids are those of COCO's files.
    """
    if name.partition(":")[0] == "synthetic":
        return Scenes(split, synthetic_number(name, split), image_size, target="instances")
    folder = data.subfolder(name, f"{split}2017")
    file = Path(name, "annotations", f"instances_{split}2017.json")
    if not file.exists():
        raise InputError(
            f"--data {name}: it has no annotations/{file.name}; see the README for the layout")
    return Coco(folder, file)


class Coco(Dataset):
    """COCO's instances. Labels leave no gaps, as category ids do; crowds are left out."""

    def __init__(self, folder, file):
        try:
            with quiet():
                self.coco = COCO(file)
            self.ids, self.category_ids = sorted(self.coco.imgs), sorted(self.coco.cats)
            self.classes = [self.coco.cats[i]["name"] for i in self.category_ids]
            self.samples = [(Path(folder, self.coco.imgs[i]["file_name"]), i) for i in self.ids]
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise InputError(f"{file}: not COCO's format of instances "
                             f"({type(error).__name__}: {error})") from error
        self.coco.dataset.setdefault("info", {})            # pycocotools 2.0.10 asks for it
        for annotation in self.coco.anns.values():
            outline, box = annotation.get("segmentation"), annotation.get("bbox")
            if isinstance(outline, list):                   # two points enclose nothing
                outline = [polygon for polygon in outline if len(polygon) >= 6]
                annotation["segmentation"] = outline
            fits = dict(
                category_id=annotation.get("category_id") in self.coco.cats,
                bbox=isinstance(box, list) and len(box) == 4 and None not in box,
                area=isinstance(annotation.get("area"), (int, float)),
                segmentation=bool(outline))
            for name in fits:
                if not fits[name]:
                    raise InputError(f"{file}: annotation {annotation['id']}: its {name} is "
                                     "missing or of no use: mend it or take it out")

    def __len__(self):
        return len(self.samples)

    def objects(self, index):
        """The annotations of an image, without crowds."""
        return [a for a in self.coco.imgToAnns[self.ids[index]] if not a.get("iscrowd")]

    def with_objects(self):
        """Indices of the images that have any."""
        return [index for index in range(len(self)) if self.objects(index)]

    def __getitem__(self, index):
        image = data.decode(self.samples[index][0])
        objects = self.objects(index)
        boxes = torch.tensor([a["bbox"] for a in objects]).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]        # left, top, width, height → left, top, right, bottom
        labels = [self.category_ids.index(a["category_id"]) + 1 for a in objects]
        masks = np.zeros((len(objects), image.height, image.width), np.uint8)
        for i, annotation in enumerate(objects):
            masks[i] = self.coco.annToMask(annotation)
        return image, instances(boxes, torch.tensor(labels).long(), torch.from_numpy(masks))


def quiet():
    """pycocotools prints its progress and tables: not into ours."""
    return contextlib.redirect_stdout(None)


def transform(train):
    """A flip in training; boxes are cut to the image. The network itself resizes [torchvision]."""
    return T.Compose([T.RandomHorizontalFlip(0.5 if train else 0.0), T.ClampBoundingBoxes(),
                      T.SanitizeBoundingBoxes(), T.ToPureTensor(), data.to_pixels])


# ------------------------------------------------------------------------------------------------
# The network

class Backbone(nn.Module):
    """A feature pyramid (FPN, 1612.03144) over ViTPyramid's four maps.

    Images (B, 3, H, W) → five maps (B, channels, ·, ·), at ×4, ×2, ×1, ×½, ×¼ of the ViT's grid.

    autocast: the context of this part alone; what follows is in fp32. torchvision makes boxes in
    the maps' dtype, and bf16 would round a coordinate above 512 to a multiple of 4.
    """

    def __init__(self, vit, channels):
        super().__init__()
        dim = vit.cls_token.shape[-1]
        self.pyramid = ViTPyramid(vit)
        self.fpn = FeaturePyramidNetwork([dim] * 4, channels, LastLevelMaxPool())
        self.out_channels = channels                        # asked for by MaskRCNN
        self.autocast = contextlib.nullcontext()

    def forward(self, images):
        with self.autocast:
            maps = dict(zip("0123", self.pyramid(images), strict=True))     # torchvision's names
            maps = self.fpn(maps)                           # and "pool", half of "3"
        return {name: x.float() for name, x in maps.items()}


def mask_rcnn(vit, classes, channels, boxes, size, max_size):
    """torchvision's Mask R-CNN on a ViT.

    In training: lists of images (3, H, W) and targets → a dict of losses. Else: images → their
    detections, in their own pixels.

    channels: of pyramid and heads; boxes: sampled from an image in training; size, max_size: of the
    shorter side and of the longer, pixels. torchvision's own values are 256 channels, 512 boxes.
    """
    patch = vit.patch_size
    if patch & (patch - 1):
        raise InputError(f"a ViT of patches of {patch} pixels: detection needs 2, 4, 8, 16 or 32, "
                         "since RoIAlign takes the maps' strides for powers of two [torchvision]")
    # Sides of the anchors on each map, pixels: eight times its stride [torchvision]
    anchors = tuple((2 * patch * 2 ** level,) for level in range(5))
    return MaskRCNN(
        Backbone(vit, channels),
        min_size=size,
        max_size=max_size,
        size_divisible=2 * patch,                           # whole positions of the map at ×½
        image_mean=[0.0] * 3, image_std=[1.0] * 3,          # pixels come in [-1, 1]
        rpn_anchor_generator=AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * 5),
        box_batch_size_per_image=boxes,
        box_head=TwoMLPHead(channels * 7 ** 2, 4 * channels),
        box_predictor=FastRCNNPredictor(4 * channels, classes + 1),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1))


def build(args, classes, state):
    """The network on the ViT of a checkpoint's contents (None: from scratch), and its arguments."""
    # A ViT is made for whole patches. Another project's file has no model_args.
    stored = (state or {}).get("model_args", {})
    patch = stored.get("patch_size", args.patch_size)
    whole = math.ceil(args.image_size / patch) * patch      # pixels
    vit, vit_args, _ = weights.begin(args, state, whole)
    rest = dict(classes=classes, channels=args.channels, boxes=args.boxes,
                size=args.image_size, max_size=args.max_size)
    return mask_rcnn(vit, **rest), dict(vit=vit_args, **rest)


def load(args, classes):
    """The network of a run of detect.py, which is --init, for images of --image-size."""
    state = weights.read_own(args, classes)
    arguments = state["model_args"] | dict(size=args.image_size, max_size=args.max_size)
    vit_args = arguments.pop("vit")
    with checkpoint.built_from(f"--init {args.init}"):
        model = mask_rcnn(VisionTransformer(**vit_args), **arguments)
        model.load_state_dict(state["model"])
    return model


def schedule(step, total, warmup, peak):
    """Linear warm-up; × 0.1 at epoch 8 and again at 11, of 12 [PeCo], of as many parts else."""
    lr = peak * min(1.0, (step + 1) / max(warmup, 1))
    for epoch in (8, 11):
        if 12 * step >= epoch * total:
            lr *= 0.1
    return lr


# ------------------------------------------------------------------------------------------------
# Evaluation

def ground_truth(dataset):
    """The dataset in pycocotools' form."""
    if hasattr(dataset, "coco"):
        return dataset.coco
    annotations = []
    for index, image_id in enumerate(dataset.ids):
        target = dataset[index][1]
        found = dict(target, scores=target["labels"], masks=target["masks"][:, None])
        for one in as_results(found, image_id, dataset.category_ids):
            area = int(rle.area(one["segmentation"]))
            annotations.append(dict(one, id=len(annotations) + 1, area=area, iscrowd=0))
    images = [dict(id=i, height=dataset.size, width=dataset.size) for i in dataset.ids]
    categories = [dict(id=i) for i in dataset.category_ids]
    coco = COCO()                                           # "info": as above
    coco.dataset = dict(info={}, images=images, annotations=annotations, categories=categories)
    with quiet():
        coco.createIndex()
    return coco


def as_results(detections, image_id, category_ids):
    """The detections of an image in COCO's format of results."""
    corners = detections["boxes"].cpu()                     # left, top, right, bottom
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    masks = detections["masks"][:, 0] >= 0.5                                    # (n, H, W)
    masks = masks.permute(1, 2, 0).byte().cpu().numpy()                         # (H, W, n)
    masks = rle.encode(np.asfortranarray(masks))
    labels, scores = detections["labels"].tolist(), detections["scores"].tolist()
    return [dict(image_id=image_id, category_id=category_ids[label - 1], score=score,
                 bbox=box, segmentation=mask)
            for box, mask, label, score in zip(boxes, masks, labels, scores, strict=True)]


def average_precision(truth, results):
    """COCO's AP, AP at IoU 0.5 and at 0.75, of boxes and of masks, in %."""
    row = {}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        stats = [0.0, 0.0, 0.0]
        if results:
            with quiet():
                own = truth.loadRes([dict(result) for result in results])       # it changes them
                evaluation = COCOeval(truth, own, kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            stats = evaluation.stats[:3].tolist()
        for suffix, value in zip(("", "50", "75"), stats, strict=True):
            row[f"{name}_ap{suffix}"] = 100 * value if value >= 0 else math.nan  # −1: no objects
    return row


@torch.no_grad()
def evaluate(args, model, dataset, device):
    """AP over all validation images, each counted once over all ranks; pictures in args.output.

    One image at a time: in a batch it would be padded to the largest, and the ViT sees padding.
    """
    model.eval()
    launch.broadcast_buffers(model)
    results, to_pixels = [], transform(train=False)
    loader = data.eval_loader(dataset, to_pixels, 1, args.workers, collate=data.as_lists)
    # batch_sampler: of each batch its (epoch, index) pairs
    for [(_, index)], ([image], [target]) in zip(loader.batch_sampler, loader, strict=True):
        detections = model([image.to(device)])[0]
        results += as_results(detections, dataset.ids[index], dataset.category_ids)
        if index < PICTURES:
            path = Path(args.output, f"picture-{index}.png")
            save_picture(image, detections, target, dataset.classes, path)
    model.train()
    row = average_precision(ground_truth(dataset), sum(launch.gather(results), []))
    return dict(row, images=len(dataset))


def save_picture(image, detections, target, classes, path):
    """The image with the detections of score ≥ 0.5, and beside it with the truth."""
    image = ((image + 1) * 127.5).clamp(0, 255).byte().cpu()
    sure = detections["scores"] >= 0.5
    found = {key: value[sure].cpu() for key, value in detections.items()}
    found["masks"] = found["masks"][:, 0] >= 0.5                                # (n, H, W)
    pictures = []
    for one in (found, target):
        names = [classes[label - 1] for label in one["labels"].tolist()]
        picture, colours = image, palette(len(names))
        if names:
            picture = draw_segmentation_masks(picture, one["masks"].bool(), 0.5, colours)
            picture = draw_bounding_boxes(picture, one["boxes"], names, colours)
        pictures.append(picture)
    save_image(torch.cat(pictures, 2) / 255, path)


# ------------------------------------------------------------------------------------------------

@launch.cleans_up
def main(args):
    if COCO is None:
        raise InputError("COCO's evaluation is missing: pip install pycocotools")
    device = launch.device()
    val = load_dataset(args.data, "val", args.image_size)
    classes = len(val.classes)
    if args.eval:
        model = load(args, classes).to(device)
        model.backbone.autocast = launch.autocast(args, device)
        logbook.make_folder(args.output)                    # for the pictures
        row = evaluate(args, model, val, device)
        return logbook.report(args, row, init=args.init, split="val")

    # The model, from a checkpoint; its digest is compared on resuming: another is another start.
    torch.manual_seed(args.seed)
    state, digest = weights.read(args)
    model, model_args = build(args, classes, state)
    model = launch.sync_batch_norm(model.to(device), device)
    model.backbone.autocast = launch.autocast(args, device)
    groups = param_groups(model, args.weight_decay, args.layer_decay, vit="backbone.pyramid.vit")
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)

    # The data: images with objects, as the others teach little [mmdetection]
    dataset = load_dataset(args.data, "train", args.image_size)
    indices = dataset.with_objects()

    # The run: a new one, or from where it stopped
    run = Run(args, optimizer, model_args, modules=dict(model=model),
              identity=dict(images=len(indices), init=digest))
    batches = data.train_batches(dataset, transform(train=True), args, run.start, run.steps, device,
                                 indices, collate=data.as_lists)
    if args.compile:
        model.backbone.compile()
    network = launch.ddp(model)

    for step in run.progress():
        if run.due(step):
            run.save(step)
            row = evaluate(args, model, val, device)
            run.log_evaluation(step, split="val", **row)
            run.keep_best(step, row["box_ap"])
        if step == run.steps:
            break

        lr = schedule(step, run.steps, args.warmup_steps, args.lr)
        launch.set_lr(optimizer, lr)
        batch = next(batches)
        run.seed(step)                                # sampled anchors and boxes, drop path
        for images, targets in run.micro_batches(batch, network):
            losses = network(images, targets)               # of proposals, classes, boxes, masks
            loss = sum(losses.values())
            (loss / args.accumulate).backward()
            run.add(loss=loss, **losses)
        gradients = [p.grad for p in model.parameters()]
        run.add(grad_norm=nn.utils.get_total_norm(gradients))       # the paper speaks of no clip
        run.agree()
        optimizer.step()
        optimizer.zero_grad()
        run.log(step + 1, lr=lr)


if __name__ == "__main__":
    launch.start(main, get_args())
