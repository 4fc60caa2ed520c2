"""python -m tools.plan: what it says is what a step takes. And tools.bench, on real files."""
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import COMMON, OWN, STAGES
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import finetune
import pretrain
import runtime
import tokenizer
from codebook import VQTokenizer
from model import VisionTransformer
from tools import bench, plan

# The training pass over the forward pass, FLOPs: 3, and less with frozen networks beside it.
RATIO = {"teacher": (1.1, 2.5), "tokenizer": (1.5, 2.9), "pretrain": (1.1, 2.9)}


def arguments(stage, *flags):
    return STAGES[stage].get_args([*COMMON, *OWN[stage], *flags])


def printed(capsys, stage, *flags):
    """What the command prints, a dict by the first words of its lines; "": the line above them."""
    plan.main([stage, *COMMON, *OWN[stage], *flags])
    first, *lines = capsys.readouterr().out.splitlines()
    return {"": first} | {line[:20].strip(): line[20:] for line in lines}


def numbers(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_says_what_it_will_cost(stage, chain, capsys, monkeypatch):
    monkeypatch.chdir(chain.root)
    lines = printed(capsys, stage, "--images-per-second", "0.001", "--output", "planned")
    assert lines["steps"] == "6: 4 an epoch of 64 images"
    assert lines["time"] == f"{6 * 16 / 0.001 / 3600:.1f} hours at 0.001 images/s"
    assert not (chain.root / "planned").exists()

    found = plan.estimate(arguments(stage), classes=11 if stage == "segment" else 10)
    state = checkpoint.load(getattr(chain, stage))
    moments = [own["exp_avg"].numel() for own in state["optimizer"]["state"].values()]
    assert found.trained == sum(moments)
    assert found.micro == 16
    assert found.forward > 1e6
    assert found.activations > 1e5
    least, most = RATIO.get(stage, (2.5, 3.0))
    assert least < found.training / found.forward <= most
    # the checkpoint: networks and moments, to the number; its file, but for names and headers
    weights = 0
    for name, part in state.items():
        if name not in ("args", "model_args", "optimizer") and isinstance(part, dict):
            weights += sum(tensor.numel() for tensor in part.values())
    assert found.written == 4 * (weights + 2 * sum(moments))
    newest = checkpoint.files(getattr(chain, stage))[0]
    assert found.written == pytest.approx(newest.stat().st_size, rel=0.25)


def test_vit_huge_costs_nothing_to_ask(monkeypatch):
    plan_pretrain = plan.PLANS["pretrain"]
    seen = []

    def watched(*given):
        model, frozen, loss = plan_pretrain(*given)
        for module in (model, *frozen):
            seen.extend([*module.parameters(), *module.buffers()])
        return model, frozen, loss

    monkeypatch.setitem(plan.PLANS, "pretrain", watched)
    args = pretrain.get_args(["--model", "huge", "--batch-size", "16", "--tokenizer", "nowhere"])
    found = plan.estimate(args, 1000)
    assert len(seen) > 500
    assert all(isinstance(tensor, FakeTensor) for tensor in seen)       # no storage behind it
    assert 630e6 < found.trained < 650e6
    tokens, dim, depth = 197, 1280, 32
    by_hand = 2 * depth * (12 * tokens * dim ** 2 + 2 * tokens ** 2 * dim)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        VQTokenizer().encoder(torch.empty(1, 3, 224, 224))
    assert by_hand < found.forward - counter.get_total_flops() < 1.1 * by_hand      # with the head


def test_no_fake_tensor_is_left(chain):
    plan.estimate(arguments("finetune", "--init", str(chain.pretrain)), 10)
    vit = VisionTransformer(32, 8, dim=32, depth=1, heads=2, positions="block")
    tokens = vit(torch.zeros(1, 3, 20, 40))                 # with positions of another grid
    assert not isinstance(tokens, FakeTensor)


def test_activations_are_what_the_allocator_holds():
    flags = [*COMMON, "--init", "none", "--model", "tiny", "--image-size", "224",
             "--patch-size", "16", "--batch-size", "24"]
    args = finetune.get_args(flags)
    found = plan.estimate(args, 1000)
    model, _ = finetune.build(args, 1000, None)
    images = torch.zeros(args.batch_size, 3, args.image_size, args.image_size)
    labels = torch.zeros(len(images), dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = F.cross_entropy(model(images), labels)
    # taken and not given back
    held = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    assert loss.requires_grad
    assert found.activations == pytest.approx(held, rel=0.02)
    less = plan.estimate(finetune.get_args([*flags, "--checkpoint-activations"]), 1000)
    assert less.activations < 0.3 * found.activations
    assert less.trained == found.trained


def test_the_images_of_fine_tuning_are_counted(capsys):
    scratch = ["--init", "none", "--steps", "8"]
    flags = [*scratch, "--label-fraction", "0.25", "--batch-size", "10"]
    assert printed(capsys, "finetune", *flags)["steps"] == "8: 2 an epoch of 20 images"
    lines = printed(capsys, "finetune", *scratch, "--holdout", "0.25")
    assert lines["steps"] == "8: 2 an epoch of 44 images"


def test_ranks_and_micro_batches_share_the_images(capsys):
    flags = ["--init", "none", "--accumulate", "2"]
    lines = printed(capsys, "finetune", "--ranks", "2", *flags)
    assert lines[""] == "finetune.py, ranks: 2, images on each at a time: 4"
    args = arguments("finetune", *flags)
    one = plan.estimate(args, 10)
    two = plan.estimate(args, 10, ranks=2)
    assert (one.micro, two.micro) == (8, 4)
    # the position biases are the same for any number of images
    assert 0.5 <= two.activations / one.activations < 0.6
    assert two.trained == one.trained


def test_without_the_dataset_it_is_the_papers(capsys):
    lines = printed(capsys, "teacher", "--data", "nowhere")
    assert lines["steps"].startswith("6: 80,072 an epoch of 1,281,167 images, the paper's")


def test_a_run_that_is_not_there_is_said_to_be_the_papers(chain, capsys):
    plan.main(["pretrain", *COMMON, "--tokenizer", "nowhere"])
    assert "--tokenizer nowhere is not there yet, or not a run" in capsys.readouterr().out
    plan.main(["pretrain", *COMMON, "--tokenizer", str(chain.tokenizer)])
    captured = capsys.readouterr()
    assert "not there" not in captured.out + captured.err


def test_a_run_of_another_stage_is_refused_as_the_stage_does(chain):
    for stage, flag, run in (("pretrain", "--tokenizer", chain.pretrain),
                             ("tokenizer", "--perceptual", chain.tokenizer)):
        with pytest.raises(runtime.InputError, match="found a checkpoint of .*, expected one of t"):
            plan.main([stage, *COMMON, flag, str(run)])


def test_too_much_memory_names_the_accumulation_that_fits(capsys):
    """Searched for by the same count at each number that divides the batch."""
    flags = [*COMMON, *OWN["finetune"], "--init", "none"]
    found = {n: plan.estimate(finetune.get_args([*flags, "--accumulate", str(n)]), 10).memory
             for n in (1, 2, 4)}
    assert found[1] > found[2] > found[4]
    between = (found[2] + found[4]) / 2 / plan.GIB
    plan.main(["finetune", *flags, "--gib", str(between)])
    shown = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"That is more than .* GiB: --accumulate 4 takes [\d.]+\.", shown)
    plan.main(["finetune", *flags, "--gib", "0.001"])
    assert "not even one image at a time fits" in capsys.readouterr().out
    plan.main(["finetune", *flags])
    assert "That is more" not in capsys.readouterr().out


def test_without_a_gpu_auto_is_bf16(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["finetune", *COMMON, *OWN["finetune"], "--init", "none"]
    for amp, precision in (("auto", "bf16"), ("fp32", "fp32")):
        plan.main([*flags, "--amp", amp])
        assert f"GiB in {precision}:" in capsys.readouterr().out


def test_bad_input_is_refused():
    with pytest.raises(runtime.InputError, match="--batch-size 1024 is more than the 64 training"):
        plan.main(["teacher", *COMMON, "--batch-size", "1024"])


def test_the_network_is_that_of_the_checkpoint():
    big = dict(image_size=32, patch_size=8, dim=128, depth=2, heads=2)
    model_args = dict(big, positions="shared", codes=8)
    state = dict(stage="pretrain", step=1, epoch=0, best=None, args={}, optimizer={}, model={})
    checkpoint.write(Path("big.pt"), state | dict(model_args=model_args))
    found = plan.estimate(arguments("finetune", "--init", "big.pt"), 10)
    own = VisionTransformer(**big, positions="block", classes=10)
    assert found.trained == numbers(own)


def test_averaged_weights_are_held_and_written():
    plain = plan.estimate(arguments("finetune", "--init", "none"), 10)
    averaged = plan.estimate(arguments("finetune", "--init", "none", "--ema-decay", "0.9"), 10)
    assert averaged.trained == plain.trained
    assert averaged.held == 2 * plain.held
    assert averaged.written == pytest.approx(4 / 3 * plain.written, rel=0.01)


def test_a_discriminator_is_trained_too():
    none = plan.estimate(arguments("tokenizer", "--adversarial-weight", "0"), 10)
    judged = plan.estimate(arguments("tokenizer", "--adversarial-weight", "0.1"), 10)
    assert judged.trained - none.trained == numbers(tokenizer.PatchDiscriminator())


def test_without_a_perceptual_loss_there_is_no_network_of_it(chain):
    pixel = plan.estimate(arguments("tokenizer", "--perceptual-weight", "0"), 10)
    whole = plan.estimate(arguments("tokenizer", "--perceptual", str(chain.teacher)), 10)
    assert pixel.trained == whole.trained
    assert pixel.forward < whole.forward
    assert pixel.held < whole.held


# ------------------------------------------------------------------------------------------------
# tools/bench.py

def test_the_benchmark_of_pretraining_has_a_tokenizer_that_loads(folder, monkeypatch):
    """Its checkpoint is written by hand: it must have what pretrain.py reads of one."""
    def main(args):
        network, _, crop = pretrain.load_tokenizer(args)
        assert (len(network.quantizer.codebook), crop) == (32, 0.875)
        Path(args.output).mkdir()
        rows = '{"images_per_s": 1.0}\n{"images_per_s": 2.0}\n{"split": "val"}\n'
        Path(args.output, "log.jsonl").write_text(rows)

    small = ["--channels", *["16"] * 5, "--codebook-size", "32", "--code-dim", "8"]
    monkeypatch.setattr(
        bench, "TOKENIZER", tokenizer.get_args([*small, "--perceptual-weight", "0"]))
    monkeypatch.setattr(pretrain, "main", main)
    args = bench.get_args(["--data", "photos", "--batch-size", "4"])
    assert bench.Bench(args).end_to_end().function() == 2.0
