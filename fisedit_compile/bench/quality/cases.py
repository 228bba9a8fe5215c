"""The edits that methods are compared on: pairs of captions of which training has seen none with an object."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fisedit_compile.errors import OptionError
from fisedit_compile.scenes import EDIT_KINDS, EditKind, Scene, all_scenes, caption, held_back_scenes
from fisedit_compile.scenes.edits import edits_of


@dataclass(frozen=True)
class EditCase:
    """One edit.

    Attributes:
        name: its kind and its number among those of the kind, such as ``recolour-003``.
        kind: what is edited.
        before, after: the scenes; those with an object are held back from training.
        seed: of the noise.
    """

    name: str
    kind: EditKind
    before: Scene
    after: Scene
    seed: int

    @property
    def prompt(self) -> str:
        """The caption before the edit."""
        return caption(self.before)

    @property
    def edited_prompt(self) -> str:
        """The caption after the edit."""
        return caption(self.after)


def edit_cases(kinds: Sequence[EditKind], count: int) -> list[EditCase]:
    """The first ``count`` edits of some kinds, the kinds in turn.

    A case does not depend on how many there are, nor on the other kinds, so a longer evaluation has those of a shorter.

    Args:
        kinds: of :data:`fisedit_compile.scenes.EDIT_KINDS`; their order does not matter.
        count: how many edits.

    Raises:
        OptionError: no kind, one that does not exist, or a count below 1.
    """
    unknown = [kind for kind in kinds if kind not in EDIT_KINDS]
    if unknown or not kinds:
        raise OptionError(f"expected kinds of edits out of {', '.join(EDIT_KINDS)}; got {', '.join(unknown) or 'none'}")
    if count < 1:
        raise OptionError(f"expected at least one edit, got {count}")
    ordered = [kind for kind in EDIT_KINDS if kind in kinds]
    return [_case(ordered[number % len(ordered)], number // len(ordered)) for number in range(count)]


def _case(kind: EditKind, number: int) -> EditCase:
    """The edit of a kind and number; after the last pair of scenes they begin again, with other noise."""
    pairs = _pairs(kind)
    before, after = pairs[number % len(pairs)]
    return EditCase(f"{kind}-{number:03d}", kind, before, after, 10_000 * EDIT_KINDS.index(kind) + number)


@lru_cache(maxsize=len(EDIT_KINDS))
def _pairs(kind: EditKind) -> tuple[tuple[Scene, Scene], ...]:
    """All pairs of scenes that an edit of a kind leads from and to, in an order that depends on the kind alone."""
    held_back = set(held_back_scenes())
    known = [scene for scene in all_scenes() if scene in held_back or scene.is_empty]
    pairs = [
        (scene, after) for scene in known for after in edits_of(scene, kind) if after in held_back or after.is_empty
    ]
    # Captions of empty scenes were all in training: only edits from or to an object are of held-back ones.
    pairs = [pair for pair in pairs if not (pair[0].is_empty and pair[1].is_empty)]
    random.Random(kind).shuffle(pairs)
    return tuple(pairs)
