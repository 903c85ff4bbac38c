"""The predictor: small MLP-Mixer layers that tell the usefulness of every patch token at the cut.

predictor = Predictor(PredictorConfig.of(tower))
usefulness = predictor(tower.prefix(images))              # (B, N), high = keep
kept = select(usefulness, tokens_kept(tower.num_tokens, 0.6))
embeddings = tower.suffix(tokens, kept)

Section 3.2 of the paper (arXiv 2409.14607): channel mixing, then token mixing, each a residual MLP (linear, layer norm,
GELU, linear), then the mean over channels. Ours first projects the channels to an eighth of the tower's width, adds a
learnt vector to every position, mixes tokens through a hidden layer that does not grow with their number, so that it is
small beside every tower, and ends with a learnt readout instead of the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.flags import at_least, flag
from patchrank.model import artifacts
from patchrank.model.adapter import linear_multiply_adds
from patchrank.model.tower import Tower
from patchrank.tokens import by_rank

TARGETS = ("rank", "score")
NAME = "predictor"  # of its files
SCALED = -1  # a width by that of the tower
LEAST_WIDTH = 16
MOST_MIXING = 64
LAYERS = 2
# What files of before a field was there mean by its absence.
BEFORE = {"mixing": None, "prefix_tokens": 1, "layers": 1, "readout": False}


@dataclass(frozen=True)
class PredictorConfig:
    """The shape of a predictor. Raises UserError for a value that makes no sense."""

    grid: tuple[int, int]  # rows and columns of patch tokens; N is their product
    input_width: int  # D of the tower
    width: int | None = flag(  # None mixes all D, as the paper does
        SCALED,
        "channels are projected to this first; 0 mixes all (an eighth of the tower's)",
        group="predictor",
        convert=lambda width: width or None,
    )
    # Of both MLPs in the paper, whose 6 % mean 4.
    expansion: float = flag(2.0, "hidden width of channel mixing as a multiple of its input (%(default)g)")
    mixing: int | None = flag(  # None is `expansion` times the tokens
        SCALED,
        f"hidden width of token mixing; 0 is --expansion times the tokens (twice --width, at most {MOST_MIXING})",
        convert=lambda n: n or None,
    )
    layers: int = flag(LAYERS, "mixer layers (%(default)s)")
    readout: bool = flag(True, "no vectors of positions, and the mean over channels at the end, as in the paper")
    class_token: bool = flag(True, "leave the class token out of its input")  # whether it is mixed with the patches
    prefix_tokens: int = 1  # of the tower: the class token, registers; all of them go with it

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))  # JSON has lists
        if self.width == SCALED:
            object.__setattr__(self, "width", max(LEAST_WIDTH, self.input_width // 8))
        if self.mixing == SCALED:
            object.__setattr__(self, "mixing", min(MOST_MIXING, 2 * (self.width or MOST_MIXING)))
        at_least(self, 1, "width", "mixing", "layers")
        if self.expansion <= 0:
            raise UserError(f"--expansion {self.expansion}: must be above 0")

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> PredictorConfig:
        """The shape that a file tells; those of before 0.2 do not tell all of it."""
        return cls(**{**BEFORE, **config})

    @classmethod
    def of(cls, tower: Tower) -> PredictorConfig:
        """The default shape for a tower."""
        return cls(**tower_facts(tower))

    @property
    def num_tokens(self) -> int:
        """N, the number of patch tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def mixed_tokens(self) -> int:
        """T, the number of tokens that are mixed."""
        return self.num_tokens + (self.prefix_tokens if self.class_token else 0)


def tower_facts(tower: Tower) -> dict[str, Any]:
    """What a `PredictorConfig` is told of a tower."""
    adapter = tower.adapter
    return {"grid": adapter.grid, "input_width": adapter.width, "prefix_tokens": adapter.prefix_tokens}


