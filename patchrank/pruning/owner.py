"""Where a model has its image tower, and how a pruned one gets there."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from patchrank.errors import UserError
from patchrank.model.transformers_tower import KNOWN, ImageTower, family_of
from patchrank.pruning import in_transformers
from patchrank.pruning.stand_in import StandIn

_DRAWING = "ForMaskedImageModeling"  # puts the tokens on a grid, which fewer may fit as well


class Owner:
    """A model of open_clip, or what else has its image tower at `visual`: a pruned tower takes that place."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def visual(self) -> Any:
        """The unpruned image tower."""
        visual = self.model.visual
        return visual.original if isinstance(visual, StandIn) else visual

    def put(self, tower: StandIn) -> None:
        """Have the model encode images by a pruned tower."""
        self.model.visual = tower

    def restore(self) -> None:
        """Have it encode images as before it was pruned."""
        self.model.visual = self.visual

    def __enter__(self) -> Self:
        """While a tower is planned. What goes wrong leaves the model as it was."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...


class TransformersOwner(Owner):
    """A model of transformers: its vision model stays where it is, with another forward pass.

    Args:
        model: the vision model itself, or a model that holds it.
        vision: the vision model.
        image_size: as for `ImageTower`.
    """

    def __init__(self, model: Any, vision: Any, image_size: tuple[int, int] | None) -> None:
        super().__init__(model)
        self.vision = vision
        holders = (each for each in model.modules() if each._modules.get("vision_model") is vision)
        projections = (getattr(holder, "visual_projection", None) for holder in holders)
        projection = next((each for each in projections if isinstance(each, nn.Linear)), None)
        self.before = in_transformers.tower_of(vision)
        self._visual = ImageTower(vision, projection, image_size)
        self._visual.own_output = True

    @property
    def visual(self) -> Any:
        """The unpruned image tower, which gives what the vision model gives."""
        return self._visual

    def put(self, tower: StandIn) -> None:
        """As `Owner.put`."""
        if not tower.idle:
            in_transformers.prune(self.model, self.vision, tower)

    def restore(self) -> None:
        """As `Owner.restore`."""
        in_transformers.restore(self.model, self.vision)

    def __enter__(self) -> Self:
        """As `Owner.__enter__`: unpruned, as its own forward pass is what a tower is compared with."""
        self.restore()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.before is not None:
            in_transformers.prune(self.model, self.vision, self.before)


def owner_of(model: Any, grid: tuple[int, int] | None = None, image_size: tuple[int, int] | None = None) -> Owner:
    """The owner of a model's image tower: the model itself, or the one that a wrapper holds.

    Args:
        grid: rows and columns of patches of the images that it is to be pruned for.
        image_size: H and W of those instead. Either is for towers of transformers that take images of any size.

    Raises:
        UserError: there is none, or more than one, or its weights are sharded, or it takes all patches to be there.
    """
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    if any(type(each).__name__.startswith(("FullyShardedDataParallel", "FSDP")) for each in modules.values()):
        raise UserError("this model is sharded (FSDP): prune it before it is wrapped")
    drawing = next((each for each in modules.values() if type(each).__name__.endswith(_DRAWING)), None)
    if drawing is not None:
        raise UserError(f"a {type(drawing).__name__} cannot be pruned: it takes its tokens for all patches of an image")
    if "visual" in getattr(model, "_modules", {}):  # a wrapper hands on what is read, and not what is written
        modules = {"": model}
    owners = {name: each for name, each in modules.items() if isinstance(each._modules.get("visual"), nn.Module)}
    towers = {} if owners else {name: each for name, each in modules.items() if family_of(each) is not None}
    if len(owners) + len(towers) > 1:
        names = ", ".join([*owners, *towers])
        raise UserError(f"a {type(model).__name__} holds several models with an image tower ({names}): give one")
    if owners:
        if image_size is not None:
            raise UserError("image_size: a model of open_clip is built for images of one size; leave it out")
        return Owner(*owners.values())
    if not towers:
        known = f" or vision model of transformers ({KNOWN})" if "transformers" in type(model).__module__ else ""
        raise UserError(f"a {type(model).__name__} cannot be pruned: it has no image tower `visual`{known}")
    (vision,) = towers.values()
    tower = ImageTower(vision)
    if image_size is None and grid is not None and tower.any_size:
        image_size = (grid[0] * tower.patch_size[0], grid[1] * tower.patch_size[1])
    if image_size is not None and not tower.any_size and image_size != tower.image_size:
        raise UserError(f"image_size: this {tower.family} takes images of {tower.image_size} alone; leave it out")
    return TransformersOwner(model, vision, image_size)
