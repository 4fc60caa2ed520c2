"""What each part costs, beside its floor: FLOPs at a matrix product's rate, bytes at a copy's.

    python -m tools.bench                         # ViT-B/16 and the tokenizer at the paper's sizes
    python -m tools.bench --peers                 # and what one would use instead, where installed
    python -m tools.bench --data data/imagenet    # and the input pipeline, on real files

All rows take turns, --repeats times. A figure is the median over the turns: of the time, and of its
ratio to the floor, whose rates are measured right before and after it: on a shared machine the
ratio wobbles less. FLOPs are the model's: the forward pass, and twice that for the backward pass.
"""
import argparse
import atexit
import contextlib
import functools
import io
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
import finetune
import pretrain
import tokenizer
from model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIZES,
    PerceptualLoss,
    Quantizer,
    VisionTransformer,
    block_mask,
    param_groups,
)
from support import checkpoint, flags, launch
from support.weights import MOCO_V3

# The paper's settings
PRETRAIN = pretrain.get_args([])
FINETUNE = finetune.get_args([])
TOKENIZER = tokenizer.get_args(["--perceptual-weight", "0"])    # the loss is a row of its own
SIDE = PRETRAIN.image_size
GRID = SIDE // PRETRAIN.patch_size
MASKED = round(PRETRAIN.mask_ratio * GRID ** 2)             # patches of an image
FILES = 32                                                  # read in one turn of the input's rows
VECTORS = 16                                                # images whose vectors are quantized


class Row(NamedTuple):
    """A line of the table: what is timed, and what it must at least take."""
    function: Callable          # returns None, or its own measurement of its seconds
    images: int                 # that it works on
    flops: int = 0
    bytes: int = 0              # read and written


def flops(function):
    """Multiplications and additions of one call of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def explicit_attention(q, k, v, attn_mask=None):
    """As BEiT writes it: logits, bias, softmax and product one after the other."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    if attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1).to(v.dtype) @ v


@contextlib.contextmanager
def beits_attention():
    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = explicit_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


