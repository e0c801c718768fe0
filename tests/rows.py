"""The method axis of the test matrix: one row per method configuration. A new method adds its rows here."""

from dataclasses import dataclass
from pathlib import Path

from miniatures import MINIATURES, Miniature, text_inputs, vision_inputs

from infer_patch import Method
from infer_patch.patches import (
    ACT,
    VAR,
    VTCCLS,
    YOPO,
    DyVTE,
    Envelope,
    FastV,
    GSearch,
    HiP,
    KVQuant,
    MoA,
    Paint,
    PSigmoid,
    RandomPruning,
    RetrievalHeads,
    SinkWindow,
    VerticalSlash,
    ZipVL,
)

# spans of 128 tokens, 0.75 N - 64, 0.75 N and N, mixed over the query heads of the miniatures; and N throughout
SPANS, DENSE_SPANS = (str(Path(__file__).parent / "data" / f"moa-plan{x}.json") for x in ("", "-dense"))

MASKED = ("1-0", "1-3", "2-1", "3-2")
SCORES = str(Path(__file__).parent / "data" / "head-scores.json")

# searches that find little of what the window leaves: two or three blocks
SMALL = dict(sinks=0, dense_layers=0, dense_below=0, max_share=1.0)
TREE = HiP(budget=16, tree_block=16, window=68, refresh=4, **SMALL)
STAGES = HiP(
    variant="stages", chunks=(32, 8), keep=(64, 16), stage_strides=(2, 1), stage_refresh=(1, 1), window=65, **SMALL
)
# prompts of the miniatures are short, and their random weights read all tokens alike
ZIP = dict(tau=0.7, dense_below=128, recent=48, window=32, group=32, recent_probes=16, random_probes=16)

BLIND = ("1-0", "1-3", "2-0", "2-1", "2-2", "2-3")  # some and all heads of a layer, one and both of a key head
HEADS = ((1, 0), (1, 3), (2, 1), (2, 2), (3, 0))  # alone and both of a key head
KEEN = dict(threshold=2.0, threshold_mode="relative")  # random weights have no sinks worth the name
WHOLE = dict(chunkable=False, draftable=False, patient=False)
SINKS = VAR(dims=(3, 17), tau=1.5, vision_mass_min=0.05, nonsink_ratio_min=0.1, skip_last_layer=False)


@dataclass(frozen=True)
class Row:
    """A configuration, and what its behaviour promises.

    neutral: keeps everything, so outputs are those of the unpatched model. chunkable: a prompt in chunks gives what it
    gives whole. draftable: assisted decoding gives what greedy decoding gives. patient: short prompts (65 tokens) are
    left as they are.
    """

    name: str
    methods: tuple[Method, ...]
    vision: bool = False
    neutral: bool = False
    chunkable: bool = True
    draftable: bool = True
    patient: bool = True
    fires: bool = True


