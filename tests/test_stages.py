"""The stages by their command lines: the chain, stopping and going on, what they refuse."""
import ast
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, OWN, ROOT, STAGES, run
from PIL import Image
from test_data import make_folder

import data
import finetune
import model
import pretrain
import support.flags
import teacher
from support import checkpoint, launch
from support.run import Run

FLAGS_WITHOUT_DEFAULT = {"statistics", "steps", "epochs", "perceptual_layers", "decoder_channels",
                         "decoder_blocks", "vit"}
# Read the shared flags.
LIBRARY = ("support/flags.py", "support/launch.py", "support/run.py", "support/weights.py",
           "data.py")


def log(folder, split=None):
    """Rows of a run's log: of training, or of evaluations on a split."""
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "args" not in row and row.get("split") == split]


def newest(folder):
    return checkpoint.load(folder)


def weights(state):
    """Digest of all that is trained."""
    rest = ("args", "digest", "best")
    return checkpoint.digest({key: value for key, value in state.items() if key not in rest})


# ------------------------------------------------------------------------------------------------
# Flags

@pytest.fixture
def parsers(monkeypatch):
    """Each stage's parser, before it parses."""
    with monkeypatch.context() as patch:
        patch.setattr(support.flags, "parse", lambda p, recipes, argv: p)
        return {name: module.get_args([]) for name, module in STAGES.items()}


def flags_of(parser):
    """Names of a parser's flags, without any recipe."""
    return set(vars(parser.parse_args([]))) - {"stage"}


def is_args(node):
    """Whether an expression is `args` or `self.args`."""
    name = getattr(node, "id", getattr(node, "attr", None))
    return isinstance(node, (ast.Name, ast.Attribute)) and name == "args"


def read(path):
    """Names of the attributes of `args` that a file reads."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if is_args(node.value):
                names.add(node.attr)
    return names


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_is_read(stage, parsers):
    unread = flags_of(parsers[stage]) - {"help", "recipe"}     # parse() reads them
    for file in (f"{stage}.py", *LIBRARY):
        unread -= read(ROOT / file)
    assert not unread


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_every_recipe_is_a_flag(stage, parsers):
    for name, recipe in STAGES[stage].RECIPES.items():
        assert set(recipe) <= flags_of(parsers[stage]), name


@pytest.mark.parametrize("stage", STAGES)
def test_recipes_fill_every_flag(stage):
    dense = stage in ("segment", "detect")
    expected = ["paper", "demo"] if dense else ["paper", "photos", "cifar", "demo"]
    recipes = STAGES[stage].RECIPES
    assert list(recipes) == expected
    for name, recipe in recipes.items():
        args = STAGES[stage].get_args(["--recipe", name])
        empty = {key for key, value in vars(args).items() if value is None}
        assert empty <= FLAGS_WITHOUT_DEFAULT
        assert (args.steps is None) != (args.epochs is None)
        assert args.output == f"runs/{name}/{stage}"
        for key, value in recipe.items():
            assert getattr(args, key) == value


def help_of_flags(text):
    """The part of a help text on each flag."""
    parts = {}
    for line in text.splitlines():
        begins = re.match(r"  (--[a-z-]+)", line)
        if begins:
            flag = begins[1]
            parts[flag] = line
        elif parts and line.startswith("     "):
            parts[flag] += line
    return parts


@pytest.mark.parametrize("recipe", ["paper", "demo"])
@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_the_recipes_defaults(stage, recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")                   # a help text is not broken into lines
    with pytest.raises(SystemExit) as stop:
        STAGES[stage].get_args(["--help", "--recipe", recipe])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    shown = help_of_flags(text)
    for key, value in STAGES[stage].RECIPES[recipe].items():
        found = re.search(r"\(default: (.*)\)$", shown["--" + key.replace("_", "-")])
        if value is None or value is False:                 # the text says what happens
            assert not found
        elif isinstance(value, str):
            assert found[1] == value
        else:
            assert json.loads(found[1]) == value
    assert not re.search(r"default: (None|False)", text)


# ------------------------------------------------------------------------------------------------
# The chain

@pytest.mark.parametrize("stage", STAGES)
def test_the_chain_runs(stage, chain):
    folder = getattr(chain, stage)
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert first["args"]["stage"] == stage
    assert first["args"]["batch_size"] == 16
    assert first["world_size"] == 1
    rows = log(folder)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[1]["epoch"] == 1
    for row in rows:
        assert math.isfinite(row["loss"])
        assert row["images_per_s"] > 0
    state = newest(folder)
    assert (state["stage"], state["step"], state["epoch"]) == (stage, 6, 1)
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    files = sorted(path.name for path in folder.glob("step-*"))
    assert files == ["step-00000004.pt", "step-00000006.pt"]


def a_moco():
    encoder = model.VisionTransformer(
        8, 4, dim=16, depth=1, heads=2, positions="absolute", layer_scale=0.0)
    return teacher.MoCo(encoder, hidden=8, features=4, temperature=0.2)


def test_contrastive_loss_against_a_plain_loop():
    """MoCo v3, algorithm 1: 2τ · cross-entropy of each query over all keys, its own in its place.
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(6, 4, generator=generator)
    k = torch.randn(6, 4, generator=generator)
    loss, hits = a_moco().ctr(q, k)
    expected = right = 0.0
    for i in range(6):
        similarity = []
        for key in k:
            cosine = torch.dot(q[i], key) / q[i].norm() / key.norm()
            similarity.append(cosine.item() / 0.2)
        expected += (math.log(sum(math.exp(s) for s in similarity)) - similarity[i]) / 6
        right += similarity.index(max(similarity)) == i
    assert loss.item() == pytest.approx(2 * 0.2 * expected, rel=1e-5)
    assert hits.item() == pytest.approx(right / 6)


