"""Files of other projects, and surroundings: what broke neighbouring projects is one line here."""
import json
import multiprocessing
import os
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, OWN, run
from helpers import fails, newest, pixels, tiny_vit
from PIL import Image

import data
import finetune
import segment
from model import HALF, IMAGENET_MEAN, SIZES, VisionTransformer
from support import launch, weights
from support.launch import InputError
from support.weights import to_beit
from tools import export

NANO = dict(SIZES["nano"], image_size=32, patch_size=8)
FLAGS = ["--model", "nano", "--image-size", "32", "--patch-size", "8"]


def begun(path, *flags, classes=10):
    """The ViT with which fine-tuning begins."""
    args = finetune.get_args([*COMMON, *FLAGS, "--init", path, *flags])
    return finetune.build(args, classes, weights.read(args)[0])[0].eval()


def mean(vit):
    return vit.mean.flatten().tolist()


def save_plain(**more):
    """A plain ViT's weights, by timm's names."""
    own = tiny_vit(**NANO, positions="absolute", layer_scale=0.0).state_dict()
    torch.save(dict(model=own | more), "vit.pth")


# ------------------------------------------------------------------------------------------------
# transformers' folders

def save_folder(vit, classes=None, **config):
    """A folder as Hugging Face has the published BEiT."""
    Path("folder").mkdir()
    config = dict(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=4, num_attention_heads=2,
        use_absolute_position_embeddings=False, use_shared_relative_position_bias=False,
        layer_scale_init_value=0.1, drop_path_rate=0.1) | config
    if classes:
        config["id2label"] = classes
    Path("folder/config.json").write_text(json.dumps(config))
    torch.save(to_beit(vit.state_dict()), "folder/pytorch_model.bin")


def beit(classes=10):
    return tiny_vit(**NANO, positions="block", classes=classes)


def test_a_folder_whose_classes_have_other_names_is_evaluated(capsys):
    save_folder(beit(), {str(i): f"word {i}, other word" for i in range(10)})
    run("finetune", *FLAGS, "--eval", "--init", "folder", "--output", "out")
    out = capsys.readouterr().out
    assert "word 0, other word" in out and "top1" in out


def test_classes_in_another_order_are_refused(capsys):
    names = data.load_dataset("synthetic:64", "val", 32).classes
    save_folder(beit(), dict(enumerate(names[::-1])))
    message = fails(capsys, "finetune", *FLAGS, "--eval", "--init", "folder")
    assert names[0] in message and names[-1] in message


def test_classes_count_by_number_however_json_sorts_them():
    """Hubs have config.json with "0", "1", "10", "2", …: sorted as text."""
    names = {str(i): f"word {i}" for i in sorted(range(12), key=str)}
    save_folder(beit(classes=12), names)
    assert weights.load("folder").classes == [f"word {i}" for i in range(12)]


@pytest.mark.parametrize("binary", [False, True])
def test_a_folder_in_either_form(binary):
    vit = beit()
    save_folder(vit)
    if not binary:
        pytest.importorskip("safetensors")
        from safetensors.torch import save_file
        Path("folder/pytorch_model.bin").unlink()
        save_file(to_beit(vit.state_dict()), "folder/model.safetensors")
    x = pixels(2, 3, 32, 32)
    for own in (weights.load("folder"), begun("folder", "--eval")):
        assert torch.allclose(own(x), vit(x), atol=1e-5)


# ------------------------------------------------------------------------------------------------
# BEiT's, BEiT v2's, MAE's and MoCo v3's files

def test_relative_positions_without_layer_scale_need_no_flag():
    vit = tiny_vit(**NANO, positions="shared", layer_scale=0.0, codes=8)
    torch.save(dict(model=vit.state_dict()), "beit.pth")
    x = pixels(2, 3, 32, 32)
    assert torch.allclose(begun("beit.pth").tokens(x, [4])[0], vit.tokens(x, [4])[0], atol=1e-4)


@pytest.mark.parametrize("positions, others, inputs", [
    ("block", ["lm_head.weight", "mask_token"], HALF),
    ("block", ["cls_pt_layers.0.norm1.weight", "cls_pt_lm_head.weight"], IMAGENET_MEAN),
    ("absolute", ["decoder_embed.weight", "decoder_blocks.0.norm1.weight", "mask_token",
                  "decoder_pos_embed"], IMAGENET_MEAN),
])
def test_heads_of_pre_training_are_left_out(positions, others, inputs):
    layer_scale = 0.1 if positions == "block" else 0.0
    own = tiny_vit(**NANO, positions=positions, layer_scale=layer_scale).state_dict()
    torch.save(dict(model=own | {key: torch.ones(3) for key in others}), "file.pth")
    vit = begun("file.pth")
    assert torch.equal(vit.blocks[3].mlp.fc2.weight, own["blocks.3.mlp.fc2.weight"])
    assert mean(vit) == pytest.approx(inputs)


@pytest.mark.parametrize("flag, value", [("--model", "tiny"), ("--patch-size", "16")])
def test_a_refusal_names_the_flag_that_helps(flag, value):
    save_plain()
    with pytest.raises(InputError, match=f"vit.pth: .*{flag}"):
        begun("vit.pth", "--statistics", "half", flag, value)


def test_a_plain_vit_needs_the_statistics_of_its_inputs(capsys):
    save_plain()
    with pytest.raises(InputError, match="vit.pth: .*--statistics"):
        begun("vit.pth")
    assert mean(begun("vit.pth", "--statistics", "half")) == [0.5] * 3
    assert mean(begun("vit.pth", "--statistics", "imagenet")) == pytest.approx(IMAGENET_MEAN)
    assert "vit.pth" in fails(capsys, "tokenizer", "--perceptual", "vit.pth")


