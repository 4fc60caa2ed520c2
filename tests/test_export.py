"""For use outside: model.load, runs as folders for transformers, event files, the report."""
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import model
import runtime
from conftest import run
from test_stages import fails, log, newest
from tools import export, report

IMAGE = Image.fromarray((torch.linspace(0, 40, 48 * 60 * 3).sin().view(48, 60, 3) * 127 + 128).byte().numpy())


def randomized(chain, stage):
    """A run of that stage with weights far from their initial ones, so that none of them is without effect."""
    state = newest(getattr(chain, stage))
    generator = torch.Generator().manual_seed(0)
    for key, value in state["model"].items():
        state["model"][key] = value + 0.1 * torch.randn(value.shape, generator=generator)
    state["digest"] = runtime.digest({key: value for key, value in state.items() if key != "digest"})
    torch.save(state, f"{stage}.pt")
    return f"{stage}.pt"


def test_load_gives_ready_networks(chain):
    pixels = model.load(chain.teacher).preprocess(IMAGE)[None]
    assert pixels.shape == (1, 3, 32, 32) and -1 <= pixels.min() < pixels.max() <= 1
    assert model.load(chain.teacher).features(pixels, [4])[0].shape == (1, 64, 4, 4)
    tokenizer = model.load(chain.tokenizer)
    assert not tokenizer.training and tokenizer.decode(tokenizer.encode(pixels)).shape == pixels.shape
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1] = True
    assert model.load(chain.pretrain)(pixels, mask).shape == (4, 32)
    assert model.load(chain.finetune / "best.pt")(pixels).shape == (1, 10)
    with pytest.raises(runtime.InputError, match="found a checkpoint of segment"):
        model.load(chain.segment)


def test_load_takes_the_averaged_weights(chain):
    run("finetune", *chain.inputs["finetune"], "--ema-decay", "0.9", "--steps", "2", "--output", "run")
    state = newest("run")
    own = model.load("run").state_dict()
    assert all(torch.equal(own[key], state["ema"][f"module.{key}"]) for key in own)
    assert any(not torch.equal(own[key], state["model"][key]) for key in own)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_transformers_opens_what_is_exported(stage, chain):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: requirements-extra.txt")
    export.main([randomized(chain, stage), "folder"])
    own, classes = model.load(f"{stage}.pt"), dict(pretrain=transformers.BeitForMaskedImageModeling, finetune=transformers.BeitForImageClassification)
    theirs, loading = classes[stage].from_pretrained("folder", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = transformers.AutoImageProcessor.from_pretrained("folder")(IMAGE, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32) and (pixels - own.preprocess(IMAGE)).abs().max() < 3 / 127.5   # another resampling
    pixels = own.preprocess(IMAGE)[None]
    with torch.no_grad():
        if stage == "pretrain":
            mask = (torch.arange(16) % 3 == 0).view(1, 4, 4)
            expected = own(pixels, mask)
            logits = theirs.eval()(pixels, bool_masked_pos=mask.flatten(1)).logits[0, mask.flatten()]
        else:
            expected, logits = own(pixels), theirs.eval()(pixels).logits
    assert expected.std() > 0.1 and torch.allclose(logits, expected, atol=1e-5 * expected.abs().max().item())


def test_the_processor_crops_at_any_size(chain):
    """Where the image is far from square, above and below transformers' own thresholds."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: requirements-extra.txt")
    wide = Image.fromarray((torch.linspace(0, 40, 500 * 1000 * 3).sin().view(500, 1000, 3) * 127 + 128).byte().numpy())
    for size, crop in ((448, 0.875), (95, 0.8), (32, 1.0)):
        state = newest(chain.finetune)
        state["model_args"]["image_size"], state["args"]["eval_crop"] = size, crop
        _, processor = export.settings(state)
        Path("folder").mkdir(exist_ok=True)
        Path("folder/preprocessor_config.json").write_text(json.dumps(processor))
        theirs = transformers.AutoImageProcessor.from_pretrained("folder")(wide, return_tensors="pt").pixel_values[0]
        ours = data.eval_transform(size, crop)(wide)
        assert theirs.shape == ours.shape and (theirs - ours).abs().mean() < 0.02


def test_timms_own_name_takes_a_fine_tuned_run():
    """A run of --model base at 224 px, strictly, with equal logits."""
    timm = pytest.importorskip("timm", reason="timm is not installed: requirements-extra.txt")
    torch.manual_seed(0)
    own = model.VisionTransformer(**model.SIZES["base"], positions="block", classes=1000).eval()
    with torch.no_grad():                                   # far from the initial weights: none is without effect
        for parameter in own.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    theirs = timm.create_model("beit_base_patch16_224", pretrained=False).eval()
    theirs.load_state_dict(own.state_dict(), strict=True)
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        expected = own(pixels)
        assert expected.std() > 0.1 and torch.allclose(theirs(pixels), expected, atol=1e-5 * expected.abs().max().item())


def test_a_teacher_is_a_file_of_moco_v3s(chain):
    """Opened as MoCo v3's linear evaluation does: names under module.base_encoder, all but the head's, into timm's ViT."""
    pytest.importorskip("timm", reason="timm is not installed: requirements-extra.txt")
    from timm.models.vision_transformer import VisionTransformer
    export.main([randomized(chain, "teacher"), "folder"])
    state = torch.load("folder/checkpoint.pth.tar", weights_only=True)["state_dict"]
    theirs = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=2, num_classes=7, qkv_bias=True).eval()
    missing, unexpected = theirs.load_state_dict({k.removeprefix("module.base_encoder."): v for k, v in state.items()}, strict=False)
    assert set(missing) == {"head.weight", "head.bias"} and not unexpected
    own, pixels = model.load("teacher.pt"), torch.rand(2, 3, 32, 32) * 2 - 1
    normalised = ((pixels + 1) / 2 - own.mean) / own.std                            # timm's inputs
    with torch.no_grad():
        expected = own(pixels)
        assert torch.allclose(theirs.forward_features(normalised), expected, atol=1e-5 * expected.abs().max().item())
    again, *_ = model.transfer("file", torch.load("folder/checkpoint.pth.tar", weights_only=True),
                               dict(model.SIZES["nano"], patch_size=8), image_size=32)
    assert all(torch.equal(value, own.state_dict()[key]) for key, value in again.state_dict().items())


