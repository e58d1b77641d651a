"""Crops of frames and videos, boxes of files that are not what they should be, and stage 1 with tracks."""
import csv
import dataclasses
import json
import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from domainmix import boxes, cli, commands, crop_commands, crops
from domainmix.backbone import build_backbone
from domainmix.batches import TrainSet
from domainmix.bodies import BackboneConfig
from domainmix.boxes import boxes_from_rows, read_boxes, read_json_boxes
from domainmix.core import DomainMixError, expect_error, fingerprint, to_dict, with_overrides
from domainmix.crop_names import crop_name
from domainmix.crops import CropOptions, crop
from domainmix.datasets import read_dataset
from domainmix.pseudolabel import ClusterConfig
from domainmix.records import Records
from domainmix.runs.inputs import decode_split, read_inputs
from domainmix.runs.settings import TINY_SETTINGS, configure
from domainmix.spcl import SpCLConfig, adapt
from domainmix.tracks import group_tracks
from domainmix.world import toy_domain


@pytest.fixture(scope="module")
def frames():
    "Twelve frames (12, 40, 60, 3) of noise, in which every box is another picture."
    return np.random.default_rng(0).integers(0, 256, (12, 40, 60, 3), dtype=np.uint8)


def folder_of(folder, frames, first=1, name="{:06d}.png"):
    "The frames as a folder of images."
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames, first):
        Image.fromarray(frame).save(folder/name.format(i))
    return folder


def mot(file, rows):
    "A MOTChallenge file; frames and pixels of `rows` (frame, track, left, top, width, height) count from 1."
    file.write_text("\n".join(",".join(map(str, r)) for r in rows))
    return file


def pixels(folder, name):
    return np.asarray(Image.open(folder/name))


ROWS = [(f, t, 3*t + f, 2*t + 1, 10 + t, 20) for f in range(1, 13) for t in (1, 2, 3)]


def test_crops_are_slices_of_the_frames(tmp_path, frames):
    "By numpy, with every way to give the boxes."
    folder = folder_of(tmp_path/"frames", frames)
    items = [dict(frame=f, track=t, bbox=[left - 1, top - 1, w, h]) for f, t, left, top, w, h in ROWS]
    (tmp_path/"list.json").write_text(json.dumps(items))
    named = [dict(image_id=f"{i['frame']:06d}.png", track_id=i["track"], bbox=i["bbox"]) for i in items]
    (tmp_path/"named.json").write_text(json.dumps(named))
    for k, file in enumerate((mot(tmp_path/"gt.txt", ROWS), tmp_path/"list.json", tmp_path/"named.json")):
        out = tmp_path/f"out{k}"
        report = crop(folder, file, out, camera=4, image_format="png")
        assert len(report) == len(ROWS) and not report.left_out and len(list(out.iterdir())) == len(ROWS) + 1
        for f, t, left, top, w, h in ROWS:
            assert np.array_equal(pixels(out, crop_name(4, t, f, suffix=".png")), frames[f - 1, top-1:top-1+h, left-1:left-1+w])
        with open(out/"boxes.csv", newline="") as table:
            rows = list(csv.DictReader(table))
        assert [(int(r["frame"]), int(r["track"]), int(r["left"]), int(r["top"])) for r in rows] == [(r[0], r[1], r[2] - 1, r[3] - 1) for r in ROWS]
        found = read_dataset(f"crops:{out}").train
        assert sorted(zip(found.frame.tolist(), found.track.tolist())) == sorted(r[:2] for r in ROWS)


def test_frames_of_sixteen_bits_are_scaled_alike(tmp_path):
    "A dark frame stays dark beside a bright one."
    for number, value in ((1, 65535), (2, 2**12)):
        (tmp_path/"frames").mkdir(exist_ok=True)
        Image.fromarray(np.full((40, 60), value, np.uint16)).save(tmp_path/f"frames/{number:06d}.png")
    crop(tmp_path/"frames", mot(tmp_path/"gt.txt", [(1, 1, 5, 5, 10, 20), (2, 1, 5, 5, 10, 20)]), tmp_path/"out", image_format="png")
    assert [int(pixels(tmp_path/"out", crop_name(0, 1, f, suffix=".png")).max()) for f in (1, 2)] == [255, 16]


