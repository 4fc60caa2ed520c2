"""The paper's figures of a run's own.

    python -m tools.figures reconstructions PIXEL_RUN PECO_RUN        # Figure 3
    python -m tools.figures masked PRETRAIN_RUN --masked 45 75 120    # Figures 4 and 5
    python -m tools.figures nearer TOKENIZER_RUN REFERENCE ONE OTHER  # Figure 1

reconstructions: validation images over their reconstructions by each tokenizer.py run.
masked: validation images, masked, with the codes that a pretrain.py run predicts there, decoded,
and with the true codes, decoded. nearer: which of two images is nearer to a reference, by L2 of the
pixels and by the tokens of a tokenizer.py run.
"""
import random

import torch

import data
from model import block_mask
from pretrain import masked_rows
from support import checkpoint, flags, launch
from support.launch import InputError
from support.weights import load


def validation_images(args, preprocess, number, seed=0):
    """A few random validation images of a run's dataset: (number, 3, H, W)."""
    dataset = data.load_images(args["data"], "val", args["image_size"])
    chosen = random.Random(seed).sample(range(len(dataset)), min(number, len(dataset)))
    return torch.stack([preprocess(data.read(dataset, index)[0]) for index in chosen])


# ------------------------------------------------------------------------------------------------
# Figure 3

@torch.no_grad()
def reconstructions(runs, number=8):
    """The images and their reconstruction by each run: rows of (number, 3, H, W)."""
    rows = []
    for run in runs:
        tokenizer = load(run, ["tokenizer"])
        if not rows:
            args = checkpoint.load(run)["args"]
            rows.append(validation_images(args, tokenizer.preprocess, number))
        rows.append(tokenizer.decode(tokenizer.encode(rows[0])))
    return rows


# ------------------------------------------------------------------------------------------------
# Figures 4 and 5

def masked_predictions(run, masked=None, number=8):
    """The images, masked, with predicted codes decoded, with true codes decoded: four rows.

    masked: number of masked patches; by default as in pre-training.
    """
    args = checkpoint.load(run, ["pretrain"])["args"]
    if args.get("mae"):
        raise InputError(f"{run}: a run with --mae: its predictions are not drawn")
    vit, tokenizer = load(run), load(args["tokenizer"], ["tokenizer"])
    images = validation_images(args, vit.preprocess, number)
    masked = masked or round(args["mask_ratio"] * vit.grid ** 2)
    if not 0 < masked < vit.grid ** 2:
        raise InputError(f"--masked {masked}: an image has {vit.grid ** 2} patches")
    random.seed(0)
    masks = torch.stack([block_mask(vit.grid, masked, min(args["mask_block"], masked))
                         for _ in images])
    return masked_rows(vit, tokenizer, images, masks)


# ------------------------------------------------------------------------------------------------
# Figure 1

@torch.no_grad()
def distances(run, reference, views):
    """Of each view to the reference: {"L2": of pixels, "tokens": …}, a list of numbers each.

    By tokens it is the squared distance between the vectors of the codes, averaged over the patches
    (our choice: the paper does not say how).
    """
    tokenizer = load(run, ["tokenizer"])
    images = torch.stack([tokenizer.preprocess(path) for path in (reference, *views)])
    vectors = tokenizer.quantizer.lookup(tokenizer.encode(images))          # (3, D, h, w)
    result = {}
    for name, maps in (("L2", images), ("tokens", vectors)):
        result[name] = [(view - maps[0]).square().mean().item() for view in maps[1:]]
    return result


def main(argv=None):
    p = flags.Parser("tools.figures", __doc__)
    figures = p.add_subparsers(dest="figure", required=True)
    one = figures.add_parser("reconstructions", help="Figure 3")
    one.add_argument("runs", nargs="+", help="tokenizer.py runs, on the same dataset")
    two = figures.add_parser("masked", help="Figures 4 and 5")
    two.add_argument("run", help="pretrain.py run")
    two.add_argument("--masked", type=flags.positive, nargs="+", default=[None],
                     help="numbers of masked patches, a picture each; default: as in pre-training")
    three = figures.add_parser("nearer", help="Figure 1")
    three.add_argument("run", help="tokenizer.py run")
    three.add_argument("reference", help="image file")
    three.add_argument("views", nargs=2, help="two image files")
    for figure in (one, two):
        figure.add_argument("--output", default=f"{figure.prog.split()[-1]}.png",
                            help="file of the picture (default: %(default)s)")
    args = p.parse_args(argv)
    if args.figure == "reconstructions":
        data.save_rows(reconstructions(args.runs), args.output)
    elif args.figure == "masked":
        rows = []
        for masked in args.masked:
            rows += masked_predictions(args.run, masked)
        data.save_rows(rows, args.output)
    else:
        for name, (one, other) in distances(args.run, args.reference, args.views).items():
            nearer = args.views[0] if one < other else args.views[1]
            launch.say(f"{name}: {one:.4g} and {other:.4g}, nearer is {nearer}")
        return
    launch.say(str(args.output))


if __name__ == "__main__":
    launch.launch_tool("figures", main)
