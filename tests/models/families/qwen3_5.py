from tests.models.families import BASE, Mutant, Variant, of_ropes
from tests.models.families.mixtral import routed
from tests.models.families.qwen3_next import BOTH, DELTA_NET, EXPERTS, delta_nets
from tests.models.families.wrapped import AUTO

TOWER = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "out_hidden_size": 32,
    "num_position_embeddings": 4,
}
TEXT = BASE | DELTA_NET
WOVEN = {"mrope_section": [1, 1, 2], "mrope_interleaved": True, "rope_theta": 5000.0, "rope_type": "default"}
WOVEN |= {"partial_rotary_factor": 0.5}
FOUR = {"num_hidden_layers": 4, "rms_norm_eps": 1e-2, "linear_num_key_heads": 1, "rope_parameters": WOVEN}
VARIANTS = {
    "qwen3_5_text": Variant("Qwen3_5TextConfig", TEXT | {"layer_types": BOTH}),
    "qwen3_5_text-pattern-bias-tied": Variant(
        "Qwen3_5TextConfig", TEXT | FOUR | {"attention_bias": True, "tie_word_embeddings": True}
    ),
    "qwen3_5": Variant("Qwen3_5Config", {"text_config": TEXT | FOUR, "vision_config": TOWER}, auto=AUTO),
    "qwen3_5_moe_text": Variant("Qwen3_5MoeTextConfig", TEXT | EXPERTS | {"layer_types": BOTH}),
    "qwen3_5_moe": Variant(
        "Qwen3_5MoeConfig", {"text_config": TEXT | EXPERTS | FOUR, "vision_config": TOWER}, auto=AUTO
    ),
}
MUTANTS = {
    "qwen3_5: which part turns": Mutant("qwen3_5_text", of_ropes(dim=8)),
    "qwen3_5: activation of the convolution": Mutant("qwen3_5_text", delta_nets(activation="gelu")),
    "qwen3_5_moe: shares add up to one": Mutant("qwen3_5_moe_text", routed(normalized=False)),
}
