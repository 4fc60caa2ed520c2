"""Beside the paper: its values, the commands of PAPER.md, its ablations, its attacks."""
import functools
import math
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, run
from helpers import TinyVGG, as_moco_v3, log, newest, pixels, randomize, tiny_resnet50, tiny_vit
from PIL import Image
from test_readme import DOCS, STAGES, commands
from torch import nn

import data
import model
import pretrain
from model import SIZES, MaskedAutoencoder, VisionTransformer, VQTokenizer, random_mask
from support import weights
from support.scenes import Synthetic
from tools import attack, codewords, figures

# ------------------------------------------------------------------------------------------------
# The paper's values: of a stage, and where the paper says so. Where nothing stands beside them, it
# is in Pre-training Details or the supplement ("S").

PAPER_SAYS = {
    "teacher": dict(data="data/imagenet", model="base", epochs=100),
    "tokenizer": dict(
        data="data/imagenet", image_size=224, codebook_size=8192, batch_size=128, epochs=100,
        warmup_steps=5000, lr=5e-5, betas=[0.5, 0.95], perceptual="moco_v3",
        channels=[64, 128, 256, 512, 512], vit=None,            # Pre-training Details, Table 2
        decoder_channels=None, decoder_blocks=None,             # S: the encoder in reverse
        code_dim=256,                                           # Table 2, from its 37.5 M
        patch_size=16,                                          # Table 12: ViT-B
        commitment_weight=0.25,                                 # Eq. 3
        perceptual_weight=1.0,                                  # Eq. 5, Table 10
        adversarial_weight=0.0,                                 # Table 7: an ablation
    ),
    "pretrain": dict(
        data="data/imagenet", image_size=224, model="base", patch_size=16, drop_path=0.1,
        batch_size=2048, lr=1.5e-3, betas=[0.9, 0.999], weight_decay=0.05,
        positions="learned", layer_scale=0.0,                   # the original ViT
        epochs=800,                                             # Table 2
        mae=False,                                              # Table 8: an ablation
    ),
    "finetune": dict(
        data="data/imagenet", image_size=224, model="base", patch_size=16,      # Table 1
        layer_scale=0.0,                                        # the original ViT
        epochs=100, warmup_epochs=20, lr=4e-3, layer_decay=0.65,    # ImageNet fine-tuning
    ),
    "segment": dict(
        data="data/ade20k", model="base", patch_size=16,        # Table 3
        layer_scale=0.0,                                        # the original ViT
        image_size=512, drop_path=0.2, batch_size=16, steps=160_000, warmup_steps=1500, lr=3e-4,
        layer_decay=0.65, weight_decay=0.05,
    ),
    "detect": dict(
        data="data/coco", model="base", patch_size=16,          # Table 3
        layer_scale=0.0,                                        # the original ViT
        image_size=800, max_size=1333, drop_path=0.1, batch_size=16, epochs=12, lr=4e-4,
        layer_decay=0.75, weight_decay=0.05,
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_papers_values(stage):
    """By the table above: what the script runs by default, and all that it calls the paper's."""
    args = vars(STAGES[stage].get_args([]))
    assert args == args | PAPER_SAYS[stage]
    source = (ROOT / f"{stage}.py").read_text().split("\nPAPER = dict(")[1].split("\n)")[0]
    marked = re.findall(r"^ +(\w+)=.*#.*\[PeCo", source, re.M)
    assert len(marked) >= 3
    assert set(marked) <= set(PAPER_SAYS[stage])


def test_the_papers_values_elsewhere():
    assert (attack.EPSILON, attack.STEPS) == (2 / 255, 20)                      # Table 11
    assert round(pretrain.PAPER["mask_ratio"] * 14 ** 2) == 75                  # Figure 5
    assert pretrain.mae_decoder("base") == dict(dim=512, depth=8, heads=16)     # Table 8: MAE's
    assert dict(dim=768, depth=12, heads=12) == SIZES["base"]                   # ViT-B, L and H
    assert dict(dim=1024, depth=24, heads=16) == SIZES["large"]
    assert dict(dim=1280, depth=32, heads=16) == SIZES["huge"]


@pytest.mark.parametrize("channels, parameters", [
    ((64, 128, 256, 512, 512), 37_521_600),                 # 37.5 M
    ((32, 64, 128, 256, 512), 25_747_680),                  # PeCo-lite, 25.7 M
])
def test_table2_parameters_of_encoder_and_codebook(channels, parameters):
    with torch.device("meta"):
        network = VQTokenizer(channels=channels)
    assert size_of(network.encoder) + network.quantizer.codebook.numel() == parameters
    assert network.stride == 16


# ------------------------------------------------------------------------------------------------
# The commands of PAPER.md, each run at a small size in the folder of all. Names are the paper's:
# "base" is then a ViT of 32, "moco_v3" downloads a file with one like it.

TABLES = DOCS["PAPER.md"].split("\n## 2. ")[1].split("\n## 3. ")[0]
COMMANDS = list(dict.fromkeys((script, *flags) for script, flags in commands(TABLES)))
TOOL_COMMANDS = [command for command in COMMANDS if command[0] not in STAGES]

TINY_SIZES = {
    "base": dict(dim=32, depth=4, heads=2),
    "large": dict(dim=48, depth=6, heads=2),
    "huge": dict(dim=64, depth=8, heads=4),
}
# Appended to a command: later flags win. 4 images make 2 steps.
SMALL = ["--data", "synthetic", "--batch-size", "2", "--epochs", "1", "--log-every", "1",
         "--workers", "0", "--amp", "fp32"]
SMALL_STAGE = {
    "teacher": ["--hidden", "16", "--features", "8"],
    "tokenizer": ["--codebook-size", "32", "--code-dim", "16"],
    "segment": ["--image-size", "64"],
    "detect": ["--image-size", "64", "--max-size", "107", "--channels", "16", "--boxes", "16"],
}
SHRUNK = {"image_size", "channels", "decoder_channels", "epochs", "warmup_epochs"}
IMAGES = 4
TOOLS = {tool.__name__: tool for tool in (codewords, attack, figures)}
PICTURES = {"REFERENCE": "reference.png", "ONE": "one.png", "OTHER": "other.png"}


def arguments(command):
    """The arguments of a stage's command as it stands."""
    stage, *flags = command
    return STAGES[stage].get_args(flags)


# The command that makes a run, by its folder.
MAKERS = {arguments(command).output: command for command in COMMANDS if command[0] in STAGES}


def reads(command):
    """The runs that a command reads."""
    script, *values = command
    if script in STAGES:
        values = [value for key, value in vars(arguments(command)).items() if key != "output"]
    return [value for value in values if str(value).startswith("runs/")]


def small(command):
    """The flags of a command at a small size, in the same proportions."""
    stage, *flags = command
    args = arguments(command)
    patches = round(args.image_size / 224 * 4)
    flags += [*SMALL, "--image-size", str(patches * args.patch_size), *SMALL_STAGE.get(stage, [])]
    for name in ("channels", "decoder_channels") if stage == "tokenizer" else ():
        widths = [str(max(16, width // 16)) for width in vars(args)[name] or ()]
        flags += [f"--{name.replace('_', '-')}", *widths] if widths else []
    unit = "epochs" if hasattr(args, "warmup_epochs") else "steps"
    return [*flags, f"--warmup-{unit}", "1"]                # of a run of 2 steps


@functools.cache
def made(output):
    """The newest checkpoint of a run, which is made when first asked for, after what it reads."""
    stage = STAGES[MAKERS[output][0]]
    if stage.__name__ == "detect":
        pytest.importorskip("pycocotools")
    for path in reads(MAKERS[output]):
        made(path)
    stage.main(stage.get_args(small(MAKERS[output])))
    return newest(output)


# What the file of that name holds, with random weights.
DOWNLOADS = {
    "moco_v3": lambda: as_moco_v3(VisionTransformer(**SIZES["base"], positions="absolute")),
    "moco_v3_resnet50": lambda: as_moco_v3(tiny_resnet50(), head="fc"),
    "vgg16": lambda: TinyVGG().state_dict(),
}


def deit_tiny(name, pretrained):
    assert (name, pretrained) == ("deit_tiny_patch16_224", True)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 1000))


@pytest.fixture
def runs(tmp_path_factory, monkeypatch):
    """The function that makes them, in the folder of all."""
    root = tmp_path_factory.getbasetemp() / "paper"
    root.mkdir(exist_ok=True)
    monkeypatch.chdir(root)
    for name, size in TINY_SIZES.items():
        monkeypatch.setitem(SIZES, name, size)
    for module in (data, STAGES["segment"], STAGES["detect"]):
        monkeypatch.setattr(module, "synthetic_number", lambda name, split: IMAGES)
    monkeypatch.setattr(weights, "download", lambda name: DOWNLOADS[name]())
    monkeypatch.setattr(torchvision.models, "vgg16", TinyVGG)
    monkeypatch.setattr(torchvision.models, "resnet50", tiny_resnet50)
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=deit_tiny))
    for index, file in enumerate(PICTURES.values()):
        Synthetic(number=3, image_size=64)[index][0].save(file)
    return made


def test_no_command_writes_to_anothers_folder():
    assert len(MAKERS) + len(TOOL_COMMANDS) == len(COMMANDS)    # so each has its test below


@pytest.mark.parametrize("command", MAKERS.values(), ids=" ".join)
def test_a_command_trains(command, runs):
    """It ends, with finite losses, and its run has what its flags ask for."""
    asked = vars(arguments(command))
    state = runs(asked["output"])
    rows = log(asked["output"])
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and 0 < row["grad_norm"] < math.inf for row in rows)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    flags = {flag[2:].replace("-", "_") for flag in command if flag.startswith("--")}
    for key in flags - SHRUNK:
        assert state["args"][key] == asked[key]


