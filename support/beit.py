"""Folders of transformers' BEiT as our checkpoints: config.json and model.safetensors.

Hugging Face has the published BEiT in this form, and tools/export.py writes it. Needs safetensors.
"""
import json
import re

import torch

from model import HALF
from support import checkpoint
from support.launch import InputError

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


def positions_of(config):
    """Our name for transformers' kind of positions."""
    if config["use_absolute_position_embeddings"]:
        return "learned"
    return "shared" if config["use_shared_relative_position_bias"] else "block"


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


def read(folder):
    """A folder of transformers' BEiT as one of our checkpoints, of pretrain or finetune.

    Input statistics and the crop are preprocessor_config.json's, if it is there.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        processor = {}
        if (folder / "preprocessor_config.json").exists():
            processor = json.loads((folder / "preprocessor_config.json").read_text())
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"hidden_act {config['hidden_act']}")
        weights = from_beit(load_weights(folder))
        vit = dict(
            image_size=config["image_size"],
            patch_size=config["patch_size"],
            dim=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            positions=positions_of(config),
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
