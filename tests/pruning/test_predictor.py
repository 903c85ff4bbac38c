"""The predictor: shape, cost, targets, losses, and what is kept of it on disk."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from patchrank import assets
from patchrank.errors import UserError
from patchrank.model import loading
from patchrank.model.tower import Tower
from patchrank.pruning import predictor as predictors
from patchrank.pruning.predictor import LOSSES, Predictor, PredictorConfig, targets
from patchrank.tokens import count_kept, kendall_tau, matching_rate, select

VIT_B_16 = 196 * 768 * 768 + 12 * (12 * 197 * 768**2 + 2 * 197**2 * 768) + 768 * 512  # multiply-adds of an image


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("grid", [(4, 5), (1, 1), (14, 14)])
def test_one_number_for_every_patch_of_any_grid(grid, class_token):
    torch.manual_seed(0)
    predictor = Predictor(PredictorConfig(grid, 48, class_token=class_token))
    tokens = torch.randn(3, 1 + grid[0] * grid[1], 48)
    usefulness = predictor(tokens)
    assert usefulness.shape == (3, grid[0] * grid[1]) and usefulness.dtype == torch.float32
    learned = torch.cat([tokens, torch.randn(3, 2, 48)], dim=1)
    assert torch.equal(predictor(learned), usefulness)
    other = torch.cat([torch.randn(3, 1, 48), tokens[:, 1:]], dim=1)
    assert torch.equal(predictor(other), usefulness) != class_token
    assert predictor(tokens.half()).dtype == predictor.bfloat16()(tokens).dtype == torch.float32


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("width", [64, None])
@pytest.mark.parametrize("layers, readout", [(1, True), (1, False), (3, True), (2, False)])
def test_multiply_adds_are_exact(width, class_token, layers, readout):
    shape = {"width": width, "expansion": 1.5, "class_token": class_token, "layers": layers, "readout": readout}
    predictor = Predictor(PredictorConfig((4, 5), 96, **shape))
    with FlopCounterMode(display=False) as counter:
        predictor(torch.randn(1, 21, 96))
    assert predictor.multiply_adds() * 2 == counter.get_total_flops()


@pytest.mark.parametrize("mixing", [None, 7])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("readout", [True, False])
def test_tokens_are_mixed_into_every_channel_and_channels_read_out(mixing, layers, readout):
    """The paper's order of mixing and mean, which are both linear: the mean first is cheaper."""
    predictor = Predictor(PredictorConfig((4, 5), 32, width=8, mixing=mixing, layers=layers, readout=readout)).double()
    for parameter in predictor.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokens = torch.randn(3, 21, 32, dtype=torch.float64)
    x = predictor.project(predictor.norm(tokens))
    x = x + predictor.places if readout else x
    for channels, positions in [(predictor.channels, predictor.positions), *predictor.further]:
        x = x + channels(x)
        x = x + positions(x.transpose(1, 2)).transpose(1, 2)
    wanted = predictor.readout(x)[..., 0] if readout else x.mean(dim=2)
    torch.testing.assert_close(predictor(tokens).double(), wanted[:, 1:], rtol=1e-5, atol=1e-6)


def test_predictors_of_before_are_read():
    """Files of 0.1 tell neither how tokens are mixed nor how channels are read out."""
    config = PredictorConfig.read(
        {"grid": [4, 5], "input_width": 32, "width": 64, "expansion": 2.0, "class_token": True}
    )
    old = Predictor(config)
    assert old.positions[0].out_features == 42 and old.readout is None
    assert {name.split(".")[0] for name in old.state_dict()} == {"norm", "project", "channels", "positions"}


def test_the_default_is_small_beside_every_tower_and_the_papers_form_costs_5_percent():
    """The paper's own 6 % mix tokens into every channel before these are averaged."""
    assert Predictor(PredictorConfig((14, 14), 768)).multiply_adds() <= 0.002 * VIT_B_16
    embedded = Tower(loading.load(assets.MODEL).visual)
    small = Predictor(PredictorConfig.of(embedded))
    assert small.multiply_adds() <= 0.03 * embedded.adapter.full_multiply_adds()
    shape = {"width": None, "expansion": 4, "mixing": None, "layers": 1, "readout": False, "class_token": False}
    paper = PredictorConfig((14, 14), 768, **shape)
    assert 0.04 < Predictor(paper).multiply_adds() / VIT_B_16 < 0.06


