"""The documentation names only what exists, and its commands and example run."""
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from support.launch import InputError
from support.scenes import Synthetic

STAGES = {name: importlib.import_module(name) for name in (
    "teacher", "tokenizer", "pretrain", "finetune", "segment", "detect")}
# By path. RESULTS.md is of an earlier version.
DOCS = {str(path.relative_to(ROOT)): path.read_text()
        for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if path.name != "RESULTS.md"}
README = DOCS["README.md"]
OTHERS = {"--max-restarts", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint",
          "--logdir", "--shm-size"}        # torchrun's, tensorboard's, Docker's
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.S)


def code(text):
    """The lines of code of a Markdown text: of its blocks without a language, and in its lines."""
    blocks = [block for language, block in FENCE.findall(text) if not language]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    return lines + [" ".join(words.split()) for words in inline]


def commands(text):
    """(stage or tool, its flags) of each command in a text."""
    found = []
    for line in code(text):
        tool = re.search(r"\bpython -m (tools\.\w+)", line)
        script = tool or re.search(r"(?:^|\s)(\w+)\.py(?!\S)", line)
        if tool or script and script[1] in STAGES:
            found.append((script[1], shlex.split(line[script.end():], comments=True)))
    return found


def anchors(text):
    """What a Markdown text's headings are linked by."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


# ------------------------------------------------------------------------------------------------
# Names

@pytest.mark.parametrize("doc", DOCS)
def test_files_exist(doc):
    names = set(re.findall(r"[\w./-]+\.(?:py|sh)\b", DOCS[doc]))
    assert doc != "README.md" or len(names) >= 8
    for name in names:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("doc", DOCS)
def test_links_lead_somewhere(doc):
    for link in re.findall(r"\]\((?!https://)([^)]+)\)", DOCS[doc]):
        file, _, anchor = link.partition("#")
        target = (ROOT / doc).parent / file if file else ROOT / doc
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_paper_map_points_at_code():
    references = re.findall(r"`(\w+\.py):(\w+)", "".join(DOCS.values()))
    assert len(references) > 10
    for file, name in references:
        source = (ROOT / file).read_text()
        assert re.search(rf"^ *(class|def) {name}\b", source, re.M), f"{file}:{name}"


@pytest.mark.parametrize("doc", DOCS)
def test_flags_exist(doc):
    sources = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("tools/*.py")]
    known = "".join(source.read_text() for source in sources)
    flags = set(re.findall(r"--[a-z][a-z-]+", DOCS[doc])) - OTHERS
    assert doc != "README.md" or len(flags) > 15
    for flag in flags:
        assert f'"{flag}"' in known, flag


def test_tests_of_faults_exist():
    faults = (ROOT / "tests" / "test_faults.py").read_text()
    section = DOCS["docs/runs-that-can-be-trusted.md"].split("## Faults that are tested")[1]
    rows = re.findall(r"^\|(.*)\|$", section.split("\n## ")[0], re.M)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[-1])]
    assert len(names) > 15
    for name in names:
        assert f"def test_{name}" in faults, name


# ------------------------------------------------------------------------------------------------
# Commands

def parse(script, flags):
    """Parse a command line as the script does. argparse raises SystemExit where it cannot."""
    module = importlib.import_module(script)
    if hasattr(module, "get_args"):
        module.get_args(flags)
    elif script == "tools.demo":
        assert flags == []
    else:
        with pytest.raises(InputError):                     # parsed: but the run is not there
            module.main(flags)


@pytest.mark.parametrize("doc", DOCS)
def test_commands_parse(doc):
    found = commands(DOCS[doc])
    assert doc != "README.md" or len(found) > 15
    for script, flags in found:
        if "STAGE" not in flags and "--help" not in flags:
            parse(script, flags)


@pytest.mark.parametrize("file", [*(f"{stage}.py" for stage in STAGES), "tools/codewords.py",
                                  "tools/demo.py", "tools/export.py"])
def test_commands_of_a_script_parse(file):
    """Those in its docstring, which are indented."""
    doc = ast.get_docstring(ast.parse((ROOT / file).read_text()), clean=False)
    lines = re.findall(r"^    .*$", doc, re.M)
    found = commands("```\n" + "\n".join(lines) + "\n```")
    assert len(found) == len(lines) > 0
    for command in found:
        parse(*command)


# ------------------------------------------------------------------------------------------------
# The example in Python

def form(text):
    """A text with its numbers as # and without white space."""
    return re.sub(r"\s", "", re.sub(r"[-+.\de]+", "#", text))


def test_use_runs_as_shown(chain, capsys, monkeypatch):
    """Its lines, on the tests' runs: what it prints is that but for the numbers' values."""
    monkeypatch.chdir(chain.root)
    Path("runs/demo/finetune-peco-0").symlink_to(chain.finetune)
    example = r"```python\n(.*?)```\nprints\n```\n(.*?)```"
    source, shown = re.search(example, README, re.S).groups()
    exec(source, {})
    printed = capsys.readouterr().out
    assert form(printed) == form(shown)
    assert form(printed).count("#") > 20


def test_codes_and_features_of_a_folder_are_written_as_shown(chain, monkeypatch):
    monkeypatch.chdir(chain.root)
    Path("data/photos/album").mkdir(parents=True)
    for i in range(3):
        Synthetic("val")[i][0].resize((80, 60)).save(f"data/photos/album/{i}.jpg")
    source = re.search(r"```python\n(import torch\n.*?)```", README, re.S)[1]
    exec(source.replace("runs/photos", "runs/demo"), {})
    saved = torch.load("photos.pt")
    assert saved["paths"] == [f"data/photos/album/{i}.jpg" for i in range(3)]
    assert saved["codes"].shape == (3, 4, 4) and saved["codes"].dtype == torch.int64
    assert saved["features"].shape == (3, 64) and saved["features"].isfinite().all()
