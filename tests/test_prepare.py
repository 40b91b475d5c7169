"""datasets/prepare_*.py: strips of frames and layers of sheets become videos, pixel for pixel, in
the right split.
"""

import random
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_sprites
import prepare_weizmann
from strips import MOVES, draw, write_strips
from tiny_videos import decode, write_video
from training import content, refused, run_main, snapshot
from video.index import scan_videos, split_videos


def check_second_run(lost, script, *flags):
    """Without one video, and with half of it from a process that was killed, a script makes only
    this video again.
    """
    folder = lost.parents[1]
    before = snapshot(folder)
    files = content(folder)
    lost.unlink()
    lost.with_name(f"{lost.name}.tmp").write_bytes(b"half")
    run_main(script, *flags)
    after = snapshot(folder)
    assert content(folder) == files
    assert [path for path in before if path.suffix != ".txt" and after[path] != before[path]] == [
        lost
    ]


# Weizmann -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strips(tmp_path_factory):
    return write_strips(tmp_path_factory.mktemp("strips"))


def test_videos_keep_every_frame_are_split_by_people_and_only_missing_ones_are_made_again(
    strips, tmp_path
):
    out = tmp_path / "out"
    for held_out in ((3,), (1, 2)):
        run_main(prepare_weizmann, "--source", strips, "--out", out, "--hold-out", *held_out)
        scan = scan_videos(str(out))
        train, val = split_videos(str(out), scan.videos, 0.5)
        people = [{video.path[-5] for video in videos} for videos in (train, val)]
        assert people == [set("123") - set(map(str, held_out)), set(map(str, held_out))]
    assert scan.classes == ["Bend", "JumpingJack", "OneHandWave", "TwoHandWave"]
    assert len(scan.videos) == 12 and set(MOVES) == set(prepare_weizmann.CLASSES)
    for number, name in prepare_weizmann.CLASSES.items():
        for person in range(3):
            frames, fps = decode(out / f"{name}/person{person + 1}.mkv")
            assert fps == 25 and np.array_equal(frames, draw(person, number, 20))
    flags = ["--source", strips, "--out", out, "--hold-out", 1, 2]
    check_second_run(out / "JumpingJack/person2.mkv", prepare_weizmann, *flags)


def test_what_is_wrong_is_one_line_and_nothing_is_written(strips, tmp_path, capsys):
    own = shutil.copytree(strips, tmp_path / "strips")
    actions = own / "data/actions"
    out = tmp_path / "out"

    def refuse(line, held_out=3):
        before = snapshot(out)
        flags = ["--source", own, "--out", out, "--hold-out", held_out]
        assert line in refused(capsys, prepare_weizmann, *flags)
        assert snapshot(out) == before

    refuse("--hold-out [4]: expected some of people 1 to 3, but not all", held_out=4)
    (actions / "4").rename(tmp_path / "4")
    refuse("person 1 has no clip of Bend; expected a complete clone of MoCoGAN's repository")
    (tmp_path / "4").rename(actions / "4")
    write_video(out / "Dive/me.avi")
    refuse("holds Dive/me.avi, which does not belong to this data set; name another folder")
    shutil.rmtree(out)
    Image.new("RGB", (64 * 20 + 1, 64)).save(actions / "3/00000012.jpg", format="PNG")
    refuse("00000012.jpg: not a strip of 64 x 64 px frames; clone the repository again")


# Sprites ------------------------------------------------------------------------------------------

LAYERS = "body", "bottomwear", "topwear", "hair", "shoes"


def tile(layer, value, number):
    """A made tile, RGBA (64, 64, 4): a square whose place shows layer and tile, and whose color
    shows the value.
    """
    pixels = np.zeros((64, 64, 4), np.uint8)
    top = 4 + 6 * LAYERS.index(layer)
    left = number % 40
    pixels[top : top + 14, left : left + 20] = 40 * value, 250 - 30 * value, number % 256, 255
    return pixels


@pytest.fixture(scope="module")
def sheets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sheets")
    for layer in LAYERS:
        (folder / layer).mkdir()
        for value in range(6):
            rows = [
                np.hstack([tile(layer, value, 13 * row + column) for column in range(13)])
                for row in range(21)
            ]
            Image.fromarray(np.vstack(rows)).save(folder / layer / f"{value}.png", compress_level=1)
    return folder


