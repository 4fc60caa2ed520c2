"""The equations of model.py against plain loops, and its ViT against timm's."""
import copy
import math
import random
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from model import (IMAGENET_MEAN, IMAGENET_STD, PerceptualLoss, Quantizer, RelativePositionBias,
                   VisionTransformer, ViTPyramid, VQTokenizer, block_mask, load_backbone, offset_weights, param_groups, position_bias,
                   relative_position_index, resize_bias_table, resize_positions, sincos_positions)
from tokenizer import PatchDiscriminator


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomize(module, seed=0):
    """Every parameter away from its initial zeros and ones, so that each one matters."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def tiny_vit(**changes):
    arguments = dict(image_size=16, patch_size=4, dim=32, depth=2, heads=2)
    return randomize(VisionTransformer(**{**arguments, **changes})).eval()


def pixels(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed)) * 2 - 1


# ------------------------------------------------------------------------------------------------
# Vector quantization

def quantizer(size=6, dim=3, decay=0.9, revive=0.0, seed=0):
    q = Quantizer(size, dim, decay, revive).double()
    q.codebook.copy_(torch.randn(size, dim, generator=seeded(seed)))
    q.count.copy_(torch.rand(size, generator=seeded(seed + 1)) + 0.5)
    q.sum.copy_(q.codebook * q.count[:, None])
    return q


def vectors(batch, dim, height, width, seed=2):
    return torch.randn(batch, dim, height, width, generator=seeded(seed)).double()


def plain_nearest(z, codebook):
    """Index of the nearest code for each row, by loops."""
    best = []
    for row in z:
        distances = [sum((a - b) ** 2 for a, b in zip(row, code)) for code in codebook]
        best.append(distances.index(min(distances)))
    return best


def rows_of(z_e):
    """(B, D, h, w) → B·h·w rows, by loops."""
    return [[float(z_e[b, d, y, x]) for d in range(z_e.shape[1])]
            for b in range(z_e.shape[0]) for y in range(z_e.shape[2]) for x in range(z_e.shape[3])]


def test_nearest_neighbour():
    q, z = quantizer(), vectors(2, 3, 3, 4)
    rows = torch.tensor(rows_of(z), dtype=torch.float64)
    assert q.nearest(rows).tolist() == plain_nearest(rows_of(z), q.codebook.tolist())
    z_q, codes, _ = q(z)
    assert codes.shape == (2, 3, 4) and codes.flatten().tolist() == plain_nearest(rows_of(z), q.codebook.tolist())
    assert torch.allclose(z_q, q.codebook[codes].permute(0, 3, 1, 2))


@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 9000])
def test_nearest_neighbour_is_the_same_in_blocks(rows):
    q, z = quantizer(size=40, dim=5), torch.randn(rows, 5, generator=seeded(3)).double()
    distances = (z[:, None] - q.codebook).square().sum(2)           # the full matrix
    assert torch.equal(q.nearest(z), distances.argmin(1))


def test_ema_update_against_a_plain_loop():
    q = quantizer()
    count, total = q.count.tolist(), q.sum.tolist()
    for step in range(2):
        codebook, seen = q.codebook.tolist(), []
        for micro_batch in range(2):
            z = vectors(2, 3, 2, 2, seed=10 * step + micro_batch)
            q(z)
            seen += rows_of(z)
        q.update(seeded())
        codes = plain_nearest(seen, codebook)
        for k in range(6):
            own = [row for row, code in zip(seen, codes) if code == k]
            count[k] = 0.9 * count[k] + 0.1 * len(own)
            total[k] = [0.9 * total[k][d] + 0.1 * sum(row[d] for row in own) for d in range(3)]
        assert torch.allclose(q.count, torch.tensor(count, dtype=torch.float64), rtol=1e-12)
        assert torch.allclose(q.sum, torch.tensor(total, dtype=torch.float64), rtol=1e-12)
        expected = [[value / count[k] for value in total[k]] for k in range(6)]
        assert torch.allclose(q.codebook, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)
        assert q.gathered == []


def test_evaluation_leaves_the_codebook_alone():
    q = quantizer().eval()
    q(vectors(2, 3, 2, 2))
    assert q.gathered == []


def with_a_dead_code(revive):
    q = quantizer(size=4, dim=2, decay=0.5, revive=revive)
    q.codebook[3] = 1000.0                                 # nothing is near it
    q.count.copy_(torch.tensor([8.0, 8.0, 8.0, 0.01]))
    q.sum.copy_(q.codebook * q.count[:, None])
    return q


def test_a_dead_code_starts_anew_with_its_statistics():
    q, never, z = with_a_dead_code(0.1), with_a_dead_code(0.0), vectors(4, 2, 3, 3)
    for each in (q, never):
        each(z)
        each.update(seeded())
    rows = torch.tensor(rows_of(z), dtype=torch.float64)
    assert (rows - q.codebook[3]).abs().amax(1).min() < 1e-12
    assert torch.allclose(q.sum[3], q.codebook[3] * q.count[3], rtol=1e-12)     # else the next update moves it back
    assert torch.equal(q.codebook[:3], never.codebook[:3]) and torch.equal(q.count[:3], never.count[:3])
    assert (never.codebook[3] == 1000).all()
    q(z)
    used = int((q.gathered[0][1] == 3).sum())
    q.update(seeded())
    assert used > 0 and q.codebook[3].abs().max() < 10


def test_a_code_out_of_use_stays_where_it_is_without_revival():
    q, z = Quantizer(size=4, dim=2, decay=0.5, revive=0.0), vectors(4, 2, 3, 3).float()
    q.codebook[3], q.count[:] = torch.tensor([800.0, -300.0]), 8.0                          # nothing is near it
    q.sum.copy_(q.codebook * q.count[:, None])
    for _ in range(200):                                    # its count is 0 in float32 after 153
        q(z)
        q.update(seeded())
    assert q.count[3] == 0 and torch.allclose(q.codebook[3], torch.tensor([800.0, -300.0])) and q.codebook.isfinite().all()


def test_revival_is_deterministic_by_its_generator():
    revived = []
    for seed in (0, 0, 1):
        q = with_a_dead_code(0.1)
        q(vectors(8, 2, 8, 8))
        q.update(seeded(seed))
        revived.append(q.codebook[3].tolist())
    assert revived[0] == revived[1] != revived[2]


@pytest.mark.parametrize("batch", [4, 400])
def test_a_revived_code_counts_as_alive(batch):
    """Else it is replaced at each step again, before it can learn anything."""
    q = quantizer(size=4, dim=2, decay=0.99, revive=0.01)
    q.codebook[3] = 1000.0
    z = vectors(batch, 2, 8, 8)
    q.count.copy_(torch.tensor([1.0, 1.0, 1.0, 0.0]) * batch * 64 / 3)
    q.sum.copy_(q.codebook * q.count[:, None])
    q(z)
    q.update(seeded())
    assert q.codebook[3].abs().max() < 10                           # revived
    assert q.count[3] >= q.revive * q.count.mean()


def test_the_codebook_begins_as_vectors_of_the_batch():
    books = []
    for seed in (0, 0, 1):
        q, seen = Quantizer(5, 3).double(), []
        for micro_batch in range(2):
            z = vectors(2, 3, 4, 4, seed=micro_batch)
            q(z)
            seen += rows_of(z)
        q.initialize(seeded(seed))
        assert all(code in seen for code in q.codebook.tolist()) and len(q.codebook.unique(dim=0)) == 5
        assert q.count.tolist() == [64 / 5] * 5
        assert torch.allclose(q.sum, q.codebook * 64 / 5, rtol=1e-12) and q.gathered == []
        books.append(q.codebook.tolist())
    assert books[0] == books[1] != books[2]


def test_straight_through_gradient():
    """∂f(z_q)/∂z_e = f′(z_q)."""
    q, target = quantizer(), vectors(2, 3, 2, 2, seed=5)

    def f(z):
        return ((z - target) ** 3).sum()

    z_e = vectors(2, 3, 2, 2).requires_grad_()
    z_q, codes, _ = q(z_e)
    f(z_q).backward()
    leaf = q.lookup(codes).clone().requires_grad_()
    f(leaf).backward()
    assert torch.allclose(z_e.grad, leaf.grad, rtol=1e-12)
    assert not torch.allclose(z_q, z_e, atol=0.1)          # the quantization did something


def test_commitment_pulls_the_encoder_only():
    q, z_e = quantizer(), vectors(2, 3, 2, 2).requires_grad_()
    _, codes, commitment = q(z_e)
    e = q.lookup(codes)
    assert math.isclose(commitment.item(), (z_e - e).square().mean().item(), rel_tol=1e-12)
    commitment.backward()
    assert torch.allclose(z_e.grad, 2 * (z_e.detach() - e) / z_e.numel(), rtol=1e-12)
    assert list(q.parameters()) == [] and q.codebook.grad is None and not e.requires_grad


def test_the_quantizer_stays_in_fp32_under_autocast():
    q = Quantizer(512, 16).eval()
    q.codebook.copy_(torch.randn(512, 16, generator=seeded()) * 0.05 + 1)
    z = torch.randn(2, 16, 16, 16, generator=seeded(1)) * 0.05 + 1
    z_q, codes, commitment = q(z)
    with torch.autocast("cpu", torch.bfloat16):
        z_q16, codes16, commitment16 = q(z)
        naive = (q.codebook.square().sum(1) - 2 * z.permute(0, 2, 3, 1).flatten(0, 2) @ q.codebook.T).argmin(1)
    assert torch.equal(codes, codes16) and torch.equal(z_q, z_q16) and commitment == commitment16
    assert z_q16.dtype == torch.float32
    assert not torch.equal(naive, codes.flatten())          # bf16 products do find other neighbours


# ------------------------------------------------------------------------------------------------
# Tokenizer

@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    t = VQTokenizer(16, channels=(16, 32, 32), codebook_size=64, code_dim=8)
    t.quantizer(t.encoder(pixels(8, 3, 16, 16, seed=1)))
    t.quantizer.initialize(seeded())
    return t.eval()


def test_tokenizer_shapes_at_any_size(tokenizer):
    x = pixels(2, 3, 24, 24)
    x_hat, codes, commitment = tokenizer(x)
    assert tokenizer.stride == 4 and x_hat.shape == x.shape and codes.shape == (2, 6, 6) and commitment.ndim == 0
    assert len(codes.unique()) > 1


def test_decoded_codes_are_the_reconstruction(tokenizer):
    x = pixels(2, 3, 16, 16)
    x_hat, codes, _ = tokenizer(x)
    assert torch.equal(tokenizer.encode(x), codes)
    assert torch.allclose(tokenizer.decode(codes), x_hat, atol=1e-5)


@pytest.mark.parametrize("grid", [3, 4, 7])
def test_encode_at_another_grid(tokenizer, grid):
    x = pixels(2, 3, 16, 16)
    codes = tokenizer.encode(x, grid)
    assert codes.shape == (2, grid, grid)
    resized = F.interpolate(x, (4 * grid, 4 * grid), mode="bicubic", antialias=True) if grid != 4 else x
    assert torch.equal(codes, tokenizer(resized)[1])


def test_encode_quantizes_in_fp32_under_autocast(tokenizer):
    x = pixels(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        z_e, codes = tokenizer.encoder(x), tokenizer.encode(x)
    assert z_e.dtype == torch.bfloat16
    assert torch.equal(codes.flatten(), tokenizer.quantizer.nearest(z_e.float().permute(0, 2, 3, 1).flatten(0, 2)))


def test_tokenizer_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="image size 18 .* stride 4"):
        VQTokenizer(18, channels=(16, 16, 16))
    with pytest.raises(ValueError, match=r"\[16, 20\].*multiples of 16"):
        VQTokenizer(16, channels=(16, 20))


def test_discriminator_judges_patches():
    assert PatchDiscriminator(16)(pixels(2, 3, 32, 32)).shape == (2, 1, 3, 3)


# ------------------------------------------------------------------------------------------------
# Perceptual loss

def plain_perceptual(maps, maps_hat):
    """Σ_l 1/(C H W) ‖f̂ − f̂′‖², averaged over images; lists of (B, C, H, W), not yet normalised."""
    def normalised(column):
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        return [(value - mean) / math.sqrt(variance + 1e-5) for value in column]

    total, images = 0.0, len(maps[0])
    for f, g in zip(maps, maps_hat):
        _, channels, height, width = f.shape
        for b in range(images):
            for y in range(height):
                for x in range(width):
                    one, other = normalised(f[b, :, y, x].tolist()), normalised(g[b, :, y, x].tolist())
                    total += sum((p - q) ** 2 for p, q in zip(one, other)) / (channels * height * width)
    return total / images


def test_perceptual_loss_against_a_plain_loop():
    network = tiny_vit(depth=4, positions="absolute", layer_scale=0.0)
    loss = PerceptualLoss(network, layers=[1, 3])
    x, x_hat = pixels(2, 3, 16, 16), pixels(2, 3, 16, 16, seed=1)
    maps = []
    for images in (x, x_hat):                              # through the blocks by hand
        tokens = network.patch_embed(((images + 1) / 2 - network.mean) / network.std)
        tokens = torch.cat([network.cls_token.expand(2, -1, -1), tokens], 1) + network.pos_embed
        after = []
        for block in network.blocks:
            tokens = block(tokens)
            after.append(tokens[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4))
        maps.append([after[0], after[2]])
    assert math.isclose(loss(x, x_hat).item(), plain_perceptual(*maps), rel_tol=1e-4)
    assert loss(x, x.clone()).item() == 0


def test_perceptual_gradient_reaches_the_reconstruction_only():
    loss = PerceptualLoss(tiny_vit(positions="absolute"), [1, 2]).train()
    x, x_hat = pixels(2, 3, 16, 16).requires_grad_(), pixels(2, 3, 16, 16, seed=1).requires_grad_()
    loss(x, x_hat).backward()
    assert x.grad is None and x_hat.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())
    assert not loss.network.training                       # frozen for good


def test_perceptual_input_is_normalised_and_resized_inside():
    network = tiny_vit(positions="absolute", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    loss, seen = PerceptualLoss(network, [1]), []
    network.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = pixels(1, 3, 16, 16)
    loss.features(x)
    for channel in range(3):
        expected = ((x[0, channel] + 1) / 2 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        assert torch.allclose(seen[0][0, channel], expected, atol=1e-6)
    assert [f.shape for f in loss.features(pixels(1, 3, 24, 24))] == [(1, 32, 4, 4)]


def test_perceptual_layers_default_to_the_quarters():
    assert PerceptualLoss(tiny_vit(depth=12)).layers == [3, 6, 9, 12]       # the paper's
    assert PerceptualLoss(tiny_vit(depth=4)).layers == [1, 2, 3, 4]
    for layers in ([0], [1, 3]):
        with pytest.raises(ValueError, match=r"layers 1 to 2"):
            PerceptualLoss(tiny_vit(depth=2), layers)


@pytest.mark.parametrize("name, layers, shapes", [
    ("vgg16", None, [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)]),
    ("vgg16", [2, 4], [(128, 16), (512, 4)]),
    ("resnet50", None, [(256, 8), (512, 4), (1024, 2), (2048, 1)]),
])
def test_perceptual_convnets(name, layers, shapes):
    with torch.device("meta"):                             # the initial draw of VGG's 138 million weights takes seconds
        network = getattr(torchvision.models, name)()
    if name == "vgg16":
        network.classifier = torch.nn.Identity()
    network.to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data.zero_()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, generator=seeded())
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.ones_(module.running_var)
    loss, seen = PerceptualLoss(network, layers).train(), []
    loss.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, x_hat = pixels(1, 3, 32, 32), pixels(1, 3, 32, 32, seed=1).requires_grad_()
    assert [(f.shape[1], f.shape[2]) for f in loss.features(x)] == shapes
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.allclose(seen[0], ((x + 1) / 2 - mean) / std, atol=1e-6)
    assert all(f.min() >= 0 for f in loss.network(x).values())      # after the activation
    assert loss(x, x.clone()).item() == 0
    value = loss(x, x_hat)
    value.backward()
    assert value.item() > 0 and x_hat.grad.abs().sum() > 0
    assert all(b.sum() == 0 for n, b in loss.network.named_buffers() if n.endswith("running_mean"))


# ------------------------------------------------------------------------------------------------
# Block-wise masking

def reference_mask(grid, count, min_block=16):
    """BEiT's algorithm 1, restated on a set of patches: blocks of s patches, s between 16 and what is left to
    mask (less than 16 at the end), and aspect ratio r from [0.3, 1/0.3]; it gives up after 10 draws in a row
    that do not fit."""
    masked = set()
    while len(masked) < count:
        left = count - len(masked)
        for _ in range(10):
            s = random.uniform(min_block, left)
            r = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            a, b = round(math.sqrt(s * r)), round(math.sqrt(s / r))
            if a < grid and b < grid:
                t, l = random.randint(0, grid - a), random.randint(0, grid - b)
                new = {(i, j) for i in range(t, t + a) for j in range(l, l + b)} - masked
                if 1 <= len(new) <= left:
                    masked |= new
                    break
        else:
            return masked
    return masked


@pytest.mark.parametrize("grid, count, min_block", [
    (14, 75, 16), (16, 102, 16), (8, 25, 4), (8, 26, 4), (4, 6, 4), (14, 10, 16), (8, 64, 4), (8, 0, 4), (3, 4, 16)])
def test_every_mask_has_the_same_count(grid, count, min_block):
    random.seed(0)
    for _ in range(200):
        mask = block_mask(grid, count, min_block)
        assert mask.shape == (grid, grid) and mask.dtype == torch.bool and int(mask.sum()) == count


def test_masks_are_deterministic_by_seed():
    masks = []
    for seed in (1, 1, 2):
        random.seed(seed)
        masks.append(block_mask(14, 75))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def frequency(masks):
    """How often each patch is masked; averaged over the square's eight symmetries, which cuts the noise."""
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
    assert 62 <= counts.min() <= 68 and counts.max() == 75
    assert abs(counts.mean() - 74.5) < 0.1 and 0.28 < (counts < 75).mean() < 0.36
    ours = np.stack([block_mask(14, 75).numpy() for _ in range(2000)])
    difference = frequency(ours) - frequency(reference)
    assert np.abs(difference).max() < 0.03
    assert abs(difference.mean() - 0.5 / 196) < 0.001       # the half patch that is filled up
    centre, corner = frequency(ours)[7, 7], frequency(ours)[0, 0]
    assert centre > corner + 0.2                            # as blocks have it


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
    assert 180 < complete < 240                             # no more than a third are filled up at all


