"""Networks from weights: of our own runs, and of BEiT's, timm's, MoCo v3's and torchvision's files.

Files are told apart by the names of their weights. Whatever does not fit is refused by name: no
network with random weights ever stands in for a trained one.
"""
import contextlib
import json
import re
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
from support import checkpoint
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
EARLIER = dict(positions="shared", layer_scale=0.1)       # where our checkpoint does not say

MOCO_V3_SMALL_HEADS = 12                                    # of its ViT-S; DeiT's and ours has 6
VITS = ("teacher", "pretrain", "finetune")                  # stages whose "model" is a ViT

# What belongs to a task and not to the backbone: it may be missing, too much, or of another shape.
# decoder_ is MAE's, cls_pt_ BEiT v2's extra head.
TASK = ("head.", "lm_head.", "fc_norm.", "norm.", "mask_token", "decoder_", "cls_pt_")


# ------------------------------------------------------------------------------------------------
# Our own runs

def load(path, stages=("teacher", "tokenizer", "pretrain", "finetune")):
    """The network of a run or checkpoint, ready to use, in eval mode on the CPU.

    A VQTokenizer of tokenizer.py's, a VisionTransformer of the other stages' and of a folder of
    transformers' BEiT (tools/export.py writes one). Its .preprocess turns an image, as
    data.open_image takes it, into pixels (3, H, W); .classes are the names of finetune.py's
    classes, else None.
    """
    state = read_state(path, stages)
    model = restore(path, state)
    known = state["args"] | state.get("identity", {})
    evaluation = data.eval_transform(model.image_size, known.get("eval_crop", 0.875))
    model.preprocess = T.Compose([data.open_image, evaluation])
    model.classes = class_names(state)
    return model.eval().requires_grad_(False)


def read_state(path, stages=None, flag=""):
    """checkpoint.load, which also takes the folders that tools/export.py writes."""
    folder = Path(path)
    if (folder / "config.json").exists():
        state = read_beit(folder)
        if stages and state["stage"] not in stages:
            raise InputError(f"{folder}: found transformers' BEiT, "
                             f"expected one of {' or '.join(stages)}")
        return state
    teacher = folder / "checkpoint.pth.tar"
    return checkpoint.load(teacher if teacher.exists() else path, stages, flag)


