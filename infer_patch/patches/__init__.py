"""The methods, one file each. Importing this package registers them all."""

from infer_patch.patches.envelope import Envelope
from infer_patch.patches.fastv import FastV
from infer_patch.patches.random_pruning import RandomPruning
from infer_patch.patches.sink_window import SinkWindow

__all__ = ["Envelope", "FastV", "RandomPruning", "SinkWindow"]
