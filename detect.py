"""Stage 3c: object detection and instance segmentation. Mask R-CNN on a pre-trained ViT (PeCo, sec. 4).

    python detect.py --recipe demo
    torchrun --nproc-per-node 8 detect.py

Region proposals, heads and losses are torchvision's; the evaluation is COCO's own (pip install pycocotools).
"""
import contextlib
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms import v2 as T
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image
from tqdm import tqdm

import data
import runtime
from model import SIZES, ViTPyramid, VisionTransformer, param_groups, transfer

try:
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:                                        # optional, as requirements-extra.txt says: main() asks for it
    COCO = None

RECIPES = {
    # PeCo: Mask R-CNN, 12 epochs; no more is known. Shorter side 480…800, longer ≤ 1333, AdamW, weight decay 0.05, drop path
    # 0.2, batch 16: iBOT's ViT-B in Cascade Mask R-CNN (2111.07832); lr, layer decay, warm-up, a tenth of the lr after epochs
    # 9 and 11: PaddleDetection's ViT-B of CAE
    "paper": dict(
        data="data/coco", model="base", image_size=800, min_size=480, max_size=1333, patch_size=16, batch_size=16, epochs=12,
        lr=1e-4, betas=[0.9, 0.999], weight_decay=0.05, layer_decay=0.75, warmup_steps=1000, drop_path=0.2, layer_scale=0.1,
        channels=256, boxes=512),           # torchvision's
    "demo": dict(                           # our choice
        data="synthetic:2000", model="nano", image_size=64, min_size=64, max_size=64, patch_size=8, batch_size=16, epochs=10,
        lr=2e-3, betas=[0.9, 0.999], weight_decay=0.05, layer_decay=0.75, warmup_steps=50, drop_path=0.0, layer_scale=0.1,
        channels=32, boxes=32, save_every=10),
}


def get_args(argv=None):
    p = runtime.parser(__doc__, "detect", data="synthetic[:IMAGES], or a folder in COCO's layout: train2017/, val2017/, annotations/")
    p.model.add_argument("--init", default="runs/RECIPE/pretrain", help="run or checkpoint of pretrain.py, finetune.py or teacher.py, "
                   "a file of BEiT's, timm's or MoCo v3's ViT-B, or none: from scratch; with --eval: a run of detect.py")
    p.output.add_argument("--eval", action="store_true", help="only evaluate --init")
    p.data.add_argument("--min-size", type=int, help="smallest shorter side in training, pixels; it is drawn from there to "
                   "--image-size, which is evaluation's, in steps of 32")
    p.data.add_argument("--max-size", type=int, help="largest longer side, pixels")
    p.model.add_argument("--model", choices=SIZES, help="where --init does not say")
    p.model.add_argument("--patch-size", type=int, help="pixels; where --init does not say")
    p.schedule.add_argument("--betas", type=float, nargs=2, help="of AdamW")
    p.schedule.add_argument("--weight-decay", type=float)
    p.schedule.add_argument("--layer-decay", type=float, help="the lr of a block is the next one's times this")
    p.schedule.add_argument("--warmup-steps", type=int)
    p.model.add_argument("--drop-path", type=float, help="rate of the last block, rising from 0")
    p.model.add_argument("--layer-scale", type=float, help="initial value where --init does not say; 0: none")
    p.model.add_argument("--channels", type=int, help="of the feature pyramid and the heads")
    p.model.add_argument("--boxes", type=int, help="sampled of an image in training, to classify")
    p.output.add_argument("--pictures", type=int, default=8, help="validation images that are drawn at each evaluation")
    p.hardware.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass: less memory")
    return runtime.parse(p, RECIPES, argv)


# ------------------------------------------------------------------------------------------------
# Data

def load_dataset(name, split, image_size):
    """The data set of detect.py's --data: yields (PIL image, data.instances()) and has .classes."""
    if name.partition(":")[0] == "synthetic":
        return data.Scenes(split, data.synthetic_number(name, split), image_size, target="instances")
    folder = data.subfolder(name, f"{split}2017")
    file = Path(name, "annotations", f"instances_{split}2017.json")
    if not file.exists():
        raise runtime.InputError(f"--data {name}: it has no annotations/{file.name}; see the README for the layout")
    return Coco(folder, file)