@pytest.mark.parametrize("name, shape", [
    ("pos_embed", (1, 16, 64)),                             # deit3's and SigLIP's: no class token
    ("pos_embed", (1, 18, 64)),                             # of a distilled one: a token more
    ("pos_embed", (16, 64)),
    ("reg_token", (1, 1, 64)),
    ("dist_token", (1, 1, 64)),
])
def test_other_tokens_are_another_architecture(name, shape):
    save_plain(**{name: torch.ones(shape)})
    with pytest.raises(InputError, match=f"vit.pth: .*{name}"):
        begun("vit.pth", "--statistics", "half")


def test_moco_v3s_vit_s_has_12_heads(monkeypatch, chain):
    monkeypatch.setitem(SIZES, "small", dict(dim=48, depth=2, heads=6))
    vit = VisionTransformer(
        **NANO | SIZES["small"] | dict(heads=12), positions="absolute", layer_scale=0.0)
    names = {f"module.base_encoder.{key}": value for key, value in vit.state_dict().items()}
    torch.save(dict(arch="vit_small", state_dict=names), "vit-s-300ep.pth.tar")
    own = begun("vit-s-300ep.pth.tar", "--model", "small")
    assert own.blocks[0].attn.heads == 12
    assert mean(own) == pytest.approx(IMAGENET_MEAN)
    torch.save(vit.state_dict(), "deit.pth")                # DeiT's and timm's have 6
    own = begun("deit.pth", "--model", "small", "--statistics", "imagenet")
    assert own.blocks[0].attn.heads == 6
    # so a teacher of 6 is not exported: MoCo v3's code would build another one
    state = newest(chain.teacher) | dict(model_args=NANO | SIZES["small"])
    with pytest.raises(InputError, match="12"):
        export.export_teacher(state, Path("folder"))


# ------------------------------------------------------------------------------------------------
# Docker, file handles, an environment that is half torchrun's

def start(error):
    def main(args):
        raise error

    launch.start(main, Namespace(stage="teacher", batch_size=8, accumulate=1))


def started(capsys, error):
    with pytest.raises(SystemExit) as stop:
        start(error)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("error", [
    RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that "
                 "dataloader's workers are out of shared memory."),
    RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback …\n"
                 "RuntimeError: unable to write to file </torch_9_1_0>: No space left on device"),
    RuntimeError("received 0 items of ancdata"),
    OSError(24, "Too many open files"),
])
def test_workers_that_fail_are_one_line(error, capsys):
    line = started(capsys, error)
    assert all(word in line for word in ("--workers 0", "--shm-size", "ulimit -n"))


class Killed(torch.utils.data.Dataset):
    classes = ["a", "b"]
    targets = [0, 1] * 32

    def __len__(self):
        return 64

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)                # as the kernel does without memory


def test_a_killed_worker_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(data, "load_dataset", lambda *_: Killed())
    message = fails(capsys, "finetune", "--init", "none", "--workers", "1")
    assert "--workers 0" in message


@pytest.mark.parametrize("text", [
    "Caught KeyError in DataLoader worker process 0.\n…",
    "out of resource: shared memory, Required: 132096",     # Triton's
])
def test_bugs_keep_their_traceback(text):
    with pytest.raises(RuntimeError):
        start(RuntimeError(text))


def test_rank_alone_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert "WORLD_SIZE" in started(capsys, KeyError("never raised"))


# ------------------------------------------------------------------------------------------------
# Listings of images

def test_segmentation_takes_the_images_that_all_stages_take():
    names = ["a.tif", "b.JPG", "c.webp"]
    for folder in ("images", "annotations"):
        Path("set", folder, "training").mkdir(parents=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(Path("set/images/training", name))
        Image.new("L", (8, 8), 1).save(Path("set/annotations/training", f"{name[0]}.png"))
    for name in ("._a.tif", "notes.txt"):
        Path("set/images/training", name).write_bytes(b"macOS")
    dataset = segment.load_dataset("set", "train", 8, 2)
    assert [Path(file).name for file, _ in dataset.samples] == names
    assert [Path(file).name for file in data.image_files("set/images/training")] == names


# ------------------------------------------------------------------------------------------------
# As a library

def test_a_stage_leaves_nothing_behind(monkeypatch):
    """Where main() raises amid a run: no handler of its signals, no worker."""
    handlers = {number: signal.getsignal(number) for number in (*launch.SIGNALS, signal.SIGCHLD)}
    seen = []

    def agree(run):
        seen.append((signal.getsignal(signal.SIGINT) != handlers[signal.SIGINT],
                     len(multiprocessing.active_children())))
        raise KeyError("a bug")

    monkeypatch.setattr(finetune.Run, "agree", agree)
    with pytest.raises(KeyError, match="a bug"):
        run("finetune", "--init", "none", "--workers", "1")
    assert seen == [(True, 1)]                              # the control
    assert multiprocessing.active_children() == []
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_paths_and_numpys_numbers_in_the_arguments_become_plain():
    args = finetune.get_args([*COMMON, *OWN["finetune"], "--init", "none", "--steps", "1"])
    args.output, args.lr = Path("out"), np.float64(args.lr)
    finetune.main(args)
    assert newest("out")["args"]["output"] == "out"
    finetune.main(args)                                     # goes on: "finished already"