def test_keys_are_momentum_copies(chain):
    moco = a_moco()
    with torch.no_grad():
        moco.encoder.cls_token += 1
        moco.projector[0].weight += 1
    f_k = moco.momentum_encoder.cls_token.clone()
    f_q = moco.encoder.cls_token.clone()
    p_k = moco.momentum_projector[0].weight.clone()
    p_q = moco.projector[0].weight.clone()
    moco.update_momentum(0.9)
    assert torch.allclose(moco.momentum_encoder.cls_token, 0.9 * f_k + 0.1 * f_q, atol=1e-6)
    assert torch.allclose(moco.momentum_projector[0].weight, 0.9 * p_k + 0.1 * p_q, atol=1e-6)
    assert torch.equal(moco.encoder.cls_token, f_q)
    # in training they follow, slowly, and the patch projection stays as drawn
    early = torch.load(chain.teacher / "step-00000004.pt", weights_only=True)
    late = newest(chain.teacher)
    fc1 = "blocks.0.mlp.fc1.weight"
    names = ("model", "momentum_encoder")
    moved = [(late[name][fc1] - early[name][fc1]).abs().max() for name in names]
    assert 0 < moved[1] < moved[0]
    patches = "patch_embed.proj.weight"
    for name in names:
        assert torch.equal(late[name][patches], early["model"][patches])


def test_the_tokenizer_is_evaluated_and_pictured(chain):
    rows = log(chain.tokenizer, "val")
    assert [row["step"] for row in rows] == [4, 6]
    for row in rows:
        assert 0 < row["psnr"] < 60
        assert 0 < row["usage"] <= 1
        assert 1 <= row["perplexity"] <= 32 * row["usage"] + 1e-3
        assert row["distance"] > 0
    for picture in ("reconstructions.png", "codes.png"):
        assert (chain.tokenizer / picture).stat().st_size > 1000
    row = log(chain.tokenizer)[-1]                          # the visible sum of named terms
    expected = row["pixel"] + 0.25 * row["commitment"] + row["perceptual"]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["perceptual"] > 0


def test_pretraining_is_evaluated_and_pictured(chain):
    rows = log(chain.pretrain, "val")
    assert [row["step"] for row in rows] == [4, 6]
    for row in rows:
        assert 2 < row["loss"] < 5                          # ln 32 = 3.5
        assert 0 < row["accuracy"] < 0.5
    width, height = Image.open(chain.pretrain / "masked.png").size
    assert (width, height) == (8 * 34 + 2, 4 * 34 + 2)      # images of 32 px, margins of 2


