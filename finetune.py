"""Stage 3: classification. Fine-tune a pre-trained ViT (PeCo, sec. 4; BEiT), or probe or evaluate one.

    python finetune.py --recipe demo
    python finetune.py --recipe demo --probe knn
    torchrun --nproc-per-node 8 finetune.py
"""
import math
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2 as T
from tqdm import tqdm

import data
import runtime
from model import SIZES, param_groups, transfer

RECIPES = {
    "paper": dict(                          # PeCo: 100 epochs, 20 of warm-up to 4e-3, layer decay 0.65; the rest BEiT's base
        data="data/imagenet", model="base", image_size=224, patch_size=16, pool="mean", batch_size=1024, epochs=100, lr=4e-3,
        betas=[0.9, 0.999], weight_decay=0.05, layer_decay=0.65, warmup_epochs=20, drop_path=0.1, layer_scale=0.1,
        crop_min=0.08, eval_crop=0.875, randaugment=27, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1),
    "cifar": dict(                          # our choice
        data="data/cifar10", augment="batch", model="tiny", image_size=32, patch_size=4, pool="mean", batch_size=512, epochs=100, lr=2e-3,
        betas=[0.9, 0.999], weight_decay=0.05, layer_decay=0.75, warmup_epochs=5, drop_path=0.1, layer_scale=0.1,
        crop_min=0.4, eval_crop=1.0, randaugment=14, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1,
        save_every=10),
    "cifar-cpu": dict(                      # our choice
        data="data/cifar10", augment="batch", model="nano", image_size=32, patch_size=8, pool="mean", batch_size=128, epochs=3,
        lr=3e-3, betas=[0.9, 0.999], weight_decay=0.05, layer_decay=0.85, warmup_epochs=0.5, drop_path=0.0, layer_scale=0.1,
        crop_min=0.5, eval_crop=1.0, randaugment=0, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.1, save_every=100),
    "demo": dict(                           # our choice: few labels
        data="synthetic:8000", model="nano", image_size=32, patch_size=8, pool="mean", batch_size=50, epochs=40, lr=2e-3,
        betas=[0.9, 0.999], weight_decay=0.05, layer_decay=0.75, warmup_epochs=4, drop_path=0.0, layer_scale=0.1,
        crop_min=0.5, eval_crop=1.0, randaugment=0, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.1,
        label_fraction=0.04, save_every=40),
}
HOLDOUT_SEED = 1_000_000                    # one split for every --seed, and not that of their label subsets


def get_args(argv=None):
    p = runtime.parser(__doc__, "finetune")
    p.model.add_argument("--init", default="runs/RECIPE/pretrain", help="run or checkpoint of pretrain.py, teacher.py or "
                   "finetune.py, a file of BEiT's, timm's or MoCo v3's ViT-B, or none: from scratch")
    p.output.add_argument("--eval", action="store_true", help="only evaluate --init, a fine-tuned model")
    p.output.add_argument("--probe", choices=["linear", "knn"], help="only classify the frozen features of --init")
    p.output.add_argument("--probe-layer", type=int, help="block whose features are probed, from 1; default the last")
    p.data.add_argument("--label-fraction", type=float, default=1.0, help="share of the training images used, the same of each class")
    p.data.add_argument("--holdout", type=float, default=0.0, help="share of the training images that is kept out of training and "
                   "evaluated in place of val/: to choose arguments by")
    p.model.add_argument("--model", choices=SIZES, help="where --init does not say")
    p.model.add_argument("--patch-size", type=int, help="pixels; where --init does not say")
    p.model.add_argument("--pool", choices=["mean", "cls"], help="what is classified: the patches' mean or the class token")
    p.schedule.add_argument("--betas", type=float, nargs=2, help="of AdamW")
    p.schedule.add_argument("--weight-decay", type=float)
    p.schedule.add_argument("--layer-decay", type=float, help="the lr of a block is the next one's times this")
    p.schedule.add_argument("--warmup-epochs", type=float)
    p.model.add_argument("--drop-path", type=float, help="rate of the last block, rising from 0")
    p.model.add_argument("--layer-scale", type=float, help="initial value where --init does not say; 0: none")
    p.data.add_argument("--crop-min", type=float, help="smallest random crop, share of the image's area")
    p.data.add_argument("--eval-crop", type=float, help="centre crop, share of the side")
    p.data.add_argument("--randaugment", type=int, help="magnitude of 30 (27 is timm's 9 of 10); 0: none")
    p.data.add_argument("--erasing", type=float, help="probability of random erasing")
    p.data.add_argument("--mixup", type=float, help="α; 0: none")
    p.data.add_argument("--cutmix", type=float, help="α; 0: none")
    p.schedule.add_argument("--smoothing", type=float, help="of the labels")
    p.schedule.add_argument("--ema-decay", type=float, default=0.0, help="evaluate an average of the weights; 0: none")
    p.hardware.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass: less memory")
    return runtime.parse(p, RECIPES, argv)


