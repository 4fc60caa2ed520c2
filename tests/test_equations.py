"""The paper's equations against plain loops: test_eq1_… is of its Eq. 1, and so on.

Then what it does not put into equations: how the codebook begins, codes out of use, the tokenizer.
"""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import COMMON, OWN, STAGES, run
from helpers import TinyVGG, log, pixels, randomize, seeded, statistics, tiny_resnet50, tiny_vit

import data
import model
import pretrain
from model import IMAGENET_MEAN, IMAGENET_STD, PerceptualLoss, Quantizer, VQTokenizer
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
    distances = [[math.dist(row, code) for code in codebook] for row in z]
    return [row.index(min(row)) for row in distances]


def plain_rows(z_e):
    """(B, D, h, w) → B·h·w rows, by loops."""
    images, _, height, width = z_e.shape
    places = itertools.product(range(images), range(height), range(width))
    return [z_e[b, :, y, x].tolist() for b, y, x in places]


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
    flags = [*flags, "--crop-min", "0.5", "--lr", "0", "--steps", "1", "--accumulate", "2",
             "--output", "run"]
    run(stage, *flags)
    args = STAGES[stage].get_args([*COMMON, *OWN[stage], *flags])
    dataset = data.load_dataset(args.data, "train", args.image_size)
    batches = data.train_batches(dataset, transform, args, 0, 1, torch.device("cpu"))
    (row,) = log("run")
    return weights.load("run").requires_grad_(), row, next(batches)


def gradient_norm(module):
    return math.hypot(*[p.grad.norm() for p in module.parameters() if p.grad is not None])


# ------------------------------------------------------------------------------------------------
# Eq. 1: the code of a vector is its nearest codeword

@pytest.mark.parametrize("batch, height, width", [(2, 3, 4), (1, 32, 32), (1, 25, 41)])
def test_eq1_nearest_codeword_against_plain_loops(batch, height, width):
    """Of fewer rows than the block in which they are looked up, of as many, of one more."""
    q = a_quantizer()
    z_e = vectors(batch, 3, height, width)
    _, codes, _ = q(z_e)
    assert codes.shape == (batch, height, width)
    assert codes.flatten().tolist() == plain_nearest(plain_rows(z_e), q.codebook.tolist())


def test_eq1_in_fp32_under_autocast():
    q = Quantizer(512, 16).eval()
    q.codebook.copy_(torch.randn(512, 16, generator=seeded()) * 0.05 + 1)
    z_e = torch.randn(2, 16, 16, 16, generator=seeded(1)) * 0.05 + 1
    z_q, codes, _ = q(z_e)
    with torch.autocast("cpu", torch.bfloat16):
        z_q16, codes16, _ = q(z_e)
        encoded = q.encode(z_e)
        products = z_e.permute(0, 2, 3, 1) @ q.codebook.T
        naive = (q.codebook.square().sum(1) - 2 * products).argmin(3)
    assert torch.equal(codes, codes16)
    assert torch.equal(codes, encoded)
    assert torch.equal(z_q, z_q16)
    assert not torch.equal(naive, codes)                    # the control: bf16 finds others


# ------------------------------------------------------------------------------------------------
# Eq. 2: z_q, what is decoded, is the codeword

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

def test_eq3_gradients():
    """Straight through, ∂f(z_q)/∂z_e = f′(z_q), here of f(z) = Σ z³; and that of L_commit."""
    q = a_quantizer()
    z_e = vectors(2, 3, 2, 2).requires_grad_()
    z_q, codes, l_commit = q(z_e)
    e = q.codebook[codes].permute(0, 3, 1, 2)               # Eq. 2
    assert torch.allclose(z_q, e, rtol=1e-12)
    assert not torch.allclose(z_e, e, atol=0.1)             # the quantization did something
    assert math.isclose(l_commit.item(), (z_e - e).square().mean().item(), rel_tol=1e-12)
    (straight_through,) = torch.autograd.grad((z_q ** 3).sum(), z_e)
    assert torch.allclose(straight_through, 3 * e ** 2, rtol=1e-12)
    (commitment,) = torch.autograd.grad(l_commit, z_e)
    assert torch.allclose(commitment, 2 * (z_e - e) / z_e.numel(), rtol=1e-12)
    assert list(q.parameters()) == []                       # the codebook has none


def test_eq3_moving_averages_against_a_plain_loop():
    q = a_quantizer()
    count, total = q.count.tolist(), q.sum.tolist()
    for step in range(2):
        micro_batches = [vectors(2, 3, 2, 2, seed=10 * step + i) for i in range(2)]
        rows = plain_rows(torch.cat(micro_batches))
        codes = plain_nearest(rows, q.codebook.tolist())
        for z_e in micro_batches:
            q(z_e)
        q.update(seeded())
        for k in range(6):
            own = [row for row, code in zip(rows, codes, strict=True) if code == k]
            count[k] = 0.9 * count[k] + 0.1 * len(own)
            total[k] = [0.9 * total[k][d] + 0.1 * sum(row[d] for row in own) for d in range(3)]
        means = [[value / n for value in m] for m, n in zip(total, count, strict=True)]
        for found, plain in ((q.count, count), (q.sum, total), (q.codebook, means)):
            assert torch.allclose(found, torch.tensor(plain, dtype=torch.float64), rtol=1e-12)


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
        for one, other in zip(plain_rows(f), plain_rows(f_hat), strict=True):
            total += math.dist(normalised(one), normalised(other)) ** 2 / f.numel()
    return total


