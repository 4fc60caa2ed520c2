"""Stage 1: the perceptual codebook, a VQ tokenizer trained with a perceptual loss (PeCo, Eq. 1–5).

Codes of perceptually similar patches come to agree, which makes them better targets for stage 2.

    python tokenizer.py --recipe demo --perceptual runs/demo/teacher
    torchrun --nproc-per-node 8 tokenizer.py
"""
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
from model import SIZES, PatchDiscriminator, PerceptualLoss, VQTokenizer, adversarial
from support import flags, launch, recipes
from support.flags import amount, count, positive, rate, within
from support.run import Run
from support.weights import perceptual_network

PAPER = dict(
    data="data/imagenet",       # ImageNet-1K [PeCo]
    image_size=224,             # [PeCo]
    crop_min=0.08,              # our choice: the paper does not speak of augmentation
    eval_crop=0.875,            # our choice
    # 64, doubled [PeCo]; not above 512, from the number of parameters (Table 2).
    # PeCo-lite: 32 64 128 256 512
    channels=[64, 128, 256, 512, 512],
    decoder_channels=None,      # as the encoder's [PeCo]
    decoder_blocks=None,        # as the encoder's [PeCo]
    vit=None,                   # convolutions, not a ViT [PeCo]
    patch_size=16,              # of --vit [PeCo, Table 12]
    codebook_size=8192,         # K [PeCo]
    code_dim=256,               # D, from the paper's number of parameters (Table 2)
    decay=0.99,                 # [VQ-VAE]
    revive=0.01,                # our choice
    commitment_weight=0.25,     # β [PeCo]
    perceptual="moco_v3",       # [PeCo]; of 300 epochs, as its 100 were never published
    perceptual_weight=1.0,      # λ [PeCo]
    adversarial_weight=0.0,     # 0.4 in the ablation [PeCo, Table 7]
    batch_size=128,             # [PeCo]
    epochs=100,                 # [PeCo]
    warmup_steps=5000,          # [PeCo]; then a cosine to 0, our choice
    lr=5e-5,                    # [PeCo]
    betas=[0.5, 0.95],          # [PeCo]
)
RECIPES = recipes.of("tokenizer", PAPER)


def get_args(argv=None):
    p = flags.parser("tokenizer", __doc__)
    p.add_argument("--channels", type=within(int, "[16, 8192]"), nargs="+",
                   help="widths from the image's resolution down, each next one at half of it: the "
                        "stride of the codes is 2^(number − 1) pixels; not used with --vit")
    p.add_argument("--decoder-channels", type=within(int, "[16, 8192]"), nargs="+",
                   help="the decoder's, in the same order; by default the same")
    p.add_argument("--decoder-blocks", type=within(int, "[1, 100]"),
                   help="residual blocks of the decoder at each resolution (by default 2), or its "
                        "transformer blocks with --vit (by default the encoder's number)")
    p.add_argument("--vit", choices=SIZES,
                   help="a ViT of this size as encoder, one as decoder, in place of convolutions")
    p.add_argument("--patch-size", type=within(int, "[1, 256]"),
                   help="side of a patch of --vit, pixels")
    p.add_argument("--codebook-size", type=within(int, f"[2, {2 ** 20}]"),
                   help="K, number of codes")
    p.add_argument("--code-dim", type=within(int, "[1, 8192]"),
                   help="D, dimension of a code")
    p.add_argument("--decay", type=rate,
                   help="γ, decay of the codebook's moving averages in a step")
    p.add_argument("--revive", type=rate,
                   help="a code used less than this share of the mean use starts anew; 0: never")
    p.add_argument("--commitment-weight", type=amount, help="β, weight of the commitment term")
    p.add_argument("--perceptual",
                   help="perceptual network: moco_v3, moco_v3_resnet50, vgg16 or resnet50 "
                        "(downloaded), the path of one of their files, or of a teacher.py or "
                        "finetune.py run")
    p.add_argument("--perceptual-weight", type=amount,
                   help="λ, weight of the perceptual loss; 0: pixel-only codes")
    p.add_argument("--perceptual-layers", type=positive, nargs="+",
                   help="S, layers that are compared; by default blocks 3 6 9 12 of 12, every "
                        "stage of a CNN")
    p.add_argument("--adversarial-weight", type=amount,
                   help="weight of the adversarial loss; 0: no discriminator")
    p.add_argument("--betas", type=rate, nargs=2, help="Adam's β₁ and β₂")
    p.add_argument("--warmup-steps", type=count, help="steps of linear warm-up of the lr")
    p.add_argument("--eval-crop", type=within(float, "[0.1, 1]"),
                   help="centre crop in evaluation, share of the side")
    data.add_arguments(p, layout=data.ANY_LAYOUT)
    return flags.parse(p, RECIPES, argv)