def read_own(args, classes):
    """The contents of --init, a run of args.stage itself, of so many classes, for --eval."""
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
    """The network of one of our checkpoints, called `source` in messages."""
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
    return VisionTransformer(**EARLIER | state["model_args"])


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

    Returns (the ViT, its arguments, names of the weights that the checkpoint lacks).
    """
    source, hint = f"--init {args.init}", ""
    statistics = STATISTICS.get(args.statistics, {})
    flags = dict(SIZES[args.model], patch_size=args.patch_size, layer_scale=args.layer_scale)
    flags |= statistics
    weights = None
    if state is None:                                       # from scratch: the original ViT [PeCo]
        arguments = STATISTICS["half"] | flags | dict(positions="learned")
    elif state.get("stage") in VITS:                        # ours: it says all
        weights, arguments = state["model"], STATISTICS["half"] | EARLIER | state["model_args"]
        unused = [f"{key} {value}" for key, value in flags.items() if arguments[key] != value]
        if unused and rank() == 0:
            say(f"{source} says otherwise, not used: {', '.join(unused)}")
    elif "stage" in state:
        raise InputError(f"{source}: found a checkpoint of {state['stage']}, "
                         f"expected one of {' or '.join(VITS)}")
    else:                                                   # another project's
        weights, kind = foreign(source, state)
        arguments = flags | kind | statistics
        hint = "; if it is a ViT of another size, give its --model and --patch-size"
        if "mean" not in arguments:
            raise InputError(f"{source}: a ViT whose file does not tell the statistics of its "
                             "inputs: give --statistics imagenet (MoCo v3's, DeiT's, MAE's) or "
                             "half (most of timm's own)")

    arguments = {key: value for key, value in arguments.items() if key != "codes"}
    arguments |= dict(image_size=image_size, drop_path=args.drop_path, classes=classes)
    if arguments["positions"] == "shared":
        arguments["positions"] = "block"                    # BEiT; load_backbone fills each block
    with checkpoint.built_from(source) if weights else as_input_error():
        vit = VisionTransformer(**arguments)
    vit.checkpoint_activations = args.checkpoint_activations
    if not weights:
        return vit, arguments, list(vit.state_dict())
    try:
        return vit, arguments, load_backbone(vit, weights)
    except InputError as error:
        raise InputError(f"{source}: another architecture: {error}{hint}") from error


def load_backbone(model, weights):
    """Load a ViT's weights into another one for a new task.

    A shared position bias is copied into every block where the model has one a block; positions
    are interpolated to another grid; the new task's own layers stay as initialised. Returns their
    names.
    """
    own = model.state_dict()
    computed = ("relative_position_index", "k_bias")        # in BEiT's files; the second is 0
    weights = {key: value for key, value in weights.items() if not key.endswith(computed)}
    tables = [key for key in own if key.endswith("relative_position_bias_table")]
    if tables and "rel_pos_bias.relative_position_bias_table" in weights:
        shared = weights.pop("rel_pos_bias.relative_position_bias_table")
        weights |= dict.fromkeys(tables, shared)
    for key, value in own.items():
        expected, found = value.shape, weights.get(key, value).shape
        if expected == found:
            continue
        with contextlib.suppress(*checkpoint.UNFIT):        # no square grid, or no class token
            if key in tables:
                weights[key] = resize_bias_table(weights[key], model.grid, model.grid)
            elif key == "pos_embed":
                weights[key] = resize_positions(weights[key], model.grid, model.grid)
        if weights[key].shape != expected:
            if not key.startswith(TASK):
                raise InputError(f"{key}: expected {tuple(expected)}, found {tuple(found)}")
            del weights[key]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    refuse_others("it", TASK, missing, unexpected)
    return missing


def refuse_others(source, optional, missing, unexpected):
    """Refuse weights that are missing or too much, but those whose names begin with `optional`."""
    for verb, keys in (("lacks", missing), ("has", unexpected)):
        wrong = [key for key in keys if not key.startswith(optional)]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise InputError(f"{source} {verb} {wrong[0]}{more}")


# ------------------------------------------------------------------------------------------------
# Other projects' files

def foreign(source, state):
    """Another project's file: its weights by their own names, and what it says of the ViT.

    The second are arguments of VisionTransformer. Shapes show neither the number of heads nor the
    statistics of the inputs: what is not known of this kind of file is left out.
    """
    for key in ("model", "state_dict", "module"):           # BEiT's, MoCo v3's, DeepSpeed's
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

    moco_v3 = any("base_encoder." in name for name in state)
    others = any(name.startswith(("decoder_", "cls_pt_")) for name in weights)  # MAE's, BEiT v2's
    inputs = STATISTICS["imagenet"] if moco_v3 or others else {}
    if "pos_embed" in weights and "blocks.0.attn.q_bias" not in weights:        # a plain ViT
        kind = dict(positions="absolute", layer_scale=0.0, **inputs)
        if moco_v3 and weights["pos_embed"].shape[-1:] == (SIZES["small"]["dim"],):
            kind["heads"] = MOCO_V3_SMALL_HEADS
        return weights, kind
    return weights, dict(
        positions="learned" if "pos_embed" in weights else "block",
        # Any layer scale above 0 will do: the trained one is in the file.
        layer_scale=0.1 if "blocks.0.gamma_1" in weights else 0.0,
        **(inputs or STATISTICS["half"]))


def bare(weights):
    """Weights by their own names; torch.compile, DDP, MoCo v3 put theirs before, in any order."""
    wrappers = [re.match(r"((_orig_mod|module|base_encoder)\.)*", key)[0] for key in weights]
    outer = max(wrappers, key=len)                          # MoCo v3's other networks have less
    return {key.removeprefix(outer): value for key, value in weights.items()
            if key.startswith(outer)}


# ------------------------------------------------------------------------------------------------
# Folders of transformers' BEiT: config.json beside the weights. Hugging Face has the published BEiT
# in this form, and tools/export.py writes it.

NAMES = [      # how our names begin, at their start or behind a block's number; transformers'
    ("cls_token", "beit.embeddings.cls_token"),
    ("mask_token", "beit.embeddings.mask_token"),
    ("pos_embed", "beit.embeddings.position_embeddings"),
    ("patch_embed.proj.", "beit.embeddings.patch_embeddings.projection."),
    ("rel_pos_bias.", "beit.encoder.relative_position_bias."),
    ("blocks.", "beit.encoder.layer."),
    ("norm1.", "layernorm_before."),
    ("attn.relative_position_bias_table",
     "attention.attention.relative_position_bias.relative_position_bias_table"),
    ("attn.q_bias", "attention.attention.query.bias"),
    ("attn.v_bias", "attention.attention.value.bias"),
    ("attn.proj.", "attention.output.dense."),
    ("gamma_", "lambda_"),
    ("norm2.", "layernorm_after."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
    ("norm.", "layernorm."),
    ("fc_norm.", "beit.pooler.layernorm."),
    ("head.", "classifier."),
]
TOGETHER = ".attn.qkv.weight"                               # one matrix; transformers has three
APART = ".attention.attention.{}.weight"


def to_beit(weights):
    """A ViT's weights by transformers' names; queries, keys and values apart."""
    result = {}
    for key, value in weights.items():
        name = renamed(key, NAMES)
        if name.endswith(TOGETHER):
            for part, matrix in zip(("query", "key", "value"), value.chunk(3), strict=True):
                result[name.replace(TOGETHER, APART.format(part))] = matrix.contiguous()
        else:
            result[name] = value.contiguous()
    return result


def from_beit(weights):
    """The inverse. What transformers' files hold and a ViT computes is left out."""
    back = [(theirs, ours) for ours, theirs in NAMES]
    result = {renamed(key, back): value for key, value in weights.items()
              if not key.endswith("relative_position_index")}
    for query in [key for key in result if key.endswith(APART.format("query"))]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        matrices = [result.pop(name) for name in names]
        result[query.replace(APART.format("query"), TOGETHER)] = torch.cat(matrices)
    return result


