"""Networks from weights: of our own runs, and of BEiT's, timm's, MoCo v3's and torchvision's files.

Files are told apart by the names of their weights. Whatever does not fit is refused by name: no
network with random weights ever stands in for a trained one.
"""
import contextlib
from pathlib import Path

import torch
import torchvision
from torchvision.transforms import v2 as T

import data
from model import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIZES,
    VisionTransformer,
    VQTokenizer,
    resize_bias_table,
    resize_positions,
)
from support import beit, checkpoint
from support.flags import amount, rate, within
from support.launch import InputError, as_input_error, first_of_machine, rank, say

# MoCo v3's ViT-B of 300 epochs (the 100-epoch one, which PeCo uses, was never published) and its
# ResNet-50; torchvision's supervised networks.
MOCO_V3_FILES = "https://dl.fbaipublicfiles.com/moco-v3/"
DOWNLOADS = {
    "moco_v3": MOCO_V3_FILES + "vit-b-300ep/vit-b-300ep.pth.tar",
    "moco_v3_resnet50": MOCO_V3_FILES + "r-50-100ep/r-50-100ep.pth.tar",
    "vgg16": torchvision.models.VGG16_Weights.IMAGENET1K_V1.url,
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url,
}
# Input statistics, of pixels in [0, 1].
STATISTICS = {
    "half": dict(mean=HALF, std=HALF),
    "imagenet": dict(mean=IMAGENET_MEAN, std=IMAGENET_STD),
}
MOCO_V3 = dict(positions="absolute", layer_scale=0.0, mean=IMAGENET_MEAN, std=IMAGENET_STD)

MOCO_V3_SMALL_HEADS = 12                                    # of its ViT-S; DeiT's and ours has 6
VITS = ("teacher", "pretrain", "finetune")                  # stages whose "model" is a ViT

# What belongs to a task and not to the backbone: it may be missing, or of another shape. decoder_
# is MAE's, cls_pt_ that of BEiT v2's extra head.
TASK = ("head.", "lm_head.", "fc_norm.", "norm.", "mask_token", "decoder_", "cls_pt_")


# ------------------------------------------------------------------------------------------------
# Our own runs

def load(path, stages=("teacher", "tokenizer", "pretrain", "finetune")):
    """The network of a run or checkpoint, ready to use, in eval mode on the CPU.

    A VQTokenizer of tokenizer.py's, a VisionTransformer of the other stages' and of a folder of
    transformers' BEiT (tools/export.py writes one). Its .preprocess turns an image, as
    data.open_image takes it, into pixels (3, H, W); .classes are the names of finetune.py's
    classes, else None. Raises InputError for any other stage.
    """
    state = read_state(path, stages)
    model = restore(path, state)
    known = state["args"] | state.get("identity", {})
    evaluation = data.evaluation(model.image_size, known.get("eval_crop", 0.875))
    model.preprocess = T.Compose([data.open_image, evaluation])
    model.classes = class_names(state)
    return model.eval().requires_grad_(False)


def read_state(path, stages=None, flag=""):
    """checkpoint.load, which also takes the folders that tools/export.py writes."""
    folder = Path(path)
    if (folder / "config.json").exists():
        state = beit.read(folder)
        if stages and state["stage"] not in stages:
            raise InputError(f"{folder}: found transformers' BEiT, "
                             f"expected one of {' or '.join(stages)}")
        return state
    teacher = folder / "checkpoint.pth.tar"
    return checkpoint.load(teacher if teacher.exists() else path, stages, flag)


def read_own(args, classes):
    """The contents of --init, a run of args.stage itself, for --eval.

    Raises InputError where it is of another stage or has another number of classes.
    """
    state = checkpoint.load(args.init, [args.stage], "--init")
    found = state["model_args"].get("classes")
    if found != classes:
        raise InputError(f"--init {args.init}: has {found} classes, --data {args.data} {classes}")
    say_other_sizes(args, state)
    return state