@pytest.mark.parametrize("flags", [[], ["--mae", "--mask-ratio", "0.75"]])
def test_an_evaluation_of_pretraining_changes_nothing(flags, chain, monkeypatch):
    flags = [*chain.inputs["pretrain"], *flags]
    run("pretrain", *flags, "--output", "evaluated")
    assert len(log("evaluated", "val")) == 2
    assert Path("evaluated/masked.png").exists()
    monkeypatch.setattr(pretrain, "evaluate", lambda *_: {})
    run("pretrain", *flags, "--output", "plain")
    assert not Path("plain/masked.png").exists()
    assert weights(newest("evaluated")) == weights(newest("plain"))


def test_an_evaluation_of_pretraining_is_the_mean_over_its_images(chain):
    """Whatever the batches and workers: all images under the same masks, by hand too."""
    args = pretrain.get_args([*COMMON, *chain.inputs["pretrain"], "--output", "."])
    tokenizer, _, _ = pretrain.load_tokenizer(args)
    dataset, device = data.load_dataset("synthetic:64", "val", 32), torch.device("cpu")
    torch.manual_seed(0)
    vit, _, _ = pretrain.build(args, codes=32)
    transform = pretrain.AugmentAndMask(
        data.evaluation(32, 1.0), lambda: model.block_mask(4, 6, 2))
    losses = []
    for index in range(len(dataset)):
        image, mask, _ = data.Samples(dataset, transform, seed=0)[0, index][0]
        assert mask.sum() == 6
        target = tokenizer.encode(image[None], 4)[0][mask]
        logits = vit.eval()(image[None], mask[None])
        losses.append(torch.nn.functional.cross_entropy(logits, target).item())
    for args.batch_size, args.workers in ((16, 0), (7, 1)):
        vit.train()
        row = pretrain.evaluate(args, vit, tokenizer, dataset, transform, device)
        assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert vit.training


# ------------------------------------------------------------------------------------------------
# Stopping and going on

def link_the_chain(stage, chain):
    """Links to the chain's other runs: a run's arguments, relative paths, must not change."""
    Path("runs/demo").mkdir(parents=True)
    for name in STAGES:
        if name != stage:
            (Path("runs/demo") / name).symlink_to(getattr(chain, name))


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_ends_bit_identical(stage, chain, monkeypatch):
    """Stopped by a signal in mid-epoch, the same command ends as the run that was never stopped."""
    def interrupted(self):
        if self.step == 2:
            signal.raise_signal(signal.SIGTERM)
        agree(self)

    link_the_chain(stage, chain)
    agree = Run.agree
    with monkeypatch.context() as patch:
        patch.setattr(Run, "agree", interrupted)
        with pytest.raises(SystemExit) as stop:
            run(stage)
    assert stop.value.code == 128 + signal.SIGTERM
    output = Path("runs/demo") / stage
    assert newest(output)["step"] == 3
    torch.manual_seed(123)                                  # whatever the process did before
    run(stage, "--workers", "1")                            # and with loader processes
    whole = newest(getattr(chain, stage))
    resumed = newest(output)
    assert resumed["step"] == 6
    assert weights(resumed) == weights(whole)
    assert resumed["best"] == whole["best"]
    # the command of a run that has ended changes nothing
    run(stage)
    assert weights(newest(output)) == weights(whole)