# ------------------------------------------------------------------------------------------------
# What distinguishes the rows of a table

def size_of(network):
    return sum(p.numel() for p in network.parameters())


def blocks_of(network):
    return sum(isinstance(module, model.ResidualBlock) for module in network)


@pytest.mark.parametrize("size, patch, drop_path", [("large", 16, 0.1), ("huge", 14, 0.3)])
def test_table1_sizes(size, patch, drop_path, runs):
    state, tuned = runs(f"runs/{size}/pretrain"), runs(f"runs/{size}/finetune")
    vit = weights.network_of(state)
    depth = TINY_SIZES[size]["depth"]
    assert (len(vit.blocks), vit.patch_size, vit.grid) == (depth, patch, 4)
    assert tuned["identity"]["init"] == state["digest"]
    groups, lr = tuned["optimizer"]["param_groups"], log(f"runs/{size}/finetune")[-1]["lr"]
    assert {group["lr_scale"] for group in groups} == {0.75 ** i for i in range(depth + 2)}
    assert all(group["lr"] == pytest.approx(lr * group["lr_scale"]) for group in groups)
    assert weights.network_of(tuned).blocks[-1].drop_path.p == drop_path


def test_table1_beits_other_vit_keeps_its_kind(runs):
    tuned = runs("runs/relative/finetune")["model_args"]
    assert (tuned["positions"], tuned["layer_scale"]) == ("block", 0.1)


