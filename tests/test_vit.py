"""The ViT: masks, positions, features, the optimizer's groups, and timm's networks beside it."""
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import pixels, randomize, seeded, statistics, tiny_vit

import model
from model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VisionTransformer,
    ViTPyramid,
    block_mask,
    offset_weights,
    param_groups,
    position_bias,
    relative_position_index,
    resize_bias_table,
    resize_positions,
    sincos_positions,
)
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
        mask = block_mask(grid, count, min_block)
        assert mask.shape == (grid, grid)
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == count


def frequency(masks):
    """How often each patch is masked, over the square's eight symmetries: that cuts the noise."""
    share = np.mean(masks, 0)
    turned = [np.rot90(share, k) for k in range(4)]
    return np.mean(turned + [t.T for t in turned], 0)


def test_masks_against_the_reference_generator():
    random.seed(0)
    reference = np.zeros((2000, 14, 14))
    for grid in reference:
        for patch in reference_mask(14, 75):
            grid[patch] = 1
    counts = reference.sum((1, 2))
    # BEiT's own figures, measured: 66 to 75, mean 74.5, a third falls short
    assert 62 <= counts.min() <= 68
    assert counts.max() == 75
    assert abs(counts.mean() - 74.5) < 0.1
    assert 0.28 < (counts < 75).mean() < 0.36
    ours = np.stack([block_mask(14, 75).numpy() for _ in range(2000)])
    difference = frequency(ours) - frequency(reference)
    assert np.abs(difference).max() < 0.03
    assert abs(difference.mean() - 0.5 / 196) < 0.001       # the half patch that is filled up


def test_masks_begin_as_the_reference_generators():
    """From the same seed both place the same blocks; ours then fills up."""
    complete = 0
    for seed in range(300):
        random.seed(seed)
        expected = reference_mask(14, 75)
        random.seed(seed)
        mask = block_mask(14, 75)
        assert all(mask[patch] for patch in expected)
        complete += len(expected) == 75
    assert 180 < complete < 240                             # no more than a third are filled up


# ------------------------------------------------------------------------------------------------
# Relative positions

def test_relative_position_index_against_a_double_loop():
    grid = 3
    side = 2 * grid - 1
    index = relative_position_index(grid, grid)
    for i in range(grid * grid):
        for j in range(grid * grid):
            dy = i // grid - j // grid
            dx = i % grid - j % grid
            assert index[1 + i, 1 + j] == (dy + grid - 1) * side + dx + grid - 1
    # the class token's three rows follow: to patches, from patches, to itself
    assert (index[0, 1:] == side ** 2).all()
    assert (index[1:, 0] == side ** 2 + 1).all()
    assert index[0, 0] == side ** 2 + 2


