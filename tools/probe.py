"""How good are a ViT's features as they are? Top-1 of a classifier of the frozen features.

    python -m tools.probe runs/paper/pretrain linear
    python -m tools.probe runs/paper/teacher knn

The features of an image are the mean of its patches after the last block; images are not augmented.
One line more in the run's log.jsonl.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import data
from support import checkpoint, flags, launch, weights
from support import run as logbook


def get_args(argv=None):
    p = flags.Parser("tools.probe", __doc__)
    p.add_argument("run", help="run or checkpoint of teacher.py, pretrain.py or finetune.py, or "
                               "weights of a ViT-B/16 of BEiT's, timm's or MoCo v3's")
    p.add_argument("kind", choices=["linear", "knn"],
                   help="a linear layer, or the nearest neighbours in the training set")
    p.add_argument("--data", help="as in finetune.py; default: the run's, else data/imagenet")
    p.add_argument("--label-fraction", type=flags.within(float, "(0, 1]"), default=1.0,
                   help="share of the training images used, the same of each class, 0 to 1")
    p.add_argument("--seed", type=flags.count, default=0, help="which of the training images")
    p.add_argument("--eval-crop", type=flags.within(float, "[0.1, 1]"),
                   help="centre crop, share of the side; default: the run's, else BEiT's 0.875")
    p.add_argument("--batch-size", type=flags.positive, default=250, help="images at a time")
    p.add_argument("--amp", choices=["auto", "bf16", "fp32"], default="auto",
                   help="as in finetune.py")
    weights.add_statistics(p)
    data.add_workers(p)
    args = p.parse_args(argv)
    args.stage, args.accumulate = "probe", 1
    return args


@torch.no_grad()
def extract(args, model, dataset, device, indices=None):
    """Features (images, D) and labels (images,) of a dataset."""
    transform = data.eval_transform(args.image_size, args.eval_crop)
    last = [len(model.blocks)]
    features, labels = [], []
    for images, targets in data.eval_loader(
            dataset, transform, args.batch_size, args.workers, indices):
        with launch.autocast(args, device):
            x = model.tokens(images.to(device), last)[0]                        # (B, 1+N, D)
        x = F.layer_norm(x.float(), x.shape[-1:])
        features.append(x[:, 1:].mean(1))                                       # (B, D)
        labels.append(targets)
    return torch.cat(features), torch.cat(labels).to(device)


def knn(train, train_labels, val, classes, k=20, temperature=0.07):
    """Classes of val by the weighted k nearest neighbours in cosine (k, temperature: DINO)."""
    train = F.normalize(train, dim=1)
    predictions = []
    for rows in F.normalize(val, dim=1).split(1024):
        similarity, neighbours = (rows @ train.T).topk(min(k, len(train)))      # (1024, k)
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(1, train_labels[neighbours], (similarity / temperature).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def linear_probe(train, train_labels, val, classes, steps=2000, batch=1024, lr=1e-2,
                 weight_decay=1e-4):
    """Classes of val by a linear layer on standardised features. All constants are our choice."""
    mean, std = train.mean(0), train.std(0)
    std[std < 1e-6] = math.inf                              # constant in training: no feature
    torch.manual_seed(0)
    layer = nn.Linear(train.shape[1], classes).to(train.device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        launch.set_lr(optimizer, launch.cosine(step, steps, 0, lr))
        rows = torch.randint(len(train), (min(batch, len(train)),)).to(train.device)
        logits = layer((train[rows] - mean) / std)                              # (batch, classes)
        F.cross_entropy(logits, train_labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return layer((val - mean) / std).argmax(1)


def main(args):
    launch.one_process("probe")
    device = launch.device()
    state = weights.read_state(args.run)
    own = {}                                                # another project's file
    if "stage" in state:
        own = state.get("identity", {}) | state["args"]
    args.image_size = own.get("image_size", 224)
    args.eval_crop = args.eval_crop or own.get("eval_crop", 0.875)
    args.data = args.data or own.get("data", "data/imagenet")
    if state.get("stage") in weights.VITS:
        model = weights.restore(args.run, state)
    else:                                                   # a ViT-B/16 of another project
        vars(args).update(init=args.run, model="base", patch_size=16, layer_scale=0.0,
                          drop_path=0.0, checkpoint_activations=False)
        model, _, _ = weights.begin(args, state, args.image_size)
    model.to(device).eval()

    dataset = data.load_dataset(args.data, "train", args.image_size)
    indices = data.label_subset(dataset.targets, args.label_fraction, args.seed)
    val = data.load_dataset(args.data, "val", args.image_size)
    train, train_labels = extract(args, model, dataset, device, indices)
    features, labels = extract(args, model, val, device)
    classify = knn if args.kind == "knn" else linear_probe
    predictions = classify(train, train_labels, features, len(val.classes))
    top1 = 100 * (predictions == labels).float().mean().item()
    row = dict(probe=args.kind, data=args.data, label_fraction=args.label_fraction, top1=top1,
               images=len(labels))
    logbook.append(checkpoint.folder_of(args.run), **row)
    return row


if __name__ == "__main__":
    launch.start(main, get_args())