def renamed(key, names):
    for old, new in names:
        key = re.sub(rf"(^|\.\d+\.){re.escape(old)}", rf"\g<1>{new}", key)
    return key


def read_beit(folder):
    """A folder of transformers' BEiT as one of our checkpoints, of pretrain or finetune.

    Input statistics and the crop are preprocessor_config.json's, if it is there.
    """
    try:
        config, processor = [
            json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            for name in ("config.json", "preprocessor_config.json")]
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"hidden_act {config['hidden_act']}")
        weights = from_beit(load_weights(folder))
        checkpoint.check_weights(weights)
        vit = dict(
            image_size=config["image_size"],
            patch_size=config["patch_size"],
            dim=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            positions=("learned" if config["use_absolute_position_embeddings"] else
                       "shared" if config["use_shared_relative_position_bias"] else "block"),
            layer_scale=config["layer_scale_init_value"],
            drop_path=config["drop_path_rate"],
            codes=len(weights.get("lm_head.bias", ())),
            classes=len(weights.get("head.bias", ())),
            mean=tuple(processor.get("image_mean", HALF)),
            std=tuple(processor.get("image_std", HALF)),
        )
    except InputError:
        raise
    except Exception as error:                              # safetensors' is of a class of its own
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder}: not read as transformers' BEiT ({reason})") from error
    args = dict(image_size=vit["image_size"])
    by_number = config.get("id2label", {})                  # which may come as 0, 1, 10, 100, 2, …
    names = [by_number[number] for number in sorted(by_number, key=int)]
    if vit["classes"] and names[:1] != ["LABEL_0"]:         # what transformers makes up
        args["class_names"] = names
    if isinstance(processor.get("size"), dict) and "shortest_edge" in processor["size"]:
        args["eval_crop"] = vit["image_size"] / processor["size"]["shortest_edge"]
    return dict(stage="pretrain" if vit["codes"] else "finetune", args=args, model_args=vit,
                model=weights, digest=checkpoint.digest(weights))


def load_weights(folder):
    """What model.safetensors holds, or pytorch_model.bin, where older folders have that alone."""
    file, older = folder / "model.safetensors", folder / "pytorch_model.bin"
    if older.exists() and not file.exists():
        return torch.load(older, map_location="cpu", weights_only=True)
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{folder}: safetensors is missing: pip install safetensors") from None
    return load_file(file)


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
    weights, kind = foreign(f"--perceptual {source}", state)
    if kind["positions"] == "absolute" and "mean" in kind:
        network = VisionTransformer(**SIZES["base"] | kind)     # MoCo v3's
    elif "features.0.weight" in weights:
        network = torchvision.models.vgg16()
    elif "layer4.0.conv1.weight" in weights:
        network = torchvision.models.resnet50()
    else:
        raise InputError(f"--perceptual {source}: neither a teacher.py run nor weights of MoCo v3, "
                         "VGG-16 or ResNet-50")
    heads = ("head.", "fc.")                             # not used; MoCo v3 has its projector there
    weights = {key: value for key, value in weights.items() if not key.startswith(heads)}
    with checkpoint.built_from(f"--perceptual {source}"):
        found = network.load_state_dict(weights, strict=False)
        refuse_others(f"--perceptual {source}", heads, *found)
    return network, checkpoint.digest(weights)


def download(source):
    url = DOWNLOADS[source]
    try:
        with first_of_machine():
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            f"--perceptual {source}: download of {url} failed ({error}); fetch the file by other "
            "means and pass its path, or that of a teacher.py run") from error
