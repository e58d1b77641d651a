"""What lies below runs/, from the terminal: the list, two runs side by side, curves for TensorBoard."""
import os
import shutil
import signal
import sys
import time

import pytest

from domainmix.files import load_json, load_jsonl, save_json
from domainmix.runs.pipeline import run
from domainmix.runs.history import list_runs
from domainmix.runs.settings import METHODS, TINY_SETTINGS, configure
from test_cli import FIRST, LONG, after, domainmix, finished, flags, forks, lines, sets, wrong  # noqa: F401 (fixtures)


def row(said, name):
    "The words of a run's line in the list."
    assert said.code == 0 and "Traceback" not in said.err, said
    [line] = [line for line in said.out.splitlines() if line.split()[0] == name]
    return line.split()


def notes(said):
    "What stands below the list: name -> note."
    return dict(line.strip().split(": ", 1) for line in said.out.splitlines() if line.startswith("  "))


def test_nothing_to_list(domainmix):
    said = domainmix("runs")
    assert said.code == 0 and "no runs yet" in said.out and "domainmix run" in said.out, said
    assert not (domainmix.cwd / "data").exists()


def test_the_list_has_the_scores_of_a_run(after):
    found = load_json(after.cwd / "data/runs/first/metrics.json")
    said = after("runs")
    words = row(said, "first")
    assert words[:5] == ["first", "finished", "domainmix-db", "0", "small"]
    assert words[5:8] == [f"{100 * found[k]:.1f}" for k in ("mAP", "rank1", "domain_probe")]
    assert len({len(line) for line in said.out.splitlines()}) == 1, "the columns are not aligned"


@pytest.mark.parametrize("file, text, state, words", [
    ("config.json", '{"seed": 0, "re', "damaged", "config.json is damaged"),
    ("config.json", "[1, 2]", "damaged", "config.json contains no settings"),
    ("config.json", '{"seed": "none"}', "damaged", "seed is 'none'"),
    ("config.json", '{"method": "only-a", "methods": 3}', "damaged", "methods is 3"),
    ("metrics.json", "\x00\xff", "damaged", "metrics.json is damaged"),
    ("metrics.json", "[]", "damaged", "contains a list"),
    ("metrics.json", '{"mAP": "high"}', "damaged", "cannot be read as a run"),
    ("log.jsonl", "{}\nnonsense\n", "finished", "1 of 2 lines"),
    ("log.jsonl", "\x00", "finished", "1 of 1 lines"),
])
def test_a_damaged_run_says_what_is_wrong_and_hides_no_other(after, file, text, state, words):
    shutil.copytree(after.cwd / "data/runs/first", after.cwd / "data/runs/broken")
    (after.cwd / "data/runs/broken" / file).write_text(text, encoding="latin-1")
    said = after("runs")
    assert row(said, "first")[1] == "finished" and row(said, "broken")[1] == state
    assert notes(said).keys() == {"broken"} and words in notes(said)["broken"], said


def test_folders_that_are_no_runs(after):
    runs = after.cwd / "data/runs"
    (runs / "empty").mkdir()
    (runs / "mine").mkdir()
    (runs / "mine/thesis.txt").write_text("do not lose me")
    (runs / "table1.json").write_text("[]")
    said = after("runs")
    assert row(said, "empty")[1] == "empty" and row(said, "mine")[1] == "damaged" and "no config.json" in notes(said)["mine"]
    assert "table1.json" not in said.out


def test_a_killed_run_is_stopped_where_it_was(domainmix, flags):
    home = domainmix.cwd / "data/runs/k"
    said = domainmix("run", *flags, "--run", "k", *LONG, strike=lambda: lines(home, "stage1") >= 2)
    assert said.code == -9, said
    done = len(load_jsonl(home / "stage1/log.jsonl"))
    words = row(domainmix("runs"), "k")
    assert words[1] == "stopped" and words[5:8] == ["stage1", f"{done}/4", "epochs"], words


