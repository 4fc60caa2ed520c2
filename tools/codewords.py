"""How semantic are a tokenizer's codes? The two measures of PeCo's table, and the perceptual distance of its images.

    python -m tools.codewords runs/cifar/tokenizer --recipe cifar --classifier runs/cifar/finetune

- linear: top-1 of a linear classifier on an image's codes (their histogram: our choice, the paper is silent).
- reconstructions: top-1 of a supervised network on the reconstructed validation images; originals: on the
  images themselves.
Appends one line to log.jsonl of the tokenizer's folder.
"""
import argparse

import torch

import data
import finetune
import runtime
import tokenizer as stage
from model import PerceptualLoss, load


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("tokenizer", help="folder of a tokenizer.py run")
    p.add_argument("--recipe", choices=stage.RECIPES, required=True, help="of tokenizer.py: its data, image size and evaluation")
    p.add_argument("--data", help="default: the recipe's")
    p.add_argument("--classifier", required=True, help="a finetune.py run")
    p.add_argument("--perceptual", help="as in tokenizer.py; default: the recipe's")
    p.add_argument("--workers", type=int, default=1)
    args = p.parse_args(argv)
    args.stage, args.output, args.amp, args.dry_run, args.tensorboard = "codewords", args.tokenizer, "auto", None, False
    recipe = stage.RECIPES[args.recipe]
    args.data, args.image_size, args.eval_crop = args.data or recipe["data"], recipe["image_size"], recipe["eval_crop"]
    args.perceptual = args.perceptual or recipe["perceptual"].replace("RECIPE", args.recipe)
    return args


def histograms(codes, size):
    """Share of each code among an image's: codes (B, N) → (B, K)."""
    codes = codes.long()
    counts = torch.zeros(len(codes), size, device=codes.device)
    return counts.scatter_add_(1, codes, torch.full(codes.shape, 1 / codes.shape[1], device=codes.device))


@torch.no_grad()
def measure(args, tokenizer, classifier, perceptual, split):
    """Codes (images, N) and labels; on val also what is measured on the reconstructions."""
    rows, targets, sums = [], [], torch.zeros(4, dtype=torch.float64)
    dataset, device = data.load_dataset(args.data, split, args.image_size), runtime.device()
    for x, labels in data.eval_loader(dataset, data.eval_transform(args.image_size, args.eval_crop), 250, args.workers):
        x, labels = x.to(device), labels.to(device)
        with runtime.autocast(args, device):                                        # as in pretrain.py
            codes = tokenizer.encode(x)
        rows.append(codes.flatten(1).int())
        targets.append(labels)
        if split == "val":
            x_hat = tokenizer.decode(codes)
            hits = [(classifier(images).argmax(1) == labels).sum() for images in (x, x_hat.clamp(-1, 1))]
            sums += torch.tensor([*hits, len(x) * perceptual(x, x_hat), len(x)])
    originals, reconstructions, distance, number = sums.tolist()
    row = dict(originals=100 * originals / number, reconstructions=100 * reconstructions / number,
               distance=distance / number, images=int(number)) if number else None
    return torch.cat(rows), torch.cat(targets), row


def main(args):
    tokenizer, classifier = (load(path, [of]).to(runtime.device()) for path, of in
                             ((args.tokenizer, "tokenizer"), (args.classifier, "finetune")))
    perceptual = PerceptualLoss(stage.perceptual_network(args.perceptual)[0]).to(runtime.device())
    train, labels, _ = measure(args, tokenizer, classifier, perceptual, "train")
    val, targets, row = measure(args, tokenizer, classifier, perceptual, "val")
    size = len(tokenizer.quantizer.codebook)               # ImageNet's histograms would take 39 GiB: a batch's at a time
    predictions = finetune.linear_probe(train, labels, val, int(labels.max()) + 1, lambda codes: histograms(codes, size))
    runtime.log(args, codewords=True, linear=100 * (predictions == targets).float().mean().item(), **row)


if __name__ == "__main__":
    runtime.launch(main, get_args())
