"""What several test modules need."""
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import COMMON, OWN, STAGES
from torch import nn
from torchvision.models import resnet, vgg

from model import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer
from support import checkpoint, launch

# ------------------------------------------------------------------------------------------------
# Runs


def files(folder="run"):
    """Names of a run's files that are neither of its log nor its lock."""
    names = {path.name for path in Path(folder).iterdir()}
    return sorted(name for name in names if not name.startswith(("log", "lock", "events.")))


def rows(folder="run"):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def log(folder, split=None):
    """Rows of a run's log: of training, or of evaluations on a split."""
    return [row for row in rows(folder) if "args" not in row and row.get("split") == split]


def newest(folder):
    return checkpoint.load(folder)


def weights(state):
    """Digest of all that is trained."""
    rest = ("args", "digest", "best")
    return checkpoint.digest({key: value for key, value in state.items() if key not in rest})


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


@contextlib.contextmanager
def process_group(*command, **environment):
    """A process in a group of its own, which is killed at the end. It prints to output.txt."""
    with open("output.txt", "ab") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=output, stderr=output,
            start_new_session=True, env=os.environ | dict(OMP_NUM_THREADS="1") | environment)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def torchrun(*command, ranks=2, launcher=()):
    """A process_group of torchrun."""
    # torchrun keeps one store through all restarts, and gloo may find there the address of a
    # process that has died (torch 2.14). With this each restart has a store of its own.
    own_store = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    return process_group("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
                         *launcher, *command, **own_store)


def printed():
    return Path("output.txt").read_text()


# ------------------------------------------------------------------------------------------------
# Networks and what they take

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomize(module, seed=0):
    """Every parameter away from its initial zeros and ones, so that each one matters."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def tiny_vit(**changes):
    """BEiT's other ViT, whose weights are of more kinds, where nothing else is asked for."""
    arguments = dict(image_size=16, patch_size=4, dim=32, depth=2, heads=2, positions="shared",
                     layer_scale=0.1)
    return randomize(VisionTransformer(**arguments | changes)).eval()


def pixels(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed)) * 2 - 1


def statistics():
    """ImageNet's mean and standard deviation, (3, 1, 1) each."""
    return [torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)]


def as_moco_v3(network, head="head"):
    """What MoCo v3's files hold: a network, its momentum copy, projectors in place of its head."""
    state = {f"module.base_encoder.{head}.0.weight": torch.ones(8, 32),
             "module.predictor.0.weight": torch.ones(4, 4)}
    for key, value in network.state_dict().items():
        if not key.startswith(f"{head}."):
            state[f"module.base_encoder.{key}"] = value
            state[f"module.momentum_encoder.{key}"] = value + 1
    return dict(epoch=300, arch="vit_base", state_dict=state, optimizer={}, scaler={})


class TinyVGG(nn.Sequential):
    """VGG-16's layers, eight channels wide: a state dict of its names."""

    def __init__(self):
        super().__init__()
        widths = [8 if width != "M" else "M" for width in vgg.cfgs["D"]]
        self.features = vgg.make_layers(widths)


def tiny_resnet50():
    """One block a stage: the names of ResNet-50's weights, and its widths."""
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1])
