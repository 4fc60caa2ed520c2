"""Networks from weights: for another task, of our own runs, of other projects' files."""
import argparse
import urllib.error
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchvision
from conftest import COMMON, run
from helpers import as_moco_v3, fails, newest, pixels, randomize, tiny_resnet50, tiny_vit

import finetune
from model import IMAGENET_MEAN, IMAGENET_STD, SIZES
from support import checkpoint, weights
from support.launch import InputError
from support.weights import load_backbone

# ------------------------------------------------------------------------------------------------
# A ViT for another task

@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("before, after", [
    ("learned", "learned"), ("absolute", "absolute"), ("shared", "block")])
def test_a_backbone_is_the_same_function_in_another_task(before, after, size):
    """Every block gets the shared position bias; positions are interpolated to another size."""
    source = tiny_vit(positions=before, codes=8)
    target = randomize(tiny_vit(image_size=size, positions=after, classes=3), seed=1)
    head = target.head.weight.clone()
    missing = load_backbone(target, source.state_dict())
    assert set(missing) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert torch.equal(target.head.weight, head)            # as initialised
    x = pixels(2, 3, size, size)
    assert torch.allclose(target.tokens(x, [2])[0], source.tokens(x, [2])[0], atol=1e-5)


@pytest.mark.parametrize("classes, kept", [(3, True), (4, False)])
def test_classifier_of_the_same_classes_is_kept(classes, kept):
    source = tiny_vit(positions="block", classes=3)
    target = randomize(tiny_vit(positions="block", classes=classes), seed=1)
    load_backbone(target, source.state_dict())
    assert torch.equal(target.fc_norm.weight, source.fc_norm.weight)
    assert torch.equal(target.head.weight, source.head.weight) == kept


@pytest.mark.parametrize("change, named", [
    (dict(depth=3), "blocks.2."),
    (dict(depth=1), "blocks.1"),
    (dict(heads=4), "relative_position_bias_table"),
    (dict(layer_scale=0.0), "blocks.0.gamma_1"),
    (dict(positions="absolute"), "pos_embed"),
])
def test_another_architecture_is_refused_by_name(change, named):
    target = tiny_vit(**{"positions": "block", "classes": 3, **change})
    with pytest.raises(InputError, match=named):
        load_backbone(target, tiny_vit(codes=8).state_dict())


def test_a_checkpoint_of_another_architecture_is_refused_in_one_line(capsys, chain):
    state = newest(chain.tokenizer)
    state["model"] = {f"old.{key}": value for key, value in state["model"].items()}
    del state["digest"]                                     # written anew: a sound file
    checkpoint.write(Path("old.pt"), state)
    message = fails(capsys, "pretrain", "--tokenizer", "old.pt")
    assert "--tokenizer old.pt" in message
    assert len(message) < 300                               # not hundreds of names


def begun(path, *flags):
    """The ViT with which fine-tuning begins, in eval mode, and its arguments."""
    args = finetune.get_args([*COMMON, "--init", str(path), *flags])
    network, model_args = finetune.build(args, 10, weights.read(args)[0])
    return network.eval(), model_args


def test_what_a_checkpoint_overrules_is_named(chain, capsys):
    begun(chain.pretrain)
    assert capsys.readouterr().out == ""
    flags = ["--model", "tiny", "--patch-size", "16", "--statistics", "imagenet"]
    _, own = begun(chain.pretrain, *flags)
    line = capsys.readouterr().out
    assert all(word in line for word in (str(chain.pretrain), "dim 192", "patch_size 16", "mean"))
    assert (own["dim"], own["patch_size"], own["mean"]) == (64, 8, (0.5, 0.5, 0.5))
    assert begun(chain.teacher, "--statistics", "half")[1]["mean"] == IMAGENET_MEAN
    capsys.readouterr()
    _, own = begun("none", *flags)                          # the control: they are used
    assert capsys.readouterr().out == ""
    assert (own["dim"], own["patch_size"], own["mean"]) == (192, 16, IMAGENET_MEAN)
    assert (own["positions"], own["layer_scale"]) == ("learned", 0.0)       # the paper's


# ------------------------------------------------------------------------------------------------
# Files of other projects

