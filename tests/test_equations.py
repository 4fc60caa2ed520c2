"""The paper's equations against plain loops: test_eq1_… is of its Eq. 1, and so on.

Then what it does not put into equations: how the codebook begins, codes out of use, the tokenizer.
"""
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import COMMON, OWN, STAGES, run
from helpers import TinyVGG, log, pixels, seeded, statistics, tiny_resnet50, tiny_vit

import data
import model
import pretrain
from model import IMAGENET_MEAN, IMAGENET_STD, Grid, PerceptualLoss, Quantizer, VQTokenizer
from support import weights


def a_quantizer(size=6, dim=3, decay=0.9, revive=0.0):
    q = Quantizer(size, dim, decay, revive).double()
    q.codebook.copy_(torch.randn(size, dim, generator=seeded(0)))
    q.count.copy_(torch.rand(size, generator=seeded(1)) + 0.5)
    q.sum.copy_(q.codebook * q.count[:, None])
    return q


def vectors(batch, dim, height, width, seed=2):
    return torch.randn(batch, dim, height, width, generator=seeded(seed)).double()


def plain_nearest(z, codebook):
    """Index of the nearest code for each row, by loops."""
    best = []
    for row in z:
        distances = []
        for code in codebook:
            distances.append(sum((a - b) ** 2 for a, b in zip(row, code, strict=True)))
        best.append(distances.index(min(distances)))
    return best


def plain_rows(z_e):
    """(B, D, h, w) → B·h·w rows, by loops."""
    images, _, height, width = z_e.shape
    rows = []
    for b in range(images):
        for y in range(height):
            for x in range(width):
                rows.append(z_e[b, :, y, x].tolist())
    return rows


@pytest.fixture(scope="module")
def small_tokenizer():
    torch.manual_seed(0)
    t = VQTokenizer(16, channels=(16, 32, 32), codebook_size=64, code_dim=8)
    t.quantizer(t.encoder(pixels(8, 3, 16, 16, seed=1)))
    t.quantizer.initialize(seeded())
    return t.eval()


def one_step(stage, transform, *flags):
    """A stage's run of one step, its row, and that step's micro-batches (inputs, labels).

    With lr 0 the step changes nothing, so its checkpoint is what it began from.
    """
    flags = ["--lr", "0", "--steps", "1", "--accumulate", "2", "--output", "run", *flags]
    run(stage, *flags)
    args = STAGES[stage].get_args([*COMMON, *OWN[stage], *flags])
    dataset = data.load_dataset(args.data, "train", args.image_size)
    loader = data.TrainLoader(dataset, transform(args), args, 0, 1, torch.device("cpu"))
    (row,) = log("run")
    return weights.load("run").requires_grad_(), row, next(iter(loader))


def gradient_norm(module):
    squares = [p.grad.square().sum() for p in module.parameters() if p.grad is not None]
    return math.sqrt(sum(squares))


# ------------------------------------------------------------------------------------------------
# Eq. 1: the code of a vector is its nearest codeword

def test_eq1_nearest_codeword_against_plain_loops():
    q = a_quantizer()
    z = vectors(2, 3, 3, 4)
    expected = plain_nearest(plain_rows(z), q.codebook.tolist())
    assert q.nearest(torch.tensor(plain_rows(z), dtype=torch.float64)).tolist() == expected
    _, codes, _ = q(z)
    assert codes.shape == (2, 3, 4)
    assert codes.flatten().tolist() == expected


@pytest.mark.parametrize("rows", [1, 1024, 1025])
def test_eq1_is_the_same_in_blocks(rows):
    q = a_quantizer(size=40, dim=5)
    z = torch.randn(rows, 5, generator=seeded(3)).double()
    distances = (z[:, None] - q.codebook).square().sum(2)   # the full matrix
    assert torch.equal(q.nearest(z), distances.argmin(1))


