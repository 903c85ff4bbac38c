"""benchmarks/embed.py in small: it measures what it says, and its plain loop gives the embeddings that ours gives."""

from __future__ import annotations

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import embed as benchmark
from patchrank.data.shard_job import Reading
from patchrank.model.tower import Tower
from patchrank.pruning.embedder import Embedder, Pruning, ShardEmbedder


def test_figures(monkeypatch, capsys):
    flags = "--model ViT-S-32-alt --images 6 --rows 14 --batch 3 --rounds 1 --seconds 0 --threads 1 --dtype float32"
    monkeypatch.setattr("sys.argv", ["embed.py", *flags.split()])
    status = benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:7]] == ["decode", "stub", "unpruned", "pruned", "plain"]
    assert all("embed " in line and "write " in line for line in lines[3:6])
    size = float(lines[1].split(" kB")[0].split()[-1])
    assert 100 < size < 120
    assert status == int(any("BEYOND" in line for line in lines)) and len(lines) == 10


def test_the_plain_loop_embeds_the_same(tmp_path):
    torch.manual_seed(0)
    visual = open_clip.create_model("ViT-S-32-alt").visual.eval().requires_grad_(False)
    config = open_clip.transform.PreprocessCfg(**visual.preprocess_cfg)
    preprocess = open_clip.transform.image_transform_v2(config, is_train=False)
    shard, out = str(tmp_path / "a.tar"), str(tmp_path / "plain.parquet")
    benchmark.write_photos(shard, 5)
    benchmark.plain(shard, visual, preprocess, 2, 0, out)
    ours = ShardEmbedder(Embedder(Tower(visual), Pruning()), Reading(preprocess, 2)).embed(shard).table
    theirs = pq.read_table(out)
    assert ours["key"].to_pylist() == theirs["key"].to_pylist()
    one, other = (np.array(table["embedding"].to_pylist(), np.float32) for table in (ours, theirs))
    assert one == pytest.approx(other, abs=2e-3)