def build(args, classes):
    """The ViT that --init asks for → (model, its arguments, digest of --init). classes = 0: its features only."""
    state = runtime.load_checkpoint(args.init) if args.init != "none" else {}
    own = dict(SIZES[args.model], patch_size=args.patch_size, positions="block", layer_scale=args.layer_scale)
    pool = state.get("model_args", {}).get("pool", args.pool) if args.eval else args.pool
    model, own, missing = transfer(f"--init {args.init}", state, own, image_size=args.image_size, drop_path=args.drop_path,
                                   classes=classes, pool=pool)
    if args.eval and missing:
        raise runtime.InputError(f"--init {args.init}: no classifier of {classes} classes in it (it lacks {', '.join(missing[:3])}): "
                                 "fine-tune it first, or name a run that was")
    return model, own, state.get("digest")


def val_loader(args, dataset, indices=None):
    transform = data.eval_transform(args.image_size, args.eval_crop)
    return data.eval_loader(dataset, transform, runtime.micro_batch(args), args.workers, indices)


@torch.no_grad()
def evaluate(args, model, dataset, device, indices=None):
    """Top-1 and top-5 in % over every validation image exactly once, whatever the number of ranks."""
    model.eval()
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    autocast = runtime.autocast(args, device)
    for images, labels in val_loader(args, dataset, indices):
        labels = labels.to(device)
        with autocast:
            logits = model(images.to(device))
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        sums += torch.stack([ranked[:, 0].sum(), ranked.any(1).sum(), torch.tensor(len(labels), device=device)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    model.train()
    top1, top5, images = sums.tolist()
    return dict(top1=100 * top1 / images, top5=100 * top5 / images, images=int(images))


# ------------------------------------------------------------------------------------------------
# Probes of frozen features: the patches' mean (or the class token) after a block, not augmented

@torch.no_grad()
def extract(args, model, dataset, device, indices=None):
    """Features (images, D) and labels (images,) of a data set, on rank 0 those of all ranks."""
    rows, labels, layer, autocast = [], [], args.probe_layer or len(model.blocks), runtime.autocast(args, device)
    if not 1 <= layer <= len(model.blocks):
        raise runtime.InputError(f"--probe-layer {layer}: the ViT has blocks 1 to {len(model.blocks)}")
    for images, target in val_loader(args, dataset, indices):
        with autocast:
            tokens = model.tokens(images.to(device), [layer])[0]
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])
        rows.append((tokens[:, 1:].mean(1) if args.pool == "mean" else tokens[:, 0]).cpu())
        labels.append(target)
    part = (torch.cat(rows), torch.cat(labels))
    parts = [part]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size() if runtime.rank() == 0 else None
        dist.gather_object(part, parts)
    return [torch.cat(tensors).to(device) for tensors in zip(*(parts or [part]))]


