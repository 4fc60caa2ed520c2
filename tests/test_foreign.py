"""Files of other projects, and surroundings: what broke neighbouring projects is one line here."""
import json
import multiprocessing
import os
import signal
import threading
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, OWN, STAGES, run
from PIL import Image
from test_stages import fails, newest
from test_vit import pixels, tiny_vit

import data
import finetune
import segment
from model import HALF, IMAGENET_MEAN, SIZES, VisionTransformer
from support import checkpoint, launch, weights
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


def plain_vit(**changes):
    """A plain ViT's weights, by timm's names."""
    return tiny_vit(**NANO | dict(positions="absolute", layer_scale=0.0) | changes).state_dict()


def save_plain(file="vit.pth", **more):
    torch.save(dict(model=plain_vit() | more), file)


# ------------------------------------------------------------------------------------------------
# transformers' folders

def save_folder(vit, classes=None, binary=False, **config):
    """A folder as Hugging Face has the published BEiT."""
    Path("folder").mkdir()
    positions = vit.positions
    config = dict(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=4, num_attention_heads=2,
        use_absolute_position_embeddings=positions == "learned",
        use_shared_relative_position_bias=positions == "shared",
        layer_scale_init_value=0.1, drop_path_rate=0.1) | config
    if classes:
        config["id2label"] = classes
    Path("folder/config.json").write_text(json.dumps(config))
    if binary:
        torch.save(to_beit(vit.state_dict()), "folder/pytorch_model.bin")
    else:
        pytest.importorskip("safetensors")
        from safetensors.torch import save_file
        save_file(to_beit(vit.state_dict()), "folder/model.safetensors")


def beit(**changes):
    return tiny_vit(**NANO | dict(positions="block", classes=10) | changes)


def evaluated(capsys):
    """What is said where --eval looks at the folder, without the row."""
    run("finetune", *FLAGS, "--eval", "--init", "folder", "--output", "out")
    return capsys.readouterr().out


def test_a_folder_whose_classes_have_other_names_is_evaluated(capsys):
    save_folder(beit(), {str(i): f"word {i}, other word" for i in range(10)}, binary=True)
    out = evaluated(capsys)
    assert "word 0, other word" in out and "top1" in out


def test_classes_in_another_order_are_refused(capsys):
    names = data.load_dataset("synthetic:64", "val", 32).classes
    save_folder(beit(), dict(enumerate(names[::-1])), binary=True)
    message = fails(capsys, "finetune", *FLAGS, "--eval", "--init", "folder")
    assert names[0] in message and names[-1] in message


def test_classes_count_by_number_however_json_sorts_them():
    """Hubs have config.json with "0", "1", "10", "2", …: sorted as text."""
    names = {str(i): f"word {i}" for i in sorted(range(12), key=str)}
    save_folder(beit(classes=12), names, binary=True)
    assert weights.load("folder").classes == [f"word {i}" for i in range(12)]


@pytest.mark.parametrize("binary", [False, True])
def test_a_folder_in_either_form(binary):
    vit = beit()
    save_folder(vit, binary=binary)
    x = pixels(2, 3, 32, 32)
    for own in (weights.load("folder"), begun("folder", "--eval")):
        assert torch.allclose(own(x), vit(x), atol=1e-5)


def test_a_folder_of_another_activation_is_refused():
    save_folder(beit(), binary=True, hidden_act="relu")
    with pytest.raises(InputError, match="hidden_act"):
        weights.load("folder")


# ------------------------------------------------------------------------------------------------
# BEiT's, BEiT v2's and MAE's files

def test_relative_positions_without_layer_scale_need_no_flag():
    vit = tiny_vit(**NANO, positions="shared", layer_scale=0.0, codes=8)
    torch.save(dict(model=vit.state_dict()), "beit.pth")
    x = pixels(2, 3, 32, 32)
    assert torch.allclose(begun("beit.pth").tokens(x, [4])[0], vit.tokens(x, [4])[0], atol=1e-4)


@pytest.mark.parametrize("name, others, inputs", [
    ("beit", ["lm_head.weight", "mask_token"], HALF),
    ("beit", ["cls_pt_layers.0.norm1.weight", "cls_pt_lm_head.weight"], IMAGENET_MEAN),
    ("mae", ["decoder_embed.weight", "decoder_blocks.0.norm1.weight", "mask_token",
             "decoder_pos_embed"], IMAGENET_MEAN),
])
def test_heads_of_pre_training_are_left_out(name, others, inputs):
    own = plain_vit() if name == "mae" else tiny_vit(**NANO, positions="block").state_dict()
    torch.save(dict(model=own | {key: torch.ones(3) for key in others}), "file.pth")
    vit = begun("file.pth")
    assert torch.equal(vit.blocks[3].mlp.fc2.weight, own["blocks.3.mlp.fc2.weight"])
    assert mean(vit) == pytest.approx(inputs)


