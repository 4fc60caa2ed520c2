"""Stage 3: classification. Fine-tune a pre-trained ViT (PeCo, Table 1), or evaluate one.

    python finetune.py --recipe demo
    torchrun --nproc-per-node 8 finetune.py
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2 as T

import data
from model import param_groups
from support import flags, launch, recipes, weights
from support import run as logbook
from support.flags import amount, rate, share, within
from support.run import Run

PAPER = dict(
    data="data/imagenet",       # ImageNet-1K [PeCo]
    init="runs/paper/pretrain",
    image_size=224,             # [PeCo]; 448 for ViT-H's best
    crop_min=0.08,              # [BEiT]
    eval_crop=0.875,            # [BEiT]
    randaugment=27,             # timm's magnitude 9 of 10 [BEiT]
    erasing=0.25,               # [BEiT]
    mixup=0.8,                  # [BEiT]
    cutmix=1.0,                 # [BEiT]
    smoothing=0.1,              # [BEiT]
    model="base",               # [PeCo]
    patch_size=16,              # [PeCo]
    drop_path=0.1,              # [BEiT]
    layer_scale=0.0,            # [PeCo]: the original ViT has none
    batch_size=1024,            # [BEiT]
    epochs=100,                 # [PeCo]
    warmup_epochs=20,           # [PeCo]
    lr=4e-3,                    # [PeCo]; a cosine to 0 [PeCo]
    layer_decay=0.65,           # [PeCo]
    betas=[0.9, 0.999],         # [BEiT]
    weight_decay=0.05,          # [BEiT]
)
RECIPES = recipes.of("finetune", PAPER)


def get_args(argv=None):
    p = flags.parser("finetune", __doc__)
    p.add_argument("--eval", action="store_true", help="only evaluate --init, a fine-tuned model")
    p.add_argument("--label-fraction", type=within(float, "(0, 1]"), default=1.0,
                   help="share of the training images used, the same of each class, 0 to 1")
    p.add_argument("--randaugment", type=within(int, "[0, 30]"),
                   help="magnitude of RandAugment, 0 (none) to 30")
    p.add_argument("--erasing", type=share, help="probability of random erasing, 0 to 1")
    p.add_argument("--mixup", type=amount,
                   help="α of mixup, whose shares are of Beta(α, α); 0: no mixup")
    p.add_argument("--cutmix", type=amount,
                   help="α of cutmix, whose shares are of Beta(α, α); 0: no cutmix")
    p.add_argument("--smoothing", type=rate, help="label smoothing, 0 to 1")
    p.add_argument("--warmup-epochs", type=amount, help="epochs of linear warm-up of the lr")
    p.add_argument("--eval-crop", type=within(float, "[0.1, 1]"),
                   help="centre crop in evaluation, share of the side")
    weights.add_arguments(p)
    data.add_arguments(p)
    return flags.parse(p, RECIPES, argv)


def build(args, classes, state):
    """The ViT of a checkpoint, and the arguments to build it again.

    classes: number of them; 0: features alone. state: its contents; None: from scratch.
    """
    model, model_args, missing = weights.begin(args, state, args.image_size, classes)
    if args.eval and missing:
        raise launch.InputError(
            f"--init {args.init}: no classifier of {classes} classes in it (it lacks "
            f"{', '.join(missing[:3])}): fine-tune it first, or name a run that was")
    return model, model_args


# ------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate(args, model, dataset, device):
    """Top-1 and top-5 accuracy in %, over every image once, on any number of ranks."""
    model.eval()
    hits1, hits5, images = torch.zeros(3, dtype=torch.float64, device=device)
    autocast = launch.autocast(args, device)
    transform = data.eval_transform(args.image_size, args.eval_crop)
    loader = data.eval_loader(dataset, transform, launch.micro_batch(args), args.workers)
    for pixels, labels in loader:
        labels = labels.to(device)
        with autocast:
            logits = model(pixels.to(device))                                   # (B, classes)
        best = logits.topk(min(5, logits.shape[1])).indices                     # (B, 5)
        right = best == labels[:, None]
        hits1 += right[:, 0].sum()
        hits5 += right.any(1).sum()
        images += len(labels)
    if dist.is_initialized():
        for total in (hits1, hits5, images):
            dist.all_reduce(total)
    model.train()
    return dict(top1=100 * (hits1 / images).item(), top5=100 * (hits5 / images).item(),
                images=int(images))


# ------------------------------------------------------------------------------------------------

@launch.cleans_up
def main(args):
    device = launch.device()

    # The images
    val = data.load_dataset(args.data, "val", args.image_size)
    if not args.eval:
        train = data.load_dataset(args.data, "train", args.image_size)
        indices = data.label_subset(train.targets, args.label_fraction, args.seed)
    classes = len(val.classes)
    if classes < 2:
        raise launch.InputError(
            f"--data {args.data}: one class only, {val.classes[0]}: two or more are needed")

    # The model, from a checkpoint; its digest is compared on resuming: another is another start.
    torch.manual_seed(args.seed)
    state, digest = weights.read(args)
    if args.eval:
        weights.refuse_other_names(f"--init {args.init}", state, f"--data {args.data}", val.classes)
    model, model_args = build(args, classes, state)
    model.to(device)
    if args.eval:
        if "stage" in state:                                # one of our own
            weights.say_other_sizes(args, state)
        row = evaluate(args, model, val, device)
        return logbook.report(args, row, init=args.init, split="val")

    # The optimizer
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)

    # The run: a new one, or from where it stopped
    identity = dict(images=len(indices), init=digest, class_names=list(val.classes))
    run = Run(args, optimizer, model_args, dict(model=model), identity)
    transform = data.finetune_transform(
        args.image_size, args.crop_min, args.randaugment, args.erasing)
    batches = data.train_batches(train, transform, args, run.start, run.steps, device, indices)
    mix = mixer(args, classes)
    if args.compile:
        model.compile()
    network = launch.ddp(model)
    autocast = launch.autocast(args, device)
    warmup = args.warmup_epochs * run.epoch_steps

    for step in run.progress():
        if run.due(step):
            run.save(step)
            row = evaluate(args, model, val, device)
            run.log_evaluation(step, split="val", **row)
            run.keep_best(step, row["top1"])
        if step == run.steps:
            break

        lr = launch.cosine(step, run.steps, warmup, args.lr)
        launch.set_lr(optimizer, lr)                       # times each layer's own factor
        batch = next(batches)
        run.seed(step)                                      # mixup, cutmix, drop path
        for images, labels in run.micro_batches(batch, network):
            if mix:
                images, labels = mix(images, labels)                           # labels (B, classes)
            with autocast:
                logits = network(images)                                        # (B, classes)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing)
            (loss / args.accumulate).backward()
            run.add(loss=loss)
        gradients = [p.grad for p in model.parameters()]
        run.add(grad_norm=nn.utils.get_total_norm(gradients))       # BEiT does not clip here
        run.agree()
        optimizer.step()
        optimizer.zero_grad()
        run.log(step + 1, lr=lr)


def mixer(args, classes):
    """Mixup or cutmix at even odds, the one that is on, or None."""
    kinds = []
    if args.mixup:
        kinds.append(T.MixUp(alpha=args.mixup, num_classes=classes))
    if args.cutmix:
        kinds.append(T.CutMix(alpha=args.cutmix, num_classes=classes))
    return T.RandomChoice(kinds) if kinds else None


if __name__ == "__main__":
    launch.start(main, get_args())