class Bench:
    """Makers of the rows, at the batch size and precision of the command line."""

    def __init__(self, args):
        self.args, self.device = args, launch.device()
        self.batch = args.batch_size
        self.dtype = torch.bfloat16 if args.amp == "bf16" else torch.float32
        torch.manual_seed(0)

    def makers(self):
        """{name: maker of its Row}, those that the command line asks for."""
        part = functools.partial
        makers = {
            "ViT-B pre-training step": self.pretraining,
            "ViT-B pre-training step, --compile": part(self.pretraining, compiled=True),
            "fine-tuning step": self.finetuning,
            "tokenizer encoding": self.encoding,
            "tokenizer training step": self.tokenizer_training,
            "perceptual loss, with its backward pass": self.perceptual,
            "quantizer, 3,136 vectors, with its EMA": self.quantizer,
            "block masks": self.block_masks,
        }
        if self.args.data:
            makers |= {
                "input, 32 files": self.pipeline,
                "pretrain.py, a step with real files": self.end_to_end,
            }
        if self.args.peers:
            half = torch.float16 if self.device.type == "cuda" else None
            makers |= {
                "peer: BEiT's explicit attention": part(self.pretraining, half, beits_attention),
                "peer: transformers' BeitForMaskedImageModeling": self.transformers,
                "peer: timm's Beit, fine-tuning": self.timm,
                "peer: vector-quantize-pytorch": self.vector_quantize,
            }
        if self.args.peers and self.args.data:
            makers["peer: PIL and torchvision v2, 32 files"] = self.torchvision_pipeline
        only = self.args.only
        if self.args.repeats == 0:                          # for the memory of one row alone
            return {name: maker for name, maker in makers.items() if only == name}
        return {name: maker for name, maker in makers.items() if only in name}

    # ---- Inputs and targets

    def autocast(self, dtype=None):
        dtype = dtype or self.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def images(self):
        return torch.rand(self.batch, 3, SIDE, SIDE, device=self.device) * 2 - 1

    def labels(self):
        return torch.randint(1000, (self.batch,), device=self.device)

    def masks(self):
        masks = [block_mask(GRID, MASKED) for _ in range(self.batch)]
        return torch.stack(masks).to(self.device)

    def codes(self):
        return torch.randint(TOKENIZER.codebook_size, (self.batch * MASKED,), device=self.device)

    # ---- The ViT

    def training(self, network, optimizer, forward, target, dtype=None,
                 attention=contextlib.nullcontext):
        """A whole step: forward, backward, clipping, optimizer."""
        def step():
            with self.autocast(dtype), attention():
                loss = F.cross_entropy(forward().float(), target)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), PRETRAIN.clip)
            optimizer.step()
            optimizer.zero_grad()
        weights = sum(p.numel() for p in network.parameters() if p.requires_grad)
        # AdamW reads four numbers for each weight and writes three.
        return Row(step, self.batch, 3 * flops(forward), 4 * 7 * weights)

    def pretraining(self, dtype=None, attention=contextlib.nullcontext, compiled=False):
        network, _, _ = pretrain.build(PRETRAIN, codes=TOKENIZER.codebook_size)
        network.to(self.device)
        groups = param_groups(network, PRETRAIN.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        images, masks = self.images(), self.masks()
        row = self.training(network, optimizer, lambda: network(images, masks), self.codes(),
                            dtype, attention)
        if compiled:
            network.compile()                               # after its FLOPs are counted
        return row

    def finetuning(self):
        network, _ = finetune.build(FINETUNE, classes=1000, state=None)
        network.to(self.device)
        groups = param_groups(network, FINETUNE.weight_decay, FINETUNE.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        images = self.images()
        return self.training(network, optimizer, lambda: network(images), self.labels())

    # ---- The tokenizer and its parts

    def tokenizer(self):
        """One with random codes."""
        network, *_ = tokenizer.build(TOKENIZER, None)
        nn.init.normal_(network.quantizer.codebook)
        return network.to(self.device, memory_format=torch.channels_last).train()

    def perceptual_loss(self):
        """By a ViT-B that is not trained."""
        return PerceptualLoss(VisionTransformer(**SIZES["base"], **MOCO_V3)).to(self.device)

    def perceptual_flops(self, perceptual, images):
        """Of x once; of x̂ once and, backward, once more: the weights need no gradient."""
        return 3 * flops(lambda: perceptual.features(images))

    def encoding(self):
        network, images = self.tokenizer().eval(), self.images()

        def encode():
            with self.autocast():
                network.encode(images)
        return Row(encode, self.batch, flops(encode))

    def tokenizer_training(self):
        network, perceptual = self.tokenizer(), self.perceptual_loss()
        optimizer = torch.optim.Adam(network.parameters(), lr=TOKENIZER.lr, fused=True)
        images, generator = self.images(), torch.Generator()
        work = 3 * flops(lambda: network(images)) + self.perceptual_flops(perceptual, images)
        network.quantizer.initialize(generator)             # by the vectors of that call

        def step():
            with self.autocast():
                x_hat, _, l_commit = network(images)
                l_pixel = F.mse_loss(x_hat.float(), images)
                l_percep = perceptual(images, x_hat)
                loss = l_pixel + l_percep + TOKENIZER.commitment_weight * l_commit
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            network.quantizer.update(generator)
        return Row(step, self.batch, work)

    def perceptual(self):
        perceptual = self.perceptual_loss()
        x, x_hat = self.images(), self.images().requires_grad_()

        def step():
            with self.autocast():
                perceptual(x, x_hat).backward()
        return Row(step, self.batch, self.perceptual_flops(perceptual, x))

    def quantizer(self):
        size, dim = TOKENIZER.codebook_size, TOKENIZER.code_dim
        quantizer, generator = Quantizer(size, dim).to(self.device).train(), torch.Generator()
        z = torch.randn(VECTORS, dim, GRID, GRID, device=self.device)
        quantizer(z)
        quantizer.initialize(generator)

        def step():
            quantizer(z)
            quantizer.update(generator)
        # The codebook is written; its averages, of the same size, are read and written.
        return Row(step, VECTORS, 2 * VECTORS * GRID ** 2 * size * dim, 4 * 5 * size * dim)

    def block_masks(self):
        return Row(self.masks, self.batch)

    # ---- The input pipeline: JPEG files → an augmented batch, on one core

    def reading(self, read, dataset):
        def run():
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            for index in range(FILES):
                read(index % len(dataset))
            torch.set_num_threads(threads)
        return Row(run, FILES)

    def pipeline(self):
        dataset = data.load_dataset(self.args.data, "train", SIDE)
        transform = data.crop_and_flip(SIDE)
        samples = data.Samples(dataset, transform, seed=0)
        return self.reading(lambda index: samples[0, index], dataset)

    def end_to_end(self):
        """pretrain.py on real files, with a tokenizer of the paper's size that is not trained."""
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder)
        network, _, _, model_args = tokenizer.build(TOKENIZER, None)
        nn.init.normal_(network.quantizer.codebook)
        checkpoint.write(folder / "tokenizer.pt", dict(
            stage="tokenizer", step=0, epoch=0, best=None, optimizer={},
            args=dict(eval_crop=TOKENIZER.eval_crop),
            model=network.state_dict(), model_args=model_args))
        output = folder / "run"
        flags = dict(data=self.args.data, tokenizer=folder / "tokenizer.pt", output=output,
                     batch_size=self.batch, amp=self.args.amp, steps=4, log_every=2)
        args = pretrain.get_args([f"--{name.replace('_', '-')}={value}"
                                  for name, value in flags.items()])

        def run():
            # tqdm needs a file; the evaluation at the end is not timed
            with (contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()),
                  mock.patch.object(pretrain, "evaluate", return_value={})):
                pretrain.main(args)
            rows = map(json.loads, (output / "log.jsonl").read_text().splitlines())
            rates = [row["images_per_s"] for row in rows if "images_per_s" in row]
            shutil.rmtree(output)
            return self.batch / rates[-1]                   # seconds a step, of the last two
        return Row(run, self.batch)

    # ---- Peers, with PyTorch's default AdamW

    def transformers(self):
        from transformers import BeitConfig, BeitForMaskedImageModeling
        config = BeitConfig(use_mask_token=True, use_shared_relative_position_bias=True)
        network = BeitForMaskedImageModeling(config).to(self.device).train()
        images, masks = self.images(), self.masks().flatten(1)

        def forward():
            return network(images, bool_masked_pos=masks).logits[masks]
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        row = self.training(network, optimizer, forward, self.codes())
        return row._replace(flops=self.pretraining().flops)     # it computes all patches' logits

    def timm(self):
        import timm
        network = timm.create_model("beit_base_patch16_224", pretrained=False,
                                    drop_path_rate=FINETUNE.drop_path).to(self.device)
        images = self.images()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        return self.training(network, optimizer, lambda: network(images), self.labels())

    def vector_quantize(self):
        from vector_quantize_pytorch import VectorQuantize
        network = VectorQuantize(
            dim=TOKENIZER.code_dim, codebook_size=TOKENIZER.codebook_size, decay=TOKENIZER.decay,
            commitment_weight=TOKENIZER.commitment_weight, threshold_ema_dead_code=1)
        network.to(self.device).train()
        z = torch.randn(VECTORS, GRID ** 2, TOKENIZER.code_dim, device=self.device)
        return Row(lambda: network(z), VECTORS, self.quantizer().flops)

    def torchvision_pipeline(self):
        """PIL decoding and torchvision v2, image by image, to normalised floats."""
        T, jitter = torchvision.transforms.v2, PRETRAIN.jitter
        dataset = data.load_dataset(self.args.data, "train", SIDE)
        transform = T.Compose([
            T.RandomResizedCrop(SIDE, (PRETRAIN.crop_min, 1), interpolation=data.BICUBIC),
            T.RandomHorizontalFlip(),
            T.ColorJitter(jitter, jitter, jitter),
            T.PILToTensor(),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ])
        return self.reading(lambda index: transform(dataset[index][0].convert("RGB")), dataset)


