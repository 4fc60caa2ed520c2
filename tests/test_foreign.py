"""Files of other projects, and surroundings: what broke neighbouring projects is one line here."""
import json
import os
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, OWN, run
from helpers import as_moco_v3, fails, newest, pixels, tiny_vit

import data
import finetune
from model import HALF, IMAGENET_MEAN, SIZES, VisionTransformer
from support import launch, weights
from support.launch import InputError
from support.weights import to_beit
from tools import export

NANO = dict(SIZES["nano"], image_size=32, patch_size=8)
FLAGS = ["--model", "nano", "--image-size", "32", "--patch-size", "8"]


def begun(path, *flags):
    """The ViT with which fine-tuning begins."""
    args = finetune.get_args([*COMMON, *FLAGS, "--init", path, *flags])
    return finetune.build(args, 10, weights.read(args)[0])[0].eval()


def mean(vit):
    return vit.mean.flatten().tolist()


def save_plain(**more):
    """A plain ViT's weights, by timm's names."""
    own = tiny_vit(**NANO, positions="absolute", layer_scale=0.0).state_dict()
    torch.save(dict(model=own | more), "vit.pth")


# ------------------------------------------------------------------------------------------------
# transformers' folders

def save_folder(names):
    """A folder as Hugging Face has the published BEiT; names: its id2label. → its network."""
    vit = tiny_vit(**NANO, positions="block", classes=len(names))
    config = dict(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=4, num_attention_heads=2,
        use_absolute_position_embeddings=False, use_shared_relative_position_bias=False,
        layer_scale_init_value=0.1, drop_path_rate=0.1, id2label=names)
    Path("folder").mkdir()
    Path("folder/config.json").write_text(json.dumps(config))
    torch.save(to_beit(vit.state_dict()), "folder/pytorch_model.bin")
    return vit


def test_a_folder_whose_classes_have_other_names_is_evaluated(capsys):
    save_folder({str(i): f"word {i}, other word" for i in range(10)})
    run("finetune", *FLAGS, "--eval", "--init", "folder", "--output", "out")
    out = capsys.readouterr().out
    assert "word 0, other word" in out and "top1" in out


def test_classes_in_another_order_are_refused(capsys):
    names = data.load_dataset("synthetic:64", "val", 32).classes
    save_folder(dict(enumerate(names[::-1])))
    message = fails(capsys, "finetune", *FLAGS, "--eval", "--init", "folder")
    assert names[0] in message and names[-1] in message


def test_classes_count_by_number_however_json_sorts_them():
    """Hubs have config.json with "0", "1", "10", "2", …: sorted as text."""
    save_folder({str(i): f"word {i}" for i in sorted(range(12), key=str)})
    assert weights.load("folder").classes == [f"word {i}" for i in range(12)]


def test_a_folder_without_safetensors():
    """The older form; test_export.py has the newer one."""
    vit, x = save_folder({str(i): f"word {i}" for i in range(10)}), pixels(2, 3, 32, 32)
    for own in (weights.load("folder"), begun("folder", "--eval")):
        assert torch.allclose(own(x), vit(x), atol=1e-5)


def test_a_folder_of_another_architecture_is_refused():
    save_folder({"0": "ant"})
    Path("folder/config.json").write_text('{"hidden_act": "relu"}')
    with pytest.raises(InputError, match="folder: .*hidden_act relu"):
        weights.load("folder")


# ------------------------------------------------------------------------------------------------
# BEiT's, BEiT v2's, MAE's and MoCo v3's files

