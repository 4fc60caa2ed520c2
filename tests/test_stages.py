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
import urllib.error
from pathlib import Path

import pytest
import torch

import data
import finetune
import model
import pretrain
import runtime
import teacher
import tokenizer
from conftest import COMMON, OWN, ROOT, STAGES, run
from test_data import make_folder

FLAGS_WITHOUT_DEFAULT = {"dry_run", "steps", "epochs", "perceptual_layers", "probe", "probe_layer"}


def log(folder, split=None):
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "args" not in row and row.get("split") == split]


def newest(folder):
    return runtime.load_checkpoint(folder)


def weights(state):
    """Digest of all that is trained."""
    return runtime.digest({key: value for key, value in state.items() if key not in ("args", "digest", "best")})


# ------------------------------------------------------------------------------------------------
# Flags

@pytest.fixture
def parsers(monkeypatch):
    """Each stage's parser, before it parses."""
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "parse", lambda p, recipes, argv: p)
        return {name: module.get_args([]) for name, module in STAGES.items()}


def read(path):
    """Names of the attributes of `args` that a file reads."""
    return {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load) and isinstance(node.value, ast.Name) and node.value.id == "args"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_is_read(stage, parsers):
    flags = {action.dest for action in parsers[stage]._actions} - {"help"}
    unread = flags - read(ROOT / f"{stage}.py") - read(ROOT / "runtime.py") - read(ROOT / "data.py")
    assert unread == {"recipe"}                            # read by runtime.parse before there are args


@pytest.mark.parametrize("stage", STAGES)
def test_recipes_fill_every_flag_and_no_other(stage, parsers):
    flags, recipes = {action.dest for action in parsers[stage]._actions}, STAGES[stage].RECIPES
    assert list(recipes) == (["paper", "demo"] if stage in ("segment", "detect") else ["paper", "cifar", "cifar-cpu", "demo"])
    for name, recipe in recipes.items():
        assert set(recipe) <= flags
        args = STAGES[stage].get_args(["--recipe", name])
        assert {key for key, value in vars(args).items() if value is None} <= FLAGS_WITHOUT_DEFAULT
        assert (args.steps is None) != (args.epochs is None)
        assert args.output == f"runs/{name}/{stage}" and args.lr == recipe["lr"]


# ------------------------------------------------------------------------------------------------
# The chain

@pytest.mark.parametrize("stage", STAGES)
def test_the_chain_runs(stage, chain):
    folder = getattr(chain, stage)
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert first["args"]["stage"] == stage and first["args"]["batch_size"] == 16 and first["world_size"] == 1
    rows = log(folder)
    assert [row["step"] for row in rows] == [2, 4, 6] and rows[1]["epoch"] == 1
    assert all(math.isfinite(row["loss"]) and row["images_per_s"] > 0 for row in rows)
    state = newest(folder)
    assert (state["stage"], state["step"], state["epoch"]) == (stage, 6, 1)
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000004.pt", "step-00000006.pt"]