def vit_maps(network, inputs):
    inputs = F.interpolate(inputs, (16, 16), mode="bicubic", antialias=True)    # its own size
    tokens = network.patch_embed(inputs)
    tokens = torch.cat([network.cls_token.expand(2, -1, -1), tokens], 1) + network.pos_embed
    for block in network.blocks:
        tokens = block(tokens)
        yield tokens[:, 1:].mT.unflatten(2, (4, 4))


def vgg_maps(network, inputs):
    return [network.features[:end](inputs) for end in (4, 9, 16, 23, 30)]       # after ReLUs


def resnet_maps(network, inputs):
    x = network.maxpool(network.relu(network.bn1(network.conv1(inputs))))
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = stage(x)
        yield x


@pytest.mark.parametrize("build, maps, layers", [
    (lambda: tiny_vit(depth=4, positions="absolute", layer_scale=0.0, mean=IMAGENET_MEAN,
                      std=IMAGENET_STD), vit_maps, [1, 3]),
    (TinyVGG, vgg_maps, [2, 4]),
    (TinyVGG, vgg_maps, [1, 2, 3, 4, 5]),
    (tiny_resnet50, resnet_maps, [1, 2, 3, 4]),
])
def test_eq4_against_a_plain_loop(build, maps, layers):
    """Layer by layer by hand, on images of another size. The gradient is the reconstruction's."""
    torch.manual_seed(0)
    network = build()
    l_percep = PerceptualLoss(network, layers).train()
    assert not any(module.training for module in l_percep.modules())    # frozen for good
    x, x_hat = [pixels(2, 3, 24, 16, seed=seed).requires_grad_() for seed in (0, 1)]
    loss = l_percep(x, x_hat)
    mean, std = statistics()
    plain = []
    for images in (x, x_hat):
        every = list(maps(network, ((images + 1) / 2 - mean) / std))
        plain.append([every[layer - 1] for layer in layers])
    assert loss.item() == pytest.approx(plain_perceptual(*plain), rel=1e-4)
    assert l_percep(x, x.clone()).item() == 0
    loss.backward()
    assert x.grad is None
    assert x_hat.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in l_percep.parameters())


def test_eq4_layers_default_to_the_papers():
    assert PerceptualLoss(tiny_vit(depth=12)).layers == [3, 6, 9, 12]
    assert PerceptualLoss(tiny_vit(depth=4)).layers == [1, 2, 3, 4]
    assert PerceptualLoss(TinyVGG()).layers == [1, 2, 3, 4, 5]
    assert PerceptualLoss(tiny_resnet50()).layers == [1, 2, 3, 4]
    for layers in ([0], [1, 3]):
        with pytest.raises(ValueError, match="layers"):
            PerceptualLoss(tiny_vit(depth=2), layers)


# ------------------------------------------------------------------------------------------------
# Eq. 5: the tokenizer's objective

def test_eq5_one_step_of_the_loss_against_a_plain_sum(chain):
    """L = L_pixel + λ L_percep + β L_commit and its gradient, in tokenizer.py's first step."""
    teacher = str(chain.teacher)
    network, row, step = one_step(
        "tokenizer", data.crop_and_flip(32, 0.5), "--perceptual", teacher,
        "--perceptual-weight", "0.3", "--commitment-weight", "20", "--decay", "0.999999999",
        "--revive", "0")
    x = torch.cat([images for images, _ in step])                               # (16, 3, 32, 32)
    z_e = network.encoder(x)                                                    # (16, 32, 4, 4)
    rows = z_e.permute(0, 2, 3, 1)                                              # (16, 4, 4, 32)
    distances = (rows.unsqueeze(3) - network.quantizer.codebook).square().sum(4)
    z_q = network.quantizer.codebook[distances.argmin(3)].permute(0, 3, 1, 2)
    x_hat = network.decoder(z_e + (z_q - z_e).detach())
    terms = dict(
        pixel=(x - x_hat).square().sum() / (16 * 32 * 32 * 3),
        perceptual=PerceptualLoss(weights.load(teacher))(x, x_hat),             # as Eq. 4 says
        commitment=(z_q - z_e).square().sum() / z_e.numel())
    loss = terms["pixel"] + 0.3 * terms["perceptual"] + 20 * terms["commitment"]
    loss.backward()
    for name, term in (terms | dict(loss=loss)).items():
        assert row[name] == pytest.approx(term.item(), rel=1e-4), name
    assert row["grad_norm"] == pytest.approx(gradient_norm(network), rel=1e-3)


