"""Everything that the paper defines, in its order: imports nothing of the project.

1  the quantizer (Eq. 1–3)             4  the ViT (Eq. 6), MAE's encoder and decoder
2  the tokenizer's networks            5  masks
3  the perceptual loss (Eq. 4),        6  what training asks of a ViT: optimizer groups, pyramid
   the discriminator (Eq. 8)           7  positions of another grid

Papers: "PeCo" is arXiv 2111.12710, "BEiT" 2106.08254, "MoCo v3" 2104.02057, "MAE" 2111.06377,
"VQ-VAE" 1711.00937, "VQGAN" 2012.09841, "LPIPS" 1801.03924. "Our choice" marks what none of them
states.

Shapes, at the right margin:
    B images    H, W pixels    C channels of a feature map    h, w patches, down and across
    N patches = h·w, token 0 is the class token    D width; in the quantizer, of a code
    K codes of the codebook    R rows to quantize = B·h·w
    M masked patches    V visible patches of an image

Conventions: pixels are in [-1, 1]; masks are True where a patch is masked; patches and codes run
row by row from the top left. Sizes that do not fit one another raise ValueError.
"""
import functools
import itertools
import math
import random

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import StochasticDepth

SIZES = {
    "nano": dict(dim=64, depth=4, heads=2),                 # our choice, for the demo
    "tiny": dict(dim=192, depth=12, heads=3),               # DeiT's
    "small": dict(dim=384, depth=12, heads=6),              # DeiT's
    "base": dict(dim=768, depth=12, heads=12),              # ViT's
    "large": dict(dim=1024, depth=24, heads=16),            # ViT's
    "huge": dict(dim=1280, depth=32, heads=16),             # ViT's
}
HALF = (0.5, 0.5, 0.5)                             # BEiT's of ImageNet-22K: pixels stay in [-1, 1]
IMAGENET_MEAN = (0.485, 0.456, 0.406)                       # MoCo v3's and torchvision's
IMAGENET_STD = (0.229, 0.224, 0.225)


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


# ------------------------------------------------------------------------------------------------
# 1  Vector quantization (Eq. 1–3)

class Quantizer(nn.Module):
    """Nearest-neighbour codebook in L2, learned by exponential moving averages (PeCo, Eq. 1–3, 5).

    No loss has the codebook term ‖sg[Enc(x)] − z_q‖² of Eq. 3: the moving averages minimise it
    (VQ-VAE, appendix A.1; PeCo's default). Everything is computed in fp32, under autocast too:
    distances in half precision find wrong neighbours.

    In training, forward keeps the batch's vectors. initialize() makes codes of the first ones;
    update(), where the optimizer steps, moves the codebook by them. All ranks end up the same.

    size: K; dim: D of a code; decay: γ of the averages, per step; revive: codes used less than
    this fraction of the mean are re-initialised from the batch (our choice).
    """

    def __init__(self, size=8192, dim=256, decay=0.99, revive=0.01):
        super().__init__()
        self.decay, self.revive = decay, revive
        self.register_buffer("codebook", torch.zeros(size, dim))                # e (K, D)
        self.register_buffer("count", torch.zeros(size))                        # N: average of n
        self.register_buffer("sum", torch.zeros(size, dim))                    # m: average of Σ z_e
        self.pending = []                                  # (vectors, codes) of each micro-batch

    @torch.no_grad()
    def nearest(self, z):
        """Eq. 1: argmin_k ‖z − e_k‖² for rows z (R, D) → codes (R,)."""
        norms = self.codebook.square().sum(1)                                   # ‖e‖² (K,)
        codes = []
        for rows in z.split(1024):                          # an R × K matrix would be too large
            # ‖e‖² − 2 z·e: ‖z‖² is the same for all k
            distances = torch.addmm(norms, rows, self.codebook.T, alpha=-2)     # (1024, K)
            codes.append(distances.min(1).indices)
        return torch.cat(codes)

    def encode(self, z_e):
        """z_e (B, D, h, w) → codes (B, h, w)."""
        with torch.autocast(z_e.device.type, enabled=False):
            codes = self.nearest(rows_of(z_e.to(self.codebook.dtype)))
        return codes.view(len(z_e), *z_e.shape[2:])

    def lookup(self, codes):
        """Eq. 2: codes (B, h, w) → their vectors (B, D, h, w)."""
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2)

    def forward(self, z_e):
        """z_e (B, D, h, w) → z_q with a straight-through gradient, codes (B, h, w), L_commit."""
        with torch.autocast(z_e.device.type, enabled=False):
            z_e = z_e.to(self.codebook.dtype)
            codes = self.encode(z_e)
            if self.training:
                self.pending.append((rows_of(z_e.detach()), codes.flatten()))
            e = self.lookup(codes)                                              # (B, D, h, w)
            # ‖sg[z_q] − Enc(x)‖² of Eq. 3, averaged over all numbers as VQGAN does (our choice)
            l_commit = F.mse_loss(z_e, e.detach())
            z_q = z_e + (e - z_e).detach()                  # straight through: dz_q/dz_e = 1
            return z_q, codes, l_commit

    @torch.no_grad()
    def initialize(self, generator):
        """Codes := random vectors of the pending global batch, each counted as used equally."""
        vectors, _ = self.take_pending()                            # (micro-batches, R, D)
        self.codebook.copy_(self.sample_rows(vectors, len(self.codebook), generator))
        self.count.fill_(vectors[..., 0].numel() * world_size() / len(self.count))
        self.sum.copy_(self.codebook * self.count[:, None])

    @torch.no_grad()
    def update(self, generator):
        """A step of the EMA over the pending global batch; generator: in one state on all ranks."""
        vectors, codes = self.take_pending()
        n = torch.bincount(codes, minlength=len(self.count)).to(self.count.dtype)   # uses (K,)
        total = torch.zeros_like(self.sum)                                          # Σ z_e (K, D)
        total.index_add_(0, codes, vectors.flatten(0, 1))
        if dist.is_initialized():
            dist.all_reduce(n)
            dist.all_reduce(total)
        self.count.lerp_(n, 1 - self.decay)                 # N ← γN + (1 − γ)n
        self.sum.lerp_(total, 1 - self.decay)               # m ← γm + (1 − γ)Σ z_e
        mean = self.count.mean()
        dead = self.count < self.revive * mean
        if dead.any():
            # Count and sum are reset too, or the next update would undo the revival.
            self.sum[dead] = mean * self.sample_rows(vectors, int(dead.sum()), generator)
            self.count[dead] = mean
        used = self.count[:, None] > 1e-30                  # without revival N and m end at 0
        self.codebook.copy_(torch.where(used, self.sum / self.count[:, None], self.codebook))

    def take_pending(self):
        """Vectors (micro-batches, R, D) and codes (micro-batches · R,) since the last call."""
        vectors = torch.stack([rows for rows, _ in self.pending])
        codes = torch.cat([codes for _, codes in self.pending])
        self.pending.clear()
        return vectors, codes

    def sample_rows(self, vectors, number, generator):
        """Random rows of all ranks' vectors, the same on every rank → (number, D).

        They differ from one another, if there are enough. The rows of the global batch are ordered
        by micro-batch, rank, row: so the result does not depend on the number of ranks.
        """
        if dist.is_initialized():
            parts = [torch.empty_like(vectors) for _ in range(world_size())]
            dist.all_gather(parts, vectors)
            vectors = torch.stack(parts, 1)                 # (micro-batches, ranks, R, D)
        vectors = vectors.flatten(0, -2)
        order = torch.randperm(len(vectors), generator=generator)
        order = order[torch.arange(number) % len(vectors)]  # from the first again if they are few
        return vectors[order.to(vectors.device)]


