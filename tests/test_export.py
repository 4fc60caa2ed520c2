"""For use outside: weights.load, runs as folders for transformers."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run
from helpers import newest, pixels, randomize, statistics
from PIL import Image

import data
import finetune
from model import IMAGENET_MEAN, IMAGENET_STD, SIZES, VisionTransformer
from support import checkpoint, weights
from support.launch import InputError
from support.scenes import Synthetic
from tools import export


def waves(height, width):
    """A PIL image of smooth stripes."""
    stripes = torch.linspace(0, 40, height * width * 3).sin().view(height, width, 3)
    return Image.fromarray((stripes * 127 + 128).byte().numpy())


IMAGE = waves(48, 60)
MASK = (torch.arange(16) % 3 == 0).view(1, 4, 4)


def optional(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: requirements-extra.txt")


def close(values, expected):
    """Equal but for rounding, and not because all is near zero."""
    largest = expected.abs().max().item()
    return expected.std() > 0.1 and torch.allclose(values, expected, atol=1e-5 * largest)


@pytest.fixture(scope="module", params=["learned", "relative"])
def either(request, chain, tmp_path_factory):
    """The chain, or a pretrain and a finetune of BEiT's other ViT, with layer scale."""
    if request.param == "learned":
        return chain
    root = tmp_path_factory.mktemp("relative")
    runs = SimpleNamespace(pretrain=str(root / "pretrain"), finetune=str(root / "finetune"))
    run("pretrain", *chain.inputs["pretrain"], "--positions", "shared", "--layer-scale", "0.1",
        "--steps", "1", "--output", runs.pretrain)
    run("finetune", "--init", runs.pretrain, "--steps", "1", "--output", runs.finetune)
    return runs


def randomized(runs, stage):
    """A checkpoint like that of a stage's run, but none of its weights is without effect."""
    state = newest(getattr(runs, stage))
    del state["digest"]
    state["model"] = randomize(weights.network_of(state)).state_dict()
    checkpoint.write(Path(f"{stage}.pt"), state)
    return f"{stage}.pt"


# ------------------------------------------------------------------------------------------------
# weights.load

def test_load_gives_ready_networks(chain):
    """Though the paths in the runs lead nowhere from here. test_readme.py runs more of it."""
    vit, x = weights.load(chain.pretrain), pixels(1, 3, 32, 32)
    assert vit(x, MASK).shape == (6, 32)
    assert torch.equal(vit.features(x)[0], vit.features(x, [4])[0])     # the last block's
    assert not weights.load(chain.tokenizer).training
    assert weights.load(chain.finetune / "best.pt")(x).shape == (1, 10)
    with pytest.raises(InputError, match="segment"):
        weights.load(chain.segment)


def test_preprocess_takes_files_and_images(chain):
    preprocess = weights.load(chain.teacher).preprocess
    expected = preprocess(IMAGE)
    IMAGE.save("image.png")
    for image in ("image.png", Path("image.png"), IMAGE.convert("RGBA")):
        assert torch.equal(preprocess(image), expected)
    Path("image.png").write_bytes(Path("image.png").read_bytes()[:500])
    for image in ("image.png", "nowhere.png"):
        with pytest.raises(InputError, match=image):
            preprocess(image)


def test_preprocess_crops_as_the_runs_evaluation_did(chain):
    for run_of, crop in ((chain.tokenizer, 1.0), (chain.pretrain, 1.0), (chain.teacher, 0.875)):
        expected = data.eval_transform(32, crop)(IMAGE)
        assert torch.equal(weights.load(run_of).preprocess(IMAGE), expected)


def test_names_of_the_classes_travel(chain):
    names = Synthetic().classes
    assert weights.load(chain.finetune).classes == names
    assert weights.load(chain.pretrain).classes is None
    config, _ = export.settings(newest(chain.finetune))
    assert config["id2label"] == dict(enumerate(names))
    assert config["label2id"] == {name: i for i, name in enumerate(names)}


# ------------------------------------------------------------------------------------------------
# Other libraries

@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_what_is_exported_is_taken_back(stage, either):
    optional("safetensors")
    export.main([randomized(either, stage), "folder"])
    own, back = weights.load(f"{stage}.pt"), weights.load("folder")
    x = own.preprocess(IMAGE)
    assert torch.equal(x, back.preprocess(IMAGE))
    mask = MASK if stage == "pretrain" else None
    assert torch.equal(own(x[None], mask), back(x[None], mask))
    begun = []
    for flags in (["--init", f"{stage}.pt"], ["--init", "folder", "--model", "tiny"]):
        args = finetune.get_args(["--recipe", "demo", *flags])
        begun.append(weights.begin(args, weights.read(args)[0], 32, 10)[0].state_dict())
    assert begun[0].keys() == begun[1].keys()
    for key, value in begun[0].items():
        if stage == "finetune" or not key.startswith("head."):      # drawn anew
            assert torch.equal(begun[1][key], value)