# ------------------------------------------------------------------------------------------------
# Eq. 6: masked patches become the mask token

def test_eq6_masked_patches_become_the_mask_token():
    vit = tiny_vit(codes=8)
    x = pixels(2, 3, 16, 16)
    mask = torch.rand(2, 4, 4, generator=seeded()) < 0.5
    tokens = vit.embed(x, mask)                                                 # (2, 17, 32)
    assert torch.equal(tokens[:, :1], vit.cls_token.expand(2, -1, -1))
    for b, i, j in itertools.product(range(2), range(4), range(4)):
        patch = x[b, :, 4 * i:4 * i + 4, 4 * j:4 * j + 4]
        embedding = (vit.patch_embed.proj.weight * patch).sum((1, 2, 3)) + vit.patch_embed.proj.bias
        expected = vit.mask_token[0, 0] if mask[b, i, j] else embedding
        assert torch.allclose(tokens[b, 1 + 4 * i + j], expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Eq. 7: the codes of masked patches are predicted

def test_eq7_one_step_of_the_loss_against_a_plain_loop(chain):
    """−log p(code of the whole image | masked image), averaged over all of a step's masked patches.
    """
    tokenizer = weights.load(chain.tokenizer)
    transform = pretrain.AugmentAndMask(
        data.crop_and_flip(32, 0.5), lambda: model.block_mask(4, 6, 2), jitter=0.4)
    vit, row, step = one_step(
        "pretrain", transform, *chain.inputs["pretrain"], "--mask-ratio", "0.4", "--mask-block",
        "2", "--jitter", "0.4", "--drop-path", "0")
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


# ------------------------------------------------------------------------------------------------
# Eq. 8: the adversarial ablation

def test_eq8_against_plain_loops():
    """D: −log D(x) − log(1 − D(x̂)); the tokenizer: −log D(x̂); D is a sigmoid, of each patch."""
    judge = randomize(torch.nn.Conv2d(3, 1, 4, stride=4))
    x, x_hat = pixels(3, 3, 16, 16), pixels(3, 3, 16, 16, seed=1)
    l_fool, l_judge = model.adversarial(judge, judge, x, x_hat)
    real, fake = [[1 / (1 + math.exp(-logit)) for logit in judge(images).flatten().tolist()]
                  for images in (x, x_hat)]
    assert len(real) == len(fake) == 3 * 16
    assert min(real) < 0.2 and max(real) > 0.8
    fool = -sum(math.log(d) for d in fake) / 48
    judged = -sum(math.log(d) for d in real) / 48 - sum(math.log(1 - d) for d in fake) / 48
    assert l_fool.item() == pytest.approx(fool, rel=1e-4)
    assert l_judge.item() == pytest.approx(judged, rel=1e-4)


def test_eq8_each_term_has_a_gradient_to_its_own_network_alone():
    torch.manual_seed(0)
    judge = model.PatchDiscriminator(16)
    x, x_hat = [pixels(2, 3, 32, 32, seed=seed).requires_grad_() for seed in (0, 1)]
    l_fool, l_judge = model.adversarial(judge, judge, x, x_hat)
    l_fool.backward()
    assert x_hat.grad.abs().sum() > 0
    assert x.grad is None
    assert all(p.grad is None for p in judge.parameters())
    x_hat.grad = None
    l_judge.backward()
    assert x_hat.grad is None
    assert all(p.grad.abs().sum() > 0 for p in judge.parameters())


def test_eq8_the_discriminator_is_patch_based():
    """VQGAN's: 2.8 M weights; a logit sees 70 × 70 pixels, but for the norms' statistics."""
    torch.manual_seed(0)
    judge = model.PatchDiscriminator()
    assert 2.7e6 < sum(p.numel() for p in judge.parameters()) < 2.8e6
    plain = torch.nn.Sequential(*[m for m in judge if not isinstance(m, torch.nn.GroupNorm)])
    x = pixels(1, 3, 128, 128).requires_grad_()
    plain(x)[0, 0, 7, 7].backward()
    for place in x.grad[0].abs().amax(0).nonzero(as_tuple=True):        # rows, columns
        assert place.max() - place.min() + 1 == 70


# ------------------------------------------------------------------------------------------------
# The codebook: how it begins, codes out of use

def test_the_codebook_begins_as_vectors_of_the_batch():
    q = Quantizer(5, 3).double()
    micro_batches = [vectors(2, 3, 4, 4, seed=i) for i in range(2)]
    for z_e in micro_batches:
        q(z_e)
    q.eval()(vectors(2, 3, 4, 4))                           # an evaluation's do not count
    q.initialize(seeded())
    rows = plain_rows(torch.cat(micro_batches))
    assert all(code in rows for code in q.codebook.tolist())
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
    assert min(math.dist(row, q.codebook[3]) for row in plain_rows(z)) < 1e-12
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
