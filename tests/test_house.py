"""The house: which files there are, how long they may be, and who may import whom."""
import ast
import subprocess
import sys

import pytest
from conftest import ROOT

STAGES = {"teacher", "tokenizer", "pretrain", "finetune", "segment", "detect"}
MAY_IMPORT = {                                              # of the project
    "model": set(),
    "support.launch": set(),
    "support.flags": {"support.launch"},
    "support.checkpoint": {"support.launch"},
    "support.scenes": {"support.launch"},
    "support.run": {"support.launch", "support.checkpoint"},
    # data: load gives a network the transform of its run's evaluation; flags: the ranges of numbers
    "support.weights": {"support.launch", "support.checkpoint", "support.flags", "model", "data"},
    "data": {"support.launch", "support.flags", "support.scenes"},
}
CEILINGS = {                                                # lines; they only ever sink
    "teacher": 245, "tokenizer": 265, "pretrain": 250, "finetune": 215, "segment": 434,
    "detect": 409, "model": 949, "data": 413, "support/launch": 302, "support/flags": 150,
    "support/checkpoint": 144, "support/recipes": 214, "support/run": 316, "support/weights": 478,
    "support/scenes": 255,
}
ALONE = """
from model import VisionTransformer, VQTokenizer, block_mask
tokenizer = VQTokenizer(32, channels=(16, 32), codebook_size=8, code_dim=4)
vit = VisionTransformer(32, 8, dim=16, depth=1, heads=2)
print(tokenizer.stride, vit.grid, int(block_mask(4, 6, 2).sum()))
"""


def modules():
    files = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("tools/*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def imports(file):
    """The project's modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names & set(modules())


@pytest.mark.parametrize("name", [name for name in modules() if not name.startswith("tools.")])
def test_who_may_import_whom(name):
    found = imports(modules()[name])
    assert not {other for other in found if other.startswith("tools")}      # nothing imports tools
    assert not found & STAGES                               # a stage is no library
    if name in MAY_IMPORT:
        assert found <= MAY_IMPORT[name]


@pytest.mark.parametrize("name, ceiling", CEILINGS.items())
def test_no_file_outgrows_its_ceiling(name, ceiling):
    """A reader takes in one file at a time: what is added makes room for itself."""
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= ceiling


def test_model_py_may_be_copied_alone(folder):
    (folder / "model.py").write_text((ROOT / "model.py").read_text())
    out = subprocess.run([sys.executable, "-c", ALONE], cwd=folder, capture_output=True, text=True)
    assert out.stdout == "2 4 6\n", out.stderr