def test_contrastive_loss_against_a_plain_loop():
    """MoCo v3, algorithm 1: 2τ · cross-entropy of each query over all keys, its own at the same place."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)
    encoder = model.VisionTransformer(8, 4, dim=16, depth=1, heads=2, positions="absolute", layer_scale=0.0)
    loss, hits = teacher.MoCo(encoder, 8, 4, temperature=0.2).ctr(q, k)
    expected, right = 0.0, 0
    for i in range(6):
        similarity = [(torch.dot(q[i], key) / q[i].norm() / key.norm()).item() / 0.2 for key in k]
        expected += (math.log(sum(math.exp(s) for s in similarity)) - similarity[i]) / 6
        right += similarity.index(max(similarity)) == i
    assert loss.item() == pytest.approx(2 * 0.2 * expected, rel=1e-5) and hits.item() == pytest.approx(right / 6)


def test_keys_are_momentum_copies(chain):
    encoder = model.VisionTransformer(8, 4, dim=16, depth=1, heads=2, positions="absolute", layer_scale=0.0)
    moco = teacher.MoCo(encoder, 8, 4, 0.2)
    with torch.no_grad():
        moco.encoder.cls_token += 1
        moco.projector[0].weight += 1
    f_k, f_q = moco.momentum_encoder.cls_token.clone(), moco.encoder.cls_token.clone()
    p_k, p_q = moco.momentum_projector[0].weight.clone(), moco.projector[0].weight.clone()
    moco.update_momentum(0.9)
    assert torch.allclose(moco.momentum_encoder.cls_token, 0.9 * f_k + 0.1 * f_q, atol=1e-6)
    assert torch.allclose(moco.momentum_projector[0].weight, 0.9 * p_k + 0.1 * p_q, atol=1e-6)
    assert torch.equal(moco.encoder.cls_token, f_q)
    # in training they follow, slowly, and the patch projection stays as drawn
    early = torch.load(chain.teacher / "step-00000004.pt", weights_only=True)
    late = newest(chain.teacher)
    fc1 = "blocks.0.mlp.fc1.weight"
    moved = [(late[name][fc1] - early[name][fc1]).abs().max() for name in ("model", "momentum_encoder")]
    assert 0 < moved[1] < moved[0]
    for name in ("model", "momentum_encoder"):
        key = "patch_embed.proj.weight"
        assert torch.equal(late[name][key], early["model"][key])


def test_the_tokenizer_is_evaluated_and_pictured(chain):
    rows = log(chain.tokenizer, "val")
    assert [row["step"] for row in rows] == [4, 6]
    for row in rows:
        assert 0 < row["psnr"] < 60 and 0 < row["usage"] <= 1 and 1 <= row["perplexity"] <= 32 * row["usage"] + 1e-3
        assert row["distance"] > 0
    for picture in ("reconstructions.png", "codes.png"):
        assert (chain.tokenizer / picture).stat().st_size > 1000
    assert {"pixel", "perceptual", "commitment"} <= set(log(chain.tokenizer)[0])
    row = log(chain.tokenizer)[-1]                          # the visible sum of named terms
    assert row["loss"] == pytest.approx(row["pixel"] + 0.25 * row["commitment"] + row["perceptual"], rel=1e-5)


def test_the_perceptual_network_is_the_teachers(chain):
    (network, digest), state = tokenizer.perceptual_network(str(chain.teacher)), newest(chain.teacher)
    assert runtime.digest(network.state_dict()) == runtime.digest(state["model"]) and digest == state["digest"]


def test_pretraining_leaves_the_tokenizer_alone_and_begins_fine_tuning(chain):
    args = finetune.get_args([*COMMON, *OWN["finetune"], *chain.inputs["finetune"]])
    network, _, digest = finetune.build(args, 10)
    state = newest(chain.pretrain)
    assert digest == state["digest"]
    shared = state["model"]["rel_pos_bias.relative_position_bias_table"]
    assert all(torch.equal(block.attn.relative_position_bias_table, shared) for block in network.blocks)
    assert torch.equal(network.blocks[0].mlp.fc1.weight, state["model"]["blocks.0.mlp.fc1.weight"])


# ------------------------------------------------------------------------------------------------
# Stopping and going on

@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_ends_bit_identical(stage, chain, monkeypatch):
    """Stopped by a signal in mid-epoch, the same command again ends as the run that was never stopped."""
    def interrupted(step, *arguments):
        loss, _ = check(step, *arguments)
        return loss, signal.SIGTERM if step == 2 else 0

    check = runtime.check_step
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "check_step", interrupted)
        with pytest.raises(SystemExit) as stop:
            run(stage, *flags_as_in_the_chain(stage, chain))
    assert stop.value.code == 128 + signal.SIGTERM
    output = Path("runs/demo") / stage
    assert newest(output)["step"] == 3
    torch.manual_seed(123)                                  # whatever the process did before, and with loader processes
    run(stage, *flags_as_in_the_chain(stage, chain), "--workers", "1")
    whole, resumed = newest(getattr(chain, stage)), newest(output)
    assert resumed["step"] == 6 and weights(resumed) == weights(whole) and resumed["best"] == whole["best"]
    # the end of a run that has ended changes nothing
    run(stage, *flags_as_in_the_chain(stage, chain))
    assert weights(newest(output)) == weights(whole)


@pytest.mark.parametrize("stage", STAGES)
def test_another_seed_ends_elsewhere(stage, chain):
    run(stage, *chain.inputs[stage], "--seed", "1", "--steps", "4", "--output", "other")
    other = newest("other")
    whole = torch.load(getattr(chain, stage) / "step-00000004.pt", weights_only=True)
    assert other["step"] == whole["step"] == 4 and weights(other) != weights(whole)


def flags_as_in_the_chain(stage, chain):
    """With the same relative paths, since a run's arguments must not change: links to the chain's runs."""
    Path("runs/demo").mkdir(parents=True, exist_ok=True)
    for name in STAGES:
        if name != stage and not (Path("runs/demo") / name).exists():
            (Path("runs/demo") / name).symlink_to(getattr(chain, name))
    return []


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_changes_nothing(stage, chain, monkeypatch):
    live = {}

    def keep(args, modules, optimizer):
        live.update(modules=modules, optimizer=optimizer)
        return resume(args, modules, optimizer)

    def poisoned(self, key):
        nonlocal left
        sample, label = clean(self, key)
        left -= 1
        if left == 0 and isinstance(sample, list):          # the teacher's two views
            sample[0][0, 0, 0] = math.nan
        elif left == 0:
            (sample[0] if isinstance(sample, tuple) else sample)[0, 0, 0] = math.nan
        return sample, label

    resume, clean = runtime.resume, data.Samples.__getitem__
    if stage in ("tokenizer", "finetune", "segment", "detect"):
        left = 64 + 100 + 5                                 # after the evaluation on 100 images at the first epoch's end
    else:
        left = 64 + 5
    monkeypatch.setattr(runtime, "resume", keep)
    monkeypatch.setattr(data.Samples, "__getitem__", poisoned)
    with pytest.raises(FloatingPointError, match="not finite at step 4 on rank 0"):
        run(stage, *chain.inputs[stage], "--output", "run")
    state = newest("run")
    assert state["step"] == 4 and len(list(Path("run").glob("step-*.pt"))) == 1
    for name, module in live["modules"].items():
        assert runtime.digest(module.state_dict()) == runtime.digest(state[name])
    assert runtime.digest(live["optimizer"].state_dict()["state"]) == runtime.digest(state["optimizer"]["state"])


def start(stage, *flags):
    """A stage in a process of its own, and in a process group."""
    return subprocess.Popen([sys.executable, str(ROOT / f"{stage}.py"), *COMMON, *flags], start_new_session=True,
                            stderr=subprocess.PIPE, text=True)


def test_sigterm_to_the_process_group_saves(folder):
    """As torchrun and batch systems send it: to the loader's workers too."""
    process = start("teacher", "--steps", "100000", "--workers", "1", "--output", "run")
    try:
        deadline = time.time() + 120
        while time.time() < deadline and not (Path("run/log.jsonl").exists() and log("run")):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert newest("run")["step"] >= 2