def test_eq1_in_fp32_under_autocast():
    t = VQTokenizer(16, channels=(16,), codebook_size=512, code_dim=16).eval()
    t.encoder = torch.nn.Identity()
    q = t.quantizer
    q.codebook.copy_(torch.randn(512, 16, generator=seeded()) * 0.05 + 1)
    z = torch.randn(2, 16, 16, 16, generator=seeded(1)) * 0.05 + 1
    rows = z.permute(0, 2, 3, 1).flatten(0, 2)
    z_q, codes, _ = q(z)
    with torch.autocast("cpu", torch.bfloat16):
        z_q16, codes16, _ = q(z)
        encoded = t.encode(z)
        naive = (q.codebook.square().sum(1) - 2 * rows @ q.codebook.T).argmin(1)
    assert torch.equal(codes, codes16)
    assert torch.equal(codes, encoded)
    assert torch.equal(z_q, z_q16)
    assert not torch.equal(naive, codes.flatten())          # the control: bf16 finds others


# ------------------------------------------------------------------------------------------------
# Eq. 2: z_q, what is decoded, is the codeword

def test_eq2_quantized_vectors_are_the_codewords():
    q = a_quantizer()
    z_q, codes, _ = q(vectors(2, 3, 3, 4))
    expected = q.codebook[codes].permute(0, 3, 1, 2)
    assert torch.allclose(z_q, expected, rtol=1e-12)
    assert torch.equal(q.lookup(codes), expected)


