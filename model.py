"""What the paper defines: the VQ tokenizer, the perceptual loss, the ViT and block-wise masking.

Nothing here knows of training or data sets; of files, only `load` does, for users. "PeCo" is arXiv 2111.12710, "BEiT" 2106.08254,
"MoCo v3" 2104.02057, "VQ-VAE" 1711.00937, "VQGAN" 2012.09841, "LPIPS" 1801.03924; "our choice" marks
what none of them states.

Shapes, at the right margin:
    B images    N patches = h·w (token 0 is the class token)    D width    M masked patches of a batch
    K codes of the codebook    R rows to quantize = B·h·w       C, H, W feature map

Conventions: pixels are in [-1, 1] (data.py makes them so); masks are True where a patch is masked;
patches and codes run row by row from the top left.
"""
import functools
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

from runtime import InputError, load_checkpoint, rank, world_size

# width D, blocks, heads: DeiT's tiny and small, ViT's base, large and huge; nano is ours, for the demo.
SIZES = {
    "nano": dict(dim=64, depth=4, heads=2),
    "tiny": dict(dim=192, depth=12, heads=3),
    "small": dict(dim=384, depth=12, heads=6),
    "base": dict(dim=768, depth=12, heads=12),
    "large": dict(dim=1024, depth=24, heads=16),
    "huge": dict(dim=1280, depth=32, heads=16),
}
HALF = (0.5, 0.5, 0.5)                                     # BEiT's input statistics: pixels stay in [-1, 1]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # MoCo v3's, torchvision's


# ------------------------------------------------------------------------------------------------
# Vision Transformer. Module and parameter names are BEiT's own, so that its files load unchanged.

def relative_position_index(h, w, device=None):
    """Row of the bias table for each pair of tokens (BEiT, sec. 2.2), class token first → (1+N, 1+N)."""
    ys, xs = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    y, x = ys.flatten(), xs.flatten()                                               # (N,)
    dy, dx = y[:, None] - y[None, :] + h - 1, x[:, None] - x[None, :] + w - 1       # (N, N), from 0
    last = (2 * h - 1) * (2 * w - 1) + 2
    index = torch.full((h * w + 1, h * w + 1), last, device=device)                 # class → class
    index[1:, 1:] = dy * (2 * w - 1) + dx
    index[0, 1:] = last - 2                                                         # class → patch
    index[1:, 0] = last - 1                                                         # patch → class
    return index


cached_position_index = functools.lru_cache(maxsize=1)(relative_position_index)  # for images of another size


def bias_table(grid, heads):
    """A learned bias for each relative position of a square grid, and head."""
    return nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))


def position_bias(table, h, w, index):
    """A table's biases for the logits of h × w patches, by relative_position_index(h, w) → (1, heads, 1+N, 1+N)."""
    if h != w or len(table) != (2 * h - 1) ** 2 + 3:
        table = resize_bias_table(table, h, w)
    return table[index].permute(2, 0, 1).contiguous().unsqueeze(0)                   # fused kernels want rows of it


class RelativePositionBias(nn.Module):
    """The bias that all blocks share."""

    def __init__(self, grid, heads):
        super().__init__()
        self.relative_position_bias_table = bias_table(grid, heads)

    def forward(self, h, w, index):
        return position_bias(self.relative_position_bias_table, h, w, index)