# ------------------------------------------------------------------------------------------------
# What a stage can be told

def short(stage, chain, *flags):
    """Two steps to a folder of their own → the run's last logged row."""
    run(stage, *chain.inputs[stage], "--steps", "2", "--output", "run", *flags)
    row = log("run")[-1]
    assert row["step"] == 2 and math.isfinite(row["loss"])
    return row


def test_accumulated_micro_batches_are_the_same_step(chain):
    flags = [*chain.inputs["pretrain"], "--steps", "3", "--drop-path", "0"]
    run("pretrain", *flags, "--accumulate", "4", "--output", "run")
    run("pretrain", *flags, "--output", "whole")
    one, other = newest("run")["model"], newest("whole")["model"]
    for key in one:
        assert torch.allclose(one[key], other[key], atol=2e-5), key


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_compile_and_accumulation(stage, chain):
    flags = [] if stage == "tokenizer" else ["--checkpoint-activations"]
    with torch.compiler.set_stance("force_eager"):          # wrapped as compiled, without the minutes of compiling
        short(stage, chain, "--amp", "bf16", "--accumulate", "2", "--compile", *flags)
    ours, whole = newest("run")["model"], newest(getattr(chain, stage))["model"]
    assert list(ours) == list(whole)                        # unwrapped names
    assert all(ours[key].dtype == whole[key].dtype for key in ours)


