"""Stage 1: the perceptual codebook, a VQ tokenizer trained with a perceptual loss (PeCo, sec. 3).

L = L_pixel + λ · L_percep + β · L_commit: the codes of perceptually similar patches come to agree.

    python tokenizer.py --recipe demo
    torchrun --nproc-per-node 8 tokenizer.py
"""
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import data
import runtime
from model import IMAGENET_MEAN, IMAGENET_STD, SIZES, PerceptualLoss, VisionTransformer, VQTokenizer, bare, trained_weights

RECIPES = {
    "paper": dict(                                                  # PeCo, as recalled, unless marked
        data="data/imagenet", augment="batch", image_size=224, batch_size=128, epochs=100, lr=5e-5, betas=[0.5, 0.95], warmup_steps=5000,
        channels=[32, 64, 128, 256, 256], codebook_size=8192, code_dim=256,         # channels: our choice
        decay=0.99, revive=0.01, commitment_weight=0.25,                            # VQ-VAE; our choice; VQ-VAE
        perceptual="moco_v3", perceptual_weight=1.0, crop_min=0.08, eval_crop=0.875),  # λ; crops: our choice
    "cifar": dict(                                                  # our choice
        data="data/cifar10", augment="batch", image_size=32, batch_size=256, epochs=50, lr=4e-4, betas=[0.5, 0.95], warmup_steps=500,
        channels=[64, 128, 128], codebook_size=2048, code_dim=64, decay=0.99, revive=0.01, commitment_weight=0.25,
        perceptual="runs/RECIPE/teacher", perceptual_weight=1.0, crop_min=0.4, eval_crop=1.0),
    "cifar-cpu": dict(                                              # our choice
        data="data/cifar10", augment="batch", image_size=32, batch_size=128, epochs=2, lr=1e-3, betas=[0.5, 0.95], warmup_steps=50,
        channels=[16, 32, 32, 64], codebook_size=256, code_dim=32, decay=0.98, revive=0.05, commitment_weight=0.25,
        perceptual="runs/RECIPE/teacher", perceptual_weight=1.0, crop_min=0.4, eval_crop=1.0, save_every=2),
    "demo": dict(                                                   # our choice
        data="synthetic:8000", image_size=32, batch_size=128, epochs=1, lr=1e-3, betas=[0.5, 0.95], warmup_steps=10,
        channels=[16, 32, 32, 64], codebook_size=256, code_dim=32, decay=0.9, revive=0.05, commitment_weight=0.25,
        perceptual="runs/RECIPE/teacher", perceptual_weight=1.0, crop_min=0.4, eval_crop=1.0),
}
MOCO_V3_URL = "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"


def get_args(argv=None):
    p = runtime.parser(__doc__, "tokenizer")
    p.model.add_argument("--channels", type=int, nargs="+",
                   help="of each resolution, the image's first; the codes' stride is 2^(number − 1)")
    p.model.add_argument("--codebook-size", type=int, help="K")
    p.model.add_argument("--code-dim", type=int, help="D")
    p.model.add_argument("--decay", type=float, help="γ of the codebook's moving averages, per step")
    p.model.add_argument("--revive", type=float, help="a code used less than this share of the mean starts anew")
    p.schedule.add_argument("--commitment-weight", type=float, help="β")
    p.model.add_argument("--perceptual", help="moco_v3, vgg16 or resnet50 (downloaded), the path of such a file, or of a teacher.py or finetune.py run")
    p.schedule.add_argument("--perceptual-weight", type=float, help="λ; 0: the pixel-only codebook of the paper's ablation")
    p.model.add_argument("--perceptual-layers", type=int, nargs="+", help="S; default: blocks 3 6 9 12 of 12, every stage of a CNN")
    p.schedule.add_argument("--adversarial-weight", type=float, default=0.0, help="of a PatchGAN's hinge loss (an ablation of the paper)")
    p.schedule.add_argument("--betas", type=float, nargs=2, help="of Adam")
    p.schedule.add_argument("--warmup-steps", type=int)
    p.data.add_argument("--crop-min", type=float, help="smallest random crop, share of the image's area")
    p.data.add_argument("--eval-crop", type=float, help="centre crop, share of the side")
    return runtime.parse(p, RECIPES, argv)


