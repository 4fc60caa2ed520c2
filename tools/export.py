"""A run as other projects open it: a folder for transformers, or a file in MoCo v3's form.

    python -m tools.export runs/paper/finetune beit-peco
    python -m tools.export runs/paper/teacher moco-v3

A run of pretrain.py or finetune.py: BeitForMaskedImageModeling.from_pretrained("beit-peco"), or
BeitForImageClassification's, with the names and settings of the published BEiT checkpoints. The
image processor resizes and crops as in the run's evaluation. Needs safetensors. weights.load and
--init take the folder back.
A run of teacher.py: checkpoint.pth.tar, the encoder by the names that MoCo v3's own scripts read.
"""
import json
from pathlib import Path

import torch

from model import HALF, SIZES
from support import checkpoint, flags, launch
from support.launch import InputError
from support.weights import MOCO_V3_SMALL_HEADS, class_names, to_beit


def settings(state):
    """Contents of config.json and preprocessor_config.json for a checkpoint, as two dicts."""
    vit = state["model_args"]
    codes, classes = vit.get("codes"), vit.get("classes")
    if vit["positions"] == "absolute" or not (codes or classes):
        raise InputError("only ViTs of pretrain.py and finetune.py with learned or relative "
                         "positions are BEiT's, no PeCo_MAE and none of MoCo v3")
    config = dict(
        model_type="beit",
        hidden_size=vit["dim"],
        num_hidden_layers=vit["depth"],
        num_attention_heads=vit["heads"],
        intermediate_size=4 * vit["dim"],
        image_size=vit["image_size"],
        patch_size=vit["patch_size"],
        layer_norm_eps=1e-6,
        layer_scale_init_value=vit["layer_scale"],
        drop_path_rate=vit.get("drop_path", 0.0),
        use_mask_token=bool(codes),
        use_absolute_position_embeddings=vit["positions"] == "learned",
        use_relative_position_bias=vit["positions"] == "block",
        use_shared_relative_position_bias=vit["positions"] == "shared",
        use_mean_pooling=True,
    )
    if codes:
        config["architectures"] = ["BeitForMaskedImageModeling"]
        config["vocab_size"] = codes
    else:
        config["architectures"] = ["BeitForImageClassification"]
        names = class_names(state) or [f"LABEL_{i}" for i in range(classes)]
        config["id2label"] = dict(enumerate(names))
        config["label2id"] = {name: i for i, name in enumerate(names)}
    side = vit["image_size"]
    crop = (state["args"] | state.get("identity", {})).get("eval_crop", 0.875)
    processor = dict(           # BEiT's own squashes the image to a square; CLIP's does as we do
        image_processor_type="CLIPImageProcessor",
        do_convert_rgb=True,
        do_resize=True,
        size=dict(shortest_edge=round(side / crop)),
        resample=3,                                         # bicubic
        do_center_crop=True,
        crop_size=dict(height=side, width=side),
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(vit.get("mean", HALF)),
        image_std=list(vit.get("std", HALF)),
    )
    return config, processor


def export_teacher(state, folder):
    vit = state["model_args"]
    if vit["dim"] == SIZES["small"]["dim"] and vit["heads"] != MOCO_V3_SMALL_HEADS:
        raise InputError(f"a ViT-S of {vit['heads']} heads, which MoCo v3's scripts would build "
                         f"with {MOCO_V3_SMALL_HEADS}: load it by support.weights.load instead")
    encoder = {f"module.base_encoder.{key}": value for key, value in state["model"].items()}
    folder.mkdir(parents=True, exist_ok=True)
    contents = dict(arch=f"vit_{state['args']['model']}", epoch=state["epoch"], state_dict=encoder)
    with open(folder / "checkpoint.pth.tar", "wb") as file:
        torch.save(contents, file)


def export_beit(state, folder):
    config, processor = settings(state)
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise InputError("safetensors is missing: pip install safetensors") from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    weights = to_beit(state["model"])
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))


def main(argv=None):
    p = flags.Parser("tools.export", __doc__)
    p.add_argument("run", help="run or checkpoint of teacher.py, pretrain.py or finetune.py")
    p.add_argument("folder", type=Path,
                   help="is made, with config.json, preprocessor_config.json and "
                        "model.safetensors, or with checkpoint.pth.tar")
    args = p.parse_args(argv)
    state = checkpoint.load(args.run, ["teacher", "pretrain", "finetune"])
    export = export_teacher if state["stage"] == "teacher" else export_beit
    export(state, args.folder)


if __name__ == "__main__":
    launch.launch_tool("export", main)