def test_masked_patches_have_masked_neighbours():
    random.seed(0)
    alone = 0
    for _ in range(200):
        m = F.pad(block_mask(14, 75).float(), (1, 1, 1, 1))
        neighbours = m[:-2, 1:-1] + m[2:, 1:-1] + m[1:-1, :-2] + m[1:-1, 2:]
        alone += int(((m[1:-1, 1:-1] == 1) & (neighbours == 0)).sum())
    assert alone / (200 * 75) < 1e-3


def test_blocks_are_rectangles_of_legal_size_and_aspect():
    """Of 20 patches the first block takes 16 or more (to whole patches): it must be there in one piece."""
    legal = {(round(math.sqrt(s * r)), round(math.sqrt(s / r)))
             for s in np.linspace(16, 20, 41) for r in np.geomspace(0.3, 1 / 0.3, 201)}
    legal = sorted((shape for shape in legal if math.prod(shape) <= 20), key=math.prod, reverse=True)
    random.seed(0)
    seen = set()
    for _ in range(200):
        mask = block_mask(14, 20, 16).numpy()
        whole = (shape for shape in legal if np.lib.stride_tricks.sliding_window_view(mask, shape).all((2, 3)).any())
        seen.add(next(whole, None))
    assert None not in seen
    assert {(4, 4), (4, 5), (5, 4)} <= seen and any(h > 2 * w for h, w in seen) and any(w > 2 * h for h, w in seen)