@pytest.mark.parametrize("wrong", [{"width": 0}, {"expansion": 0}])
def test_shapes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))} 0: must be"):
        PredictorConfig((4, 5), 32, **wrong)


def test_select_takes_the_most_useful_in_ascending_order_and_the_lower_id_in_a_tie():
    usefulness = torch.tensor([[0.5, 2.0, 0.5, 3.0], [1.0, 1.0, 1.0, 1.0]])
    assert select(usefulness, 3).tolist() == [[0, 1, 3], [0, 1, 2]]


def test_keep_rates_that_leave_nothing_are_refused():
    assert count_kept(196, 0.5) == 98 and count_kept(196, 1) == 196
    for keep in (0, -0.5, 1.01, 0.002):
        with pytest.raises(UserError, match=f"--keep {keep}: must be .* of 196 tokens"):
            count_kept(196, keep)


def test_targets_are_z_scores_in_the_order_of_the_ranking_or_against_the_score():
    ranking = torch.stack([torch.randperm(20) for _ in range(3)])
    score = torch.rand(3, 20) * 1e-5 + 0.999
    by_rank, by_score = targets(ranking, score, "rank"), targets(ranking, score, "score")
    for found in (by_rank, by_score):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.mean(dim=1), torch.zeros(3), atol=1e-6, rtol=0)
        torch.testing.assert_close(found.std(dim=1, correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert torch.equal(by_rank.argsort(dim=1, descending=True), ranking)
    assert torch.equal(by_score.argsort(dim=1, descending=True, stable=True), score.argsort(dim=1, stable=True))
    assert targets(ranking, torch.ones(3, 20), "score").abs().max() == 0
    with pytest.raises(ValueError, match="'places'"):
        targets(ranking, score, "places")


@pytest.mark.parametrize("name", ["bce", "listnet"])
def test_a_loss_is_smallest_at_its_target(name):
    target = torch.randn(2, 10, generator=torch.Generator().manual_seed(0)).double()
    prediction = target.clone().requires_grad_()
    best = LOSSES[name](prediction, target)
    best.backward()
    assert prediction.grad.abs().max() < 1e-12
    for seed in range(20):
        off = torch.randn(2, 10, generator=torch.Generator().manual_seed(seed)).double()
        assert LOSSES[name](target + off, target) > best


def test_the_paper_s_printed_loss_is_not_ours():
    """-sum sigmoid(s) log sigmoid(s_hat) falls without end as all predictions grow; the binary cross-entropy rises."""
    target = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    assert LOSSES["bce"](target + 10, target) > LOSSES["bce"](target + 1, target)


def test_margin_equals_the_loop_over_pairs():
    source = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 6, generator=source), torch.randn(2, 6, generator=source)
    target[0, 1] = target[0, 4]
    hinges = [
        max(0.0, 1 - (prediction[row, i] - prediction[row, j]).item())
        for row, i, j in itertools.product(range(2), range(6), range(6))
        if target[row, i] > target[row, j]
    ]
    assert LOSSES["margin"](prediction, target).item() == pytest.approx(sum(hinges) / len(hinges))
    assert LOSSES["margin"](target * 1e6, target) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_teaches_what_can_be_seen_in_the_tokens(name):
    """Usefulness is one direction of the token plus one of the position: both mixings have something to learn."""
    torch.manual_seed(0)
    predictor = Predictor(PredictorConfig((4, 5), 16, width=16))
    direction, position = torch.randn(16), torch.randn(20)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=1e-2)
    for step in range(121):
        tokens = torch.randn(32, 21, 16)
        ranking = (tokens[:, 1:] @ direction / 4 + position).argsort(dim=1, descending=True)
        prediction = predictor(tokens)
        rates = matching_rate(prediction, ranking, 10).mean(), kendall_tau(prediction, ranking).mean()
        if step == 0:
            assert rates[0] < 0.6 and rates[1] < 0.3
        loss = LOSSES[name](prediction, targets(ranking, torch.zeros(32, 20), "rank"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert rates[0] > 0.85 and rates[1] > 0.7


def test_matching_rate_and_kendall_tau_equal_the_naive_ones():
    source = torch.Generator().manual_seed(0)
    usefulness = torch.randn(4, 9, generator=source)
    usefulness[1, 2] = usefulness[1, 5]
    usefulness[2] = 0
    ranking = torch.stack([torch.randperm(9, generator=source) for _ in range(4)])
    for m in (1, 4, 9):
        expected = []
        for row in range(4):
            order = sorted(range(9), key=lambda token: (-usefulness[row, token].item(), token))
            expected.append(len(set(order[:m]) & set(ranking[row, :m].tolist())) / m)
        torch.testing.assert_close(matching_rate(usefulness, ranking, m), torch.tensor(expected))
    expected = []
    for row in range(4):
        values = [usefulness[row, token].item() for token in ranking[row].tolist()]
        signs = [(better > worse) - (better < worse) for better, worse in itertools.combinations(values, 2)]
        expected.append(sum(signs) / len(signs))
    torch.testing.assert_close(kendall_tau(usefulness, ranking), torch.tensor(expected))
    golden = targets(ranking, usefulness, "rank")
    assert torch.equal(kendall_tau(golden, ranking), torch.ones(4))
    assert torch.equal(kendall_tau(-golden, ranking), -torch.ones(4))


@pytest.fixture
def saved(small_clip, tmp_path):
    """A folder with a predictor for the small model's tower, cut before block 1."""
    tower = Tower(small_clip().visual)
    predictor = Predictor(PredictorConfig(tower.grid, tower.width, width=8))
    folder = tmp_path / "predictor"
    predictors.save(str(folder), predictor, {"model": {"weights": "0123abcd", "cut": 1}, "search": "4567"})
    return folder, predictor, tower


def test_a_saved_predictor_comes_back(saved):
    folder, predictor, tower = saved
    again, record = predictors.load(str(folder), tower, "0123abcd")
    tokens = torch.randn(2, 21, 32)
    assert torch.equal(again(tokens), predictor(tokens)) and not again.training
    assert again.config == predictor.config and record["search"] == "4567"
    assert predictors.load(str(folder))[1] == record
    predictors.save(str(folder), predictor.bfloat16(), record)
    torch.testing.assert_close(predictors.load(str(folder))[0](tokens), predictor.float()(tokens))


def test_a_predictor_of_another_model_cut_or_grid_is_refused(saved, small_clip):
    folder, _, tower = saved
    with pytest.raises(UserError, match="this predictor was made for another model: weights 0123abcd, here ffff"):
        predictors.load(str(folder), tower, "ffff")
    with pytest.raises(UserError, match="another --cut: 1, here 2"):
        predictors.load(str(folder), Tower(small_clip().visual, cut=2), "0123abcd")
    with pytest.raises(UserError, match="a grid of tokens of 4 x 5, here 4 x 4"):
        predictors.load(str(folder), Tower(small_clip(image_size=16).visual), "0123abcd")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda folder: (folder / "predictor.json").unlink(), "holds no predictor"),
        (lambda folder: (folder / "predictor.safetensors").unlink(), "holds no predictor"),
        (lambda folder: (folder / "predictor.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "predictor.json").write_text("{}"), "make no sense: 'format'"),
        (lambda folder: (folder / "predictor.safetensors").write_bytes(b"garbage"), "is damaged"),
        (lambda folder: change(folder, format="0"), "has format 0"),
        (lambda folder: change(folder, config={}), "make no sense: .*grid"),
        (lambda folder: change(folder, config={"grid": [2, 2], "input_width": 32}), "make no sense: .*state_dict"),
        (lambda folder: change(folder, model=None), "make no sense"),
    ],
)
def test_a_damaged_folder_is_named_on_one_line(saved, damage, reason):
    folder, *_ = saved
    damage(folder)
    with pytest.raises(UserError, match=reason) as error:
        predictors.load(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def change(folder, **fields):
    content = json.loads((folder / "predictor.json").read_text())
    (folder / "predictor.json").write_text(json.dumps(content | fields))


def test_a_folder_that_cannot_be_written_is_named(saved, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/below: cannot be written"):
        predictors.save(str(tmp_path / "file" / "below"), saved[1], {})


def test_gradients_stay_finite_where_a_prediction_saturates():
    prediction = torch.full((1, 4), 200.0, requires_grad=True)
    for loss in LOSSES.values():
        value = loss(prediction, torch.tensor([[-1.0, 0.0, 0.5, 1.0]]))
        assert value.isfinite() and torch.autograd.grad(value, prediction)[0].isfinite().all()