def test_only_what_is_beits_is_exported(chain, capsys):
    pytest.importorskip("safetensors", reason="safetensors is not installed: requirements-extra.txt")
    with pytest.raises(runtime.InputError, match="found a checkpoint of tokenizer, expected one of teacher or pretrain or finetune"):
        export.main([str(chain.tokenizer), "folder"])
    run("finetune", "--init", str(chain.teacher), "--steps", "1", "--output", "absolute")
    with pytest.raises(runtime.InputError, match="are BEiT's"):
        export.main(["absolute", "folder"])
    export.main([str(chain.finetune), "folder"])
    config = json.loads(Path("folder/config.json").read_text())
    assert config["architectures"] == ["BeitForImageClassification"] and len(config["id2label"]) == 10


def test_event_files(chain):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: requirements-extra.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run("finetune", *chain.inputs["finetune"], "--steps", "4", "--tensorboard", "--output", "run")
    events = EventAccumulator("run").Reload()
    losses, logged = events.Scalars("loss"), [row for row in log("run") if "loss" in row]
    assert [(e.step, e.value) for e in losses] == [(row["step"], pytest.approx(row["loss"])) for row in logged] and len(losses) == 2
    assert events.Scalars("val/top1")[0].value == pytest.approx(log("run", "val")[0]["top1"])


def test_missing_tensorboard(chain, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = fails(capsys, "finetune", *chain.inputs["finetune"], "--tensorboard", "--output", "run")
    assert "--tensorboard: " in message and "pip install tensorboard" in message


def test_report(chain, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.chdir(chain.root)                             # where the run's tokenizer is
        report.main([str(chain.tokenizer), str(chain.pretrain), str(chain.finetune), "--output", str(folder / "page.html")])
    page = Path("page.html").read_text()
    assert page.count("<polyline") > 10 and page.count("data:image/png;base64,") == 3    # two pictures, one drawn now
    for name in ("loss", "psnr (val)", "usage (val)", "top1 (val)", "images_per_s", "lr"):
        assert f"<b>{name}</b>" in page
    assert f"{log(chain.pretrain)[-1]['loss']:.3g}" in page and "no masked predictions" not in page
    assert not re.search(r"(src|href)=.?(http|//|/)", page)  # no network
    row = re.search(r"<tr class=differs><td>stage</td>(.*?)</tr>", page)[1]
    assert re.findall(r"&quot;(\w+)&quot;", row) == ["tokenizer", "pretrain", "finetune"]
    report.main([str(chain.pretrain), str(chain.pretrain), "--output", "same.html"])
    assert "class=differs" not in Path("same.html").read_text()
    with pytest.raises(runtime.InputError, match="nowhere: no log.jsonl in it"):
        report.main(["nowhere"])


def test_report_of_a_probe(chain):
    top1 = run("finetune", "--init", str(chain.finetune), "--eval", "--output", "run")["top1"]
    report.main(["run"])
    assert f"top1 {report.number(top1)}, " in Path("report.html").read_text()


def test_report_of_a_run_whose_tokenizer_is_gone(chain):
    shutil.copytree(chain.pretrain, "run")
    rows = (Path("run/log.jsonl").read_text().replace(str(chain.tokenizer), "gone").replace("runs/demo/tokenizer", "gone"))
    Path("run/log.jsonl").write_text(rows)
    report.main(["run"])
    assert "no masked predictions: gone: nothing there" in Path("report.html").read_text()
