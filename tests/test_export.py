"""For use outside: weights.load, runs as folders for transformers."""
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run
from PIL import Image

import data
import finetune
from model import IMAGENET_MEAN, SIZES, VisionTransformer
from support import checkpoint, weights
from support.launch import InputError
from support.scenes import Synthetic
from tools import export


def waves(height, width):
    """A PIL image of smooth stripes."""
    pixels = torch.linspace(0, 40, height * width * 3).sin().view(height, width, 3)
    return Image.fromarray((pixels * 127 + 128).byte().numpy())


IMAGE = waves(48, 60)


def optional(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: requirements-extra.txt")


MASK = (torch.arange(16) % 3 == 0).view(1, 4, 4)


def close(values, expected):
    """Equal but for rounding, and not because all is near zero."""
    largest = expected.abs().max().item()
    return expected.std() > 0.1 and torch.allclose(values, expected, atol=1e-5 * largest)


@pytest.fixture(scope="module")
def other(chain, tmp_path_factory):
    """The chain's pretrain and finetune, of BEiT's other ViT: relative positions, layer scale."""
    root = tmp_path_factory.mktemp("other")
    run("pretrain", *chain.inputs["pretrain"], "--positions", "shared", "--layer-scale", "0.1",
        "--steps", "1", "--output", str(root / "pretrain"))
    run("finetune", "--init", str(root / "pretrain"), "--steps", "1",
        "--output", str(root / "finetune"))
    return SimpleNamespace(pretrain=root / "pretrain", finetune=root / "finetune")


@pytest.fixture(params=["learned", "relative"])
def either(request, chain, other):
    return chain if request.param == "learned" else other


def randomized(chain, stage):
    """A run of that stage with weights far from their initial ones: none is without effect."""
    state = checkpoint.load(getattr(chain, stage))
    del state["digest"]
    generator = torch.Generator().manual_seed(0)
    for key, value in state["model"].items():
        state["model"][key] = value + 0.1 * torch.randn(value.shape, generator=generator)
    checkpoint.write(Path(f"{stage}.pt"), state)
    return f"{stage}.pt"


# ------------------------------------------------------------------------------------------------
# weights.load

def test_load_gives_ready_networks(chain):
    teacher, tokenizer = weights.load(chain.teacher), weights.load(chain.tokenizer)
    pixels = teacher.preprocess(IMAGE)[None]
    assert pixels.shape == (1, 3, 32, 32)
    assert -1 <= pixels.min() < pixels.max() <= 1
    (last,) = teacher.features(pixels)
    assert last.shape == (1, 64, 4, 4)
    assert torch.equal(last, teacher.features(pixels, [4])[0])
    assert not tokenizer.training
    assert tokenizer.decode(tokenizer.encode(pixels)).shape == pixels.shape
    assert weights.load(chain.pretrain)(pixels, MASK).shape == (6, 32)
    assert weights.load(chain.finetune / "best.pt")(pixels).shape == (1, 10)
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
    whole, cropped = data.eval_transform(32, 1.0), data.eval_transform(32, 0.875)
    for run_of, expected in ((chain.tokenizer, whole), (chain.pretrain, whole),
                             (chain.teacher, cropped)):
        assert torch.equal(weights.load(run_of).preprocess(IMAGE), expected(IMAGE))


def test_load_depends_on_no_other_file(chain, monkeypatch):
    """Of the chain only one run is taken along; its paths lead nowhere."""
    shutil.copytree(chain.pretrain, "moved")
    monkeypatch.chdir("moved")
    assert weights.load(".").image_size == 32
    with pytest.raises(InputError, match="runs/demo/pretrain"):
        weights.load("runs/demo/pretrain")


def test_names_of_the_classes_travel(chain):
    names = Synthetic().classes
    assert weights.load(chain.finetune).classes == names
    assert weights.load(chain.pretrain).classes is None
    config, _ = export.settings(checkpoint.load(chain.finetune))
    assert config["id2label"] == dict(enumerate(names))
    assert config["label2id"] == {name: i for i, name in enumerate(names)}


# ------------------------------------------------------------------------------------------------
# Other libraries

@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_what_is_exported_is_taken_back(stage, either, capsys):
    optional("safetensors")
    export.main([randomized(either, stage), "folder"])
    own, back = weights.load(f"{stage}.pt"), weights.load("folder")
    pixels = own.preprocess(IMAGE)
    assert torch.equal(pixels, back.preprocess(IMAGE))
    mask = MASK if stage == "pretrain" else None
    assert torch.equal(own(pixels[None], mask), back(pixels[None], mask))
    begun = [weights.begin(args, weights.read(args)[0], 32, 10)[0].state_dict() for args in (
        finetune.get_args(["--recipe", "demo", "--init", f"{stage}.pt"]),
        finetune.get_args(["--recipe", "demo", "--model", "tiny", "--init", "folder"]))]
    assert "--statistics" not in capsys.readouterr().out    # they are what the flag says
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
    torch.manual_seed(0)
    config = transformers.BeitConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        image_size=32, patch_size=8, num_labels=7, **positions)
    theirs = transformers.BeitForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained("folder")
    own, pixels = weights.load("folder"), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert close(own(pixels), theirs(pixels).logits)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_transformers_opens_what_is_exported(stage, either):
    transformers = optional("transformers")
    export.main([randomized(either, stage), "folder"])
    own = weights.load(f"{stage}.pt")
    kind = (transformers.BeitForMaskedImageModeling if stage == "pretrain"
            else transformers.BeitForImageClassification)
    theirs, loading = kind.from_pretrained("folder", output_loading_info=True)
    theirs.eval()
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]

    processor = transformers.AutoImageProcessor.from_pretrained("folder")
    ours, pixels = own.preprocess(IMAGE), processor(IMAGE, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32)
    assert (pixels - ours).abs().max() < 3 / 127.5          # another resampling

    pixels = ours[None]
    with torch.no_grad():
        if stage == "pretrain":
            expected = own(pixels, MASK)
            logits = theirs(pixels, bool_masked_pos=MASK.flatten(1)).logits[0, MASK.flatten()]
        else:
            expected = own(pixels)
            logits = theirs(pixels).logits
    assert close(logits, expected)