def test_numbers_that_do_not_fit(tmp_path, frames):
    folder, gt = folder_of(tmp_path/"from0", frames, 0), mot(tmp_path/"gt.txt", ROWS)
    expect_error(lambda: crop(folder, gt, tmp_path/"out"), "0 to 11", "1 to 12", "--first-frame")
    crop(folder, gt, tmp_path/"out", first_frame=1, image_format="png")
    assert np.array_equal(pixels(tmp_path/"out", crop_name(0, 1, 1, suffix=".png")), frames[0, 2:22, 3:14])
    far = folder_of(tmp_path/"far", frames[:2], 100)
    expect_error(lambda: crop(far, gt, tmp_path/"new"), "100 to 101", "1 to 12")
    unnumbered = folder_of(tmp_path/"letters", frames[:1], name="a.png")
    expect_error(lambda: crop(unnumbered, gt, tmp_path/"new"), "a.png", "no number", "--first-frame")
    tenth = folder_of(tmp_path/"tenth", frames[[4, 9]], 5, "img_{:03d}.png")
    (tenth/"img_006.png").rename(tenth/"img_010.png")
    report = crop(tenth, gt, tmp_path/"some")
    assert {r[3] for r in report.rows} == {5, 10} and report.left_out == {"of frames that are not there": 30}
    assert not (tmp_path/"new").exists() and not list(tmp_path.glob(".*"))


def test_what_is_left_out_is_counted(tmp_path, frames):
    folder = folder_of(tmp_path/"frames", frames)
    rows = [(1, 1, 1, 1, 9, 9), (1, 1, 2, 2, 9, 9), (1, 2, 1, 1, 0, 9), (1, 3, 900, 1, 9, 9), (1, 4, 58, 1, 9, 9),
            (1, 5, "nan", 1, 9, 9), (99, 6, 1, 1, 9, 9), (1, -1, 9, 9, 9, 9), (1, -1, 9, 9, 9, 9), (1, -1, 9, 10, 9, 9)]
    report = crop(folder, mot(tmp_path/"gt.txt", rows), tmp_path/"out", options=CropOptions(min_width=4))
    assert report.left_out == {"not a number": 1, "no size": 1, "there twice": 2, "outside of the frame": 1, "too small": 1,
                               "of frames that are not there": 1}
    assert len(report) + sum(report.left_out.values()) == len(rows)
    assert sorted(r[0] for r in report.rows) == ["c000_f000001_01.jpg", "c000_f000001_02.jpg", "c000_t000001_f000001.jpg"]
    assert "1 boxes of frames that are not there" in str(report)
    with pytest.warns(UserWarning, match="1 pairs of tracks cover each other in some frame, the first are 1 and 2"):
        crop(folder, mot(tmp_path/"two.txt", [(1, 1, 1, 1, 30, 30), (1, 2, 1, 2, 30, 30)]), tmp_path/"two")
    many = crop(folder, mot(tmp_path/"all.txt", ROWS), tmp_path/"few", options=CropOptions(every=3, max_per_track=2))
    assert len(many) == 6 and {r[3] % 3 for r in many.rows} == {1}


def write_video(file, frames, codec="ffv1", form="bgr0"):
    "A lossless video."
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as out:
        stream = out.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], form
        for image in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    return file


def test_a_video_gives_the_same_crops_as_its_frames(tmp_path, frames):
    video, gt = write_video(tmp_path/"a.mkv", frames), mot(tmp_path/"gt.txt", ROWS)
    report = crop(video, gt, tmp_path/"video", image_format="png")
    crop(folder_of(tmp_path/"frames", frames), gt, tmp_path/"folder", image_format="png")
    names = sorted(p.name for p in (tmp_path/"folder").iterdir())
    assert names == sorted(p.name for p in (tmp_path/"video").iterdir()) and len(names) == len(ROWS) + 1
    assert all((tmp_path/"folder"/n).read_bytes() == (tmp_path/"video"/n).read_bytes() for n in names)
    assert "counts as frame 1" in str(report)
    (tmp_path/"zero.json").write_text(json.dumps([dict(frame=f - 1, track=t, bbox=[x - 1, y - 1, w, h]) for f, t, x, y, w, h in ROWS]))
    assert "counts as frame 0" in str(crop(video, tmp_path/"zero.json", tmp_path/"zero", image_format="png"))
    assert np.array_equal(pixels(tmp_path/"zero", crop_name(0, 1, 0, suffix=".png")), frames[0, 2:22, 3:14])


