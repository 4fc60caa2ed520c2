"""Networks from weights: for another task, of our own runs, of other projects' files."""
import argparse
import copy
import math
import urllib.error

import pytest
import torch
import torchvision
from conftest import COMMON, run
from test_stages import fails, log, newest
from test_vit import pixels, randomize, tiny_vit

import finetune
import model
from model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VisionTransformer,
    resize_bias_table,
    resize_positions,
)
from support import checkpoint, weights
from support.launch import InputError
from support.weights import load_backbone

# ------------------------------------------------------------------------------------------------
# A ViT for another task

def test_backbone_of_pretraining_loads_for_fine_tuning():
    """The shared position bias goes into every block, the head stays as initialised."""
    source = tiny_vit(codes=8)
    target = tiny_vit(positions="block", classes=3)
    before = copy.deepcopy(target.state_dict())
    missing = load_backbone(target, source.state_dict())
    assert set(missing) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    given = source.state_dict()
    shared = given["rel_pos_bias.relative_position_bias_table"]
    for key, value in target.state_dict().items():
        if key.startswith(("head", "fc_norm")):
            assert torch.equal(value, before[key])
        elif key.endswith("relative_position_bias_table"):
            assert torch.equal(value, shared)
        else:
            assert torch.equal(value, given[key])
    # the same function: its tokens are those of pre-training
    x = pixels(2, 3, 16, 16)
    assert torch.allclose(target.tokens(x, [2])[0], source.tokens(x, [2])[0], atol=1e-5)


