"""What a step costs, beside what one would use instead where it is installed.

    python -m tools.bench                         # ViT-B/16 and the tokenizer at the paper's sizes
    python -m tools.bench --data data/imagenet    # and reading real files

All rows of a group take turns, once to warm up and then --repeats times. A figure is the median: of
the time, and of its ratio to the group's first row in the same turn, which wobbles less.
"""
import statistics
import time
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import data
import finetune
import pretrain
import tokenizer
from model import Quantizer, block_mask
from support import flags, launch

# The paper's settings, but for the perceptual loss, which needs weights.
PRETRAIN, FINETUNE = pretrain.get_args([]), finetune.get_args(["--init", "none"])
SHARED = pretrain.get_args(["--positions", "shared", "--layer-scale", "0.1"])   # BEiT's other ViT
TOKENIZER = tokenizer.get_args(["--perceptual-weight", "0"])
SIDE = PRETRAIN.image_size
GRID = SIDE // PRETRAIN.patch_size
MASKED = round(PRETRAIN.mask_ratio * GRID ** 2)             # patches
FILES, VECTORS = 32, 16         # images that are read, and quantized, in one turn; our choice


def explicit_attention(q, k, v, attn_mask=None):
    """As BEiT writes it: logits, bias, softmax and product one after the other."""
    bias = 0 if attn_mask is None else attn_mask
    return ((q * q.shape[-1] ** -0.5) @ k.mT + bias).softmax(-1).to(v.dtype) @ v


def training_step(args, network, forward, target):
    """Forward, backward, clipping and AdamW."""
    network.to(target.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step():
        with launch.autocast(args, target.device):
            loss = F.cross_entropy(forward().float(), target)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), PRETRAIN.clip)
        optimizer.step()
        optimizer.zero_grad()
    return step


def pretraining(args, images):
    masks = torch.stack([block_mask(GRID, MASKED) for _ in images]).to(images.device)
    codes = torch.randint(TOKENIZER.codebook_size, (int(masks.sum()),), device=images.device)
    network = pretrain.build(PRETRAIN, codes=TOKENIZER.codebook_size)[0]
    step = training_step(args, network, lambda: network(images, masks), codes)
    yield "ViT-B pre-training step", step
    other = pretrain.build(SHARED, codes=TOKENIZER.codebook_size)[0]
    yield "with a shared position bias and layer scale", training_step(
        args, other, lambda: other(images, masks), codes)
    explicit = mock.patch.object(F, "scaled_dot_product_attention", explicit_attention)
    yield "BEiT's explicit attention", explicit(step)
    from transformers import BeitConfig, BeitForMaskedImageModeling
    config = BeitConfig(use_mask_token=True, use_absolute_position_embeddings=True,
                        layer_scale_init_value=0.0)         # the same ViT
    peer, flat = BeitForMaskedImageModeling(config).train(), masks.flatten(1)
    yield "transformers' BeitForMaskedImageModeling", training_step(
        args, peer, lambda: peer(images, bool_masked_pos=flat).logits[flat], codes)


def finetuning(args, images):
    labels = torch.randint(1000, (args.batch_size,), device=images.device)
    network = finetune.build(FINETUNE, classes=1000, state=None)[0]
    yield "fine-tuning step", training_step(args, network, lambda: network(images), labels)
    import timm
    peer = timm.create_model("beit_base_patch16_224", drop_path_rate=FINETUNE.drop_path,
                             use_abs_pos_emb=True, use_rel_pos_bias=False, init_values=0.0)
    yield "timm's Beit", training_step(args, peer, lambda: peer(images), labels)


def codes(args, images):
    network = tokenizer.build(TOKENIZER, None)[0]
    network.to(images.device, memory_format=torch.channels_last)
    nn.init.normal_(network.quantizer.codebook)
    optimizer = torch.optim.Adam(network.parameters(), lr=TOKENIZER.lr, fused=True)
    generator = torch.Generator()

    @torch.no_grad()
    def encode():
        with launch.autocast(args, images.device):
            network.eval().encode(images)

    def step():
        with launch.autocast(args, images.device):
            x_hat, _, l_commit = network.train()(images)
            loss = F.mse_loss(x_hat.float(), images) + TOKENIZER.commitment_weight * l_commit
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        network.quantizer.update(generator)
    yield "tokenizer encoding", encode
    yield "tokenizer step, without L_percep", step


def quantizing(args, images):
    size, dim = TOKENIZER.codebook_size, TOKENIZER.code_dim
    quantizer, generator = Quantizer(size, dim).to(images.device), torch.Generator()
    z = torch.randn(VECTORS, dim, GRID, GRID, device=images.device)
    quantizer(z)
    quantizer.initialize(generator)

    def step():
        quantizer(z)
        quantizer.update(generator)
    yield f"quantizer with its EMA, {VECTORS} images", step
    from vector_quantize_pytorch import VectorQuantize
    peer = VectorQuantize(dim=dim, codebook_size=size, decay=TOKENIZER.decay).to(images.device)
    yield "vector-quantize-pytorch", lambda: peer(z.flatten(2).mT.contiguous())


def reading(args, images):
    """JPEG files → augmented images, in one process."""
    dataset = data.load_images(args.data, "train", SIDE)
    crop = data.crop_and_flip(SIDE, PRETRAIN.crop_min)      # the jitter is the device's
    samples = data.Samples(dataset, crop, seed=0)
    indices = [index % len(dataset) for index in range(FILES)]
    yield f"pretrain.py's input, {FILES} files", lambda: [samples[0, index] for index in indices]
    from timm.data import create_transform
    peer = create_transform(SIDE, is_training=True, color_jitter=PRETRAIN.jitter,
                            auto_augment=None, interpolation="bicubic")
    yield "timm's input", lambda: [peer(dataset[i][0].convert("RGB")) for i in indices]


def seconds(function):
    begun = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def get_args(argv=None):
    gpu = torch.cuda.is_available()
    p = flags.Parser("tools.bench", __doc__)
    p.add_argument("--batch-size", type=flags.positive, default=64 if gpu else 8,
                   help="images of a step; default: 64 on a GPU, else 8")
    p.add_argument("--amp", choices=["fp32", "bf16"], default="bf16" if gpu else "fp32",
                   help="precision; default: bf16 on a GPU, else fp32")
    p.add_argument("--repeats", type=flags.positive, default=7, help="turns; default: 7")
    p.add_argument("--data", help="folder of photographs, as pretrain.py's: also reads them")
    return p.parse_args(argv)


def main(args):
    torch.manual_seed(0)
    images = torch.rand(args.batch_size, 3, SIDE, SIDE, device=launch.device()) * 2 - 1
    print(launch.hardware(), f"PyTorch {torch.__version__}, {len(images)} images, {args.amp}\n")
    print("| | ms | time / that of its group's first |\n| --- | --- | --- |")
    for group in [pretraining, finetuning, codes, quantizing] + [reading] * bool(args.data):
        rows = []
        try:
            rows.extend(group(args, images))
        except ImportError as error:
            launch.warn(f"{group.__name__}: {error.name} is not installed")
        turns = [[seconds(function) for _, function in rows] for _ in range(1 + args.repeats)]
        for i, (name, _) in enumerate(rows):
            taken = statistics.median(turn[i] for turn in turns[1:])
            ratio = statistics.median(turn[i] / turn[0] for turn in turns[1:])
            print(f"| {name} | {1000 * taken:.4g} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    launch.launch_tool("bench", lambda: main(get_args()))