def test_table5_perceptual_networks(runs):
    tokenizers = [runs(f"runs/{name}/tokenizer") for name in ("paper", "resnet", "vgg")]
    assert len({state["identity"]["perceptual"] for state in tokenizers}) == 3


@pytest.mark.parametrize("name, weight", [
    ("pixel", 0.0), ("lambda-0.3", 0.3), ("paper", 1.0), ("adversarial", 1.0)])
def test_table7_losses(name, weight, runs):
    """L = L_pixel + λ L_percep + β L_commit, and what the adversarial ablation adds."""
    folder = f"runs/{name}/tokenizer"
    state = runs(folder)
    for row in log(folder):
        whole = row["pixel"] + weight * row["perceptual"] + 0.25 * row["commitment"]
        if name == "adversarial":
            whole += 0.4 * row["fool"] + row["judge"]
        assert row["loss"] == pytest.approx(whole, rel=1e-5)
        assert (row["perceptual"] > 0) == (weight > 0)
    assert all(("distance" in row) == (weight > 0) for row in log(folder, "val"))
    trained = state["optimizer"]
    names = trained["param_groups"][0]["param_names"]
    judge = [i for i, key in enumerate(names) if re.match(r"discriminator\..*weight", key)]
    assert bool(judge) == (name == "adversarial")
    assert all(trained["state"][i]["exp_avg"].any() for i in judge)