def rows_of(z_e):
    """(B, D, h, w) → (R, D)"""
    return z_e.permute(0, 2, 3, 1).flatten(0, 2)


# ------------------------------------------------------------------------------------------------
# 2  The tokenizer's encoder and decoder in VQGAN's form (PeCo, "Pre-training Details"): two
# residual blocks at each resolution, a self-attention block between two more at the lowest.

def norm_act(channels):
    return nn.Sequential(group_norm(channels), nn.SiLU())


def group_norm(channels):
    """VQGAN's, in 32 groups; narrow layers in groups of two channels (our choice)."""
    return nn.GroupNorm(min(32, channels // 2), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.body = nn.Sequential(
            norm_act(inputs), nn.Conv2d(inputs, outputs, 3, padding=1),
            norm_act(outputs), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        return self.skip(x) + self.body(x)


class AttentionBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1)                 # (B, 1, h·w, 3·C)
        q, k, v = qkv.chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)                             # (B, 1, h·w, C)
        return x + self.proj(y.squeeze(1).mT.reshape(x.shape))


def level(inputs, outputs, blocks=2):
    """The residual blocks of one resolution."""
    return [ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)]


def middle(channels):
    return [ResidualBlock(channels, channels), AttentionBlock(channels),
            ResidualBlock(channels, channels)]


class Encoder(nn.Sequential):
    """Images (B, 3, H, W) → z_e (B, D, H/s, W/s), s = 2^(len(channels) − 1)."""

    def __init__(self, channels, dim):
        width = channels[0]
        layers = [nn.Conv2d(3, width, 3, padding=1), *level(width, width)]
        for outputs in channels[1:]:
            padding = nn.ZeroPad2d((0, 1, 0, 1))            # on the right and below only (VQGAN)
            half = nn.Sequential(padding, nn.Conv2d(width, width, 3, stride=2))
            layers += [half, *level(width, outputs)]
            width = outputs
        layers += [*middle(width), norm_act(width), nn.Conv2d(width, dim, 3, padding=1)]
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """z_q (B, D, h, w) → images (B, 3, h·s, w·s): the encoder in reverse."""

    def __init__(self, channels, dim, blocks=2):
        width = channels[-1]
        layers = [nn.Conv2d(dim, width, 3, padding=1), *middle(width), *level(width, width, blocks)]
        for outputs in reversed(channels[:-1]):
            nearest = nn.Upsample(scale_factor=2)           # by nearest neighbours (VQGAN)
            twice = nn.Sequential(nearest, nn.Conv2d(width, width, 3, padding=1))
            layers += [twice, *level(width, outputs, blocks)]
            width = outputs
        layers += [norm_act(width), nn.Conv2d(width, 3, 3, padding=1)]
        super().__init__(*layers)