def say_other_sizes(args, state):
    """Say where --eval looks at images of another size than the run did."""
    for key in ("image_size", "max_size", "eval_crop"):
        own, now = state["args"].get(key), vars(args).get(key)
        if own not in (None, now) and rank() == 0:
            flag = f"--{key.replace('_', '-')}"
            say(f"--init {args.init} was trained with {flag} {own}, is evaluated with {now}")


def restore(source, state):
    """The network of one of our checkpoints, called `source` in messages. Raises InputError."""
    with checkpoint.built_from(source):
        network = network_of(state)
        network.load_state_dict(state["model"])
    return network


def class_names(state):
    """Names of the classes of one of our checkpoints; None where it has none."""
    return (state["args"] | state.get("identity", {})).get("class_names")


def refuse_other_names(source, state, data, names):
    """Raise InputError where the data's classes, `names`, are not those of the checkpoint.

    source, data: what messages call the two. Another project may have other words for the same
    classes: where not one name is common, a line says that nothing was compared.
    """
    if not state or state.get("stage") != "finetune" or not class_names(state):
        return
    known = class_names(state)
    if "step" not in state and not set(known) & set(names):     # of transformers
        if rank() == 0:
            say(f"{source}: its classes have other names ({known[0]}, …) than those of {data} "
                f"({names[0]}, …): they are taken by their numbers")
        return
    for i, (own, name) in enumerate(zip(known, names, strict=False)):
        if own != name:
            raise InputError(f"{data}: its class {i} is {name}, that of {source} is {own}")


def network_of(state):
    """The network of a checkpoint, with random weights."""
    if state["stage"] == "tokenizer":
        return VQTokenizer(**state["model_args"])
    return VisionTransformer(**state["model_args"])


# ------------------------------------------------------------------------------------------------
# A ViT for another task

def add_arguments(p, also="none: from scratch"):
    """Add the flags of a stage that begins from a trained ViT. also: what else --init may be."""
    group = p.add_argument_group("the ViT and its optimizer")
    group.add_argument("--init",
                       help="what to begin from: run or checkpoint of pretrain.py, teacher.py or "
                            f"finetune.py, a file of BEiT's, timm's or MoCo v3's, a folder of "
                            f"transformers' BEiT, or {also}")
    group.add_argument("--model", choices=SIZES, help="size of the ViT, where --init does not say")
    group.add_argument("--patch-size", type=within(int, "[1, 256]"),
                       help="side of a patch, pixels, where --init does not say")
    group.add_argument("--layer-scale", type=amount,
                       help="initial value, where --init does not say; 0: no layer scale")
    add_statistics(group)
    group.add_argument("--drop-path", type=rate,
                       help="rate of the last block, rising from 0 at the first")
    group.add_argument("--betas", type=rate, nargs=2, help="AdamW's β₁ and β₂")
    group.add_argument("--weight-decay", type=amount, help="AdamW's weight decay, of matrices")
    group.add_argument("--layer-decay", type=within(float, "(0, 1]"),
                       help="factor of the lr from one block to the one before it")
    group.add_argument("--checkpoint-activations", action="store_true",
                       help="recompute blocks in the backward pass: less memory, one forward "
                            "pass more")


def add_statistics(p):
    p.add_argument("--statistics", choices=STATISTICS,
                   help="mean and deviation of the inputs, where --init does not say: half (0.5, "
                        "also from scratch and for BEiT's files if not given) or imagenet (MoCo "
                        "v3's); files of other ViTs need the flag")


def read(args):
    """The contents of --init, None for none; their digest, or --init itself where it has none."""
    if args.init == "none":
        return None, args.init
    state = read_state(args.init, None, "--init")
    state.pop("optimizer", None)                            # twice as large as the weights
    return state, state.get("digest", args.init)


