"""Beside the paper: its values, the commands of PAPER.md, its ablations, its attacks."""
import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import COMMON, OWN, ROOT, run
from PIL import Image
from test_readme import DOCS, STAGES, commands
from test_stages import fails, log, newest
from test_vit import pixels, randomize, seeded, tiny_vit
from test_weights import as_moco_v3
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torchvision.models import resnet, vgg

import data
import model
import pretrain
import segment
from model import SIZES, MaskedAutoencoder, VisionTransformer, VQTokenizer, random_mask
from support import checkpoint, weights
from support.scenes import Synthetic
from tools import attack, codewords, figures

READS = dict(tokenizer="perceptual", pretrain="tokenizer", finetune="init", segment="init",
             detect="init")                                 # stage → its flag of what it reads
CPU_ATTENTION = {                                           # which PyTorch's counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
}

# ------------------------------------------------------------------------------------------------
# The paper's values: (stage, its argument, value, where the paper says so; "S" is its supplement)

DETAILS = "Pre-training Details, or S"
PAPER_SAYS = [
    ("teacher", "data", "data/imagenet", DETAILS),
    ("teacher", "model", "base", DETAILS),
    ("teacher", "epochs", 100, DETAILS),
    ("tokenizer", "data", "data/imagenet", DETAILS),
    ("tokenizer", "image_size", 224, DETAILS),
    ("tokenizer", "channels", [64, 128, 256, 512, 512], "Pre-training Details, Table 2"),
    ("tokenizer", "decoder_channels", None, "S, VQ-VAE Architectures: the encoder in reverse"),
    ("tokenizer", "decoder_blocks", None, "S, VQ-VAE Architectures: the encoder in reverse"),
    ("tokenizer", "vit", None, "Pre-training Details: convolutions"),
    ("tokenizer", "patch_size", 16, "Table 12: ViT-B"),
    ("tokenizer", "codebook_size", 8192, DETAILS),
    ("tokenizer", "code_dim", 256, "Table 2, by its number of parameters"),
    ("tokenizer", "commitment_weight", 0.25, "Eq. 3"),
    ("tokenizer", "perceptual", "moco_v3", DETAILS),
    ("tokenizer", "perceptual_weight", 1.0, "Eq. 5, Table 10"),
    ("tokenizer", "adversarial_weight", 0.0, "Table 7: an ablation"),
    ("tokenizer", "batch_size", 128, DETAILS),
    ("tokenizer", "epochs", 100, DETAILS),
    ("tokenizer", "warmup_steps", 5000, DETAILS),
    ("tokenizer", "lr", 5e-5, DETAILS),
    ("tokenizer", "betas", [0.5, 0.95], DETAILS),
    ("pretrain", "data", "data/imagenet", DETAILS),
    ("pretrain", "image_size", 224, DETAILS),
    ("pretrain", "mae", False, "Table 8: an ablation"),
    ("pretrain", "model", "base", DETAILS),
    ("pretrain", "patch_size", 16, DETAILS),
    ("pretrain", "drop_path", 0.1, DETAILS),
    ("pretrain", "positions", "learned", "Pre-training Details: the original ViT"),
    ("pretrain", "layer_scale", 0.0, "Pre-training Details: the original ViT"),
    ("pretrain", "batch_size", 2048, DETAILS),
    ("pretrain", "epochs", 800, "Pre-training Details, Table 2"),
    ("pretrain", "lr", 1.5e-3, DETAILS),
    ("pretrain", "betas", [0.9, 0.999], DETAILS),
    ("pretrain", "weight_decay", 0.05, DETAILS),
    ("finetune", "data", "data/imagenet", "Table 1"),
    ("finetune", "image_size", 224, "Table 1"),
    ("finetune", "model", "base", "Table 1"),
    ("finetune", "patch_size", 16, "Table 1"),
    ("finetune", "layer_scale", 0.0, "Pre-training Details: the original ViT"),
    ("finetune", "epochs", 100, "ImageNet fine-tuning"),
    ("finetune", "warmup_epochs", 20, "ImageNet fine-tuning"),
    ("finetune", "lr", 4e-3, "ImageNet fine-tuning"),
    ("finetune", "layer_decay", 0.65, "ImageNet fine-tuning"),
    ("segment", "data", "data/ade20k", "Table 3"),
    ("segment", "image_size", 512, "S"),
    ("segment", "model", "base", "Table 3"),
    ("segment", "patch_size", 16, "Table 3"),
    ("segment", "drop_path", 0.2, "S"),
    ("segment", "layer_scale", 0.0, "Pre-training Details: the original ViT"),
    ("segment", "batch_size", 16, "S"),
    ("segment", "steps", 160_000, "S"),
    ("segment", "warmup_steps", 1500, "S"),
    ("segment", "lr", 3e-4, "S"),
    ("segment", "layer_decay", 0.65, "S"),
    ("segment", "weight_decay", 0.05, "S"),
    ("detect", "data", "data/coco", "Table 3"),
    ("detect", "image_size", 800, "S"),
    ("detect", "max_size", 1333, "S"),
    ("detect", "model", "base", "Table 3"),
    ("detect", "patch_size", 16, "Table 3"),
    ("detect", "drop_path", 0.1, "S"),
    ("detect", "layer_scale", 0.0, "Pre-training Details: the original ViT"),
    ("detect", "batch_size", 16, "S"),
    ("detect", "epochs", 12, "S"),
    ("detect", "lr", 4e-4, "S"),
    ("detect", "layer_decay", 0.75, "S"),
    ("detect", "weight_decay", 0.05, "S"),
]