def test_pixel_only_codebook(chain):
    row = short("tokenizer", chain, "--perceptual-weight", "0", "--perceptual", "nowhere")
    assert "perceptual" not in row and row["loss"] == pytest.approx(row["pixel"] + 0.25 * row["commitment"], rel=1e-5)
    assert "distance" not in log("run", "val")[-1]


def test_adversarial_codebook(chain):
    row = short("tokenizer", chain, "--adversarial-weight", "0.1")
    whole = row["pixel"] + 0.25 * row["commitment"] + row["perceptual"] + 0.1 * row["fool"] + row["judge"]
    assert row["loss"] == pytest.approx(whole, rel=1e-5)
    trained = newest("run")["discriminator"]
    still = ["--adversarial-weight", "0.1", "--lr", "0", "--steps", "1", "--output", "initial"]
    run("tokenizer", *chain.inputs["tokenizer"], *still)
    initial = newest("initial")["discriminator"]
    assert all(not torch.equal(trained[key], initial[key]) for key in trained if key.endswith("weight"))


def test_perceptual_layers(chain):
    one = short("tokenizer", chain, "--perceptual-layers", "1")["perceptual"]
    shutil.rmtree("run")
    assert short("tokenizer", chain, "--perceptual-layers", "1", "3")["perceptual"] > one
    with pytest.raises(runtime.InputError, match=r"perceptual layers \[5\].*layers 1 to 4"):
        short("tokenizer", chain, "--perceptual-layers", "5")


@pytest.fixture
def moco_v3_file(monkeypatch):
    """A file as MoCo v3 publishes it, of a tiny network that stands for ViT-B."""
    monkeypatch.setitem(model.SIZES, "base", dict(dim=32, depth=4, heads=2))
    torch.manual_seed(0)
    network = model.VisionTransformer(**model.SIZES["base"], positions="absolute", layer_scale=0.0,
                                      mean=model.IMAGENET_MEAN, std=model.IMAGENET_STD)
    own = network.state_dict()
    state = {f"module.base_encoder.{key}": value for key, value in own.items()}
    state |= {f"module.momentum_encoder.{key}": value + 1 for key, value in own.items()}
    state |= {"module.base_encoder.head.0.weight": torch.ones(8, 32), "module.predictor.0.weight": torch.ones(4, 4)}
    torch.save(dict(epoch=300, arch="vit_base", state_dict=state, optimizer={}, scaler={}), "vit-b-300ep.pth.tar")
    return own


def test_official_moco_v3_file_as_perceptual_network(moco_v3_file, chain):
    network, _ = tokenizer.perceptual_network("vit-b-300ep.pth.tar")
    assert runtime.digest(network.state_dict()) == runtime.digest(moco_v3_file)
    assert "perceptual" in short("tokenizer", chain, "--perceptual", "vit-b-300ep.pth.tar", "--steps", "2")


def test_official_moco_v3_file_begins_fine_tuning(moco_v3_file, chain):
    args = finetune.get_args([*COMMON, "--init", "vit-b-300ep.pth.tar", "--model", "base", "--image-size", "64",
                              "--patch-size", "16", "--pool", "cls"])
    network, _, _ = finetune.build(args, 10)
    assert torch.equal(network.blocks[3].attn.qkv.weight, moco_v3_file["blocks.3.attn.qkv.weight"])
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_published_beit_file_begins_fine_tuning(chain):
    """BEiT's files hold the weights under "model", and indices that we compute."""
    state = newest(chain.pretrain)["model"]
    torch.save(dict(model=state | {"rel_pos_bias.relative_position_index": torch.zeros(17, 17)}), "beit.pth")
    args = finetune.get_args([*COMMON, "--init", "beit.pth"])
    network, _, digest = finetune.build(args, 10)
    assert digest is None and torch.equal(network.blocks[0].attn.proj.weight, state["blocks.0.attn.proj.weight"])