ROWS = [
    Row("identity", (), neutral=True),
    Row("sink_window", (SinkWindow(window=64, dense_below=0),)),
    Row("sink_window-evict", (SinkWindow(window=64, evict=True),)),
    Row("sink_window-all", (SinkWindow(window=4096, evict=True),), neutral=True, fires=False),
    # which keys a block of queries reads depends on all its queries, so other splits give other (equally good) choices
    Row("envelope", (Envelope(budget=192, window=64, dense_below=0),), chunkable=False, draftable=False),
    Row("envelope-all", (Envelope(budget=4096, dense_below=0),), neutral=True, fires=False),
    # the last 64 queries of a call choose for all of it
    Row(
        "vertical_slash",
        (VerticalSlash(columns=5, first=4, diagonals=9, nearest=8, dense_below=0),),
        chunkable=False,
        draftable=False,
    ),
    Row("vertical_slash-all", (VerticalSlash(columns=4096),), neutral=True, fires=False),
    Row("moa", (MoA(plan_file=SPANS, length=320, dense_below=0),)),
    Row("moa-evict", (MoA(plan_file=SPANS, length=320, evict=True),)),
    # N is set by the tokens that fill the cache: by the first chunk of a prompt, and by the first turn
    Row("moa-elastic", (MoA(plan_file=SPANS, new_tokens=16, dense_below=0),), chunkable=False),
    Row("moa-elastic-evict", (MoA(plan_file=SPANS, new_tokens=16, evict=True),), chunkable=False),
    Row("moa-all", (MoA(plan_file=DENSE_SPANS, evict=True),), neutral=True, fires=False),
    Row("hip", (TREE,), chunkable=False, draftable=False),
    Row("hip-stages", (STAGES,), chunkable=False, draftable=False),
    Row("hip-all", (HiP(budget=4096, dense_layers=0, dense_below=0),), neutral=True, fires=False),
    # later calls read what was quantised, the first call of a text does not: it matters how a text is cut into calls;
    # drafts come with the prompt, and queries that judge importance are drawn from both
    Row("kv_quant", (KVQuant(bits=8, recent=48, window=32, group=32),), chunkable=False),
    Row("kv_quant-mixed", (KVQuant(important=0.4, recent=48, window=32, group=32),), chunkable=False, draftable=False),
    Row("kv_quant-recent", (KVQuant(recent=4096),), neutral=True, fires=False),
    Row("kv_quant-16", (KVQuant(bits=16),), neutral=True, fires=False),
    # the probes of a call choose for all of it; nothing before the call is in the gathered problem
    Row("zipvl", (ZipVL(**ZIP),), chunkable=False, draftable=False),
    Row("zipvl-evict", (ZipVL(unimportant="evict", skipped_rows="attend", **ZIP),), chunkable=False, draftable=False),
    Row("zipvl-select", (ZipVL(bits=16, other_bits=16, **ZIP),), chunkable=False, draftable=False),
    Row("zipvl-all", (ZipVL(tau=1.0, bits=16, other_bits=16, dense_below=0),), neutral=True, fires=False),
    Row("fastv", (FastV(layer=2, drop_ratio=0.5),), vision=True),
    Row("fastv-text", (FastV(layer=1, query="text_mean"),), vision=True),
    Row("fastv-none", (FastV(layer=2, drop_ratio=0.0),), vision=True, neutral=True, fires=False),
    # the prompt's last token is masked, so what is the prompt and what was generated matters
    Row("retrieval_heads", (RetrievalHeads(heads=MASKED),), chunkable=False, patient=False),
    Row("retrieval_heads-zero", (RetrievalHeads(heads=MASKED, mode="zero"),), chunkable=False, patient=False),
    Row("retrieval_heads-all", (RetrievalHeads(heads=MASKED, phase="all"),), patient=False),
    Row("retrieval_heads-none", (RetrievalHeads(scores_file=SCORES, top=0),), neutral=True, fires=False),
    Row("random", (RandomPruning(layer=0, drop_ratio=0.5),), vision=True),
    Row("g_search", (GSearch(keep_rate=(1, 1, 0.6, 0.2)),), vision=True),
    Row("g_search-to-none", (GSearch(keep_rate=(1, 0.7, 0.7, 0), query="last", pool="per_image"),), vision=True),
    Row("g_search-all", (GSearch(keep_rate=(1, 1, 1, 1)),), vision=True, neutral=True, fires=False),
    Row("p_sigmoid", (PSigmoid(budget=0.65),), vision=True),
    Row("dyvte-fixed", (DyVTE(policy="fixed", exit_layer=1),), vision=True),  # gates fit one model: test_dyvte
    # sinks are found from all rows of a prompt at once
    Row("act", (ACT(heads=HEADS, **KEEN),), **WHOLE),
    Row("act-frozen", (ACT(heads=HEADS, decode="frozen", **KEEN),), **WHOLE),
    Row("act-off", (ACT(heads=HEADS, decode="off", **KEEN),), **WHOLE),
    Row("act-neutral", (ACT(heads=HEADS, beta=1.0),), neutral=True, fires=False),
    Row("var", (SINKS,), vision=True),
    Row("var-none", (VAR(dims=(3, 17)),), vision=True, neutral=True, fires=False),  # phi is at most 8 in miniatures
    Row("fastv+act", (FastV(layer=1), ACT(heads=HEADS, **KEEN)), vision=True),
    Row("fastv+var", (FastV(layer=1, drop_ratio=0.25), SINKS), vision=True),
    Row("var+act", (ACT(heads=HEADS, **KEEN), SINKS), vision=True, **WHOLE),
    Row(
        "paint+retrieval_heads+var+act",
        (SINKS, ACT(heads=HEADS, **KEEN), RetrievalHeads(heads=MASKED), Paint(layers=(1, 3))),
        vision=True,
        **WHOLE,
    ),
    Row("yopo", (YOPO(blind=BLIND, cut_layer=3),), vision=True),
    Row("yopo-exact", (YOPO(blind=BLIND, cut_layer=4, mode="exact"),), vision=True),
    Row("yopo-none", (YOPO(cut_layer=4),), vision=True, neutral=True, fires=False),
    Row("vtc_cls", (VTCCLS(drop_ratio=0.5),), vision=True),
    Row("vtc_cls-keep", (VTCCLS(tokens=3, ensemble_k=1, positions="keep"),), vision=True),
    Row("vtc_cls-all", (VTCCLS(tokens=999),), vision=True, neutral=True, fires=False),
    Row("vtc_cls+fastv", (VTCCLS(drop_ratio=0.25), FastV(layer=2)), vision=True),
    Row("paint", (Paint(),), vision=True),
    Row("paint-spatial", (Paint(spatial_ratio=0.2),), vision=True),
    Row("paint-none", (Paint(alpha=0.0, beta=0.0),), vision=True, neutral=True, fires=False),
    Row("vtc_cls+paint", (VTCCLS(drop_ratio=0.25), Paint(layers=(1, 3))), vision=True),
    Row("fastv+moa", (FastV(layer=1), MoA(plan_file=SPANS, length=320, evict=True)), vision=True),
    Row("fastv+kv_quant", (FastV(layer=1), KVQuant(recent=16, window=16)), vision=True),
    Row("fastv+zipvl", (FastV(layer=1), ZipVL(**ZIP)), vision=True),
    Row("fastv+sink_window", (FastV(layer=1), SinkWindow(window=64, evict=True)), vision=True),
    Row("fastv+retrieval_heads", (FastV(layer=2), RetrievalHeads(heads=MASKED)), vision=True, patient=False),
]


