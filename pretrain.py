"""Stage 2: masked image modelling. A ViT predicts the codes of masked patches (PeCo, Eq. 6 and 7).

    python pretrain.py --recipe demo
    torchrun --nproc-per-node 8 pretrain.py --epochs 800
"""
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
from model import SIZES, MaskedAutoencoder, VisionTransformer, block_mask, param_groups, random_mask
from support import checkpoint, flags, launch, recipes
from support.flags import amount, positive, rate, share, within
from support.run import Run
from support.weights import restore

PAPER = dict(
    data="data/imagenet",       # ImageNet-1K [PeCo]
    tokenizer="runs/paper/tokenizer",
    image_size=224,             # [PeCo]
    crop_min=0.08,              # [BEiT]
    jitter=0.4,                 # [BEiT]
    mask_ratio=75 / 196,        # [BEiT]: 75 patches
    mask_block=16,              # [BEiT]
    mae=False,                  # PeCo_MAE is an ablation [PeCo, Table 8]
    model="base",               # ViT-B, L and H [PeCo, Table 1]
    patch_size=16,              # [PeCo]
    drop_path=0.1,              # [PeCo]
    positions="learned",        # [PeCo]: "the original ViT-B/16 … as in BEiT"; BEiT's paper, 2.5
    layer_scale=0.0,            # [PeCo], likewise; BEiT's other ViT: shared and 0.1 (its App. A)
    batch_size=2048,            # [PeCo]
    epochs=800,                 # 300 or 800 [PeCo, Table 2]
    warmup_epochs=10,           # [BEiT]
    lr=1.5e-3,                  # [PeCo]; a cosine to 1e-5 [BEiT]
    betas=[0.9, 0.999],         # [PeCo]
    weight_decay=0.05,          # [PeCo]
    clip=3.0,                   # [BEiT]; 1.0 for ViT-L
)
RECIPES = recipes.of("pretrain", PAPER)


def get_args(argv=None):
    p = flags.parser("pretrain", __doc__)
    p.add_argument("--tokenizer", help="run or checkpoint of tokenizer.py")
    p.add_argument("--model", choices=SIZES, help="size of the ViT")
    p.add_argument("--patch-size", type=within(int, "[1, 256]"), help="side of a patch, pixels")
    p.add_argument("--drop-path", type=rate, help="of the last block, rising from 0 at the first")
    p.add_argument("--positions", choices=["learned", "shared"],
                   help="embeddings, or a relative bias that all blocks share (--mae: MAE's fixed)")
    p.add_argument("--layer-scale", type=amount, help="initial value; 0 (and with --mae): none")
    p.add_argument("--mae", action="store_true",
                   help="PeCo_MAE: MAE's encoder, decoder and random masks (its ratio: 0.75)")
    p.add_argument("--mask-ratio", type=within(float, "(0, 1)"),
                   help="share of the patches masked in every image")
    p.add_argument("--mask-block", type=positive, help="smallest block of masks, in patches")
    p.add_argument("--jitter", type=share, help="strength of the colour jitter, 0 to 1")
    p.add_argument("--betas", type=rate, nargs=2, help="AdamW's β₁ and β₂")
    p.add_argument("--weight-decay", type=amount, help="AdamW's weight decay, of matrices")
    p.add_argument("--warmup-epochs", type=amount, help="epochs of linear warm-up of the lr")
    p.add_argument("--clip", type=within(float, "(0, inf)"), help="largest norm of the gradient")
    p.add_argument("--checkpoint-activations", action="store_true",
                   help="recompute blocks in the backward pass: less memory, a forward pass more")
    data.add_arguments(p, layout=data.ANY_LAYOUT)
    return flags.parse(p, RECIPES, argv)


