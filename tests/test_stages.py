"""The stages by their command lines: the chain, stopping and going on, what they refuse."""
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import COMMON, ROOT, STAGES, run
from helpers import fails, files, log, newest, printed, process_group, randomize, seeded, weights
from PIL import Image
from test_data import make_folder

import data
import model
import pretrain
import teacher
from support import checkpoint
from support.run import Run

# ------------------------------------------------------------------------------------------------
# The chain

@pytest.mark.parametrize("stage", STAGES)
def test_the_chain_runs(stage, chain):
    folder = getattr(chain, stage)
    assert [row["step"] for row in log(folder)] == [2, 4, 6]
    assert [row["step"] for row in log(folder, "val")] == ([] if stage == "teacher" else [4, 6])
    assert all(tensor.isfinite().all() for tensor in newest(folder)["model"].values())


def a_moco():
    encoder = model.VisionTransformer(
        8, 4, dim=16, depth=1, heads=2, positions="absolute", layer_scale=0.0)
    return teacher.MoCo(encoder, hidden=8, features=4, temperature=0.2)


def test_contrastive_loss_against_a_plain_loop():
    """MoCo v3, algorithm 1: 2τ · cross-entropy of each query over all keys, its own in its place.
    """
    q, k = torch.randn(2, 6, 4, generator=seeded())
    loss, hits = a_moco().ctr(q, k)
    expected = right = 0.0
    for i in range(6):
        cosines = [(torch.dot(q[i], key) / q[i].norm() / key.norm()).item() for key in k]
        exponentials = [math.exp(cosine / 0.2) for cosine in cosines]
        expected -= 2 * 0.2 * math.log(exponentials[i] / sum(exponentials)) / 6
        right += cosines[i] == max(cosines)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert hits.item() == pytest.approx(right / 6)


def test_keys_are_momentum_copies(chain):
    moco = randomize(a_moco())
    queries = [*moco.encoder.parameters(), *moco.projector.parameters()]
    keys = [*moco.momentum_encoder.parameters(), *moco.momentum_projector.parameters()]
    expected = [0.9 * key + 0.1 * query for key, query in zip(keys, queries, strict=True)]
    moco.update_momentum(0.9)
    for key, value in zip(keys, expected, strict=True):
        assert torch.allclose(key, value, atol=1e-6)
    # in training they follow, slowly, and the patch projection stays as drawn
    early, late = checkpoint.load(chain.teacher / "step-00000004.pt"), newest(chain.teacher)
    moved = {}
    for name in ("model", "momentum_encoder"):
        fc1, patches = "blocks.0.mlp.fc1.weight", "patch_embed.proj.weight"
        moved[name] = (late[name][fc1] - early[name][fc1]).abs().max()
        assert torch.equal(late[name][patches], early["model"][patches])
    assert 0 < moved["momentum_encoder"] < moved["model"]


def test_the_tokenizer_is_evaluated(chain):
    for row in log(chain.tokenizer, "val"):
        assert 0 < row["psnr"] < 60
        assert 0 < row["usage"] <= 1
        assert 1 <= row["perplexity"] <= 32 * row["usage"] + 1e-3
        assert row["distance"] > 0


def test_evaluations_draw_pictures(chain):
    """With margins of 2: rows of eight images of 32 px, and of sixteen patches of 8 px."""
    for file, rows in ((chain.tokenizer / "reconstructions.png", 2),
                       (chain.pretrain / "masked.png", 4)):
        assert Image.open(file).size == (8 * 34 + 2, rows * 34 + 2)
    assert Image.open(chain.tokenizer / "codes.png").width == 16 * 10 + 2


def test_an_evaluation_of_pretraining_changes_nothing(chain, monkeypatch):
    monkeypatch.setattr(pretrain, "evaluate", lambda *_: {})
    run("pretrain", *chain.inputs["pretrain"], "--output", "plain")
    assert not Path("plain/masked.png").exists()            # the control
    assert weights(newest("plain")) == weights(newest(chain.pretrain))