def test_tokenizers_of_about_the_patch_size_fit(chain):
    """The demo's codes are of 8 px; patches of 4 and 16 px see the image resized to the tokenizer's own grid."""
    for size in ("4", "16"):
        short("pretrain", chain, "--patch-size", size, "--mask-block", "1")
        shutil.rmtree("run")


@pytest.mark.parametrize("flags", [
    ["--init", "none"], ["--init", "teacher", "--pool", "cls"], ["--init", "finetune"], ["--ema-decay", "0.9"],
    ["--cutmix", "1.0", "--randaugment", "14", "--erasing", "0.25"]], ids=" ".join)
def test_fine_tuning(flags, chain):
    flags = [str(getattr(chain, flag)) if flag in ("teacher", "finetune") else flag for flag in flags]
    short("finetune", chain, *flags)
    state = newest("run")
    assert ("ema" in state) == ("--ema-decay" in flags)
    row = log("run", "val")[-1]
    assert row["images"] == 100 and 0 <= row["top1"] <= row["top5"] <= 100


def test_layers_learn_at_their_own_rates(chain):
    groups = newest(chain.finetune)["optimizer"]["param_groups"]
    assert len({group["lr_scale"] for group in groups}) == 6        # embeddings, 4 blocks, head
    for group in groups:
        assert group["lr"] == pytest.approx(log(chain.finetune)[-1]["lr"] * group["lr_scale"])


def test_weights_average_is_what_is_evaluated(chain):
    short("finetune", chain, "--ema-decay", "0.9")
    state = newest("run")
    average = {key.removeprefix("module."): value for key, value in state["ema"].items() if key.startswith("module.")}
    args = finetune.get_args([*COMMON, *OWN["finetune"]])
    network = model.VisionTransformer(**state["model_args"])
    network.load_state_dict(average)
    row = finetune.evaluate(args, network, data.load_dataset(args.data, "val", 32), torch.device("cpu"))
    assert row["top1"] == log("run", "val")[-1]["top1"]
    assert row == finetune.main(finetune.get_args([*COMMON, "--eval", "--init", "run"]))
    built = finetune.build(finetune.get_args([*COMMON, "--init", "run"]), 10)[0].state_dict()
    assert all(torch.equal(built[key], average[key]) for key in average)
    assert any(not torch.equal(average[key], state["model"][key]) for key in average)


def test_evaluation_repeats_what_the_training_logged(chain):
    row = run("finetune", "--eval", "--init", str(chain.finetune))
    logged = log(chain.finetune, "val")[-1]
    assert (row["top1"], row["top5"], row["images"]) == (logged["top1"], logged["top5"], 100)
    assert [path.name for path in Path("runs/demo/finetune").iterdir()] == ["log.jsonl"]  # one line, no checkpoint
    assert log("runs/demo/finetune", "val") == [dict(log("runs/demo/finetune", "val")[0], **row)]
    with pytest.raises(runtime.InputError, match="no classifier of 10 classes"):
        run("finetune", "--eval", "--init", str(chain.pretrain))


def test_holdout_is_never_trained_on_and_stands_for_the_validation_images(chain, monkeypatch):
    trained, evaluated = [], []
    read = data.read
    monkeypatch.setattr(data, "read", lambda dataset, index: (
        (trained if dataset.split == "train" and torch.is_grad_enabled() else evaluated).append((dataset.split, index))
        or read(dataset, index)))
    for seed in ("0", "1"):
        run("finetune", *chain.inputs["finetune"], "--holdout", "0.25", "--batch-size", "11", "--steps", "8", "--seed", seed,
            "--output", seed)
        assert [row["images"] for row in log(seed, "holdout")][-1] == 20 and not log(seed, "val")  # two of each class
    held = {index for _, index in evaluated}
    assert len(held) == 20 and {split for split, _ in evaluated} == {"train"}   # the same ones for both seeds
    assert len({index for _, index in trained}) == 44 and not held & {index for _, index in trained}


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_probes_classify_what_is_separable(kind):
    generator = torch.Generator().manual_seed(0)
    centres, labels = torch.randn(5, 16, generator=generator), torch.arange(300) % 5
    rows = centres[labels] + 0.3 * torch.randn(300, 16, generator=generator)
    method = finetune.knn if kind == "knn" else lambda *arguments: finetune.linear_probe(*arguments, steps=200)
    right = method(rows[:200], labels[:200], rows[200:], 5) == labels[200:]
    assert right.float().mean() > 0.95
    if kind == "linear":                                    # standardised, and in blocks that are made when they are used
        scaled = finetune.linear_probe(100 * rows[:200] + 7, labels[:200], 100 * rows[200:] + 7, 5, lambda x: (x - 7) / 100, 200, 64)
        assert (scaled == labels[200:]).float().mean() > 0.95
    shuffled = labels[:200][torch.randperm(200, generator=generator)]
    assert (method(rows[:200], shuffled, rows[200:], 5) == labels[200:]).float().mean() < 0.5


