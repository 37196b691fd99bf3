"""The recipes by one vocabulary: what each is called, which sizes it takes, and which GPUs run it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_stosign._plain import plain

Capability = tuple[int, int]


class RecipeFacts(NamedTuple):
    """What is known of a recipe before any library is asked.

    Attributes:
        multiple: Both sizes of a linear layer, and the number of its tokens, must be multiples of this.
        te_class: Transformer Engine's class, or None where it has none.
        first: The first compute capability on which Transformer Engine runs it.
        beyond: The first one without it again, or None.
        cuda: The oldest CUDA with it, where that is newer than what the GPU itself needs.
    """

    multiple: int = 16
    te_class: str | None = None
    first: Capability = (8, 9)
    beyond: Capability | None = None
    cuda: Capability | None = None


# In the order of their hardware: the oldest first.
RECIPES = {
    "delayed": RecipeFacts(te_class="DelayedScaling"),
    "current": RecipeFacts(te_class="Float8CurrentScaling"),
    "rowwise": RecipeFacts(),
    "block": RecipeFacts(128, te_class="Float8BlockScaling", first=(9, 0), cuda=(12, 9)),
    "mxfp8": RecipeFacts(32, te_class="MXFP8BlockScaling", first=(10, 0), beyond=(12, 0)),
    "nvfp4": RecipeFacts(16, te_class="NVFP4BlockScaling", first=(10, 0)),
    "mxfp4": RecipeFacts(32),
}

MINIMAL_CAPABILITY = RECIPES["current"].first


@dataclass(frozen=True)
class RecipeChoice:
    """A ``recipe`` argument, taken apart.

    Attributes:
        given: The argument itself: a name, a mapping, or an object that only Transformer Engine can judge.
        name: The recipe's name, or None for such an object.
        options: The recipe's own options, by name.
    """

    given: Any
    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def options_among(self, known: tuple[str, ...]) -> dict[str, Any]:
        """Return the options.

        Raises:
            ValueError: There is one that is not known.
        """
        if unknown := sorted(self.options.keys() - set(known)):
            offered = f"which has {list(known)}" if known else "which has none here"
            raise ValueError(f"recipe={self.given!r}: {unknown} are not options of {self.name!r}, {offered}")
        return dict(self.options)


def parse_recipe(recipe: Any) -> RecipeChoice:
    """Take a ``recipe`` argument apart.

    Args:
        recipe: A name, or a mapping with the key ``"name"`` and the recipe's options; anything else is left to
            Transformer Engine.

    Raises:
        ValueError: The name is unknown, or missing.

    Example:
        >>> parse_recipe({"name": "delayed", "amax_history_len": 16}).options
        {'amax_history_len': 16}
    """
    choice = RecipeChoice(recipe)
    if isinstance(recipe, str):
        choice = RecipeChoice(recipe, recipe)
    elif isinstance(recipe, Mapping):
        options = {option: plain(value) for option, value in recipe.items()}
        name = options.pop("name", None)
        if name is None:
            raise ValueError(f"recipe={recipe!r} must have a 'name', one of {list(RECIPES)}")
        choice = RecipeChoice(recipe, name, options)
    if choice.name is not None and choice.name not in RECIPES:
        raise ValueError(f"recipe must be one of {list(RECIPES)}, got {choice.name!r}")
    return choice


def recipes_on(capability: Capability, cuda: Capability | None = None) -> list[str]:
    """Return the recipes that Transformer Engine runs on a GPU.

    Args:
        capability: The GPU's compute capability.
        cuda: The version of CUDA, or None where it does not matter.

    Example:
        >>> recipes_on((9, 0))
        ['delayed', 'current', 'block']
    """
    return [
        name
        for name, facts in RECIPES.items()
        if facts.te_class is not None
        and capability >= facts.first
        and (facts.beyond is None or capability < facts.beyond)
        and (cuda is None or facts.cuda is None or cuda >= facts.cuda)
    ]


def check_hardware(name: str, capability: Capability | None, cuda: Capability | None = None) -> None:
    """Raise ValueError unless Transformer Engine runs the recipe on this GPU; the message says what it runs instead.

    Args:
        name: One of Transformer Engine's recipes.
        capability: The GPU's compute capability, or None where there is no GPU to judge by.
        cuda: The version of CUDA, or None where it does not matter.
    """
    if capability is None or name in (offered := recipes_on(capability, cuda)):
        return
    facts, order = RECIPES[name], list(RECIPES)
    needed = "compute capability {}.{}".format(*facts.first)
    needed += " or higher" if facts.beyond is None else " up to, but not including, {}.{}".format(*facts.beyond)
    has = "{}.{}".format(*capability)
    if facts.cuda is not None:
        needed += " and CUDA {}.{} or newer".format(*facts.cuda)
        has += "" if cuda is None else " with CUDA {}.{}".format(*cuda)
    weaker = [other for other in offered if order.index(other) < order.index(name)]
    raise ValueError(f"recipe={name!r} needs {needed}; this GPU has {has} and runs {offered}: use {weaker[-1]!r}")