@pytest.mark.parametrize("size", [16, 24])
def test_eq2_decoded_codes_are_the_reconstruction(size, small_tokenizer):
    x = pixels(2, 3, size, size)
    x_hat, codes, _ = small_tokenizer(x)
    assert x_hat.shape == x.shape
    assert codes.shape == (2, size // 4, size // 4)
    assert len(codes.unique()) > 1
    assert torch.equal(small_tokenizer.encode(x), codes)
    assert torch.allclose(small_tokenizer.decode(codes), x_hat, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Eq. 3: VQ-VAE's commitment term, straight-through gradient and codebook term

def test_eq3_commitment_pulls_the_encoder_only():
    q = a_quantizer()
    z_e = vectors(2, 3, 2, 2).requires_grad_()
    _, codes, l_commit = q(z_e)
    e = q.lookup(codes)
    expected = (z_e - e).square().mean()
    assert math.isclose(l_commit.item(), expected.item(), rel_tol=1e-12)
    l_commit.backward()
    assert torch.allclose(z_e.grad, 2 * (z_e.detach() - e) / z_e.numel(), rtol=1e-12)
    assert list(q.parameters()) == []
    assert q.codebook.grad is None
    assert not e.requires_grad


def test_eq3_straight_through_gradient():
    """∂f(z_q)/∂z_e = f′(z_q)."""
    q = a_quantizer()
    target = vectors(2, 3, 2, 2, seed=5)

    def f(z):
        return ((z - target) ** 3).sum()

    z_e = vectors(2, 3, 2, 2).requires_grad_()
    z_q, codes, _ = q(z_e)
    f(z_q).backward()
    leaf = q.lookup(codes).clone().requires_grad_()
    f(leaf).backward()
    assert torch.allclose(z_e.grad, leaf.grad, rtol=1e-12)
    assert not torch.allclose(z_q, z_e, atol=0.1)           # the quantization did something


def test_eq3_moving_averages_against_a_plain_loop():
    q = a_quantizer()
    count = q.count.tolist()
    total = q.sum.tolist()
    for step in range(2):
        codebook = q.codebook.tolist()
        seen = []
        for micro_batch in range(2):
            z = vectors(2, 3, 2, 2, seed=10 * step + micro_batch)
            q(z)
            seen += plain_rows(z)
        q.update(seeded())
        codes = plain_nearest(seen, codebook)
        expected = []
        for k in range(6):
            own = [row for row, code in zip(seen, codes, strict=True) if code == k]
            count[k] = 0.9 * count[k] + 0.1 * len(own)
            for d in range(3):
                total[k][d] = 0.9 * total[k][d] + 0.1 * sum(row[d] for row in own)
            expected.append([value / count[k] for value in total[k]])
        for found, plain in ((q.count, count), (q.sum, total), (q.codebook, expected)):
            assert torch.allclose(found, torch.tensor(plain, dtype=torch.float64), rtol=1e-12)
        assert q.pending == []


# ------------------------------------------------------------------------------------------------
# Eq. 4: the perceptual loss

def plain_perceptual(maps, maps_hat):
    """Σ_l 1/(C H W) ‖f(x) − f(x̂)‖², averaged over images; lists of (B, C, H, W), to normalise."""
    def normalised(column):
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        return [(value - mean) / math.sqrt(variance + 1e-5) for value in column]

    total = 0.0
    for f, f_hat in zip(maps, maps_hat, strict=True):
        images, channels, height, width = f.shape
        rows = zip(plain_rows(f), plain_rows(f_hat), strict=True)
        for one, other in rows:
            pairs = zip(normalised(one), normalised(other), strict=True)
            total += sum((p - q) ** 2 for p, q in pairs) / (channels * height * width) / images
    return total


def test_eq4_against_a_plain_loop():
    network = tiny_vit(depth=4, positions="absolute", layer_scale=0.0, mean=IMAGENET_MEAN,
                       std=IMAGENET_STD)
    l_percep = PerceptualLoss(network, layers=[1, 3])
    x = pixels(2, 3, 16, 16)
    x_hat = pixels(2, 3, 16, 16, seed=1)
    mean, std = statistics()
    maps = []
    for images in (x, x_hat):                               # through the blocks by hand
        tokens = network.patch_embed(((images + 1) / 2 - mean) / std)
        tokens = torch.cat([network.cls_token.expand(2, -1, -1), tokens], 1) + network.pos_embed
        after = []
        for block in network.blocks:
            tokens = block(tokens, Grid(4, 4, None))
            after.append(tokens[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4))
        maps.append([after[0], after[2]])
    assert math.isclose(l_percep(x, x_hat).item(), plain_perceptual(*maps), rel_tol=1e-4)
    assert l_percep(x, x.clone()).item() == 0


def test_eq4_gradient_reaches_the_reconstruction_only():
    l_percep = PerceptualLoss(tiny_vit(positions="absolute"), [1, 2]).train()
    x = pixels(2, 3, 16, 16).requires_grad_()
    x_hat = pixels(2, 3, 16, 16, seed=1).requires_grad_()
    l_percep(x, x_hat).backward()
    assert x.grad is None
    assert x_hat.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in l_percep.parameters())
    assert not l_percep.network.training                    # frozen for good


def test_eq4_layers_default_to_the_quarters():
    assert PerceptualLoss(tiny_vit(depth=12)).layers == [3, 6, 9, 12]           # the paper's
    assert PerceptualLoss(tiny_vit(depth=4)).layers == [1, 2, 3, 4]
    for layers in ([0], [1, 3]):
        with pytest.raises(ValueError, match="layers"):
            PerceptualLoss(tiny_vit(depth=2), layers)


@pytest.mark.parametrize("build, layers, shapes", [
    (TinyVGG, None, [(8, 32), (8, 16), (8, 8), (8, 4), (8, 2)]),
    (TinyVGG, [2, 4], [(8, 16), (8, 4)]),
    (tiny_resnet50, None, [(256, 8), (512, 4), (1024, 2), (2048, 1)]),
])
def test_eq4_of_convnets(build, layers, shapes):
    torch.manual_seed(0)
    l_percep = PerceptualLoss(build(), layers).train()
    statistics_before = [buffer.clone() for buffer in l_percep.network.buffers()]
    seen = []
    l_percep.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x_hat = pixels(1, 3, 32, 32, seed=1).requires_grad_()
    x = pixels(1, 3, 32, 32)
    assert [(f.shape[1], f.shape[2]) for f in l_percep.features(x)] == shapes
    mean, std = statistics()
    assert torch.allclose(seen[0], ((x + 1) / 2 - mean) / std, atol=1e-6)
    assert all(f.min() >= 0 for f in l_percep.network(x).values())      # after the activation
    l_percep(x, x_hat).backward()
    assert x_hat.grad.abs().sum() > 0
    for before, after in zip(statistics_before, l_percep.network.buffers(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("size", [(24, 24), (24, 16)])
def test_eq4_a_vit_sees_images_of_its_own_size(size):
    (features,) = PerceptualLoss(tiny_vit(), [1]).features(pixels(1, 3, *size))
    assert features.shape == (1, 32, 4, 4)


# ------------------------------------------------------------------------------------------------
# Eq. 5: the tokenizer's objective

def test_eq5_one_step_of_the_loss_against_a_plain_sum(chain):
    """L = L_pixel + λ L_percep + β L_commit and its gradient, in tokenizer.py's first step."""
    teacher = str(chain.teacher)
    network, row, step = one_step(
        "tokenizer", lambda args: data.crop_and_flip(args.image_size, args.crop_min),
        "--perceptual", teacher, "--perceptual-weight", "0.3", "--commitment-weight", "20",
        "--decay", "0.999999999", "--revive", "0")
    x = torch.cat([images for images, _ in step])
    assert x.shape == (16, 3, 32, 32)

    z_e = network.encoder(x)                                                    # (16, 32, 4, 4)
    rows = z_e.permute(0, 2, 3, 1)                                              # (16, 4, 4, 32)
    distances = (rows.unsqueeze(3) - network.quantizer.codebook).square().sum(4)
    z_q = network.quantizer.codebook[distances.argmin(3)].permute(0, 3, 1, 2)
    x_hat = network.decoder(z_e + (z_q - z_e).detach())
    l_pixel = (x - x_hat).square().sum() / (16 * 32 * 32 * 3)
    l_commit = (z_q - z_e).square().sum() / z_e.numel()
    perceptual = PerceptualLoss(weights.load(teacher))
    l_percep = 0.0
    for f, f_hat in zip(perceptual.features(x), perceptual.features(x_hat), strict=True):
        images, channels, height, width = f.shape
        l_percep += (f - f_hat).square().sum() / (channels * height * width) / images
    loss = l_pixel + 0.3 * l_percep + 20 * l_commit
    loss.backward()

    assert row["pixel"] == pytest.approx(l_pixel.item(), rel=1e-4)
    assert row["perceptual"] == pytest.approx(l_percep.item(), rel=1e-4)
    assert row["commitment"] == pytest.approx(l_commit.item(), rel=1e-4)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(gradient_norm(network), rel=1e-3)


# ------------------------------------------------------------------------------------------------
# Eq. 6: masked patches become the mask token

def test_eq6_masked_patches_become_the_mask_token():
    vit = tiny_vit(codes=8)
    x = pixels(2, 3, 16, 16)
    mask = torch.rand(2, 4, 4, generator=seeded()) < 0.5
    tokens, _ = vit.embed(x, mask)                                              # (2, 17, 32)
    for b in range(2):
        assert torch.equal(tokens[b, 0], vit.cls_token[0, 0])
        for i in range(4):
            for j in range(4):
                patch = x[b, :, 4 * i:4 * i + 4, 4 * j:4 * j + 4]
                embedding = (vit.patch_embed.proj.weight * patch).sum((1, 2, 3))
                expected = embedding + vit.patch_embed.proj.bias
                if mask[b, i, j]:
                    expected = vit.mask_token[0, 0]
                assert torch.allclose(tokens[b, 1 + 4 * i + j], expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Eq. 7: the codes of masked patches are predicted

def test_eq7_one_step_of_the_loss_against_a_plain_loop(chain):
    """−log p(code | masked image), averaged over all masked patches, as pretrain.py's first step.

    The codes are of the whole image.
    """
    tokenizer = weights.load(chain.tokenizer)
    vit, row, step = one_step(
        "pretrain", transform_of_pretrain, *chain.inputs["pretrain"], "--mask-ratio", "0.4",
        "--drop-path", "0")
    total = right = patches = 0
    for (images, masks, factors), _ in step:
        images = data.color_jitter(images, factors)
        codes = tokenizer.encode(images)                                        # (8, 4, 4)
        for image, mask, code in zip(images, masks, codes, strict=True):
            h = vit.tokens(image[None], [4], mask[None])[0][0, 1:].view(4, 4, -1)
            for i, j in mask.nonzero().tolist():
                scores = vit.lm_head(vit.norm(h[i, j])).exp()                   # (K,)
                total -= (scores[code[i, j]] / scores.sum()).log()
                right += int(scores.argmax() == code[i, j])
                patches += 1
    assert patches == 16 * 6
    loss = total / patches
    loss.backward()

    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["accuracy"] == pytest.approx(right / patches, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(gradient_norm(vit), rel=1e-3)


def transform_of_pretrain(args):
    augment = data.crop_and_flip(args.image_size, args.crop_min)
    masked = round(args.mask_ratio * 16)
    make_mask = functools.partial(model.block_mask, 4, masked, args.mask_block)
    return pretrain.AugmentAndMask(augment, make_mask, args.jitter)


# ------------------------------------------------------------------------------------------------
# Eq. 8: the adversarial ablation

class Judge(torch.nn.Module):
    """A discriminator of two weights, so that logits are of all sizes: (B, 3, H, W) → (B, 1, 2, 2).
    """

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(4.0))
        self.shift = torch.nn.Parameter(torch.tensor(-0.5))

    def forward(self, images):
        patches = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2)
        return 20 * self.scale * patches + self.shift


def test_eq8_against_plain_loops():
    """D: −log D(x) − log(1 − D(x̂)); the tokenizer: −log D(x̂); D is a sigmoid, of each patch."""
    judge = Judge()
    x = pixels(3, 3, 8, 8)
    x_hat = pixels(3, 3, 8, 8, seed=1)
    l_fool, l_judge = model.adversarial(judge, judge, x, x_hat)

    def probabilities(images):
        return [1 / (1 + math.exp(-logit)) for logit in judge(images).flatten().tolist()]

    real, fake = probabilities(x), probabilities(x_hat)
    assert len(real) == len(fake) == 3 * 4
    assert min(real) < 0.2 and max(real) > 0.8
    fool = judged = 0.0
    for d_real, d_fake in zip(real, fake, strict=True):
        fool -= math.log(d_fake) / 12
        judged -= (math.log(d_real) + math.log(1 - d_fake)) / 12
    assert l_fool.item() == pytest.approx(fool, rel=1e-4)
    assert l_judge.item() == pytest.approx(judged, rel=1e-4)


def test_eq8_each_term_has_a_gradient_to_its_own_network_alone():
    torch.manual_seed(0)
    judge = model.PatchDiscriminator(16)
    weights_of_judge = list(judge.parameters())
    x = pixels(2, 3, 32, 32).requires_grad_()
    x_hat = pixels(2, 3, 32, 32, seed=1).requires_grad_()
    l_fool, l_judge = model.adversarial(judge, judge, x, x_hat)

    def gradients(loss, inputs):
        return torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)

    assert all(gradient is None for gradient in gradients(l_fool, weights_of_judge))
    assert gradients(l_judge, [x_hat]) == (None,)
    assert gradients(l_fool, [x]) == (None,)
    assert gradients(l_fool, [x_hat])[0].abs().sum() > 0
    assert all(gradient.abs().sum() > 0 for gradient in gradients(l_judge, weights_of_judge))


def test_eq8_the_discriminator_is_patch_based():
    """VQGAN's: 2.8 M weights, and a field of 70 × 70 pixels a logit, but for the norms' statistics.
    """
    torch.manual_seed(0)
    judge = model.PatchDiscriminator()
    assert 2.7e6 < sum(p.numel() for p in judge.parameters()) < 2.8e6
    for name, module in judge.named_children():
        if isinstance(module, torch.nn.GroupNorm):
            setattr(judge, name, torch.nn.Identity())
    x = pixels(1, 3, 128, 128).requires_grad_()
    judge(x)[0, 0, 7, 7].backward()
    rows, columns = x.grad[0].abs().amax(0).nonzero(as_tuple=True)
    for side in (rows, columns):
        assert side.max() - side.min() + 1 == 70


# ------------------------------------------------------------------------------------------------
# The codebook: how it begins, codes out of use

def test_the_codebook_begins_as_vectors_of_the_batch():
    q = Quantizer(5, 3).double()
    seen = []
    for micro_batch in range(2):
        z = vectors(2, 3, 4, 4, seed=micro_batch)
        q(z)
        seen += plain_rows(z)
    q.eval()(vectors(2, 3, 4, 4))                           # an evaluation's do not count
    q.initialize(seeded())
    assert all(code in seen for code in q.codebook.tolist())
    assert len(q.codebook.unique(dim=0)) == 5
    assert q.count.tolist() == [64 / 5] * 5
    assert torch.allclose(q.sum, q.codebook * 64 / 5, rtol=1e-12)
    assert q.pending == []


def test_a_dead_code_starts_anew_with_its_statistics():
    q = a_quantizer(size=4, dim=2, decay=0.5, revive=0.1)
    q.codebook[3] = 1000.0                                  # nothing is near it
    q.count.copy_(torch.tensor([8.0, 8.0, 8.0, 0.01]))
    q.sum.copy_(q.codebook * q.count[:, None])
    z = vectors(4, 2, 3, 3)
    q(z)
    q.update(seeded())
    rows = torch.tensor(plain_rows(z), dtype=torch.float64)
    assert (rows - q.codebook[3]).abs().amax(1).min() < 1e-12
    assert q.count[3] >= q.revive * q.count.mean()          # else it is replaced at once again
    q(z)
    assert (q.pending[0][1] == 3).any()
    q.update(seeded())
    assert q.codebook[3].abs().max() < 10                   # its old averages do not move it back


def test_a_code_out_of_use_stays_where_it_is_without_revival():
    q = Quantizer(size=4, dim=2, decay=0.5, revive=0.0)
    z = vectors(4, 2, 3, 3).float()
    far = torch.tensor([800.0, -300.0])                     # nothing is near it
    q.codebook[3] = far
    q.count[:] = 8.0
    q.sum.copy_(q.codebook * q.count[:, None])
    for _ in range(200):                                    # its count is 0 in float32 after 153
        q(z)
        q.update(seeded())
    assert q.count[3] == 0
    assert torch.allclose(q.codebook[3], far)
    assert q.codebook.isfinite().all()


# ------------------------------------------------------------------------------------------------
# The tokenizer

@pytest.mark.parametrize("size", [(16, 16), (20, 12)])
def test_encode_at_another_grid(size, small_tokenizer):
    x = pixels(2, 3, *size)
    resized = F.interpolate(x, (12, 12), mode="bicubic", antialias=True)
    assert torch.equal(small_tokenizer.encode(x, grid=3), small_tokenizer.encode(resized))


@pytest.mark.parametrize("size, channels", [(18, (16, 16, 16)), (16, (16, 20)), (16, (16, 80))])
def test_tokenizer_refuses_what_does_not_fit(size, channels):
    with pytest.raises(ValueError, match="image size 18|multiples of 16"):
        VQTokenizer(size, channels=channels)
