"""The comparison against a plain loop over images, keep rates and methods."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from test_selectors import make_batch

from patchrank.errors import UserError
from patchrank.model.tower import Tower
from patchrank.pruning.chance import Chance
from patchrank.pruning.comparison import Comparison, render
from patchrank.pruning.golden import OfBatches
from patchrank.pruning.methods import Method
from patchrank.pruning.prompts import TokensConfig, VisualTokens
from patchrank.tokens import matching_rate

KEEP_RATES = (0.8, 0.5, 0.25)


@pytest.fixture
def setting(small_clip):
    """A model, its tower, class embeddings, and two batches, one of them with an image without a label."""
    model = small_clip(torch.float64)
    classes = F.normalize(torch.randn(5, 24, dtype=torch.float64), dim=1)
    batches = [make_batch("abc"), make_batch("de")]
    for batch in batches:
        batch.pixels.mul_(0.5)
        embeddings = model.encode_image(batch.pixels.double())
        batch.labels[:] = (F.normalize(embeddings, dim=1) @ classes.T).argmax(dim=1)
    batches[0].labels[1] = -1
    batches[1].labels[0] = (batches[1].labels[0] + 1) % 5
    return model, Tower(model.visual, dtype=torch.float64), classes, batches


def test_rows_equal_the_loop_over_images(setting):
    model, tower, classes, batches = setting
    comparison = Comparison(tower, {"golden": Method(OfBatches()), "random": Method(Chance())}, KEEP_RATES, classes)
    for batch in batches:
        comparison.add(batch)
    rows = comparison.rows()
    assert [(row.method, row.keep) for row in rows] == [
        ("unpruned", 1.0),
        *(("golden", keep) for keep in KEEP_RATES),
        *(("random", keep) for keep in KEEP_RATES),
    ]
    assert rows[0].top1 == 3 / 4 and rows[0].cosine == pytest.approx(1) and rows[0].matching is None
    for row in rows[1:]:
        cosines, hits, labelled, matching = [], 0, 0, []
        for batch in batches:
            selector = OfBatches() if row.method == "golden" else Chance()
            usefulness = selector(torch.zeros(len(batch.keys), 21, 8), 20, None, batch)
            count = round(20 * row.keep)
            matching += matching_rate(usefulness, batch.ranking, count).tolist()
            for image, values in zip(range(len(batch.keys)), usefulness.tolist(), strict=True):
                kept = sorted(range(20), key=lambda token: -values[token])[:count]
                start = reference.prefix(model.visual, batch.pixels[image].double(), tower.cut)
                full = reference.embed(model.visual, start, range(20))
                embedding = reference.embed(model.visual, start, kept)
                cosines.append(reference.cosine(full, embedding))
                if batch.labels[image] >= 0:
                    labelled += 1
                    hits += int((embedding @ classes.T).argmax() == batch.labels[image])
        assert row.images == 5
        assert row.cosine == pytest.approx(sum(cosines) / 5)
        assert row.top1 == hits / labelled
        assert row.matching == pytest.approx(sum(matching) / 5)
    assert all(row.matching == 1 for row in rows if row.method == "golden")


def test_sums_of_parts_add_up(setting):
    _, tower, classes, batches = setting
    parts = [Comparison(tower, {"random": Method(Chance())}, KEEP_RATES, classes, m=7) for _ in range(3)]
    for part, batch in zip(parts[:2], batches, strict=True):
        part.add(batch)
        parts[2].add(batch)
    parts[0].sums += parts[1].sums
    torch.testing.assert_close(parts[0].sums, parts[2].sums)
    assert len({row.matching for row in parts[2].rows()[1:]}) == 1  # at m, whatever the keep rate


def test_learnable_tokens_and_class_embeddings_of_a_method(setting):
    _, tower, classes, batches = setting
    shapes = []

    class Watched(Chance):
        def forward(self, tokens, *others):
            shapes.append(tokens.shape)
            return super().forward(tokens, *others)

    tokens = VisualTokens(TokensConfig(32, count=3))
    with torch.no_grad():
        tokens.visual.mul_(50)
    methods = {
        "plain": Method(OfBatches()),
        "tokens": Method(OfBatches(), tokens),
        "turned": Method(OfBatches(), None, classes.roll(1, dims=0)),
        "unpruned with tokens": Method(None, tokens),
        "random with tokens": Method(Watched(), tokens),
    }
    comparison = Comparison(tower, methods, [0.5], classes)
    comparison.add(batches[0])
    unpruned, plain, with_tokens, turned, unpruned_with_tokens, _ = comparison.rows()
    assert shapes == [(3, 21, 32)]  # learnable tokens are not the methods' to rank
    kept = batches[0].ranking[:, :7]  # learnable tokens take three places
    embeddings = tokens.embeddings(tower, batches[0].pixels, lambda _: kept)
    expected = F.cosine_similarity(embeddings, tower(batches[0].pixels)).mean().item()
    assert with_tokens.cosine == pytest.approx(expected) and abs(expected - plain.cosine) > 1e-4
    assert turned.cosine == plain.cosine and turned.top1 != plain.top1
    assert unpruned_with_tokens.keep == 1 and unpruned_with_tokens.cosine < unpruned.cosine


def test_without_classes_or_rankings_their_figures_are_missing(setting):
    _, tower, _, _ = setting
    comparison = Comparison(tower, {"random": Method(Chance())}, [0.5])
    comparison.add(make_batch("ab", ranked=False))
    row = comparison.rows()[1]
    assert row.top1 is None and row.matching is None and -1 <= row.cosine <= 1
    assert "top-1" not in render(comparison.rows()) and "matching" not in render(comparison.rows())


@pytest.mark.parametrize("keep", [0, 0.01, 1.5])
def test_a_keep_rate_that_leaves_nothing_is_refused(setting, keep):
    with pytest.raises(UserError, match=f"--keep-rates {keep}: must be at most 1 and leave at least one of 20 tokens"):
        Comparison(setting[1], {"random": Method(Chance())}, [0.5, keep])


def test_the_table_has_a_line_a_method_and_a_column_a_keep_rate(setting):
    _, tower, classes, batches = setting
    comparison = Comparison(tower, {"golden": Method(OfBatches()), "random": Method(Chance())}, KEEP_RATES, classes)
    comparison.add(batches[0])
    accuracy, cosine, matching = (block.splitlines() for block in render(comparison.rows()).split("\n\n"))
    assert accuracy[0].split() == ["top-1,", "%", "keep", "0.8", "keep", "0.5", "keep", "0.25"]
    assert accuracy[1].split() == ["unpruned", "100.0", "100.0", "100.0"]
    assert [line.split()[0] for line in cosine] == ["cosine", "unpruned", "golden", "random"]
    assert [line.split()[0] for line in matching] == ["matching,", "golden", "random"]
    assert matching[1].split()[1:] == ["100.0"] * 3
    assert len({len(line) for line in accuracy + cosine + matching}) == 1