def test_an_evaluation_of_pretraining_is_the_mean_over_its_images(chain):
    """Whatever the batches and workers: all images under the same masks, by hand too."""
    args = pretrain.get_args([*COMMON, *chain.inputs["pretrain"], "--output", "."])
    tokenizer, _, _ = pretrain.load_tokenizer(args)
    torch.manual_seed(0)
    vit, _, _ = pretrain.build(args, codes=32)
    dataset = data.load_dataset("synthetic:64", "val", 32)
    transform = pretrain.AugmentAndMask(
        data.eval_transform(32, 1.0), lambda: model.block_mask(4, 6, 2))
    samples, device = data.Samples(dataset, transform, seed=0), torch.device("cpu")
    loss = accuracy = 0.0
    for index in range(40):
        image, mask, _ = samples[0, index][0]
        target = tokenizer.encode(image[None], 4)[0][mask]
        logits = vit.eval()(image[None], mask[None])
        loss += torch.nn.functional.cross_entropy(logits, target).item() / 40
        accuracy += (logits.argmax(1) == target).float().mean().item() / 40
    for args.batch_size, args.workers in ((16, 0), (7, 1)):
        row = pretrain.evaluate(args, vit.train(), tokenizer, dataset, transform, device)
        assert row == pytest.approx(dict(loss=loss, accuracy=accuracy), rel=1e-5)
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
    def poisoned(self, batch, *networks):
        if self.step == 4:
            runs.append(self)
            batch[0][3] = math.nan                          # an image
        return micro_batches(self, batch, *networks)

    runs, micro_batches = [], Run.micro_batches
    monkeypatch.setattr(Run, "micro_batches", poisoned)
    with pytest.raises(FloatingPointError, match="not finite at step 4 on ranks .0."):
        run("tokenizer", *chain.inputs["tokenizer"], "--output", "run")
    state = newest("run")
    assert state["step"] == 4
    for name, module in runs[0].modules.items():
        assert checkpoint.digest(module.state_dict()) == checkpoint.digest(state[name])
    moments = runs[0].optimizer.state_dict()["state"]
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


def test_a_supervised_network_as_the_perceptual_one(chain):
    """The paper's ablation (Table 5)."""
    assert short("tokenizer", chain, "--perceptual", str(chain.finetune))["perceptual"] > 0


def test_a_tokenizer_fits_patches_of_half_to_twice_its_stride(chain, capsys):
    """The demo's codes are of 8 px: the tokenizer sees resized images."""
    for size in ("4", "16"):
        short("pretrain", chain, "--patch-size", size, "--mask-block", "1")
    for size, grid in (("2", "16×16"), ("32", "1×1")):
        assert grid in fails(capsys, "pretrain", *chain.inputs["pretrain"], "--patch-size", size)


def test_evaluation_repeats_what_the_training_logged(chain, capsys):
    row = run("finetune", "--eval", "--init", str(chain.finetune))
    assert "trained with" not in capsys.readouterr().out
    logged = log(chain.finetune, "val")[-1]
    assert row == {key: logged[key] for key in row} and row["images"] == 40
    (line,) = log("runs/demo/finetune", "val")
    assert line == line | row
    assert files("runs/demo/finetune") == []                # no checkpoint
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
    def watched(dataset, index):
        used[torch.is_grad_enabled()].add(dataset.samples[index][0])    # on where it trains
        return read(dataset, index)

    read = data.read
    monkeypatch.setattr(data, "read", watched)
    make_folder(folder, ["album"], images=24, splits=["photos"])
    common = ["--recipe", "photos", "--data", "photos", "--image-size", "32", "--patch-size", "8",
              "--batch-size", "8", "--epochs", "1", "--workers", "0"]
    nano = ["--model", "nano", "--warmup-epochs", "0"]
    own = {
        "teacher": [*nano, "--hidden", "16", "--features", "8"],
        "tokenizer": ["--vit", "nano", "--codebook-size", "32", "--warmup-steps", "0"],
        "pretrain": [*nano, "--mask-block", "2"],
    }
    held_out = {path for path, _ in data.load_images("photos", "val", 32).samples}
    assert len(held_out) == 2
    for stage, flags in own.items():
        used = {True: set(), False: set()}
        STAGES[stage].main(STAGES[stage].get_args([*common, *flags]))
        assert len(used[True]) >= 16
        assert not used[True] & held_out
        assert used[False] == (set() if stage == "teacher" else held_out)   # its evaluation's


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
    assert flags[1] in fails(capsys, stage, *alone, *flags)


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
