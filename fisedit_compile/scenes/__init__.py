"""A small world of scenes: its renderer, its checker and the diffusion model that comes with the package."""

from .checker import ATTRIBUTES, Reading, check, check_edit, read_scene
from .edits import EDIT_KINDS, EditKind, EditPair, edit_pairs
from .pipeline import load_pipeline
from .render import SIZE, render
from .world import Scene, all_scenes, caption, held_back_scenes, parse_caption, training_scenes

__all__ = [
    "ATTRIBUTES",
    "EDIT_KINDS",
    "SIZE",
    "EditKind",
    "EditPair",
    "Reading",
    "Scene",
    "all_scenes",
    "caption",
    "check",
    "check_edit",
    "edit_pairs",
    "held_back_scenes",
    "load_pipeline",
    "parse_caption",
    "read_scene",
    "render",
    "training_scenes",
]