def test_knn_against_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    train, val = torch.randn(40, 8, generator=generator), torch.randn(20, 8, generator=generator)
    labels, expected = torch.arange(40) % 3, []
    for row in val:
        near = sorted(((torch.dot(row, other) / row.norm() / other.norm()).item(), label)
                      for other, label in zip(train, labels.tolist()))[-20:]
        votes = [sum(math.exp(s / 0.07) for s, label in near if label == c) for c in range(3)]
        expected.append(votes.index(max(votes)))
    assert finetune.knn(train, labels, val, 3).tolist() == expected


@pytest.mark.parametrize("flags", [
    ["--probe", "knn"], ["--probe", "linear", "--probe-layer", "2", "--pool", "cls"]], ids=" ".join)
def test_probes_by_command_line(flags, chain, monkeypatch):
    whole = finetune.linear_probe
    monkeypatch.setattr(finetune, "linear_probe", lambda *arguments: whole(*arguments, steps=20))
    row = run("finetune", *flags, "--init", str(chain.teacher))
    assert row["images"] == 100 and 0 < row["top1"] < 100
    assert row == run("finetune", *flags, "--init", str(chain.teacher))
    assert [logged["top1"] for logged in log("runs/demo/finetune", "val")] == 2 * [row["top1"]]
    with pytest.raises(runtime.InputError, match="--probe-layer 5: the ViT has blocks 1 to 4"):
        run("finetune", *flags, "--probe-layer", "5", "--init", str(chain.teacher))


# ------------------------------------------------------------------------------------------------
# What a stage refuses: one line that names the culprit, exit status 2

def fails(capsys, stage, *flags, before=0):
    """Its last line on stderr, the only one but for `before` that say why a file was not loaded."""
    module = STAGES[stage]
    with pytest.raises(SystemExit) as stop:
        runtime.launch(module.main, module.get_args([*COMMON, *OWN[stage], *flags]))
    message = capsys.readouterr().err
    assert stop.value.code == 2
    *others, message = message.splitlines()
    assert message.startswith(f"{stage}.py: ")
    assert len(others) == before and all(": not loaded: " in line for line in others)
    return message


def test_bad_input_of_every_stage(capsys):
    for stage in STAGES:
        missing = {"tokenizer": ["--perceptual-weight", "0"], "teacher": [], "pretrain": []}.get(stage, ["--init", "none"])
        if stage != "pretrain":                             # it looks for its tokenizer first
            assert "nowhere: no such folder" in fails(capsys, stage, "--data", "nowhere", *missing)
            assert "--batch-size 1024" in fails(capsys, stage, "--batch-size", "1024", *missing)
        assert "try 15" in fails(capsys, stage, "--batch-size", "16", "--accumulate", "3", *missing)


def test_bad_sizes(capsys, chain):
    assert "image size 30 is no multiple of patch size 8: try 24" in fails(capsys, "teacher", "--image-size", "30")
    assert "image size 36 " in fails(capsys, "tokenizer", "--image-size", "36", "--perceptual-weight", "0")
    assert "30" in fails(capsys, "pretrain", *chain.inputs["pretrain"], "--image-size", "30")
    assert "30" in fails(capsys, "finetune", "--init", "none", "--image-size", "30")


