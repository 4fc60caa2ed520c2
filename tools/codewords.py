"""How semantic are a tokenizer's codewords? The two measures of PeCo's Table 4.

    python -m tools.codewords runs/paper/tokenizer
    python -m tools.codewords runs/cifar/tokenizer --classifier runs/cifar/finetune

linear: top-1 of a linear classifier on an image's average-pooled quantized codewords.
reconstructions: top-1 of a supervised network on the reconstructed validation images; originals: on
the images themselves. Ours: distance, the perceptual one. One line more in the run's log.jsonl.
"""

import torch
from torch import nn

import data
from model import IMAGENET_MEAN, IMAGENET_STD, PerceptualLoss
from support import checkpoint, flags, launch
from support import run as logbook
from support.weights import load, perceptual_network
from tools.probe import linear_probe

DEIT_TINY = "deit_tiny_patch16_224"     # timm's name of the paper's judge, 72.2 % on ImageNet


def get_args(argv=None):
    p = flags.Parser("tools.codewords", __doc__)
    p.add_argument("tokenizer", help="run or checkpoint of tokenizer.py; its --data is used")
    p.add_argument("--classifier", default=DEIT_TINY,
                   help=f"the judge of reconstructions: a finetune.py run, or {DEIT_TINY} (timm's, "
                        "for ImageNet; default)")
    p.add_argument("--data", help="as in tokenizer.py; default: the run's")
    p.add_argument("--perceptual", help="as in tokenizer.py; default: the run's")
    p.add_argument("--amp", choices=["auto", "bf16", "fp32"], default="auto",
                   help="as in pretrain.py")
    data.add_workers(p)
    args = p.parse_args(argv)
    args.stage, args.batch_size, args.accumulate = "codewords", 250, 1
    return args


class DeiT(nn.Module):
    """timm's DeiT-Tiny, supervised on ImageNet-1K: pixels in [-1, 1] → logits."""

    def __init__(self):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise launch.InputError(
                "--classifier: timm is missing: pip install timm, or name a finetune.py run"
            ) from error
        try:
            self.network = timm.create_model(DEIT_TINY, pretrained=True)
        except OSError as error:                            # no network
            raise launch.InputError(f"--classifier {DEIT_TINY}: not downloaded ({error}); "
                                     "name a finetune.py run") from error
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, images):
        return self.network(((images + 1) / 2 - self.mean) / self.std)


@torch.no_grad()
def pooled_codewords(args, tokenizer, split, device):
    """The mean of an image's quantized codewords (images, D), and labels (images,)."""
    features, targets = [], []
    for images, labels in batches(args, split):
        with launch.autocast(args, device):                # as in pretrain.py
            codes = tokenizer.encode(images.to(device))
        features.append(tokenizer.quantizer.lookup(codes).mean((2, 3)))         # (B, D)
        targets.append(labels)
    return torch.cat(features), torch.cat(targets).to(device)


@torch.no_grad()
def reconstruction_row(args, tokenizer, classifier, perceptual, device):
    """What the judge and the perceptual network say of the reconstructed validation images."""
    originals = reconstructions = distance = number = 0
    for images, labels in batches(args, "val"):
        images, labels = images.to(device), labels.to(device)
        with launch.autocast(args, device):
            codes = tokenizer.encode(images)
        x_hat = tokenizer.decode(codes)
        originals += (classifier(images).argmax(1) == labels).sum().item()
        reconstructions += (classifier(x_hat.clamp(-1, 1)).argmax(1) == labels).sum().item()
        distance += len(images) * perceptual(images, x_hat).item()
        number += len(images)
    return dict(originals=100 * originals / number, reconstructions=100 * reconstructions / number,
                distance=distance / number, images=number)


def batches(args, split):
    dataset = data.load_dataset(args.data, split, args.image_size)
    transform = data.eval_transform(args.image_size, args.eval_crop)
    return data.eval_loader(dataset, transform, args.batch_size, args.workers)


def main(args):
    launch.one_process("codewords")
    device = launch.device()
    trained = checkpoint.load(args.tokenizer, ["tokenizer"])["args"]
    args.image_size, args.eval_crop = trained["image_size"], trained["eval_crop"]
    args.data = args.data or trained["data"]
    tokenizer = load(args.tokenizer, ["tokenizer"]).to(device)
    judge = DeiT().eval() if args.classifier == DEIT_TINY else load(args.classifier, ["finetune"])
    network, _ = perceptual_network(args.perceptual or trained["perceptual"])
    perceptual = PerceptualLoss(network).to(device)

    train, train_labels = pooled_codewords(args, tokenizer, "train", device)
    val, labels = pooled_codewords(args, tokenizer, "val", device)
    predictions = linear_probe(train, train_labels, val, int(train_labels.max()) + 1)
    linear = 100 * (predictions == labels).float().mean().item()
    row = reconstruction_row(args, tokenizer, judge.to(device), perceptual, device)
    logbook.append(checkpoint.folder_of(args.tokenizer), codewords=True, linear=linear, **row)


if __name__ == "__main__":
    launch.start(main, get_args())