# ------------------------------------------------------------------------------------------------
# Relative positions

def test_relative_position_index_against_a_double_loop():
    grid = 3
    index, side = relative_position_index(grid, grid), 2 * grid - 1
    for i in range(grid * grid):
        for j in range(grid * grid):
            dy, dx = i // grid - j // grid, i % grid - j % grid
            assert index[1 + i, 1 + j] == (dy + grid - 1) * side + dx + grid - 1
    # the class token's three rows follow: to patches, from patches, to itself
    assert (index[0, 1:] == side ** 2).all() and (index[1:, 0] == side ** 2 + 1).all() and index[0, 0] == side ** 2 + 2


def test_relative_position_bias_looks_up_the_table():
    bias = RelativePositionBias(3, 2)
    torch.nn.init.normal_(bias.relative_position_bias_table, generator=seeded())
    index = relative_position_index(3, 3)
    out = bias(3, 3, index)
    assert out.shape == (1, 2, 10, 10)
    for head in range(2):
        for i in range(10):
            for j in range(10):
                assert out[0, head, i, j] == bias.relative_position_bias_table[index[i, j], head]


def table(grid, heads=2):
    return torch.randn((2 * grid - 1) ** 2 + 3, heads, generator=seeded())


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_fused_attention_can_take_the_bias(size, monkeypatch):
    """A GPU's fused kernels refuse a mask whose last dimension is not the closest in memory, or of another dtype."""
    seen, plain = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: seen.append((q, attn_mask)) or plain(q, k, v, attn_mask))
    for positions in ("shared", "block"):
        with torch.autocast("cpu", torch.bfloat16):
            tiny_vit(positions=positions)(pixels(2, 3, *size))
    assert len(seen) >= 4 and all(bias.stride(-1) == 1 and bias.dtype == q.dtype == torch.bfloat16 for q, bias in seen)


