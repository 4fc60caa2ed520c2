"""Stage 2: masked image modelling, a ViT that predicts the codes of masked patches (PeCo, sec. 3; BEiT).

    python pretrain.py --recipe demo
    torchrun --nproc-per-node 8 pretrain.py --epochs 800
"""
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import runtime
from model import SIZES, VisionTransformer, VQTokenizer, block_mask, param_groups

RECIPES = {
    "paper": dict(                          # PeCo: ViT-B, batch 2048, 300 or 800 epochs; the rest BEiT's base
        data="data/imagenet", augment="batch", model="base", image_size=224, patch_size=16, batch_size=2048, epochs=800, lr=1.5e-3,
        betas=[0.9, 0.999], weight_decay=0.05, warmup_epochs=10, clip=3.0, drop_path=0.1,
        layer_scale=0.1,                    # 1e-5 for large and huge
        mask_ratio=75 / 196, mask_block=16, crop_min=0.08, jitter=0.4),
    "cifar": dict(                          # our choice
        data="data/cifar10", augment="batch", model="tiny", image_size=32, patch_size=4, batch_size=512, epochs=400, lr=1.5e-3,
        betas=[0.9, 0.98], weight_decay=0.05, warmup_epochs=10, clip=3.0, drop_path=0.0, layer_scale=0.1,
        mask_ratio=0.4, mask_block=4, crop_min=0.2, jitter=0.4),
    "cifar-cpu": dict(                      # our choice
        data="data/cifar10", augment="batch", model="nano", image_size=32, patch_size=8, batch_size=128, epochs=5, lr=2e-3,
        betas=[0.9, 0.98], weight_decay=0.05, warmup_epochs=0.5, clip=3.0, drop_path=0.0, layer_scale=0.1,
        mask_ratio=0.4, mask_block=2, crop_min=0.4, jitter=0.0),
    "demo": dict(                           # our choice
        data="synthetic:8000", model="nano", image_size=32, patch_size=8, batch_size=128, epochs=6, lr=2e-3,
        betas=[0.9, 0.98], weight_decay=0.05, warmup_epochs=0.2, clip=3.0, drop_path=0.0, layer_scale=0.1,
        mask_ratio=0.4, mask_block=2, crop_min=0.4, jitter=0.0),
}


def get_args(argv=None):
    p = runtime.parser(__doc__, "pretrain")
    p.model.add_argument("--tokenizer", default="runs/RECIPE/tokenizer", help="run or checkpoint of tokenizer.py")
    p.model.add_argument("--model", choices=SIZES)
    p.model.add_argument("--patch-size", type=int, help="pixels")
    p.data.add_argument("--mask-ratio", type=float, help="share of the patches that is masked, in every image")
    p.data.add_argument("--mask-block", type=int, help="smallest block of masked patches")
    p.data.add_argument("--crop-min", type=float, help="smallest random crop, share of the image's area")
    p.data.add_argument("--jitter", type=float, help="strength of the colour jitter")
    p.schedule.add_argument("--betas", type=float, nargs=2, help="of AdamW")
    p.schedule.add_argument("--weight-decay", type=float)
    p.schedule.add_argument("--warmup-epochs", type=float)
    p.schedule.add_argument("--clip", type=float, help="largest norm of the gradients")
    p.model.add_argument("--drop-path", type=float, help="rate of the last block, rising from 0")
    p.model.add_argument("--layer-scale", type=float, help="initial value; 0: none")
    p.hardware.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass: less memory")
    return runtime.parse(p, RECIPES, argv)


class AugmentAndMask:
    """PIL image → (image (3, H, W), mask (h, w)), both drawn from the sample's own seed."""

    def __init__(self, transform, grid, count, min_block):
        self.transform, self.mask = transform, (grid, count, min_block)

    def __call__(self, image):
        return self.transform(image), block_mask(*self.mask)

    def finish(self, batch):
        return self.transform.finish(batch[0]), batch[1]


