"""Which architectures load. Data: a new one is a line here and a file beside this one."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxinfer.errors import CheckpointError
from jaxinfer.models.architecture import Architecture as Architecture
from jaxinfer.models.tasks import (
    BODIES,
    BOTH_WAYS,
    CLASSIFIER,
    CLASSIFY,
    EMBED,
    ENDINGS,
    GENERATE,
    HEAD_TOKENS,
    for_task,
    stem,
    wanted_task,
)
from jaxinfer.models.wrapped import (
    GEMMA3,
    GEMMA4,
    GEMMA4_UNIFIED,
    LLAMA4,
    MISTRAL3,
    QWEN2_5_VL,
    QWEN2_VL,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_VL,
    QWEN3_VL_MOE,
    Wrapped,
)

if TYPE_CHECKING:
    from jaxinfer.models.config import ModelConfig


class Entry(NamedTuple):
    """A line of the registry.

    model_type: config.json's.
    source: the Architecture, or the module that has it as ARCHITECTURE, imported when it is needed; or what holds a
        text model that has one.
    known_as: models of the kind.
    """

    model_type: str
    source: str | Architecture | Wrapped
    known_as: str


# By the class that config.json names in `architectures`.
REGISTRY: dict[str, Entry] = {
    "ArceeForCausalLM": Entry("arcee", "jaxinfer.models.arcee", "AFM 4.5B"),
    "BambaForCausalLM": Entry("bamba", "jaxinfer.models.bamba", "Bamba 9B"),
    "Cohere2ForCausalLM": Entry("cohere2", "jaxinfer.models.cohere2", "Command R7B, Command A"),
    "CohereForCausalLM": Entry("cohere", "jaxinfer.models.cohere", "Command R, Command R+, Aya 23, Aya Expanse"),
    "Dots1ForCausalLM": Entry("dots1", "jaxinfer.models.dots1", "dots.llm1"),
    "Ernie4_5ForCausalLM": Entry("ernie4_5", "jaxinfer.models.ernie4_5", "ERNIE 4.5 0.3B"),
    "Ernie4_5_MoeForCausalLM": Entry("ernie4_5_moe", "jaxinfer.models.ernie4_5_moe", "ERNIE 4.5 21B-A3B, 300B-A47B"),
    "Exaone4ForCausalLM": Entry("exaone4", "jaxinfer.models.exaone4", "EXAONE 4.0"),
    "FalconH1ForCausalLM": Entry("falcon_h1", "jaxinfer.models.falcon_h1", "Falcon-H1 0.5B to 34B"),
    "FalconMambaForCausalLM": Entry("falcon_mamba", "jaxinfer.models.falcon_mamba", "Falcon Mamba 7B"),
    "Gemma2ForCausalLM": Entry("gemma2", "jaxinfer.models.gemma2", "Gemma 2"),
    "Gemma3ForCausalLM": Entry("gemma3_text", "jaxinfer.models.gemma3", "Gemma 3 (270M, 1B, text of the others)"),
    "Gemma3ForConditionalGeneration": Entry("gemma3", GEMMA3, "Gemma 3 4B, 12B and 27B, MedGemma (text)"),
    "Gemma4ForCausalLM": Entry("gemma4_text", "jaxinfer.models.gemma4", "text of Gemma 4"),
    "Gemma4ForConditionalGeneration": Entry("gemma4", GEMMA4, "Gemma 4 E2B, E4B, 26B-A4B and 31B (text)"),
    "Gemma4UnifiedForCausalLM": Entry("gemma4_unified_text", "jaxinfer.models.gemma4_unified", "text of Gemma 4 12B"),
    "Gemma4UnifiedForConditionalGeneration": Entry("gemma4_unified", GEMMA4_UNIFIED, "Gemma 4 12B (text)"),
    "GemmaForCausalLM": Entry("gemma", "jaxinfer.models.gemma", "Gemma, CodeGemma"),
    "Glm4ForCausalLM": Entry("glm4", "jaxinfer.models.glm4", "GLM-4-0414 9B and 32B, GLM-Z1"),
    "Glm4MoeForCausalLM": Entry("glm4_moe", "jaxinfer.models.glm4_moe", "GLM-4.5, 4.6, 4.7, GLM-4.5-Air"),
    "GlmForCausalLM": Entry("glm", "jaxinfer.models.glm", "GLM-4 9B, GLM-Edge"),
    "GPT2LMHeadModel": Entry("gpt2", "jaxinfer.models.gpt2", "GPT-2, DistilGPT-2"),
    "GPTNeoXForCausalLM": Entry("gpt_neox", "jaxinfer.models.gpt_neox", "Pythia, GPT-NeoX 20B, Dolly 2, RedPajama"),
    "GptOssForCausalLM": Entry("gpt_oss", "jaxinfer.models.gpt_oss", "gpt-oss 20b and 120b"),
    "GraniteForCausalLM": Entry("granite", "jaxinfer.models.granite", "Granite 3.x (dense)"),
    "GraniteMoeForCausalLM": Entry("granitemoe", "jaxinfer.models.granitemoe", "Granite 3.x 1B-A400M, 3B-A800M"),
    "GraniteMoeHybridForCausalLM": Entry("granitemoehybrid", "jaxinfer.models.granitemoehybrid", "Granite 4.0"),
    "GraniteMoeSharedForCausalLM": Entry("granitemoeshared", "jaxinfer.models.granitemoeshared", "Granite MoE, shared"),
    "HunYuanDenseV1ForCausalLM": Entry("hunyuan_v1_dense", "jaxinfer.models.hunyuan_v1_dense", "Hunyuan 0.5B to 7B"),
    "HunYuanMoEV1ForCausalLM": Entry("hunyuan_v1_moe", "jaxinfer.models.hunyuan_v1_moe", "Hunyuan-A13B"),
    "JambaForCausalLM": Entry("jamba", "jaxinfer.models.jamba", "Jamba, Jamba 1.5 to 1.7, Jamba Reasoning 3B"),
    "Lfm2ForCausalLM": Entry("lfm2", "jaxinfer.models.lfm2", "LFM2 350M, 700M, 1.2B, 2.6B"),
    "Lfm2MoeForCausalLM": Entry("lfm2_moe", "jaxinfer.models.lfm2_moe", "LFM2-8B-A1B"),
    "Llama4ForCausalLM": Entry("llama4_text", "jaxinfer.models.llama4", "the text model of Llama 4"),
    "Llama4ForConditionalGeneration": Entry("llama4", LLAMA4, "Llama 4 Scout and Maverick (text)"),
    "LlamaForCausalLM": Entry("llama", "jaxinfer.models.llama", "Llama 2, Llama 3.x, TinyLlama, SmolLM"),
    "Mamba2ForCausalLM": Entry("mamba2", "jaxinfer.models.mamba2", "Mamba-2, Codestral Mamba"),
    "MambaForCausalLM": Entry("mamba", "jaxinfer.models.mamba", "Mamba 130M to 2.8B"),
    "MiniMaxM2ForCausalLM": Entry("minimax_m2", "jaxinfer.models.minimax_m2", "MiniMax-M2, M2.1"),
    "Ministral3ForCausalLM": Entry("ministral3", "jaxinfer.models.ministral3", "the text model of Ministral 3"),
    "MinistralForCausalLM": Entry("ministral", "jaxinfer.models.ministral", "Ministral 8B"),
    "Mistral3ForConditionalGeneration": Entry("mistral3", MISTRAL3, "Mistral Small 3.1 and 3.2, Ministral 3 (text)"),
    "MistralForCausalLM": Entry("mistral", "jaxinfer.models.mistral", "Mistral 7B, Mistral Nemo"),
    "MixtralForCausalLM": Entry("mixtral", "jaxinfer.models.mixtral", "Mixtral 8x7B and 8x22B"),
    "NemotronHForCausalLM": Entry(
        "nemotron_h", "jaxinfer.models.nemotron_h", "Nemotron-H, Nemotron 2 and 3 Nano, Super"
    ),
    "Olmo2ForCausalLM": Entry("olmo2", "jaxinfer.models.olmo2", "OLMo 2"),
    "Olmo3ForCausalLM": Entry("olmo3", "jaxinfer.models.olmo3", "Olmo 3, Olmo 3.1"),
    "OlmoeForCausalLM": Entry("olmoe", "jaxinfer.models.olmoe", "OLMoE 1B-7B"),
    "OlmoForCausalLM": Entry("olmo", "jaxinfer.models.olmo", "OLMo 1B, OLMo 7B"),
    "OPTForCausalLM": Entry("opt", "jaxinfer.models.opt", "OPT 125M to 66B, Galactica"),
    "Phi3ForCausalLM": Entry("phi3", "jaxinfer.models.phi3", "Phi-3, Phi-4"),
    "PhiForCausalLM": Entry("phi", "jaxinfer.models.phi", "Phi-1, Phi-1.5, Phi-2"),
    "PhimoeForCausalLM": Entry("phimoe", "jaxinfer.models.phimoe", "Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE"),
    "PhiMoEForCausalLM": Entry("phimoe", "jaxinfer.models.phimoe", "Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE"),
    "Qwen2ForCausalLM": Entry("qwen2", "jaxinfer.models.qwen2", "Qwen2, Qwen2.5"),
    "Qwen2MoeForCausalLM": Entry("qwen2_moe", "jaxinfer.models.qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B"),
    "Qwen2VLForConditionalGeneration": Entry("qwen2_vl", QWEN2_VL, "Qwen2-VL (text)"),
    "Qwen2_5_VLForConditionalGeneration": Entry("qwen2_5_vl", QWEN2_5_VL, "Qwen2.5-VL (text)"),
    "Qwen3_5ForCausalLM": Entry("qwen3_5_text", "jaxinfer.models.qwen3_5", "text of Qwen3.5 and 3.6 (dense)"),
    "Qwen3_5ForConditionalGeneration": Entry("qwen3_5", QWEN3_5, "Qwen3.5 and 3.6, dense (text)"),
    "Qwen3_5MoeForCausalLM": Entry("qwen3_5_moe_text", "jaxinfer.models.qwen3_5_moe", "text of Qwen3.5 and 3.6 MoE"),
    "Qwen3_5MoeForConditionalGeneration": Entry("qwen3_5_moe", QWEN3_5_MOE, "Qwen3.5 and 3.6 35B-A3B (text)"),
    "Qwen3ForCausalLM": Entry("qwen3", "jaxinfer.models.qwen3", "Qwen3 (dense)"),
    "Qwen3MoeForCausalLM": Entry("qwen3_moe", "jaxinfer.models.qwen3_moe", "Qwen3-30B-A3B, Qwen3-235B-A22B"),
    "Qwen3NextForCausalLM": Entry("qwen3_next", "jaxinfer.models.qwen3_next", "Qwen3-Next-80B-A3B, Qwen3-Coder-Next"),
    "Qwen3VLForConditionalGeneration": Entry("qwen3_vl", QWEN3_VL, "Qwen3-VL, dense (text)"),
    "Qwen3VLMoeForConditionalGeneration": Entry("qwen3_vl_moe", QWEN3_VL_MOE, "Qwen3-VL-30B-A3B, 235B-A22B (text)"),
    "SeedOssForCausalLM": Entry("seed_oss", "jaxinfer.models.seed_oss", "Seed-OSS 36B"),
    "SmolLM3ForCausalLM": Entry("smollm3", "jaxinfer.models.smollm3", "SmolLM3 3B"),
    "StableLmForCausalLM": Entry("stablelm", "jaxinfer.models.stablelm", "StableLM 3B, StableLM 2, Stable Code"),
    "Starcoder2ForCausalLM": Entry("starcoder2", "jaxinfer.models.starcoder2", "StarCoder2"),
}
# Encoders, which make no text, by the class without a head.
ENCODERS: dict[str, Entry] = {
    "AlbertModel": Entry("albert", "jaxinfer.models.albert", "ALBERT"),
    "BertModel": Entry("bert", "jaxinfer.models.bert", "BERT, MiniLM, BGE, E5, mxbai, LaBSE"),
    "CamembertModel": Entry("camembert", "jaxinfer.models.xlm_roberta", "CamemBERT"),
    "DebertaV2Model": Entry("deberta-v2", "jaxinfer.models.deberta_v2", "DeBERTa v2, DeBERTa v3"),
    "DistilBertModel": Entry("distilbert", "jaxinfer.models.distilbert", "DistilBERT"),
    "ElectraModel": Entry("electra", "jaxinfer.models.electra", "ELECTRA"),
    "EuroBertModel": Entry("eurobert", "jaxinfer.models.eurobert", "EuroBERT"),
    "GteModel": Entry("gte", "jaxinfer.models.gte", "GTE v1.5, gte-multilingual"),
    "MPNetModel": Entry("mpnet", "jaxinfer.models.mpnet", "MPNet, all-mpnet-base"),
    "ModernBertModel": Entry("modernbert", "jaxinfer.models.modernbert", "ModernBERT, gte-modernbert, Ettin"),
    "NewModel": Entry("new", "jaxinfer.models.gte", "GTE v1.5, gte-multilingual, Snowflake Arctic m v2"),
    "NomicBertModel": Entry("nomic_bert", "jaxinfer.models.nomic_bert", "nomic-embed-text v1, v1.5"),
    "RobertaModel": Entry("roberta", "jaxinfer.models.roberta", "RoBERTa, all-distilroberta"),
    "XLMRobertaModel": Entry("xlm-roberta", "jaxinfer.models.xlm_roberta", "XLM-R, BGE-M3, multilingual E5"),
}
STATIC = "model2vec"
# Tables of vectors, whose config.json is made up: see checkpoint/static.py.
TABLES = {"StaticModel": Entry(STATIC, "jaxinfer.models.model2vec", "Model2Vec, potion, static-retrieval-mrl")}


def register(name: str, model_type: str, source: str | Architecture | Wrapped, known_as: str = "") -> None:
    """Lets models load whose config.json has the class `name` in `architectures`, and this `model_type`; from outside
    of the package, too. source: see Entry. Takes the place of what was registered under the same name."""
    if not isinstance(source, str | Architecture | Wrapped):
        raise TypeError(f"source is a {type(source).__name__}: it must be an Architecture, or a module that has one")
    REGISTRY[name] = Entry(model_type, source, known_as)


def model_types() -> list[str]:
    """All that are known and make text."""
    return list(dict.fromkeys(entry.model_type for entry in REGISTRY.values()))


def encoder_types() -> list[str]:
    """All that are known and make none."""
    return list(dict.fromkeys(entry.model_type for entry in ENCODERS.values()))


def task_of(data: Mapping[str, Any]) -> str:
    """What the class is for that comes first in `architectures` of a config.json's content."""
    named = data.get("architectures")
    name = named[0] if isinstance(named, list) and named else ""
    if isinstance(name, str) and name.endswith(CLASSIFIER):
        return CLASSIFY
    return EMBED if data.get("model_type") in encoder_types() or data.get(BOTH_WAYS) is True else GENERATE