def test_another_image_size_compiles():
    """Without the search for its positions, which takes Dynamo minutes to trace."""
    model, images, begun = tiny_vit().eval(), pixels(1, 3, 64, 96), time.time()
    assert torch.allclose(torch.compile(model, backend="eager")(images), model(images), atol=1e-6)
    assert time.time() - begun < 40


def test_position_bias_interpolation():
    own = table(4)
    assert torch.equal(resize_bias_table(own, 4, 4), own)                                   # the same size
    for h, w in ((3, 3), (7, 7), (5, 9), (3, 6), (6, 2), (1, 41)):
        rows = (2 * h - 1) * (2 * w - 1) + 3
        resized = resize_bias_table(own, h, w)
        assert resized.shape == (rows, 2) and torch.equal(resized[-3:], own[-3:])           # the class token's
        constant = resize_bias_table(torch.full_like(own, 0.7), h, w)
        assert torch.allclose(constant, torch.full_like(constant, 0.7), atol=1e-6)
        symmetric = torch.cat([own[:-3] + own[:-3].flip(0), own[-3:]])                      # (dy, dx) as (−dy, −dx)
        resized = resize_bias_table(symmetric, h, w)[:-3]
        assert torch.allclose(resized, resized.flip(0), atol=1e-5)
        old = own[:-3].view(7, 7, 2)
        new = resize_bias_table(own, h, w)[:-3].view(2 * h - 1, 2 * w - 1, 2)
        assert torch.allclose(new[h - 1, w - 1], old[3, 3], atol=1e-5)                      # distance 0 stays distance 0
        if h > 1 and w > 1:
            assert torch.allclose(new[h:h + 1, w - 2], old[4:5, 2], atol=1e-5)              # and 1 stays 1
        if h >= 4 and w >= 4:                                                               # the farthest the farthest
            assert torch.allclose(new[[0, 0, -1], [0, -1, -1]], old[[0, 0, -1], [0, -1, -1]], atol=1e-4)


