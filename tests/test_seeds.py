"""The table of scripts/seeds.py: each number is that of the scores it comes from."""

import json
import sys

from training import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import seeds


def test_the_table_has_the_lowest_the_median_and_each_seed(tmp_path):
    models = [seeds.Model(tmp_path, seed) for seed in (0, 1, 4)]
    for model in models:
        for frames, path in model.scores.items():
            assert not model.is_done
            path.parent.mkdir(parents=True)
            share = 0.9 + 0.02 * model.seed - 0.001 * frames
            path.write_text(json.dumps({"values": {"direction_accuracy": share, "shape_accuracy": share / 2}}))
        assert model.is_done
    seeds.write_table(tmp_path, models[::-1])
    lines = (tmp_path / "seeds.md").read_text().splitlines()
    assert "| frames | directions right (%): lowest | median | seed 4 | seed 1 | seed 0 |" in lines
    assert "| 4 | 89.6 | 91.6 | 97.6 | 91.6 | 89.6 |" in lines and "| 24 | 43.8 | 44.8 | 47.8 | 44.8 | 43.8 |" in lines
    assert json.loads((tmp_path / "seeds.json").read_text())["seeds"] == [4, 1, 0]
