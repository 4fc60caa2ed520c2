"""The perceptual codebook of stage 1: quantizer, encoder, decoder, perceptual loss (Eq. 1–5).

Nothing here knows of files, datasets, losses' weights or schedules. The codebook is learned by
moving averages over all ranks and not by a gradient: Quantizer.update is called where the optimizer
steps.

Papers: "PeCo" is arXiv 2111.12710, "VQ-VAE" 1711.00937, "VQGAN" 2012.09841, "LPIPS" 1801.03924,
"BEiT" 2106.08254. "Our choice" marks what none of them states.

Shapes, at the right margin:
    B images    C, H, W feature map    h, w codes of an image, down and across    D of a code
    K codes of the codebook    R rows to quantize = B·h·w    N patches = h·w
Pixels are in [-1, 1]; codes run row by row from the top left.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VisionTransformer,
    initialize_xavier,
    plain_blocks,
    resize_positions,
    sincos_positions,
)
from runtime import InputError, world_size

# ------------------------------------------------------------------------------------------------
# Vector quantization

class Quantizer(nn.Module):
    """Nearest-neighbour codebook in L2, learned by exponential moving averages (PeCo, Eq. 1–3, 5).

    The codebook term ‖sg[Enc(x)] − z_q‖² of Eq. 3 is in no loss: the moving averages realise it
    (VQ-VAE, appendix A.1; PeCo's default). Everything is in fp32 whatever the autocast: distances
    in half precision find wrong neighbours.

    In training, forward only keeps the batch's vectors. update(), called where the optimizer
    steps, moves the codebook by those of the global batch, the same way on all ranks.

    size: K; dim: D of a code; decay: γ of the averages, a step; revive: a code whose average use
    falls below this share of the mean (our choice) starts anew at a random vector of the batch.
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
        for rows in z.split(1024):                          # so that no R × K matrix is held
            # ‖e‖² − 2 z·e: ‖z‖² is the same for all k
            distances = torch.addmm(norms, rows, self.codebook.T, alpha=-2)     # (1024, K)
            codes.append(distances.min(1).indices)
        return torch.cat(codes)

    def encode(self, z_e):
        """z_e (B, D, h, w) → codes (B, h, w)."""
        codes = self.nearest(rows_of(z_e))
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
        vectors, _ = self.take_pending()                                        # (parts, R, D)
        self.codebook.copy_(self.draw(vectors, len(self.codebook), generator))
        self.count.fill_(vectors[..., 0].numel() * world_size() / len(self.count))
        self.sum.copy_(self.codebook * self.count[:, None])

    @torch.no_grad()
    def update(self, generator):
        """A step of the averages over the pending global batch; generator: alike on all ranks."""
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
            # A revived code counts as used like the mean. With its old averages it would go back.
            self.sum[dead] = mean * self.draw(vectors, int(dead.sum()), generator)
            self.count[dead] = mean
        used = self.count[:, None] > 1e-30                  # without revival N and m end at 0
        self.codebook.copy_(torch.where(used, self.sum / self.count[:, None], self.codebook))

    def take_pending(self):
        """This rank's vectors (micro-batches, R, D) and codes (all R,) since the last call."""
        vectors = torch.stack([rows for rows, _ in self.pending])
        codes = torch.cat([codes for _, codes in self.pending])
        self.pending.clear()
        return vectors, codes

    def draw(self, vectors, number, generator):
        """Random rows of all ranks' vectors, the same on every rank → (number, D).

        They are different ones, if there are as many. The order of the global batch is micro-batch,
        rank, row: so the draw does not depend on the number of ranks.
        """
        if dist.is_initialized():
            parts = [torch.empty_like(vectors) for _ in range(world_size())]
            dist.all_gather(parts, vectors)
            vectors = torch.stack(parts, 1)                 # (micro-batches, ranks, R, D)
        vectors = vectors.flatten(0, -2)
        order = torch.randperm(len(vectors), generator=generator)
        drawn = order[torch.arange(number) % len(vectors)]  # again from the first if they are few
        return vectors[drawn.to(vectors.device)]


def rows_of(z_e):
    """(B, D, h, w) → (R, D)"""
    return z_e.permute(0, 2, 3, 1).flatten(0, 2)


# ------------------------------------------------------------------------------------------------
# The tokenizer's encoder and decoder in VQGAN's form (PeCo, "Pre-training Details"): two residual
# blocks at each resolution, a self-attention block between two more at the lowest.

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


class Downsample(nn.Sequential):
    """Half the resolution, by a strided convolution padded on the right and below only (VQGAN)."""

    def __init__(self, channels):
        super().__init__(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))


class Upsample(nn.Sequential):
    """Twice the resolution, by nearest neighbours and a convolution (VQGAN)."""

    def __init__(self, channels):
        super().__init__(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1))


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
            layers += [Downsample(width), *level(width, outputs)]
            width = outputs
        layers += [*middle(width), norm_act(width), nn.Conv2d(width, dim, 3, padding=1)]
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """z_q (B, D, h, w) → images (B, 3, h·s, w·s): the encoder in reverse."""

    def __init__(self, channels, dim, blocks=2):
        width = channels[-1]
        layers = [nn.Conv2d(dim, width, 3, padding=1), *middle(width), *level(width, width, blocks)]
        for outputs in reversed(channels[:-1]):
            layers += [Upsample(width), *level(width, outputs, blocks)]
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
            x = block(x, None)
        pixels = self.out(self.norm(x)).mT.unflatten(2, (h, w))                 # (B, 3·p², h, w)
        return F.pixel_shuffle(pixels, self.patch_size)                         # (B, 3, H, W)