class Attention(nn.Module):
    """Multi-head self-attention, with a relative position bias of its own (positions="block"),
    the one that all blocks share ("shared") or none ("absolute": MoCo v3's plain ViT)."""

    def __init__(self, dim, heads, grid, positions):
        super().__init__()
        self.heads, self.positions = heads, positions
        if positions == "block":                    # its table lies in the attention itself, as in BEiT
            self.relative_position_bias_table = bias_table(grid, heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=positions == "absolute")
        if positions != "absolute":                                 # BEiT's keys have no bias
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, places=None):
        """x (B, 1+N, D); places: with positions="block" what position_bias needs beside the table, with "shared" the
        bias itself."""
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits_bias = position_bias(self.relative_position_bias_table, *places) if self.positions == "block" else places
        if logits_bias is not None:
            logits_bias = logits_bias.to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=logits_bias)          # (B, heads, 1+N, D/heads)
        return self.proj(x.transpose(1, 2).flatten(2))                              # (B, 1+N, D)


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with layer scale (0: none) and drop path."""

    def __init__(self, dim, heads, grid, positions, layer_scale, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, grid, positions)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.layer_scale = layer_scale
        if layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x, places=None):
        gamma_1, gamma_2 = (self.gamma_1, self.gamma_2) if self.layer_scale else (1.0, 1.0)
        x = x + self.drop_path(gamma_1 * self.attn(self.norm1(x), places))
        return x + self.drop_path(gamma_2 * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)                         # (B, N, D)


class VisionTransformer(nn.Module):
    """BEiT's ViT, or MoCo v3's with positions="absolute".

    image_size, patch_size: pixels; dim, depth, heads: see SIZES. Images of any other size are taken too:
        padded to whole patches (grey, on the right and below), positions interpolated.
    positions: "shared" relative position bias (BEiT's pre-training), one for each "block" (BEiT's
        fine-tuning), or "absolute": fixed sine-cosine (MoCo v3).
    layer_scale: its initial value, 0 for none. drop_path: rate of the last block, rising from 0.
    codes: K of the codebook: masked image modelling, forward(images, mask) → (M, K).
    classes: classification, forward(images) → (B, classes), from the "mean" of the patches or the
        "cls" token (pool).
    With neither, forward(images) → normalised tokens (B, 1+N, D).
    mean, std: the statistics of the network's inputs; pixels come in [-1, 1] all the same.
    """

    def __init__(self, image_size=224, patch_size=16, dim=768, depth=12, heads=12, positions="shared",
                 layer_scale=0.1, drop_path=0.0, codes=0, classes=0, pool="mean", mean=HALF, std=HALF):
        super().__init__()
        if image_size % patch_size:
            raise InputError(f"image size {image_size} is no multiple of patch size {patch_size}: "
                             f"try {image_size // patch_size * patch_size or patch_size}")
        self.grid, self.image_size, self.patch_size, self.pool = image_size // patch_size, image_size, patch_size, pool
        self.checkpoint_activations = False
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)) if codes else None
        self.rel_pos_bias = RelativePositionBias(self.grid, heads) if positions == "shared" else None
        if positions == "absolute":
            self.register_buffer("pos_embed", sincos_positions(self.grid, dim))     # (1, 1+N, D)
        else:
            self.register_buffer("relative_position_index", relative_position_index(self.grid, self.grid), persistent=False)
        self.absolute = positions == "absolute"
        self.blocks = nn.ModuleList(
            Block(dim, heads, self.grid, positions, layer_scale, drop_path * i / max(depth - 1, 1))
            for i in range(depth))
        mean_pooled = classes and pool == "mean"
        self.norm = nn.Identity() if mean_pooled else nn.LayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if mean_pooled else None
        self.lm_head = nn.Linear(dim, codes) if codes else None
        self.head = nn.Linear(dim, classes) if classes else None
        self.initialize()

    def initialize(self):
        """BEiT's: normal of 0.02 truncated there, residual branches scaled down with depth, head × 0.001.
        With fixed positions MoCo v3's for the weights: Xavier's, of queries, keys and values each by itself."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                if self.absolute:
                    for weight in module.weight.detach().flatten(1).chunk(3 if name.endswith("qkv") else 1):
                        nn.init.xavier_uniform_(weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.mask_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
        with torch.no_grad():
            for i, block in enumerate([] if self.absolute else self.blocks, 1):
                block.attn.proj.weight /= math.sqrt(2 * i)
                block.mlp.fc2.weight /= math.sqrt(2 * i)
            if self.head is not None:
                self.head.weight *= 0.001

    def tokens(self, images, layers, mask=None):
        """Tokens after the named blocks, counted from 1: list of (B, 1+N, D)."""
        h, w = self.grid_of(images)
        bottom, right = h * self.patch_size - images.shape[2], w * self.patch_size - images.shape[3]
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        x = self.patch_embed(((images + 1) / 2 - self.mean) / self.std)              # (B, N, D)
        if mask is not None:
            x = torch.where(mask.flatten(1).unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], 1)    # (B, 1+N, D)
        if self.absolute:
            x = x + (self.pos_embed if (h, w) == (self.grid, self.grid) else resize_positions(self.pos_embed, h, w))
            places = None
        else:
            own = (h, w) == (self.grid, self.grid)
            places = h, w, self.relative_position_index if own else cached_position_index(h, w, x.device)
            if self.rel_pos_bias is not None:                                       # one for all blocks
                places = self.rel_pos_bias(*places)
        outputs = {}
        for layer, block in enumerate(self.blocks[:max(layers)], 1):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, places, use_reentrant=False)
            else:
                x = block(x, places)
            if layer in layers:
                outputs[layer] = x
        return [outputs[layer] for layer in layers]

    def grid_of(self, images):
        """Patches of images (B, 3, H, W), down and across: (h, w)."""
        return tuple(-(-side // self.patch_size) for side in images.shape[2:])

    def features(self, images, layers):
        """Patch features after the named blocks, counted from 1: list of (B, D, h, w)."""
        return [x[:, 1:].mT.unflatten(2, self.grid_of(images)) for x in self.tokens(images, layers)]

    def forward(self, images, mask=None):
        x = self.tokens(images, [len(self.blocks)], mask)[0]
        if mask is not None:
            return self.lm_head(self.norm(x[:, 1:][mask.flatten(1)]))               # (M, K)
        x = self.norm(x)                                                            # (B, 1+N, D)
        if self.head is None:
            return x
        return self.head(self.fc_norm(x[:, 1:].mean(1)) if self.pool == "mean" else x[:, 0])


def sincos_positions(grid, dim):
    """Fixed 2-D sine-cosine embedding (MoCo v3, sec. 4), zero for the class token → (1, 1+N, D)."""
    omega = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    x, y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega               # (N, D/4)
    patches = torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], 1)                    # (N, D), in the official files' order
    return torch.cat([torch.zeros(1, dim), patches]).unsqueeze(0)