def knn(train, train_labels, val, classes, k=20, temperature=0.07):
    """Predicted classes by the weighted k nearest neighbours in cosine (k, temperature: DINO, 2104.14294)."""
    train = F.normalize(train, dim=1)
    predictions = []
    for rows in F.normalize(val, dim=1).split(1024):
        similarity, neighbours = (rows @ train.T).topk(min(k, len(train)))
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(1, train_labels[neighbours], (similarity / temperature).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def linear_probe(train, train_labels, val, classes, features=lambda rows: rows, steps=2000, batch=1024, lr=1e-2, weight_decay=1e-4):
    """Predicted classes by a linear layer on standardised features; every constant here is our choice. features: makes
    them of rows of train or val, a block at a time, where all would take too much memory."""
    sums = squares = 0.0
    for rows in train.split(batch):
        x = features(rows).double()
        sums, squares = sums + x.sum(0), squares + x.square().sum(0)
    mean = (sums / len(train)).float()
    std = (squares / len(train) - (sums / len(train)).square()).clamp(min=0).sqrt().float()
    std[std < 1e-6] = math.inf                                      # constant in training: no feature
    torch.manual_seed(0)
    layer = nn.Linear(len(mean), classes).to(train.device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        rows = torch.randint(len(train), (min(batch, len(train)),)).to(train.device)
        optimizer.param_groups[0]["lr"] = runtime.cosine(step, steps, 0, lr)
        F.cross_entropy(layer((features(train[rows]) - mean) / std), train_labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([layer((features(rows) - mean) / std).argmax(1) for rows in val.split(batch)])


def probe(args, model, dataset, indices, val, val_indices, device):
    """Top-1 in % of a classifier of frozen features, on rank 0."""
    train, labels = extract(args, model, dataset, device, indices)
    features, targets = extract(args, model, val, device, val_indices)
    if runtime.rank():
        return {}
    predictions = (knn if args.probe == "knn" else linear_probe)(train, labels, features, len(val.classes))
    return dict(probe=args.probe, top1=100 * (predictions == targets).float().mean().item(), images=len(targets))


# ------------------------------------------------------------------------------------------------

def main(args):
    device, micro_batch = runtime.device(), runtime.micro_batch(args)
    val = data.load_dataset(args.data, "val", args.image_size)
    torch.manual_seed(args.seed)
    model, model_args, args.init_digest = build(args, 0 if args.probe else len(val.classes))
    model.to(device)
    model.checkpoint_activations = args.checkpoint_activations
    val_indices = None
    if args.holdout or not args.eval:
        dataset = data.load_dataset(args.data, "train", args.image_size)
        indices = data.label_subset(dataset.targets, args.label_fraction, args.seed)
    if args.holdout:
        val, val_indices = dataset, data.label_subset(dataset.targets, args.holdout, HOLDOUT_SEED)
        indices = sorted(set(indices).difference(val_indices))
    of = dict(init=args.init, split="holdout" if args.holdout else "val")
    if args.eval:
        return runtime.report(args, evaluate(args, model, val, device, val_indices), **of)
    if args.probe:
        return runtime.report(args, probe(args, model.eval(), dataset, indices, val, val_indices, device), **of)

    epoch_steps, steps = runtime.total_steps(args, len(indices))
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)
    modules = dict(model=model)
    if args.ema_decay:
        modules["ema"] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    start, best, pending = runtime.resume(args, modules, optimizer)

    transform = data.finetune_transform(args.image_size, args.crop_min, args.randaugment, args.erasing, args.augment)
    loader = data.TrainLoader(dataset, transform, args, micro_batch, start, steps, device, indices)
    mixes = [kind(alpha=alpha, num_classes=len(val.classes))
             for kind, alpha in ((T.MixUp, args.mixup), (T.CutMix, args.cutmix)) if alpha]
    mix = T.RandomChoice(mixes) if mixes else None                  # either, at even odds
    if args.compile:
        model.compile()
    network, autocast, caught = runtime.distribute(model, device), runtime.autocast(args, device), runtime.catch_signals()

    def validate():
        row = evaluate(args, modules["ema"].module if args.ema_decay else model, val, device, val_indices)
        runtime.log(args, step=done, epoch=done / epoch_steps, split="holdout" if args.holdout else "val", **row)
        return row["top1"]

    done = start
    if pending:                                                     # the run was stopped before it was evaluated
        best = runtime.checkpoint(args, done, steps, epoch_steps, 0, modules, optimizer, model_args, validate, best)
    batches, spent, seen, sums = iter(loader), 0.0, 0, {}
    for step in tqdm(range(start, steps), initial=start, total=steps, disable=None if runtime.rank() == 0 else True):
        begun = time.time()
        lr = runtime.cosine(step, steps, args.warmup_epochs * epoch_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        micro_batches = [next(batches) for _ in range(args.accumulate)]
        torch.manual_seed(runtime.derive_seed(args.seed, step, runtime.rank()))    # mixup, cutmix, drop path
        terms = {}
        for i, (images, labels) in enumerate(micro_batches):
            if mix:
                images, labels = mix(images, labels)                                # labels → (B, classes)
            network.require_backward_grad_sync = i == args.accumulate - 1          # DDP: all-reduce at the step's end
            with autocast:
                logits = network(images)                                            # (B, classes)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing)
            (loss / args.accumulate).backward()
            terms["loss"] = terms.get("loss", 0.0) + loss.detach() / args.accumulate
        terms["grad_norm"] = nn.utils.get_total_norm([p.grad for p in model.parameters()])  # BEiT does not clip here
        terms, stopped = runtime.check_step(step, terms, caught, device, loader.samples)
        optimizer.step()
        optimizer.zero_grad()
        if args.ema_decay:
            modules["ema"].update_parameters(model)

        sums, seen, done = {k: sums.get(k, 0.0) + v for k, v in terms.items()}, seen + 1, step + 1
        spent += time.time() - begun                                # without evaluations and checkpoints
        if done % args.log_every == 0 or done == steps:
            runtime.log(args, step=done, epoch=done / epoch_steps, **{k: v / seen for k, v in sums.items()}, lr=lr,
                        images_per_s=seen * args.batch_size / spent)
            spent, seen, sums = 0.0, 0, {}
        best = runtime.checkpoint(args, done, steps, epoch_steps, stopped, modules, optimizer, model_args, validate, best)


if __name__ == "__main__":
    runtime.launch(main, get_args())
