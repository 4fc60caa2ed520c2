"""A run as others' code opens it: a folder for transformers, or a file of MoCo v3's form.

    python -m tools.export runs/paper/finetune beit-peco
    python -c "from transformers import AutoModelForImageClassification as A; A.from_pretrained('beit-peco')"
    python -m tools.export runs/paper/teacher moco-v3

pretrain.py: BeitForMaskedImageModeling; finetune.py: BeitForImageClassification. Names and settings are those of the
published BEiT checkpoints; the image processor resizes and crops as the run's evaluation did. Needs safetensors.
teacher.py: checkpoint.pth.tar, the encoder by the names of MoCo v3's own files, which its scripts read.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import torch

from model import trained_weights
from runtime import InputError, load_checkpoint

NAMES = [                                                  # ours → transformers'
    (r"^cls_token", "beit.embeddings.cls_token"), (r"^mask_token", "beit.embeddings.mask_token"),
    (r"^patch_embed\.proj", "beit.embeddings.patch_embeddings.projection"),
    (r"^rel_pos_bias\.", "beit.encoder.relative_position_bias."), (r"^blocks\.", "beit.encoder.layer."),
    (r"attn\.relative_position_bias_table", "attention.attention.relative_position_bias.relative_position_bias_table"),
    (r"attn\.q_bias", "attention.attention.query.bias"), (r"attn\.v_bias", "attention.attention.value.bias"),
    (r"attn\.proj", "attention.output.dense"), (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"),
    (r"norm1", "layernorm_before"), (r"norm2", "layernorm_after"), (r"gamma_", "lambda_"), (r"^norm\.", "layernorm."),
    (r"^fc_norm\.", "beit.pooler.layernorm."), (r"^head\.", "classifier."),
]


def rename(weights):
    """Weights by transformers' names; queries, keys and values apart."""
    result = {}
    for key, value in weights.items():
        for ours, theirs in NAMES:
            key = re.sub(ours, theirs, key)
        if key.endswith("attn.qkv.weight"):
            for name, part in zip(("query", "key", "value"), value.chunk(3)):
                result[key.replace("attn.qkv", f"attention.attention.{name}")] = part.contiguous()
        else:
            result[key] = value.contiguous()
    return result


def settings(state):
    """config.json and preprocessor_config.json of a run."""
    args, run = state["model_args"], state["args"]
    if args["positions"] == "absolute" or args.get("pool") == "cls" or not (args.get("codes") or args.get("classes")):
        raise InputError("only pretrain.py's ViT and finetune.py's of --pool mean with relative positions are BEiT's")
    config = dict(
        model_type="beit", architectures=["BeitForMaskedImageModeling" if args.get("codes") else "BeitForImageClassification"],
        hidden_size=args["dim"], num_hidden_layers=args["depth"], num_attention_heads=args["heads"], intermediate_size=4 * args["dim"],
        image_size=args["image_size"], patch_size=args["patch_size"], layer_norm_eps=1e-6, layer_scale_init_value=args["layer_scale"],
        drop_path_rate=args.get("drop_path", 0.0), use_mask_token=bool(args.get("codes")), use_absolute_position_embeddings=False,
        use_relative_position_bias=args["positions"] == "block", use_shared_relative_position_bias=args["positions"] == "shared",
        use_mean_pooling=True)
    if args.get("codes"):
        config["vocab_size"] = args["codes"]
    else:
        config |= dict(id2label={i: f"LABEL_{i}" for i in range(args["classes"])},
                       label2id={f"LABEL_{i}": i for i in range(args["classes"])})
    side = round(args["image_size"] / run.get("eval_crop", 0.875))  # as data.eval_transform
    # CLIP's processor has the shorter side resized and the centre cropped; BEiT's own squashes the image to a square
    processor = dict(image_processor_type="CLIPImageProcessor", do_resize=True, size=dict(shortest_edge=side), resample=3,
                     do_center_crop=True, crop_size=dict(height=args["image_size"], width=args["image_size"]), do_rescale=True,
                     rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True)
    return config, processor


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("run", help="run or checkpoint of teacher.py, pretrain.py or finetune.py")
    p.add_argument("folder", type=Path, help="made, with config.json, preprocessor_config.json and model.safetensors, or "
                   "checkpoint.pth.tar")
    args = p.parse_args(argv)
    state = load_checkpoint(args.run, ["teacher", "pretrain", "finetune"])
    if state["stage"] == "teacher":
        args.folder.mkdir(parents=True, exist_ok=True)
        encoder = {f"module.base_encoder.{key}": value for key, value in state["model"].items()}
        return torch.save(dict(arch=f"vit_{state['args']['model']}", epoch=state["epoch"], state_dict=encoder),
                          args.folder / "checkpoint.pth.tar")
    config, processor = settings(state)
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise InputError("safetensors is missing: pip install safetensors") from None
    args.folder.mkdir(parents=True, exist_ok=True)
    save_file(rename(trained_weights(state)), args.folder / "model.safetensors", metadata=dict(format="pt"))
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        (args.folder / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"tools.export: {error}", file=sys.stderr)
        sys.exit(2)