@pytest.fixture
def moco_v3_file(monkeypatch):
    """A file as MoCo v3 publishes it, of a tiny network that stands for ViT-B; its own weights."""
    monkeypatch.setitem(SIZES, "base", dict(dim=32, depth=4, heads=2))
    network = tiny_vit(**SIZES["base"], image_size=224, patch_size=16, positions="absolute",
                       layer_scale=0.0, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    torch.save(as_moco_v3(network), "vit-b-300ep.pth.tar")
    return network.state_dict()


def test_official_moco_v3_file_as_perceptual_network(moco_v3_file):
    network, _ = weights.perceptual_network("vit-b-300ep.pth.tar")
    assert checkpoint.digest(network.state_dict()) == checkpoint.digest(moco_v3_file)


def test_official_moco_v3_file_begins_fine_tuning(moco_v3_file):
    flags = ["--model", "base", "--image-size", "64", "--patch-size", "16"]
    network, model_args = begun("vit-b-300ep.pth.tar", *flags)
    own = moco_v3_file["blocks.3.attn.qkv.weight"]
    assert torch.equal(network.blocks[3].attn.qkv.weight, own)
    assert model_args["positions"] == "absolute"
    assert model_args["mean"] == IMAGENET_MEAN              # kept for the next stage
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert network.std.flatten().tolist() == pytest.approx(IMAGENET_STD)
    network, _ = begun("vit-b-300ep.pth.tar", *flags, "--statistics", "half")
    assert network.std.flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize("positions, layer_scale, key", [
    ("learned", 0.0, "module"), ("shared", 0.1, "model")])
def test_published_beit_file_begins_fine_tuning(positions, layer_scale, key):
    """BEiT's files hold the weights under "model", indices that we compute, and their arguments.

    DeepSpeed's hold the weights under "module".
    """
    source = tiny_vit(**SIZES["nano"], image_size=32, patch_size=8, positions=positions,
                      layer_scale=layer_scale, codes=8)
    index = {"rel_pos_bias.relative_position_index": torch.zeros(17, 17)}
    contents = source.state_dict() | (index if positions == "shared" else {})
    arguments = argparse.Namespace(lr=1.5e-3, model="beit_base")
    torch.save({key: contents, "epoch": 799, "args": arguments}, "beit.pth")
    network, _ = begun("beit.pth")
    x = pixels(2, 3, 32, 32)
    own, given = network.tokens(x, [4])[0], source.tokens(x, [4])[0]
    assert torch.allclose(own, given, atol=1e-5 * given.abs().max().item())
    run("finetune", "--init", "beit.pth", "--steps", "1", "--output", "run")
    assert newest("run")["identity"]["init"] == "beit.pth"     # it has no digest


# ------------------------------------------------------------------------------------------------
# The perceptual network

def test_the_perceptual_network_is_the_teachers(chain):
    network, digest = weights.perceptual_network(str(chain.teacher))
    state = newest(chain.teacher)
    assert checkpoint.digest(network.state_dict()) == checkpoint.digest(state["model"])
    assert digest == state["digest"]


@pytest.fixture
def small_resnet50(monkeypatch):
    monkeypatch.setattr(torchvision.models, "resnet50", tiny_resnet50)
    torch.manual_seed(0)
    return tiny_resnet50()


def test_official_moco_v3_resnet50_as_perceptual_network(small_resnet50, monkeypatch):
    """Its own weights, not the momentum copy's; a projector stands where torchvision has fc."""
    torch.save(as_moco_v3(small_resnet50, head="fc"), "r-50-100ep.pth.tar")
    network, digest = weights.perceptual_network("r-50-100ep.pth.tar")
    network.fc = small_resnet50.fc
    own, given = network.state_dict(), small_resnet50.state_dict()
    assert checkpoint.digest(own) == checkpoint.digest(given)
    # downloaded, it is the same
    download = mock.Mock(return_value=torch.load("r-50-100ep.pth.tar", weights_only=True))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert weights.perceptual_network("moco_v3_resnet50")[1] == digest
    assert download.call_args.args[0].endswith("moco-v3/r-50-100ep/r-50-100ep.pth.tar")


def test_a_file_that_lacks_a_weight_is_refused_by_its_name(small_resnet50, capsys):
    contents = as_moco_v3(small_resnet50, head="fc")
    del contents["state_dict"]["module.base_encoder.layer3.0.conv2.weight"]
    torch.save(contents, "broken.pth.tar")
    message = fails(capsys, "tokenizer", "--perceptual", "broken.pth.tar")
    assert "broken.pth.tar" in message
    assert "layer3.0.conv2.weight" in message


@pytest.mark.parametrize("name", weights.DOWNLOADS)
def test_a_download_that_fails(name, capsys, monkeypatch):
    no_route = mock.Mock(side_effect=urllib.error.URLError("no route"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_route)
    message = fails(capsys, "tokenizer", "--perceptual", name)
    assert all(word in message for word in (name, "no route", "https://"))