class Predictor(nn.Module):
    """Usefulness of patch tokens. It works in the dtype of its weights.

    Args:
        config: its shape. Token mixing has weights for every position, so a predictor serves one grid.
    """

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width or config.input_width
        self.norm = nn.LayerNorm(config.input_width)  # a few channels of CLIP's tokens are a hundred times the others
        self.project = nn.Linear(config.input_width, width) if config.width else nn.Identity()
        self.channels = _mlp(width, round(width * config.expansion))
        tokens = config.mixed_tokens
        mixing = config.mixing or round(tokens * config.expansion)
        self.positions = _mlp(tokens, mixing)
        further = [
            (_mlp(width, round(width * config.expansion)), _mlp(tokens, mixing)) for _ in range(config.layers - 1)
        ]
        self.further = nn.ModuleList(nn.ModuleList(layer) for layer in further)
        self.places = nn.Parameter(torch.zeros(tokens, width)) if config.readout else None
        self.readout = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1)) if config.readout else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Usefulness of each patch token, high = keep.

        Args:
            tokens: (B, p + N + b, D), any floating dtype, as `Tower.prefix` gives them; the last b are not looked at.

        Returns:
            (B, N) float32.
        """
        end = self.config.prefix_tokens + self.config.num_tokens
        x = tokens[:, end - self.config.mixed_tokens : end].to(self.norm.weight.dtype)  # (B, T, D)
        x = self.project(self.norm(x))  # (B, T, width)
        x = x if self.places is None else x + self.places
        *layers, (channels, positions) = self._layers()
        for mix_channels, mix_tokens in layers:
            x = x + mix_channels(x)
            x = x + mix_tokens(x.transpose(1, 2)).transpose(1, 2)
        x = x + channels(x)
        if self.readout is not None:
            x = x + positions(x.transpose(1, 2)).transpose(1, 2)
            return self.readout(x)[:, -self.config.num_tokens :, 0].float()  # (B, N)
        # The mean over channels of what the last layer makes is what it makes of the mean: a width-th of the cost.
        into, norm, activation, out_of = positions
        mixed = out_of(activation(norm(into(x.transpose(1, 2)))).mean(dim=1))  # (B, T)
        return (x.mean(dim=2) + mixed)[:, -self.config.num_tokens :].float()  # (B, N)

    def _layers(self) -> list[Any]:
        """What mixes channels and what mixes tokens, of each layer."""
        return [(self.channels, self.positions), *self.further]

    def multiply_adds(self) -> int:
        """Exact multiply-adds of an image; norms, activations and the mean are not counted."""
        rows = self.config.mixed_tokens
        width = self.config.width or self.config.input_width
        layers = self._layers()
        by_token = [self.project, *(channels for channels, _ in layers)]
        by_token += [] if self.readout is None else [self.readout]
        total = rows * sum(map(linear_multiply_adds, by_token)) + width * sum(
            linear_multiply_adds(positions) for _, positions in layers
        )
        if self.readout is None:  # the last layer of all makes one number of each token
            total -= (width - 1) * layers[-1][1][-1].weight.numel()
        return total


def _mlp(size: int, hidden: int) -> nn.Sequential:
    hidden = max(1, hidden)
    return nn.Sequential(nn.Linear(size, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, size))


def targets(ranking: Tensor, score: Tensor, kind: str) -> Tensor:
    """What the predictor is to learn: usefulness, z-scored over the tokens of each image.

    Args:
        ranking: (B, N) int64, token ids, most useful first.
        score: (B, N) float, by token id; high = can go.
        kind: "rank": the position in the ranking alone, right for searches of many steps, whose scores come from
            different steps. "score": minus the score (section 3.2 of the paper), right for one-shot searches.

    Returns:
        (B, N) float32 by token id, high = keep; zeros where all tokens of an image are alike.

    Raises:
        ValueError: another kind.
    """
    if kind == "rank":
        usefulness = by_rank(ranking).double()
    elif kind == "score":
        usefulness = -score.double()  # scores of an image often differ in the fifth decimal only
    else:
        raise ValueError(f"unknown targets {kind!r}; there are {', '.join(TARGETS)}")
    centred = usefulness - usefulness.mean(dim=1, keepdim=True)
    deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(deviation > 0, centred / deviation, 0.0).float()


def bce(prediction: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy with the soft target sigmoid(target); smallest where prediction = target.

    The paper prints -sum sigmoid(s) log sigmoid(s_hat), which has no finite minimum; this is what it must mean.
    """
    return F.binary_cross_entropy_with_logits(prediction, target.sigmoid())


def listnet(prediction: Tensor, target: Tensor) -> Tensor:
    """ListNet (Cao et al., 2007): cross-entropy between the softmax over tokens of the target and of the prediction."""
    return -(target.softmax(dim=1) * prediction.log_softmax(dim=1)).sum(dim=1).mean()


def margin(prediction: Tensor, target: Tensor) -> Tensor:
    """Pairwise hinge: of two tokens the one with the higher target must be predicted higher, by 1 at least."""
    better = target[:, :, None] > target[:, None, :]  # (B, N, N): whether i is better than j
    hinge = F.relu(1 - (prediction[:, :, None] - prediction[:, None, :]))  # (B, N, N)
    return (hinge * better).sum() / better.sum().clamp(min=1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"bce": bce, "listnet": listnet, "margin": margin}
"""By name: (prediction, target) -> a scalar, the mean over images; both (B, N) float32, the target from `targets`."""


def save(folder: str, predictor: Predictor, record: Mapping[str, Any]) -> None:
    """Write FOLDER/predictor.safetensors and FOLDER/predictor.json.

    Args:
        folder: local, s3:// or gs://.
        predictor: weights of any dtype, on any device; they are stored in float32.
        record: JSON values for predictor.json, beside the predictor's own `config`. `record["model"]` must have what
            `artifacts.check` compares: `weights`, the digest of the image tower, and `cut`.

    Raises:
        UserError: the folder cannot be written.
    """
    artifacts.save(folder, NAME, predictor.state_dict(), {**record, "config": asdict(predictor.config)})


def load(folder: str, tower: Tower | None = None, weights: str | None = None) -> tuple[Predictor, dict[str, Any]]:
    """The predictor of a folder, in eval mode, float32, on the CPU, and the content of predictor.json.

    Args:
        folder: that `save` wrote.
        tower, weights: the tower that it shall serve and the digest of its weights (`Model.weights`); not compared
            where None.

    Raises:
        UserError: no predictor there, a damaged one, or one for another model, cut or grid; says what differs.
    """
    tensors, record = artifacts.load(folder, NAME)
    with artifacts.readable(folder, NAME):
        predictor = Predictor(PredictorConfig.read(record["config"]))
        predictor.load_state_dict(tensors)
        model = {**record["model"], "grid": list(predictor.config.grid)}
    artifacts.check(f"{folder}: this predictor was", model, tower, weights)
    return predictor.eval(), record