WITH_CLS = ("llava", "llava_next", "internvl")  # families whose vision encoder has a CLS token


def serves(row: Row, mini: Miniature) -> bool:
    """Whether the methods of a row apply to a family (where not, `patch` refuses: see test_refusals)."""
    if row.vision and mini.kind != "vision":
        return False
    if any(m.name == "paint" for m in row.methods) and mini.name not in WITH_CLS:
        return False
    selects = any("select" in m.ports for m in row.methods)
    masks = any(m.name == "retrieval_heads" for m in row.methods)
    calibrates = any("calibrate" in m.ports for m in row.methods) and not masks
    attends = selects or calibrates or any("store" in m.ports for m in row.methods)
    if calibrates and mini.sliding == "some":
        return False  # the heads of these rows stand in layers with a window, too
    if mini.bidirectional != "none" and any(getattr(m, "phase", None) == "all" for m in row.methods):
        return False
    # where pictures or prompts see both ways, selection runs dense and says so: test_refusals
    return not (
        (attends and (mini.softcap or mini.sliding == "all"))
        or ((selects or calibrates) and mini.bidirectional != "none")
    )


def inputs_for(row: Row, mini: Miniature, only: int | None = None) -> dict:
    """A left-padded batch that is long enough for the row's methods to act; `only` takes one sample alone."""
    if mini.kind == "text":
        return text_inputs(mini, lengths=(300, 210, 260), seed=1, only=only)
    long = any({"select", "store"} & set(m.ports) for m in row.methods)
    text = [(150, 80), (120, 90), (200, 60)] if long else [(5, 9), (3, 12), (7, 4)]
    return vision_inputs(mini, images=(1, 2, 0), text=text, seed=1, only=only)


def first_of_its_kind(row: Row) -> bool:
    """Whether a row is the first of a method alone, at the ports that its options use: the method as used."""
    return row is next(other for other in ROWS if _kind(other) == _kind(row)) and len(row.methods) < 2


def _kind(row: Row) -> list[tuple[str, tuple[str, ...]]]:
    return [(method.name, method.active_ports()) for method in row.methods]


def ids(cases: list[tuple[Row, Miniature]]) -> list[str]:
    return [f"{row.name}-{mini.name}" for row, mini in cases]


ALL = [(row, mini) for row in ROWS for mini in MINIATURES.values() if serves(row, mini)]
# one family of each kind, for every row: grouped and single key heads; placeholders of a fixed and of a varying number
NEAR = ("llama", "gpt_neox", "llava", "qwen2_vl")
FEW = [(row, mini) for row, mini in ALL if mini.name in NEAR]
# every method on every family; its other options and its company on the few
CASES = [(row, mini) for row, mini in ALL if mini.name in NEAR or first_of_its_kind(row)]
# for what depends on the method or on the family, not on the pair: every row on the few, some rows on every family
SOME = ("identity", "sink_window-evict", "envelope", "kv_quant", "retrieval_heads", "act", "fastv", "vtc_cls")
PAIRS = [(row, mini) for row, mini in ALL if mini.name in NEAR or row.name in SOME]
# every row once, on a family of texts if it has no need of pictures; and once more, on one with pictures
ONCE = [next(case for case in FEW if case[0] is row) for row in ROWS]
AGAIN = [next(case for case in reversed(FEW) if case[0] is row) for row in ROWS]