@pytest.mark.parametrize("stage", STAGES)
def test_the_papers_values(stage):
    """By the table above: what the script runs by default, without any flag."""
    args = vars(STAGES[stage].get_args([]))
    for name, key, value, place in PAPER_SAYS:
        if name == stage:
            assert args[key] == value, f"{key}: {place}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_value_that_a_script_calls_the_papers_is_in_the_table(stage):
    source = (ROOT / f"{stage}.py").read_text().split("\nPAPER = dict(")[1].split("\n)")[0]
    marked = re.findall(r"^ +(\w+)=.*#.*\[PeCo", source, re.M)
    assert len(marked) >= 3
    assert set(marked) <= {key for name, key, _, _ in PAPER_SAYS if name == stage}


def test_the_papers_values_elsewhere():
    assert (attack.EPSILON, attack.STEPS) == (2 / 255, 20)                      # Table 11
    assert round(pretrain.PAPER["mask_ratio"] * 14 ** 2) == 75                  # Figure 5
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
    weights_of_encoder = sum(p.numel() for p in network.encoder.parameters())
    assert weights_of_encoder + network.quantizer.codebook.numel() == parameters
    assert network.stride == 16


# ------------------------------------------------------------------------------------------------
# The commands of PAPER.md, each run at a small size in the folder of all. Names are the paper's:
# "base" is then a ViT of 32, "moco_v3" downloads a file with one like it.

TABLES = DOCS["PAPER.md"].split("\n## 2. ")[1].split("\n## 3. ")[0]
COMMANDS = list(dict.fromkeys((script, *flags) for script, flags in commands(TABLES)))
STAGE_COMMANDS = [command for command in COMMANDS if command[0] in STAGES]
TOOL_COMMANDS = [command for command in COMMANDS if command[0] not in STAGES]

TINY_SIZES = {
    "base": dict(dim=32, depth=4, heads=2),
    "large": dict(dim=48, depth=6, heads=2),
    "huge": dict(dim=64, depth=8, heads=4),
}
# Appended to a command: later flags win. 8 images make 2 steps.
SMALL = ["--data", "synthetic", "--batch-size", "4", "--epochs", "1", "--log-every", "1",
         "--workers", "0", "--amp", "fp32"]
SMALL_STAGE = {
    "teacher": ["--hidden", "16", "--features", "8"],
    "tokenizer": ["--codebook-size", "32", "--code-dim", "16"],
    "pretrain": [],
    "finetune": [],
    "segment": ["--image-size", "64"],
    "detect": ["--image-size", "64", "--max-size", "107",
               "--channels", "16", "--boxes", "16"],
}
SHRUNK = {"image_size", "channels", "decoder_channels", "epochs", "warmup_epochs", "masked"}
IMAGES = 8
PLACEHOLDERS = {"REFERENCE": "reference.png", "ONE": "one.png", "OTHER": "other.png"}


def arguments(command):
    """The arguments of a stage's command as it stands."""
    stage, *flags = command
    return STAGES[stage].get_args(flags)


# Which command makes a run. Where several do, PAPER.md offers a choice.
MAKERS = {}
for _command in STAGE_COMMANDS:
    MAKERS.setdefault(arguments(_command).output, _command)


def reads(command):
    """The runs that a command reads."""
    script, *flags = command
    if script.startswith("tools."):
        paths = flags
    elif script in READS:
        paths = [getattr(arguments(command), READS[script])]
    else:
        paths = []
    return [path for path in paths if path.startswith("runs/")]