@pytest.mark.parametrize("positions", [
    dict(use_relative_position_bias=True),
    dict(use_absolute_position_embeddings=True, layer_scale_init_value=0.0),
])
def test_a_folder_that_transformers_wrote(positions):
    transformers = optional("transformers")
    config = transformers.BeitConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        image_size=32, patch_size=8, num_labels=7, **positions)
    theirs = randomize(transformers.BeitForImageClassification(config)).eval()
    theirs.save_pretrained("folder")
    x = pixels(2, 3, 32, 32)
    with torch.no_grad():
        assert close(weights.load("folder")(x), theirs(x).logits)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_transformers_opens_what_is_exported(stage, either):
    transformers = optional("transformers")
    export.main([randomized(either, stage), "folder"])
    own = weights.load(f"{stage}.pt")
    kind = (transformers.BeitForMaskedImageModeling if stage == "pretrain"
            else transformers.BeitForImageClassification)
    theirs, loading = kind.from_pretrained("folder", output_loading_info=True)
    assert not any(loading[f"{how}_keys"] for how in ("missing", "unexpected", "mismatched"))
    processor = transformers.AutoImageProcessor.from_pretrained("folder")
    x, their_x = own.preprocess(IMAGE)[None], processor(IMAGE, return_tensors="pt").pixel_values
    assert their_x.shape == x.shape
    assert (their_x - x).abs().max() < 3 / 127.5            # another resampling
    theirs.eval()
    with torch.no_grad():
        if stage == "pretrain":
            logits = theirs(x, bool_masked_pos=MASK.flatten(1)).logits[0, MASK.flatten()]
            assert close(logits, own(x, MASK))
        else:
            assert close(theirs(x).logits, own(x))


@pytest.mark.parametrize(("size", "crop"), [(448, 0.875), (95, 0.8), (32, 1.0)])
def test_the_processor_crops_at_any_size(size, crop, chain):
    """Where the image is far from square, above and below transformers' own thresholds.

    Then it takes the run's statistics.
    """
    transformers = optional("transformers")
    state = newest(chain.finetune)
    state["model_args"] |= dict(image_size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    state["args"]["eval_crop"] = crop
    _, settings = export.settings(state)
    Path("preprocessor_config.json").write_text(json.dumps(settings))
    processor = transformers.AutoImageProcessor.from_pretrained(".")
    wide, (mean, std) = waves(500, 1000), statistics()
    theirs = processor(wide, return_tensors="pt").pixel_values[0] * std + mean
    ours = data.eval_transform(size, crop)(wide)
    assert theirs.shape == ours.shape
    assert (2 * theirs - 1 - ours).abs().mean() < 0.02


@pytest.mark.parametrize("positions, layer_scale, arguments", [
    ("block", 0.1, {}),
    ("learned", 0.0, dict(use_abs_pos_emb=True, use_rel_pos_bias=False, init_values=0.0)),
])
def test_timms_own_name_takes_a_fine_tuned_run(positions, layer_scale, arguments):
    """One of --model base's width at 224 px, strictly, with equal logits."""
    timm = optional("timm")
    torch.manual_seed(0)
    own = VisionTransformer(**SIZES["base"] | dict(depth=1), positions=positions,
                            layer_scale=layer_scale, classes=1000).eval()
    with torch.no_grad():                                   # so that no weight is without effect
        for parameter in own.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    theirs = timm.create_model("beit_base_patch16_224", depth=1, **arguments).eval()
    theirs.load_state_dict(own.state_dict(), strict=True)
    x = pixels(1, 3, 224, 224)
    with torch.no_grad():
        assert close(theirs(x), own(x))


def test_a_teacher_is_a_file_of_moco_v3s(chain):
    """Opened as MoCo v3's linear evaluation does: all but the head's names, into timm's ViT."""
    optional("timm")
    from timm.models.vision_transformer import VisionTransformer as TimmViT
    export.main([randomized(chain, "teacher"), "folder"])
    file = torch.load("folder/checkpoint.pth.tar", weights_only=True)
    encoder = {key.removeprefix("module.base_encoder."): value
               for key, value in file["state_dict"].items()}
    theirs = TimmViT(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=2, num_classes=7,
                     qkv_bias=True).eval()
    missing, unexpected = theirs.load_state_dict(encoder, strict=False)
    assert set(missing) == {"head.weight", "head.bias"}
    assert not unexpected

    own, x = weights.load("teacher.pt"), pixels(2, 3, 32, 32)
    with torch.no_grad():
        assert close(theirs.forward_features(((x + 1) / 2 - own.mean) / own.std), own(x))

    for path in ("folder", "folder/checkpoint.pth.tar"):
        args = finetune.get_args(["--recipe", "demo", "--init", path])
        again, *_ = weights.begin(args, weights.read(args)[0], image_size=32)
        expected = own.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


def test_only_what_is_beits_is_exported(chain):
    with pytest.raises(InputError, match="tokenizer"):
        export.main([str(chain.tokenizer), "folder"])
    state = newest(chain.finetune)
    state["model_args"]["positions"] = "absolute"           # of a ViT that a teacher began
    with pytest.raises(InputError, match="BEiT"):
        export.settings(state)