class Coco(torchvision.datasets.CocoDetection):
    """COCO's instances. Labels count from 1 without the gaps of the category ids; crowds are left out."""

    def __init__(self, folder, file):
        try:
            with contextlib.redirect_stdout(None):         # it tells of its progress
                super().__init__(folder, file)
            self.category_ids = sorted(self.coco.getCatIds())
            self.samples = [(Path(folder, self.coco.imgs[i]["file_name"]), i) for i in self.ids]
            for a in self.coco.anns.values():
                self.category_ids.index(a["category_id"]), a["bbox"], a["area"], a["segmentation"]
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise runtime.InputError(f"{file}: not COCO's format of instances ({type(error).__name__}: {error}); an annotation "
                                     "has a known category_id, bbox, area and segmentation") from error
        self.classes = [category["name"] for category in self.coco.loadCats(self.category_ids)]

    def _load_image(self, id):                             # torchvision's hook; data.read() decodes it
        return Image.open(Path(self.root, self.coco.imgs[id]["file_name"]))

    def __getitem__(self, index):
        image, annotations = super().__getitem__(index)
        annotations = [a for a in annotations if not a.get("iscrowd")]
        boxes = torch.tensor([a["bbox"] for a in annotations]).view(-1, 4)
        masks = [self.coco.annToMask(a) for a in annotations] or np.zeros((0, image.height, image.width))
        labels = torch.tensor([self.category_ids.index(a["category_id"]) + 1 for a in annotations], dtype=torch.int64)
        boxes[:, 2:] += boxes[:, :2]                       # left, top, width, height → left, top, right, bottom
        return image, data.instances(boxes, labels, torch.from_numpy(np.array(masks)))

    def with_objects(self):
        """Indices of the images that have any."""
        return [index for index, i in enumerate(self.ids) if any(not a.get("iscrowd") for a in self.coco.imgToAnns[i])]


def transform(train):
    """Flip where it trains; sizes are the model's business. Boxes are cut to the image, those under a pixel left out."""
    return data.Joint([*([T.RandomHorizontalFlip()] if train else []), T.ClampBoundingBoxes(), T.SanitizeBoundingBoxes(),
                       T.ToPureTensor()])


# ------------------------------------------------------------------------------------------------
# The network

class Backbone(nn.Module):
    """Images → five maps (FPN, 1612.03144), from a quarter of the patches' stride to four times it.

    autocast: a context for this part alone. torchvision makes its anchors and boxes in the maps' dtype, and in bf16 a
    coordinate above 512 is a multiple of 4: proposals and heads are in fp32.
    """

    def __init__(self, vit, channels):
        super().__init__()
        self.pyramid, self.out_channels, self.autocast = ViTPyramid(vit), channels, contextlib.nullcontext()
        self.fpn = FeaturePyramidNetwork([vit.cls_token.shape[-1]] * 4, channels, LastLevelMaxPool())

    def forward(self, images):
        with self.autocast:
            maps = self.fpn(dict(zip("0123", self.pyramid(images))))                # and "pool", half of "3"
        return {name: x.float() for name, x in maps.items()}                        # (B, channels, ·, ·)


def mask_rcnn(vit, classes, channels, boxes, sizes, max_size):
    """torchvision's Mask R-CNN: lists of images (3, H, W) and, in training, of targets → a dict of losses; otherwise
    of detections, in the images' own pixels.

    vit: a VisionTransformer, or its arguments; channels: of pyramid and heads; boxes: sampled of an image in training;
    sizes: shorter sides in training, the last one evaluation's. With 256 and 512 it is torchvision's own but for the ViT.
    """
    vit = VisionTransformer(**vit) if isinstance(vit, dict) else vit
    sides = tuple((2 * vit.patch_size * 2 ** level,) for level in range(5))         # of anchors: eight strides, as torchvision's
    return MaskRCNN(
        Backbone(vit, channels), min_size=sizes, max_size=max_size, size_divisible=2 * vit.patch_size,
        image_mean=[0.0] * 3, image_std=[1.0] * 3,                                  # pixels come in [-1, 1]
        rpn_anchor_generator=AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 5), box_batch_size_per_image=boxes,
        box_head=TwoMLPHead(channels * 7 ** 2, 4 * channels), box_predictor=FastRCNNPredictor(4 * channels, classes + 1),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1), mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1))