def small(command):
    """The flags of a command at a small size, in the same proportions."""
    stage, *flags = command
    args = arguments(command)
    patches = round(args.image_size / 224 * 4)
    flags += [*SMALL, "--image-size", str(patches * args.patch_size), *SMALL_STAGE[stage]]
    for flag, widths in (("--channels", getattr(args, "channels", None)),
                         ("--decoder-channels", getattr(args, "decoder_channels", None))):
        if stage == "tokenizer" and widths:
            flags += [flag, *narrow(widths)]
    unit = "epochs" if hasattr(args, "warmup_epochs") else "steps"
    return [*flags, f"--warmup-{unit}", "1"]                # of a run of 2 steps


def narrow(widths):
    return [str(max(16, width // 16)) for width in widths]


class TinyVGG(nn.Module):
    """VGG-16's layers, two channels wide: a state dict of its names."""

    def __init__(self):
        super().__init__()
        widths = [2 if width != "M" else "M" for width in vgg.cfgs["D"]]
        self.features = vgg.make_layers(widths)

    def forward(self, images):
        return self.features(images)


def tiny_resnet50():
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1])


def download(url, **_):
    """What the file of a URL holds, with random weights."""
    torch.manual_seed(0)
    name = {address: name for name, address in weights.DOWNLOADS.items()}[url]
    if name == "vgg16":
        return TinyVGG().state_dict()
    if name == "moco_v3_resnet50":
        return as_moco_v3(tiny_resnet50(), head="fc")
    assert name == "moco_v3"
    return as_moco_v3(VisionTransformer(**SIZES["base"], **weights.MOCO_V3))


def deit_tiny(name, pretrained):
    assert (name, pretrained) == ("deit_tiny_patch16_224", True)
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 1000))


class Runs:
    """The runs of PAPER.md's commands, each made when it is first asked for, after what it reads.
    """

    def __init__(self, root):
        self.root = root
        self.folders = {}                                   # by command

    def make(self, command):
        """The run of a stage's command: its folder."""
        if command not in self.folders:
            for path in reads(command):
                self.make(MAKERS[path])
            output = arguments(command).output
            flags = small(command)
            if MAKERS[output] != command:                   # another one's by default
                output = f"other/{len(self.folders)}"
                flags += ["--output", output]
            if command[0] == "detect":
                pytest.importorskip("pycocotools")
            stage = STAGES[command[0]]
            stage.main(stage.get_args(flags))
            self.folders[command] = output
        return self.folders[command]

    def __getitem__(self, output):
        """The newest checkpoint of a run, by its --output."""
        return newest(self.make(MAKERS[output]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("paper"))


@pytest.fixture
def runs(made, monkeypatch):
    monkeypatch.chdir(made.root)
    for name, size in TINY_SIZES.items():
        monkeypatch.setitem(SIZES, name, size)
    for module in (data, *STAGES.values()):
        if hasattr(module, "synthetic_number"):             # few images to evaluate
            monkeypatch.setattr(module, "synthetic_number", lambda name, split: IMAGES)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setattr(torchvision.models, "vgg16", TinyVGG)
    monkeypatch.setattr(torchvision.models, "resnet50", tiny_resnet50)
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=deit_tiny))
    for index, file in enumerate(PLACEHOLDERS.values()):
        Synthetic(number=3, image_size=64)[index][0].save(file)
    return made


def test_every_command_is_run():
    """Those of a stage by the next test, those of a tool by the ones after it."""
    assert len(STAGE_COMMANDS) > 25
    assert {command[0] for command in STAGE_COMMANDS} == set(STAGES)
    assert [" ".join(command) for command in TOOL_COMMANDS] == [
        "tools.codewords runs/paper/tokenizer",
        "tools.attack runs/paper/finetune",
        "tools.figures nearer runs/paper/tokenizer REFERENCE ONE OTHER",
        "tools.figures reconstructions runs/pixel/tokenizer runs/paper/tokenizer",
        "tools.figures masked runs/paper/pretrain",
        "tools.figures masked runs/paper/pretrain --masked 45 75 120",
    ]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_a_command_reads_another_makes(command):
    assert all(path in MAKERS for path in reads(command))


@pytest.mark.parametrize("command", STAGE_COMMANDS, ids=" ".join)
def test_a_command_trains(command, runs):
    """It ends, with finite losses, and its run has what its flags ask for."""
    folder = runs.make(command)
    rows = log(folder)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert math.isfinite(row["loss"])
        assert 0 < row["grad_norm"] < math.inf
    state = newest(folder)
    assert (state["stage"], state["step"]) == (command[0], 2)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    asked = vars(arguments(command))
    flags = {flag[2:].replace("-", "_") for flag in command if flag.startswith("--")}
    for key in flags - SHRUNK - {"output"}:
        assert state["args"][key] == asked[key]


# ------------------------------------------------------------------------------------------------
# What distinguishes the rows of a table

def convolutions(network):
    """The widths of a network's convolutions of 3 × 3, from input to output."""
    return [module.out_channels for module in network.modules()
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]


