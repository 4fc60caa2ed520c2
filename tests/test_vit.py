"""The ViT: masks, positions, features, the optimizer's groups, and timm's networks beside it."""
import itertools
import math
import random
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import pixels, randomize, seeded, statistics, tiny_vit

import model
from model import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, ViTPyramid
from support.weights import load_backbone

# ------------------------------------------------------------------------------------------------
# Block-wise masking

def reference_mask(grid, count, min_block=16):
    """BEiT's algorithm 1, restated on a set of patches.

    Blocks of s patches, s between 16 and what is left to mask (less than 16 at the end), and aspect
    ratio r from [0.3, 1/0.3]; it gives up after 10 draws in a row that do not fit.
    """
    masked = set()
    while len(masked) < count:
        left = count - len(masked)
        for _ in range(10):
            s = random.uniform(min_block, left)
            r = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            a = round(math.sqrt(s * r))
            b = round(math.sqrt(s / r))
            if a >= grid or b >= grid:
                continue
            top = random.randint(0, grid - a)
            first = random.randint(0, grid - b)
            block = {(i, j) for i in range(top, top + a) for j in range(first, first + b)}
            new = block - masked
            if 1 <= len(new) <= left:
                masked |= new
                break
        else:
            return masked
    return masked


@pytest.mark.parametrize("grid, count, min_block", [
    (14, 75, 16), (16, 102, 16), (8, 25, 4), (14, 10, 16), (8, 64, 4), (8, 0, 4), (3, 4, 16)])
def test_every_mask_has_the_same_count(grid, count, min_block):
    random.seed(0)
    for _ in range(100):
        mask = model.block_mask(grid, count, min_block)
        assert mask.shape == (grid, grid)
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == count


def test_masks_against_the_reference_generator():
    """From the same seed both place the same blocks; ours then fills up."""
    reference, ours = np.zeros((2, 2000, 14, 14), int)
    for seed in range(2000):
        random.seed(seed)
        for patch in reference_mask(14, 75):
            reference[seed][patch] = 1
        random.seed(seed)
        ours[seed] = model.block_mask(14, 75)
    counts = reference.sum((1, 2))
    # BEiT's own figures, measured: 66 to 75, mean 74.5, a third falls short
    assert 62 <= counts.min() <= 68
    assert counts.max() == 75
    assert abs(counts.mean() - 74.5) < 0.1
    assert 0.28 < (counts < 75).mean() < 0.36
    filled = ours - reference                               # half a patch of each mask
    assert filled.min() == 0
    assert filled.mean(0).max() < 0.01                      # it favours no patch


# ------------------------------------------------------------------------------------------------
# Relative positions

def test_relative_position_index_against_a_double_loop():
    grid, side = 3, 5
    index = model.relative_position_index(grid, grid)
    for i, j in itertools.product(range(grid * grid), repeat=2):
        dy = i // grid - j // grid
        dx = i % grid - j % grid
        assert index[1 + i, 1 + j] == (dy + grid - 1) * side + dx + grid - 1
    # the class token's three rows follow: to patches, from patches, to itself
    assert (index[0, 1:] == side ** 2).all()
    assert (index[1:, 0] == side ** 2 + 1).all()
    assert index[0, 0] == side ** 2 + 2