def load_tokenizer(args, grid):
    """The frozen tokenizer; its codes must describe the ViT's patches, one each."""
    state = runtime.load_checkpoint(args.tokenizer, ["tokenizer"])
    tokenizer = VQTokenizer(**state["model_args"])
    tokenizer.load_state_dict(state["model"])
    # resized to its own grid it may see a patch at half to twice the size (BEiT's saw it at half): our choice
    if not 0.5 <= tokenizer.stride / args.patch_size <= 2:
        raise runtime.InputError(f"--tokenizer {args.tokenizer}: its codes of {tokenizer.stride} px do not fit the ViT's "
                                 f"{grid}×{grid} patches of {args.patch_size} px: train one of about that stride, or change "
                                 "--patch-size")
    return tokenizer.eval().requires_grad_(False), state["digest"]


def main(args):
    device, micro_batch = runtime.device(), runtime.micro_batch(args)
    grid = args.image_size // args.patch_size
    tokenizer, args.tokenizer_digest = load_tokenizer(args, grid)  # with the arguments: a resumed run needs the same
    tokenizer.to(device, memory_format=torch.channels_last)
    dataset = data.load_dataset(args.data, "train", args.image_size)
    epoch_steps, steps = runtime.total_steps(args, len(dataset))

    torch.manual_seed(args.seed)
    codes = len(tokenizer.quantizer.codebook)
    model_args = dict(SIZES[args.model], image_size=args.image_size, patch_size=args.patch_size, positions="shared",
                      layer_scale=args.layer_scale, drop_path=args.drop_path, codes=codes)
    model = VisionTransformer(**model_args).to(device)
    model.checkpoint_activations = args.checkpoint_activations
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=args.lr, betas=tuple(args.betas), fused=True)
    modules = dict(model=model)
    start, *_ = runtime.resume(args, modules, optimizer)

    transform = AugmentAndMask(data.pretrain_transform(args.image_size, args.crop_min, args.jitter, args.augment),
                               grid, round(args.mask_ratio * grid * grid), args.mask_block)
    loader = data.TrainLoader(dataset, transform, args, micro_batch, start, steps, device)
    if args.compile:
        model.compile()
        tokenizer.encoder.compile()
    network, autocast, caught = runtime.distribute(model, device), runtime.autocast(args, device), runtime.catch_signals()
    batches, spent, seen, sums = iter(loader), 0.0, 0, {}
    for step in tqdm(range(start, steps), initial=start, total=steps, disable=None if runtime.rank() == 0 else True):
        begun = time.time()
        lr = runtime.cosine(step, steps, args.warmup_epochs * epoch_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro_batches = [next(batches)[0] for _ in range(args.accumulate)]
        torch.manual_seed(runtime.derive_seed(args.seed, step, runtime.rank()))    # drop path
        terms = {}
        for i, (images, mask) in enumerate(micro_batches):
            network.require_backward_grad_sync = i == args.accumulate - 1          # DDP: all-reduce at the step's end
            with autocast:
                with torch.no_grad():
                    target = tokenizer.encode(images, grid)[mask]                   # (M,), of the unmasked image
                logits = network(images, mask)                                      # (M, K)
                loss = F.cross_entropy(logits.float(), target)                      # over masked patches only
            (loss / args.accumulate).backward()
            accuracy = (logits.argmax(1) == target).float().mean()
            for name, term in dict(loss=loss, accuracy=accuracy).items():
                terms[name] = terms.get(name, 0.0) + term.detach() / args.accumulate
        terms["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        terms, stopped = runtime.check_step(step, terms, caught, device, loader.samples)
        optimizer.step()
        optimizer.zero_grad()

        sums, seen, done = {k: sums.get(k, 0.0) + v for k, v in terms.items()}, seen + 1, step + 1
        spent += time.time() - begun                                # without evaluations and checkpoints
        if done % args.log_every == 0 or done == steps:
            runtime.log(args, step=done, epoch=done / epoch_steps, **{k: v / seen for k, v in sums.items()}, lr=lr,
                        images_per_s=seen * args.batch_size / spent)
            spent, seen, sums = 0.0, 0, {}
        runtime.checkpoint(args, done, steps, epoch_steps, stopped, modules, optimizer, model_args)


if __name__ == "__main__":
    runtime.launch(main, get_args())