@pytest.mark.parametrize("positions, layer_scale, others, inputs", [
    ("block", 0.1, ["lm_head.weight", "mask_token"], HALF),
    ("shared", 0.0, ["lm_head.weight", "mask_token"], HALF),
    ("block", 0.1, ["cls_pt_layers.0.norm1.weight", "cls_pt_lm_head.weight"], IMAGENET_MEAN),
    ("absolute", 0.0, ["decoder_embed.weight", "decoder_blocks.0.norm1.weight", "mask_token",
                       "decoder_pos_embed"], IMAGENET_MEAN),
])
def test_pre_trained_files_need_no_flag(positions, layer_scale, others, inputs):
    """Their heads are left out."""
    own = tiny_vit(**NANO, positions=positions, layer_scale=layer_scale)
    heads = {key: torch.ones(3) for key in others}
    torch.save(dict(model=own.state_dict() | heads), "file.pth")
    vit = begun("file.pth")
    assert torch.equal(vit.blocks[3].mlp.fc2.weight, own.blocks[3].mlp.fc2.weight)
    assert mean(vit) == pytest.approx(inputs)


def test_a_plain_vit_needs_the_statistics_of_its_inputs(capsys):
    save_plain()
    with pytest.raises(InputError, match="vit.pth: .*--statistics"):
        begun("vit.pth")
    assert mean(begun("vit.pth", "--statistics", "half")) == [0.5] * 3
    assert mean(begun("vit.pth", "--statistics", "imagenet")) == pytest.approx(IMAGENET_MEAN)
    assert "vit.pth" in fails(capsys, "tokenizer", "--perceptual", "vit.pth")


@pytest.mark.parametrize("flags, more, named", [
    (["--model", "tiny"], {}, "--model"),                   # what helps
    (["--patch-size", "16"], {}, "--patch-size"),
    ([], dict(pos_embed=(1, 16, 64)), "pos_embed"),         # deit3's and SigLIP's: no class token
    ([], dict(pos_embed=(1, 18, 64)), "pos_embed"),         # of a distilled one: a token more
    ([], dict(pos_embed=(16, 64)), "pos_embed"),
    ([], dict(reg_token=(1, 1, 64)), "reg_token"),
    ([], dict(dist_token=(1, 1, 64)), "dist_token"),
])
def test_another_architecture_is_refused(flags, more, named):
    save_plain(**{name: torch.ones(shape) for name, shape in more.items()})
    with pytest.raises(InputError, match=f"vit.pth: .*{named}"):
        begun("vit.pth", "--statistics", "half", *flags)


def test_moco_v3s_vit_s_has_12_heads(monkeypatch, chain):
    monkeypatch.setitem(SIZES, "small", dict(dim=48, depth=2, heads=6))
    vit = VisionTransformer(
        **NANO | SIZES["small"] | dict(heads=12), positions="absolute", layer_scale=0.0)
    torch.save(as_moco_v3(vit), "vit-s-300ep.pth.tar")
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

def started(capsys, error):
    """The line with which a stage ends that raises an error."""
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
    RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback …\n"
                 "RuntimeError: unable to write to file </torch_9_1_0>: No space left on device"),
    RuntimeError("received 0 items of ancdata"),
    OSError(24, "Too many open files"),
])
def test_workers_that_fail_are_one_line(error, capsys):
    line = started(capsys, error)
    assert all(word in line for word in ("--workers 0", "--shm-size", "ulimit -n"))


def test_a_killed_worker_is_one_line(capsys, monkeypatch):
    """As the kernel kills one when memory is short."""
    monkeypatch.setattr(data, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert "--workers 0" in fails(capsys, "finetune", "--init", "none", "--workers", "1")


@pytest.mark.parametrize("text", [
    "Caught KeyError in DataLoader worker process 0.\n…",
    "out of resource: shared memory, Required: 132096",     # Triton's
])
def test_bugs_keep_their_traceback(text, capsys):
    with pytest.raises(RuntimeError):
        started(capsys, RuntimeError(text))


def test_rank_alone_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert "WORLD_SIZE" in started(capsys, KeyError("never raised"))


# ------------------------------------------------------------------------------------------------
# As a library

def test_paths_and_numpys_numbers_in_the_arguments_become_plain():
    args = finetune.get_args([*COMMON, *OWN["finetune"], "--init", "none", "--steps", "1"])
    args.output, args.lr = Path("out"), np.float64(args.lr)
    finetune.main(args)
    assert newest("out")["args"]["output"] == "out"
    finetune.main(args)                                     # goes on: "finished already"
