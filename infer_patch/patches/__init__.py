"""The methods, one file each. Importing this package registers them all."""

from infer_patch.patches.act import ACT
from infer_patch.patches.dyvte import DyVTE
from infer_patch.patches.envelope import Envelope
from infer_patch.patches.fastv import FastV
from infer_patch.patches.g_search import GSearch
from infer_patch.patches.hip import HiP
from infer_patch.patches.kv_quant import KVQuant
from infer_patch.patches.moa import MoA
from infer_patch.patches.p_sigmoid import PSigmoid
from infer_patch.patches.paint import Paint
from infer_patch.patches.random_pruning import RandomPruning
from infer_patch.patches.retrieval_heads import RetrievalHeads
from infer_patch.patches.sink_window import SinkWindow
from infer_patch.patches.var import VAR
from infer_patch.patches.vertical_slash import VerticalSlash
from infer_patch.patches.vtc_cls import VTCCLS
from infer_patch.patches.yopo import YOPO
from infer_patch.patches.zipvl import ZipVL

__all__ = [
    "ACT",
    "VAR",
    "VTCCLS",
    "YOPO",
    "DyVTE",
    "Envelope",
    "FastV",
    "GSearch",
    "HiP",
    "KVQuant",
    "MoA",
    "PSigmoid",
    "Paint",
    "RandomPruning",
    "RetrievalHeads",
    "SinkWindow",
    "VerticalSlash",
    "ZipVL",
]
