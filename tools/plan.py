"""What a run will cost, before it is paid for: weights, FLOPs, memory, steps and hours.

    python -m tools.plan pretrain --model huge --ranks 8 --images-per-second 6000

The first argument is a stage; all flags but --ranks, --gib and --images-per-second are its own.
Where there is no GPU to ask, --amp auto is counted as bf16. The stage's own builder makes the
networks, of fake tensors, with shapes but no storage: to ask for ViT-H costs nothing.
"""
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import commandline
import data
import detect
import finetune
import pretrain
import runtime
import segment
import teacher
import tokenizer
import weights
from codebook import VQTokenizer
from model import SIZES, VisionTransformer

STAGES = {module.__name__: module
          for module in (teacher, tokenizer, pretrain, finetune, segment, detect)}

# Training images and classes where --data is not there.
IMAGENET = (1_281_167, 1000)
ADE20K = (20_210, 150)
COCO = (117_266, 80)            # images with objects
COCO_ASPECT = 4 / 3             # the commonest
GIB = 2 ** 30
CARD = 80                       # GiB of a GPU that is not here: our choice


def attention(q, k, v, *_, **__):
    return sdpa_flop_count(q, k, v)


def attention_backward(gradient, q, k, v, *_, **__):
    return sdpa_backward_flop_count(gradient, q, k, v)


# A CPU's fused attention, which PyTorch's counter does not know.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


# ------------------------------------------------------------------------------------------------
# What the run reads

def dataset_of(args):
    """Training images, classes, and whether they were counted; else they are the paper's."""
    try:
        if args.stage == "segment":
            dataset = segment.load_dataset(args.data, "train", args.image_size, args.classes)
        elif args.stage == "detect":
            dataset = detect.load_dataset(args.data, "train", args.image_size)
        elif args.stage == "finetune":
            dataset = data.load_dataset(args.data, "train", args.image_size)
        else:
            dataset = data.load_images(args.data, "train", args.image_size)
    except runtime.InputError:
        paper = {"segment": ADE20K, "detect": COCO}
        return *paper.get(args.stage, IMAGENET), False
    images = len(dataset)
    if args.stage == "detect":
        images = len(dataset.with_objects())
    if args.stage == "finetune":                            # as its main()
        indices = set(data.label_subset(dataset.targets, args.label_fraction, args.seed))
        if args.holdout:
            held = data.label_subset(dataset.targets, args.holdout, finetune.HOLDOUT_SEED)
            indices -= set(held)
        images = len(indices)
    return images, len(dataset.classes), True


def checkpoint_without_weights(path, stages):
    """What a checkpoint says of its network; None where it is not there, or not ours.

    Raises InputError where it is of none of the stages that may be read there.
    """
    try:
        state = weights.read_state(path)
    except runtime.InputError:
        return None
    if "model_args" not in state:
        return None
    if state["stage"] not in stages:
        raise runtime.InputError(f"{path}: found a checkpoint of {state['stage']}, "
                                 f"expected one of {' or '.join(stages)}")
    return dict(stage=state["stage"], model_args=state["model_args"], model=None)


# ------------------------------------------------------------------------------------------------
# The networks of a stage, by its builder, and a loss that costs what the stage's does

def plan_teacher(args, classes, state):
    moco, _ = teacher.build(args)

    def loss(images):
        return moco(images, images)[0]
    frozen = [moco.momentum_encoder, moco.momentum_projector]
    return moco, frozen, loss


def plan_tokenizer(args, classes, state):
    network = weights.network_of(state) if state else VisionTransformer(
        **SIZES["base"], **weights.MOCO_V3)
    model, perceptual, discriminator, _ = tokenizer.build(args, network)

    def loss(images):
        x_hat, _, l_commit = model.train()(images)
        total = F.mse_loss(x_hat, images) + l_commit
        if perceptual:
            total = total + perceptual(images, x_hat)
        if discriminator:
            terms = tokenizer.adversarial(discriminator, discriminator, images, x_hat)
            total = total + sum(terms)
        return total
    trained = nn.ModuleList([model, discriminator] if discriminator else [model])
    return trained, [perceptual] if perceptual else [], loss