def param_groups(model, weight_decay, layer_decay=1.0, vit=""):
    """Optimizer groups with names and an "lr_scale", as BEiT makes them.

    No weight decay on vectors and on the class and position embeddings. A block's lr is that of the
    head times layer_decay for each layer between: embeddings are layer 0, block i (from 1) layer i,
    what follows the blocks the last, depth + 1; the shared position bias counts as the last too.
    vit: name of the ViT in the model where the model is more; the rest of it counts as the last.
    """
    depth, groups, prefix = len(model.get_submodule(vit).blocks), {}, vit and f"{vit}."
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if own.startswith("blocks."):
            layer = int(own.split(".")[1]) + 1
        else:
            embeds = own.startswith(("patch_embed", "cls_token", "mask_token", "pos_embed"))
            layer = 0 if embeds else depth + 1
        decay = 0.0 if parameter.ndim == 1 or own in ("cls_token", "pos_embed") else weight_decay
        group = groups.setdefault((layer, decay), dict(
            params=[], weight_decay=decay, lr_scale=layer_decay ** (depth + 1 - layer)))
        group["params"].append((name, parameter))
    return list(groups.values())


def load(path, stages=("teacher", "tokenizer", "pretrain", "finetune")):
    """The network of a run or checkpoint, ready to use: a VQTokenizer of tokenizer.py's, a VisionTransformer of
    teacher.py's, pretrain.py's and finetune.py's → in eval mode, on the CPU, with .preprocess: PIL image → (3, H, W).
    Raises InputError where it is of none of these stages."""
    from data import eval_transform                                                 # for users alone: no stage comes here

    state = load_checkpoint(path, stages)
    model = (VQTokenizer if state["stage"] == "tokenizer" else VisionTransformer)(**state["model_args"])
    model.load_state_dict(trained_weights(state))
    model.preprocess = eval_transform(model.image_size, state["args"].get("eval_crop", 0.875))
    return model.eval().requires_grad_(False)