def test_a_run_at_work_is_running(after):
    fcntl = pytest.importorskip("fcntl")
    home = after.cwd / "data/runs/first"
    handle = os.open(home / ".lock" if (home / ".lock").is_file() else home, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try: assert row(after("runs"), "first")[1] == "running"
    finally: os.close(handle)
    assert row(after("runs"), "first")[1] == "finished"


def test_a_run_for_labels_alone_is_finished_until_more_is_asked(after, flags):
    home = after.cwd / "data/runs/l"
    assert after("label", *flags[:-2], "--run", "l").code == 0
    refined = load_json(home / "labels.json")["refined"]
    words = row(after("runs"), "l")
    assert words[1:3] == ["finished", "labels"] and words[5:9] == [str(refined["clusters"]), "classes", "of", "60"], words
    said = after("compare", "first", "l")
    assert said.code == 0 and "labels of B" in said.out, said
    assert after("run", *flags, "--run", "l", *LONG, "--update", strike=lambda: lines(home, "stage2") >= 1).code == -9
    assert row(after("runs"), "l")[1:3] == ["stopped", "domainmix-db"] and not (home / "labels.json").exists()


# ---- side by side

def test_compare_says_what_differs(after, flags):
    assert after("run", *flags, *FIRST[2:], "--run", "second", "--stage3.lambda-m", "5", "--precision", "fp32").code == 0
    one, other = (load_json(after.cwd / f"data/runs/{name}/metrics.json") for name in ("first", "second"))
    said = after("compare", "first", "data/runs/second")
    assert said.code == 0 and "stage3.lambda_m: 1.0 in first, 5.0 in second" in said.out and "images: the same" in said.out, said
    assert "run:" not in said.out and "data:" not in said.out
    text = said.out.splitlines()
    at = next(i for i, line in enumerate(text) if line.startswith("stage3 "))
    a, b = (f"{100 * m['mAP']:.1f}" for m in (one, other))
    assert text[at].split() == ["stage3", "mAP", a, b, f"{100 * (other['mAP'] - one['mAP']):+.1f}"]


def test_compare_names_other_images(after, sets, flags):
    argv = ["--config", sets / "tiny.json", "--synthetic", f"randperson:{sets/'a'}", "--method", "only-a", "--target", f"market1501:{sets/'c'}"]
    assert after("run", *argv, "--run", "without").code == 0
    said = after("compare", "first", "without")
    assert said.code == 0 and "real.images: 60 in first, None in without" in said.out and "method: 'domainmix-db' in first, 'only-a' in without" in said.out, said
    assert "last: stage3, stage2" in said.out


def test_tables_compare_by_method_within_shared_seeds(after):
    config = load_json(after.cwd / "data/runs/first/config.json")
    for name, seeds, gain in (("one", [0, 1, 2], 0.), ("two", [1, 2, 3], .05)):
        home = after.cwd / "data/runs" / name
        save_json(home / "table.json", [{"method": m, "seed": s, "mAP": .2 + .1 * s + gain * s, "rank1": None, "domain_probe": None} for m in ("only-a", "directmix") for s in seeds])
        save_json(home / "config.json", {**config, "run": name, "methods": ["only-a", "directmix"], "seeds": seeds})
    said = after("compare", "one", "two")
    assert said.code == 0 and "seeds: [0, 1, 2] in one, [1, 2, 3] in two" in said.out, said
    for method in ("only-a", "directmix"):                     # one: 20, 30, 40; two: 35, 50, 65; of seeds 1 and 2 +5 and +10
        [line] = [line for line in said.out.splitlines() if line.startswith(METHODS[method].title + " ")]
        assert "30.0 ± 10.0" in line and "50.0 ± 15.0" in line and "+7.5 ± 3.5" in line and "2 of 2 seeds" in line, line
    wrong(after("compare", "one", "first"), "one is a table", "first is one run", "two tables")
    wrong(after("compare", "first", "two"), "two is a table")


def test_compare_wants_two_runs_that_exist(after):
    wrong(after("compare", "first", "secnd"), "secnd", "there are first")
    said = after("compare", "first")
    assert said.code == 2 and "required" in said.err + said.out and "Traceback" not in said.err
    for command in ("runs", "compare"): assert after(command, "--help").code == 0 and command in after("--help").out


# ---- TensorBoard

def curve(folder, name):
    "(epoch, value) of one curve, as TensorBoard reads it."
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return [(e.step, round(e.value, 4)) for e in reader.EventAccumulator(str(folder)).Reload().Scalars(name)]


def test_curves_of_every_run_for_tensorboard(after):
    home = after.cwd / "data/runs/first"
    for _ in range(2):                                         # the second time nothing is there twice
        said = after("runs", "--tensorboard")
        assert said.code == 0 and "tensorboard --logdir data/runs" in said.out, said
        for stage in ("stage0", "stage1", "stage2", "stage3"):
            told = [r for r in load_jsonl(home / "log.jsonl") if r["run"] == stage and "loss" in r]
            assert curve(home / "tensorboard" / stage, "loss") == [(r["epoch"], round(r["loss"], 4)) for r in told], stage
    assert row(after("runs"), "first")[1] == "finished"


def test_a_run_with_tensorboard_that_is_interrupted_and_goes_on(domainmix, flags):
    argv, home = ("run", *flags, "--run", "k", *LONG, "--tensorboard"), domainmix.cwd / "data/runs/k"
    def drawn():     # of two points; a line is in the log a moment before its point is in the curve
        folder = home / "tensorboard/stage0"
        try: return folder.is_dir() and len(curve(folder, "loss")) >= 2
        except KeyError: return False     # a file without a curve yet
    said = domainmix(*argv, strike=drawn, how=signal.SIGINT)
    assert said.code == 130, said
    steps = [step for step, _ in curve(home / "tensorboard/stage0", "loss")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 2
    assert domainmix(*argv).code == 0
    for stage in ("stage0", "stage1", "stage2"): assert [step for step, _ in curve(home / "tensorboard" / stage, "loss")] == [1, 2, 3, 4], stage


def test_without_tensorboard_a_run_does_not_begin(monkeypatch, tmp_path, capsys):
    from domainmix.cli import main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["run", "--real", "world", "--tensorboard"]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err and not (tmp_path / "data").exists()


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="a process cannot move abroad here")
def test_a_run_goes_on_where_the_clock_was_set_back_in_another_time_zone(tmp_path, monkeypatch):
    config = {name: configure(TINY_SETTINGS, dict(target="world", method="only-a", run="tiny", data=str(tmp_path/name))) for name in ("still", "moved")}
    home = tmp_path/"moved/runs/tiny"
    with monkeypatch.context() as m:
        m.setattr("domainmix.runs.pipeline.stage2", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt): run(config["moved"])
    before = (home/"stage0/model.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as m:
        m.setenv("TZ", "Pacific/Auckland")
        m.setattr(time, "time", lambda: 1e9)                    # 2001
        time.tzset()
        moved = run(config["moved"])
        listed = list_runs(tmp_path/"moved")
    time.tzset()
    assert moved == run(config["still"]) and before == (home/"stage0/model.safetensors").stat().st_mtime_ns
    assert [(r.name, r.state) for r in listed] == [("tiny", "finished")]