def test_a_video_that_ends_early_or_is_none(tmp_path, frames):
    video, late = write_video(tmp_path/"a.mkv", frames), [(f + 6, *r) for f, *r in ROWS]
    report = crop(video, mot(tmp_path/"late.txt", late), tmp_path/"out")
    assert len(report) == 18 and report.left_out == {"of frames that are not there": 18}
    assert "the video ends early" in str(report) and "the first one missing is 13" in str(report)
    expect_error(lambda: crop(video, mot(tmp_path/"b.txt", [(50, 1, 1, 1, 9, 9)]), tmp_path/"new"), "makes a crop", "ends early")
    (tmp_path/"half.mkv").write_bytes(video.read_bytes()[:video.stat().st_size//2])     # a download that stopped
    report = crop(tmp_path/"half.mkv", mot(tmp_path/"gt.txt", ROWS), tmp_path/"half", image_format="png")
    assert 0 < len(report) < len(ROWS) and report.left_out["of frames that are not there"] == len(ROWS) - len(report)
    last = max(r[3] for r in report.rows)
    assert np.array_equal(pixels(tmp_path/"half", crop_name(0, 1, last - 1, suffix=".png")), frames[last - 2, 2:22, 2 + last - 1:13 + last - 1])
    (tmp_path/"text.mp4").write_text("no video" * 50)
    expect_error(lambda: crop(tmp_path/"text.mp4", tmp_path/"gt.txt", tmp_path/"new"), "cannot be read as a video")
    assert not (tmp_path/"new").exists() and not list(tmp_path.glob(".*"))


def test_without_av(tmp_path, monkeypatch):
    (tmp_path/"a.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    expect_error(lambda: crop(tmp_path/"a.mp4", mot(tmp_path/"gt.txt", ROWS), tmp_path/"new"), "av is not installed", "pip install av")


def test_the_command(tmp_path, frames, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path/"frames", frames), mot(tmp_path/"gt.txt", ROWS)
    good = ["crop", "--frames", "frames", "--boxes", "gt.txt", "--out", "out"]
    assert cli.main([*good, "--camera", "7", "--every", "4", "--classes", "1", "car"]) != 0      # no classes in this file
    assert cli.main([*good, "--camera", "7", "--every", "4"]) == 0
    assert "9 crops of 3 tracks, in 3 frames" in capsys.readouterr().out
    for flags, words in ((good, "not empty"), ([*good[:6], "new", "--frames", "none"], "none is not there"),
                         ([*good[:6], "new", "--boxes", "none.txt"], "none.txt is not there"),
                         ([*good[:6], "new", "--every", "0", "--max-per-track", "0"], "--max-per-track is 0"),
                         ([*good[:6], "new", "--min-height", "99"], "36 are too small")):
        assert cli.main(flags) == 2 and words in capsys.readouterr().err
    assert not (tmp_path/"new").exists()


def test_every_flag_of_a_message_exists():
    have = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(crop_commands.CropCommand)}
    said = set()
    for module in (boxes, crops, crop_commands):
        said |= set(re.findall(r"--[a-z][\w-]+", Path(module.__file__).read_text().partition("__all__")[2]))
    assert len(said) > 4 and said <= have, said - have
    assert commands.COMMANDS["crop"][0] is crop_commands.CropCommand


def test_mot_files_as_another_reader_sees_them(tmp_path):
    "By numpy.loadtxt."
    g = np.random.default_rng(0)
    table = np.column_stack([g.integers(1, 50, (40, 2)), g.uniform(0, 90, (40, 4)).round(2), g.random(40).round(3), g.uniform(-1, 1, (40, 3))])
    np.savetxt(tmp_path/"t.txt", table, delimiter=",", fmt=["%d"]*2 + ["%g"]*8)
    found, other = read_boxes(tmp_path/"t.txt"), np.loadtxt(tmp_path/"t.txt", delimiter=",")
    assert np.array_equal(found.frame, other[:, 0]) and np.array_equal(found.track, other[:, 1])
    assert np.allclose(found.box, other[:, 2:6] - [1, 1, 0, 0]) and np.allclose(found.score, other[:, 6])
    assert set(found.kind) == {""}


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
                          st.sampled_from(["frame", "bbox", "box", "xyxy", "images", "annotations", "image_id", "id", "3", "boxes", "track", "x1"]), inner, max_size=4), max_leaves=12)