@pytest.mark.parametrize("flags, named", [
    (["--model", "tiny"], "--model"),
    (["--patch-size", "16"], "--patch-size"),
])
def test_a_refusal_names_the_flag_that_helps(flags, named):
    save_plain()
    with pytest.raises(InputError, match=f"vit.pth: .*{named}"):
        begun("vit.pth", "--statistics", "half", *flags)


def test_another_depth_names_the_flag(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", dict(SIZES["nano"], depth=5))
    save_plain()
    with pytest.raises(InputError, match="blocks.4.*--model"):
        begun("vit.pth", "--statistics", "half", "--model", "tiny")


# ------------------------------------------------------------------------------------------------
# What shapes do not show

def test_a_plain_vit_needs_the_statistics_of_its_inputs():
    save_plain()
    with pytest.raises(InputError, match="vit.pth: .*--statistics"):
        begun("vit.pth")
    assert mean(begun("vit.pth", "--statistics", "half")) == [0.5] * 3
    assert mean(begun("vit.pth", "--statistics", "imagenet")) == pytest.approx(IMAGENET_MEAN)


def test_a_plain_vit_is_no_perceptual_network(capsys):
    """MoCo v3's files are known by their names; this one's inputs are not."""
    save_plain()
    assert "vit.pth" in fails(capsys, "tokenizer", "--perceptual", "vit.pth")


@pytest.fixture
def small(monkeypatch):
    """A ViT-S, and a ViT-B, that are quickly made."""
    monkeypatch.setitem(SIZES, "base", SIZES["nano"])
    monkeypatch.setitem(SIZES, "small", dict(dim=48, depth=2, heads=6))


def test_moco_v3s_vit_s_has_12_heads(small, capsys):
    vit = VisionTransformer(
        **NANO | SIZES["small"] | dict(heads=12), positions="absolute", layer_scale=0.0)
    names = {f"module.base_encoder.{key}": value for key, value in vit.state_dict().items()}
    torch.save(dict(arch="vit_small", state_dict=names), "vit-s-300ep.pth.tar")
    own = begun("vit-s-300ep.pth.tar", "--model", "small")
    assert own.blocks[0].attn.heads == vit.blocks[0].attn.heads == 12
    assert mean(own) == pytest.approx(IMAGENET_MEAN)
    message = fails(capsys, "tokenizer", "--perceptual", "vit-s-300ep.pth.tar")     # no ViT-B
    assert "vit-s-300ep.pth.tar" in message
    torch.save(vit.state_dict(), "deit.pth")                # DeiT's and timm's have 6
    own = begun("deit.pth", "--model", "small", "--statistics", "imagenet")
    assert own.blocks[0].attn.heads == 6


def test_a_vit_that_moco_v3_would_build_otherwise_is_not_exported(small, chain):
    state = newest(chain.teacher)
    for heads, refused in ((6, True), (12, False)):
        vit = NANO | SIZES["small"] | dict(heads=heads)
        state["model_args"] = vit
        if refused:
            with pytest.raises(InputError, match="12"):
                export.export_teacher(state, Path("folder"))
        else:
            export.export_teacher(state, Path("folder"))
    assert Path("folder/checkpoint.pth.tar").exists()


# ------------------------------------------------------------------------------------------------
# Positions of other ViTs

@pytest.mark.parametrize("shape", [(1, 16, 64), (1, 18, 64), (1, 17, 32), (16, 64), (1, 21, 64)])
def test_foreign_positions_are_another_architecture(shape):
    """deit3's and SigLIP's have no class token, distilled and register ViTs one token more."""
    save_plain(pos_embed=torch.ones(shape))
    with pytest.raises(InputError, match="vit.pth: another architecture: pos_embed"):
        begun("vit.pth", "--statistics", "half")


@pytest.mark.parametrize("rows", [49, 51, 1])
def test_a_bias_table_of_another_window_is_another_architecture(rows):
    own = tiny_vit(**NANO, positions="block").state_dict()
    own["blocks.0.attn.relative_position_bias_table"] = torch.ones(rows, 2)
    torch.save(own, "beit.pth")
    with pytest.raises(InputError, match="relative_position_bias_table"):
        begun("beit.pth")


@pytest.mark.parametrize("name", ["dist_token", "register_tokens", "reg_token"])
def test_a_token_more_is_another_architecture(name):
    save_plain(**{name: torch.ones(1, 1, 64)})
    with pytest.raises(InputError, match=f"another architecture: .*{name}"):
        begun("vit.pth", "--statistics", "half")


# ------------------------------------------------------------------------------------------------
# Docker, file handles, an environment that is half torchrun's

def started(capsys, error):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        launch.start(main, Namespace(stage="teacher", batch_size=8, accumulate=1))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("error", [
    RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that "
                 "dataloader's workers are out of shared memory."),
    RuntimeError("DataLoader worker (pid(s) 8, 9) exited unexpectedly"),
    RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback …\n"
                 "RuntimeError: unable to write to file </torch_9_1_0>: No space left on device"),
    RuntimeError("received 0 items of ancdata"),
    OSError(24, "Too many open files"),
    OSError(12, "Cannot allocate memory"),
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
def test_bugs_keep_their_traceback(text, capsys):
    def main(args):
        raise RuntimeError(text)

    with pytest.raises(RuntimeError):
        launch.start(main, Namespace(stage="teacher", batch_size=8, accumulate=1))


def test_a_full_table_of_files_is_not_the_images_fault():
    class Full(Killed):
        def __getitem__(self, index):
            raise OSError(24, "Too many open files")

    with pytest.raises(OSError, match="Too many open files"):
        data.read(Full(), 0)


def test_rank_alone_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    line = started(capsys, KeyError("never raised"))
    assert "RANK" in line and "WORLD_SIZE" in line


# ------------------------------------------------------------------------------------------------
# Listings of images

def test_segmentation_takes_the_images_that_all_stages_take():
    for split in ("training", "validation"):
        for folder in ("images", "annotations"):
            Path("set", folder, split).mkdir(parents=True)
        image = Image.new("RGB", (8, 8))
        for name in ("a.tif", "b.JPG", "c.webp"):
            image.save(Path("set/images", split, name))
            Image.new("L", (8, 8), 1).save(Path("set/annotations", split, f"{name[0]}.png"))
        for name in ("._a.tif", "._a.png", "notes.txt"):
            Path("set/images", split, name).write_bytes(b"macOS")
    dataset = segment.load_dataset("set", "train", 8, 2)
    assert [Path(file).name for file, _ in dataset.samples] == ["a.tif", "b.JPG", "c.webp"]
    assert [Path(file).name for file in data.image_files("set/images/training")] == [
        Path(file).name for file, _ in dataset.samples]
    assert dataset[0][1].unique().tolist() == [1]


# ------------------------------------------------------------------------------------------------
# As a library

@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_nothing_behind(stage, chain, monkeypatch):
    """Where main() raises amid a run: no handler of its signals, no worker."""
    handlers = {number: signal.getsignal(number) for number in (*launch.SIGNALS, signal.SIGCHLD)}
    module, seen = STAGES[stage], []

    def agree(run):
        seen.append((signal.getsignal(signal.SIGINT) != handlers[signal.SIGINT],
                     len(multiprocessing.active_children())))
        raise KeyError("a bug")

    monkeypatch.setattr(module.Run, "agree", agree)
    with pytest.raises(KeyError, match="a bug"):
        run(stage, *chain.inputs[stage], "--workers", "1")
    assert seen == [(True, 1)]                              # the control
    assert multiprocessing.active_children() == []
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_stage_in_a_thread_touches_no_signals():
    handlers = {number: signal.getsignal(number) for number in launch.SIGNALS}
    done = []
    thread = threading.Thread(
        target=lambda: done.append(run("finetune", "--init", "none", "--steps", "1")))
    thread.start()
    thread.join()
    assert done == [None] and newest("runs/demo/finetune")["step"] == 1
    assert {number: signal.getsignal(number) for number in launch.SIGNALS} == handlers


def test_paths_and_numpys_numbers_in_the_arguments_become_plain():
    args = finetune.get_args([*COMMON, *OWN["finetune"], "--init", "none", "--steps", "1"])
    args.output, args.lr = Path("out"), np.float64(args.lr)
    finetune.main(args)
    assert newest("out")["args"]["output"] == "out"
    finetune.main(args)                                     # goes on: "finished already"


def test_what_no_checkpoint_can_hold_is_refused_before_it_is_written():
    for value in (np.float32(1), Path("here"), {1}):
        with pytest.raises(InputError, match=type(value).__name__):
            checkpoint.write(Path("step-00000001.pt"), dict(value=[value]))
    assert not Path("step-00000001.pt").exists()