def test_table8_a_masked_autoencoder_for_every_task(runs):
    state = runs("runs/mae/pretrain")
    assert "lm_head.weight" not in state["model"]
    assert state["decoder"]["head.weight"].shape == (32, 32)                    # of K codes
    for stage in ("finetune", "segment", "detect"):
        assert runs(f"runs/mae/{stage}")["identity"]["init"] == state["digest"]


def test_table12_architectures(runs):
    peco, stride8, narrow, shallow = (
        weights.network_of(runs(f"runs/{name}/tokenizer"))
        for name in ("paper", "stride8", "narrow", "shallow"))
    assert (peco.stride, stride8.stride) == (16, 8)
    codes = stride8.encode(pixels(2, 3, 64, 64), grid=4)    # as pretrain.py: a code for each patch
    assert codes.shape == (2, 4, 4)
    assert size_of(narrow.encoder) == size_of(peco.encoder)
    assert size_of(narrow.decoder) < size_of(peco.decoder)
    assert blocks_of(peco.encoder) == blocks_of(peco.decoder) == 2 * 5 + 2
    assert blocks_of(shallow.encoder) == 2 * 5 + 2
    assert blocks_of(shallow.decoder) == 1 * 5 + 2


# ------------------------------------------------------------------------------------------------
# Tools: table 4 and 11, figures 1, 3, 4 and 5. Their rows are in the logs of the runs above.

@pytest.mark.parametrize("command", TOOL_COMMANDS, ids=" ".join)
def test_a_tools_command_runs(command, runs, capsys):
    """It ends, with a row in the run's log, or a picture, or a line that says what is nearer."""
    script, *flags = command
    for path in reads(command):
        runs(path)
    flags = [PICTURES.get(flag, flag) for flag in flags]
    flags = [str(round(int(flag) * 16 / 196)) if flag.isdigit() else flag for flag in flags]
    if script != "tools.figures":
        TOOLS[script].main(TOOLS[script].get_args([*flags, "--workers", "0"]))
        assert log(flags[0])[-1]["images"] == IMAGES
        return
    capsys.readouterr()
    figures.main(flags)
    out = capsys.readouterr().out
    if flags[0] == "nearer":
        assert re.findall(r"^(.*): .* nearer is (?:one|other).png$", out, re.M) == ["L2", "tokens"]
    else:                                                   # rows of images, 2 px around each
        rows = 3 if flags[0] == "reconstructions" else 12 if "--masked" in flags else 4
        assert Image.open(out.strip()).size == (IMAGES * 66 + 2, rows * 66 + 2)