class VQTokenizer(nn.Module):
    """The perceptual codebook: image → codes → image (PeCo, "Learning the PeCo").

    image_size: of its training, pixels; any other multiples of the stride work too.
    channels: of each resolution, the first at full size, each next one at half: the stride of the
        codes is 2^(len(channels) − 1). decoder_channels: by default the same.
    decoder_blocks: residual blocks of the decoder at each resolution; by default 2.
    vit: dim, depth and heads of a ViT (see SIZES): encoder and decoder are ViTs of patch_size, and
        channels count for nothing. decoder_blocks: of the decoder; by default as many.
    """

    def __init__(self, image_size=224, channels=(64, 128, 256, 512, 512), codebook_size=8192,
                 code_dim=256, decay=0.99, revive=0.01, decoder_channels=None, decoder_blocks=None,
                 vit=None, patch_size=16):
        super().__init__()
        decoder_channels = decoder_channels or channels
        self.image_size = image_size
        self.stride = patch_size if vit else 2 ** (len(channels) - 1)
        if image_size % self.stride:
            raise InputError(f"image size {image_size} is no multiple of the tokenizer's stride "
                             f"{self.stride}")
        if any(c % (16 if c < 64 else 32) for c in (*channels, *decoder_channels)):
            raise InputError(f"channels {[*channels, *decoder_channels]} must be multiples of 16, "
                             "from 64 on of 32")
        if len(channels) != len(decoder_channels):
            raise InputError(f"channels {list(channels)} and those of the decoder, "
                             f"{list(decoder_channels)}, must be as many")
        if vit:
            depth = decoder_blocks or vit["depth"]
            self.encoder = ViTEncoder(image_size, patch_size, code_dim=code_dim, **vit)
            self.decoder = ViTDecoder(image_size, patch_size, code_dim=code_dim,
                                      **vit | dict(depth=depth))
        else:
            self.encoder = Encoder(channels, code_dim)
            self.decoder = Decoder(decoder_channels, code_dim, decoder_blocks or 2)
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
        z_e = self.encoder(images)                                              # (B, D, h, w)
        with torch.autocast(images.device.type, enabled=False):
            return self.quantizer.encode(z_e.to(self.quantizer.codebook.dtype))

    def decode(self, codes):
        """Codes (B, h, w) → images (B, 3, h·s, w·s)."""
        return self.decoder(self.quantizer.lookup(codes))


# ------------------------------------------------------------------------------------------------
# The perceptual loss

# The ends of torchvision's networks' stages: the last activations, as in LPIPS, or residual stages.
CONVNET_LAYERS = {
    "vgg16": ["features.3", "features.8", "features.15", "features.22", "features.29"],
    "resnet50": ["layer1", "layer2", "layer3", "layer4"],
}


class PerceptualLoss(nn.Module):
    """Eq. 4: L_percep = Σ_{l∈S} 1/(C_l H_l W_l) ‖f_l(x) − f_l(x̂)‖², averaged over the images.

    f_l: activations of a frozen network after layer l, normalised at each position to zero mean and
    unit variance over the channels (our choice; the paper says "normalized" only. With unit length,
    as in LPIPS, 1/C_l would make the term C_l times smaller: it would vanish beside the pixels').

    network: a VisionTransformer (layers S: blocks from 1; default the four quarters, 3, 6, 9, 12 of
    12) or torchvision's VGG-16 or ResNet-50 (layers S: stages from 1; default all).
    """

    def __init__(self, network, layers=None):
        super().__init__()
        if isinstance(network, VisionTransformer):
            number = len(network.blocks)
            default = [max(1, number * i // 4) for i in (1, 2, 3, 4)]
            self.image_size = network.image_size
        else:
            ends = CONVNET_LAYERS["resnet50" if hasattr(network, "layer4") else "vgg16"]
            number = len(ends)
            default = list(range(1, number + 1))
            self.image_size = None                          # any size
        self.layers = list(layers or default)
        if not all(1 <= layer <= number for layer in self.layers):
            raise InputError(
                f"perceptual layers {self.layers}: this network has layers 1 to {number}")
        if self.image_size is None:
            nodes = {ends[layer - 1]: str(layer) for layer in self.layers}
            network = create_feature_extractor(network, nodes)
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        return super().train(False)                         # frozen: always in eval mode

    def features(self, images):
        """f_l(images) of each layer: list of (B, C_l, H_l, W_l)."""
        if self.image_size is None:
            maps = self.network(((images + 1) / 2 - self.mean) / self.std).values()
        else:                                               # a ViT normalises its inputs itself
            size = (self.image_size, self.image_size)
            if images.shape[2:] != size:                    # in fp32: bf16 has no such kernel
                images = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
            maps = self.network.features(images, self.layers)
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