def blocks_of(network):
    return sum(isinstance(module, model.ResidualBlock) for module in network)


def test_table1_sizes(runs):
    for size, patch in (("large", 16), ("huge", 14)):
        state = runs[f"runs/{size}/pretrain"]
        vit = weights.network_of(state)
        assert len(vit.blocks) == TINY_SIZES[size]["depth"]
        assert (vit.patch_size, vit.grid) == (patch, 4)
        asked = arguments(MAKERS[f"runs/{size}/finetune"])
        assert (asked.epochs, asked.warmup_epochs) == (50, 5)
        tuned = runs[f"runs/{size}/finetune"]
        assert tuned["identity"]["init"] == state["digest"]
        scales = {group["lr_scale"] for group in tuned["optimizer"]["param_groups"]}
        depth = len(vit.blocks)
        assert scales == {0.75 ** layer for layer in range(depth + 2)}
        drop_path = weights.network_of(tuned).blocks[-1].drop_path.p
        assert drop_path == {"large": 0.1, "huge": 0.3}[size]


def test_table1_beits_other_vit(runs):
    state = runs["runs/relative/pretrain"]
    assert state["model_args"]["positions"] == "shared"
    tuned = weights.network_of(runs["runs/relative/finetune"])
    assert tuned.positions == "block"
    assert tuned.blocks[0].attn.relative_position_bias_table.shape == (7 ** 2 + 3, 2)
    assert torch.allclose(state["model"]["blocks.0.gamma_1"], torch.tensor(0.1), atol=0.01)


def test_table1_at_twice_the_size(runs):
    vit = weights.network_of(runs["runs/huge448/finetune"])
    assert (vit.image_size, vit.grid) == (112, 8)
    assert vit.pos_embed.shape == (1, 1 + 8 ** 2, 64)


def test_table2_tokenizers(runs):
    peco = weights.network_of(runs["runs/paper/tokenizer"])
    lite = weights.network_of(runs["runs/lite/tokenizer"])
    assert peco.stride == lite.stride == 16
    assert convolutions(peco.encoder)[0] == convolutions(lite.encoder)[0] == 16
    assert convolutions(peco.encoder) != convolutions(lite.encoder)
    digest = runs["runs/lite/tokenizer"]["digest"]
    assert runs["runs/lite/pretrain"]["identity"]["tokenizer"] == digest


def test_table3_begins_from_the_pre_trained_vit(runs):
    digest = runs["runs/paper/pretrain"]["digest"]
    assert runs["runs/paper/segment"]["identity"]["init"] == digest
    assert runs["runs/paper/detect"]["identity"]["init"] == digest


def test_table5_perceptual_networks(runs):
    digests = set()
    for flags in ([], ["--perceptual", "runs/paper/teacher"],
                  ["--perceptual", "moco_v3_resnet50", "--output", "runs/resnet/tokenizer"],
                  ["--perceptual", "vgg16", "--output", "runs/vgg/tokenizer"]):
        folder = runs.make(("tokenizer", *flags))
        assert all(row["perceptual"] > 0 for row in log(folder))
        digests.add(newest(folder)["identity"]["perceptual"])
    assert len(digests) == 4
    assert all(row["perceptual"] == 0 for row in log(runs.make(MAKERS["runs/pixel/tokenizer"])))


def test_table7_losses(runs):
    """L = L_pixel + λ L_percep + β L_commit, and what the adversarial ablation adds."""
    for name, weight in (("pixel", 0.0), ("lambda-0.3", 0.3), ("paper", 1.0), ("adversarial", 1.0)):
        for row in log(runs.make(MAKERS[f"runs/{name}/tokenizer"])):
            whole = row["pixel"] + weight * row["perceptual"] + 0.25 * row["commitment"]
            assert ("fool" in row) == (name == "adversarial")
            if "fool" in row:
                whole += 0.4 * row["fool"] + row["judge"]
            assert row["loss"] == pytest.approx(whole, rel=1e-5)
    assert "discriminator" in runs["runs/adversarial/tokenizer"]


def test_table8_a_masked_autoencoder_for_every_task(runs):
    state = runs["runs/mae/pretrain"]
    assert state["model_args"]["positions"] == "absolute"
    assert "lm_head.weight" not in state["model"]
    assert state["decoder"]["head.weight"].shape == (32, 32)                    # of K codes
    for stage, vit in (("finetune", ""), ("segment", "vit"), ("detect", "vit")):
        tuned = runs[f"runs/mae/{stage}"]
        assert tuned["identity"]["init"] == state["digest"]
        model_args = tuned["model_args"]
        assert (model_args[vit] if vit else model_args)["positions"] == "absolute"