class ViTEncoder(nn.Module):
    """Images (B, 3, H, W) → z_e (B, D, H/p, W/p), by a plain ViT (PeCo, Table 12)."""

    def __init__(self, image_size, patch_size, dim, code_dim, depth, heads):
        super().__init__()
        self.vit = VisionTransformer(image_size, patch_size, dim, depth, heads,
                                     positions="absolute", layer_scale=0.0)
        self.out = nn.Linear(dim, code_dim)

    def forward(self, images):
        h, w = self.vit.grid_of(images)
        z_e = self.out(self.vit(images)[:, 1:])                                 # (B, N, D)
        return z_e.mT.unflatten(2, (h, w))                                      # (B, D, h, w)


class ViTDecoder(nn.Module):
    """z_q (B, D, h, w) → images (B, 3, h·p, w·p): a patch of pixels from each token."""

    def __init__(self, image_size, patch_size, dim, code_dim, depth, heads):
        super().__init__()
        self.grid, self.patch_size = image_size // patch_size, patch_size
        self.embed = nn.Linear(code_dim, dim)
        self.register_buffer("pos_embed", sincos_positions(self.grid, dim))     # (1, 1+N, dim)
        self.blocks = plain_blocks(dim, depth, heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.out = nn.Linear(dim, 3 * patch_size ** 2)
        initialize_xavier(self)

    def forward(self, z_q):
        h, w = z_q.shape[2:]
        positions = self.pos_embed
        if (h, w) != (self.grid, self.grid):
            positions = resize_positions(positions, h, w)
        x = self.embed(z_q.flatten(2).mT) + positions[:, 1:]                    # (B, N, dim)
        for block in self.blocks:
            x = block(x)
        pixels = self.out(self.norm(x)).mT.unflatten(2, (h, w))                 # (B, 3·p², h, w)
        return F.pixel_shuffle(pixels, self.patch_size)                         # (B, 3, H, W)


def conv_networks(channels, code_dim, decoder_channels=None, decoder_blocks=None):
    """Encoder and decoder of VQGAN's form.

    channels: of each resolution, the first at full size, each next one at half of it.
    decoder_channels: by default the same; decoder_blocks: a resolution's, by default 2.
    """
    decoder_channels = decoder_channels or channels
    odd = [c for c in (*channels, *decoder_channels) if c % (16 if c < 64 else 32)]
    if odd or len(channels) != len(decoder_channels):
        raise ValueError(f"channels {[*channels, *decoder_channels]} must be multiples of 16, from "
                         "64 on of 32, and as many in the decoder as in the encoder")
    return Encoder(channels, code_dim), Decoder(decoder_channels, code_dim, decoder_blocks or 2)


class VQTokenizer(nn.Module):
    """The perceptual codebook: image → codes → image (PeCo, "Learning Perceptual
    Codebook for Visual Content").

    image_size: of its training, pixels; any other multiples of the stride work too.
    Its networks are convolutional, as conv_networks() makes them of the channels, or, with
    vit = dict(dim, depth, heads) (see SIZES), ViTs of patch_size; decoder_blocks: another depth.
    """

    def __init__(self, image_size=224, channels=(64, 128, 256, 512, 512), codebook_size=8192,
                 code_dim=256, decay=0.99, revive=0.01, decoder_channels=None, decoder_blocks=None,
                 vit=None, patch_size=16):
        super().__init__()
        self.image_size = image_size
        self.stride = patch_size if vit else 2 ** (len(channels) - 1)
        if image_size % self.stride:
            raise ValueError(f"image size {image_size} is no multiple of the tokenizer's stride "
                             f"{self.stride}")
        if vit:
            vit = dict(vit, image_size=image_size, patch_size=patch_size, code_dim=code_dim)
            self.encoder = ViTEncoder(**vit)
            self.decoder = ViTDecoder(**vit | dict(depth=decoder_blocks or vit["depth"]))
        else:
            self.encoder, self.decoder = conv_networks(
                channels, code_dim, decoder_channels, decoder_blocks)
        self.quantizer = Quantizer(codebook_size, code_dim, decay, revive)

    def forward(self, images):
        """Images (B, 3, H, W) → reconstruction x̂ (B, 3, H, W), codes (B, h, w), L_commit."""
        z_q, codes, l_commit = self.quantizer(self.encoder(images))
        return self.decoder(z_q), codes, l_commit

    @torch.no_grad()
    def encode(self, images, grid=None):
        """Images (B, 3, H, W) → codes (B, h, w); resized first where another grid is asked for."""
        if grid is not None:
            size = (grid * self.stride, grid * self.stride)
            if images.shape[2:] != size:
                images = F.interpolate(images, size, mode="bicubic", antialias=True)
        return self.quantizer.encode(self.encoder(images))

    def decode(self, codes):
        """Codes (B, h, w) → images (B, 3, h·s, w·s)."""
        return self.decoder(self.quantizer.lookup(codes))


# ------------------------------------------------------------------------------------------------
# 3  The perceptual loss (Eq. 4)

# The ends of torchvision's networks' stages: the last activations, as in LPIPS, or residual stages.
CONVNET_LAYERS = {
    "vgg16": ["features.3", "features.8", "features.15", "features.22", "features.29"],
    "resnet50": ["layer1", "layer2", "layer3", "layer4"],
}


class PerceptualLoss(nn.Module):
    """Eq. 4: L_percep = Σ_{l∈S} 1/(C_l H_l W_l) ‖f_l(x) − f_l(x̂)‖², averaged over the images.

    f_l: activations of a frozen network after layer l, normalised at each position to zero mean and
    unit variance over the channels. That is our choice: the paper says only "normalized". Unit
    length, as in LPIPS, would make the term C_l times smaller, and the pixel loss would drown it.

    network: a VisionTransformer (layers S: blocks from 1; default 3, 6, 9, 12 of 12) or
    torchvision's VGG-16 or ResNet-50 (layers S: stages from 1; default all).
    """

    def __init__(self, network, layers=None):
        super().__init__()
        self.is_vit = isinstance(network, VisionTransformer)
        if self.is_vit:
            number = len(network.blocks)
            default = [max(1, number * i // 4) for i in (1, 2, 3, 4)]
        else:
            ends = CONVNET_LAYERS["resnet50" if hasattr(network, "layer4") else "vgg16"]
            number = len(ends)
            default = list(range(1, number + 1))
        self.layers = list(layers or default)
        if not all(1 <= layer <= number for layer in self.layers):
            raise ValueError(
                f"perceptual layers {self.layers}: this network has layers 1 to {number}")
        if not self.is_vit:
            nodes = {ends[layer - 1]: str(layer) for layer in self.layers}
            network = create_feature_extractor(network, nodes)
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        return super().train(False)                         # frozen: always in eval mode

    def features(self, images):
        """f_l(images) of each layer: list of (B, C_l, H_l, W_l)."""
        if self.is_vit:                                     # it normalises its inputs itself
            size = (self.network.image_size, self.network.image_size)
            if images.shape[2:] != size:                    # in fp32: bf16 has no such kernel
                images = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
            maps = self.network.features(images, self.layers)
        else:                                               # of any size
            maps = self.network(((images + 1) / 2 - self.mean) / self.std).values()
        return [normalise(f) for f in maps]

    def forward(self, x, x_hat):
        with torch.no_grad():
            target = self.features(x)
        output = self.features(x_hat)
        return sum(F.mse_loss(f_hat, f) for f, f_hat in zip(target, output, strict=True))


def normalise(f):
    """f (B, C, H, W) to zero mean and unit variance over the channels, at each position."""
    channels = f.shape[1]
    return F.layer_norm(f.float().movedim(1, -1), (channels,)).movedim(-1, 1)


# ------------------------------------------------------------------------------------------------
# The adversarial ablation (Eq. 8)

class PatchDiscriminator(nn.Sequential):
    """Images (B, 3, H, W) → logits (B, 1, h, w), each of a field of 70 × 70 pixels.

    VQGAN's PatchGAN with its initialisation; GroupNorm for BatchNorm (our choice).
    """

    def __init__(self, channels=64):
        layers = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for stride in (2, 2, 1):
            layers += [nn.Conv2d(channels, 2 * channels, 4, stride, padding=1, bias=False),
                       nn.GroupNorm(channels // 8, 2 * channels), nn.LeakyReLU(0.2)]
            channels *= 2
        super().__init__(*layers, nn.Conv2d(channels, 1, 4, padding=1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)


def adversarial(discriminator, wrapped, x, x_hat):
    """Eq. 8: the discriminator D maximises log D(x) + log(1 − D(x̂)), the tokenizer opposes it.

    x, x_hat: (B, 3, H, W). wrapped: the discriminator in DDP, for its own gradient. Returns two
    scalars, the tokenizer's loss, −log D(x̂), and D's, −log D(x) − log(1 − D(x̂)); each has a
    gradient to its own network alone. log(1 − D(x̂)), as printed, has hardly any gradient while D
    is right: we take the non-saturating form of Goodfellow et al. (2014), our choice.
    """
    fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    logits = torch.func.functional_call(discriminator, fixed, x_hat)        # of x̂ (B, 1, h, w)
    l_fool = -F.logsigmoid(logits.float()).mean()
    real, fake = wrapped(torch.cat([x, x_hat.detach()])).float().chunk(2)
    l_judge = -F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean()       # 1 − σ(s) = σ(−s)
    return l_fool, l_judge


# ------------------------------------------------------------------------------------------------
# 4  The Vision Transformer (Eq. 6)

class Attention(nn.Module):
    """Multi-head self-attention; positions as of VisionTransformer.

    All but "absolute" (MoCo v3's plain ViT) have BEiT's biases: of queries and values, not of keys.
    A "block" has a relative position bias of its own; the "shared" one is handed to forward.
    """

    def __init__(self, dim, heads, grid, positions):
        super().__init__()
        self.heads = heads
        absolute = positions == "absolute"
        self.relative_position_bias_table = None
        if positions == "block":
            self.relative_position_bias_table = bias_table(grid, heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=absolute)
        self.q_bias = None if absolute else nn.Parameter(torch.zeros(dim))
        self.v_bias = None if absolute else nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, grid=None, shared_bias=None):
        """Tokens x (B, 1+N, D) → the same; the grid (h, w) is needed where positions are relative.

        shared_bias: (1, heads, 1+N, 1+N).
        """
        qkv_bias = self.qkv.bias
        if qkv_bias is None:                                # BEiT: keys have no bias
            no_bias = torch.zeros_like(self.q_bias)
            qkv_bias = torch.cat([self.q_bias, no_bias, self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)                            # (B, 1+N, 3·D)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))                         # (B, 1+N, 3, heads, ·)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # (B, heads, 1+N, ·)
        bias = shared_bias
        if self.relative_position_bias_table is not None:
            bias = position_bias(self.relative_position_bias_table, *grid)
        if bias is not None:
            bias = bias.to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)             # (B, heads, 1+N, ·)
        return self.proj(x.transpose(1, 2).flatten(2))                          # (B, 1+N, D)


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with drop path and layer scale (initial value; 0: none)."""

    def __init__(self, dim, heads, grid, positions, layer_scale, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, grid, positions)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else 1.0
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else 1.0

    def forward(self, x, grid=None, shared_bias=None):
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), grid, shared_bias))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)                     # (B, N, D)


class VisionTransformer(nn.Module):
    """The original ViT as BEiT and PeCo train it, BEiT's own, or MoCo v3's, by `positions`.

    image_size, patch_size: pixels; dim, depth, heads: see SIZES. It takes images of any other size
        too: it pads them to whole patches (grey, right and below) and interpolates positions.
    positions: "learned" embeddings (the original ViT, PeCo's); a "shared" relative position bias
        (BEiT's other ViT in pre-training); one bias table in each "block" (the same in
        fine-tuning); or "absolute": fixed sine-cosine embeddings (MoCo v3).
    layer_scale: its initial value, 0 for none. drop_path: rate of the last block, rising from 0.
    codes: K of the codebook, for masked image modelling: forward(images, mask) → (M, K).
    classes: for classification, from the mean of the patches: forward(images) → (B, classes).
    With neither, forward(images) → normalised tokens (B, 1+N, D).
    mean, std: of the network's own inputs, of pixels in [0, 1]. Images always come in [-1, 1].
    """

    def __init__(self, image_size=224, patch_size=16, dim=768, depth=12, heads=12,
                 positions="learned", layer_scale=0.0, drop_path=0.0, codes=0, classes=0,
                 mean=HALF, std=HALF):
        super().__init__()
        if positions not in ("learned", "shared", "block", "absolute") or dim % heads:
            raise ValueError(f"positions {positions!r}, {heads} heads of a width of {dim}: unknown")
        if image_size % patch_size:
            multiple = image_size // patch_size * patch_size or patch_size
            raise ValueError(f"image size {image_size} is no multiple of patch size {patch_size}: "
                             f"try {multiple}")
        grid = image_size // patch_size
        self.grid, self.image_size, self.patch_size = grid, image_size, patch_size
        self.positions = positions
        self.checkpoint_activations = False            # True: recompute blocks in the backward pass
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)) if codes else None
        self.rel_pos_bias = RelativePositionBias(grid, heads) if positions == "shared" else None
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid ** 2, dim))
        elif positions == "absolute":
            self.register_buffer("pos_embed", sincos_positions(grid, dim))      # (1, 1+N, D)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            rate = drop_path * i / max(depth - 1, 1)
            self.blocks.append(Block(dim, heads, grid, positions, layer_scale, rate))
        self.norm = nn.Identity() if classes else nn.LayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if classes else None         # of the mean
        self.lm_head = nn.Linear(dim, codes) if codes else None
        self.head = nn.Linear(dim, classes) if classes else None
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """MoCo v3's with absolute positions, else BEiT's.

        BEiT cuts its normal draws of std 0.02 off at ±0.02 in pre-training, at ±2 elsewhere, where
        it also leaves the patch projection at PyTorch's default. It scales residual branches down
        with depth, and the classifier by 0.001.
        """
        if self.positions == "absolute":
            initialize_xavier(self)
            nn.init.normal_(self.cls_token, std=1e-6)
        else:
            pre_training = self.lm_head is not None
            cut = 0.02 if pre_training else 2.0
            drawn = (nn.Linear, nn.Conv2d) if pre_training else nn.Linear
            for module in self.modules():
                if isinstance(module, drawn):
                    nn.init.trunc_normal_(module.weight, std=0.02, a=-cut, b=cut)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            nn.init.trunc_normal_(self.cls_token, std=0.02, a=-cut, b=cut)
            if self.mask_token is not None:
                nn.init.trunc_normal_(self.mask_token, std=0.02, a=-cut, b=cut)
            if self.positions == "learned":
                nn.init.trunc_normal_(self.pos_embed, std=0.02, a=-cut, b=cut)
            for i, block in enumerate(self.blocks, 1):
                block.attn.proj.weight /= math.sqrt(2 * i)
                block.mlp.fc2.weight /= math.sqrt(2 * i)
        if self.head is not None:
            self.head.weight *= 0.001

    def grid_of(self, images):
        """Patches of images (B, 3, H, W), down and across: (h, w)."""
        height, width = images.shape[2:]
        return math.ceil(height / self.patch_size), math.ceil(width / self.patch_size)

    def embed(self, images, mask=None):
        """Images (B, 3, H, W), mask (B, h, w) → tokens (B, 1+N, D) for the blocks."""
        h, w = self.grid_of(images)
        bottom = h * self.patch_size - images.shape[2]
        right = w * self.patch_size - images.shape[3]
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        x = self.patch_embed(((images + 1) / 2 - self.mean) / self.std)         # (B, N, D)
        if mask is not None:                                                    # PeCo, Eq. 6
            x = torch.where(mask.flatten(1).unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = x.to(self.cls_token.dtype)                     # under autocast too: as blocks add to it
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        if self.positions in ("shared", "block"):           # the blocks know of positions
            return x
        if (h, w) == (self.grid, self.grid):
            return x + self.pos_embed
        return x + resize_positions(self.pos_embed, h, w)

    def visible_tokens(self, images, mask):
        """MAE's: only visible patches pass the blocks. Every image must mask equally many.

        Images (B, 3, H, W), mask (B, h, w) → normalised tokens (B, 1+V, D).
        """
        x = self.embed(images)
        visible = x[:, 1:][~mask.flatten(1)].unflatten(0, (len(x), -1))         # (B, V, D)
        *_, x = self.after_blocks(torch.cat([x[:, :1], visible], 1))
        return self.norm(x)

    def after_blocks(self, x, grid=None, shared_bias=None):
        """Yields the tokens (B, ·, D) after each block in turn.

        checkpoint_activations: recomputes activations in the backward pass, to save memory.
        """
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, shared_bias, use_reentrant=False)
            else:
                x = block(x, grid, shared_bias)
            yield x

    def tokens(self, images, layers, mask=None):
        """Tokens after the named blocks, counted from 1: list of (B, 1+N, D)."""
        depth = len(self.blocks)
        if not layers or not all(1 <= layer <= depth for layer in layers):
            raise ValueError(f"layers {list(layers)}: this ViT has blocks 1 to {depth}")
        grid = self.grid_of(images)
        shared_bias = self.rel_pos_bias(*grid) if self.rel_pos_bias is not None else None
        x = self.embed(images, mask)
        every = itertools.islice(self.after_blocks(x, grid, shared_bias), max(layers))
        kept = {layer: x for layer, x in enumerate(every, 1) if layer in layers}
        return [kept[layer] for layer in layers]

    def features(self, images, layers=None):
        """Patch features after the named blocks, by default the last: list of (B, D, h, w)."""
        layers = [len(self.blocks)] if layers is None else layers
        h, w = self.grid_of(images)
        return [x[:, 1:].mT.unflatten(2, (h, w)) for x in self.tokens(images, layers)]

    def forward(self, images, mask=None):
        x = self.tokens(images, [len(self.blocks)], mask)[0]                    # (B, 1+N, D)
        if mask is not None:
            masked = x[:, 1:][mask.flatten(1)]                                  # (M, D)
            return self.lm_head(self.norm(masked))                              # (M, K)
        if self.head is None:
            return self.norm(x)                                                 # (B, 1+N, D)
        return self.head(self.fc_norm(x[:, 1:].mean(1)))                        # (B, classes)


def plain_blocks(dim, depth, heads):
    """Blocks of a plain ViT: no position bias, layer scale or drop path."""
    return nn.ModuleList(Block(dim, heads, None, "absolute", 0.0, 0.0) for _ in range(depth))


@torch.no_grad()
def initialize_xavier(network):
    """MoCo v3's: Xavier's, queries, keys and values each by itself (MAE's as one); biases 0."""
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            parts = 3 if name.endswith("qkv") else 1
            for weight in module.weight.flatten(1).chunk(parts):
                nn.init.xavier_uniform_(weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def sincos_positions(grid, dim):
    """Fixed 2-D sine-cosine embedding (MoCo v3, sec. 4), 0 for the class token → (1, 1+N, D)."""
    omega = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    y = y.flatten()[:, None] * omega                                            # (N, D/4)
    x = x.flatten()[:, None] * omega                                            # (N, D/4)
    patches = torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], 1)  # (N, D), as in the official files
    return torch.cat([torch.zeros(1, dim), patches]).unsqueeze(0)


class MaskedAutoencoder(nn.Module):
    """PeCo_MAE (PeCo, Table 8): MAE's encoder and decoder (2111.06377) with codes as targets.

    encoder: a VisionTransformer with absolute positions, which sees the visible patches only.
    codes: K. dim, depth, heads: of the decoder. The images are of the encoder's own size.
    forward: images (B, 3, H, W), mask (B, h, w) → logits of the masked patches (M, K).
    """

    def __init__(self, encoder, codes, dim, depth, heads):
        super().__init__()
        self.encoder = encoder
        self.decoder = MaskedDecoder(encoder.cls_token.shape[-1], encoder.grid, codes, dim, depth,
                                     heads)

    def forward(self, images, mask):
        return self.decoder(self.encoder.visible_tokens(images, mask), mask)


class MaskedDecoder(nn.Module):
    """Tokens of what is visible (B, 1+V, width) and a mask (B, h, w) → logits (M, K)."""

    def __init__(self, width, grid, codes, dim, depth, heads):
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", sincos_positions(grid, dim))          # (1, 1+N, dim)
        self.blocks = plain_blocks(dim, depth, heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, codes)
        initialize_xavier(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x, mask):
        x = self.embed(x)                                                       # (B, 1+V, dim)
        mask = mask.flatten(1)                                                  # (B, N)
        patches = self.mask_token.to(x.dtype).repeat(*mask.shape, 1)            # (B, N, dim)
        patches[~mask] = x[:, 1:].flatten(0, 1)
        x = self.decode(torch.cat([x[:, :1], patches], 1))                      # (B, 1+N, dim)
        return self.head(x[:, 1:][mask])                                        # (M, K)

    def decode(self, x):
        """Tokens (B, 1+N, dim) with their positions through all blocks, normalised."""
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ------------------------------------------------------------------------------------------------
# 5  Block-wise masking (BEiT, algorithm 1)

def block_mask(grid, count, min_block=16):
    """Mask `count` of grid × grid patches in blocks → bool (grid, grid). Draws from `random`.

    BEiT draws blocks of an area from min_block to what is left of `count`, of an aspect ratio from
    0.3 to 1/0.3. It gives up after ten blocks that do not fit; a third of its masks then fall short
    of `count`. Here the blocks then grow by random neighbours, so that all masks are equally large.
    """
    mask = np.zeros((grid, grid), bool)
    masked = 0
    while masked < count:
        for _ in range(10):                                 # BEiT's number of attempts
            area = random.uniform(min_block, count - masked)       # in the end below min_block
            aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= grid or width >= grid:
                continue
            top, left = random.randint(0, grid - height), random.randint(0, grid - width)
            block = mask[top:top + height, left:left + width]
            new = block.size - int(block.sum())
            if 0 < new <= count - masked:
                block[:] = True
                masked += new
                break
        else:
            break
    for _ in range(count - masked):                         # fill up along the blocks' borders
        wide = np.pad(mask, 1)
        near = wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
        border = np.argwhere(~mask & (near | ~mask.any()))
        mask[tuple(random.choice(border))] = True
    return torch.from_numpy(mask)


def random_mask(grid, count):
    """Mask `count` of grid × grid patches at random (MAE) → bool (grid, grid). Uses `random`."""
    mask = torch.zeros(grid * grid, dtype=torch.bool)
    mask[random.sample(range(grid * grid), count)] = True
    return mask.view(grid, grid)


# ------------------------------------------------------------------------------------------------
# 6  The ViT in training: the optimizer's groups, and its pyramid for dense prediction

def param_groups(model, weight_decay, layer_decay=1.0, vit=""):
    """Optimizer groups with names and an "lr_scale", as BEiT makes them.

    Vectors and the class and position embeddings have no weight decay. Layer l has the lr times
    layer_decay^(depth + 1 − l): embeddings are layer 0, block i (from 1) is layer i, all else is
    layer depth + 1, as what follows the blocks and the shared position bias.
    vit: attribute path of the ViT inside a larger model; all other parameters get the last layer's.
    """
    depth = len(model.get_submodule(vit).blocks)
    prefix = f"{vit}." if vit else ""
    groups = {}
    for name, parameter in model.named_parameters():
        own = name.removeprefix(prefix) if name.startswith(prefix) else ""     # its name in the ViT
        if own.startswith("blocks."):
            layer = int(own.split(".")[1]) + 1
        elif own.startswith(("patch_embed", "cls_token", "mask_token", "pos_embed")):
            layer = 0
        else:
            layer = depth + 1
        no_decay = parameter.ndim == 1 or own in ("cls_token", "pos_embed")
        decay = 0.0 if no_decay else weight_decay
        if (layer, decay) not in groups:
            lr_scale = layer_decay ** (depth + 1 - layer)
            groups[layer, decay] = dict(params=[], weight_decay=decay, lr_scale=lr_scale)
        groups[layer, decay]["params"].append((name, parameter))
    return list(groups.values())


class ViTPyramid(nn.Module):
    """A ViT's patch maps at ×4, ×2, ×1, ×½ of its grid, for dense prediction (PeCo, supplement).

    Images (B, 3, H, W) → four maps (B, D, ·, ·), after blocks 4, 6, 8 and 12 of 12, in proportion
    at other depths [BEiT].
    """

    def __init__(self, vit):
        super().__init__()
        depth, dim = len(vit.blocks), vit.cls_token.shape[-1]
        vit.norm = nn.Identity()                            # the blocks' outputs are not normalised
        self.vit = vit
        self.layers = [max(1, round(depth * i / 12)) for i in (4, 6, 8, 12)]
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, 2))
        self.up2 = nn.ConvTranspose2d(dim, dim, 2, 2)

    def forward(self, images):
        first, second, third, fourth = self.vit.features(images, self.layers)   # (B, D, h, w) each
        fourth = F.max_pool2d(fourth, 2, ceil_mode=True)                        # (B, D, h/2, w/2)
        return [self.up4(first), self.up2(second), third, fourth]


# ------------------------------------------------------------------------------------------------
# 7  Relative position bias (BEiT, appendix A; not in PeCo's ViT), and positions of another grid.
# The bias is a learned number for each relative position and head, added to the logits of
# attention. All blocks share one table in pre-training, each has its own in fine-tuning. Modules
# and parameters have BEiT's names, so that its files load unchanged.

def relative_position_index(h, w, device=None):
    """Row of the bias table for each pair of tokens, class token first → (1+N, 1+N)."""
    down, across = torch.arange(h, device=device), torch.arange(w, device=device)
    ys, xs = torch.meshgrid(down, across, indexing="ij")
    y, x = ys.flatten(), xs.flatten()                                           # (N,)
    dy = y[:, None] - y[None, :] + h - 1                                        # (N, N), from 0
    dx = x[:, None] - x[None, :] + w - 1                                        # (N, N), from 0
    last = (2 * h - 1) * (2 * w - 1) + 2
    index = torch.full((h * w + 1, h * w + 1), last, device=device)             # class → class
    index[1:, 1:] = dy * (2 * w - 1) + dx
    index[0, 1:] = last - 2                                                     # class → patch
    index[1:, 0] = last - 1                                                     # patch → class
    return index


def bias_table(grid, heads):
    """A row for each relative position of grid × grid patches, and three for the class token."""
    return nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))


def position_bias(table, h, w):
    """The biases of a table for h × w patches → (1, heads, 1+N, 1+N)."""
    if h != w or len(table) != (2 * h - 1) ** 2 + 3:
        table = resize_bias_table(table, h, w)
    bias = table[relative_position_index(h, w, table.device)]                   # (1+N, 1+N, heads)
    return bias.permute(2, 0, 1).unsqueeze(0).contiguous()  # fused attention needs contiguous rows


class RelativePositionBias(nn.Module):
    """The table that all blocks share."""

    def __init__(self, grid, heads):
        super().__init__()
        self.relative_position_bias_table = bias_table(grid, heads)

    def forward(self, h, w):
        return position_bias(self.relative_position_bias_table, h, w)


@torch.compiler.disable                                     # the bisection in it is not for tracing
def resize_bias_table(table, h, w):
    """A square grid's bias table for h × w patches; the class token's three rows stay."""
    side = math.isqrt(len(table) - 3)                                           # 2g − 1
    image = table[:-3].float().T.unflatten(1, (side, side))                    # (heads, 2g−1, 2g−1)
    old = (side + 1) // 2
    down = torch.tensor(offset_weights(old, h), device=image.device)            # (2h−1, 2g−1)
    across = torch.tensor(offset_weights(old, w), device=image.device)          # (2w−1, 2g−1)
    with torch.autocast(table.device.type, enabled=False):
        image = down @ image @ across.T                                        # (heads, 2h−1, 2w−1)
    return torch.cat([image.flatten(1).T.to(table.dtype), table[-3:]])


@functools.lru_cache
def offset_weights(old, new):
    """The matrix that resamples biases of offsets −(old−1) … old−1 at −(new−1) … new−1.

    Linear interpolation is a matrix (2·new − 1, 2·old − 1), computed once for each size. As in BEiT
    the old offsets are placed at 1, 1+q, 1+q+q², … on either side, with the q ≥ 1 that brings the
    farthest to the farthest: near ones keep their distance. A smaller grid (q = 1) leaves the far
    ones out. Between those places BEiT interpolates by cubic splines, we linearly.
    """
    low, high = 1.0, float(max(new, 2))
    for _ in range(50):                                     # bisection for q
        q = (low + high) / 2
        if sum(q ** i for i in range(old - 1)) < new - 1:
            low = q
        else:
            high = q
    right = np.cumsum([low ** i for i in range(old - 1)])
    places = np.concatenate([-right[::-1], [0.0], right])
    targets = np.arange(1 - new, new)
    columns = [np.interp(targets, places, unit) for unit in np.eye(2 * old - 1)]
    return np.stack(columns, 1).astype(np.float32)


def resize_positions(embedding, h, w):
    """A square grid's position embedding (1, 1+N, D) for h × w patches, bicubic."""
    cls_token, patches = embedding[:, :1], embedding[:, 1:]
    side = math.isqrt(patches.shape[1])
    image = patches.mT.unflatten(2, (side, side))                               # (1, D, g, g)
    image = F.interpolate(image, (h, w), mode="bicubic")                        # (1, D, h, w)
    return torch.cat([cls_token, image.flatten(2).mT], 1)