@launch.as_input_error()
def build(args, perceptual_net):
    """The tokenizer, L_percep or None, the discriminator or None, and the tokenizer's arguments."""
    model_args = dict(
        image_size=args.image_size, channels=args.channels, codebook_size=args.codebook_size,
        code_dim=args.code_dim, decay=args.decay, revive=args.revive,
        decoder_channels=args.decoder_channels, decoder_blocks=args.decoder_blocks,
        vit=SIZES[args.vit] if args.vit else None, patch_size=args.patch_size)
    tokenizer = VQTokenizer(**model_args)
    perceptual = discriminator = None
    if args.perceptual_weight:
        perceptual = PerceptualLoss(perceptual_net, args.perceptual_layers)
    if args.adversarial_weight:
        discriminator = PatchDiscriminator()
    return tokenizer, perceptual, discriminator, model_args


# ------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate(args, tokenizer, perceptual, dataset, device):
    """A row of figures on all validation images, and two pictures in the run's folder.

    psnr: dB, averaged over images; mse: of pixels in [-1, 1]; distance: L_percep; usage: share of
    the codes used; perplexity: of the codes' frequencies. Every image counts once, on any number of
    ranks.
    """
    tokenizer.eval()
    size = len(tokenizer.quantizer.codebook)
    counts = torch.zeros(size, device=device)               # uses of each code
    sums = {name: torch.zeros((), device=device, dtype=torch.float64)
            for name in ("psnr", "mse", "distance", "images")}
    shuffled = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    transform = data.eval_transform(args.image_size, args.eval_crop)
    loader = data.eval_loader(dataset, transform, launch.micro_batch(args), args.workers,
                              indices=shuffled.tolist())    # the pictures show all classes
    for i, (images, _) in enumerate(loader):
        images = images.to(device)
        x_hat, codes, _ = tokenizer(images)
        mse = F.mse_loss(x_hat.clamp(-1, 1), images, reduction="none").mean((1, 2, 3))      # (B,)
        sums["psnr"] += (10 * torch.log10(4 / mse)).sum()   # peak² = 4, since the range is 2
        sums["mse"] += mse.sum()
        sums["images"] += len(images)
        if perceptual:
            sums["distance"] += len(images) * perceptual(images, x_hat)
        counts += torch.bincount(codes.flatten(), minlength=size)
        if i == 0 and launch.rank() == 0:
            draw(images, x_hat, codes, Path(args.output))
    if dist.is_initialized():
        dist.all_reduce(counts)
        for total in sums.values():
            dist.all_reduce(total)
    tokenizer.train()

    images = sums.pop("images")
    row = {name: (total / images).item() for name, total in sums.items()}
    if not perceptual:
        del row["distance"]
    frequency = counts / counts.sum()
    row["usage"] = (counts > 0).float().mean().item()
    row["perplexity"] = torch.special.entr(frequency).sum().exp().item()
    return row


def draw(images, x_hat, codes, folder, rows=16, columns=16):
    """Two pictures of some images (B, 3, H, W), their reconstructions and codes (B, h, w).

    reconstructions.png: the first images over their reconstructions. codes.png: a row of patches
    for each of the most used codes.
    """
    data.save_rows([images[:8], x_hat[:8]], folder / "reconstructions.png")
    s = images.shape[2] // codes.shape[1]                   # side of a patch, pixels
    patches = images.unfold(2, s, s).unfold(3, s, s)                            # (B, 3, h, w, s, s)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)                   # (R, 3, s, s)
    codes = codes.flatten()
    sheet = []
    for code in torch.bincount(codes).argsort(descending=True)[:rows]:
        own = patches[codes == code][:columns]
        white = torch.ones_like(patches[:1]).repeat(columns - len(own), 1, 1, 1)
        sheet.append(torch.cat([own, white]))
    data.save_rows(sheet, folder / "codes.png")