def test_table12_architectures(runs):
    peco = weights.network_of(runs["runs/paper/tokenizer"])
    assert blocks_of(peco.encoder) == blocks_of(peco.decoder) == 2 * 5 + 2

    vit = weights.network_of(runs["runs/vit/tokenizer"])
    assert vit.stride == 16
    for network in (vit.encoder.vit, vit.decoder):
        assert len(network.blocks) == TINY_SIZES["base"]["depth"]

    stride8 = weights.network_of(runs["runs/stride8/tokenizer"])
    assert (stride8.stride, stride8.image_size) == (8, 32)
    codes = stride8.encode(pixels(2, 3, 64, 64), grid=4)    # as pretrain.py: a code for each patch
    assert codes.shape == (2, 4, 4)

    thin = weights.network_of(runs["runs/narrow/tokenizer"])
    assert convolutions(thin.encoder) == convolutions(peco.encoder)
    assert convolutions(thin.decoder).count(32) < convolutions(peco.decoder).count(32)
    asked = arguments(MAKERS["runs/narrow/tokenizer"])      # half, as PeCo-lite's
    assert asked.decoder_channels == arguments(MAKERS["runs/lite/tokenizer"]).channels

    shallow = weights.network_of(runs["runs/shallow/tokenizer"])
    assert blocks_of(shallow.encoder) == 2 * 5 + 2
    assert blocks_of(shallow.decoder) == 1 * 5 + 2


# ------------------------------------------------------------------------------------------------
# Tools: tables 4 and 11, figures 1, 3, 4 and 5

def tool(runs, text):
    """The flags of a tool's command, when what it reads is made."""
    script, *flags = text.split()
    command = (script, *flags)
    assert command in TOOL_COMMANDS
    for path in reads(command):
        runs.make(MAKERS[path])
    return [PLACEHOLDERS.get(flag, flag) for flag in flags]


def row_of(folder, key):
    return [row for row in log(folder) if key in row][-1]


def test_table4_codewords(runs):
    flags = tool(runs, "tools.codewords runs/paper/tokenizer")
    codewords.main(codewords.get_args([*flags, "--workers", "0", "--amp", "fp32"]))
    row = row_of("runs/paper/tokenizer", "codewords")
    assert row["images"] == IMAGES
    for key in ("linear", "reconstructions", "originals"):
        assert 0 <= row[key] <= 100
    assert row["distance"] > 0


def test_table11_attacks(runs):
    flags = tool(runs, "tools.attack runs/paper/finetune")
    attack.main(attack.get_args([*flags, "--workers", "0"]))
    row = row_of("runs/paper/finetune", "attack")
    assert row["images"] == IMAGES
    for key in ("clean", "bim", "mim"):
        assert 0 <= row[key] <= 100


def size_of(columns, rows, side):
    """Of a picture of so many images, with 2 px around each."""
    return columns * (side + 2) + 2, rows * (side + 2) + 2


def test_figure1_the_nearer_view(runs, capsys):
    figures.main(tool(runs, "tools.figures nearer runs/paper/tokenizer REFERENCE ONE OTHER"))
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(":")[0] for line in lines] == ["L2", "tokens"]
    assert all(re.search(r": [\d.e+-]+ and [\d.e+-]+, nearer is (one|other).png$", line)
               for line in lines)


def test_figure3_reconstructions(runs):
    figures.main(tool(
        runs, "tools.figures reconstructions runs/pixel/tokenizer runs/paper/tokenizer"))
    assert Image.open("reconstructions.png").size == size_of(8, 3, 64)


def test_figures_4_and_5_masked_patches(runs):
    figures.main(tool(runs, "tools.figures masked runs/paper/pretrain"))
    assert Image.open("masked.png").size == size_of(8, 4, 64)
    *flags, one, two, three = tool(
        runs, "tools.figures masked runs/paper/pretrain --masked 45 75 120")
    counts = [round(int(count) * 16 / 196) for count in (one, two, three)]
    figures.main([*flags, *map(str, counts), "--output", "counts.png"])
    assert Image.open("counts.png").size == size_of(8, 12, 64)


def test_figures_show_what_they_say(runs):
    """Each image as many masked patches, and codes that differ only there."""
    runs.make(MAKERS["runs/paper/pretrain"])
    for count in (4, 6, 10):
        images, masked, predicted, true = figures.masked_predictions(
            "runs/paper/pretrain", count, number=3)
        grey = (masked == 0).all(1).float()                                     # (3, H, W)
        patches = F.avg_pool2d(grey[:, None], 16)[:, 0]                         # (3, 4, 4)
        assert (patches == 1).sum((1, 2)).tolist() == [count] * 3
        shown = F.interpolate((patches == 1)[:, None].float(), (64, 64)) == 0
        assert torch.equal(masked * shown, images * shown)
        assert predicted.shape == true.shape == images.shape
    pixel, peco = "runs/pixel/tokenizer", "runs/paper/tokenizer"
    runs.make(MAKERS[pixel])
    rows = figures.reconstructions([pixel, peco], number=3)
    assert len(rows) == 3
    for path, row in zip((pixel, peco), rows[1:], strict=True):
        tokenizer = weights.load(path)
        assert torch.equal(row, tokenizer.decode(tokenizer.encode(rows[0])))


