"""What a shard, resuming and opening ask of an object store: not more than docs/scale.md says."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import open_clip
import pytest
from made_up import settings
from PIL import Image
from tiny_shards import tar
from torchvision.transforms.functional import to_tensor

from cluster.embedding_actor import EmbeddingActor, EmbeddingPlan
from patchrank.model.tower import Tower
from patchrank.pruning.embedder import Pruning
from patchrank.store import embeddings, partial, storage
from patchrank.store.folder import Folder

pytest_plugins = ["s3"]

PIECE = 4 << 20  # bytes that one request reads


@pytest.fixture
def asked(s3_bucket, s3_faults, monkeypatch):
    """How many requests of each kind there were since it was last called."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_faults.endpoint)

    def count():
        found = s3_faults.requests()
        s3_faults.set()
        return Counter("LIST" if "list-type" in str(request["path"]) else request["method"] for request in found)

    return count


def test_a_shard_of_two_pieces_and_a_half(s3_bucket, asked, monkeypatch, tmp_path):
    visual = open_clip.create_model("ViT-S-32-alt").visual.eval()
    monkeypatch.setattr(EmbeddingActor, "_load", lambda self, shared: (Tower(visual), to_tensor))
    Image.new("RGB", visual.image_size).save(tmp_path / "a.png")
    image = (tmp_path / "a.png").read_bytes()
    data = tar(("a.png", image + bytes(PIECE * 5 // 2)), ("b.png", image))
    uris = [f"{s3_bucket}/in/{number}.tar" for number in range(3)]
    for uri in uris:
        storage.write_atomic(uri, data)
    home = Folder(f"{s3_bucket}/out", "embedding").prepare(settings(), embeddings.COLUMNS)
    actor, shared = EmbeddingActor(), SimpleNamespace(places=SimpleNamespace(threads=1))
    plan = EmbeddingPlan(home, Pruning(), "float16", None, 1.0, 2, None, partial.SECONDS)
    actor.embed(shared, uris[0], plan)  # an actor's first shard sees to it that the folder is there
    asked()
    actor.embed(shared, uris[1], plan)
    found = asked()
    assert found["PUT"] == 1 and not found["LIST"] and not found["DELETE"]
    assert found.total() == 8 + 3

    home.finished(uris)
    partial.remove(home, uris)
    assert asked() == {"LIST": 3}
    corpus = embeddings.open(home.uri)
    asked()
    assert len(corpus) == 4
    assert asked() == {"HEAD": 3, "GET": 3}  # two a table, and the schema of the first