def test_attention_is_softmax_of_scores_and_bias():
    """By loops over heads and tokens. Only queries and values have a bias of their own (BEiT)."""
    vit = tiny_vit(positions="block")
    x = vit.embed(pixels(1, 3, 16, 16))
    attention = vit.blocks[0].attn
    table = attention.relative_position_bias_table                              # (52, heads)
    index = model.relative_position_index(4, 4)
    w_q, w_k, w_v = attention.qkv.weight.chunk(3)
    q = x[0] @ w_q.T + attention.q_bias                                         # (17, D)
    k = x[0] @ w_k.T
    v = x[0] @ w_v.T + attention.v_bias
    out = torch.zeros(17, 32)
    for head, i in itertools.product(range(2), range(17)):
        channels = slice(16 * head, 16 * head + 16)
        scores = [q[i, channels] @ k[j, channels] / 4 + table[index[i, j], head] for j in range(17)]
        out[i, channels] = torch.stack(scores).softmax(0) @ v[:, channels]
    assert torch.allclose(attention(x, (4, 4))[0], attention.proj(out), atol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@pytest.mark.parametrize("positions, layer_scale", [("shared", 0.1), ("block", 0.0)])
def test_types_under_autocast(positions, layer_scale, size, monkeypatch):
    """A GPU's fused attention refuses a bias of another type, or whose rows are not contiguous."""
    attention = mock.Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    vit = tiny_vit(positions=positions, layer_scale=layer_scale)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = vit.tokens(pixels(2, 3, *size), [1, 2])
    assert first.dtype == second.dtype == torch.float32     # what blocks add to
    assert attention.call_count == 2
    for call in attention.call_args_list:
        q, bias = call.args[0], call.kwargs["attn_mask"]
        assert bias.stride(-1) == 1
        assert bias.dtype == q.dtype == torch.bfloat16


def test_another_image_size_compiles(monkeypatch):
    """Without the search for its positions, which takes Dynamo minutes to trace."""
    vit = tiny_vit(depth=1)
    images = pixels(1, 3, 64, 96)
    found = {new: model.offset_weights(4, new) for new in (16, 24)}
    compiling = []

    def watched(old, new):
        compiling.append(torch.compiler.is_compiling())
        return found[new]

    monkeypatch.setattr(model, "offset_weights", watched)
    compiled = torch.compile(vit, backend="eager")(images)
    assert compiling and not any(compiling)
    assert torch.allclose(compiled, vit(images), atol=1e-6)


@pytest.mark.parametrize("h, w", [(4, 4), (3, 3), (7, 7), (5, 9), (3, 6), (1, 41)])
def test_position_bias_interpolation(h, w):
    """From 4 × 4 patches: their offsets come to lie at 1, 1 + q, 1 + q + q² on either side (BEiT).

    In a larger grid the farthest come to the farthest, in a smaller one (q = 1) they go.
    """
    def interpolated(biases, new):
        q = max(1, np.roots([1, 1, 2 - new]).real.max())    # 1 + q + q² = new − 1
        right = np.array([1, 1 + q, 1 + q + q * q])
        return np.interp(range(1 - new, new), [*-right[::-1], 0, *right], biases)

    own = torch.randn(7 * 7 + 3, 2, generator=seeded())
    image = np.apply_along_axis(interpolated, 0, own[:-3].view(7, 7, 2).numpy(), h)
    image = np.apply_along_axis(interpolated, 1, image, w)
    resized = model.resize_bias_table(own, h, w)
    assert np.allclose(resized[:-3], image.reshape(-1, 2), atol=1e-5)
    assert torch.equal(resized[-3:], own[-3:])              # the class token's
    with torch.autocast("cpu", torch.bfloat16):             # in fp32 nevertheless
        assert torch.equal(model.resize_bias_table(own, h, w), resized)


# ------------------------------------------------------------------------------------------------
# Absolute positions

def test_sine_cosine_positions():
    """MoCo v3's: the first half of the channels tells the patch's row, the second its column."""
    positions = model.sincos_positions(grid=3, dim=16)
    assert (positions[0, 0] == 0).all()
    for row, column, i in itertools.product(range(3), range(3), range(4)):
        omega = 1 / 10000 ** (i / 4)
        expected = [f(place * omega) for place in (row, column) for f in (math.sin, math.cos)]
        assert np.allclose(positions[0, 1 + 3 * row + column, i::4], expected, atol=1e-6)


def test_resized_positions_keep_rows_and_class_token():
    rows = torch.arange(4.0).repeat_interleave(4)
    embedding = torch.cat([torch.tensor([-9.0]), rows])[None, :, None]          # (1, 1 + 16, 1)
    cls_token, *patches = model.resize_positions(embedding, 3, 5).flatten()
    assert cls_token == -9
    grid = torch.stack(patches).view(3, 5)
    assert torch.allclose(grid, grid[:, :1].expand(3, 5), atol=1e-5)    # constant along a row
    assert (grid[1:] > grid[:-1]).all()


@pytest.mark.parametrize("positions, scale, parameters", [
    ("learned", 0.0, 92_089_856), ("shared", 0.1, 91_965_776)])     # the second: BEiT's own log's
def test_parameters_in_pre_training(positions, scale, parameters):
    with torch.device("meta"):
        vit = VisionTransformer(positions=positions, layer_scale=scale, codes=8192)
    assert sum(p.numel() for p in vit.parameters()) == parameters


# ------------------------------------------------------------------------------------------------
# Images of any size, features

@pytest.mark.parametrize("positions", ["learned", "shared", "block", "absolute"])
def test_images_of_any_size(positions):
    """Positions interpolated; whole patches by padding with grey, which is 0."""
    vit = tiny_vit(positions=positions)
    images = pixels(2, 3, 13, 22)
    features = vit.features(images, [1, 2])
    assert [f.shape for f in features] == [(2, 32, 4, 6)] * 2
    padded = F.pad(images, (0, 2, 0, 3))
    assert torch.equal(vit.features(padded, [2])[0], features[1])
    for layers in ([3], [0, 1], []):
        with pytest.raises(ValueError, match="layers"):
            vit.features(images, layers)


def test_pyramid_of_a_vit():
    """Strides p/4 to 2p, after blocks 4, 6, 8 and 12 of 12 and in that proportion."""
    pyramid = ViTPyramid(tiny_vit(depth=4))
    images = pixels(2, 3, 12, 22)
    maps = pyramid(images)
    assert [f.shape for f in maps] == [
        (2, 32, 12, 24), (2, 32, 6, 12), (2, 32, 3, 6), (2, 32, 2, 3)]
    third, fourth = pyramid.vit.features(images, [3, 4])
    assert torch.equal(maps[2], third)
    assert torch.equal(maps[3], F.max_pool2d(fourth, 2, ceil_mode=True))
    assert pyramid.layers == [1, 2, 3, 4]
    assert ViTPyramid(tiny_vit(depth=12)).layers == [4, 6, 8, 12]


# ------------------------------------------------------------------------------------------------
# In training

@pytest.mark.parametrize("positions", ["learned", "shared", "block"])
def test_activation_checkpointing_gives_the_same_gradients(positions):
    """To the positions too, where they are interpolated."""
    vit = tiny_vit(positions=positions, classes=3).train()
    x = pixels(2, 3, 12, 20)
    gradients = []
    for vit.checkpoint_activations in (False, True):
        vit.zero_grad()
        vit(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in vit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.abs().sum() > 0 for g in gradients[0])


def test_initial_weights_in_pre_training():
    """Cut off at their own σ = 0.02; those of residual branches shrink with depth."""
    torch.manual_seed(0)
    vit = VisionTransformer(16, 4, dim=64, depth=4, heads=2, codes=10)
    std = 0.5397 * 0.02                                     # of a normal distribution cut off at σ
    for i, block in enumerate(vit.blocks, 1):
        assert block.attn.qkv.weight.abs().max() <= 0.02
        for layer, share in ((block.attn.qkv, 1), (block.attn.proj, 2 * i), (block.mlp.fc2, 2 * i)):
            assert layer.weight.std().item() == pytest.approx(std / math.sqrt(share), rel=0.05)


def test_initial_weights_outside_pre_training():
    """Cut off at ±2 and not at σ; the patch projection is PyTorch's; the classifier is small."""
    torch.manual_seed(0)
    vit = VisionTransformer(16, 4, dim=64, depth=2, heads=2, positions="learned", classes=10)
    for weight in (vit.pos_embed, vit.blocks[1].attn.qkv.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert weight.abs().max() > 0.04
    bound = 1 / math.sqrt(3 * 4 * 4)                        # nn.Conv2d's uniform draw
    assert 0.9 * bound < vit.patch_embed.proj.weight.abs().max() <= bound
    assert vit.head.weight.std() < 1e-4


@pytest.mark.parametrize("positions", ["learned", "block"])
def test_param_groups_by_hand(positions):
    vit = VisionTransformer(16, 4, dim=32, depth=4, heads=2, positions=positions, classes=3)
    found = [(name, group["lr_scale"], group["weight_decay"])
             for group in model.param_groups(vit, 0.05, 0.5) for name, _ in group["params"]]
    names = [name for name, _ in vit.named_parameters()]
    assert sorted(name for name, *_ in found) == sorted(names)              # each once
    scales = {"cls_token": 1 / 32, "pos_embed": 1 / 32, "patch_embed": 1 / 32,
              "blocks.0": 1 / 16, "blocks.1": 1 / 8, "blocks.2": 1 / 4,
              "blocks.3": 1 / 2, "fc_norm": 1.0, "head": 1.0}
    decayed = ("patch_embed.proj.weight", "qkv.weight", "attn.proj.weight", "fc1.weight",
               "fc2.weight", "head.weight", "relative_position_bias_table")
    for name, scale, decay in found:
        prefix = next(p for p in scales if name.startswith(p))
        assert scale == scales[prefix], name
        assert decay == (0.05 if name.endswith(decayed) else 0.0), name


# ------------------------------------------------------------------------------------------------
# timm's networks, by their weights' names

@pytest.mark.parametrize("positions, scale", [("learned", 0.0), ("block", 0.1), ("shared", 0.1)])
def test_our_vit_is_timms_beit(positions, scale):
    pytest.importorskip("timm", reason="timm, an independent BEiT, is not installed")
    from timm.models.beit import Beit
    ours = tiny_vit(positions=positions, layer_scale=scale, classes=7)
    theirs = Beit(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=7,
        init_values=scale, use_abs_pos_emb=positions == "learned",
        use_rel_pos_bias=positions == "block", use_shared_rel_pos_bias=positions == "shared").eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = pixels(2, 3, 16, 16)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    # and back: ours takes other weights of timm's
    load_backbone(ours, randomize(theirs, seed=1).state_dict())
    assert torch.allclose(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_our_plain_vit_is_timms():
    """A classifier by the patches' mean. test_export.py has its tokens."""
    pytest.importorskip("timm", reason="timm, an independent ViT, is not installed")
    from timm.models.vision_transformer import VisionTransformer as Theirs
    ours = tiny_vit(positions="absolute", layer_scale=0.0, classes=3, mean=IMAGENET_MEAN,
                    std=IMAGENET_STD)
    theirs = Theirs(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3,
                    global_pool="avg", fc_norm=True).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = pixels(2, 3, 16, 16)
    mean, std = statistics()
    inputs = ((x + 1) / 2 - mean) / std
    assert torch.allclose(ours(x), theirs(inputs), atol=1e-5, rtol=1e-5)