@pytest.mark.parametrize("stage", STAGES)
def test_another_seed_ends_elsewhere(stage, chain):
    run(stage, *chain.inputs[stage], "--seed", "1", "--steps", "4", "--output", "other")
    other = newest("other")
    whole = torch.load(getattr(chain, stage) / "step-00000004.pt", weights_only=True)
    assert other["step"] == whole["step"] == 4
    assert weights(other) != weights(whole)


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_changes_nothing(stage, chain, monkeypatch):
    live = {}
    init = Run.__init__
    clean = data.Samples.__getitem__
    left = 64 + 5                                           # samples before the bad one
    if stage != "teacher":
        left += 40                                          # of the evaluation after an epoch

    def keep(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        live.update(modules=self.modules, optimizer=self.optimizer)

    def poisoned(self, key):
        nonlocal left
        sample, label = clean(self, key)
        left -= 1
        if left == 0:
            first, *more = sample if isinstance(sample, (list, tuple)) else [sample]
            first = first.float()                           # two views; an image and its mask
            first[0, 0, 0] = math.nan
            sample = [first, *more] if more else first
        return sample, label

    monkeypatch.setattr(Run, "__init__", keep)
    monkeypatch.setattr(data.Samples, "__getitem__", poisoned)
    with pytest.raises(FloatingPointError, match="not finite at step 4 on ranks .0."):
        run(stage, *chain.inputs[stage], "--output", "run")
    state = newest("run")
    assert state["step"] == 4
    assert len(list(Path("run").glob("step-*.pt"))) == 1
    # Batch norm takes its running averages in the forward pass; of the bad one none is written.
    averages = ("running_mean", "running_var", "num_batches_tracked")
    for name, module in live["modules"].items():
        own, stored = ({key: value for key, value in weights.items() if not key.endswith(averages)}
                       for weights in (module.state_dict(), state[name]))
        assert checkpoint.digest(own) == checkpoint.digest(stored)
        assert all(value.isfinite().all() for value in state[name].values())
    moments = live["optimizer"].state_dict()["state"]
    assert checkpoint.digest(moments) == checkpoint.digest(state["optimizer"]["state"])


def start(stage, *flags):
    """A stage in a process of its own, and in a process group."""
    command = [sys.executable, str(ROOT / f"{stage}.py"), *COMMON, *flags]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


def kill_the_group(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def test_sigterm_to_the_process_group_saves(folder):
    """As torchrun and batch systems send it: to the loader's workers too."""
    process = start("teacher", "--steps", "100000", "--workers", "1", "--output", "run")
    file = Path("run/log.jsonl")
    deadline = time.time() + 600                            # only so that a failure does not hang
    try:
        while time.time() < deadline and not (file.exists() and log("run")):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        errors = process.communicate(timeout=600)[1]
    finally:
        kill_the_group(process)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert newest("run")["step"] >= 2


# ------------------------------------------------------------------------------------------------
# What a stage can be told

def short(stage, chain, *flags):
    """Two steps to a folder of their own → the run's last logged row."""
    run(stage, *chain.inputs[stage], "--steps", "2", "--output", "run", *flags)
    row = log("run")[-1]
    assert row["step"] == 2
    assert math.isfinite(row["loss"])
    return row


def test_accumulated_micro_batches_are_the_same_step(chain):
    flags = [*chain.inputs["pretrain"], "--steps", "3", "--drop-path", "0"]
    run("pretrain", *flags, "--accumulate", "4", "--output", "run")
    run("pretrain", *flags, "--output", "whole")
    one = newest("run")["model"]
    other = newest("whole")["model"]
    for key in one:
        assert torch.allclose(one[key], other[key], atol=2e-5), key


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_compile_and_accumulation(stage, chain):
    flags = ["--amp", "bf16", "--accumulate", "2", "--compile"]
    if stage != "tokenizer":
        flags.append("--checkpoint-activations")
    with torch.compiler.set_stance("force_eager"):          # wrapped, without minutes of compiling
        short(stage, chain, *flags)
    ours = newest("run")["model"]
    whole = newest(getattr(chain, stage))["model"]
    assert list(ours) == list(whole)                        # unwrapped names
    assert all(ours[key].dtype == whole[key].dtype for key in ours)


def test_pixel_only_codebook(chain):
    row = short("tokenizer", chain, "--perceptual-weight", "0", "--perceptual", "nowhere")
    assert row["perceptual"] == 0
    assert row["loss"] == pytest.approx(row["pixel"] + 0.25 * row["commitment"], rel=1e-5)
    assert "distance" not in log("run", "val")[-1]


def test_adversarial_codebook(chain):
    row = short("tokenizer", chain, "--adversarial-weight", "0.1")
    whole = row["pixel"] + 0.25 * row["commitment"] + row["perceptual"]
    whole += 0.1 * row["fool"] + row["judge"]
    assert row["loss"] == pytest.approx(whole, rel=1e-5)
    trained = newest("run")["discriminator"]
    still = ["--adversarial-weight", "0.1", "--lr", "0", "--steps", "1", "--output", "initial"]
    run("tokenizer", *chain.inputs["tokenizer"], *still)
    initial = newest("initial")["discriminator"]
    for key in trained:
        if key.endswith("weight"):
            assert not torch.equal(trained[key], initial[key])


def test_perceptual_layers(chain):
    one = short("tokenizer", chain, "--perceptual-layers", "1")["perceptual"]
    shutil.rmtree("run")
    assert short("tokenizer", chain, "--perceptual-layers", "1", "3")["perceptual"] > one
    with pytest.raises(launch.InputError, match=r"perceptual layers \[5\].*layers 1 to 4"):
        short("tokenizer", chain, "--perceptual-layers", "5")


def test_a_supervised_network_as_the_perceptual_one(chain):
    """The paper's ablation (Table 5)."""
    assert short("tokenizer", chain, "--perceptual", str(chain.finetune))["perceptual"] > 0


def test_tokenizers_of_about_the_patch_size_fit(chain):
    """The demo's codes are of 8 px; with patches of 4 and 16 px the tokenizer sees resized images.
    """
    for size in ("4", "16"):
        short("pretrain", chain, "--patch-size", size, "--mask-block", "1")
        shutil.rmtree("run")


# ------------------------------------------------------------------------------------------------
# Fine-tuning

@pytest.mark.parametrize("flags", [
    ["--init", "none"],
    ["--init", "teacher"],
    ["--init", "finetune"],
    ["--cutmix", "1.0", "--randaugment", "14", "--erasing", "0.25"],
], ids=" ".join)
def test_fine_tuning(flags, chain):
    runs = {"teacher": str(chain.teacher), "finetune": str(chain.finetune)}
    short("finetune", chain, *[runs.get(flag, flag) for flag in flags])
    row = log("run", "val")[-1]
    assert row["images"] == 40
    assert 0 <= row["top1"] <= row["top5"] <= 100


def test_layers_learn_at_their_own_rates(chain):
    groups = newest(chain.finetune)["optimizer"]["param_groups"]
    assert len({group["lr_scale"] for group in groups}) == 6        # embeddings, 4 blocks, head
    lr = log(chain.finetune)[-1]["lr"]
    for group in groups:
        assert group["lr"] == pytest.approx(lr * group["lr_scale"])




def test_an_evaluation_at_another_size_says_so(chain, capsys):
    flags = ["--eval", "--init", str(chain.finetune)]
    size = newest(chain.finetune)["args"]["image_size"]
    run("finetune", *flags)
    assert "trained with" not in capsys.readouterr().out
    run("finetune", *flags, "--image-size", str(size + 8), "--eval-crop", "0.5")
    said = capsys.readouterr().out
    assert f"trained with --image-size {size}, is evaluated with {size + 8}\n" in said
    assert "trained with --eval-crop 1.0, is evaluated with 0.5\n" in said


def test_evaluation_repeats_what_the_training_logged(chain):
    row = run("finetune", "--eval", "--init", str(chain.finetune))
    logged = log(chain.finetune, "val")[-1]
    assert (row["top1"], row["top5"], row["images"]) == (logged["top1"], logged["top5"], 40)
    output = Path("runs/demo/finetune")
    assert [path.name for path in output.iterdir()] == ["log.jsonl"]    # one line, no checkpoint
    (line,) = log(output, "val")
    assert line == line | row
    for init in (str(chain.pretrain), "none"):
        with pytest.raises(launch.InputError, match="no classifier of 10 classes"):
            run("finetune", "--eval", "--init", init)


def test_names_of_classes_are_compared(folder, capsys):
    """By name: a folder renamed, so that the order is another, was evaluated without a word."""
    make_folder(folder / "set", ("ant", "bee", "cow"), images=8)
    flags = ["--data", "set", "--init", "none", "--image-size", "16", "--batch-size", "8"]
    run("finetune", *flags, "--steps", "1", "--output", "run")
    assert newest("run")["identity"]["class_names"] == ["ant", "bee", "cow"]
    for split in ("train", "val"):
        (folder / "set" / split / "bee").rename(folder / "set" / split / "zebra")
    evaluation = [*flags, "--init", "run", "--eval"]
    message = fails(capsys, "finetune", *evaluation)
    assert "--data set: its class 1 is cow, that of --init run is bee" in message
    assert "class_names: ['ant', 'bee', 'cow'], now" in fails(
        capsys, "finetune", *flags, "--steps", "2", "--output", "run")
    run("finetune", *flags, "--init", "run", "--steps", "1", "--output", "other")   # another task
    # a run that names none
    state = newest("run")
    del state["digest"], state["identity"]
    for file in Path("run").glob("*.pt"):
        file.unlink()
    checkpoint.write(Path("run/step-00000001.pt"), state)
    assert run("finetune", *evaluation)["images"] == 24


@pytest.mark.parametrize("flags", [[], ["--eval"]])
def test_one_class_is_refused(flags, folder, capsys):
    make_folder(folder / "set", ["ant"], images=8)
    message = fails(capsys, "finetune", "--data", "set", "--init", "none", *flags)
    assert "--data set: one class only, ant: two or more are needed" in message


# ------------------------------------------------------------------------------------------------
# A folder of photos, without labels

@pytest.mark.parametrize("form", ["flat", "nested"])
def test_stages_0_to_2_on_a_folder_of_photos(form, folder, monkeypatch):
    """--recipe photos, small. The same images are held out in all stages, never trained on."""
    used = set()

    def watched(dataset, index):
        path, _ = dataset.samples[index]
        used.add((Path(path).name, torch.is_grad_enabled()))    # not where it is evaluated
        return plain_read(dataset, index)

    plain_read = data.read
    monkeypatch.setattr(data, "read", watched)
    for i in range(24):
        path = folder / "photos" / (f"{i % 3}/a" if form == "nested" else "") / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (40, 50 + i, 3), np.uint8)
        Image.fromarray(noise).save(path)
    common = ["--recipe", "photos", "--data", "photos", "--image-size", "32", "--batch-size", "8",
              "--epochs", "1", "--workers", "0", "--amp", "fp32"]
    small = ["--model", "nano", "--patch-size", "8", "--warmup-epochs", "0"]
    own = {
        "teacher": [*small, "--hidden", "16", "--features", "8"],
        "tokenizer": ["--vit", "nano", "--patch-size", "8", "--codebook-size", "32",
                      "--warmup-steps", "0"],
        "pretrain": [*small, "--mask-block", "2"],
    }
    held_out = {Path(path).name for path, _ in data.load_images("photos", "val", 32).samples}
    assert len(held_out) == 2
    for stage, flags in own.items():
        used.clear()
        module = STAGES[stage]
        module.main(module.get_args([*common, *flags]))
        assert newest(f"runs/photos/{stage}")["step"] == 2
        trained = {name for name, training in used if training}
        assert len(trained) >= 16                           # one is also read for its size
        assert not trained & held_out
        if stage == "tokenizer":
            assert {name for name, training in used if not training} == held_out
    finetune.build(finetune.get_args([*common, *small]), 3, newest("runs/photos/pretrain"))


# ------------------------------------------------------------------------------------------------
# What a stage refuses: one line that names the culprit, exit status 2

def fails(capsys, stage, *flags, before=0):
    """Its last line on stderr, the only one but for `before` that say why a file was not loaded."""
    module = STAGES[stage]
    with pytest.raises(SystemExit) as stop:
        launch.start(module.main, module.get_args([*COMMON, *OWN[stage], *flags]))
    assert stop.value.code == 2
    *others, message = capsys.readouterr().err.splitlines()
    assert message.startswith(f"{stage}.py: ")
    assert len(others) == before
    assert all(": not loaded: " in line for line in others)
    return message


def test_bad_input_of_every_stage(capsys):
    for stage in STAGES:
        missing = ["--init", "none"]                        # what would be read before --data
        if stage == "tokenizer":
            missing = ["--perceptual-weight", "0"]
        if stage in ("teacher", "pretrain"):
            missing = []
        if stage != "pretrain":                             # it looks for its tokenizer first
            nowhere = fails(capsys, stage, "--data", "nowhere", *missing)
            assert "nowhere: no such folder" in nowhere
            large = fails(capsys, stage, "--batch-size", "1024", *missing)
            assert "--batch-size 1024" in large
        odd = fails(capsys, stage, "--batch-size", "16", "--accumulate", "3", *missing)
        assert "try 15" in odd


def test_bad_sizes(capsys, chain):
    small = ["--image-size", "30"]
    message = fails(capsys, "teacher", *small)
    assert "image size 30 is no multiple of patch size 8: try 24" in message
    message = fails(capsys, "tokenizer", "--image-size", "36", "--perceptual-weight", "0")
    assert "image size 36 " in message
    assert "30" in fails(capsys, "pretrain", *chain.inputs["pretrain"], *small)
    assert "30" in fails(capsys, "finetune", "--init", "none", *small)


def test_checkpoints_of_another_stage(capsys, chain):
    message = fails(capsys, "tokenizer", "--perceptual", str(chain.pretrain))
    assert "pretrain" in message
    assert "teacher" in message
    assert str(chain.pretrain) in message
    message = fails(capsys, "pretrain", "--tokenizer", str(chain.teacher))
    assert "found a checkpoint of teacher, expected one of tokenizer" in message
    message = fails(capsys, "finetune", "--init", str(chain.tokenizer))
    assert "tokenizer" in message
    assert "pretrain" in message


def test_files_that_are_no_checkpoints(capsys):
    reads = {"tokenizer": "--perceptual", "pretrain": "--tokenizer", "finetune": "--init"}
    torch.save(dict(weight=torch.ones(2)), "other.pt")
    torch.save(torch.ones(2), "tensor.pt")                  # not even a dict
    for stage, flag in reads.items():
        assert f"{flag} nowhere: nothing there" in fails(capsys, stage, flag, "nowhere")
        assert "other.pt" in fails(capsys, stage, flag, "other.pt")
        assert "tensor.pt" in fails(capsys, stage, flag, "tensor.pt")
    assert "other.pt: found " in fails(capsys, "pretrain", "--tokenizer", "other.pt")


def test_a_tokenizer_that_does_not_fit(capsys, chain):
    for size, grid in ((2, "16×16"), (32, "1×1")):
        message = fails(capsys, "pretrain", *chain.inputs["pretrain"], "--patch-size", str(size))
        assert re.search(f"codes of 8 px .*{grid} patches of {size} px", message)


def test_another_perceptual_network_in_a_run_begun(capsys, chain):
    """It is another loss: its digest is compared."""
    flags = ["--steps", "2", "--output", "run", "--perceptual", "teacher"]
    shutil.copytree(chain.teacher, "teacher")
    run("tokenizer", *flags)
    Path("teacher/step-00000006.pt").unlink()               # leaves the one before it
    assert "(perceptual: " in fails(capsys, "tokenizer", *flags)


def test_another_tokenizer_in_a_run_begun(capsys, chain):
    """Its codes are other targets: its digest is compared."""
    flags = ["--tokenizer", "tokenizer", "--steps", "2", "--output", "run"]
    shutil.copytree(chain.tokenizer, "tokenizer")
    run("pretrain", *flags)
    Path("tokenizer/step-00000006.pt").unlink()             # leaves the one before it
    assert "(tokenizer: " in fails(capsys, "pretrain", *flags)


def test_an_unreadable_image_ends_a_real_process(folder):
    """Though the loader's worker ignores SIGTERM: the process must not wait for it."""
    path = make_folder(folder / "set", images=10) / "train" / "bee" / "0.jpg"
    path.write_bytes(path.read_bytes()[:300])
    process = start("teacher", "--data", "set", "--workers", "1")
    try:
        errors = process.communicate(timeout=600)[1]
    finally:
        kill_the_group(process)
    assert process.returncode == 2
    assert errors.startswith("teacher.py: set/train/bee/0.jpg: not a readable image")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("ratio", ["0.01", "0.99"])      # within refuses 0 and 1
def test_a_share_of_masked_patches_that_leaves_nothing_to_learn(ratio, chain, capsys):
    message = fails(capsys, "pretrain", *chain.inputs["pretrain"], "--mask-ratio", ratio)
    assert f"--mask-ratio {float(ratio)}: it masks" in message