def plan_pretrain(args, classes, state):
    codes = VQTokenizer(**(state["model_args"] if state else {})).eval().requires_grad_(False)
    model, _, _ = pretrain.build(args, len(codes.quantizer.codebook))
    grid = args.image_size // args.patch_size
    masked = round(args.mask_ratio * grid * grid)

    def loss(images):                                       # fake tensors take no mask as index
        target = codes.encode(images, grid).flatten(1)[:, :masked]
        if args.mae:
            tokens, places = model.encoder.embed(images)
            visible = model.encoder.encode(tokens[:, :-masked], places)
            hidden = model.decoder.mask_token.expand(len(images), masked, -1)
            tokens = model.decoder.decode(torch.cat([model.decoder.embed(visible), hidden], 1))
            logits = model.decoder.head(tokens[:, -masked:])
        else:
            tokens = model.tokens(images, [len(model.blocks)])[0]
            logits = model.lm_head(model.norm(tokens[:, 1:1 + masked]))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return model, [codes], loss


def plan_finetune(args, classes, state):
    model, _ = finetune.build(args, classes, state)
    averaged = finetune.build(args, classes, state)[:1] if args.ema_decay else []

    def loss(images):
        labels = torch.zeros(len(images), dtype=torch.int64)
        return F.cross_entropy(model(images), labels)
    return model, list(averaged), loss


def plan_segment(args, classes, state):
    model, _ = segment.build(args, classes, state)

    def loss(images):
        labels = images[:, 0].round()
        return sum(segment.pixel_loss(logits, labels) for logits in model(images))
    return model, [], loss


def plan_detect(args, classes, state):
    model, _ = detect.build(args, classes, state)

    def loss(images):                                       # what follows depends on the data
        return sum(maps.mean() for maps in model.backbone(images).values())
    return model, [], loss


PLANS = dict(teacher=plan_teacher, tokenizer=plan_tokenizer, pretrain=plan_pretrain,
             finetune=plan_finetune, segment=plan_segment, detect=plan_detect)
READS = dict(tokenizer="perceptual", pretrain="tokenizer", finetune="init", segment="init",
             detect="init")
MADE_BY = dict(perceptual=("teacher", "finetune"), tokenizer=("tokenizer",),
               init=("teacher", "pretrain", "finetune"))
KEPT_FROZEN = ("teacher", "finetune")                       # averaged copies are in checkpoints


# ------------------------------------------------------------------------------------------------

def estimate(args, classes, ranks=1):
    """What one rank holds and does.

    → trained, held: numbers of weights; forward, training: FLOPs an image; activations, memory,
    written (a checkpoint): bytes; micro: images of a micro-batch; read: whether the network of the
    stage before is that of its checkpoint.
    """
    device = runtime.device()
    micro, rest = divmod(args.batch_size, ranks * args.accumulate)
    if rest or not micro:
        raise runtime.InputError(f"--batch-size {args.batch_size} does not divide into {ranks} "
                                 f"ranks × {args.accumulate} micro-batches")
    flag = READS.get(args.stage)
    path = getattr(args, flag) if flag else "none"
    state = None if path == "none" else checkpoint_without_weights(path, MADE_BY[flag])
    width = args.image_size
    if args.stage == "detect":
        width = min(args.max_size, round(args.image_size * COCO_ASPECT))
    # Initialisation looks at what it drew, which fake tensors do not know.
    undrawn = mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    # copy.deepcopy would copy a fake tensor's mode too, and modes do not mix.
    copied = mock.patch.object(FakeTensor, "__deepcopy__", lambda fake, _: torch.empty_like(fake))
    with FakeTensorMode(), torch.device(device), undrawn, copied:
        trained, frozen, loss = PLANS[args.stage](args, classes, state)
        modules = nn.ModuleList([trained, *frozen])
        saved = Saved(modules)
        counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        with counter, saved.hooks(), runtime.autocast(args, device):
            value = loss(torch.empty(micro, 3, args.image_size, width))
            forward, activations = counter.get_total_flops(), saved.bytes()
            value.backward()                                # checkpointed blocks save anew in it
        training = counter.get_total_flops()
        weights_trained = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        held = numbers([*modules.parameters(), *modules.buffers()])
        kept = nn.ModuleList([trained, *frozen]) if args.stage in KEPT_FROZEN else trained
        written = numbers(kept.state_dict().values()) + 2 * weights_trained
    memory = 4 * held + 12 * weights_trained + activations  # with gradients and Adam's two moments
    return SimpleNamespace(
        trained=weights_trained, held=held, forward=forward / micro, training=training / micro,
        activations=activations, memory=memory, written=4 * written, micro=micro,
        read=bool(state) or path in ("none", "moco_v3"))