def test_places_of_old_offsets_are_a_geometric_sequence():
    """From 4 patches to 9: 3 offsets a side that end at 8: 1, 1 + q, 1 + q + q², so q² + q = 7."""
    q = (29 ** 0.5 - 1) / 2
    weights = offset_weights(4, 9)                                                          # of targets −8…8
    for target, place in ((0, 0), (1, 1), (8, 1 + q + q * q)):
        old = [0, 1, 1 + q, 1 + q + q * q].index(place)
        assert weights[8 + target, 3 + old] == pytest.approx(1, abs=1e-5)
    inside = (2 - 1) / q                                                                    # 2 lies between 1 and 1 + q
    assert weights[10, 4:6].tolist() == pytest.approx([1 - inside, inside], abs=1e-5)
    assert torch.allclose(weights.sum(1), torch.ones(17)) and torch.equal(weights, weights.flip(0, 1))
    assert torch.equal(offset_weights(4, 2), torch.eye(7)[2:5])                             # smaller: the far ones go


@pytest.mark.parametrize("positions", ["shared", "block", "absolute"])
def test_images_of_any_size(positions):
    """Positions interpolated; whole patches by padding with grey, which is 0."""
    model = tiny_vit(positions=positions)
    images = pixels(2, 3, 13, 22)
    features = model.features(images, [1, 2])
    assert [f.shape for f in features] == [(2, 32, 4, 6)] * 2
    padded = F.pad(images, (0, 2, 0, 3))
    assert torch.equal(model.features(padded, [2])[0], features[1])