@pytest.mark.parametrize(("size", "crop"), [(448, 0.875), (95, 0.8), (32, 1.0)])
def test_the_processor_crops_at_any_size(size, crop, chain):
    """Where the image is far from square, above and below transformers' own thresholds."""
    transformers = optional("transformers")
    state = checkpoint.load(chain.finetune)
    state["model_args"]["image_size"], state["args"]["eval_crop"] = size, crop
    _, settings = export.settings(state)
    Path("preprocessor_config.json").write_text(json.dumps(settings))
    processor = transformers.AutoImageProcessor.from_pretrained(".")
    wide = waves(500, 1000)
    theirs = processor(wide, return_tensors="pt").pixel_values[0]
    ours = data.eval_transform(size, crop)(wide)
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 0.02


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
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        assert close(theirs(pixels), own(pixels))


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

    own, pixels = weights.load("teacher.pt"), torch.rand(2, 3, 32, 32) * 2 - 1
    inputs = ((pixels + 1) / 2 - own.mean) / own.std        # timm's
    with torch.no_grad():
        assert close(theirs.forward_features(inputs), own(pixels))

    for path in ("folder", "folder/checkpoint.pth.tar"):
        args = finetune.get_args(["--recipe", "demo", "--init", path])
        again, *_ = weights.begin(args, weights.read(args)[0], image_size=32)
        expected = own.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


def test_only_what_is_beits_is_exported(chain):
    with pytest.raises(InputError, match="tokenizer"):
        export.main([str(chain.tokenizer), "folder"])
    state = checkpoint.load(chain.finetune)
    state["model_args"]["positions"] = "absolute"           # of a ViT that a teacher began
    with pytest.raises(InputError, match="BEiT"):
        export.settings(state)


def test_statistics_of_the_inputs_are_exported(chain):
    state = checkpoint.load(chain.finetune)
    _, processor = export.settings(state)
    assert processor["image_mean"] == processor["image_std"] == [0.5] * 3
    state["model_args"]["mean"] = IMAGENET_MEAN
    _, processor = export.settings(state)
    assert processor["image_mean"] == [0.485, 0.456, 0.406]
