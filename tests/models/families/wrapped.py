"""Text models inside of vision-language models, with towers that are small but real."""

import json
from dataclasses import replace
from pathlib import Path

from safetensors.numpy import load_file, save_file

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.mixtral import routed

AUTO = "AutoModelForImageTextToText"
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "patch_size": 2,
    "image_size": 8,
}
QWEN = {"depth": 1, "num_heads": 2, "patch_size": 2}
QWEN2 = QWEN | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 1}
QWEN2_5 = QWEN | {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
QWEN3 = QWEN | {
    "hidden_size": 16,
    "intermediate_size": 16,
    "out_hidden_size": 32,
    "num_position_embeddings": 4,
    "deepstack_visual_indexes": [0],
}
SECTIONS = {"mrope_section": [1, 1, 2], "rope_theta": 5000.0, "rope_type": "default"}
MILLION = SECTIONS | {"rope_theta": 1000000.0}
WOVEN = {"mrope_section": [2, 2, 2], "mrope_interleaved": True, "rope_theta": 5000.0, "rope_type": "default"}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "rope_type": "yarn"}
TIED = {"tie_word_embeddings": True}
SLIDING = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}


def edit(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def rename(folder: Path, **beginnings: str) -> None:
    """The tensors' names begin otherwise: the first one that fits counts."""
    path = folder / "model.safetensors"
    renamed = {}
    for name, value in load_file(path).items():
        old = next((b for b in beginnings if name.startswith(b)), None)
        renamed[name if old is None else beginnings[old] + name.removeprefix(old)] = value
    assert renamed.keys() != load_file(path).keys()
    save_file(renamed, path)


def in_the_model(folder: Path) -> None:
    """As the modules of transformers 5 are called."""
    inside = {name: f"model.{name}" for name in ("vision_tower.", "multi_modal_projector.", "visual.")}
    llava = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model."}
    rename(folder, **llava, **inside, **{"model.": "model.language_model."})


def in_place_of_towers(folder: Path) -> None:
    """As the modules of transformers 5 are called."""
    rename(folder, **{"model.vision_embedder.": "model.embed_vision."})


def flat(folder: Path) -> None:
    """As the first releases of Qwen2-VL have it: no text_config, and rope_scaling of type mrope."""

    def change(config):
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope["rope_theta"]}
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
        config |= {
            name: value
            for name, value in text.items()
            if name not in ("model_type", "layer_types", "tie_word_embeddings")
        }

    edit(folder, change)


def tied_inside(folder: Path) -> None:
    """As transformers 4 has it."""

    def change(config):
        del config["tie_word_embeddings"]
        config["text_config"]["tie_word_embeddings"] = True

    edit(folder, change)


def silent(folder: Path) -> None:
    """Neither says whether head and embedding are one, nor what the text model is."""

    def change(config):
        del config["tie_word_embeddings"]
        del config["text_config"]["tie_word_embeddings"]
        del config["text_config"]["model_type"]

    edit(folder, change)


def as_on_the_hub(folder: Path) -> None:
    """As transformers 4 has Qwen3-VL with experts: they are `[E, in, out]`."""

    def change(config):
        text = config["text_config"]
        text["num_experts"] = text.pop("num_local_experts")
        text["norm_topk_prob"] = True
        del text["tie_word_embeddings"]

    edit(folder, change)
    path = folder / "model.safetensors"
    tensors = {
        name: value.swapaxes(1, 2).copy() if ".experts." in name else value for name, value in load_file(path).items()
    }
    save_file(tensors, path)


def sparse(text_class: str):
    """text_config lacks what it has by default, as files of the hub do."""

    def change(folder: Path) -> None:
        import transformers

        default = getattr(transformers, text_class)().to_dict()

        def kept(config):
            text = config["text_config"]
            if text["rope_parameters"]["rope_theta"] == default["rope_parameters"]["rope_theta"]:
                del text["rope_parameters"]["rope_theta"]
            config["text_config"] = {
                name: value
                for name, value in text.items()
                if name != "layer_types" and (name == "model_type" or name not in default or value != default[name])
            }
            assert len(config["text_config"]) < len(text) - 5

        edit(folder, kept)

    return change


def wrapped(config: str, text: dict, vision: dict, change=None, **fields) -> Variant:
    parts = {"text_config": BASE | text, "vision_config": vision, "tie_word_embeddings": False}
    return Variant(config, parts | fields, change, AUTO)


SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 2,
    "image_size": 8,
}
GEMMA = {
    "num_hidden_layers": 3,
    "head_dim": 16,
    "query_pre_attn_scalar": 6,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GEMMA4 = GEMMA | {
    "global_head_dim": 24,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
    "pad_token_id": 0,
}
INPUTS = {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 300}
EXPERTS = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 24}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 2,
    "position_embedding_size": 16,
}
AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [4, 4],
    "output_proj_dims": 16,
}
PATCHES = {"mm_embed_dim": 16, "mm_posemb_size": 4, "output_proj_dims": 32, "patch_size": 2}
MISTRAL = {"model_type": "mistral", "head_dim": 8, "sliding_window": None}
MOE = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
VARIANTS = {
    "qwen2_vl": wrapped("Qwen2VLConfig", {"rope_parameters": SECTIONS}, QWEN2),
    "qwen2_vl-flat": wrapped("Qwen2VLConfig", {"rope_parameters": SECTIONS}, QWEN2, flat, **TIED),
    "qwen2_vl-in-the-model": wrapped("Qwen2VLConfig", {"rope_parameters": SECTIONS}, QWEN2, in_the_model),
    "qwen2_5_vl": wrapped("Qwen2_5_VLConfig", {"rope_parameters": SECTIONS} | SLIDING, QWEN2_5),
    "qwen2_5_vl-yarn": wrapped("Qwen2_5_VLConfig", {"rope_parameters": SECTIONS | YARN}, QWEN2_5, tied_inside, **TIED),
    "qwen2_5_vl-sparse": wrapped(
        "Qwen2_5_VLConfig", {"rope_parameters": MILLION}, QWEN2_5, sparse("Qwen2_5_VLTextConfig")
    ),
    "qwen3_vl-sparse": wrapped("Qwen3VLConfig", {"head_dim": 8}, QWEN3, sparse("Qwen3VLTextConfig")),
    "qwen3_vl": wrapped("Qwen3VLConfig", {"head_dim": 12, "rope_parameters": WOVEN}, QWEN3),
    "qwen3_vl-bias-tied": wrapped("Qwen3VLConfig", {"head_dim": 8, "attention_bias": True}, QWEN3, tied_inside, **TIED),
    "qwen3_vl_moe": wrapped("Qwen3VLMoeConfig", MOE | {"head_dim": 12, "rope_parameters": WOVEN}, QWEN3),
    "qwen3_vl_moe-turned-bias-tied": wrapped(
        "Qwen3VLMoeConfig",
        MOE | {"attention_bias": True, "num_hidden_layers": 3, "decoder_sparse_step": 2, "mlp_only_layers": [0]},
        QWEN3,
        as_on_the_hub,
        **TIED,
    ),
    "qwen3_vl_moe-square-sparse": wrapped(
        "Qwen3VLMoeConfig", MOE | {"moe_intermediate_size": 16}, QWEN3, sparse("Qwen3VLMoeTextConfig")
    ),
    "gemma3": wrapped("Gemma3Config", GEMMA, SIGLIP, mm_tokens_per_image=16),
    "gemma3-tied": wrapped("Gemma3Config", GEMMA, SIGLIP, silent, mm_tokens_per_image=16, **TIED),
    "gemma4": wrapped("Gemma4Config", GEMMA4 | INPUTS | EXPERTS, TOWER, audio_config=AUDIO),
    "gemma4-tied": wrapped("Gemma4Config", GEMMA4 | INPUTS, TOWER, silent, **TIED),
    "gemma4_unified": wrapped("Gemma4UnifiedConfig", GEMMA4, PATCHES, audio_config={"audio_embed_dim": 8}),
    "gemma4_unified-tied": wrapped("Gemma4UnifiedConfig", GEMMA4, PATCHES, in_place_of_towers, **TIED),
    "mistral3": wrapped("Mistral3Config", MISTRAL, PIXTRAL),
    "mistral3-in-the-model": wrapped("Mistral3Config", MISTRAL | {"sliding_window": 11}, PIXTRAL, in_the_model),
    "mistral3-tied": wrapped("Mistral3Config", MISTRAL, PIXTRAL, silent, **TIED),
}


def theta(config):
    return replace(config, ropes=tuple(replace(rope, theta=1000.0) for rope in config.ropes))


def linear(config):
    return replace(config, ropes=tuple(replace(rope, kind="linear") for rope in config.ropes))


MUTANTS = {
    "qwen2_vl: theta": Mutant("qwen2_vl", theta),
    "qwen2_vl: flat theta": Mutant("qwen2_vl-flat", theta),
    "qwen2_vl: eps": Mutant("qwen2_vl", lambda config: replace(config, norm_eps=1e-2)),
    "qwen2_5_vl: window": Mutant("qwen2_5_vl", lambda config: replace(config, windows=(None, 12))),
    "qwen2_5_vl: which layers": Mutant("qwen2_5_vl", lambda config: replace(config, windows=(11, 11))),
    "qwen2_5_vl: yarn": Mutant("qwen2_5_vl-yarn", linear),
    "qwen3_vl: theta": Mutant("qwen3_vl", theta),
    "qwen3_vl: default theta": Mutant("qwen3_vl-bias-tied", theta),
    "qwen3_vl: eps": Mutant("qwen3_vl", lambda config: replace(config, norm_eps=1e-2)),
    "qwen3_vl_moe: theta": Mutant("qwen3_vl_moe", theta),
    "qwen3_vl_moe: eps": Mutant("qwen3_vl_moe", lambda config: replace(config, norm_eps=1e-2)),
    "qwen3_vl_moe: activation": Mutant("qwen3_vl_moe", lambda config: replace(config, activation="gelu")),
    "qwen3_vl_moe: shares add up to one": Mutant("qwen3_vl_moe", routed(normalized=False)),
    "qwen3_vl_moe: how many experts": Mutant("qwen3_vl_moe-turned-bias-tied", routed(top_k=2)),
    "qwen3_vl_moe: default theta": Mutant("qwen3_vl_moe-square-sparse", theta),
    "gemma3: window in a wrapper": Mutant("gemma3", lambda config: replace(config, windows=(12, None, 13))),
    "gemma4: window in a wrapper": Mutant("gemma4", lambda config: replace(config, windows=(13, None, None))),
    "gemma4: which layers slide, in a wrapper": Mutant(
        "gemma4", lambda config: replace(config, windows=(12, 12, None))
    ),
    "gemma4_unified: window in a wrapper": Mutant(
        "gemma4_unified", lambda config: replace(config, windows=(13, None, None))
    ),
    "qwen2_5_vl: default theta": Mutant("qwen2_5_vl-sparse", theta),
    "mistral3: window": Mutant("mistral3-in-the-model", lambda config: replace(config, windows=(12, 12))),
}