def naive(tiles, character):
    """The frames of a character, by painting its squares over each other."""
    frames = np.zeros((len(tiles), 64, 64, 3), np.uint8)
    for frame, number in zip(frames, tiles, strict=True):
        for layer, value in zip(LAYERS, (*character, 1), strict=True):
            pixels = tile(layer, value, number)
            is_opaque = pixels[..., 3] == 255
            frame[is_opaque] = pixels[is_opaque, :3]
    return frames


@pytest.mark.parametrize(
    "name, tiles",
    [
        ("WalkLeft", [125, *range(118, 125)]),
        ("SpellcastFront", [*range(26, 32), 30, 32]),
        ("SlashRight", [*range(195, 201), 199, 195]),
    ],
)
def test_a_frame_shows_its_tile_of_each_layer_and_higher_layers_hide_lower_ones(
    sheets, name, tiles
):
    read = prepare_sprites.read_sheets(sheets)
    draw = random.Random(0)
    for _ in range(5):
        character = draw.choices(range(6), k=4)
        frames = prepare_sprites.compose(read, name, character)
        assert np.array_equal(frames, naive(tiles, character))


def test_transparent_pixels_are_blended_over_black():
    sheets = {
        (layer, value): np.zeros((273, 64, 64, 4), np.uint8) for layer in LAYERS for value in (0, 1)
    }
    sheets["body", 0][:] = 200, 100, 0, 255
    sheets["hair", 0][:] = 0, 100, 250, 51  # a fifth
    frames = prepare_sprites.compose(sheets, "WalkFront", (0, 0, 0, 0))
    assert np.array_equal(np.unique(frames.reshape(-1, 3), axis=0), [[160, 100, 50]])


def test_the_split_is_the_published_one_and_all_clips_of_a_character_are_in_one_part(
    sheets, tmp_path, monkeypatch
):
    # all 11,664 videos take half a minute; here all but one of a class are there already
    monkeypatch.setattr(prepare_sprites, "FIRST_TILE", {"SpellcastRight": 39})
    folder = tmp_path / "SpellcastRight"
    folder.mkdir()
    for character in product("012345", repeat=4):
        (folder / f"character{''.join(character)}.mkv").touch()
    lost = folder / "character5012.mkv"
    lost.unlink()
    flags = ["--source", sheets, "--out", tmp_path]
    run_main(prepare_sprites, *flags)
    lists = tmp_path / "ucfTrainTestlist"
    train = (lists / "trainlist01.txt").read_text().split()[::2]
    val = (lists / "testlist01.txt").read_text().split()
    assert len(train) == 1000
    assert len({*train, *val}) == 1296
    order = np.random.RandomState(423).permutation(1296).tolist()
    for name in val:
        body, bottomwear, topwear, hair = map(int, Path(name).stem.removeprefix("character"))
        assert 216 * body + 36 * bottomwear + 6 * topwear + hair in order[1000:]
    frames, fps = decode(lost)
    expected = naive([39, 40, 41, 42, 43, 44, 43, 45], (5, 0, 1, 2))
    assert fps == 8 and np.array_equal(frames, expected)
    check_second_run(lost, prepare_sprites, *flags)


def test_a_missing_or_wrong_sheet_is_one_line_and_nothing_is_written(sheets, tmp_path, capsys):
    own = shutil.copytree(sheets, tmp_path / "sheets")
    out = tmp_path / "out"

    def refuse(problem):
        line = refused(capsys, prepare_sprites, "--source", own, "--out", out)
        expected = "expected a sheet of 832 x 1344 px; clone the Sprites repository again"
        assert f"--source {own}: {problem}; {expected}" in line
        assert not out.exists()

    (own / "shoes/1.png").write_text("version https://git-lfs.github.com/spec/v1")
    refuse("shoes/1.png: not a sheet")
    Image.new("RGBA", (832, 1280)).save(own / "hair/0.png")  # which is read before the shoes
    refuse("hair/0.png: not a sheet")
    (own / "topwear/3.png").unlink()
    refuse("topwear/3.png: not found")