def test_figures_4_and_5_show_as_many_masked_patches(runs):
    folder = "runs/paper/pretrain"
    runs(folder)
    images, masked, predicted, true = figures.masked_predictions(folder, 5, number=3)
    grey = F.avg_pool2d((masked == 0).all(1).float(), 16) == 1                  # (3, 4, 4)
    assert grey.sum((1, 2)).tolist() == [5] * 3
    shown = F.interpolate((~grey)[:, None].float(), (64, 64))
    assert torch.equal(masked * shown, images * shown)
    assert predicted.shape == true.shape == images.shape


def test_figure_1_an_image_is_nearest_to_itself(runs):
    folder = "runs/paper/tokenizer"
    runs(folder)
    found = figures.distances(folder, "one.png", ["other.png", "one.png"])
    for other, own in found.values():
        assert own == 0 < other
    preprocess = weights.load(folder).preprocess
    difference = preprocess("one.png") - preprocess("other.png")
    assert found["L2"][0] == pytest.approx(difference.square().mean().item())


# ------------------------------------------------------------------------------------------------
# Table 8: PeCo_MAE

def an_autoencoder():
    vit = tiny_vit(positions="absolute", layer_scale=0.0)
    return randomize(MaskedAutoencoder(vit, codes=8, dim=32, depth=2, heads=2)).eval()


def random_masks(images, grid, count):
    random.seed(0)
    return torch.stack([random_mask(grid, count) for _ in range(images)])


def test_table8_the_encoder_sees_no_masked_patch():
    network = an_autoencoder()
    x = pixels(2, 3, 16, 16)
    mask = random_masks(2, 4, 12)
    hidden = F.interpolate(mask[:, None].float(), (16, 16)).bool()              # of pixels
    other = torch.where(hidden, pixels(2, 3, 16, 16, seed=1), x)
    assert torch.equal(network(other, mask), network(x, mask))
    other = torch.where(hidden, x, pixels(2, 3, 16, 16, seed=1))
    assert not torch.allclose(network(other, mask), network(x, mask))           # the control