def begin(args, state, image_size, classes=0):
    """A ViT for a new task from --init, whose contents are `state`, by the flags of add_arguments.

    Returns as transfer does.
    """
    flags = dict(SIZES[args.model], patch_size=args.patch_size, layer_scale=args.layer_scale)
    flags |= STATISTICS.get(args.statistics, {})
    vit, arguments, missing = transfer(
        f"--init {args.init}", state, flags,
        image_size=image_size, drop_path=args.drop_path, classes=classes)
    vit.checkpoint_activations = args.checkpoint_activations
    unused = [f"{key} {value}" for key, value in flags.items() if arguments[key] != value]
    if unused and rank() == 0:
        say(f"--init {args.init} says otherwise, not used: {', '.join(unused)}")
    return vit, arguments, missing


def transfer(source, state, arguments, **task):
    """A ViT for a new task with the weights of another.

    source: what messages call the checkpoint. state: its contents; None: from scratch.
    arguments: of VisionTransformer, where the checkpoint does not say. task: those of the new task.

    Returns (the ViT, its arguments, names of the weights that the checkpoint lacks).
    """
    if state is None:
        weights = None                                      # the original ViT [PeCo]
        arguments = STATISTICS["half"] | arguments | dict(positions="learned")
    elif state.get("stage") in VITS:
        weights, arguments = state["model"], STATISTICS["half"] | state["model_args"]
    elif "stage" in state:
        raise InputError(f"{source}: found a checkpoint of {state['stage']}, "
                         f"expected one of {' or '.join(VITS)}")
    else:
        weights = foreign_weights(source, state)
        given = {key: arguments[key] for key in ("mean", "std") if key in arguments}
        arguments = arguments | kind_of(weights, moco_v3=of_moco_v3(state)) | given
        if "mean" not in arguments:
            raise InputError(f"{source}: a ViT whose file does not tell the statistics of its "
                             "inputs: give --statistics imagenet (MoCo v3's, DeiT's, MAE's) or "
                             "half (most of timm's own)")
    arguments = {key: value for key, value in arguments.items() if key != "codes"} | task
    if arguments.get("positions", "shared") == "shared":
        arguments["positions"] = "block"                    # BEiT; load_backbone fills each block
    with checkpoint.built_from(source) if weights else as_input_error():
        vit = VisionTransformer(**arguments)
    if not weights:
        return vit, arguments, list(vit.state_dict())
    try:
        return vit, arguments, load_backbone(vit, weights)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def of_moco_v3(state):
    """Whether a file is one that MoCo v3's pre-training writes: two encoders under these names."""
    names = state.get("state_dict", ())
    return any("base_encoder." in name for name in names)


def kind_of(weights, moco_v3):
    """What another project's file says of the ViT's arguments; nothing of what it does not say.

    moco_v3: whether it is MoCo v3's. Shapes show neither heads nor the statistics of the inputs.
    """
    prefixes = ("decoder_", "cls_pt_")                      # MAE's and BEiT v2's: ImageNet's
    imagenet = moco_v3 or any(name.startswith(prefixes) for name in weights)
    if "pos_embed" in weights and "blocks.0.attn.q_bias" not in weights:        # a plain ViT
        kind = dict(positions="absolute", layer_scale=0.0)
        if moco_v3 and len(weights.get("blocks.0.norm1.weight", ())) == SIZES["small"]["dim"]:
            kind["heads"] = MOCO_V3_SMALL_HEADS
        return kind | (STATISTICS["imagenet"] if imagenet else {})
    return dict(
        positions="learned" if "pos_embed" in weights else "block",
        # Any layer scale above 0 will do: the trained one is in the file.
        layer_scale=0.1 if "blocks.0.gamma_1" in weights else 0.0,
        **STATISTICS["imagenet" if imagenet else "half"])


