"""Networks from weights: of our own runs, and of BEiT's, timm's, MoCo v3's and torchvision's files.

Files are told apart by the names of their weights. Whatever does not fit is refused by name: no
network with random weights ever stands in for a trained one.
"""
from pathlib import Path

import torch
import torchvision

import checkpoint
from data import eval_transform
from model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIZES,
    VisionTransformer,
    VQTokenizer,
    resize_bias_table,
    resize_positions,
)
from runtime import InputError

# MoCo v3's ViT-B of 300 epochs; the 100-epoch one, which PeCo uses, was never published.
MOCO_V3_URL = "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"
DOWNLOADS = {
    "moco_v3": MOCO_V3_URL,
    "vgg16": torchvision.models.VGG16_Weights.IMAGENET1K_V1.url,
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url,
}
MOCO_V3 = dict(positions="absolute", layer_scale=0.0, mean=IMAGENET_MEAN, std=IMAGENET_STD)

# What belongs to a task and not to the backbone: it may be missing, or of another shape.
TASK = ("head.", "lm_head.", "fc_norm.", "norm.", "mask_token")


# ------------------------------------------------------------------------------------------------
# Our own runs

def load(path, stages=("teacher", "tokenizer", "pretrain", "finetune")):
    """The network of a run or checkpoint, ready to use, in eval mode on the CPU.

    A VQTokenizer of tokenizer.py's, a VisionTransformer of the other stages'. Its .preprocess turns
    a PIL image into pixels (3, H, W). Raises InputError where the run is of another stage.
    """
    state = checkpoint.load(path, stages)
    model = network_of(state)
    model.load_state_dict(trained_weights(state))
    model.preprocess = eval_transform(model.image_size, state["args"].get("eval_crop", 0.875))
    return model.eval().requires_grad_(False)


def network_of(state):
    """The network of a checkpoint, with random weights."""
    if state["stage"] == "tokenizer":
        return VQTokenizer(**state["model_args"])
    return VisionTransformer(**vit_arguments(state))


def vit_arguments(state):
    """Arguments of a checkpoint's ViT. Older ones say pool="mean", which is the only way now."""
    arguments = dict(state["model_args"])
    if arguments.pop("pool", "mean") != "mean":
        raise InputError("a classifier of the class token, which is not built any more: "
                         "fine-tune it anew")
    return arguments


def trained_weights(state):
    """What was evaluated in training: the averaged weights, where there are any."""
    if "ema" not in state:
        return state["model"]
    prefix = "module."
    return {key.removeprefix(prefix): value for key, value in state["ema"].items()
            if key.startswith(prefix)}


# ------------------------------------------------------------------------------------------------
# A ViT for another task

def transfer(source, state, arguments, **task):
    """A ViT for a new task with the weights of another.

    source: what messages call the checkpoint. state: its contents, of teacher.py, pretrain.py or
    finetune.py, or of BEiT's, timm's or MoCo v3's files; {}: all weights are random.
    arguments: of VisionTransformer, where the checkpoint does not say. task: those of the new task.

    Returns (the ViT, its arguments, names of the weights that the checkpoint lacks). Raises
    InputError where the checkpoint is of something else.
    """
    stage = state.get("stage")
    if stage in ("teacher", "pretrain", "finetune"):
        arguments, weights = vit_arguments(state), trained_weights(state)
    elif stage:
        raise InputError(f"{source}: found a checkpoint of {stage}, "
                         "expected one of teacher, pretrain or finetune")
    else:
        weights = bare(state.get("model", state.get("state_dict", state)))
        if "pos_embed" in weights:
            arguments = arguments | MOCO_V3
    arguments = {key: value for key, value in arguments.items() if key != "codes"} | task
    if arguments["positions"] == "shared":              # BEiT: from here on one bias for each block
        arguments["positions"] = "block"
    model = VisionTransformer(**arguments)
    if not weights:
        return model, arguments, list(model.state_dict())
    try:
        return model, arguments, load_backbone(model, weights)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def bare(weights):
    """Weights by their own names: without the prefixes of DDP, torch.compile and MoCo v3."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod.", "base_encoder."):
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
    shared = weights.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        for key in own:
            if key.endswith("relative_position_bias_table"):
                weights[key] = shared
    for key in own:
        if key not in weights or own[key].shape == weights[key].shape:
            continue
        expected, found = own[key].shape, weights[key].shape
        if key.endswith("relative_position_bias_table") and expected[1] == found[1]:
            weights[key] = resize_bias_table(weights[key], model.grid, model.grid)
        elif key == "pos_embed":
            weights[key] = resize_positions(weights[key], model.grid, model.grid)
        elif key.startswith(TASK):
            del weights[key]
        else:
            raise InputError(f"{key}: expected {tuple(expected)}, found {tuple(found)}")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    refuse_others("lacks", missing)
    refuse_others("has", unexpected)
    return missing


def refuse_others(verb, keys):
    wrong = [key for key in keys if not key.startswith(TASK)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(f"another architecture: it {verb} {wrong[0]}{more}")


# ------------------------------------------------------------------------------------------------
# The perceptual network

def perceptual_network(source):
    """The network behind L_percep, and a digest of its weights.

    source: "moco_v3", "vgg16" or "resnet50" (downloaded), or the path of: one of their files, MoCo
    v3's ResNet-50, a teacher.py run, or a finetune.py run (a supervised network). Raises InputError
    where there are no such weights.
    """
    if source in DOWNLOADS and not Path(source).exists():
        state = download(source)
    else:
        state = checkpoint.load(source)
    stage = state.get("stage")
    if stage in ("teacher", "finetune"):
        network = network_of(state)
        network.load_state_dict(trained_weights(state))
        return network, state["digest"]
    if stage:
        raise InputError(f"--perceptual {source}: a checkpoint of {stage}, "
                         "expected one of teacher or finetune")
    weights = bare(state.get("state_dict", state))
    network = imitate(source, weights)
    heads = ("head.", "fc.")                             # not used; MoCo v3 has its projector there
    weights = {key: value for key, value in weights.items() if not key.startswith(heads)}
    weights |= {key: value for key, value in network.state_dict().items() if key.startswith(heads)}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:                          # its second line names the first culprit
        detail = str(error).splitlines()[1].strip()
        raise InputError(f"--perceptual {source}: {detail}") from error
    return network, checkpoint.digest(weights)


def download(source):
    url = DOWNLOADS[source]
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            f"--perceptual {source}: download of {url} failed ({error}); fetch the file by other "
            "means and pass its path, or that of a teacher.py run") from error


def imitate(source, weights):
    """A network of the architecture that a file's weights have."""
    if "pos_embed" in weights:
        return VisionTransformer(**SIZES["base"], **MOCO_V3)
    if "features.0.weight" in weights:
        return torchvision.models.vgg16()
    if "layer4.0.conv1.weight" in weights:
        return torchvision.models.resnet50()
    raise InputError(f"--perceptual {source}: neither a teacher.py run nor weights of MoCo v3, "
                     "VGG-16 or ResNet-50")