class AugmentAndMask:
    """In a worker, by the sample's own seed: PIL image → (image, mask (h, w), factors (3,)).

    make_mask: a function without arguments. The factors, of brightness, contrast and saturation,
    are uniform in [1 − jitter, 1 + jitter], as torchvision draws them.
    """

    def __init__(self, transform, make_mask, jitter=0.0):
        self.transform, self.make_mask, self.jitter = transform, make_mask, jitter

    def __call__(self, image):
        image = self.transform(image)
        factors = torch.empty(3).uniform_(1 - self.jitter, 1 + self.jitter)
        return image, self.make_mask(), factors


def load_tokenizer(args):
    """The frozen tokenizer, its digest, and its centre crop in evaluation, share of the side.

    A code of it must describe a patch of the ViT.
    """
    state = checkpoint.load(args.tokenizer, ["tokenizer"], "--tokenizer")
    tokenizer = restore(f"--tokenizer {args.tokenizer}", state)
    # It sees images resized so that a patch becomes one code: in BEiT at half their size, here at
    # half to twice their size (our choice).
    if not 0.5 <= tokenizer.stride / args.patch_size <= 2:
        grid = args.image_size // args.patch_size
        raise launch.InputError(
            f"--tokenizer {args.tokenizer}: its codes of {tokenizer.stride} px do not fit the "
            f"ViT's {grid}×{grid} patches of {args.patch_size} px: take one of about that stride, "
            "or change --patch-size")
    return tokenizer.eval().requires_grad_(False), state["digest"], state["args"]["eval_crop"]


@launch.as_input_error()
def build(args, codes):
    """The network, the modules that a checkpoint stores, the arguments to build "model" again.

    "model" is the ViT, which the next stage reads; with --mae the decoder is stored beside it.
    """
    kind = dict(positions=args.positions, layer_scale=args.layer_scale, codes=codes)
    if args.mae:                                            # a plain ViT
        kind = dict(positions="absolute", layer_scale=0.0)
    model_args = dict(SIZES[args.model], image_size=args.image_size, patch_size=args.patch_size,
                      drop_path=args.drop_path, **kind)
    vit = VisionTransformer(**model_args)
    vit.checkpoint_activations = args.checkpoint_activations
    if args.mae:
        network = MaskedAutoencoder(vit, codes, **mae_decoder(args.model))
        return network, dict(model=vit, decoder=network.decoder), model_args
    return vit, dict(model=vit), model_args