def test_pyramid_of_a_vit():
    """Strides p/4 to 2p, after blocks 4, 6, 8 and 12 of 12 and in that proportion."""
    pyramid = ViTPyramid(tiny_vit(depth=4))
    assert pyramid.layers == [1, 2, 3, 4]
    assert [tuple(f.shape) for f in pyramid(pixels(2, 3, 12, 22))] == [(2, 32, 12, 24), (2, 32, 6, 12), (2, 32, 3, 6), (2, 32, 2, 3)]
    assert ViTPyramid(tiny_vit(depth=12)).layers == [4, 6, 8, 12] and ViTPyramid(tiny_vit(depth=24)).layers == [8, 12, 16, 24]
    images = pixels(1, 3, 16, 16)
    third, fourth = pyramid.vit.features(images, [3, 4])
    assert torch.equal(pyramid(images)[2], third) and torch.equal(pyramid(images)[3], F.max_pool2d(fourth, 2))


@pytest.mark.parametrize("positions", ["shared", "block"])
def test_interpolated_bias_keeps_its_axes(positions):
    """A bias that depends on the row's distance alone still does on a grid of another shape."""
    model = tiny_vit(positions=positions)
    own = (model.rel_pos_bias if positions == "shared" else model.blocks[0].attn).relative_position_bias_table
    side = 2 * model.grid - 1
    with torch.no_grad():
        own[:-3] = torch.arange(side).repeat_interleave(side)[:, None].float()
    bias = position_bias(own, 3, 6, relative_position_index(3, 6))
    bias = bias[0, 0, 1:, 1:].view(3, 6, 3, 6)                                              # query row, column; key row, column
    assert torch.allclose(bias, bias[:, :1, :, :1].expand_as(bias), atol=1e-5)
    rows = bias[:, 0, :, 0]
    assert (rows[1:] > rows[:-1]).all() and (rows[:, 1:] < rows[:, :-1]).all()


