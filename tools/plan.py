"""What a run will cost, before it is paid for: --dry-run of every stage comes here.

    python pretrain.py --model huge --dry-run 6000           # hours at 6000 images/s

The networks are built of fake tensors, which have shapes but no storage, so that ViT-H costs nothing to ask. (Tensors on the
meta device are the same but know nothing of autocast and of a device's own attention.)
"""
import functools
import sys
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import data
import detect
import finetune
import runtime
import segment
import teacher
from model import SIZES, PerceptualLoss, VisionTransformer, VQTokenizer, cached_position_index, offset_weights
from tokenizer import PatchDiscriminator

# training images and classes where --data is not there: ImageNet-1K's, ADE20K's, COCO's (images with objects)
PAPER = dict(segment=(20_210, 150), detect=(117_266, 80))
IMAGENET = 1_281_167, 1000


def read_arguments(args):
    """Of the network that the stage reads or begins from, where its checkpoint is there already; else None."""
    path = getattr(args, dict(tokenizer="perceptual", pretrain="tokenizer").get(args.stage, "init"), "none")
    try:
        state = runtime.load_checkpoint(path) if path != "none" else {}
    except runtime.InputError:
        state = {}
    if path not in ("none", "moco_v3") and "model_args" not in state:
        print(f"{path}: not there, or not ours: counted as the paper's or as --model", file=sys.stderr)
    return {key: value for key, value in state.get("model_args", {}).items() if key != "codes"}


def training_set(args):
    """(number of training images, of classes, whether they were counted)"""
    load = dict(segment=functools.partial(segment.load_dataset, classes=getattr(args, "classes", 0)), detect=detect.load_dataset)
    try:
        dataset = load.get(args.stage, data.load_dataset)(args.data, "train", image_size=args.image_size)
    except runtime.InputError:
        images, classes = PAPER.get(args.stage, IMAGENET)
        return images, classes, False
    images = len(dataset.with_objects()) if args.stage == "detect" else len(dataset)
    if args.stage == "finetune":                           # as main()
        indices = set(data.label_subset(dataset.targets, args.label_fraction, args.seed))
        held = data.label_subset(dataset.targets, args.holdout, finetune.HOLDOUT_SEED) if args.holdout else ()
        images = len(indices.difference(held))
    return images, len(dataset.classes), True


