"""Networks for use outside: model.load, and runs as folders for transformers."""
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import model
import runtime
from conftest import run
from test_stages import newest
from tools import export

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


def test_only_what_is_beits_is_exported(chain, capsys):
    pytest.importorskip("safetensors", reason="safetensors is not installed: requirements-extra.txt")
    with pytest.raises(runtime.InputError, match="found a checkpoint of tokenizer, expected one of pretrain or finetune"):
        export.main([str(chain.tokenizer), "folder"])
    run("finetune", "--init", str(chain.teacher), "--steps", "1", "--output", "absolute")
    with pytest.raises(runtime.InputError, match="are BEiT's"):
        export.main(["absolute", "folder"])
    export.main([str(chain.finetune), "folder"])
    config = json.loads(Path("folder/config.json").read_text())
    assert config["architectures"] == ["BeitForImageClassification"] and len(config["id2label"]) == 10