def that_fits(args, classes, ranks, limit):
    """The smallest --accumulate whose memory is within `limit` bytes, and that memory; or None."""
    own = args.batch_size // ranks                          # images of a rank in a step
    for accumulate in range(args.accumulate + 1, own + 1):
        if own % accumulate == 0:
            smaller = SimpleNamespace(**vars(args) | dict(accumulate=accumulate))
            memory = estimate(smaller, classes, ranks).memory
            if memory <= limit:
                return accumulate, memory
    return None


def numbers(tensors):
    """How many numbers there are in tensors, each storage counted once."""
    sizes = {tensor.untyped_storage()._cdata: tensor.numel() for tensor in tensors}
    return sum(sizes.values())


class Saved:
    """The tensors that autograd keeps for the backward pass, each storage once, without weights."""

    def __init__(self, modules):
        self.weights = {p.untyped_storage()._cdata for p in modules.parameters()}
        self.sizes = {}

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.sizes[storage._cdata] = storage.nbytes()
        return tensor

    def bytes(self):
        return sum(self.sizes.values())


def get_args(argv=None):
    """Our own arguments, and those of the stage."""
    p = commandline.Parser("tools.plan", __doc__, allow_abbrev=False)
    p.add_argument("stage", choices=STAGES)
    p.add_argument("--ranks", type=commandline.positive, default=1, help="processes, a GPU each")
    p.add_argument("--gib", type=commandline.number(float, above=0),
                   help=f"memory of a GPU, GiB; by default that of this machine's, else {CARD}")
    p.add_argument("--images-per-second", type=commandline.number(float, above=0), default=1000,
                   help="of all ranks together")
    own, flags = p.parse_known_args(argv)
    return own, STAGES[own.stage].get_args(flags)


def main(argv=None):
    own, args = get_args(argv)
    gpu = torch.cuda.is_available()
    if args.amp == "auto" and not gpu:
        args.amp = "bf16"
    card = own.gib or (torch.cuda.mem_get_info()[1] / GIB if gpu else CARD)
    images, classes, counted = dataset_of(args)
    epoch_steps, steps = runtime.total_steps(args, images)
    found = estimate(args, classes, own.ranks)

    precision = "bf16" if runtime.autocast(args, runtime.device())._enabled else "fp32"
    hours = steps * args.batch_size / own.images_per_second / 3600
    kept = "two" if args.stage in ("teacher", "pretrain") else "three"
    source = "" if counted else ", the paper's: --data is not there"
    print(f"{args.stage}.py, ranks: {own.ranks}, images on each at a time: {found.micro}")
    print(f"weights trained     {found.trained / 1e6:,.1f} M, held {found.held / 1e6:,.1f} M")
    print(f"FLOPs an image      {found.forward / 1e9:,.1f} G forward, "
          f"{found.training / 1e9:,.1f} G with the backward pass")
    print(f"memory              {found.memory / GIB:,.1f} GiB in {precision}: weights, gradients "
          f"and Adam's moments {(found.memory - found.activations) / GIB:,.1f}, "
          f"activations {found.activations / GIB:,.1f}")
    print(f"checkpoint          {found.written / GIB:,.2f} GiB, {kept} of them")
    print(f"steps               {steps:,}: {epoch_steps:,} an epoch of {images:,} images{source}")
    print(f"time                {hours:,.1f} hours at {own.images_per_second:g} images/s")
    if not found.read:
        flag = READS[args.stage]
        print(f"--{flag} {getattr(args, flag)} is not there yet, or not a run: its network is "
              "taken to be the paper's, or as --model says.")
    if found.memory > card * GIB:
        fits = that_fits(args, classes, own.ranks, card * GIB)
        remedy = "not even one image at a time fits"
        if fits:
            remedy = f"--accumulate {fits[0]} takes {fits[1] / GIB:,.1f}"
        print(f"That is more than {card:,.3g} GiB: {remedy}.")
    if args.stage == "detect":
        print("Proposals, heads and their losses depend on the data and are not counted.")


if __name__ == "__main__":
    runtime.launch_tool("plan", main)