@settings(max_examples=30, deadline=None)
@given(values)
def test_any_json_is_boxes_or_a_clear_error(data):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/"a.json"
        file.write_text(json.dumps(data))
        try:
            found = read_json_boxes(file)
            crops.select_boxes(found, CropOptions(), (40, 60))
        except DomainMixError:
            pass


# Tracks.

def test_data_without_tracks_keep_their_fingerprint(tmp_path):
    for i in range(4):
        Image.new("RGB", (8, 16), (i*40, 0, 0)).save(tmp_path/f"{i}_c{i % 2}.png")
    config = configure(height=16, width=8, data=str(tmp_path/"data"))
    rows = read_dataset(f"folder:{tmp_path}", r"(?P<pid>\d)_c(?P<camera>\d)").train
    split = decode_split(rows, config)
    digest = fingerprint(split.images.numpy() if isinstance(split.images, torch.Tensor) else np.asarray(split.images))
    assert split.key == fingerprint(rows.path, digest, rows.pid, rows.camera)        # as it was before there were tracks
    tracked = decode_split(Records(rows.path, rows.pid, rows.camera, rows.root, track=[0, 0, 1, 1]), config)
    assert tracked.key != split.key and tracked.records.track.tolist() == [0, 0, 1, 1]
    for kind in (SpCLConfig, *(type(getattr(config, n)) for n in ("mmt", "plain", "sda", "world"))):
        assert "tracks" not in to_dict(kind()) and to_dict(with_overrides(kind(), {"tracks": "off" if kind is not type(config.world) else True}))["tracks"]


def test_crops_of_two_sites_as_b(tmp_path, frames):
    "Through read_inputs: tracks of both sets stay apart."
    folder, gt = folder_of(tmp_path/"frames", frames), mot(tmp_path/"gt.txt", ROWS)
    for site in "xy":
        for camera in (0, 1):
            crop(folder, gt, tmp_path/site/f"cam{camera}", camera=camera, options=CropOptions(every=6))
    config = configure(TINY_SETTINGS, real=(f"crops:{tmp_path}/x", f"crops:{tmp_path}/y"), data=str(tmp_path/"data"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real = read_inputs(config, ("real",)).real
    assert len(real.records) == 2*2*6 and real.records.n_tracks == 2*2*3 and real.records.n_cameras == 4
    table = group_tracks(real.records.track, real.records.camera, real.records.frame)
    assert set(table.size) == {2} and table.has_times


@pytest.fixture(scope="module")
def toy():
    images, pid, camera = toy_domain(10, 6, 2, (32, 16), seed=2)
    return images, pid, camera, build_backbone(BackboneConfig(width=8, stripes=2, view="whole", parts=False))


def test_stage_1_gives_a_track_one_label(toy):
    images, pid, camera, net = toy
    track = (pid*2 + camera).numpy()
    config = SpCLConfig(epochs=1, iterations=1, p=4, k=2, samples_per_bn=None, cluster=ClusterConfig(k1=6, k2=2, reliability=False))
    synthetic = TrainSet(images, pid, camera, torch.zeros_like(pid))
    def label(known, **changes):
        return adapt(net, synthetic, images, camera, dataclasses.replace(config, **changes), device="cpu", tracks=known)[1].labels
    plain, tracked = label(None), label(group_tracks(track))
    assert any(len(set(plain[track == t])) > 1 for t in set(track)) and all(len(set(tracked[track == t])) == 1 for t in set(track))
    assert np.array_equal(label(group_tracks(track), tracks="off"), plain)
    apart = group_tracks(track, np.zeros(len(track), int), np.zeros(len(track), int))     # all at the same time: nothing is linked
    found = label(apart)
    assert len(set(found)) == len(set(track)) and found.min() == 0
