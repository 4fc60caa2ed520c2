"""How robust is a fine-tuned model? Its accuracy under two attacks (PeCo, Table 11).

    python -m tools.attack runs/paper/finetune

Clean, and under BIM (Kurakin et al., 1607.02533) and MIM (Dong et al., 1710.06081): images that are
changed in 20 steps by at most 2/255 a pixel, so as to raise the loss. One line more in the run's
log.jsonl.
"""

import torch
import torch.nn.functional as F

import data
from support import checkpoint, flags, launch
from support import run as logbook
from support.weights import load

EPSILON = 2 / 255               # [PeCo], of pixels in [0, 1]
STEPS = 20                      # [PeCo]
BIM_STEP = 1 / 255              # [BIM]: one level a step
MIM_STEP = EPSILON / STEPS      # [MIM]
MIM_DECAY = 1.0                 # μ [MIM]


def get_args(argv=None):
    p = flags.Parser("tools.attack", __doc__)
    p.add_argument("run", help="run or checkpoint of finetune.py; its --data is used")
    p.add_argument("--data", help="as in finetune.py; default: the run's")
    p.add_argument("--images", type=flags.positive,
                   help="attack only so many validation images, drawn at random, always the same")
    p.add_argument("--batch-size", type=flags.positive, default=100, help="images at a time")
    data.add_workers(p)
    args = p.parse_args(argv)
    args.stage, args.accumulate = "attack", 1
    return args


def gradient(model, x, labels):
    """∇ of the loss at pixels x (B, 3, H, W)."""
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(model(x), labels, reduction="sum")       # each image's own gradient
    return torch.autograd.grad(loss, x)[0]


def near(x, clean):
    """x, at most ε from the clean image in each pixel, and within the range of pixels."""
    epsilon = 2 * EPSILON                                           # our pixels span [-1, 1]
    return x.clamp(clean - epsilon, clean + epsilon).clamp(-1, 1)


def bim(model, clean, labels):
    """Basic iterative method: x ← clip(x + α sign ∇)."""
    x = clean
    for _ in range(STEPS):
        x = near(x + 2 * BIM_STEP * gradient(model, x, labels).sign(), clean)
    return x


def mim(model, clean, labels):
    """Momentum iterative method: g ← μg + ∇/‖∇‖₁, x ← clip(x + α sign g)."""
    x, g = clean, torch.zeros_like(clean)
    for _ in range(STEPS):
        step = gradient(model, x, labels)
        norm = step.abs().sum((1, 2, 3), keepdim=True).clamp(min=1e-12)
        g = MIM_DECAY * g + step / norm
        x = near(x + 2 * MIM_STEP * g.sign(), clean)
    return x


def unchanged(model, clean, labels):
    return clean


ATTACKS = dict(clean=unchanged, bim=bim, mim=mim)


def main(args):
    launch.one_process("attack")
    device = launch.device()
    trained = checkpoint.load(args.run, ["finetune"])["args"]
    model = load(args.run, ["finetune"]).to(device)
    dataset = data.load_dataset(args.data or trained["data"], "val", trained["image_size"])
    transform = data.eval_transform(trained["image_size"], trained["eval_crop"])
    # Drawn, since the first of a folder are all of one class
    shuffled = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    images = shuffled[:args.images].tolist()
    loader = data.eval_loader(dataset, transform, args.batch_size, args.workers, images)

    hits = dict.fromkeys(ATTACKS, 0)
    for pixels, labels in loader:
        pixels, labels = pixels.to(device), labels.to(device)
        for name, attack in ATTACKS.items():
            attacked = attack(model, pixels, labels)
            hits[name] += (model(attacked).argmax(1) == labels).sum().item()
    row = {name: 100 * number / len(images) for name, number in hits.items()}
    logbook.append(checkpoint.folder_of(args.run), attack=True, **row, images=len(images))


if __name__ == "__main__":
    launch.start(main, get_args())