def trained_weights(state):
    """What was evaluated in training: the average of the weights where there is one."""
    if "ema" not in state:
        return state["model"]
    return {k.removeprefix("module."): v for k, v in state["ema"].items() if k.startswith("module.")}


def transfer(source, state, arguments, **task):
    """A ViT for a new task from another's checkpoint: of teacher.py, pretrain.py or finetune.py, or a file of timm's,
    BEiT's or MoCo v3's → (the ViT, its arguments, names of the weights that are not in the checkpoint).

    source: what messages call the checkpoint; state: its dict, {}: all weights are random. arguments: of
    VisionTransformer, where the checkpoint does not say; task: arguments of the new one. Raises InputError where the
    checkpoint is of something else.
    """
    if state.get("stage") in ("teacher", "pretrain", "finetune"):
        arguments, weights = state["model_args"], trained_weights(state)
    elif state.get("stage"):
        raise InputError(f"{source}: found a checkpoint of {state['stage']}, expected one of teacher, pretrain or finetune")
    else:
        weights = bare(state.get("model", state.get("state_dict", state)))
        if "pos_embed" in weights:
            arguments = dict(arguments, positions="absolute", layer_scale=0.0, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    arguments = {k: v for k, v in arguments.items() if k != "codes"} | task
    if arguments["positions"] == "shared":                          # BEiT: one bias for each block from here on
        arguments["positions"] = "block"
    model = VisionTransformer(**arguments)
    try:
        return model, arguments, load_backbone(model, weights) if weights else list(model.state_dict())
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def bare(weights):
    """Another project's weights by their own names: without the prefixes of DDP, torch.compile and MoCo v3."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod.", "base_encoder."):
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)} or weights
    return weights


def load_backbone(model, state):
    """Load a ViT's weights into another for a new task: ours, timm's, BEiT's or MoCo v3's.

    Copies a shared position bias into every block where the model has one a block, interpolates
    positions to another grid, and leaves the new task's own layers as initialised. Returns the names of
    those; raises InputError where the architectures differ.
    """
    own = model.state_dict()
    heads = ("head.", "lm_head.", "fc_norm.", "norm.", "mask_token")                # may differ by task
    state = {k: v for k, v in state.items() if not k.endswith(("relative_position_index", "k_bias"))}
    shared = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        for key in own:
            if key.endswith("relative_position_bias_table"):
                state[key] = shared
    for key in [k for k in state if k in own and state[k].shape != own[k].shape]:
        if key.endswith("relative_position_bias_table") and state[key].shape[1] == own[key].shape[1]:
            state[key] = resize_bias_table(state[key], model.grid, model.grid)
        elif key == "pos_embed":
            state[key] = resize_positions(state[key], model.grid, model.grid)
        elif key.startswith(heads):
            del state[key]
        else:
            raise InputError(f"{key}: expected {tuple(own[key].shape)}, found {tuple(state[key].shape)}")
    missing, unexpected = model.load_state_dict(state, strict=False)
    for kind, keys in (("lacks", missing), ("has", unexpected)):
        wrong = [k for k in keys if not k.startswith(heads)]
        if wrong:
            raise InputError(f"another architecture: it {kind} {wrong[0]}"
                             + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""))
    return missing


@torch.compiler.disable                                    # it would trace the bisection below
def resize_bias_table(table, h, w):
    """A square grid's bias table, of (2g − 1)² + 3 rows, for h × w patches; the three rows of the class token stay."""
    side = math.isqrt(len(table) - 3)                                               # 2g − 1
    image = table[:-3].float().T.unflatten(1, (side, side))                         # (heads, 2g−1, 2g−1)
    down, across = (offset_weights((side + 1) // 2, n, image.device) for n in (h, w))
    image = down @ image @ across.T                                                 # (heads, 2h−1, 2w−1)
    return torch.cat([image.flatten(1).T.to(table.dtype), table[-3:]])


@functools.lru_cache
def offset_weights(old, new, device=None):
    """Linear interpolation from the offsets −(old−1)…old−1 to −(new−1)…new−1 → (2·new − 1, 2·old − 1).

    As in BEiT the old offsets lie at 1, 1+q, 1+q+q², … on either side, with the q ≥ 1 that brings the farthest to the
    farthest: near ones keep their distance. A smaller grid (q = 1) leaves the far ones out. (Between the places BEiT
    interpolates by cubic splines.)
    """
    low, high = 1.0, float(max(new, 2))
    for _ in range(50):                                                             # bisection
        q = (low + high) / 2
        low, high = (q, high) if sum(q ** i for i in range(old - 1)) < new - 1 else (low, q)
    right = np.cumsum([low ** i for i in range(old - 1)])
    places = np.concatenate([-right[::-1], [0.0], right])
    targets = np.arange(1 - new, new)
    return torch.from_numpy(np.stack([np.interp(targets, places, row) for row in np.eye(2 * old - 1)], 1)).float().to(device)


def resize_positions(embedding, h, w):
    """A square grid's position embedding (1, 1+N, D) for h × w patches, bicubic."""
    cls_token, patches = embedding[:, :1], embedding[:, 1:]
    image = patches.mT.unflatten(2, (math.isqrt(patches.shape[1]), -1))             # (1, D, g, g)
    image = F.interpolate(image, (h, w), mode="bicubic")
    return torch.cat([cls_token, image.flatten(2).mT], 1)


class ViTPyramid(nn.Module):
    """A ViT's patch maps at a quarter, half, once and twice the patches' stride, for dense prediction (BEiT's
    segmentation): images (B, 3, H, W) → four of (B, D, ·, ·).

    They are tapped after blocks 4, 6, 8 and 12 of 12, in that proportion at other depths. GroupNorm, of 16 channels
    a group, stands in for BEiT's SyncBatchNorm (our choice): an image's result does not depend on its batch.
    """

    def __init__(self, vit):
        super().__init__()
        depth, dim = len(vit.blocks), vit.cls_token.shape[-1]
        vit.norm = nn.Identity()                                                    # blocks' outputs are not normalised
        self.vit, self.layers = vit, [max(1, round(depth * i / 12)) for i in (4, 6, 8, 12)]
        self.up4 = nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2), nn.GroupNorm(dim // 16, dim), nn.GELU(),
                                 nn.ConvTranspose2d(dim, dim, 2, 2))
        self.up2 = nn.ConvTranspose2d(dim, dim, 2, 2)

    def forward(self, images):
        first, second, third, fourth = self.vit.features(images, self.layers)       # (B, D, h, w) each
        return [self.up4(first), self.up2(second), third, F.max_pool2d(fourth, 2, ceil_mode=True)]  # (4h, 4w) … (h/2, w/2)


# ------------------------------------------------------------------------------------------------
# Block-wise masking (BEiT, algorithm 1)

def block_mask(grid, count, min_block=16, max_aspect=1 / 0.3):
    """Mask `count` of grid × grid patches in blocks → bool (grid, grid), drawn with Python's `random`.

    BEiT's generator: blocks of an area between min_block and what is left of `count`, and of an aspect
    ratio between 1/max_aspect and max_aspect. It gives up after ten blocks that do not fit, short of
    `count` in a third of its draws; here the blocks then grow by random neighbours, so that every image
    has the same number of masked patches.
    """
    mask = np.zeros((grid, grid), bool)
    masked = 0
    while masked < count:
        for _ in range(10):                                         # BEiT's number of attempts
            area = random.uniform(min_block, count - masked)        # below min_block too, towards the end
            aspect = math.exp(random.uniform(-math.log(max_aspect), math.log(max_aspect)))
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
    for _ in range(count - masked):                                 # fill up along the blocks' borders
        wide = np.pad(mask, 1)
        near = wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
        border = np.argwhere(~mask & (near | ~mask.any()))
        mask[tuple(random.choice(border))] = True
    return torch.from_numpy(mask)


# ------------------------------------------------------------------------------------------------
# Vector quantization

class Quantizer(nn.Module):
    """Nearest-neighbour codebook in L2, learned by exponential moving averages (VQ-VAE, appendix A.1).

    The codebook term ‖sg[z_e] − e‖² of VQ-VAE's loss is absent: the moving averages minimise it.
    Everything is in fp32 whatever the autocast: distances in half precision find wrong neighbours.
    In training, forward only gathers the batch's vectors; update(), called where the optimizer
    steps, moves the codebook by the global batch's: all ranks hold the same codebook at all times.

    size: K; dim: D of a code; decay of the averages: 0.99 [VQ-VAE]; revive: a code whose average use
    is below this share of the mean (our choice) starts anew at a random vector of the batch.
    """

    def __init__(self, size=8192, dim=256, decay=0.99, revive=0.01):
        super().__init__()
        self.decay, self.revive = decay, revive
        self.register_buffer("codebook", torch.zeros(size, dim))                    # e (K, D)
        self.register_buffer("count", torch.zeros(size))                            # EMA of the uses n_k
        self.register_buffer("sum", torch.zeros(size, dim))                         # EMA of Σ z_e of each code
        self.gathered = []                                                          # (z_e, codes) of micro-batches

    @torch.no_grad()
    def nearest(self, z):
        """argmin_k ‖z − e_k‖² for rows z (R, D) → (R,); in blocks, so that no R × K matrix is held."""
        norms = self.codebook.square().sum(1)                                       # ‖e‖² (‖z‖² is the same for all k)
        return torch.cat([torch.addmm(norms, rows, self.codebook.T, alpha=-2).min(1).indices for rows in z.split(1024)])

    def forward(self, z_e):
        """z_e (B, D, h, w) → z_q (straight-through), codes (B, h, w), ‖z_e − sg[e]‖² averaged."""
        with torch.autocast(z_e.device.type, enabled=False):
            z_e = z_e.to(self.codebook.dtype)
            rows = z_e.permute(0, 2, 3, 1).flatten(0, 2)                            # (R, D)
            codes = self.nearest(rows)
            if self.training:
                self.gathered.append((rows.detach(), codes))
            codes = codes.view(len(z_e), *z_e.shape[2:])                            # (B, h, w)
            e = self.lookup(codes)                                                  # (B, D, h, w)
            commitment = F.mse_loss(z_e, e)                                         # gradient to the encoder only
            return z_e + (e - z_e).detach(), codes, commitment

    def lookup(self, codes):
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2)

    @torch.no_grad()
    def initialize(self, generator):
        """Codes := random vectors of the gathered global batch, each counted as used equally."""
        vectors = torch.stack([rows for rows, _ in self.gathered])                  # (micro-batches, R, D)
        self.codebook.copy_(self.draw(vectors, len(self.codebook), generator))      # e
        self.count.fill_(vectors[..., 0].numel() * world_size() / len(self.count))
        self.sum.copy_(self.codebook * self.count[:, None])
        self.gathered.clear()

    @torch.no_grad()
    def update(self, generator):
        """One EMA step over the gathered global batch; generator: a CPU one, alike on every rank."""
        vectors = torch.stack([rows for rows, _ in self.gathered])                  # (micro-batches, R, D)
        codes = torch.cat([codes for _, codes in self.gathered])
        self.gathered.clear()
        n = torch.bincount(codes, minlength=len(self.count)).to(self.count.dtype)   # n_k
        m = torch.zeros_like(self.sum).index_add_(0, codes, vectors.flatten(0, 1))  # Σ z_e
        for total in (n, m):
            if dist.is_initialized():
                dist.all_reduce(total)
        self.count.lerp_(n, 1 - self.decay)                                         # N ← γN + (1−γ)n
        self.sum.lerp_(m, 1 - self.decay)                                           # m ← γm + (1−γ)Σz
        mean = self.count.mean()
        dead = self.count < self.revive * mean
        if dead.any():                                                              # as if used as much as the mean:
            self.sum[dead] = mean * self.draw(vectors, int(dead.sum()), generator)  # the old average would return
            self.count[dead] = mean
        used = self.count[:, None] > 1e-30                                          # --revive 0: long unused, N and m end at 0
        self.codebook.copy_(torch.where(used, self.sum / self.count[:, None], self.codebook))   # e = m / N

    def draw(self, vectors, number, generator):
        """The same `number` random rows of all ranks' vectors, different ones if there are as many → (number, D)."""
        micro_batches, rows, _ = vectors.shape
        total = micro_batches * world_size() * rows
        order = torch.randperm(total, generator=generator)
        chosen = order[torch.arange(number) % total].to(vectors.device)
        # numbered as in the global batch: micro-batch, then rank, then row
        batch, owner, row = chosen // (world_size() * rows), chosen // rows % world_size(), chosen % rows
        drawn = torch.where((owner == rank())[:, None], vectors[batch, row], 0.0)
        if dist.is_initialized():
            dist.all_reduce(drawn)
        return drawn


# ------------------------------------------------------------------------------------------------
# The tokenizer's encoder and decoder: two residual blocks at each resolution, one self-attention block
# at the lowest [PeCo]; GroupNorm, SiLU and 3×3 convolutions as in VQGAN, groups of 16 channels [ours].

def norm_act(channels):
    return nn.Sequential(nn.GroupNorm(channels // 16, channels), nn.SiLU())


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
        self.norm = nn.GroupNorm(channels // 16, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1).chunk(3, -1)    # (B, 1, h·w, C)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.squeeze(1).mT.reshape(x.shape))


class Encoder(nn.Sequential):
    """Images (B, 3, H, W) → z_e (B, D, H/s, W/s), s = 2^(len(channels) − 1)."""

    def __init__(self, channels, dim):
        layers, width = [nn.Conv2d(3, channels[0], 3, padding=1)], channels[0]
        for level, outputs in enumerate(channels):
            if level:
                layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            layers += [ResidualBlock(width, outputs), ResidualBlock(outputs, outputs)]
            width = outputs
        super().__init__(*layers, AttentionBlock(width), norm_act(width), nn.Conv2d(width, dim, 1))


class Decoder(nn.Sequential):
    """z_q (B, D, h, w) → images (B, 3, h·s, w·s): the encoder in reverse."""

    def __init__(self, channels, dim):
        width = channels[-1]
        layers = [nn.Conv2d(dim, width, 1), AttentionBlock(width)]
        for level, outputs in enumerate(reversed(channels)):
            if level:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
            layers += [ResidualBlock(width, outputs), ResidualBlock(outputs, outputs)]
            width = outputs
        super().__init__(*layers, norm_act(width), nn.Conv2d(width, 3, 3, padding=1))


class VQTokenizer(nn.Module):
    """The perceptual codebook: image → codes → image (PeCo, sec. 3).

    image_size: of its training, pixels (any other works too); channels: of each resolution, the
    first at full size, each next one at half: the stride of the codes is 2^(len(channels) − 1).
    """

    def __init__(self, image_size=224, channels=(32, 64, 128, 256, 256), codebook_size=8192, code_dim=256,
                 decay=0.99, revive=0.01):
        super().__init__()
        self.image_size, self.stride = image_size, 2 ** (len(channels) - 1)
        if image_size % self.stride:
            raise InputError(f"image size {image_size} is no multiple of the tokenizer's stride {self.stride}")
        if any(c % 16 for c in channels):
            raise InputError(f"channels {list(channels)} must be multiples of 16")
        self.encoder = Encoder(channels, code_dim)
        self.quantizer = Quantizer(codebook_size, code_dim, decay, revive)
        self.decoder = Decoder(channels, code_dim)

    def forward(self, images):
        """Images (B, 3, H, W) → reconstruction x̂ (B, 3, H, W), codes (B, h, w), commitment term."""
        z_q, codes, commitment = self.quantizer(self.encoder(images))
        return self.decoder(z_q), codes, commitment

    @torch.no_grad()
    def encode(self, images, grid=None):
        """Images (B, 3, H, W) → codes (B, h, w); resized first where another grid × grid is asked for."""
        if grid is not None and images.shape[-1] != grid * self.stride:
            images = F.interpolate(images, (grid * self.stride,) * 2, mode="bicubic", antialias=True)
        z_e = self.encoder(images).to(self.quantizer.codebook.dtype)                # (B, D, h, w)
        with torch.autocast(images.device.type, enabled=False):
            codes = self.quantizer.nearest(z_e.permute(0, 2, 3, 1).flatten(0, 2))
        return codes.view(len(z_e), *z_e.shape[2:])

    def decode(self, codes):
        """Codes (B, h, w) → images (B, 3, h·s, w·s)."""
        return self.decoder(self.quantizer.lookup(codes))


# ------------------------------------------------------------------------------------------------
# The perceptual loss

# Of torchvision's networks: the five stages' last activations as in LPIPS, the four residual stages.
CONVNET_LAYERS = {
    "vgg16": ["features.3", "features.8", "features.15", "features.22", "features.29"],
    "resnet50": ["layer1", "layer2", "layer3", "layer4"],
}


class PerceptualLoss(nn.Module):
    """L_percep = Σ_{l∈S} 1/(C_l H_l W_l) ‖f̂_l(x) − f̂_l(x̂)‖² (PeCo, sec. 3), averaged over images.

    f̂_l: features of a frozen network after layer l, at each position normalised over the channels to
    zero mean and unit variance. (The paper says "normalised" only. To unit length, as in LPIPS, the
    term would be C_l times smaller under the paper's own 1/C_l and vanish beside the pixels'.)

    network: a VisionTransformer (layers: blocks from 1; default the four quarters: 3, 6, 9, 12 of 12)
    or torchvision's "vgg16" or "resnet50" (layers: stages from 1; default all).
    """

    def __init__(self, network, layers=None):
        super().__init__()
        vit = isinstance(network, VisionTransformer)
        kind = "resnet50" if hasattr(network, "layer4") else "vgg16"
        number = len(network.blocks) if vit else len(CONVNET_LAYERS[kind])
        layers = list(layers or ([max(1, number * i // 4) for i in (1, 2, 3, 4)] if vit else range(1, number + 1)))
        if not all(1 <= layer <= number for layer in layers):
            raise InputError(f"perceptual layers {layers}: this network has layers 1 to {number}")
        self.layers, self.image_size = layers, network.image_size if vit else None
        if not vit:
            nodes = {CONVNET_LAYERS[kind][layer - 1]: str(layer) for layer in layers}
            network = create_feature_extractor(network, nodes)
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        return super().train(False)                                                 # frozen: always in eval mode

    def features(self, images):
        """f̂_l(images) of each layer: list of (B, C_l, H_l, W_l)."""
        if self.image_size is None:
            maps = self.network(((images + 1) / 2 - self.mean) / self.std).values()
        else:                                                                       # the ViT normalises its inputs itself
            if images.shape[-1] != self.image_size:                                 # not in bf16: there is no such kernel
                images = F.interpolate(images.float(), (self.image_size,) * 2, mode="bicubic", antialias=True)
            maps = self.network.features(images, self.layers)
        return [F.layer_norm(f.float().movedim(1, -1), f.shape[1:2]).movedim(-1, 1) for f in maps]

    def forward(self, x, x_hat):
        with torch.no_grad():
            target = self.features(x)
        return sum(F.mse_loss(f_hat, f) for f, f_hat in zip(target, self.features(x_hat)))