def test_an_image_is_nearest_to_itself(runs):
    runs.make(MAKERS["runs/paper/tokenizer"])
    found = figures.distances("runs/paper/tokenizer", "one.png", ["other.png", "one.png"])
    assert set(found) == {"L2", "tokens"}
    for other, own in found.values():
        assert own == 0 < other
    tokenizer = weights.load("runs/paper/tokenizer")
    one, other = (tokenizer.preprocess(Image.open(file))[None] for file in ("one.png", "other.png"))
    assert found["L2"][0] == pytest.approx((one - other).square().mean().item())


# ------------------------------------------------------------------------------------------------
# Table 8: PeCo_MAE

@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """A pixel-only tokenizer of the demo's form, trained a little: a run's folder."""
    folder = str(tmp_path_factory.mktemp("codes") / "tokenizer")
    run("tokenizer", "--perceptual-weight", "0", "--steps", "40", "--save-every", "100",
        "--output", folder)
    return folder


@pytest.fixture(scope="module")
def mae(codes, tmp_path_factory):
    """A run of PeCo_MAE on drawn scenes: its folder."""
    folder = str(tmp_path_factory.mktemp("mae") / "pretrain")
    run("pretrain", "--mae", "--mask-ratio", "0.75", "--tokenizer", codes, "--steps", "60",
        "--log-every", "1", "--save-every", "100", "--output", folder)
    return folder


def an_autoencoder(**changes):
    vit = tiny_vit(positions="absolute", layer_scale=0.0, **changes)
    return randomize(MaskedAutoencoder(vit, codes=8, dim=32, depth=2, heads=2)).eval()


def random_masks(images, grid, count):
    random.seed(0)
    return torch.stack([random_mask(grid, count) for _ in range(images)])


def test_table8_the_decoder_is_maes():
    for size in ("base", "large", "huge"):
        assert pretrain.mae_decoder(size) == dict(dim=512, depth=8, heads=16)
    assert pretrain.mae_decoder("nano") == dict(dim=64, depth=2, heads=2)       # ours


def test_table8_the_encoder_sees_no_masked_patch():
    network = an_autoencoder()
    x = pixels(2, 3, 16, 16)
    mask = random_masks(2, 4, 12)
    hidden = F.interpolate(mask[:, None].float(), (16, 16)).bool()              # of pixels
    other = torch.where(hidden, pixels(2, 3, 16, 16, seed=1), x)
    assert not torch.equal(other, x)
    assert torch.equal(network(other, mask), network(x, mask))

    x.requires_grad_()
    network(x, mask).square().sum().backward()
    gradient = x.grad.abs().amax(1, keepdim=True)                               # (2, 1, 16, 16)
    assert (gradient[hidden] == 0).all()
    assert (gradient[~hidden] > 0).all()


def test_table8_every_masked_patch_is_predicted_in_its_place():
    """Logits come in the order of mask.nonzero(), each by its own position."""
    network = an_autoencoder()
    x = pixels(2, 3, 16, 16)
    mask = random_masks(2, 4, 12)
    seen = network.encoder.visible_tokens(x, mask)                              # (2, 1+4, D)
    rows = iter(network(x, mask))
    for image in range(2):
        tokens = [network.decoder.embed(seen[image, 0])]
        visible = iter(seen[image, 1:])
        for i in range(4):
            for j in range(4):
                masked = mask[image, i, j]
                tokens.append(network.decoder.mask_token[0, 0] if masked
                              else network.decoder.embed(next(visible)))
        decoded = network.decoder.decode(torch.stack(tokens)[None])[0]
        for i, j in mask[image].nonzero().tolist():
            expected = network.decoder.head(decoded[1 + 4 * i + j])
            assert torch.allclose(next(rows), expected, atol=1e-4)
    assert next(rows, None) is None


