"""--dry-run: what it says is what a step takes."""
import json
import os
import resource

import pytest
import torch

import finetune
import pretrain
import runtime
from conftest import COMMON, OWN, STAGES
from test_faults import forked, wait
from tools import plan


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_says_what_it_will_cost(stage, chain, capsys, monkeypatch):
    monkeypatch.chdir(chain.root)
    runtime.launch(STAGES[stage].main, STAGES[stage].get_args([*COMMON, *OWN[stage], "--dry-run", "50", "--output", "planned"]))
    lines = dict((line[:20].strip(), line[20:]) for line in capsys.readouterr().out.splitlines())
    state = runtime.load_checkpoint(chain.root / "runs" / "demo" / stage)
    assert lines["steps"] == "6: 4 an epoch of 64 images" and lines["at 50 images/s"] == "0.0 hours"
    found = plan.estimate(STAGES[stage].get_args([*COMMON, *OWN[stage]]), 11 if stage == "segment" else 10)
    trained = sum(v["exp_avg"].numel() for v in state["optimizer"]["state"].values())
    frozen_projection = 64 * 3 * 8 * 8 + 64 if stage == "teacher" else 0    # the teacher's patch projection is not trained
    assert found["trained"] - frozen_projection == trained
    assert found["micro"] == 16 and found["forward"] > 1e6 and found["activations"] > 1e5
    assert not (chain.root / "planned").exists()


def test_vit_huge_costs_nothing_to_ask(capsys):
    args = pretrain.get_args(["--model", "huge", "--batch-size", "16", "--tokenizer", "nowhere"])
    found = plan.estimate(args, 1000)
    assert 630e6 < found["trained"] < 650e6
    tokens, dim, depth = 197, 1280, 32
    by_hand = 2 * depth * (12 * tokens * dim ** 2 + 2 * tokens ** 2 * dim)
    assert by_hand < found["forward"] < 1.1 * by_hand       # with the tokenizer's encoder and the head
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 * 2 ** 20       # KiB


def measured(flags):
    """Writes how much memory a step took, in bytes, as the process grew."""
    args = finetune.get_args(flags)
    torch.manual_seed(0)
    model, _, _ = finetune.build(args, 1000)
    images = torch.zeros(args.batch_size, 3, args.image_size, args.image_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss = torch.nn.functional.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.int64))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss.backward()
    with open("measured.json", "w") as file:
        json.dump(1024 * (after - before), file)


def test_activations_are_what_a_process_grows_by():
    flags = [*COMMON, "--init", "none", "--model", "tiny", "--image-size", "224", "--patch-size", "16", "--batch-size", "24"]
    with forked(measured, flags) as pid:
        assert wait(pid) == 0, open("output.txt").read()
    found, grown = plan.estimate(finetune.get_args(flags), 1000), json.load(open("measured.json"))
    assert 0.8 < found["activations"] / grown < 1.25
    less = plan.estimate(finetune.get_args([*flags, "--checkpoint-activations"]), 1000)
    assert less["activations"] < 0.3 * found["activations"] and less["trained"] == found["trained"]
