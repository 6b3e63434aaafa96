from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant, of_ropes
from tests.models.families.mixtral import routed
from tests.models.families.wrapped import AUTO, edit, in_the_model

DEEP = BASE | {"num_hidden_layers": 4, "head_dim": 8, "intermediate_size": 24, "intermediate_size_mlp": 40}
TEMPERATURE = {"floor_scale": 9, "attn_scale": 0.8}
SCOUT = DEEP | {"num_local_experts": 5, "attention_chunk_size": 16, **TEMPERATURE}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "original_max_position_embeddings": 32}
STEP = LLAMA3 | {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
RAMP = LLAMA3 | {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MAVERICK = SCOUT | {"interleave_moe_layer_step": 2, "use_qk_norm": False, "attention_chunk_size": 20}
TYPES = ["full_attention", "chunked_attention", "full_attention", "chunked_attention"]
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 2,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
WRAPPED = {"text_config": SCOUT, "vision_config": VISION, "tie_word_embeddings": False}


def older(folder):
    """As the first files on the hub say it."""

    def change(config):
        text = config["text_config"]
        for name in ("layer_types", "moe_layers", "tie_word_embeddings"):
            del text[name]
        text |= {"attn_temperature_tuning": 4, "no_rope_layers": [], "for_llm_compressor": False}
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}

    edit(folder, change)


VARIANTS = {
    "llama4_text": Variant("Llama4TextConfig", SCOUT | {"rope_parameters": STEP}),
    "llama4_text-ramp": Variant("Llama4TextConfig", SCOUT | {"rope_parameters": RAMP, "num_experts_per_tok": 2}),
    "llama4_text-dense": Variant("Llama4TextConfig", MAVERICK | {"hidden_act": "gelu", "num_local_experts": 8}),
    "llama4_text-layers": Variant(
        "Llama4TextConfig",
        MAVERICK
        | {
            "use_qk_norm": True,
            "moe_layers": [0, 3],
            "layer_types": TYPES,
            "no_rope_layers": [1, 1, 0, 0],
            "attention_bias": True,
            "tie_word_embeddings": True,
            "num_experts_per_tok": 3,
        },
    ),
    "llama4_text-full": Variant(
        "Llama4TextConfig",
        DEEP
        | {"attention_chunk_size": None, "attn_temperature_tuning": False, "moe_layers": [], "num_key_value_heads": 4},
    ),
    "llama4": Variant("Llama4Config", WRAPPED, auto=AUTO),
    "llama4-older": Variant("Llama4Config", WRAPPED | {"text_config": SCOUT | {"rope_parameters": STEP}}, older, AUTO),
    "llama4-in-the-model": Variant(
        "Llama4Config", WRAPPED | {"text_config": MAVERICK | {"no_rope_layer_interval": 2}}, in_the_model, AUTO
    ),
}


def tempered(**changes):
    return lambda config: replace(
        config, temperatures=tuple(each and replace(each, **changes) for each in config.temperatures)
    )


def changed(**changes):
    return lambda config: replace(config, **changes)


MUTANTS = {
    "llama4: eps": Mutant("llama4_text", changed(norm_eps=1e-2)),
    "llama4: activation": Mutant("llama4_text", changed(activation="gelu")),
    "llama4: no norms": Mutant("llama4_text", changed(qk_norm=False)),
    "llama4: norms": Mutant("llama4_text-dense", changed(qk_norm=True)),
    "llama4: halves turn": Mutant("llama4_text", of_ropes(interleaved=False)),
    "llama4: all layers turn": Mutant("llama4_text", lambda config: replace(config, ropes=config.ropes[:1] * 4)),
    "llama4: none turns": Mutant("llama4_text", changed(ropes=(None,) * 4)),
    "llama4: a ramp": Mutant("llama4_text", of_ropes(high_freq_factor=4.0)),
    "llama4: a step": Mutant("llama4_text-ramp", of_ropes(high_freq_factor=1.0)),
    "llama4: default theta": Mutant("llama4_text-dense", of_ropes(theta=10000.0)),
    "llama4: chunk + 1": Mutant("llama4_text", changed(chunks=(17, 17, 17, None))),
    "llama4: no chunks": Mutant("llama4_text", changed(chunks=())),
    "llama4: a window": Mutant("llama4_text", changed(chunks=(), windows=(16, 16, 16, None))),
    "llama4: chunks everywhere": Mutant("llama4_text", changed(chunks=(16,) * 4)),
    "llama4: which layers have chunks": Mutant("llama4_text-layers", changed(chunks=(20, None, 20, None))),
    "llama4: no temperature": Mutant("llama4_text", changed(temperatures=())),
    "llama4: first positions": Mutant("llama4_text", tempered(ahead=0)),
    "llama4: floor_scale": Mutant("llama4_text", tempered(every=10)),
    "llama4: attn_scale": Mutant("llama4_text", tempered(beta=0.7)),
    "llama4: shares of what experts make": Mutant("llama4_text", routed(of_inputs=False)),
    "llama4: softmax": Mutant("llama4_text-ramp", routed(scores="softmax")),
    "llama4: how many experts": Mutant("llama4_text-ramp", routed(top_k=3)),
    "llama4: chunks in a wrapper": Mutant("llama4", changed(chunks=(15, 15, 15, None))),
    "llama4: 4 is true": Mutant("llama4-older", changed(temperatures=())),
    "llama4: interval in a wrapper": Mutant(
        "llama4-in-the-model", lambda config: replace(config, ropes=config.ropes[:1] * 4)
    ),
}