def test_table8_the_encoder_costs_what_is_visible():
    """FLOPs of all linear layers and of attention over 1 + V tokens, beside the patches' own."""
    vit = an_autoencoder().encoder
    dim, depth, patches = 32, 2, 16
    embedding = 2 * patches * dim * 3 * 4 ** 2
    costs = []
    for masked in (0, 4, 8, 12):
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            vit.visible_tokens(pixels(1, 3, 16, 16), random_masks(1, 4, masked))
        tokens = 1 + patches - masked
        blocks = 2 * depth * (12 * tokens * dim ** 2 + 2 * tokens ** 2 * dim)
        assert counter.get_total_flops() == embedding + blocks
        costs.append(blocks)
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("grid, count", [(14, 147), (4, 12), (4, 0), (4, 16)])
def test_table8_masks_are_random_and_of_an_exact_count(grid, count):
    masks = random_masks(400, grid, count)
    assert masks.dtype == torch.bool
    assert (masks.sum((1, 2)) == count).all()
    share = masks.float().mean(0)
    deviation = math.sqrt(count / grid ** 2 * (1 - count / grid ** 2) / 400)
    assert (share - count / grid ** 2).abs().max() <= 5 * deviation
    assert torch.equal(masks, random_masks(400, grid, count))


def test_table8_pre_training_draws_random_masks(codes, monkeypatch):
    """--mae takes MAE's masks in place of blocks, by each sample's own seed."""
    drawn = []

    def recorded(grid, count):
        drawn.append((grid, count))
        return random_mask(grid, count)

    monkeypatch.setattr(pretrain, "random_mask", recorded)
    monkeypatch.setattr(pretrain, "block_mask", None)
    run("pretrain", "--mae", "--mask-ratio", "0.75", "--tokenizer", codes, "--steps", "2",
        "--output", "run")
    assert drawn == [(4, 12)] * (2 * 16 + 40)               # and of the validation images
    transform = pretrain.AugmentAndMask(lambda image: image, lambda: random_mask(4, 12))
    random.seed(0)
    assert torch.equal(transform("an image")[1], random_masks(1, 4, 12)[0])


def test_table8_its_loss_falls(mae):
    losses = [row["loss"] for row in log(mae)]
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log(32), abs=1.0)                    # K codes alike
    assert mean(losses[-10:]) < mean(losses[:10]) - 0.3


def mean(values):
    return sum(values) / len(values)


def test_table8_begins_fine_tuning_and_segmentation(mae):
    run("finetune", "--init", mae, "--steps", "2", "--output", "run")
    assert all(math.isfinite(row["loss"]) for row in log("run"))
    state = newest(mae)
    args = segment.get_args([*COMMON, *OWN["segment"], "--init", mae])
    segmenter, model_args = segment.build(args, 11, state)
    assert model_args["vit"]["positions"] == "absolute"
    # the same function as in pre-training: of an image without a mask
    encoder = weights.load(mae)
    x = pixels(2, 3, 32, 32)
    vit = segmenter.backbone.vit.eval()
    for own, given in zip(vit.tokens(x, [1, 4]), encoder.tokens(x, [1, 4]), strict=True):
        assert torch.equal(own, given)


# ------------------------------------------------------------------------------------------------
# Table 12: the tokenizer as a ViT

def a_vit_tokenizer(**changes):
    torch.manual_seed(0)
    network = VQTokenizer(**{**dict(
        image_size=16, vit=dict(dim=32, depth=2, heads=2), patch_size=4, codebook_size=64,
        code_dim=8), **changes})
    network.quantizer(network.encoder(pixels(8, 3, 16, 16, seed=1)))
    network.quantizer.initialize(seeded())
    return network


def test_table12_vit_at_its_own_and_other_sizes():
    network = a_vit_tokenizer().eval()
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
    network = a_vit_tokenizer().eval()
    decoder = network.decoder
    z_q = torch.randn(1, 8, 4, 4, generator=seeded())
    x = decoder.embed(z_q.flatten(2).mT) + decoder.pos_embed[:, 1:]
    for block in decoder.blocks:
        x = block(x, None)
    tokens = decoder.out(decoder.norm(x))[0]                                    # (N, 3·p²)
    image = decoder(z_q)[0]
    for i in range(4):
        for j in range(4):
            patch = tokens[4 * i + j].view(3, 4, 4)
            own = image[:, 4 * i:4 * i + 4, 4 * j:4 * j + 4]
            assert torch.allclose(own, patch, atol=1e-5)


def test_table12_depth_of_a_vits_decoder():
    assert len(a_vit_tokenizer().decoder.blocks) == 2
    network = a_vit_tokenizer(decoder_blocks=1)
    assert (len(network.encoder.vit.blocks), len(network.decoder.blocks)) == (2, 1)


def test_table12_gradient_passes_the_codes_straight_through():
    network = a_vit_tokenizer().train()
    x_hat, _, _ = network(pixels(2, 3, 16, 16))
    x_hat.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
    assert network.encoder.out.weight.grad.abs().sum() > 0
    assert network.encoder.vit.patch_embed.proj.weight.grad.abs().sum() > 0
    assert not network.quantizer.codebook.requires_grad


