"""The stages by their command lines: the chain, stopping and going on, what they refuse."""
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, ROOT, STAGES, run
from helpers import fails, log, newest, printed, process_group, rows, weights
from PIL import Image
from test_data import make_folder

import data
import model
import pretrain
import support.flags
import teacher
from support import checkpoint
from support.run import Run

# ------------------------------------------------------------------------------------------------
# Flags

FLAGS_WITHOUT_DEFAULT = {"statistics", "steps", "epochs", "perceptual_layers", "decoder_channels",
                         "decoder_blocks", "vit"}
# Read the shared flags.
LIBRARY = ("support/flags.py", "support/launch.py", "support/run.py", "support/weights.py",
           "data.py")


def flags_of(stage, monkeypatch):
    """Names of a stage's flags, without any recipe."""
    with monkeypatch.context() as patch:
        patch.setattr(support.flags, "parse", lambda p, recipes, argv: p)
        parser = STAGES[stage].get_args([])
    return set(vars(parser.parse_args([]))) - {"stage"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_is_read(stage, monkeypatch):
    unread = flags_of(stage, monkeypatch) - {"help", "recipe"}     # parse() reads them
    for file in (f"{stage}.py", *LIBRARY):
        unread -= set(re.findall(r"\bargs\.(\w+)\b(?! = )", (ROOT / file).read_text()))
    assert not unread


@pytest.mark.parametrize("stage", STAGES)
def test_recipes_are_of_flags_and_fill_them_all(stage, monkeypatch):
    dense = stage in ("segment", "detect")
    recipes = STAGES[stage].RECIPES
    assert list(recipes) == (["paper", "demo"] if dense else ["paper", "photos", "cifar", "demo"])
    for name, recipe in recipes.items():
        assert set(recipe) <= flags_of(stage, monkeypatch)
        args = STAGES[stage].get_args(["--recipe", name])
        empty = {key for key, value in vars(args).items() if value is None}
        assert empty <= FLAGS_WITHOUT_DEFAULT
        assert (args.steps is None) != (args.epochs is None)
        assert vars(args) == vars(args) | recipe


# ------------------------------------------------------------------------------------------------
# The chain

@pytest.mark.parametrize("stage", STAGES)
def test_the_chain_runs(stage, chain):
    folder = getattr(chain, stage)
    assert rows(folder)[0]["args"]["stage"] == stage
    training = log(folder)
    assert [row["step"] for row in training] == [2, 4, 6]
    assert training[1]["epoch"] == 1
    for row in training:
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
    pairs = [(moco.encoder.cls_token, moco.momentum_encoder.cls_token),
             (moco.projector[0].weight, moco.momentum_projector[0].weight)]
    with torch.no_grad():
        for own, _ in pairs:
            own += 1
    before = [(own.clone(), copy.clone()) for own, copy in pairs]
    moco.update_momentum(0.9)
    for (own, copy), (own_before, copy_before) in zip(pairs, before, strict=True):
        assert torch.equal(own, own_before)
        assert torch.allclose(copy, 0.9 * copy_before + 0.1 * own_before, atol=1e-6)
    # in training they follow, slowly, and the patch projection stays as drawn
    early = checkpoint.load(chain.teacher / "step-00000004.pt")
    late = newest(chain.teacher)
    fc1 = "blocks.0.mlp.fc1.weight"
    names = ("model", "momentum_encoder")
    moved = [(late[name][fc1] - early[name][fc1]).abs().max() for name in names]
    assert 0 < moved[1] < moved[0]
    patches = "patch_embed.proj.weight"
    for name in names:
        assert torch.equal(late[name][patches], early["model"][patches])


def test_the_tokenizer_is_evaluated_and_pictured(chain):
    evaluations = log(chain.tokenizer, "val")
    assert [row["step"] for row in evaluations] == [4, 6]
    for row in evaluations:
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
    evaluations = log(chain.pretrain, "val")
    assert [row["step"] for row in evaluations] == [4, 6]
    for row in evaluations:
        assert 2 < row["loss"] < 5                          # ln 32 = 3.5
        assert 0 < row["accuracy"] < 0.5
    width, height = Image.open(chain.pretrain / "masked.png").size
    assert (width, height) == (8 * 34 + 2, 4 * 34 + 2)      # images of 32 px, margins of 2


def test_an_evaluation_of_pretraining_changes_nothing(chain, monkeypatch):
    monkeypatch.setattr(pretrain, "evaluate", lambda *_: {})
    run("pretrain", *chain.inputs["pretrain"], "--output", "plain")
    assert not Path("plain/masked.png").exists()            # the control
    assert weights(newest("plain")) == weights(newest(chain.pretrain))


def test_an_evaluation_of_pretraining_is_the_mean_over_its_images(chain):
    """Whatever the batches and workers: all images under the same masks, by hand too."""
    args = pretrain.get_args([*COMMON, *chain.inputs["pretrain"], "--output", "."])
    tokenizer, _, _ = pretrain.load_tokenizer(args)
    dataset, device = data.load_dataset("synthetic:64", "val", 32), torch.device("cpu")
    torch.manual_seed(0)
    vit, _, _ = pretrain.build(args, codes=32)
    transform = pretrain.AugmentAndMask(
        data.eval_transform(32, 1.0), lambda: model.block_mask(4, 6, 2))
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

@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_ends_bit_identical(stage, chain, monkeypatch):
    """Stopped by a signal in mid-epoch, the same command ends as the run that was never stopped."""
    def interrupted(self):
        if self.step == 2:
            signal.raise_signal(signal.SIGTERM)
        agree(self)

    flags = [*chain.inputs[stage], "--output", "run"]
    agree = Run.agree
    with monkeypatch.context() as patch:
        patch.setattr(Run, "agree", interrupted)
        with pytest.raises(SystemExit) as stop:
            run(stage, *flags)
    assert stop.value.code == 128 + signal.SIGTERM
    assert newest("run")["step"] == 3
    torch.manual_seed(123)                                  # whatever the process did before
    run(stage, *flags, "--workers", "1")                    # and with loader processes
    resumed, whole = newest("run"), newest(getattr(chain, stage))
    assert resumed["step"] == 6
    assert weights(resumed) == weights(whole)
    assert resumed["best"] == whole["best"]


def test_another_seed_ends_elsewhere(chain):
    """The control of the test above."""
    run("pretrain", *chain.inputs["pretrain"], "--seed", "1", "--output", "other")
    other, whole = newest("other"), newest(chain.pretrain)
    assert other["step"] == whole["step"]
    assert weights(other) != weights(whole)


def test_a_loss_that_is_not_finite_changes_nothing(chain, monkeypatch):
    """In the tokenizer, which updates its codebook without a gradient too."""
    live = {}
    init = Run.__init__
    clean = data.Samples.__getitem__
    left = 64 + 40 + 5                          # the bad one is the fifth of the second epoch

    def keep(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        live.update(modules=self.modules, optimizer=self.optimizer)

    def poisoned(self, key):
        nonlocal left
        image, label = clean(self, key)
        left -= 1
        return (image * math.nan if left == 0 else image), label

    monkeypatch.setattr(Run, "__init__", keep)
    monkeypatch.setattr(data.Samples, "__getitem__", poisoned)
    with pytest.raises(FloatingPointError, match="not finite at step 4 on ranks .0."):
        run("tokenizer", *chain.inputs["tokenizer"], "--output", "run")
    state = newest("run")
    assert state["step"] == 4
    for name, module in live["modules"].items():
        assert checkpoint.digest(module.state_dict()) == checkpoint.digest(state[name])
    moments = live["optimizer"].state_dict()["state"]
    assert checkpoint.digest(moments) == checkpoint.digest(state["optimizer"]["state"])


def test_sigterm_to_the_process_group_saves():
    """As torchrun and batch systems send it: to the loader's workers too."""
    flags = [*COMMON, "--steps", "100000", "--workers", "1", "--output", "run"]
    file = Path("run/log.jsonl")
    with process_group(ROOT / "teacher.py", *flags) as process:
        while process.poll() is None and not (file.exists() and log("run")):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(600) == 128 + signal.SIGTERM, printed()
    assert "Traceback" not in printed()
    assert newest("run")["step"] >= 2


# ------------------------------------------------------------------------------------------------
# What a stage can be told

def short(stage, chain, *flags):
    """Two steps to a folder of their own → the run's last logged row."""
    shutil.rmtree("run", ignore_errors=True)
    run(stage, *chain.inputs[stage], "--steps", "2", "--output", "run", *flags)
    row = log("run")[-1]
    assert row["step"] == 2
    assert math.isfinite(row["loss"])
    return row


def test_accumulated_micro_batches_are_the_same_step(chain):
    short("pretrain", chain, "--drop-path", "0", "--accumulate", "4")
    one = newest("run")["model"]
    short("pretrain", chain, "--drop-path", "0")
    other = newest("run")["model"]
    for key in one:
        assert torch.allclose(one[key], other[key], atol=2e-5), key


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_compile_and_accumulation(stage, chain):
    flags = ["--amp", "bf16", "--batch-size", "4", "--accumulate", "2", "--compile"]
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
    state = newest("run")["optimizer"]                      # the discriminator is trained too
    names = state["param_groups"][0]["param_names"]
    own = [i for i, name in enumerate(names) if re.match(r"discriminator\..*weight", name)]
    assert own
    assert all(state["state"][i]["exp_avg"].any() for i in own)


def test_a_supervised_network_as_the_perceptual_one(chain):
    """The paper's ablation (Table 5)."""
    assert short("tokenizer", chain, "--perceptual", str(chain.finetune))["perceptual"] > 0


@pytest.mark.parametrize("size", ["4", "16"])
def test_tokenizers_of_about_the_patch_size_fit(size, chain):
    """The demo's codes are of 8 px: the tokenizer sees resized images."""
    short("pretrain", chain, "--patch-size", size, "--mask-block", "1")


def test_fine_tuning_from_scratch_with_all_augmentation(chain):
    short("finetune", chain, "--init", "none", "--cutmix", "1", "--randaugment", "14",
          "--erasing", "0.25")
    row = log("run", "val")[-1]
    assert row["images"] == 40
    assert 0 <= row["top1"] <= row["top5"] <= 100


def test_layers_learn_at_their_own_rates(chain):
    groups = newest(chain.finetune)["optimizer"]["param_groups"]
    assert len({group["lr_scale"] for group in groups}) == 6        # embeddings, 4 blocks, head
    lr = log(chain.finetune)[-1]["lr"]
    for group in groups:
        assert group["lr"] == pytest.approx(lr * group["lr_scale"])


def test_evaluation_repeats_what_the_training_logged(chain, capsys):
    row = run("finetune", "--eval", "--init", str(chain.finetune))
    assert "trained with" not in capsys.readouterr().out
    logged = log(chain.finetune, "val")[-1]
    assert (row["top1"], row["top5"], row["images"]) == (logged["top1"], logged["top5"], 40)
    output = Path("runs/demo/finetune")
    assert [path.name for path in output.iterdir()] == ["log.jsonl"]    # one line, no checkpoint
    (line,) = log(output, "val")
    assert line == line | row
    for init in (str(chain.pretrain), "none"):
        assert "--init" in fails(capsys, "finetune", "--eval", "--init", init)
    run("finetune", "--eval", "--init", str(chain.finetune), "--eval-crop", "0.5")
    assert "trained with --eval-crop 1.0, is evaluated with 0.5" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Classes, and a folder of photos without

def test_names_of_classes_are_compared(folder, capsys):
    """By name: a folder renamed, so that the order is another, was evaluated without a word."""
    make_folder(folder / "set", ("ant", "bee", "cow"), images=8)
    flags = ["--data", "set", "--init", "none", "--image-size", "16", "--batch-size", "8"]
    run("finetune", *flags, "--steps", "1", "--output", "run")
    assert newest("run")["identity"]["class_names"] == ["ant", "bee", "cow"]
    for split in ("train", "val"):
        (folder / "set" / split / "bee").rename(folder / "set" / split / "zebra")
    assert "bee" in fails(capsys, "finetune", *flags, "--init", "run", "--eval")
    message = fails(capsys, "finetune", *flags, "--steps", "2", "--output", "run")
    assert "--output run" in message and "class_names" in message
    run("finetune", *flags, "--init", "run", "--steps", "1", "--output", "other")   # another task


def test_one_class_is_refused(folder, capsys):
    make_folder(folder / "set", ["ant"], images=8)
    assert "--data set" in fails(capsys, "finetune", "--data", "set", "--init", "none")


def test_stages_0_to_2_on_a_folder_of_photos(folder, monkeypatch):
    """--recipe photos, small. The same images are held out in all stages, never trained on."""
    used = set()

    def watched(dataset, index):
        path, _ = dataset.samples[index]
        used.add((Path(path).name, torch.is_grad_enabled()))    # not where it is evaluated
        return plain_read(dataset, index)

    plain_read = data.read
    monkeypatch.setattr(data, "read", watched)
    (folder / "photos").mkdir()
    for i in range(24):
        noise = np.random.default_rng(i).integers(0, 255, (40, 50 + i, 3), np.uint8)
        Image.fromarray(noise).save(f"photos/{i:02}.jpg")
    common = ["--recipe", "photos", "--data", "photos", "--image-size", "32", "--patch-size", "8",
              "--batch-size", "8", "--epochs", "1", "--workers", "0"]
    nano = ["--model", "nano", "--warmup-epochs", "0"]
    own = {
        "teacher": [*nano, "--hidden", "16", "--features", "8"],
        "tokenizer": ["--vit", "nano", "--codebook-size", "32", "--warmup-steps", "0"],
        "pretrain": [*nano, "--mask-block", "2"],
    }
    held_out = {Path(path).name for path, _ in data.load_images("photos", "val", 32).samples}
    assert len(held_out) == 2
    for stage, flags in own.items():
        used.clear()
        module = STAGES[stage]
        module.main(module.get_args([*common, *flags]))
        trained = {name for name, training in used if training}
        assert len(trained) >= 16                           # one is also read for its size
        assert not trained & held_out
        if stage == "tokenizer":
            assert {name for name, training in used if not training} == held_out


# ------------------------------------------------------------------------------------------------
# What a stage refuses: one line that names the culprit, exit status 2

@pytest.mark.parametrize("stage, alone", [
    ("teacher", []), ("tokenizer", ["--perceptual-weight", "0"]), ("finetune", ["--init", "none"]),
])
@pytest.mark.parametrize("flags", [
    ["--data", "nowhere"], ["--batch-size", "1024"], ["--batch-size", "15", "--accumulate", "2"],
    ["--image-size", "30"],
], ids=" ".join)
def test_numbers_that_do_not_fit_are_refused_by_name(stage, alone, flags, capsys):
    message = fails(capsys, stage, *alone, *flags)
    assert flags[1] in message


@pytest.mark.parametrize("stage, flag, other", [
    ("tokenizer", "--perceptual", "pretrain"),
    ("pretrain", "--tokenizer", "teacher"),
    ("finetune", "--init", "tokenizer"),
])
def test_what_is_no_checkpoint_of_the_stage_before(stage, flag, other, chain, capsys):
    path = str(getattr(chain, other))
    message = fails(capsys, stage, flag, path)
    assert path in message and f"checkpoint of {other}" in message
    torch.save(dict(weight=torch.ones(2)), "other.pt")
    torch.save(torch.ones(2), "tensor.pt")                  # not even a dict
    for name in ("nowhere", "other.pt", "tensor.pt"):
        assert name in fails(capsys, stage, flag, name)


@pytest.mark.parametrize("size, grid", [("2", "16×16"), ("32", "1×1")])
def test_a_tokenizer_that_does_not_fit(size, grid, capsys, chain):
    assert grid in fails(capsys, "pretrain", *chain.inputs["pretrain"], "--patch-size", size)


@pytest.mark.parametrize("stage, flag, before", [
    ("tokenizer", "--perceptual", "teacher"),
    ("pretrain", "--tokenizer", "tokenizer"),
])
def test_another_network_before_in_a_run_begun(stage, flag, before, capsys, chain):
    """It makes another loss, or other targets: its digest is compared."""
    shutil.copytree(getattr(chain, stage), "run")
    shutil.copytree(getattr(chain, before), "before")
    flags = [flag, "before", "--output", "run"]
    run(stage, *flags)                                      # the control: it has only moved
    Path("before/step-00000006.pt").unlink()                # leaves the one before it
    assert f"({flag[2:]}: " in fails(capsys, stage, *flags)


@pytest.mark.parametrize("ratio", ["0.01", "0.99"])      # within refuses 0 and 1
def test_a_share_of_masked_patches_that_leaves_nothing_to_learn(ratio, chain, capsys):
    message = fails(capsys, "pretrain", *chain.inputs["pretrain"], "--mask-ratio", ratio)
    assert f"--mask-ratio {float(ratio)}" in message
