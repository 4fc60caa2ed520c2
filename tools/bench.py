"""What each part costs, beside its floor: FLOPs over the rate of a large matrix product, bytes over the bandwidth of a
copy, both measured in the same run.

    python -m tools.bench                          # ViT-B/16 and the tokenizer at the paper's sizes, 224 px
    python -m tools.bench --peers                  # and what one would use instead, where it is installed
    python -m tools.bench --data data/imagenet     # the input pipeline, and pretrain.py end to end, on real files

All rows take turns, --repeats times; each figure is the median over the turns, of the time and of its ratio to the floor
measured right before and after it: on a shared machine the ratio wobbles less. FLOPs are the model's: forward and twice that backward.
"""
import argparse
import atexit
import contextlib
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
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
import pretrain
import runtime
import tokenizer
from model import (IMAGENET_MEAN, IMAGENET_STD, SIZES, PerceptualLoss, Quantizer, VisionTransformer, VQTokenizer, block_mask,
                   param_groups)

PAPER, CODES = pretrain.RECIPES["paper"], tokenizer.RECIPES["paper"]


def flops(function):
    """Of one call of a forward pass, multiplications and additions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def explicit_attention(q, k, v, attn_mask=None):
    """As BEiT writes it: logits, bias, softmax and product one after the other."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    return (logits if attn_mask is None else logits + attn_mask).softmax(-1).to(v.dtype) @ v


@contextlib.contextmanager
def beits_attention():
    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = explicit_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


# ------------------------------------------------------------------------------------------------
# Rows: name → (function to time, FLOPs, bytes that it must move)