class PatchDiscriminator(nn.Sequential):
    """PatchGAN as in VQGAN, with GroupNorm for its BatchNorm (our choice): images → logits (B, 1, h, w)."""

    def __init__(self, channels=64):
        layers = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for _ in range(2):
            layers += [nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
                       nn.GroupNorm(channels // 8, 2 * channels), nn.LeakyReLU(0.2)]
            channels *= 2
        super().__init__(*layers, nn.Conv2d(channels, 1, 4, padding=1))


def perceptual_network(source):
    """The network behind L_percep, by name (downloaded) or by path, and a digest of its weights.

    MoCo v3's official files (ViT-B/16 or ResNet-50), torchvision's VGG-16 and ResNet-50, runs of teacher.py or (the
    supervised network of the paper's ablation) finetune.py, told apart by their parameters' names. Raises InputError where there are no weights: a random
    network never stands in.
    """
    urls = dict(moco_v3=MOCO_V3_URL, vgg16=torchvision.models.VGG16_Weights.IMAGENET1K_V1.url,
                resnet50=torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url)
    if source in urls and not Path(source).exists():
        try:
            state = torch.hub.load_state_dict_from_url(urls[source], map_location="cpu", weights_only=True)
        except OSError as error:
            raise runtime.InputError(f"--perceptual {source}: download of {urls[source]} failed ({error}); fetch the file by "
                                     "other means and pass its path, or that of a teacher.py run") from error
    else:
        state = runtime.load_checkpoint(source)
        if state.get("stage"):
            if state["stage"] not in ("teacher", "finetune"):
                raise runtime.InputError(f"--perceptual {source}: a checkpoint of {state['stage']}, expected one of teacher or finetune")
            network = VisionTransformer(**state["model_args"])
            network.load_state_dict(trained_weights(state))
            return network, state["digest"]
    state = bare(state.get("state_dict", state))                    # of MoCo v3's the encoder alone
    if "pos_embed" in state:
        network = VisionTransformer(**SIZES["base"], positions="absolute", layer_scale=0.0,
                                    mean=IMAGENET_MEAN, std=IMAGENET_STD)
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
    elif "features.0.weight" in state:
        network = torchvision.models.vgg16()
    elif "layer4.0.conv1.weight" in state:
        network = torchvision.models.resnet50()
        state = {k: v for k, v in state.items() if not k.startswith("fc.")} | {
            k: v for k, v in network.state_dict().items() if k.startswith("fc.")}   # MoCo's has its projector there; unused
    else:
        raise runtime.InputError(f"--perceptual {source}: neither a teacher.py run nor MoCo v3's, VGG-16's or ResNet-50's weights")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise runtime.InputError(f"--perceptual {source}: {str(error).splitlines()[1].strip()}") from error
    return network, runtime.digest(state)


@torch.no_grad()
def evaluate(args, tokenizer, perceptual, dataset, device, step):
    """On all validation images: PSNR (dB), perceptual distance, codebook usage and perplexity; two pictures."""
    tokenizer.eval()
    counts = torch.zeros(args.codebook_size, device=device)
    sums = torch.zeros(4, device=device, dtype=torch.float64)                       # PSNR, MSE, distance, images
    patches, patch_codes = [], []
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()  # all classes in the pictures
    loader = data.eval_loader(dataset, data.eval_transform(args.image_size, args.eval_crop), runtime.micro_batch(args),
                              args.workers, order)
    for batch, (images, _) in enumerate(loader):
        images = images.to(device)
        x_hat, codes, _ = tokenizer(images)
        mse = F.mse_loss(x_hat.clamp(-1, 1), images, reduction="none").mean((1, 2, 3))
        sums[0] += (10 * torch.log10(4 / mse)).sum()                                # the range is 2: peak² = 4
        sums[1] += mse.sum()
        sums[2] += len(images) * perceptual(images, x_hat) if perceptual else 0.0
        sums[3] += len(images)
        counts += torch.bincount(codes.flatten(), minlength=args.codebook_size)
        if batch == 0 and runtime.rank() == 0:
            rows = torch.cat([images[:8], x_hat[:8].clamp(-1, 1)])
            picture(rows, 8, Path(args.output) / "reconstructions.png")
        if runtime.rank() == 0 and batch * len(images) < 512:       # the first batches' patches, for the gallery
            cut = images.unfold(2, tokenizer.stride, tokenizer.stride).unfold(3, tokenizer.stride, tokenizer.stride)
            patches.append(cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).cpu())       # (R, 3, s, s)
            patch_codes.append(codes.flatten().cpu())
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(sums)
    if runtime.rank() == 0:
        gallery(torch.cat(patches), torch.cat(patch_codes), Path(args.output) / "codes.png")
    share = counts / counts.sum()
    psnr, mse, distance = (sums[:3] / sums[3]).tolist()
    row = dict(psnr=psnr, usage=(counts > 0).float().mean().item(), perplexity=torch.special.entr(share).sum().exp().item())
    if perceptual:
        row["distance"] = distance
    runtime.log(args, step=step, split="val", **row)
    tokenizer.train()
    return -(mse + args.perceptual_weight * distance)               # the objective without its commitment term


def gallery(patches, codes, path, rows=16, columns=16):
    """A row of patches for each of the most used codes."""
    used = torch.bincount(codes).argsort(descending=True)[:rows]
    cells = []
    for code in used:
        own = patches[codes == code][:columns]
        cells.append(torch.cat([own, torch.ones(columns - len(own), *patches.shape[1:])]))
    picture(torch.cat(cells), columns, path)


def picture(images, columns, path):
    save_image(make_grid(images, columns, pad_value=1.0), path, normalize=True, value_range=(-1, 1))


def main(args):
    device, micro_batch = runtime.device(), runtime.micro_batch(args)
    dataset = data.load_dataset(args.data, "train", args.image_size)
    val = data.load_dataset(args.data, "val", args.image_size)
    epoch_steps, steps = runtime.total_steps(args, len(dataset))

    # models: the tokenizer, the frozen perceptual network, the discriminator of the ablation
    torch.manual_seed(args.seed)
    model_args = dict(image_size=args.image_size, channels=args.channels, codebook_size=args.codebook_size,
                      code_dim=args.code_dim, decay=args.decay, revive=args.revive)
    perceptual = discriminator = None
    tokenizer = VQTokenizer(**model_args).to(device, memory_format=torch.channels_last).train()
    if args.perceptual_weight:                                      # its digest with the arguments: a resumed run needs the same
        frozen, args.perceptual_digest = perceptual_network(args.perceptual)
        perceptual = PerceptualLoss(frozen, args.perceptual_layers).to(device)
    modules = dict(model=tokenizer)
    if args.adversarial_weight:
        modules["discriminator"] = discriminator = PatchDiscriminator().to(device)
    parameters = [(f"{m}.{n}", p) for m, module in modules.items() for n, p in module.named_parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, betas=tuple(args.betas), fused=True)
    start, best, pending = runtime.resume(args, modules, optimizer)

    transform = data.tokenizer_transform(args.image_size, args.crop_min, args.augment)
    loader = data.TrainLoader(dataset, transform, args, micro_batch, start, steps, device)
    if args.compile:
        tokenizer.encoder.compile()
        tokenizer.decoder.compile()
    network, autocast, caught = runtime.distribute(tokenizer, device), runtime.autocast(args, device), runtime.catch_signals()
    judge = runtime.distribute(discriminator, device) if discriminator else None

    def validate():
        return evaluate(args, tokenizer, perceptual, val, device, done)

    done = start
    if pending:                                                     # the run was stopped before it was evaluated
        best = runtime.checkpoint(args, done, steps, epoch_steps, 0, modules, optimizer, model_args, validate, best)
    batches, spent, seen, sums = iter(loader), 0.0, 0, {}
    for step in tqdm(range(start, steps), initial=start, total=steps, disable=None if runtime.rank() == 0 else True):
        begun = time.time()
        lr = runtime.cosine(step, steps, args.warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        generator = torch.Generator().manual_seed(runtime.derive_seed(args.seed, step))  # alike on all ranks
        images = [next(batches)[0] for _ in range(args.accumulate)]
        if step == 0:                                               # the codebook begins as vectors of the first global batch
            with torch.no_grad(), autocast:
                for x in images:
                    tokenizer.quantizer(tokenizer.encoder(x))
            tokenizer.quantizer.initialize(generator)
        logged = {}
        for i, x in enumerate(images):
            for module in (network, judge):                         # DDP: all-reduce at the step's last micro-batch
                if module is not None:
                    module.require_backward_grad_sync = i == args.accumulate - 1
            with autocast:
                x_hat, _, commitment = network(x)
                terms = dict(pixel=F.mse_loss(x_hat.float(), x))            # L_pixel
                loss = terms["pixel"] + args.commitment_weight * commitment  # + β L_commit; the EMA is the codebook term
                if perceptual:
                    terms["perceptual"] = perceptual(x, x_hat)              # + λ L_percep
                    loss = loss + args.perceptual_weight * terms["perceptual"]
                if discriminator:                                           # hinge losses, each to its own network
                    fixed = {n: p.detach() for n, p in discriminator.named_parameters()}
                    terms["fool"] = -torch.func.functional_call(discriminator, fixed, x_hat).mean()
                    real, fake = judge(torch.cat([x, x_hat.detach()])).chunk(2)
                    terms["judge"] = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
                    loss = loss + args.adversarial_weight * terms["fool"] + terms["judge"]
            (loss / args.accumulate).backward()
            for name, term in dict(loss=loss, **terms, commitment=commitment).items():
                logged[name] = logged.get(name, 0.0) + term.detach() / args.accumulate
        logged["grad_norm"] = nn.utils.get_total_norm([p.grad for _, p in parameters])  # the paper does not clip
        logged, stopped = runtime.check_step(step, logged, caught, device, loader.samples)
        optimizer.step()
        optimizer.zero_grad()
        tokenizer.quantizer.update(generator)

        sums, seen, done = {k: sums.get(k, 0.0) + v for k, v in logged.items()}, seen + 1, step + 1
        spent += time.time() - begun                                # without evaluations and checkpoints
        if done % args.log_every == 0 or done == steps:
            runtime.log(args, step=done, epoch=done / epoch_steps, **{k: v / seen for k, v in sums.items()}, lr=lr,
                        images_per_s=seen * args.batch_size / spent)
            spent, seen, sums = 0.0, 0, {}
        best = runtime.checkpoint(args, done, steps, epoch_steps, stopped, modules, optimizer, model_args, validate, best)


if __name__ == "__main__":
    runtime.launch(main, get_args())