def test_table12_a_vit_tokenizer_learns():
    run("tokenizer", "--vit", "nano", "--patch-size", "8", "--perceptual-weight", "0",
        "--steps", "40", "--log-every", "1", "--save-every", "100", "--output", "run")
    losses = [row["loss"] for row in log("run")]
    assert mean(losses[-5:]) < 0.8 * mean(losses[:5])
    assert newest("run")["model_args"]["vit"] == SIZES["nano"]


def test_a_tokenizer_of_another_architecture_is_refused_by_name(codes, capsys):
    """One whose weights have other names than this code's, though its file is sound."""
    state = newest(codes)
    state["model"] = {f"old.{key}": value for key, value in state["model"].items()}
    del state["digest"]                                     # written anew: a sound file
    checkpoint.write(Path("old.pt"), state)
    message = fails(capsys, "pretrain", "--tokenizer", "old.pt")
    assert message.startswith("pretrain.py: --tokenizer old.pt: of another architecture (Missing "
                              'key(s) in state_dict: "encoder.0.weight"): train it anew')
    assert len(message) < 250                               # not hundreds of names


# ------------------------------------------------------------------------------------------------
# Table 11: attacks on a network that was trained

def double_classifier():
    """A smooth classifier of 8 × 8 images in double precision, with random weights."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 5))
    return randomize(network).double()


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
    network = double_classifier()
    images = pixels(3, 3, 8, 8).double()
    labels = torch.tensor([0, 3, 4])
    expected = plain_attack(network, images, labels, momentum)
    assert torch.allclose(attack.ATTACKS[name](network, images, labels), expected, atol=1e-12)


@pytest.fixture(scope="module")
def trained():
    """A small ViT trained on drawn scenes: the network, the images and their labels."""
    dataset = Synthetic(number=200)
    preprocess = data.evaluation(32, 1.0)
    images = torch.stack([preprocess(dataset[index][0]) for index in range(200)])
    labels = torch.tensor(dataset.targets)
    torch.manual_seed(0)
    network = VisionTransformer(
        32, 8, dim=64, depth=2, heads=2, positions="block", classes=10)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(200):
        rows = torch.randint(200, (50,))
        F.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval().requires_grad_(False), images, labels


def accuracy(network, images, labels):
    return (network(images).argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("name", ["bim", "mim"])
def test_table11_attacks_are_small_and_work(name, trained, monkeypatch):
    network, images, labels = trained
    steps = []
    plain = attack.gradient

    def counted(*given):
        steps.append(given)
        return plain(*given)

    monkeypatch.setattr(attack, "gradient", counted)
    attacked = attack.ATTACKS[name](network, images, labels)
    assert len(steps) == 20
    change = (attacked - images).abs().amax((1, 2, 3)) / 2                      # of [0, 1]
    assert change.max() <= 2 / 255 + 1e-6
    assert change.min() > 1 / 255
    assert attacked.min() >= -1
    assert attacked.max() <= 1
    clean = accuracy(network, images, labels)
    assert clean > 0.7
    assert accuracy(network, attacked, labels) < clean - 0.3


@pytest.mark.parametrize("name", ["bim", "mim"])
def test_table11_an_attack_of_nothing_changes_nothing(name, trained, monkeypatch):
    network, images, labels = trained
    monkeypatch.setattr(attack, "EPSILON", 0.0)
    assert torch.equal(attack.ATTACKS[name](network, images, labels), images)


def test_table11_noise_of_the_same_size_is_no_attack(trained):
    network, images, labels = trained
    signs = torch.randn(images.shape, generator=seeded()).sign()
    noisy = attack.near(images + 2 * attack.EPSILON * signs, images)
    assert abs(accuracy(network, noisy, labels) - accuracy(network, images, labels)) < 0.1


def test_table11_its_row_is_the_accuracy_under_attack(folder):
    """By command line, of a run of finetune.py, on so many of its validation images."""
    run("finetune", "--init", "none", "--steps", "2", "--output", "run")
    attack.main(attack.get_args(["run", "--images", "30", "--workers", "0"]))
    row = row_of("run", "attack")
    network = weights.load("run")
    dataset = Synthetic("val", 40)
    drawn = torch.randperm(len(dataset), generator=seeded())[:30].tolist()
    images = torch.stack([network.preprocess(dataset[index][0]) for index in drawn])
    labels = torch.tensor([dataset.targets[index] for index in drawn])
    assert row["images"] == 30
    assert row["clean"] == pytest.approx(100 * accuracy(network, images, labels))
    attacked = attack.bim(network, images, labels)
    assert row["bim"] == pytest.approx(100 * accuracy(network, attacked, labels))