def networks(args, classes, read):
    """(module that is trained, module that is frozen or None, loss of a batch of images) of a stage. read: arguments of
    the network that it reads or begins from, or {}."""
    vit = dict(SIZES[args.model], patch_size=args.patch_size) if "model" in args else {}
    if args.stage in ("finetune", "segment", "detect"):
        vit |= dict(positions="block", layer_scale=args.layer_scale) | read
        vit |= dict(positions="absolute" if vit["positions"] == "absolute" else "block", classes=0)
    vit["image_size"] = args.image_size
    if args.stage == "teacher":
        encoders = [VisionTransformer(**vit, positions="absolute", layer_scale=0.0) for _ in range(2)]
        projectors = [teacher.mlp(3, SIZES[args.model]["dim"], args.hidden, args.features) for _ in range(2)]
        predictor = teacher.mlp(2, args.features, args.hidden, args.features)
        encoders[0].checkpoint_activations = args.checkpoint_activations
        encoders[0].patch_embed.requires_grad_(False)

        def loss(images):                                  # as MoCo.forward, whose deep copies fake tensors do not take
            queries = [predictor(projectors[0](encoders[0](images)[:, 0])) for _ in range(2)]
            with torch.no_grad():
                keys = [projectors[1](encoders[1](images)[:, 0]) for _ in range(2)]
            return sum((F.normalize(q.float(), dim=1) @ F.normalize(k.float(), dim=1).T).logsumexp(1).mean() for q, k in zip(queries, keys))
        return nn.ModuleList([encoders[0], projectors[0], predictor]), nn.ModuleList([encoders[1], projectors[1]]), loss
    if args.stage == "tokenizer":
        tokenizer = VQTokenizer(args.image_size, args.channels, args.codebook_size, args.code_dim).train()
        paper = dict(SIZES["base"], positions="absolute", layer_scale=0.0)
        frozen = PerceptualLoss(VisionTransformer(**read or paper)) if args.perceptual_weight else None
        judge = PatchDiscriminator() if args.adversarial_weight else None

        def loss(images):
            x_hat, _, commitment = tokenizer(images)
            judged = sum(judge(x).mean() for x in (x_hat, x_hat.detach(), images)) if judge else 0.0
            return F.mse_loss(x_hat, images) + commitment + (frozen(images, x_hat) if frozen else 0.0) + judged
        return nn.ModuleList([tokenizer, judge]) if judge else tokenizer, frozen, loss
    if args.stage == "pretrain":
        tokenizer = VQTokenizer(**read).eval().requires_grad_(False)
        model, grid = VisionTransformer(**vit, codes=len(tokenizer.quantizer.codebook)), args.image_size // args.patch_size
        model.checkpoint_activations = args.checkpoint_activations
        masked = round(args.mask_ratio * grid * grid)

        def loss(images):                                  # a fixed number of patches: fake tensors cannot be masked
            target = tokenizer.encode(images, grid).flatten(1)[:, :masked]
            logits = model.lm_head(model.norm(model.tokens(images, [len(model.blocks)])[0][:, 1:1 + masked]))
            return F.cross_entropy(logits.flatten(0, 1), target.flatten())
        return model, tokenizer, loss
    if args.stage == "finetune":
        network = own = VisionTransformer(**vit | dict(classes=classes))
        averaged = VisionTransformer(**vit | dict(classes=classes)) if args.ema_decay else None
        loss = lambda images: F.cross_entropy(network(images), torch.zeros(len(images), dtype=torch.int64, device=images.device))
    elif args.stage == "segment":
        network = segment.Segmenter(VisionTransformer(**vit), classes)
        own = network.backbone.vit
        loss = lambda images: sum(segment.pixel_loss(logits, images[:, 0].round()) for logits in network(images))
    else:                                                  # proposals and heads depend on the data: only the maps are counted
        vit["image_size"] = -(-args.image_size // vit["patch_size"]) * vit["patch_size"]
        network = detect.mask_rcnn(VisionTransformer(**vit), classes, args.channels, args.boxes, [args.image_size], args.max_size)
        own = network.backbone.pyramid.vit
        loss = lambda images: sum(x.mean() for x in network.backbone(images).values())
    own.checkpoint_activations = args.checkpoint_activations
    return network, averaged if args.stage == "finetune" else None, loss


def estimate(args, classes):
    """What one rank holds and does: a dict of figures."""
    device, micro, read = runtime.device(), runtime.micro_batch(args), read_arguments(args)
    height = width = args.image_size
    if args.stage == "detect":
        width = min(args.max_size, round(height * 4 / 3))  # COCO's commonest shape
    undrawn = mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **keywords: tensor)    # it looks at what it drew
    with FakeTensorMode(), torch.device(device), undrawn:
        network, frozen, loss = networks(args, classes, read)
        weights = {p.untyped_storage()._cdata for module in (network, frozen) if module is not None for p in module.parameters()}
        saved = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage.nbytes()
            return tensor
        with (FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
              runtime.autocast(args, device)):
            value, forward = loss(torch.empty(micro, 3, height, width)), counter.get_total_flops()
            activations = sum(saved.values())              # the backward pass of checkpointed blocks saves anew
            value.backward()
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        held = sum(t.numel() for module in (network, frozen) if module is not None for t in (*module.parameters(), *module.buffers()))
        kept = [network] + [frozen] * (args.stage in ("teacher", "finetune") and frozen is not None)   # averaged copies too
        written = sum(t.numel() for module in kept for t in module.state_dict().values()) + 2 * trained
    cached_position_index.cache_clear()                    # they have been asked for fake tensors
    offset_weights.cache_clear()
    return dict(trained=trained, held=held, forward=forward / micro, training=counter.get_total_flops() / micro,
                activations=activations, memory=4 * held + 12 * trained + activations,      # with gradients and Adam's two moments
                written=4 * written, micro=micro)


def main(args):
    images, classes, counted = training_set(args)
    found = estimate(args, classes)
    epoch_steps, steps = runtime.total_steps(args, images)
    seen, gib = steps * args.batch_size, 2 ** 30
    if runtime.rank():
        return
    print(f"{args.stage}.py, {runtime.world_size()} rank{'s' * (runtime.world_size() > 1)}, {found['micro']} images on each at a time\n"
          f"weights trained     {found['trained'] / 1e6:,.1f} M, held {found['held'] / 1e6:,.1f} M\n"
          f"FLOPs an image      {found['forward'] / 1e9:,.1f} G forward, {found['training'] / 1e9:,.1f} G with the backward pass\n"
          f"memory              {found['memory'] / gib:,.1f} GiB: weights, gradients and Adam's moments "
          f"{(found['memory'] - found['activations']) / gib:,.1f}, activations {found['activations'] / gib:,.1f}\n"
          f"checkpoint          {found['written'] / gib:,.2f} GiB, {'two' if args.stage in ('teacher', 'pretrain') else 'three'} of them\n"
          f"steps               {steps:,}: {epoch_steps:,} an epoch of {images:,} images{'' if counted else ' (not there: counted as the paper)'}\n"
          f"{f'at {args.dry_run:g} images/s':19} {seen / args.dry_run / 3600:,.1f} hours")
    if args.stage == "detect":
        print("Proposals, heads and their losses depend on the data and are not counted.")