def test_checkpoints_of_another_stage(capsys, chain):
    message = fails(capsys, "tokenizer", "--perceptual", str(chain.pretrain))
    assert "pretrain" in message and "teacher" in message and str(chain.pretrain) in message
    run("tokenizer", "--perceptual", str(chain.finetune), "--steps", "1", "--output", "supervised")  # the paper's ablation
    message = fails(capsys, "pretrain", "--tokenizer", str(chain.teacher))
    assert "found a checkpoint of teacher, expected one of tokenizer" in message
    message = fails(capsys, "finetune", "--init", str(chain.tokenizer))
    assert "tokenizer" in message and "pretrain" in message
    for stage, flag in (("tokenizer", "--perceptual"), ("pretrain", "--tokenizer"), ("finetune", "--init")):
        assert "nowhere: nothing there" in fails(capsys, stage, flag, "nowhere")
    torch.save(dict(weight=torch.ones(2)), "other.pt")
    assert "other.pt" in fails(capsys, "tokenizer", "--perceptual", "other.pt")
    assert "other.pt: found another file" in fails(capsys, "pretrain", "--tokenizer", "other.pt")
    assert "other.pt" in fails(capsys, "finetune", "--init", "other.pt")
    torch.save(torch.ones(2), "tensor.pt")                  # not even a dict
    assert "tensor.pt" in fails(capsys, "tokenizer", "--perceptual", "tensor.pt", before=1)
    assert "tensor.pt" in fails(capsys, "finetune", "--init", "tensor.pt", before=1)


def test_checkpoints_of_another_architecture(capsys, chain, monkeypatch):
    monkeypatch.setitem(model.SIZES, "base", model.SIZES["nano"])   # ViT-B's weights take long to draw
    message = fails(capsys, "finetune", *chain.inputs["finetune"], "--image-size", "64", "--eval")
    assert "no classifier" in message
    torch.save(newest(chain.pretrain)["model"], "bare.pt")
    message = fails(capsys, "finetune", "--init", "bare.pt", "--model", "tiny")
    assert "bare.pt: " in message and "expected" in message
    state = newest(chain.teacher)["model"]
    state["blocks.0.norm1.weight"] = torch.ones(3)
    torch.save(dict(state_dict=state), "moco.pt")
    assert "moco.pt" in fails(capsys, "tokenizer", "--perceptual", "moco.pt")


def test_a_tokenizer_that_does_not_fit(capsys, chain):
    for size, grid in ((2, "16×16"), (32, "1×1")):
        message = fails(capsys, "pretrain", *chain.inputs["pretrain"], "--patch-size", str(size))
        assert re.search(f"codes of 8 px .*{grid} patches of {size} px", message)


def test_another_perceptual_network_in_a_run_begun(capsys, chain):
    flags = ["--steps", "2", "--output", "run", "--perceptual", "teacher"]
    shutil.copytree(chain.teacher, "teacher")
    run("tokenizer", *flags)
    Path("teacher/step-00000006.pt").unlink()
    assert "perceptual_digest" in fails(capsys, "tokenizer", *flags)


def test_another_tokenizer_in_a_run_begun(capsys, chain):
    """Its codes are other targets: the digest is one of the arguments."""
    flags = ["--tokenizer", "tokenizer", "--steps", "2", "--output", "run"]
    shutil.copytree(chain.tokenizer, "tokenizer")
    run("pretrain", *flags)
    Path("tokenizer/step-00000006.pt").unlink()             # the one before it
    assert "tokenizer_digest" in fails(capsys, "pretrain", *flags)


@pytest.mark.parametrize("name", ["moco_v3", "vgg16", "resnet50"])
def test_a_download_that_fails(name, capsys, monkeypatch):
    def fail(*arguments, **keywords):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    message = fails(capsys, "tokenizer", "--perceptual", name)
    assert name in message and "no route" in message and "https://" in message


def test_an_unreadable_image_ends_a_real_process(folder):
    """Though the loader's worker has ignored SIGTERM: the process must not wait for it."""
    path = make_folder(folder / "set", images=10) / "train" / "bee" / "0.jpg"
    path.write_bytes(path.read_bytes()[:300])
    process = start("teacher", "--data", "set", "--workers", "1")
    try:
        errors = process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 2
    assert errors.startswith("teacher.py: set/train/bee/0.jpg: not a readable image") and errors.count("\n") == 1