# ------------------------------------------------------------------------------------------------

@launch.cleans_up
def main(args):
    device = launch.device()
    dataset = data.load_images(args.data, "train", args.image_size)
    val = data.load_images(args.data, "val", args.image_size)

    # The frozen perceptual network; its digest is compared on resuming: another is another loss.
    perceptual_net = digest = None
    if args.perceptual_weight:
        perceptual_net, digest = perceptual_network(args.perceptual)

    # The tokenizer, the discriminator of the adversarial ablation, and their optimizer
    torch.manual_seed(args.seed)
    tokenizer, perceptual, discriminator, model_args = build(args, perceptual_net)
    tokenizer.to(device, memory_format=torch.channels_last).train()
    modules = dict(model=tokenizer)
    if perceptual:
        perceptual.to(device)
    if discriminator:
        modules["discriminator"] = discriminator.to(device)
    parameters = [(f"{name}.{key}", parameter) for name, module in modules.items()
                  for key, parameter in module.named_parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, betas=tuple(args.betas), fused=True)

    # The run: a new one, or from where it stopped
    run = Run(args, optimizer, model_args, modules,
              identity=dict(images=len(dataset), perceptual=digest))
    transform = data.crop_and_flip(args.image_size, args.crop_min)
    batches = data.train_batches(dataset, transform, args, run.start, run.steps, device)
    if args.compile:
        tokenizer.encoder.compile()
        tokenizer.decoder.compile()
    network = launch.ddp(tokenizer)
    wrapped = launch.ddp(discriminator) if discriminator else None
    networks = [network, wrapped] if wrapped else [network]
    autocast = launch.autocast(args, device)

    for step in run.progress():
        if run.due(step):
            run.save(step)
            row = evaluate(args, tokenizer, perceptual, val, device)
            run.log_evaluation(step, split="val", **row)
            l_percep = args.perceptual_weight * row.get("distance", 0.0)
            run.keep_best(step, -(row["mse"] + l_percep))           # of Eq. 5, without L_commit
        if step == run.steps:
            break

        lr = launch.cosine(step, run.steps, args.warmup_steps, args.lr)
        launch.set_lr(optimizer, lr)
        generator = torch.Generator().manual_seed(launch.derive_seed(args.seed, step))
        batch = [images for images, _ in next(batches)]
        if step == 0:                                    # codes begin as vectors of the first batch
            with torch.no_grad(), autocast:
                for x in batch:                             # the quantizer keeps their vectors
                    tokenizer.quantizer(tokenizer.encoder(x))
            tokenizer.quantizer.initialize(generator)

        for x in run.micro_batches(batch, *networks):
            with autocast:
                x_hat, _, l_commit = network(x)
                l_pixel = F.mse_loss(x_hat.float(), x)
                l_percep = perceptual(x, x_hat) if perceptual else x.new_zeros(())
                # Eq. 5. Its codebook term ‖sg[Enc(x)] − z_q‖² is realised by the moving averages.
                loss = (l_pixel + args.perceptual_weight * l_percep
                        + args.commitment_weight * l_commit)
                if discriminator:
                    l_fool, l_judge = adversarial(discriminator, wrapped, x, x_hat)     # Eq. 8
                    loss = loss + args.adversarial_weight * l_fool + l_judge
                    run.add(fool=l_fool, judge=l_judge)
            (loss / args.accumulate).backward()
            run.add(loss=loss, pixel=l_pixel, perceptual=l_percep, commitment=l_commit)
        gradients = [parameter.grad for _, parameter in parameters]
        run.add(grad_norm=nn.utils.get_total_norm(gradients))       # the paper does not clip
        run.agree()
        optimizer.step()
        optimizer.zero_grad()
        tokenizer.quantizer.update(generator)               # the same draw on all ranks
        run.log(step + 1, lr=lr)


if __name__ == "__main__":
    launch.start(main, get_args())
