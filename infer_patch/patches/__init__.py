"""The methods, one file each. Importing this package registers them all."""

from infer_patch.patches.envelope import Envelope
from infer_patch.patches.fastv import FastV
from infer_patch.patches.hip import HiP
from infer_patch.patches.moa import MoA
from infer_patch.patches.random_pruning import RandomPruning
from infer_patch.patches.retrieval_heads import RetrievalHeads
from infer_patch.patches.sink_window import SinkWindow
from infer_patch.patches.vertical_slash import VerticalSlash

__all__ = ["Envelope", "FastV", "HiP", "MoA", "RandomPruning", "RetrievalHeads", "SinkWindow", "VerticalSlash"]