def test_backbone_loads_at_another_image_size():
    source = tiny_vit(codes=8)
    target = tiny_vit(image_size=32, positions="block", classes=3)
    load_backbone(target, source.state_dict())
    own = target.blocks[1].attn.relative_position_bias_table
    shared = source.rel_pos_bias.relative_position_bias_table
    assert torch.equal(own, resize_bias_table(shared, 8, 8))
    assert target(pixels(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("positions", ["learned", "absolute"])
def test_position_embedding_is_interpolated_to_another_image_size(positions):
    source = tiny_vit(positions=positions)
    target = tiny_vit(image_size=32, positions=positions, classes=3)
    load_backbone(target, source.state_dict())
    assert torch.equal(target.pos_embed, resize_positions(source.pos_embed, 8, 8))
    assert torch.equal(target.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_classifier_of_the_same_classes_is_kept():
    source = tiny_vit(positions="block", classes=3)
    for classes, kept in ((3, True), (4, False)):
        target = randomize(tiny_vit(positions="block", classes=classes), seed=1)
        load_backbone(target, source.state_dict())
        assert torch.equal(target.fc_norm.weight, source.fc_norm.weight)
        own = target.head.weight
        given = source.head.weight
        assert (own.shape == given.shape and torch.equal(own, given)) == kept


@pytest.mark.parametrize("change, message", [
    (dict(dim=64), "cls_token: expected"),
    (dict(depth=3), "lacks blocks.2."),
    (dict(depth=1), r"has blocks.1.*and \d+ more"),
    (dict(heads=4), "relative_position_bias_table: expected"),
    (dict(patch_size=8), "patch_embed.proj.weight: expected"),
    (dict(layer_scale=0.0), "has blocks.0.gamma_1"),
    (dict(positions="absolute"), "pos_embed"),
    (dict(positions="learned"), "lacks pos_embed"),
])
def test_another_architecture_is_refused_by_name(change, message):
    target = tiny_vit(**{"positions": "block", "classes": 3, **change})
    with pytest.raises(ValueError, match=message):
        load_backbone(target, tiny_vit(codes=8).state_dict())


def test_positions_of_both_kinds_are_refused():
    weights = tiny_vit(codes=8).state_dict() | dict(pos_embed=torch.zeros(1, 17, 32))
    with pytest.raises(InputError, match="has rel_pos_bias.relative_position_bias_table"):
        load_backbone(tiny_vit(positions="learned", layer_scale=0.1), weights)


def test_pretraining_begins_fine_tuning(chain):
    args = finetune.get_args([*COMMON, *chain.inputs["finetune"]])
    state = newest(chain.pretrain)
    network, _ = finetune.build(args, 10, state)
    assert network.positions == "learned"
    assert torch.equal(network.pos_embed, state["model"]["pos_embed"])
    fc1 = state["model"]["blocks.0.mlp.fc1.weight"]
    assert torch.equal(network.blocks[0].mlp.fc1.weight, fc1)
    assert newest(chain.finetune)["identity"]["init"] == state["digest"]


def test_the_other_vit_begins_fine_tuning_and_a_new_one_is_the_papers(chain):
    """BEiT's other ViT keeps its relative positions and its layer scale without a flag."""
    run("pretrain", *chain.inputs["pretrain"], "--positions", "shared", "--layer-scale", "0.1",
        "--steps", "1", "--output", "shared")
    state = newest("shared")
    args = finetune.get_args([*COMMON, "--init", "shared"])
    network, model_args = finetune.build(args, 10, state)
    assert (model_args["positions"], model_args["layer_scale"]) == ("block", 0.1)
    shared = state["model"]["rel_pos_bias.relative_position_bias_table"]
    for block in network.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, shared)
    network, model_args = finetune.build(args, 10, None)
    assert (model_args["positions"], model_args["layer_scale"]) == ("learned", 0.0)


def test_what_a_checkpoint_overrules_is_named(chain, capsys):
    def said(*flags):
        capsys.readouterr()
        args = finetune.get_args([*COMMON, *chain.inputs["finetune"], *flags])
        finetune.build(args, 10, None if args.init == "none" else newest(chain.pretrain))
        return capsys.readouterr().out

    assert said() == ""
    other = ["--model", "tiny", "--patch-size", "16", "--statistics", "imagenet"]
    line = said(*other)
    assert all(word in line for word in (str(chain.pretrain), "dim 192", "patch_size 16", "mean"))
    assert "layer_scale 0.5\n" in said("--layer-scale", "0.5")
    assert said(*other, "--init", "none") == ""             # the control: they are used


# ------------------------------------------------------------------------------------------------
# The perceptual network, and files of other projects

def test_the_perceptual_network_is_the_teachers(chain):
    network, digest = weights.perceptual_network(str(chain.teacher))
    state = newest(chain.teacher)
    assert checkpoint.digest(network.state_dict()) == checkpoint.digest(state["model"])
    assert digest == state["digest"]


def as_moco_v3(network, head="head"):
    """What MoCo v3's files hold: a network, its momentum copy, projectors in place of its head."""
    state = {f"module.base_encoder.{head}.0.weight": torch.ones(8, 32),
             "module.predictor.0.weight": torch.ones(4, 4)}
    for key, value in network.state_dict().items():
        if not key.startswith(f"{head}."):
            state[f"module.base_encoder.{key}"] = value
            state[f"module.momentum_encoder.{key}"] = value + 1
    return dict(epoch=300, arch="vit_base", state_dict=state, optimizer={}, scaler={})


@pytest.fixture
def moco_v3_file(monkeypatch):
    """A file as MoCo v3 publishes it, of a tiny network that stands for ViT-B; its own weights."""
    monkeypatch.setitem(model.SIZES, "base", dict(dim=32, depth=4, heads=2))
    torch.manual_seed(0)
    network = VisionTransformer(
        **model.SIZES["base"], positions="absolute", layer_scale=0.0,
        mean=IMAGENET_MEAN, std=IMAGENET_STD)
    torch.save(as_moco_v3(network), "vit-b-300ep.pth.tar")
    return network.state_dict()


def test_official_moco_v3_file_as_perceptual_network(moco_v3_file):
    network, _ = weights.perceptual_network("vit-b-300ep.pth.tar")
    assert checkpoint.digest(network.state_dict()) == checkpoint.digest(moco_v3_file)
    run("tokenizer", "--perceptual", "vit-b-300ep.pth.tar", "--steps", "2", "--output", "run")
    assert log("run")[-1]["perceptual"] > 0


def test_official_moco_v3_file_begins_fine_tuning(moco_v3_file):
    args = finetune.get_args([*COMMON, "--init", "vit-b-300ep.pth.tar", "--model", "base",
                              "--image-size", "64", "--patch-size", "16"])
    network, model_args = finetune.build(args, 10, checkpoint.load(args.init))
    own = moco_v3_file["blocks.3.attn.qkv.weight"]
    assert torch.equal(network.blocks[3].attn.qkv.weight, own)
    assert model_args["positions"] == "absolute"
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize("positions, layer_scale", [("learned", 0.0), ("shared", 0.1)])
def test_published_beit_file_begins_fine_tuning(positions, layer_scale):
    """BEiT's files hold the weights under "model", and indices that we compute."""
    source = tiny_vit(**model.SIZES["nano"], image_size=32, patch_size=8, positions=positions,
                      layer_scale=layer_scale, codes=8)
    index = {"rel_pos_bias.relative_position_index": torch.zeros(17, 17)}
    torch.save(dict(model=source.state_dict() | (index if positions == "shared" else {})),
               "beit.pth")
    args = finetune.get_args([*COMMON, "--init", "beit.pth"])
    network, _ = finetune.build(args, 10, checkpoint.load("beit.pth"))
    x = pixels(2, 3, 32, 32)
    own, given = network.eval().tokens(x, [4])[0], source.tokens(x, [4])[0]
    assert torch.allclose(own, given, atol=1e-5 * given.abs().max().item())
    run("finetune", "--init", "beit.pth", "--steps", "1", "--output", "run")
    assert newest("run")["identity"]["init"] == "beit.pth"     # it has no digest


def test_a_file_with_its_arguments_beside_the_weights(chain):
    """BEiT's and MAE's have args=argparse.Namespace(…) in them; nothing else is unpickled."""
    state = newest(chain.pretrain)["model"]
    contents = dict(model=state, epoch=799, args=argparse.Namespace(lr=1.5e-3, model="beit_base"))
    torch.save(contents, "beit.pth")
    assert checkpoint.load("beit.pth")["args"].lr == 1.5e-3
    run("finetune", "--init", "beit.pth", "--steps", "1", "--output", "run")
    assert math.isfinite(log("run")[-1]["loss"])


class Hostile:
    def __reduce__(self):
        return open, ("executed", "w")


def test_a_file_that_would_execute_something_is_refused(folder):
    contents = dict(model={}, args=argparse.Namespace(lr=Hostile()))
    torch.save(contents, "hostile.pth")
    with pytest.raises(InputError, match="no sound checkpoint"):
        checkpoint.load("hostile.pth")
    assert not (folder / "executed").exists()
    torch.load("hostile.pth", weights_only=False)           # the trap works
    assert (folder / "executed").exists()


def begun(path, *flags):
    """The ViT with which fine-tuning begins, in eval mode, and its arguments."""
    args = finetune.get_args([*COMMON, "--init", path, *flags])
    network, model_args = finetune.build(args, 10, checkpoint.load(path))
    return network.eval(), model_args


def test_a_deepspeed_file_begins_fine_tuning(chain):
    """DeepSpeed's hold the weights under "module"."""
    state = newest(chain.pretrain)["model"]
    torch.save(dict(module=state, optimizer=None, global_steps=7), "deepspeed.pt")
    network, _ = begun("deepspeed.pt")
    assert torch.equal(network.blocks[2].mlp.fc2.weight, state["blocks.2.mlp.fc2.weight"])


# ------------------------------------------------------------------------------------------------
# Input statistics

def input_statistics(network):
    return network.mean.flatten().tolist(), network.std.flatten().tolist()


def test_statistics_of_a_foreign_file_are_the_flags(chain):
    torch.save(newest(chain.pretrain)["model"], "bare.pt")
    network, model_args = begun("bare.pt", "--statistics", "imagenet")
    mean, std = input_statistics(network)
    assert mean == pytest.approx(IMAGENET_MEAN)
    assert std == pytest.approx(IMAGENET_STD)
    again = VisionTransformer(**model_args)                 # they are kept for the next stage
    assert input_statistics(again) == input_statistics(network)
    assert input_statistics(begun("bare.pt")[0]) == ([0.5] * 3, [0.5] * 3)


def test_statistics_of_our_own_checkpoint_are_its_own(chain):
    network, _ = begun(str(chain.pretrain), "--statistics", "imagenet")
    assert input_statistics(network) == ([0.5] * 3, [0.5] * 3)
    network, _ = begun(str(chain.teacher), "--statistics", "half")
    assert input_statistics(network)[0] == pytest.approx(IMAGENET_MEAN)


def test_statistics_of_moco_v3s_file_are_imagenets_or_the_flags(moco_v3_file):
    flags = ["--model", "base", "--image-size", "64", "--patch-size", "16"]
    network, _ = begun("vit-b-300ep.pth.tar", *flags)
    assert input_statistics(network)[1] == pytest.approx(IMAGENET_STD)
    network, _ = begun("vit-b-300ep.pth.tar", *flags, "--statistics", "half")
    assert input_statistics(network)[1] == [0.5] * 3


# ------------------------------------------------------------------------------------------------
# ResNet-50 as the perceptual network

@pytest.fixture
def small_resnet50(monkeypatch):
    """One block a stage: the names of ResNet-50's weights, and its widths."""
    def build():
        return torchvision.models.resnet.ResNet(
            torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])

    monkeypatch.setattr(torchvision.models, "resnet50", build)
    torch.manual_seed(0)
    return build()


def test_official_moco_v3_resnet50_as_perceptual_network(small_resnet50, monkeypatch):
    """Its own weights, not the momentum copy's; a projector stands where torchvision has fc."""
    torch.save(as_moco_v3(small_resnet50, head="fc"), "r-50-100ep.pth.tar")
    network, digest = weights.perceptual_network("r-50-100ep.pth.tar")
    found, given = network.state_dict(), small_resnet50.state_dict()
    for key in given:
        if not key.startswith("fc."):
            assert torch.equal(found[key], given[key]), key
    # downloaded, it is the same
    asked = []

    def download(url, **_):
        asked.append(url)
        return torch.load("r-50-100ep.pth.tar", weights_only=True)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert weights.perceptual_network("moco_v3_resnet50")[1] == digest
    assert asked[0].endswith("moco-v3/r-50-100ep/r-50-100ep.pth.tar")
    run("tokenizer", "--perceptual", "moco_v3_resnet50", "--steps", "1", "--output", "run")
    assert log("run")[-1]["perceptual"] > 0


def test_a_file_that_lacks_a_weight_is_refused_by_its_name(small_resnet50, capsys):
    contents = as_moco_v3(small_resnet50, head="fc")
    del contents["state_dict"]["module.base_encoder.layer3.0.conv2.weight"]
    torch.save(contents, "broken.pth.tar")
    message = fails(capsys, "tokenizer", "--perceptual", "broken.pth.tar")
    assert "broken.pth.tar" in message
    assert "layer3.0.conv2.weight" in message


def test_checkpoints_of_another_architecture(capsys, chain, monkeypatch):
    nano = model.SIZES["nano"]                              # ViT-B's weights take long to draw
    monkeypatch.setitem(model.SIZES, "base", nano)
    message = fails(
        capsys, "finetune", *chain.inputs["finetune"], "--image-size", "64", "--eval")
    assert "no classifier" in message
    torch.save(newest(chain.pretrain)["model"], "bare.pt")
    message = fails(capsys, "finetune", "--init", "bare.pt", "--model", "tiny")
    assert "bare.pt: " in message
    assert "expected" in message
    state = newest(chain.teacher)["model"]
    state["blocks.0.norm1.weight"] = torch.ones(3)
    torch.save(dict(state_dict=state), "moco.pt")
    assert "moco.pt" in fails(capsys, "tokenizer", "--perceptual", "moco.pt")


@pytest.mark.parametrize("name", weights.DOWNLOADS)
def test_a_download_that_fails(name, capsys, monkeypatch):
    def fail(*arguments, **keywords):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    message = fails(capsys, "tokenizer", "--perceptual", name)
    assert name in message
    assert "no route" in message
    assert "https://" in message