def mae_decoder(size):
    """MAE's decoder for ViT-B and larger [MAE]; half the depth of a smaller ViT [ours]."""
    width, depth = SIZES[size]["dim"], SIZES[size]["depth"]
    if width >= 768:
        return dict(dim=512, depth=8, heads=16)
    return dict(dim=width, depth=depth // 2, heads=max(width // 32, 1))


# ------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate(args, model, tokenizer, dataset, transform, device):
    """Loss and accuracy (0 to 1) over masked patches of validation images, and masked.png.

    It takes at most 5000 images (our choice), each once and always under the same mask.
    """
    model.eval()
    losses, hits, patches = torch.zeros(3, dtype=torch.float64, device=device)
    shuffled = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    loader = data.eval_loader(dataset, transform, launch.micro_batch(args), args.workers,
                              indices=shuffled[:5000].tolist())
    for i, (batch, _) in enumerate(loader):
        images, mask, _ = data.to_device(batch, device)             # no jitter here
        with launch.autocast(args, device):
            target = tokenizer.encode(images, mask.shape[1])[mask]              # (M,)
            logits = model(images, mask)                                        # (M, K)
            losses += F.cross_entropy(logits.float(), target, reduction="sum")
            hits += (logits.argmax(1) == target).sum()
            patches += len(target)
            if i == 0 and launch.rank() == 0:
                rows = masked_rows(model, tokenizer, images[:8], mask[:8])
                data.save_rows(rows, Path(args.output, "masked.png"))
    if dist.is_initialized():
        for total in (losses, hits, patches):
            dist.all_reduce(total)
    model.train()
    return dict(loss=(losses / patches).item(), accuracy=(hits / patches).item())


@torch.no_grad()
def masked_rows(model, tokenizer, images, mask):
    """Images, masked, with the predicted codes decoded, with the true ones: four (B, 3, H, W)."""
    true = tokenizer.encode(images, mask.shape[1])
    predicted = true.clone()
    predicted[mask] = model(images, mask).argmax(1)
    size = images.shape[2:]
    grey = F.interpolate(mask[:, None].float(), size) > 0
    decoded = [F.interpolate(tokenizer.decode(codes), size) for codes in (predicted, true)]
    return [images, torch.where(grey, 0.0, images), *decoded]


# ------------------------------------------------------------------------------------------------

@launch.cleans_up
def main(args):
    device = launch.device()

    # The tokenizer; its digest is compared on resuming, since other codes are other targets.
    tokenizer, digest, eval_crop = load_tokenizer(args)
    tokenizer.to(device, memory_format=torch.channels_last)

    # The model and its optimizer
    torch.manual_seed(args.seed)
    model, modules, model_args = build(args, codes=len(tokenizer.quantizer.codebook))
    model.to(device)
    groups = param_groups(model, args.weight_decay, vit="encoder" if args.mae else "")
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)

    # The data
    grid = args.image_size // args.patch_size
    dataset = data.load_images(args.data, "train", args.image_size)
    val = data.load_images(args.data, "val", args.image_size)
    augment = data.crop_and_flip(args.image_size, args.crop_min)
    masked = round(args.mask_ratio * grid * grid)
    if not 0 < masked < grid * grid:
        raise launch.InputError(f"--mask-ratio {args.mask_ratio}: it masks {masked} of the "
                                 f"{grid * grid} patches; at least one of each kind is needed")
    make_mask = (partial(random_mask, grid, masked) if args.mae else
                 partial(block_mask, grid, masked, args.mask_block))
    transform = AugmentAndMask(augment, make_mask, args.jitter)
    evaluation = data.eval_transform(args.image_size, eval_crop)            # as the tokenizer's
    val_transform = AugmentAndMask(evaluation, make_mask)

    # The run: a new one, or from where it stopped
    identity = dict(images=len(dataset), tokenizer=digest, eval_crop=eval_crop)
    run = Run(args, optimizer, model_args, modules, identity)
    batches = data.train_batches(dataset, transform, args, run.start, run.steps, device)
    if args.compile:
        model.compile()
        tokenizer.encoder.compile()
    network = launch.ddp(model)
    autocast = launch.autocast(args, device)
    warmup = args.warmup_epochs * run.epoch_steps

    for step in run.progress():
        if run.due(step):
            run.save(step)
            row = evaluate(args, model, tokenizer, val, val_transform, device)
            run.log_evaluation(step, split="val", **row)
        if step == run.steps:
            break

        lr = launch.cosine(step, run.steps, warmup, args.lr, final=min(1e-5, args.lr))
        launch.set_lr(optimizer, lr)
        batch = next(batches)
        run.seed(step)                                      # drop path
        for (images, mask, factors), _ in run.micro_batches(batch, network):
            if args.jitter:                                 # on the device, each image its own
                images = data.color_jitter(images, factors)
            with autocast:
                with torch.no_grad():
                    target = tokenizer.encode(images, grid)[mask]   # (M,), codes of the whole image
                logits = network(images, mask)                      # (M, K), of the masked image
                loss = F.cross_entropy(logits.float(), target)      # Eq. 7
            (loss / args.accumulate).backward()
            run.add(loss=loss, accuracy=(logits.argmax(1) == target).float().mean())
        run.add(grad_norm=nn.utils.clip_grad_norm_(model.parameters(), args.clip))
        run.agree()
        optimizer.step()
        optimizer.zero_grad()
        run.log(step + 1, lr=lr)


if __name__ == "__main__":
    launch.start(main, get_args())