@pytest.mark.parametrize("positions", ["shared", "block"])
def test_attention_is_softmax_of_scores_and_bias(positions):
    """The first block's attention by loops over heads and tokens; queries, keys and values apart.

    Only queries and values have a bias (BEiT).
    """
    vit = tiny_vit(positions=positions)
    x, grid = vit.embed(pixels(1, 3, 16, 16))
    attention = vit.blocks[0].attn
    own = vit.rel_pos_bias if positions == "shared" else attention
    table = own.relative_position_bias_table                                    # (52, heads)
    index = relative_position_index(4, 4)
    w_q, w_k, w_v = attention.qkv.weight.chunk(3)
    q = x[0] @ w_q.T + attention.q_bias                                         # (17, D)
    k = x[0] @ w_k.T
    v = x[0] @ w_v.T + attention.v_bias
    out = torch.zeros(17, 32)
    for head in range(2):
        channels = slice(16 * head, 16 * head + 16)
        for i in range(17):
            scores = [q[i, channels] @ k[j, channels] / 4 + table[index[i, j], head]
                      for j in range(17)]
            out[i, channels] = torch.stack(scores).softmax(0) @ v[:, channels]
    shared_bias = position_bias(table, grid) if positions == "shared" else None
    assert torch.allclose(attention(x, grid, shared_bias)[0], attention.proj(out), atol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_fused_attention_can_take_the_bias(size, monkeypatch):
    """A GPU's fused kernels refuse a mask whose last dimension is not the closest in memory.

    One of another dtype too.
    """
    seen = []
    plain = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask):
        seen.append((q, attn_mask))
        return plain(q, k, v, attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for positions in ("shared", "block"):
        with torch.autocast("cpu", torch.bfloat16):
            tiny_vit(positions=positions)(pixels(2, 3, *size))
    assert len(seen) == 4
    for q, bias in seen:
        assert bias.stride(-1) == 1
        assert bias.dtype == q.dtype == torch.bfloat16


def test_another_image_size_compiles(monkeypatch):
    """Without the search for its positions, which takes Dynamo minutes to trace."""
    vit = tiny_vit(depth=1)
    images = pixels(1, 3, 64, 96)
    found = {new: offset_weights(4, new) for new in (16, 24)}
    compiling = []

    def watched(old, new):
        compiling.append(torch.compiler.is_compiling())
        return found[new]

    monkeypatch.setattr(model, "offset_weights", watched)
    compiled = torch.compile(vit, backend="eager")(images)
    assert compiling and not any(compiling)
    assert torch.allclose(compiled, vit(images), atol=1e-6)


def test_position_bias_interpolation():
    own = torch.randn(7 * 7 + 3, 2, generator=seeded())     # of 4 × 4 patches
    old = own[:-3].view(7, 7, 2)
    assert torch.equal(resize_bias_table(own, 4, 4), own)
    for h, w in ((3, 3), (7, 7), (5, 9), (3, 6), (1, 41)):
        resized = resize_bias_table(own, h, w)
        assert torch.equal(resized[-3:], own[-3:])                      # the class token's
        new = resized[:-3].view(2 * h - 1, 2 * w - 1, 2)
        assert torch.allclose(new[h - 1, w - 1], old[3, 3], atol=1e-5)  # distance 0 stays 0
        if h > 1:
            assert torch.allclose(new[h, w - 2], old[4, 2], atol=1e-5)  # and 1 stays 1
        if h >= 4:                                          # the farthest the farthest
            corners = [0, 0, -1], [0, -1, -1]
            assert torch.allclose(new[corners], old[corners], atol=1e-4)


def test_interpolated_bias_is_in_fp32_under_autocast():
    table = torch.randn(7 * 7 + 3, 2, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_bias_table(table, 3, 5)
    assert torch.equal(found, resize_bias_table(table, 3, 5))


def test_places_of_old_offsets_are_a_geometric_sequence():
    """From 4 patches to 9: 3 offsets a side that end at 8: 1, 1 + q, 1 + q + q², so q² + q = 7."""
    q = (29 ** 0.5 - 1) / 2
    weights = offset_weights(4, 9)                                              # of targets −8…8
    places = [0, 1, 1 + q, 1 + q + q * q]
    for target, old in ((0, 0), (1, 1), (8, 3)):
        assert target == pytest.approx(places[old])
        assert weights[8 + target, 3 + old] == pytest.approx(1, abs=1e-5)
    inside = (2 - 1) / q                                    # 2 lies between 1 and 1 + q
    assert weights[10, 4:6].tolist() == pytest.approx([1 - inside, inside], abs=1e-5)
    assert np.allclose(weights.sum(1), 1)
    assert np.array_equal(weights, weights[::-1, ::-1])
    assert np.array_equal(offset_weights(4, 2), np.eye(7)[2:5])         # smaller: the far ones go


# ------------------------------------------------------------------------------------------------
# Absolute positions

def test_sine_cosine_positions():
    """MoCo v3's: the first half of the channels tells the patch's row, the second its column."""
    grid, dim = 3, 16
    positions = sincos_positions(grid, dim)
    assert positions.shape == (1, 10, dim)
    assert (positions[0, 0] == 0).all()
    for patch in range(grid * grid):
        row, column = divmod(patch, grid)
        for i in range(dim // 4):
            omega = 1 / 10000 ** (i / (dim // 4))
            expected = [math.sin(row * omega), math.cos(row * omega),
                        math.sin(column * omega), math.cos(column * omega)]
            assert np.allclose(positions[0, 1 + patch, i::dim // 4], expected, atol=1e-6)


def test_resized_positions_keep_rows_and_class_token():
    rows = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    resized = resize_positions(torch.cat([torch.full((1, 1, 1), -9.0), rows], 1), 3, 5)
    assert resized.shape == (1, 16, 1)
    assert resized[0, 0] == -9
    grid = resized[0, 1:, 0].view(3, 5)
    assert torch.allclose(grid, grid[:, :1].expand(3, 5), atol=1e-5)    # constant along a row
    assert (grid[1:] > grid[:-1]).all()


def test_learned_positions_of_another_size_are_trained():
    vit = tiny_vit(positions="learned", classes=3).train()
    vit(pixels(1, 3, 12, 20)).sum().backward()
    assert (vit.pos_embed.grad[0].abs().amax(1) > 0).all()


def test_parameters_in_pre_training():
    """The second figure is that of BEiT's published log."""
    for positions, layer_scale, parameters in (("learned", 0.0, 92_089_856),
                                               ("shared", 0.1, 91_965_776)):
        with torch.device("meta"):
            vit = VisionTransformer(**model.SIZES["base"], positions=positions,
                                    layer_scale=layer_scale, codes=8192)
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
    assert pyramid.layers == [1, 2, 3, 4]
    assert [tuple(f.shape) for f in pyramid(pixels(2, 3, 12, 22))] == [
        (2, 32, 12, 24), (2, 32, 6, 12), (2, 32, 3, 6), (2, 32, 2, 3)]
    assert ViTPyramid(tiny_vit(depth=12)).layers == [4, 6, 8, 12]
    images = pixels(1, 3, 16, 16)
    third, fourth = pyramid.vit.features(images, [3, 4])
    assert torch.equal(pyramid(images)[2], third)
    assert torch.equal(pyramid(images)[3], F.max_pool2d(fourth, 2))


# ------------------------------------------------------------------------------------------------
# In training

@pytest.mark.parametrize("positions", ["learned", "shared", "block"])
def test_activation_checkpointing_gives_the_same_gradients(positions):
    vit = tiny_vit(positions=positions, classes=3).train()
    x = pixels(2, 3, 16, 16)
    gradients = []
    for vit.checkpoint_activations in (False, True):
        vit.zero_grad()
        vit(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in vit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.abs().sum() > 0 for g in gradients[0])


def test_drop_path_rises_to_the_last_block():
    vit = VisionTransformer(16, 4, dim=32, depth=3, heads=2, drop_path=0.2)
    assert [block.drop_path.p for block in vit.blocks] == [0.0, 0.1, 0.2]


def test_initial_weights_shrink_with_depth():
    torch.manual_seed(0)
    vit = VisionTransformer(16, 4, dim=64, depth=4, heads=2, codes=10)
    std = 0.5397 * 0.02                 # of a normal distribution cut off at its own σ = 0.02
    for i, block in enumerate(vit.blocks, 1):
        assert math.isclose(block.attn.qkv.weight.std().item(), std, rel_tol=0.05)
        assert block.attn.qkv.weight.abs().max() <= 0.02
        for layer in (block.attn.proj, block.mlp.fc2):
            expected = std / math.sqrt(2 * i)
            assert math.isclose(layer.weight.std().item(), expected, rel_tol=0.05)


def test_initial_weights_outside_pre_training():
    """Cut off at ±2 and not at σ; the patch projection is PyTorch's; the classifier is small."""
    torch.manual_seed(0)
    vit = VisionTransformer(16, 4, dim=64, depth=2, heads=2, positions="learned", classes=10)
    for weight in (vit.pos_embed, vit.blocks[1].attn.qkv.weight):
        assert math.isclose(weight.std().item(), 0.02, rel_tol=0.1)
        assert weight.abs().max() > 0.04
    bound = 1 / math.sqrt(3 * 4 * 4)                        # nn.Conv2d's uniform draw
    assert 0.9 * bound < vit.patch_embed.proj.weight.abs().max() <= bound
    assert vit.head.weight.std() < 1e-4


@pytest.mark.parametrize("positions", ["learned", "block"])
def test_param_groups_by_hand(positions):
    vit = VisionTransformer(16, 4, dim=32, depth=4, heads=2, positions=positions, classes=3)
    groups = param_groups(vit, 0.05, 0.5)
    found = {}
    for group in groups:
        for name, _ in group["params"]:
            found[name] = (group["lr_scale"], group["weight_decay"])
    assert sum(len(group["params"]) for group in groups) == len(found)      # each once
    assert set(found) == {name for name, _ in vit.named_parameters()}
    scales = {"cls_token": 1 / 32, "pos_embed": 1 / 32, "patch_embed": 1 / 32,
              "blocks.0": 1 / 16, "blocks.1": 1 / 8, "blocks.2": 1 / 4,
              "blocks.3": 1 / 2, "fc_norm": 1.0, "head": 1.0}
    decayed = ("patch_embed.proj.weight", "qkv.weight", "attn.proj.weight", "fc1.weight",
               "fc2.weight", "head.weight", "relative_position_bias_table")
    for name, (scale, decay) in found.items():
        prefix = next(p for p in scales if name.startswith(p))
        assert (name, scale) == (name, scales[prefix])
        assert (name, decay) == (name, 0.05 if name.endswith(decayed) else 0.0)


@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_what_blocks_add_to_is_in_fp32_under_autocast(layer_scale):
    vit = tiny_vit(positions="block", layer_scale=layer_scale)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = vit.tokens(pixels(1, 3, 16, 16), [1, 2])
    assert first.dtype == second.dtype == torch.float32


# ------------------------------------------------------------------------------------------------
# timm's networks, by their weights' names

@pytest.mark.parametrize("positions", ["learned", "block", "shared"])
def test_our_vit_is_timms_beit(positions):
    pytest.importorskip("timm", reason="timm, an independent BEiT, is not installed")
    from timm.models.beit import Beit
    layer_scale = 0.0 if positions == "learned" else 0.1
    arguments = dict(dim=64, depth=2, heads=2, positions=positions, layer_scale=layer_scale,
                     classes=7)
    ours = randomize(VisionTransformer(32, 4, **arguments)).eval()
    theirs = Beit(
        img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=2,
        init_values=layer_scale or None, num_classes=7, use_abs_pos_emb=positions == "learned",
        use_rel_pos_bias=positions == "block",
        use_shared_rel_pos_bias=positions == "shared").eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = pixels(2, 3, 32, 32)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    # and back: a fresh one of ours takes timm's file
    fresh = VisionTransformer(32, 4, **arguments).eval()
    load_backbone(fresh, randomize(theirs, seed=1).state_dict())
    assert torch.allclose(fresh(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_our_plain_vit_is_timms():
    pytest.importorskip("timm", reason="timm, an independent ViT, is not installed")
    from timm.models.vision_transformer import VisionTransformer as Theirs
    plain = dict(positions="absolute", layer_scale=0.0)
    ours = tiny_vit(image_size=32, **plain, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    size = dict(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    theirs = Theirs(**size, num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = pixels(2, 3, 32, 32)
    mean, std = statistics()
    tokens = theirs.forward_features(((x + 1) / 2 - mean) / std)
    assert torch.allclose(ours(x), tokens, atol=1e-5, rtol=1e-5)
    # classified by the patches' mean
    classifier = tiny_vit(image_size=32, **plain, classes=3)
    theirs = Theirs(**size, num_classes=3, global_pool="avg", fc_norm=True).eval()
    theirs.load_state_dict(classifier.state_dict(), strict=True)
    assert torch.allclose(classifier(x), theirs(x), atol=1e-5, rtol=1e-5)