def test_table8_every_masked_patch_is_predicted_in_its_place():
    """Logits come in the order of mask.nonzero(), each by its own position."""
    network = an_autoencoder()
    decoder = network.decoder
    x = pixels(2, 3, 16, 16)
    masks = random_masks(2, 4, 12)
    expected = []
    for seen, mask in zip(network.encoder.visible_tokens(x, masks), masks.flatten(1), strict=True):
        assert seen.shape == (1 + 4, 32)
        cls, *visible = decoder.embed(seen)
        tokens = [decoder.mask_token[0, 0] if hidden else visible.pop(0) for hidden in mask]
        decoded = decoder.decode(torch.stack([cls, *tokens])[None])[0, 1:]
        expected += [decoder.head(decoded[i]) for i in range(16) if mask[i]]
    torch.testing.assert_close(network(x, masks), torch.stack(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("grid, count", [(14, 147), (4, 12), (4, 0), (4, 16)])
def test_table8_masks_are_random_and_of_an_exact_count(grid, count):
    masks = random_masks(400, grid, count)
    assert masks.dtype == torch.bool
    assert (masks.sum((1, 2)) == count).all()
    share = masks.float().mean(0)
    deviation = math.sqrt(count / grid ** 2 * (1 - count / grid ** 2) / 400)
    assert (share - count / grid ** 2).abs().max() <= 5 * deviation
    assert torch.equal(masks, random_masks(400, grid, count))


def test_table8_its_loss_falls(chain, monkeypatch):
    monkeypatch.setattr(pretrain, "block_mask", None)       # masks are random_mask's
    run("pretrain", "--mae", "--mask-ratio", "0.75", *chain.inputs["pretrain"], "--steps", "30",
        "--log-every", "1", "--save-every", "100", "--lr", "2e-3", "--output", "run")
    losses = [row["loss"] for row in log("run")]
    assert losses[0] == pytest.approx(math.log(32), abs=1.0)                    # K codes alike
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


# ------------------------------------------------------------------------------------------------
# Table 12: the tokenizer as a ViT

def a_vit_tokenizer():
    torch.manual_seed(0)
    network = VQTokenizer(image_size=16, vit=dict(dim=32, depth=2, heads=2), patch_size=4,
                          codebook_size=64, code_dim=8)
    network.quantizer(network.encoder(pixels(8, 3, 16, 16, seed=1)))
    network.quantizer.initialize(torch.Generator())
    return network.eval()


def test_table12_vit_at_its_own_and_other_sizes():
    network = a_vit_tokenizer()
    assert network.stride == 4
    for height, width in ((16, 16), (24, 24), (8, 20)):
        x = pixels(2, 3, height, width)
        x_hat, found, l_commit = network(x)
        assert x_hat.shape == x.shape
        assert found.shape == (2, height // 4, width // 4)
        assert torch.equal(network.encode(x), found)
        assert torch.allclose(network.decode(found), x_hat, atol=1e-5)
        assert len(found.unique()) > 1


def test_table12_a_patch_comes_out_where_it_went_in():
    """A patch of pixels is that of its token: row by row from the top left."""
    decoder = a_vit_tokenizer().decoder
    z_q = pixels(1, 8, 4, 4)
    x = decoder.embed(z_q.flatten(2).mT) + decoder.pos_embed[:, 1:]
    for block in decoder.blocks:
        x = block(x, None)
    tokens = decoder.out(decoder.norm(x))[0]                                    # (N, 3·p²)
    image = decoder(z_q)[0]
    for i, j in np.ndindex(4, 4):
        own = image[:, 4 * i:4 * i + 4, 4 * j:4 * j + 4]
        assert torch.allclose(own, tokens[4 * i + j].view(3, 4, 4), atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Table 11: attacks

def plain_attack(network, images, labels, momentum):
    """BIM, or MIM with its momentum, image by image on pixels in [0, 1], as their papers print."""
    epsilon = 2 / 255
    alpha = 1 / 255 if momentum is None else epsilon / 20
    attacked = []
    for image, label in zip(images, labels, strict=True):
        clean = (image + 1) / 2
        x, g = clean, torch.zeros_like(clean)
        for _ in range(20):
            x = x.detach().requires_grad_()
            F.cross_entropy(network(2 * x[None] - 1), label[None]).backward()
            g = x.grad if momentum is None else momentum * g + x.grad / x.grad.abs().sum()
            x = x.detach() + alpha * g.sign()
            x = torch.minimum(torch.maximum(x, clean - epsilon), clean + epsilon).clamp(0, 1)
        attacked.append(2 * x - 1)
    return torch.stack(attacked)


@pytest.mark.parametrize("name, momentum", [("bim", None), ("mim", 1.0)])
def test_table11_attacks_against_a_plain_loop(name, momentum):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 5))
    randomize(network).double()                             # smooth
    images = pixels(3, 3, 8, 8).double()
    labels = torch.tensor([0, 3, 4])
    expected = plain_attack(network, images, labels, momentum)
    attacked = attack.ATTACKS[name](network, images, labels)
    assert torch.allclose(attacked, expected, atol=1e-12)
    losses = [F.cross_entropy(network(x), labels) for x in (images, attacked)]
    assert losses[1] > losses[0]


def test_table11_its_row_is_the_accuracy_under_attack(runs):
    folder = "runs/paper/finetune"
    runs(folder)
    attack.main(attack.get_args([folder, "--images", "3", "--workers", "0"]))
    row = log(folder)[-1]
    assert row["images"] == 3
    network = weights.load(folder)
    dataset = data.load_dataset("synthetic", "val", network.image_size)
    drawn = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))[:3].tolist()
    images = torch.stack([network.preprocess(dataset[index][0]) for index in drawn])
    labels = torch.tensor([dataset.targets[index] for index in drawn])
    for name, attacked in (("clean", images), ("bim", attack.bim(network, images, labels))):
        hits = (network(attacked).argmax(1) == labels).float()
        assert row[name] == pytest.approx(100 * hits.mean().item())
