"""What people bring: weights of other toolboxes, settings of every kind, more epochs, trackers. Right values come from elsewhere."""
import argparse
import ast
import contextlib
import functools
import json
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from domainmix import core, weights
from domainmix.backbone import build_backbone
from domainmix.bodies import BackboneConfig, resnet50_body
from domainmix.cli import given_settings, main
from domainmix.commands import COMMANDS, RunCommand
from domainmix.core import CommandLine, DomainMixError, command_line, setting_names, with_overrides
from domainmix.runs import ranges, settings
from domainmix.runs.pipeline import run
from domainmix.runs.settings import TINY_SETTINGS, configure
from domainmix.files import load_weights, weights_metadata
from domainmix.runs.inputs import read_inputs
from domainmix.schedule import DomainConfig
from sync import ROOT, modules


# weights of other toolboxes

@functools.cache
def theirs():
    "torchvision's own ResNet-50, with statistics as after training, and a BN neck."
    torch.manual_seed(0)
    net, neck = torchvision.models.resnet50(weights=None), nn.BatchNorm1d(2048)
    for m in [*net.modules(), neck]:
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(0, .1), m.running_var.uniform_(.8, 1.2)
    return net.eval(), neck.eval()


def styled(kind):
    "(state dict, entries beside it, name of the neck) as a toolbox saves this network."
    net, neck = theirs()
    layers = {k: v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    parts = [net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4]
    bn, head = (lambda name: {f"{name}.{k}": v for k, v in neck.state_dict().items()}), torch.zeros(751, 2048)
    def under(prefix, state): return {prefix + k: v for k, v in state.items()}
    match kind:
        case "torchvision": return net.state_dict(), {}, ""
        case "timm": return layers | {"fc.weight": head}, dict(arch="resnet50", epoch=3), ""
        case "torchreid": return under("module.", layers | {"classifier.weight": head}), dict(epoch=60, rank1=np.float64(.9), optimizer={"state": {}}), ""
        case "strong baseline": return under("base.", layers) | bn("bottleneck") | {"classifier.weight": head}, {}, "bottleneck"
        case "fast-reid": return under("backbone.", layers) | bn("heads.bottleneck.0") | {"heads.weight": head, "pixel_mean": torch.zeros(1, 3, 1, 1)}, dict(iteration=9), "heads.bottleneck.0"
        case "spcl": return under("module.", under("base.", nn.Sequential(*parts).state_dict()) | bn("feat_bn") | {"classifier.weight": head}), dict(best_mAP=np.float32(.7)), "module.feat_bn"
        case "layumi": return under("model.", net.state_dict()) | {"classifier.add_block.0.weight": torch.zeros(512, 2048), "classifier.add_block.1.running_mean": torch.zeros(512), "classifier.classifier.0.weight": torch.zeros(751, 512)}, {}, ""
        case "compiled": return under("_orig_mod.model.backbone.", layers), {}, ""
        case "target norms":    # of SpCL before the conversion: the norms of both domains
            split = lambda k: [k] if not re.search(r"bn\d\.|downsample\.1\.", k) else [re.sub(r"(bn\d|downsample\.1)\.", rf"\1.{d}.", k) for d in ("BN_S", "BN_T")]
            return under("module.base.", {n: v if "BN_S" not in n else v + 1 for k, v in layers.items() for n in split(k)}), {}, ""


KINDS = {"torchvision": "torchvision", "timm": "timm", "torchreid": "Torchreid", "strong baseline": "strong baseline", "fast-reid": "fast-reid",
         "spcl": "SpCL", "layumi": "layumi", "compiled": "", "target norms": ""}


@pytest.mark.parametrize("kind", KINDS)
def test_the_body_and_neck_of_a_toolbox_are_found(kind, tmp_path):
    state, beside, neck = styled(kind)
    torch.save({**{{"fast-reid": "model"}.get(kind, "state_dict"): state}, **beside} if beside else state, tmp_path/"theirs.pth")
    file = weights.read_weights(tmp_path/"theirs.pth")
    net, their_neck = theirs()
    ours = {k: v for k, v in resnet_state().items()}
    parts = weights.split_weights(file.tensors, ours, 2048)
    assert parts.body.keys() == ours.keys() and all(torch.equal(parts.body[k], v) for k, v in net.state_dict().items() if k in ours)
    assert parts.neck_name == neck and (not neck or torch.equal(parts.neck["running_var"], their_neck.running_var))
    report = weights.weights_report("theirs.pth", file, parts, [])
    assert KINDS[kind] in report and set(beside) <= set(re.findall(r"\w+", report)) and ("classifier" in report) == any("classifier" in k for k in state)


@functools.cache
def resnet_state():
    return resnet50_body().state_dict()


@pytest.mark.slow    # nbs/24_backbone.ipynb does the same with a file of SpCL
def test_a_file_of_the_strong_baseline_gives_the_features_of_torchvision(tmp_path):
    "By the library and by a command: before and after the neck."
    import domainmix
    state, _, _ = styled("strong baseline")
    torch.save({"model": state, "best": np.float64(1)}, tmp_path/"theirs.pth")
    config = configure(backbone="resnet50", height=64, width=32, **{"net.last_stride": 2})
    model = domainmix.load(tmp_path/"theirs.pth", device="cpu", backbone=config)
    net, neck = theirs()
    net.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        raw, after = model.net(x)
        torch.testing.assert_close(raw, net(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after, neck(net(x)), atol=1e-3, rtol=1e-3)


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path(self.where),))


