"""The README names only what exists."""
import re
from pathlib import Path

import detect
import finetune
import pretrain
import segment
import teacher
import tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_paper_map_points_at_code():
    references = re.findall(r"`(\w+\.py):(\w+)`", README)
    assert len(references) > 10
    for file, name in references:
        assert re.search(rf"^(class|def) {name}\b", (ROOT / file).read_text(), re.M), f"{file}:{name}"


def test_flags_exist():
    helps = "".join((ROOT / f"{stage.__name__}.py").read_text() for stage in (teacher, tokenizer, pretrain, finetune, segment, detect))
    helps += "".join(path.read_text() for path in (ROOT / "runtime.py", *(ROOT / "tools").glob("*.py")))
    torchrun = {"--max-restarts", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
    flags = set(re.findall(r"--[a-z][a-z-]+", README)) - torchrun
    assert len(flags) > 15
    for flag in flags:
        assert f'"{flag}"' in helps, flag


def test_use_runs_as_shown(chain, capsys, monkeypatch):
    """Its lines, on the tests' runs: what it prints is that but for the numbers' values."""
    monkeypatch.chdir(chain.root)
    link = chain.root / "runs" / "demo" / "finetune-pre-trained-0"
    if not link.exists():
        link.symlink_to(chain.finetune)
    code, shown = re.search(r"```python\n(.*?)```\nprints\n```\n(.*?)```", README, re.S).groups()
    exec(code, {})
    form = [re.sub(r"[-+.\de]+|\s", lambda m: "" if m[0].isspace() else "#", text) for text in (shown, capsys.readouterr().out)]
    assert form[0] == form[1] and form[0].count("#") > 20


def test_recipe_values():
    """A few numbers of the README's recipe table, against the table in the scripts."""
    p, t, f, m = pretrain.RECIPES["paper"], tokenizer.RECIPES["paper"], finetune.RECIPES["paper"], teacher.RECIPES["paper"]
    s, d = segment.RECIPES["paper"], detect.RECIPES["paper"]
    for text in (f"lr {s['lr'] * 1e4:g}e-4, weight decay {s['weight_decay']}, layer decay {s['layer_decay']}, {s['warmup_steps']} warm-up",
                 f"shorter side {d['min_size']}…{d['image_size']} and longer ≤ {d['max_size']}",
                 f"lr {d['lr'] * 1e4:g}e-4, layer decay {d['layer_decay']}, {d['warmup_steps']} warm-up",
                 f"batch {p['batch_size']}, 300 or {p['epochs']} epochs", f"lr {p['lr'] * 1e3:g}e-3", f"K = {t['codebook_size']}",
                 f"D = {t['code_dim']}", f"batch {t['batch_size']}, Adam lr {t['lr'] * 1e5:g}e-5", f"{t['warmup_steps']} warm-up steps",
                 f"lr {f['lr'] * 1e3:g}e-3", f"layer decay {f['layer_decay']}", f"{f['warmup_epochs']} of warm-up",
                 f"batch {m['batch_size']}, lr {m['lr'] * 1e3:g}e-3", f"channels {', '.join(map(str, t['channels']))}"):
        assert text in README, text