def foreign_weights(source, state):
    """Weights of another project's file: BEiT's, MoCo v3's, DeepSpeed's, or nothing but them."""
    for key in ("model", "state_dict", "module"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    if not state:
        raise InputError(f"{source}: no weights in it")
    try:
        weights = bare(state)
        checkpoint.check_weights(weights)
    except checkpoint.UNFIT as error:
        raise InputError(f"{source}: {error}") from error
    return weights


def bare(weights):
    """Weights by their own names, without what wrappers put before them, in whatever order."""
    for prefix in 2 * ("_orig_mod.", "module.", "base_encoder."):   # torch.compile, DDP, MoCo v3
        inner = {key.removeprefix(prefix): value for key, value in weights.items()
                 if key.startswith(prefix)}
        weights = inner or weights
    return weights


def load_backbone(model, weights):
    """Load a ViT's weights into another one for a new task.

    A shared position bias is copied into every block where the model has one a block; positions
    are interpolated to another grid; the new task's own layers stay as initialised. Returns their
    names. Raises InputError where the architectures differ.
    """
    own = model.state_dict()
    computed = ("relative_position_index", "k_bias")        # in BEiT's files; the second is 0
    weights = {key: value for key, value in weights.items() if not key.endswith(computed)}
    tables = [key for key in own if key.endswith("relative_position_bias_table")]
    if tables and "rel_pos_bias.relative_position_bias_table" in weights:
        shared = weights.pop("rel_pos_bias.relative_position_bias_table")
        weights |= dict.fromkeys(tables, shared)
    for key in own:
        if key not in weights or own[key].shape == weights[key].shape:
            continue
        found = weights[key].shape
        with contextlib.suppress(*checkpoint.UNFIT):        # no square grid, or no class token
            if key.endswith("relative_position_bias_table"):
                weights[key] = resize_bias_table(weights[key], model.grid, model.grid)
            elif key == "pos_embed":
                weights[key] = resize_positions(weights[key], model.grid, model.grid)
        if weights[key].shape == own[key].shape:
            continue
        if not key.startswith(TASK):
            flag = "--patch-size" if key.startswith("patch_embed") else "--model"
            raise InputError(
                f"another architecture: {key}: expected {tuple(own[key].shape)}, found "
                f"{tuple(found)}; if it is a ViT of another size, give {flag}")
        del weights[key]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    refuse_others("lacks", missing)
    refuse_others("has", unexpected)
    return missing


def refuse_others(verb, keys):
    wrong = [key for key in keys if not key.startswith(TASK)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(f"another architecture: it {verb} {wrong[0]}{more}; if it is a ViT of "
                         "another depth, give --model")


# ------------------------------------------------------------------------------------------------
# The perceptual network

def perceptual_network(source):
    """The network behind L_percep, and a digest of its weights.

    source: a key of DOWNLOADS, or the path of one of these files, of a teacher.py run, or of a
    finetune.py run (a supervised network).
    """
    if source in DOWNLOADS and not Path(source).exists():
        state = download(source)
    else:
        state = read_state(source, None, "--perceptual")
    stage = state.get("stage")
    if stage in ("teacher", "finetune"):
        return restore(f"--perceptual {source}", state), state["digest"]
    if stage:
        raise InputError(f"--perceptual {source}: a checkpoint of {stage}, "
                         "expected one of teacher or finetune")
    weights = foreign_weights(f"--perceptual {source}", state)
    network = imitate(source, weights, of_moco_v3(state))
    heads = ("head.", "fc.")                             # not used; MoCo v3 has its projector there
    weights = {key: value for key, value in weights.items() if not key.startswith(heads)}
    digest = checkpoint.digest(weights)
    weights |= {key: value for key, value in network.state_dict().items() if key.startswith(heads)}
    with checkpoint.built_from(f"--perceptual {source}"):
        network.load_state_dict(weights)
    return network, digest


def download(source):
    url = DOWNLOADS[source]
    try:
        with first_of_machine():
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            f"--perceptual {source}: download of {url} failed ({error}); fetch the file by other "
            "means and pass its path, or that of a teacher.py run") from error


def imitate(source, weights, moco_v3):
    """A network of the architecture that a file's weights have."""
    if "pos_embed" in weights and moco_v3:
        return VisionTransformer(**SIZES["base"], **kind_of(weights, moco_v3))
    if "features.0.weight" in weights:
        return torchvision.models.vgg16()
    if "layer4.0.conv1.weight" in weights:
        return torchvision.models.resnet50()
    raise InputError(f"--perceptual {source}: neither a teacher.py run nor weights of MoCo v3, "
                     "VGG-16 or ResNet-50")
