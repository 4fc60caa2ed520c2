"""Networks from weights: for another task, of our own runs, of other projects' files."""
import copy
import urllib.error

import pytest
import torch
from conftest import COMMON, run
from test_stages import fails, log, newest
from test_vit import pixels, randomize, tiny_vit

import checkpoint
import finetune
import model
import weights
from model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VisionTransformer,
    resize_bias_table,
    resize_positions,
)
from weights import load_backbone

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


def test_position_embedding_is_interpolated_to_another_image_size():
    source = tiny_vit(positions="absolute")
    target = tiny_vit(image_size=32, positions="absolute", classes=3)
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
])
def test_another_architecture_is_refused_by_name(change, message):
    target = tiny_vit(**{"positions": "block", "classes": 3, **change})
    with pytest.raises(ValueError, match=message):
        load_backbone(target, tiny_vit(codes=8).state_dict())


def test_pretraining_begins_fine_tuning(chain):
    args = finetune.get_args([*COMMON, *chain.inputs["finetune"]])
    state = newest(chain.pretrain)
    network, _ = finetune.build(args, 10, state)
    shared = state["model"]["rel_pos_bias.relative_position_bias_table"]
    for block in network.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, shared)
    fc1 = state["model"]["blocks.0.mlp.fc1.weight"]
    assert torch.equal(network.blocks[0].mlp.fc1.weight, fc1)
    assert newest(chain.finetune)["args"]["init_digest"] == state["digest"]


# ------------------------------------------------------------------------------------------------
# The perceptual network, and files of other projects

def test_the_perceptual_network_is_the_teachers(chain):
    network, digest = weights.perceptual_network(str(chain.teacher))
    state = newest(chain.teacher)
    assert checkpoint.digest(network.state_dict()) == checkpoint.digest(state["model"])
    assert digest == state["digest"]


@pytest.fixture
def moco_v3_file(monkeypatch):
    """A file as MoCo v3 publishes it, of a tiny network that stands for ViT-B; its own weights."""
    monkeypatch.setitem(model.SIZES, "base", dict(dim=32, depth=4, heads=2))
    torch.manual_seed(0)
    network = VisionTransformer(
        **model.SIZES["base"], positions="absolute", layer_scale=0.0,
        mean=IMAGENET_MEAN, std=IMAGENET_STD)
    own = network.state_dict()
    state = {"module.base_encoder.head.0.weight": torch.ones(8, 32),
             "module.predictor.0.weight": torch.ones(4, 4)}
    for key, value in own.items():
        state[f"module.base_encoder.{key}"] = value
        state[f"module.momentum_encoder.{key}"] = value + 1
    contents = dict(epoch=300, arch="vit_base", state_dict=state, optimizer={}, scaler={})
    torch.save(contents, "vit-b-300ep.pth.tar")
    return own


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


def test_published_beit_file_begins_fine_tuning(chain):
    """BEiT's files hold the weights under "model", and indices that we compute."""
    state = newest(chain.pretrain)["model"]
    index = {"rel_pos_bias.relative_position_index": torch.zeros(17, 17)}
    torch.save(dict(model=state | index), "beit.pth")
    args = finetune.get_args([*COMMON, "--init", "beit.pth"])
    network, _ = finetune.build(args, 10, checkpoint.load("beit.pth"))
    assert torch.equal(network.blocks[0].attn.proj.weight, state["blocks.0.attn.proj.weight"])
    run("finetune", "--init", "beit.pth", "--steps", "1", "--output", "run")
    assert newest("run")["args"]["init_digest"] is None


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


@pytest.mark.parametrize("name", ["moco_v3", "vgg16", "resnet50"])
def test_a_download_that_fails(name, capsys, monkeypatch):
    def fail(*arguments, **keywords):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    message = fails(capsys, "tokenizer", "--perceptual", name)
    assert name in message
    assert "no route" in message
    assert "https://" in message
