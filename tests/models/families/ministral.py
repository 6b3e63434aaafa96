from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant, of_ropes
from tests.models.families.wrapped import PIXTRAL

ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.7,
}
TEXT = BASE | {"rope_parameters": ROPE, "head_dim": 12}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
VARIANTS = {
    "ministral": Variant("MinistralConfig", BASE | {"sliding_window": 11, "head_dim": 8}),
    "ministral-layers": Variant("MinistralConfig", BASE | {"sliding_window": 11, "head_dim": 12} | LAYERS),
    "ministral-full": Variant(
        "MinistralConfig",
        BASE
        | {"sliding_window": 11, "layer_types": ["full_attention"] * 2, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "ministral3": Variant("Ministral3Config", TEXT),
    "ministral3-window": Variant("Ministral3Config", TEXT | {"sliding_window": 20, "tie_word_embeddings": True}),
    "ministral3-plain": Variant(
        "Ministral3Config",
        BASE
        | {"head_dim": 8, "rope_parameters": ROPE | {"rope_type": "default", "original_max_position_embeddings": 9}},
    ),
    "ministral3-defaults": Variant("Ministral3Config", BASE | {"head_dim": 8}),
    "mistral3-ministral3": Variant(
        "Mistral3Config",
        {"text_config": TEXT | {"model_type": "ministral3"}, "vision_config": PIXTRAL, "tie_word_embeddings": False},
        auto="AutoModelForImageTextToText",
    ),
}


def tempered(**changes):
    return lambda config: replace(config, temperatures=(replace(config.temperatures[0], **changes),) * 2)


MUTANTS = {
    "ministral: window": Mutant("ministral", lambda config: replace(config, windows=(12, 12))),
    "ministral: which layers": Mutant("ministral-layers", lambda config: replace(config, windows=(None, 11))),
    "ministral: eps": Mutant("ministral", lambda config: replace(config, norm_eps=1e-2)),
    "ministral3: beta": Mutant("ministral3", tempered(beta=0.5)),
    "ministral3: no beta": Mutant("ministral3", tempered(beta=0.0)),
    "ministral3: original context": Mutant("ministral3", tempered(every=17)),
    "ministral3: beta with a window": Mutant("ministral3-window", tempered(beta=0.5)),
    "ministral3: window": Mutant("ministral3-window", lambda config: replace(config, windows=(21, 21))),
    "ministral3: attention factor": Mutant("ministral3", of_ropes(attention_factor=1.13863)),
    "ministral3: yarn": Mutant("ministral3", of_ropes(kind="linear")),
    "ministral3: first positions": Mutant("ministral3", tempered(ahead=1)),
}
