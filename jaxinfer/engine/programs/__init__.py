"""The programs of an engine: what runs on the devices. A file for each kind: the arrays that it takes, the function."""

from jaxinfer.engine.programs.adapters import AdapterLimits, placed_adapters
from jaxinfer.engine.programs.base import (
    MAX_STEPS,
    Function,
    Key,
    ModelPrograms,
    Program,
    adapted_kind,
    cache_layout,
    placed_decode_state,
    placed_hidden,
    placed_params,
    reach,
)
from jaxinfer.engine.programs.copy import Copy, Places
from jaxinfer.engine.programs.decode import Decode, DecodeForward, DecodeRows, FullDecode
from jaxinfer.engine.programs.forward import Forward
from jaxinfer.engine.programs.logits import Sampled
from jaxinfer.engine.programs.sample import FullSample, GuidedSample, Sample, SampleRows
from jaxinfer.engine.programs.score import Score, Scored
from jaxinfer.engine.programs.slots import (
    LoadAdapter,
    LoadScaledAdapter,
    LoadTable,
    PrepareCounts,
    PrepareMasks,
    PreparePlaces,
    Zeros,
)
from jaxinfer.engine.programs.state import State
from jaxinfer.engine.programs.table import Programs

__all__ = [
    "MAX_STEPS",
    "AdapterLimits",
    "Copy",
    "Decode",
    "DecodeForward",
    "DecodeRows",
    "Forward",
    "FullDecode",
    "FullSample",
    "Function",
    "GuidedSample",
    "Key",
    "LoadAdapter",
    "LoadScaledAdapter",
    "LoadTable",
    "ModelPrograms",
    "Places",
    "PrepareCounts",
    "PrepareMasks",
    "PreparePlaces",
    "Program",
    "Programs",
    "Sample",
    "SampleRows",
    "Sampled",
    "Score",
    "Scored",
    "State",
    "Zeros",
    "adapted_kind",
    "cache_layout",
    "placed_adapters",
    "placed_decode_state",
    "placed_hidden",
    "placed_params",
    "reach",
]