# ------------------------------------------------------------------------------------------------
# Measuring

def seconds(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    own = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return own if isinstance(own, float) else time.perf_counter() - begun


def limits(device, dtype):
    """A function that measures (FLOP/s of a square matrix product, bytes/s of a copy)."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    source = torch.randn(64 * 2 ** 20, device=device)
    target = torch.empty_like(source)

    def median(function):
        return statistics.median(seconds(function, device) for _ in range(5))

    def rates():
        product = median(lambda: a @ b)
        copy = median(lambda: target.copy_(source))
        return 2 * size ** 3 / product, 2 * source.nbytes / copy
    return rates


def measure(rows, repeats, device, dtype):
    """{name: (median seconds, median share of the floor)}; FLOP/s and bytes/s of the limits."""
    rates = limits(device, dtype)
    times = {name: [] for name in rows}
    shares = {name: [] for name in rows}
    during = []                                             # the limits' rates beside each time
    for turn in range(repeats + 1):                         # the first one warms up
        before = rates()
        for name, row in rows.items():
            taken = seconds(row.function, device)
            after = rates()
            rate, bandwidth = map(statistics.mean, zip(before, after, strict=True))
            before = after
            if turn > 0:
                during.append((rate, bandwidth))
                times[name].append(taken)
                shares[name].append((row.flops / rate + row.bytes / bandwidth) / taken)
    results = {name: (statistics.median(times[name]), statistics.median(shares[name]))
               for name in rows}
    return results, *map(statistics.median, zip(*during, strict=True))


def peak_of(function, device):
    """GiB of this process after two calls."""
    function()
    function()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    status = Path("/proc/self/status").read_text()          # ru_maxrss would begin at the parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 2 ** 20


def peak(name):
    """GiB of a process that does nothing but this row."""
    command = [sys.executable, "-m", "tools.bench", *sys.argv[1:], "--only", name, "--repeats", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else math.nan


def get_args(argv=None):
    gpu = torch.cuda.is_available()
    p = flags.Parser("tools.bench", __doc__,
                       formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--batch-size", type=flags.positive, default=64 if gpu else 8,
                   help="images of a step")
    p.add_argument("--amp", choices=["fp32", "bf16"], default="bf16" if gpu else "fp32",
                   help="precision")
    p.add_argument("--repeats", type=flags.count, default=7,
                   help="turns; 0: only print the peak memory of the row --only, in GiB")
    p.add_argument("--data", help="ImageFolder of photographs: also the input pipeline and "
                                  "pretrain.py end to end")
    p.add_argument("--peers", action="store_true", help="also what one would use instead")
    p.add_argument("--only", default="", help="rows whose name has this in it")
    p.add_argument("--memory", action="store_true",
                   help="also each row's peak memory, in a process of its own")
    return p.parse_args(argv)


def main(args):
    bench, rows = Bench(args), {}
    for name, make in bench.makers().items():
        try:
            rows[name] = make()
        except ImportError as error:
            print(f"{name}: {error.name} is not installed", file=sys.stderr)
    if not rows:
        raise launch.InputError(f"--only {args.only}: no such row")
    if args.repeats == 0:
        print(peak_of(rows[args.only].function, bench.device))
        return
    results, rate, bandwidth = measure(rows, args.repeats, bench.device, bench.dtype)
    images = {name: row.images for name, row in rows.items()}

    print(f"{launch.hardware()}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
          f"{torch.get_num_threads()} threads, batch {args.batch_size}, {args.amp}: matrix product "
          f"{rate / 1e12:.3g} TFLOP/s, copy {bandwidth / 1e9:.3g} GB/s\n")
    header = ["", "ms", "images/s", "share of the floor"]
    if args.memory:
        header.append("peak GiB")
        rows.clear()                                        # their own processes need the room
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for name, (taken, share) in results.items():
        cells = [name, f"{1000 * taken:.4g}", f"{images[name] / taken:.4g}",
                 f"{share:.0%}" if share else ""]
        if args.memory:
            cells.append(f"{peak(name):.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    launch.launch_tool("bench", lambda: main(get_args()))