@pytest.mark.parametrize("value, words", [
    (dict(state_dict={}, args=argparse.Namespace(lr=1)), "argparse.Namespace"), (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    (dict(state_dict=dict(a=np.zeros(3))), "no state dict|numpy"), ([1, 2], "no state dict"), (3, "no state dict"), (b"text", "no state dict"), ("harm", "nothing of it was run")])
def test_what_is_no_state_dict_is_named_and_never_to_be_deleted(value, words, tmp_path):
    if value == "harm":
        value = Harmful()
        value.where = str(tmp_path/"harmed")
    torch.save(value, tmp_path/"x.pth")
    with pytest.raises(DomainMixError) as error:
        build_backbone(BackboneConfig("osnet_x0_25", weights=str(tmp_path/"x.pth")))
    said = str(error.value)
    assert re.search(words, said) and "x.pth" in said and "delete" not in said and not (tmp_path/"harmed").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.pth.tar", "a.bin"])
def test_damaged_files_of_a_user_are_never_to_be_deleted(name, tmp_path, capsys):
    for content in (b"", b"x" * 300, pickle.dumps({"a": 1})[:-3]):
        (tmp_path/name).write_bytes(content)
        assert main(["export", "--model", str(tmp_path/name), "--backbone", "osnet_x0_25", "--out", str(tmp_path/"out"), "--formats", "torch"]) == 2
        said = capsys.readouterr().err
        assert name in said and "delete" not in said and "stage" not in said and not (tmp_path/"out").exists(), said


# every setting has a range

BAD = (math.nan, math.inf, -1, 0, 1e12)


def set_setting(config, name, value):
    "A config with one number replaced, whatever the type."
    head, _, rest = name.partition(".")
    old = getattr(config, head)
    new = set_setting(old, rest, value) if rest else type(old)([value] * len(old)) if isinstance(old, (tuple, list)) else value
    return replace(config, **{head: new})


def test_a_bad_number_in_any_setting_is_refused_before_anything_is_read(monkeypatch):
    "By its flag, which the command has; or the table says that it is allowed."
    monkeypatch.setattr(settings, "_image_size_faults", lambda config: [])    # slow, and tested in its notebook
    base = with_overrides(configure(TINY_SETTINGS, real="world", target="world"), {
        "net.stripes": 1, **{f"{s}.{n}": 2 for s in ("spcl", "mmt", "plain", "sda") for n in ("cluster.k1", "cluster.k2", "cluster.min_samples", "samples_per_bn")},
        "stage2.margin": .3, "stage3.margin": .3, "stage3.disc_lr": .1, "pretrain.margin": .3, "pretrain.samples_per_bn": 4})
    flags, seen, refused = frozenset(setting_names(RunCommand)), 0, 0
    with command_line(CommandLine(flags)):
        assert not settings.setting_faults(base)
        for name in settings.numeric_settings(base):
            for value in BAD:
                find = settings.setting_faults if value == -1 else settings.range_faults    # the first takes longer
                faults, allowed, seen = find(set_setting(base, name, value)), ranges.setting_range(name), seen + 1
                if not math.isfinite(value) or abs(value) > 1e11 and name != "world.seed" and name != "seed":
                    assert faults, (name, value)
                if not allowed.contains(value):
                    refused += 1
                    said = [f for f in faults if f.what.startswith("--" + name.replace("_", "-") + " is ")]
                    assert len(said) == 1 and name in flags, (name, value, faults)
    assert seen > 800 and refused > 500, (seen, refused)


def test_all_faults_are_listed_at_once_as_they_were_given(tmp_path, capsys):
    (tmp_path/"mine.json").write_text(json.dumps({**TINY_SETTINGS, "real": "world", "data": str(tmp_path/"data"), "stage3.lr": -2, "spcl": {"k": 0}}))
    command = ["run", "--config", str(tmp_path/"mine.json"), "--stage2.weight-decay", "-1", "--lower", "9", "--upper", "3", "--plain.cluster.eps=nan"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "5 settings" in said and not (tmp_path/"data").exists()
    for words in (f"stage3.lr in {tmp_path/'mine.json'} is -2", f"spcl.k in {tmp_path/'mine.json'} is 0", "--stage2.weight-decay is -1", "--lower is 9, but --upper is 3", "--plain.cluster.eps is nan"):
        assert words in said, (words, said)


def test_the_numbers_of_the_help_are_those_of_the_table(capsys):
    "Every number that the command takes has a range: its help is another list of them."
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    named = set(re.findall(r"(--[\w.-]+) (?:\{?None[|,])?(?:INT|FLOAT)", capsys.readouterr().out))
    assert len(named) > 100
    missing = [n for n in named if not ranges.setting_range(n[2:].replace("-", "_"))]
    assert not missing, missing


# the words of the command line

FLAG = re.compile(r"(?<![\w-])--([a-z][\w.-]*\w)")
FOREIGN = {"help", "version", "logdir", "rdzv_endpoint", "log-level", "sys-prefix"}    # of tensorboard, torchrun and the kernel


@functools.cache
def definitions():
    "Name -> syntax tree of everything that a module defines; no name is defined twice (tests/test_house.py)."
    found = {}
    for path, text in modules(ROOT).items():
        for node in ast.parse(text).body if Path(path).stem not in ("_modidx", "__init__") else ():
            targets = [node] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else getattr(node, "targets", [getattr(node, "target", None)])
            found |= {getattr(t, "name", getattr(t, "id", None)): node for t in targets}
    return {k: v for k, v in found.items() if k}


@functools.cache
def used_names(name):
    node = definitions()[name]
    is_constant = isinstance(node, (ast.Assign, ast.AnnAssign))
    own, used = set(), set()
    for n in ast.walk(node):
        if isinstance(n, ast.arg): own.add(n.arg)
        elif isinstance(n, ast.Name): (own if isinstance(n.ctx, ast.Store) and not is_constant else used).add(n.id)
    return (used & definitions().keys()) - own


def reachable(*names):
    "Everything that these functions can call, by name; more rather than less."
    seen, left = {"COMMANDS", "check_command"}, [*names]
    while left:
        if (name := left.pop()) not in seen:
            seen.add(name)
            left += used_names(name)
    return seen - {"COMMANDS", "check_command", "FIRST_FLAGS"}


@functools.cache
def messages(name):
    "The texts in a definition that can be shown: no docstrings, no single flags, no style sheets."
    node, found = definitions()[name], []
    docs = {id(n.body[0].value) for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and isinstance(n.body[0], ast.Expr)}
    for n in ast.walk(node):
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs and not FLAG.fullmatch(n.value) and "{" not in n.value:
            found.append(n.value)
    return found


@functools.cache
def asked_flags(name):
    "What a definition asks `has_flag` about."
    return {n.args[0].value for n in ast.walk(definitions()[name]) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "has_flag"}


def wrong_flags(command, root=None):
    "Flags that a message of a command names and that it does not have."
    names = {c: {n.replace("_", "-") for n in setting_names(kind)} for c, (kind, _, _) in COMMANDS.items()}
    found = []
    for name in root or reachable(COMMANDS[command][1].__name__, "run_command", "report_errors"):
        for text in messages(name):
            whose = (re.findall(r"domainmix (\w+)", text) + [command])[0]
            for flag in FLAG.findall(text) if "domainmix.pipeline" not in text else ():
                plain = re.sub(r"(^|\.)no-", r"\1", flag)
                if plain not in names.get(whose, names[command]) | FOREIGN and plain.replace("-", "_") not in asked_flags(name):
                    found.append(f"{command}: {name} says --{flag}")
    return found


def test_every_flag_in_a_message_is_one_of_the_command():
    assert not [line for command in COMMANDS for line in wrong_flags(command)]
    assert len(reachable("do_evaluate")) > 100 and "split_query_gallery" in reachable("do_evaluate")


def test_every_setting_that_a_message_asks_for_exists():
    "The names given to `flag` and `has_flag`."
    known = {n for kind, _, _ in COMMANDS.values() for n in setting_names(kind)}
    asked = [(name, a.value) for name, node in definitions().items() for n in ast.walk(node) if isinstance(n, ast.Call) and getattr(n.func, "id", "") in ("flag", "has_flag")
             for a in n.args if isinstance(a, ast.Constant)]
    assert len(asked) > 30 and not [a for a in asked if a[1] not in known], [a for a in asked if a[1] not in known]


def test_the_check_of_flags_notices(monkeypatch):
    node = ast.parse("def f():\n    'A docstring with --nothing.'\n    raise DomainMixError('what', 'give --target-pattern')").body[0]
    monkeypatch.setitem(definitions(), "f_with_a_flag", node)
    assert wrong_flags("evaluate", ["f_with_a_flag"]) == ["evaluate: f_with_a_flag says --target-pattern"] and not wrong_flags("run", ["f_with_a_flag"])


@pytest.mark.parametrize("command, advised", [("evaluate", "--pattern"), ("run", "--target-pattern"), ("tune", "--pattern"), (None, "target_pattern")])
def test_a_command_advises_its_own_flags(command, advised, tmp_path):
    for i in range(3): Image.new("RGB", (16, 32), (i, 0, 0)).save(tmp_path/f"{i}.png")
    with command_line(given_settings([command])) if command else contextlib.nullcontext(), pytest.raises(DomainMixError) as error:
        read_inputs(configure(target=f"folder:{tmp_path}", data=str(tmp_path)), ("target",))
    assert f"give a {advised} with a group pid" in str(error.value)


# more epochs of a finished stage

STEP = {"schedule": "step", "milestones": (1, 3)}


def results_of(home):
    "The bytes of every result; of a .safetensors file those of its tensors and facts, because it stores its facts in any order."
    def content(p):
        if p.suffix != ".safetensors": return p.read_bytes()
        return {k: v.numpy().tobytes() for k, v in load_weights(p).items()}, weights_metadata(p)
    return {p.relative_to(home).as_posix(): content(p) for p in sorted(home.rglob("*")) if p.suffix in (".safetensors", ".npy", ".npz") or p.name == "scores.json"}


def longer_run(tmp_path, method, stage, capsys, **changes):
    "Two epochs, then four, beside four from the start; what was said."
    said = []
    base = configure(TINY_SETTINGS, {f"{s}.{k}": v for s in settings.TRAINING_SECTIONS for k, v in STEP.items()}, changes,
                     real=None if method == "only-a" else "world", method=method, all_stages=False, data=str(tmp_path), net={"view": "whole", "parts": False})
    run(with_overrides(base, {"run": "on", f"{stage}.epochs": 2}))
    with pytest.raises(DomainMixError, match="would be done again" if "stage2.schedule" in changes else "would go on"):
        run(with_overrides(base, {"run": "on", f"{stage}.epochs": 4}))
    capsys.readouterr()
    run(with_overrides(base, {"run": "on", f"{stage}.epochs": 4}), update=True)
    said = capsys.readouterr().out
    run(with_overrides(base, {"run": "whole", f"{stage}.epochs": 4}))
    on, whole = (results_of(tmp_path/"runs"/name) for name in ("on", "whole"))
    assert on.keys() == whole.keys() and [k for k in on if on[k] != whole[k]] == []
    return said


def test_four_epochs_after_two_are_four_epochs(tmp_path, capsys):
    assert "stage2 goes on after 2 epochs" in longer_run(tmp_path, "only-a", "stage2", capsys, **{"pretrain.epochs": 0})
    log = (tmp_path/"runs/on/stage2/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1, 2, 3, 4] and (tmp_path/"runs/on/stage2/finished.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method, stage", [("only-a", "pretrain"), ("stage1", "spcl"), ("stage1-plain", "plain"), ("stage1-mmt", "mmt"), ("stage1-sda", "sda"), ("domainmix-db", "stage3"), ("control", "stage3")])
def test_every_stage_goes_on(method, stage, tmp_path, capsys):
    assert "goes on after" in longer_run(tmp_path, method, stage, capsys)


@pytest.mark.slow
def test_a_cosine_starts_again_and_says_why(tmp_path, capsys):
    said = longer_run(tmp_path, "only-a", "stage2", capsys, **{"stage2.schedule": "cosine"})
    assert "starts from the beginning, 2 epochs are done again: its learning rate falls as a cosine" in said
    assert not list(tmp_path.rglob("*.ckpt")) or all(p.parent.name == "stage0" for p in tmp_path.rglob("*.ckpt"))


def test_settings_of_later_versions_change_no_key():
    "Fields that were added stay out of what a stage's key is made of, at their default."
    for config, names in ((BackboneConfig(), ["first_relu"]), (configure(), ["keep_state"]), (DomainConfig(), ["capture"])):
        assert all(hasattr(config, n) and n not in core.to_dict(config) for n in names)


# one rule for a query's own file

def test_no_sheet_shows_a_query_its_own_file(tmp_path, monkeypatch):
    "The scores, the list, the sheet of the report, that of the README and the widget: by the content of the files."
    from types import SimpleNamespace

    from domainmix.datasets import read_dataset
    from domainmix.evaluation import rank, ranked_list
    from domainmix.runs.inputs import decode_split
    from domainmix.views import report, sheets
    from domainmix.views.results import Results
    from domainmix.views.widgets import Retrieval, answers_by_network
    for i in range(24):                            # half of the gallery are also queries, under other names
        for folder in ("query", "gallery") if i % 4 < 2 else ("gallery",):
            (tmp_path/folder).mkdir(exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (8, 4, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path/folder/f"{i // 4}_{folder}_{(i * 7) % 24}.png")
    found, config = read_dataset(f"folder:{tmp_path}", r"(?P<pid>\d)_"), configure(height=8, width=4, data=str(tmp_path/"data"))
    split = {name: decode_split(getattr(found, name), config) for name in ("query", "gallery")}
    feature = {name: (s.images.flatten(1).double() - 127).numpy() for name, s in split.items()}
    feature = {name: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for name, x in feature.items()}
    content = {name: [Path(f).read_bytes() for f in s.records.files()] for name, s in split.items()}
    q, g = split["query"].records, split["gallery"].records
    aps = []                                       # brute force
    for i, x in enumerate(feature["query"]):
        order = [j for j in np.argsort(-(feature["gallery"] @ x)) if content["gallery"][j] != content["query"][i]]
        right = g.pid[order] == q.pid[i]
        aps.append(np.mean([right[:k + 1].mean() for k in np.flatnonzero(right)]))
    r = SimpleNamespace(load_split=split.get, last_networks=lambda: ["stage3"], compared=lambda stage: (feature["query"], feature["gallery"]), _own_files=None)
    r.own_files = lambda: Results.own_files(r)
    shown, scores = [], []

    def spy(module):
        def list_(*a, **k):
            shown.append(ranked_list(*a, **k))
            return shown[-1]

        def rank_(*a, **k):
            scores.append(rank(*a, **k).average_precision)
            return rank(*a, **k)
        monkeypatch.setattr(module, "ranked_list", list_), monkeypatch.setattr(module, "rank", rank_)
    spy(report), spy(sheets)
    report._draw_answers(r), sheets._ranking_rows(r, 5, 6)
    view = Retrieval({"stage3": (feature["query"], feature["gallery"])}, *split.values())
    scores.append(view.ap["stage3"])
    assert len(scores) == 3 and all(np.allclose(s, aps) for s in scores), (scores, aps)
    rows = np.arange(0, len(g), 1)[::-1].copy()    # some order of the gallery, as after the choice of a camera
    for i in range(len(q)):
        one = answers_by_network(view.features, i, q, g, rows, 24, view.own)
        answers = [*(at[i] for at in (s.index for s in shown)), rows[one.index[0][one.index[0] >= 0]]]
        assert len(answers) == 3 and (one.index < 0).sum() == 1
        for at in answers:
            assert len(at) >= 6 and not any(content["gallery"][j] == content["query"][i] for j in at if j >= 0)
        assert (g.pid[answers[2][0]] == q.pid[i]) == (one.flag[0][0] == 1)


def test_nan_and_infinity_are_listed_with_the_other_faults(tmp_path, capsys):
    "From a file of settings by both commands, and from a call of the library; each by its name as it was given."
    from domainmix import pipeline
    file = tmp_path/"mine.json"
    file.write_text(json.dumps({**TINY_SETTINGS, "real": "world", "data": str(tmp_path/"data"), "stage3.lr": math.nan, "spcl.k": 0, "stage2": {"margin": -math.inf},
                                "world.a.blur": [math.nan, 1]}))
    wanted = [f"{name} in {file} is {value}" for name, value in (("stage3.lr", "nan"), ("spcl.k", "0"), ("stage2.margin", "-inf"), ("world.a.blur", "(nan, 1)"))]
    assert main(["run", "--config", str(file), "--upper", "1000000001", "--stage2.lr", "nan", "--mmt.epochs", "0"]) == 2
    said = capsys.readouterr().err
    for words in (*wanted, "7 settings", "--upper is 1000000001", "--stage2.lr is nan", "--mmt.epochs is 0"):
        assert words in said, (words, said)
    assert pipeline.main(["--config", str(file), "stage2.lr=NaN", "upper=1e999"]) == 2
    said = capsys.readouterr().err
    for words in (*wanted, "6 settings", "stage2.lr is nan", "upper is inf"):
        assert words in said, (words, said)
    with pytest.raises(DomainMixError) as caught:
        run(configure(TINY_SETTINGS, {"stage2": {"lr": math.nan}, "mmt.k": 1}, real="world", lower=math.inf, upper=3, seed=math.nan, data=str(tmp_path/"data")))
    for words in ("4 settings", "stage2.lr is nan", "mmt.k is 1", "lower is inf", "seed is nan"):
        assert words in str(caught.value), (words, caught.value)
    assert not (tmp_path/"data").exists()
    for path in ("epochs", "lr"):    # a saved config that was damaged is still refused where it is opened
        file.write_text(json.dumps({"stage2": {path: math.inf}}))
        with pytest.raises(DomainMixError, match=rf"mine.json: stage2.{path} is inf"):
            settings.load_config(file)


@pytest.mark.slow    # installs packages
def test_the_oldest_and_the_newest_onnxruntime_agree_with_pytorch():
    import sys

    import onnx_versions    # in tools/
    code = onnx_versions.main([], sys.executable)
    if code == 3:
        pytest.skip("pip installs no onnxruntime here")
    assert code == 0