class Bench:
    def __init__(self, args):
        self.args, self.device = args, runtime.device()
        self.batch, self.dtype = args.batch_size, dict(fp32=torch.float32, bf16=torch.bfloat16)[args.amp]
        torch.manual_seed(0)

    def autocast(self, dtype=None):
        dtype = dtype or self.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def images(self, number=None):
        return torch.rand(number or self.batch, 3, 224, 224, device=self.device) * 2 - 1

    def training(self, network, loss_of, forward, dtype=None, groups=None, **options):
        """A whole step of a network: forward, backward, clipping, AdamW."""
        optimizer = torch.optim.AdamW(groups or network.parameters(), lr=1e-4, **options)

        def step():
            with self.autocast(dtype):
                loss = loss_of()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 3.0)
            optimizer.step()
            optimizer.zero_grad()
        parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
        return step, 3 * flops(forward), 4 * 7 * parameters  # AdamW reads four and writes three numbers for each weight

    def vit(self, **changes):
        return VisionTransformer(**SIZES["base"], **changes).to(self.device)

    def pretraining(self, dtype=None, way=contextlib.nullcontext, compiled=False):
        network, images = self.vit(codes=CODES["codebook_size"], drop_path=0.1), self.images()
        mask = torch.stack([block_mask(14, 75) for _ in range(self.batch)]).to(self.device)
        target = torch.randint(CODES["codebook_size"], (self.batch * 75,), device=self.device)

        def loss():
            with way():
                return F.cross_entropy(network(images, mask).float(), target)
        row = self.training(network, loss, lambda: network(images, mask), dtype, param_groups(network, 0.05), fused=True)
        if compiled:
            network.compile()                               # after its FLOPs are counted
        return row

    def finetuning(self):
        network, images = self.vit(classes=1000, positions="block", drop_path=0.1), self.images()
        labels = torch.randint(1000, (self.batch,), device=self.device)
        return self.training(network, lambda: F.cross_entropy(network(images).float(), labels), lambda: network(images),
                             groups=param_groups(network, 0.05, 0.65), fused=True)

    def tokenizer(self):
        network = VQTokenizer(channels=CODES["channels"]).to(self.device, memory_format=torch.channels_last).train()
        nn.init.normal_(network.quantizer.codebook)
        return network

    def encoding(self):
        network, images = self.tokenizer().eval(), self.images()

        def encode():
            with self.autocast():
                return network.encode(images)
        return encode, flops(encode), 0

    def tokenizer_training(self):
        network, images = self.tokenizer(), self.images()
        frozen = VisionTransformer(**SIZES["base"], positions="absolute", layer_scale=0.0)
        perceptual, generator = PerceptualLoss(frozen).to(self.device), torch.Generator()
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-5, betas=tuple(CODES["betas"]), fused=True)
        network.quantizer(network.encoder(images))
        network.quantizer.initialize(generator)

        def step():
            with self.autocast():
                x_hat, _, commitment = network(images)
                loss = F.mse_loss(x_hat.float(), images) + 0.25 * commitment + perceptual(images, x_hat)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            network.quantizer.update(generator)

        def forward():
            network.quantizer.lookup(network.encode(images))
            network.decoder(torch.zeros(self.batch, CODES["code_dim"], 14, 14, device=self.device))
        vit = flops(lambda: frozen.tokens(images, [12]))    # once for x, once and its backward pass to the image for x̂
        return step, 3 * flops(forward) + 3 * vit, 0

    def perceptual(self):
        loss = PerceptualLoss(VisionTransformer(**SIZES["base"], positions="absolute", layer_scale=0.0)).to(self.device)
        x, x_hat = self.images(), self.images().requires_grad_()

        def step():
            with self.autocast():
                loss(x, x_hat).backward()
        return step, 3 * flops(lambda: loss.network.tokens(x, [12])), 0

    def quantizer(self, rows=3136):
        network, generator = Quantizer(CODES["codebook_size"], CODES["code_dim"]).to(self.device).train(), torch.Generator()
        z = torch.randn(rows // 196, CODES["code_dim"], 14, 14, device=self.device)
        network(z)
        network.initialize(generator)

        def step():
            network(z)
            network.update(generator)
        return step, 2 * rows * CODES["codebook_size"] * CODES["code_dim"], 4 * 5 * network.codebook.numel()

    def masks(self):
        return lambda: [block_mask(14, 75) for _ in range(self.batch)], 0, 0

    # ---- The input pipeline: JPEG files → an augmented batch, on one core

    def pipeline(self, form):
        dataset = data.load_dataset(self.args.data, "train", 224)
        samples = data.Samples(dataset, data.pretrain_transform(224, form=form), 0)
        return self.reading(lambda index: samples[0, index], len(dataset))

    def reading(self, read, number, images=32):
        def run():
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            for index in range(images):
                read(index % number)
            torch.set_num_threads(threads)
        return run, 0, 0

    def end_to_end(self):
        """pretrain.py on real files, a tokenizer of the paper's size that is not trained."""
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder)
        network = VQTokenizer(channels=CODES["channels"])
        nn.init.normal_(network.quantizer.codebook)
        state = dict(stage="tokenizer", step=0, model=network.state_dict(), model_args=dict(channels=CODES["channels"]))
        state["digest"] = runtime.digest(state)
        torch.save(state, folder / "tokenizer.pt")

        def run():
            output = folder / f"run-{time.time()}"
            flags = ["--data", self.args.data, "--tokenizer", str(folder / "tokenizer.pt"), "--output", str(output), "--batch-size",
                     str(self.batch), "--steps", "4", "--log-every", "2", "--amp", self.args.amp]
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):  # tqdm needs a file
                pretrain.main(pretrain.get_args(flags))
            rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
            shutil.rmtree(output)
            return self.batch / rows[-1]["images_per_s"]    # seconds a step, of the last two
        return run, 0, 0

    # ---- Peers

    def transformers(self):
        from transformers import BeitConfig, BeitForMaskedImageModeling
        network = BeitForMaskedImageModeling(BeitConfig(use_mask_token=True, use_shared_relative_position_bias=True)).to(self.device)
        images, target = self.images(), torch.randint(8192, (self.batch * 75,), device=self.device)
        mask = torch.stack([block_mask(14, 75) for _ in range(self.batch)]).to(self.device).flatten(1)
        forward = lambda: network(images, bool_masked_pos=mask)
        step, _, moved = self.training(network.train(), lambda: network(images, bool_masked_pos=mask, labels=target).loss, forward)
        return step, self.pretraining()[1], moved

    def timm(self):
        import timm
        network = timm.create_model("beit_base_patch16_224", pretrained=False, drop_path_rate=0.1).to(self.device)
        images, labels = self.images(), torch.randint(1000, (self.batch,), device=self.device)
        return self.training(network, lambda: F.cross_entropy(network(images).float(), labels), lambda: network(images))

    def vector_quantize(self, rows=3136):
        from vector_quantize_pytorch import VectorQuantize
        network = VectorQuantize(dim=CODES["code_dim"], codebook_size=CODES["codebook_size"], decay=0.99, commitment_weight=0.25,
                                 threshold_ema_dead_code=1).to(self.device).train()
        z = torch.randn(rows // 196, 196, CODES["code_dim"], device=self.device)
        return lambda: network(z), self.quantizer()[1], 0

    def torchvision_pipeline(self):
        """PIL decoding and torchvision v2, image by image, to normalised floats."""
        T, dataset = torchvision.transforms.v2, data.load_dataset(self.args.data, "train", 224)
        transform = T.Compose([T.RandomResizedCrop(224, (0.08, 1), interpolation=T.InterpolationMode.BICUBIC),
                               T.RandomHorizontalFlip(), T.ColorJitter(0.4, 0.4, 0.4), T.PILToTensor(),
                               T.ToDtype(torch.float32, scale=True), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
        return self.reading(lambda index: transform(dataset[index][0].convert("RGB")), len(dataset))

    def rows(self):
        """{name: maker of (function, FLOPs, bytes)}"""
        rows = {
            "ViT-B pre-training step": self.pretraining,
            "ViT-B pre-training step, --compile": lambda: self.pretraining(compiled=True),
            "fine-tuning step": self.finetuning,
            "tokenizer encoding": self.encoding,
            "tokenizer training step": self.tokenizer_training,
            "perceptual loss, with its backward pass": self.perceptual,
            "quantizer, 3,136 vectors, with its EMA": self.quantizer,
            "block masks": self.masks,
        }
        if self.args.data:
            rows |= {"input, 32 files, --augment image": lambda: self.pipeline("image"),
                     "input, 32 files, --augment batch": lambda: self.pipeline("batch"), "pretrain.py, a step with real files": self.end_to_end}
        if self.args.peers:
            half = torch.float16 if self.device.type == "cuda" else None
            rows |= {"peer: BEiT's explicit attention": lambda: self.pretraining(half, beits_attention),
                     "peer: transformers' BeitForMaskedImageModeling": self.transformers, "peer: timm's Beit, fine-tuning": self.timm,
                     "peer: vector-quantize-pytorch": self.vector_quantize}
            if self.args.data:
                rows["peer: PIL and torchvision v2, 32 files"] = self.torchvision_pipeline
        return {name: maker for name, maker in rows.items() if not self.args.only or (self.args.only in name if self.args.repeats else self.args.only == name)}


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


def limits(bench):
    """A function that measures (FLOP/s of a square matrix product in the run's precision, bytes/s of a copy)."""
    size = 8192 if bench.device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2))
    source = torch.randn(64 * 2 ** 20, device=bench.device)
    target = torch.empty_like(source)
    works = (lambda: a @ b, 2 * size ** 3), (lambda: target.copy_(source), 2 * source.nbytes)
    return lambda: [work / statistics.median(seconds(f, bench.device) for _ in range(5)) for f, work in works]


def peak(args, name):
    """GiB of a process that does nothing but this row."""
    command = [sys.executable, "-m", "tools.bench", *sys.argv[1:], "--only", name, "--repeats", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else math.nan


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--batch-size", type=int, default=64 if torch.cuda.is_available() else 8)
    p.add_argument("--amp", choices=["fp32", "bf16"], default="bf16" if torch.cuda.is_available() else "fp32")
    p.add_argument("--repeats", type=int, default=7, help="0: only print the peak memory of the row --only, in GiB")
    p.add_argument("--data", help="ImageFolder of photographs: also the input pipeline and pretrain.py end to end")
    p.add_argument("--peers", action="store_true", help="also what one would use instead")
    p.add_argument("--only", help="rows whose name has this in it")
    p.add_argument("--memory", action="store_true", help="also each row's peak memory, in a process of its own")
    args = p.parse_args(argv)
    bench, functions = Bench(args), {}
    for name, make in bench.rows().items():
        try:
            functions[name] = make()
        except ImportError as error:
            print(f"{name}: {error.name} is not installed", file=sys.stderr)
    if not args.repeats:
        for function, _, _ in functions.values():
            function(), function()
        used = (torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else   # ru_maxrss would begin at the parent's
                1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
        return print(used / 2 ** 30)
    measured = limits(bench)
    times = {name: [] for name in functions}
    floors = {name: [] for name in functions}
    rates = []
    for turn in range(args.repeats + 1):                   # the first one warms up
        before = measured()
        for name, (function, operations, traffic) in functions.items():
            taken, after = seconds(function, bench.device), measured()
            rate, bandwidth = map(statistics.mean, zip(before, after))
            before = after
            if turn:
                rates.append((rate, bandwidth))
                times[name].append(taken)
                floors[name].append((operations / rate + traffic / bandwidth) / taken)
    rate, bandwidth = (statistics.median(values) for values in zip(*rates))
    print(f"{runtime.hardware()}, PyTorch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads, "
          f"batch {args.batch_size}, {args.amp}: matrix product {rate / 1e12:.3g} TFLOP/s, copy {bandwidth / 1e9:.3g} GB/s\n")
    print(f"| | ms | images/s | share of the floor |{' peak GiB |' * args.memory}\n| --- | --- | --- | --- |{' --- |' * args.memory}")
    names = list(functions)
    functions.clear()                                      # --memory: the rows' own processes need the room
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    for name in names:
        share, middle = statistics.median(floors[name]), statistics.median(times[name])
        images = 32 if "32 files" in name else 16 if "quantize" in name else args.batch_size
        print(f"| {name} | {1000 * middle:.4g} | {images / middle:.4g} | {f'{share:.0%}' if share else ''} |"
              + (f" {peak(args, name):.2f} |" if args.memory else ""), flush=True)


if __name__ == "__main__":
    main()
