"""--dry-run: what it says is what a step takes."""
from pathlib import Path

import pytest
import torch

import finetune
import pretrain
import runtime
from conftest import COMMON, OWN, STAGES
from model import VisionTransformer
from tools import plan


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_says_what_it_will_cost(stage, chain, capsys, monkeypatch):
    monkeypatch.chdir(chain.root)
    runtime.launch(STAGES[stage].main, STAGES[stage].get_args([*COMMON, *OWN[stage], "--dry-run", "0.001", "--output", "planned"]))
    lines = dict((line[:20].strip(), line[20:]) for line in capsys.readouterr().out.splitlines())
    state = runtime.load_checkpoint(chain.root / "runs" / "demo" / stage)
    assert lines["steps"] == "6: 4 an epoch of 64 images" and lines["at 0.001 images/s"] == f"{6 * 16 / 0.001 / 3600:.1f} hours"
    found = plan.estimate(STAGES[stage].get_args([*COMMON, *OWN[stage]]), 11 if stage == "segment" else 10)
    trained = sum(v["exp_avg"].numel() for v in state["optimizer"]["state"].values())
    assert found["trained"] == trained
    newest = sorted((chain.root / "runs" / "demo" / stage).glob("step-*.pt"))[-1]
    assert found["written"] == pytest.approx(newest.stat().st_size, rel=0.25)           # small tensors: names and headers count
    assert found["micro"] == 16 and found["forward"] > 1e6 and found["activations"] > 1e5
    least, most = dict(teacher=(1.1, 2.5), tokenizer=(1.5, 2.9), pretrain=(1.1, 2.9)).get(stage, (2.5, 3.0))  # with frozen networks
    assert least < found["training"] / found["forward"] <= most
    assert not (chain.root / "planned").exists()


def test_vit_huge_costs_nothing_to_ask():
    args = pretrain.get_args(["--model", "huge", "--batch-size", "16", "--tokenizer", "nowhere"])
    before = high_water()
    found = plan.estimate(args, 1000)
    assert high_water() - before < 2 ** 29                  # its weights alone are 2.4 GiB
    assert 630e6 < found["trained"] < 650e6
    tokens, dim, depth = 197, 1280, 32
    by_hand = 2 * depth * (12 * tokens * dim ** 2 + 2 * tokens ** 2 * dim)
    assert by_hand < found["forward"] < 1.1 * by_hand       # with the tokenizer's encoder and the head


def high_water():
    """The most memory that this program has held, in bytes; ru_maxrss would begin at what its parent held."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def test_activations_are_what_the_allocator_holds():
    flags = [*COMMON, "--init", "none", "--model", "tiny", "--image-size", "224", "--patch-size", "16", "--batch-size", "24"]
    args = finetune.get_args(flags)
    found, (model, _, _) = plan.estimate(args, 1000), finetune.build(args, 1000)
    images = torch.zeros(args.batch_size, 3, args.image_size, args.image_size)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = torch.nn.functional.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.int64))
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())      # taken and not given back
    assert loss.requires_grad and found["activations"] == pytest.approx(held, rel=0.02)
    less = plan.estimate(finetune.get_args([*flags, "--checkpoint-activations"]), 1000)
    assert less["activations"] < 0.3 * found["activations"] and less["trained"] == found["trained"]


def test_what_is_given_counts(chain, capsys):
    def hours(*flags):
        runtime.launch(finetune.main, finetune.get_args([*COMMON, "--init", "none", "--steps", "8", "--dry-run", *flags]))
        return capsys.readouterr().out

    assert "8: 2 an epoch of 20 images" in hours("--label-fraction", "0.25", "--batch-size", "10")
    assert "of 44 images" in hours("--label-fraction", "1", "--holdout", "0.25")
    big = dict(image_size=32, patch_size=8, dim=128, depth=2, heads=2, codes=8)
    torch.save(dict(stage="pretrain", model_args=big, model={}), "big.pt")
    args = finetune.get_args([*COMMON, "--init", "big.pt"])
    assert plan.estimate(args, 10)["trained"] == sum(p.numel() for p in VisionTransformer(
        **{k: v for k, v in big.items() if k != "codes"}, positions="block", classes=10).parameters())
    assert VisionTransformer(32, 8, dim=32, depth=1, heads=2, positions="block")(torch.zeros(1, 3, 20, 40)).is_cpu   # no fake ones are left
    plain, averaged = (plan.estimate(finetune.get_args([*COMMON, "--init", "none", *flags]), 10) for flags in ([], ["--ema-decay", "0.9"]))
    assert averaged["written"] == pytest.approx(4 / 3 * plain["written"], rel=0.01) and averaged["held"] == 2 * plain["held"]
    none, judged = (plan.estimate(STAGES["tokenizer"].get_args([*COMMON, *OWN["tokenizer"], "--adversarial-weight", weight]), 10)
                    for weight in ("0", "0.1"))
    assert judged["trained"] - none["trained"] == sum(p.numel() for p in STAGES["tokenizer"].PatchDiscriminator().parameters())
    pixel = plan.estimate(STAGES["tokenizer"].get_args([*COMMON, *OWN["tokenizer"], "--perceptual-weight", "0"]), 10)
    whole = plan.estimate(STAGES["tokenizer"].get_args([*COMMON, *OWN["tokenizer"], "--perceptual", str(chain.teacher)]), 10)
    assert pixel["forward"] < whole["forward"] and pixel["held"] < whole["held"]