def test_sine_cosine_positions():
    """MoCo v3's: the first half of the channels tells the patch's row, the second its column."""
    grid, dim = 3, 16
    positions = sincos_positions(grid, dim)
    assert positions.shape == (1, 10, dim) and (positions[0, 0] == 0).all()
    for patch in range(grid * grid):
        row, column = divmod(patch, grid)
        for i in range(dim // 4):
            omega = 1 / 10000 ** (i / (dim // 4))
            expected = [math.sin(row * omega), math.cos(row * omega), math.sin(column * omega), math.cos(column * omega)]
            assert np.allclose(positions[0, 1 + patch, i::dim // 4], expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# Loading for another task

def test_backbone_of_pretraining_loads_for_fine_tuning():
    """The shared position bias goes into every block, the head stays as initialised."""
    source, target = tiny_vit(codes=8), tiny_vit(positions="block", classes=3)
    before = copy.deepcopy(target.state_dict())
    missing = load_backbone(target, source.state_dict())
    assert set(missing) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    given, state = source.state_dict(), target.state_dict()
    shared = given["rel_pos_bias.relative_position_bias_table"]
    for key in state:
        if key.startswith(("head", "fc_norm")):
            assert torch.equal(state[key], before[key])
        elif key.endswith("relative_position_bias_table"):
            assert torch.equal(state[key], shared)
        else:
            assert torch.equal(state[key], given[key])
    # the same function: its tokens are those of pre-training
    x = pixels(2, 3, 16, 16)
    assert torch.allclose(target.tokens(x, [2])[0], source.tokens(x, [2])[0], atol=1e-5)


def test_backbone_loads_at_another_image_size():
    source, target = tiny_vit(codes=8), tiny_vit(image_size=32, positions="block", classes=3)
    load_backbone(target, source.state_dict())
    own = target.blocks[1].attn.relative_position_bias_table
    assert torch.equal(own, resize_bias_table(source.rel_pos_bias.relative_position_bias_table, 8, 8))
    assert target(pixels(2, 3, 32, 32)).shape == (2, 3)


def test_position_embedding_is_interpolated_to_another_image_size():
    source, target = tiny_vit(positions="absolute"), tiny_vit(image_size=32, positions="absolute", classes=3)
    load_backbone(target, source.state_dict())
    assert torch.equal(target.pos_embed, resize_positions(source.pos_embed, 8, 8))
    assert torch.equal(target.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    # rows stay rows: what is constant along a row still is
    rows = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    resized = resize_positions(torch.cat([torch.full((1, 1, 1), -9.0), rows], 1), 3, 5)
    assert resized.shape == (1, 16, 1) and resized[0, 0] == -9
    grid = resized[0, 1:, 0].view(3, 5)
    assert torch.allclose(grid, grid[:, :1].expand(3, 5), atol=1e-5) and (grid[1:] > grid[:-1]).all()


def test_classifier_of_the_same_classes_is_kept():
    source = tiny_vit(positions="block", classes=3)
    for classes, kept in ((3, True), (4, False)):
        target = tiny_vit(positions="block", classes=classes)
        randomize(target, seed=1)
        load_backbone(target, source.state_dict())
        assert torch.equal(target.fc_norm.weight, source.fc_norm.weight)
        own, given = target.head.weight, source.head.weight
        assert (own.shape == given.shape and torch.equal(own, given)) == kept


@pytest.mark.parametrize("change, message", [
    (dict(dim=64), "cls_token: expected"), (dict(depth=3), "lacks blocks.2."),
    (dict(depth=1), r"has blocks.1.*and \d+ more"), (dict(heads=4), "relative_position_bias_table: expected"),
    (dict(patch_size=8), "patch_embed.proj.weight: expected"),
    (dict(layer_scale=0.0), "has blocks.0.gamma_1"), (dict(positions="absolute"), "pos_embed")])
def test_another_architecture_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(tiny_vit(**{"positions": "block", "classes": 3, **change}), tiny_vit(codes=8).state_dict())


# ------------------------------------------------------------------------------------------------
# Optimizer groups

def test_param_groups_by_hand():
    model = VisionTransformer(image_size=16, patch_size=4, dim=32, depth=4, heads=2, positions="block", classes=3)
    groups = param_groups(model, 0.05, 0.5)
    found = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name, _ in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)      # each once
    assert set(found) == {name for name, p in model.named_parameters()}
    scales = {"cls_token": 1 / 32, "patch_embed": 1 / 32, "blocks.0": 1 / 16, "blocks.1": 1 / 8, "blocks.2": 1 / 4,
              "blocks.3": 1 / 2, "fc_norm": 1.0, "head": 1.0}
    decayed = ("patch_embed.proj.weight", "qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight", "head.weight",
               "relative_position_bias_table")
    for name, (scale, decay) in found.items():
        prefix = next(p for p in scales if name.startswith(p))
        assert (name, scale) == (name, scales[prefix])
        assert (name, decay) == (name, 0.05 if name.endswith(decayed) else 0.0)


def test_param_groups_of_pretraining():
    model = tiny_vit(codes=8)
    model.patch_embed.requires_grad_(False)
    found = {name: group for group in param_groups(model, 0.05, 0.5) for name, _ in group["params"]}
    assert set(found) == {name for name, p in model.named_parameters() if not name.startswith("patch_embed")}
    assert found["rel_pos_bias.relative_position_bias_table"]["lr_scale"] == 1.0
    assert found["mask_token"]["lr_scale"] == 0.125 and found["cls_token"]["weight_decay"] == 0.0
    assert found["lm_head.weight"]["weight_decay"] == 0.05 and found["norm.weight"]["weight_decay"] == 0.0
    assert all(group["lr_scale"] == 1 for group in param_groups(model, 0.05))               # no layer decay by default


# ------------------------------------------------------------------------------------------------
# Vision Transformer

def test_what_is_masked_is_not_seen():
    model, x = tiny_vit(codes=8), pixels(2, 3, 16, 16)
    mask = torch.rand(2, 4, 4, generator=seeded()) < 0.5
    covered = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]                 # in pixels
    logits = model(x, mask)
    assert logits.shape == (int(mask.sum()), 8)
    assert torch.equal(model(torch.where(covered, pixels(2, 3, 16, 16, seed=1), x), mask), logits)
    assert not torch.allclose(model(torch.where(covered, x, pixels(2, 3, 16, 16, seed=1)), mask), logits)
    # the logits come in the order of mask.nonzero(), image by image
    every = model.lm_head(model.norm(model.tokens(x, [2], mask)[0][:, 1:])).view(2, 4, 4, 8)
    for row, (b, y, z) in zip(logits, mask.nonzero().tolist()):
        assert torch.allclose(row, every[b, y, z], atol=1e-5)


def test_patch_14():
    model = VisionTransformer(image_size=224, patch_size=14, dim=32, depth=1, heads=2, codes=8)
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, 3:5] = True
    assert model.grid == 16 and model(pixels(1, 3, 224, 224), mask).shape == (32, 8)
    with pytest.raises(ValueError, match="image size 225 is no multiple of patch size 14: try 224"):
        VisionTransformer(image_size=225, patch_size=14, dim=32, depth=1, heads=2)


def test_features_are_patch_maps_after_the_named_blocks():
    model, x = tiny_vit(depth=3), pixels(2, 3, 16, 16)
    tokens = model.tokens(x, [1, 2, 3])
    assert torch.equal(model.norm(tokens[2]), model(x))
    for layers in ([1, 3], [3, 1], [2]):                    # in the order asked for
        for layer, features in zip(layers, model.features(x, layers)):
            assert features.shape == (2, 32, 4, 4)
            assert torch.equal(features[1, :, 2, 3], tokens[layer - 1][1, 1 + 2 * 4 + 3])


@pytest.mark.parametrize("positions", ["shared", "block"])
def test_activation_checkpointing_gives_the_same_gradients(positions):
    model, x = tiny_vit(positions=positions, classes=3).train(), pixels(2, 3, 16, 16)
    gradients = []
    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert all(g.abs().sum() > 0 for g in gradients[0])


def test_drop_path_rises_to_the_last_block():
    model = VisionTransformer(image_size=16, patch_size=4, dim=32, depth=3, heads=2, drop_path=0.2)
    assert [block.drop_path.p for block in model.blocks] == [0.0, 0.1, 0.2]


def test_initial_weights_shrink_with_depth():
    torch.manual_seed(0)
    model = VisionTransformer(image_size=16, patch_size=4, dim=64, depth=4, heads=2, classes=10)
    std = 0.5397 * 0.02                                     # of a normal distribution cut off at its own σ = 0.02
    for i, block in enumerate(model.blocks, 1):
        assert math.isclose(block.attn.qkv.weight.std().item(), std, rel_tol=0.05)
        assert block.attn.qkv.weight.abs().max() <= 0.02
        for layer in (block.attn.proj, block.mlp.fc2):
            assert math.isclose(layer.weight.std().item(), std / math.sqrt(2 * i), rel_tol=0.05)
    assert model.head.weight.std() < 1e-4


# ------------------------------------------------------------------------------------------------
# timm's networks, by their weights' names

@pytest.mark.parametrize("positions", ["block", "shared"])
def test_our_vit_is_timms_beit(positions):
    pytest.importorskip("timm", reason="timm, an independent BEiT, is not installed")
    from timm.models.beit import Beit
    ours = randomize(VisionTransformer(32, 4, dim=64, depth=2, heads=2, positions=positions, classes=7)).eval()
    theirs = Beit(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=2, init_values=0.1, num_classes=7,
                  use_abs_pos_emb=False, use_rel_pos_bias=positions == "block",
                  use_shared_rel_pos_bias=positions == "shared").eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = pixels(2, 3, 32, 32)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    # and back: a fresh one of ours takes timm's file
    fresh = VisionTransformer(32, 4, dim=64, depth=2, heads=2, positions=positions, classes=7).eval()
    load_backbone(fresh, randomize(theirs, seed=1).state_dict())
    assert torch.allclose(fresh(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_our_plain_vit_is_timms():
    pytest.importorskip("timm", reason="timm, an independent ViT, is not installed")
    from timm.models.vision_transformer import VisionTransformer as Theirs
    ours = tiny_vit(image_size=32, positions="absolute", layer_scale=0.0, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    theirs = Theirs(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = pixels(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    tokens = theirs.forward_features(((x + 1) / 2 - mean) / std)
    assert torch.allclose(ours(x), tokens, atol=1e-5, rtol=1e-5)
    # classified by the class token
    classifier = tiny_vit(image_size=32, positions="absolute", layer_scale=0.0, classes=3, pool="cls")
    assert torch.allclose(classifier(x), classifier.head(classifier.norm(classifier.tokens(x, [2])[0])[:, 0]), atol=1e-6)