def build(args, classes):
    """The network that --init asks for → (model, its arguments, digest of --init)."""
    sizes = dict(sizes=[*range(args.min_size, args.image_size, 32), args.image_size], max_size=args.max_size)
    if args.eval:
        state = runtime.load_checkpoint(args.init, ["detect"])
        if state["model_args"]["classes"] != classes:
            raise runtime.InputError(f"--init {args.init}: has {state['model_args']['classes']} classes, --data {args.data} {classes}")
        model = mask_rcnn(**state["model_args"] | sizes)
        model.load_state_dict(state["model"])
        return model, state["model_args"], state["digest"]
    state = runtime.load_checkpoint(args.init) if args.init != "none" else {}
    own = dict(SIZES[args.model], patch_size=args.patch_size, positions="block", layer_scale=args.layer_scale)
    patch = state.get("model_args", own).get("patch_size", args.patch_size)
    vit, own, _ = transfer(f"--init {args.init}", state, own, image_size=-(-args.image_size // patch) * patch,
                           drop_path=args.drop_path, classes=0)
    rest = dict(classes=classes, channels=args.channels, boxes=args.boxes, **sizes)
    return mask_rcnn(vit, **rest), dict(vit=own, **rest), state.get("digest")


def schedule(step, total, warmup, peak):
    """Linear warm-up, then a tenth from 3/4 of the run on and a hundredth from 11/12: epochs 9 and 11 of 12."""
    return peak * min(1.0, (step + 1) / max(warmup, 1)) * 0.1 ** ((step >= total * 3 / 4) + (step >= total * 11 / 12))


# ------------------------------------------------------------------------------------------------
# Evaluation

def ground_truth(dataset):
    """The data set as COCO's evaluation takes it."""
    if hasattr(dataset, "coco"):
        return dataset.coco
    coco, annotations = COCO(), []
    for i in range(len(dataset)):
        target = dataset[i][1]
        for box, label, mask in zip(target["boxes"].tolist(), target["labels"].tolist(), target["masks"]):
            annotations.append(dict(id=len(annotations) + 1, image_id=dataset.ids[i], category_id=dataset.category_ids[label - 1],
                                    bbox=[*box[:2], box[2] - box[0], box[3] - box[1]], area=int(mask.sum()), iscrowd=0,
                                    segmentation=rle.encode(np.asfortranarray(mask.numpy()))))
    coco.dataset = dict(images=[dict(id=i, height=dataset.size, width=dataset.size) for i in dataset.ids], annotations=annotations,
                        categories=[dict(id=i, name=name) for i, name in zip(dataset.category_ids, dataset.classes)])
    with contextlib.redirect_stdout(None):
        coco.createIndex()
    return coco


def as_results(detections, image_id, category_ids):
    """One image's detections in COCO's format of results."""
    boxes = detections["boxes"].cpu()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    masks = np.asfortranarray((detections["masks"][:, 0] >= 0.5).permute(1, 2, 0).byte().cpu().numpy())
    return [dict(image_id=image_id, category_id=category_ids[label - 1], score=score, bbox=box, segmentation=mask)
            for label, score, box, mask in zip(detections["labels"].tolist(), detections["scores"].tolist(), boxes, rle.encode(masks))]


def average_precision(coco, results):
    """COCO's AP, AP at IoU 0.5 and at 0.75, of boxes and of masks, in %."""
    row = {}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        stats = [0.0] * 3
        if results:
            with contextlib.redirect_stdout(None):         # its tables
                own = coco.loadRes([dict(result) for result in results])
                evaluation = COCOeval(coco, own, kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            stats = [value if value >= 0 else math.nan for value in evaluation.stats]  # -1: no objects in the data
        row |= {f"{name}_ap{suffix}": 100 * float(value) for suffix, value in zip(("", "50", "75"), stats)}
    return row


def draw(image, detections, target, classes, path):
    """The image with the detections of score ≥ 0.5, and with the truth beside it."""
    image, parts = ((image + 1) * 127.5).clamp(0, 255).byte().cpu(), []
    kept = {key: value.cpu()[detections["scores"].cpu() >= 0.5] for key, value in detections.items()}
    kept["masks"] = kept["masks"][:, 0] >= 0.5
    for one in (kept, target):
        names, colours = [classes[label - 1] for label in one["labels"].tolist()], data.palette(len(one["labels"]))
        painted = draw_segmentation_masks(image, one["masks"].bool(), alpha=0.5, colors=colours) if names else image
        parts.append(draw_bounding_boxes(painted, one["boxes"], names, colours) if names else painted)
    save_image(torch.cat(parts, 2) / 255, path)


@torch.no_grad()
def evaluate(args, model, dataset, device):
    """AP over every validation image, counted once whatever the number of ranks; pictures in --output. One image at a
    time: beside a larger one it would be padded, and the ViT sees the padding."""
    model.eval()
    results, loader = [], data.eval_loader(dataset, transform(train=False), 1, args.workers, collate=data.as_lists)
    for number, ([image], [target]) in enumerate(loader):
        index = runtime.rank() + number * runtime.world_size()                      # eval_loader's order
        detections = model([image.to(device)])[0]
        results += as_results(detections, dataset.ids[index], dataset.category_ids)
        if index < args.pictures:
            draw(image, detections, target, dataset.classes, Path(args.output, f"picture-{index}.png"))
    model.train()
    parts = [results]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size() if runtime.rank() == 0 else None
        dist.gather_object(results, parts)
    row = [None]
    if runtime.rank() == 0:
        row = [average_precision(ground_truth(dataset), [result for part in parts for result in part])]
    if dist.is_initialized():
        dist.broadcast_object_list(row)
    return dict(row[0], images=len(dataset))


# ------------------------------------------------------------------------------------------------

def main(args):
    if COCO is None:
        raise runtime.InputError("COCO's evaluation is missing: pip install pycocotools")
    device, micro_batch = runtime.device(), runtime.micro_batch(args)
    val = load_dataset(args.data, "val", args.image_size)
    torch.manual_seed(args.seed)
    model, model_args, args.init_digest = build(args, len(val.classes))
    model.to(device)
    model.backbone.autocast = runtime.autocast(args, device)
    if args.eval:
        runtime.make_folder(args)
        return runtime.report(args, evaluate(args, model, val, device), init=args.init, split="val")
    model.backbone.pyramid.vit.checkpoint_activations = args.checkpoint_activations
    dataset = load_dataset(args.data, "train", args.image_size)
    indices = dataset.with_objects()                                # others teach little (torchvision's reference)
    epoch_steps, steps = runtime.total_steps(args, len(indices))
    groups = param_groups(model, args.weight_decay, args.layer_decay, vit="backbone.pyramid.vit")
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)
    modules = dict(model=model)
    start, best, pending = runtime.resume(args, modules, optimizer)

    loader = data.TrainLoader(dataset, transform(train=True), args, micro_batch, start, steps, device, indices,
                                data.as_lists)
    if args.compile:
        model.backbone.compile()
    network, caught = runtime.distribute(model, device), runtime.catch_signals()

    def validate():
        row = evaluate(args, model, val, device)
        runtime.log(args, step=done, epoch=done / epoch_steps, split="val", **row)
        return row["box_ap"]

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
        torch.manual_seed(runtime.derive_seed(args.seed, step, runtime.rank()))    # sizes, sampled anchors and boxes, drop path
        terms = {}
        for i, (images, targets) in enumerate(micro_batches):
            network.require_backward_grad_sync = i == args.accumulate - 1          # DDP: all-reduce at the step's end
            losses = network(images, targets)                                       # of proposals, classes, boxes, masks
            loss = sum(losses.values())
            (loss / args.accumulate).backward()
            for name, term in dict(loss=loss, **losses).items():
                terms[name] = terms.get(name, 0.0) + term.detach() / args.accumulate
        terms["grad_norm"] = nn.utils.get_total_norm([p.grad for p in model.parameters()])  # not clipped, as in BEiT's transfers
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