def only_text(data: Mapping[str, Any]) -> str:
    """Why a model of a config.json's content takes nothing but text, as a clause."""
    model_type = data.get("model_type")
    for entry in REGISTRY.values():
        if entry.model_type == model_type and isinstance(entry.source, Wrapped):
            return f"{entry.source.name or model_type}'s {entry.source.tower} is not loaded, its text model alone is"
    return f"{model_type} is a text model" if model_type in model_types() else "jaxinfer runs text models"


def nearest(model_type: object) -> str:
    """What to say of one that is not known."""
    near = difflib.get_close_matches(model_type, model_types(), 5) if isinstance(model_type, str) else []
    if near:  # the newest version of the same is nearer than its first: gemma3 to gemma4
        stem = re.sub(r"\d.*", "", str(model_type))
        versions = [name for name in near if re.fullmatch(rf"{re.escape(stem)}\d*", name)]
        near[0] = max(versions, default=near[0])
    return (f", and {near[0]!r} is" if near else "") + "; `jaxinfer models` lists all"


def architecture(data: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json's content: that of the class which comes first in `architectures`, which has to
    be one of its `model_type`. Raises CheckpointError that lists what is known.

    Where no class is named, or the body without a head (LlamaModel), it is the first one of the `model_type`: whether
    there is a head after all is for the loader to see. A class with another head, or with one more, is refused: what is
    its own would be missing in silence.
    """
    task = wanted_task(data)
    if task != GENERATE:
        return for_task(_loaded(*_named(data, task)), task)
    model_type, named = data.get("model_type"), data.get("architectures")
    known = {name: entry for name, entry in REGISTRY.items() if entry.model_type == model_type}
    if not known and model_type in encoder_types():
        raise CheckpointError(f"model_type {model_type!r:.100} is an encoder: it makes no text")
    if not known:
        raise CheckpointError(f"model_type {model_type!r:.100} is not supported{nearest(model_type)}")
    if named is not None and not (isinstance(named, list) and all(isinstance(class_name, str) for class_name in named)):
        raise CheckpointError(f"config.json: architectures is {named!r:.100}: it must be a list of names of classes")
    name = named[0] if named else None
    bodies = {re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", n) + "Model" for n in known}
    if name is None or name in bodies:
        name = next(iter(known))
    if name not in known:
        raise CheckpointError(
            f"config.json: architectures is {named!r:.100}: supported with model_type {model_type} are "
            f"{', '.join(known)}"
        )
    return _loaded(name, known[name], data)


def _named(data: Mapping[str, Any], task: str) -> tuple[str, Entry, Mapping[str, Any]]:
    """What is registered of the class that config.json names, for a task that makes no text: the same body may be an
    encoder's, or a decoder's. Raises CheckpointError that lists what is known."""
    model_type, named = data.get("model_type"), data.get("architectures")
    known = {name: entry for name, entry in (TABLES | ENCODERS | REGISTRY).items() if entry.model_type == model_type}
    if not known:
        raise CheckpointError(f"model_type {model_type!r:.100} is not supported{nearest(model_type)}")
    if task == CLASSIFY:  # heads of models that see take images
        known = {name: entry for name, entry in known.items() if not isinstance(entry.source, Wrapped)}
    name = named[0] if isinstance(named, list) and named else None
    stems = {stem(known_name): known_name for known_name in reversed(known)}
    found = next(iter(known)) if name is None and task == EMBED else None
    endings = ENDINGS[task] if data.get(HEAD_TOKENS) is None else (*ENDINGS[task], *BODIES)
    if isinstance(name, str) and name.endswith(endings):
        found = stems.get(stem(name))
    if found is None:
        classes = ", ".join(base + ending for base in stems for ending in ENDINGS[task]) or "nothing"
        raise CheckpointError(
            f"config.json: architectures is {named!r:.100}: to {task} with model_type {model_type} it can be {classes}"
        )
    return found, known[found], data


def _loaded(name: str, entry: Entry, data: Mapping[str, Any]) -> Architecture:
    """What is registered."""
    source: object = entry.source
    if isinstance(source, Wrapped):
        from jaxinfer.models.unwrap import text_architecture

        return text_architecture(source, data)
    if isinstance(source, str):
        try:
            module = importlib.import_module(source)
        except ImportError as error:
            raise ValueError(f"{name} was registered with module {source}, which can't be imported: {error}") from None
        source = getattr(module, "ARCHITECTURE", None)
    if not isinstance(source, Architecture):
        raise ValueError(f"{name} was registered with module {entry.source}, which has no ARCHITECTURE")
    return source


def parse_config(data: Mapping[str, Any]) -> tuple[Architecture, ModelConfig]:
    """The architecture and checked configuration of a config.json's content. Raises ValueError naming the field."""
    from jaxinfer.models.config import PER_LAYER, ConfigReader

    arch = architecture(data)
    fields = ConfigReader(data)
    for name in ("is_encoder_decoder", "add_cross_attention"):
        fields.refuse(name, False)
    if not arch.per_layer:
        fields.refuse(PER_LAYER, {})
    if wanted_task(data) == GENERATE and arch.both_ways is not None:
        fields.refuse(BOTH_WAYS, False)
    return arch, arch.parse(fields)
