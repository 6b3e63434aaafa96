import json
from dataclasses import replace

from tests.models.families import BODY, CLASSES, Mutant, Variant, of_ropes
from tests.models.families.bert import FIELDS as BERT
from tests.models.families.bert import THREE

FIELDS = BERT | {"pad_token_id": 0}

SPELT = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}
NAMES = {
    "embeddings.LayerNorm.": "emb_ln.",
    "layers.": "encoder.layers.",
    ".self_attn.o_proj.": ".attn.out_proj.",
    ".up_proj.": ".fc11.",
    ".gate_proj.": ".fc12.",
    ".down_proj.": ".fc2.",
    ".post_attention_layernorm.": ".norm1.",
    ".post_mlp_layernorm.": ".norm2.",
}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}


def renamed(tensors, names):
    """Tensors of a file under other names."""
    out = {}
    for name, tensor in tensors.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        out[name] = tensor
    return out


def joined(tensors, parts, whole):
    """With some tensors as parts of one."""
    import numpy as np

    first = parts[0]
    for name in [name for name in tensors if first in name]:
        tensors[name.replace(first, whole)] = np.concatenate([tensors.pop(name.replace(first, part)) for part in parts])
    return tensors


def of_the_hub(folder):
    """What the hub's own code has."""
    from safetensors.numpy import load_file, save_file

    path, file = folder / "config.json", folder / "model.safetensors"
    data = json.loads(path.read_text())
    theta = data.pop("rope_parameters")["rope_theta"]
    data = {SPELT.get(name, name): value for name, value in data.items()}
    said = {"rotary_emb_base": theta, "activation_function": "swiglu", "prenorm": False, "rotary_emb_fraction": 1.0}
    path.write_text(json.dumps(data | said | {"architectures": ["NomicBertModel"]}))
    tensors = joined(load_file(file), [f"self_attn.{part}_proj" for part in "qkv"], "attn.Wqkv")
    save_file(renamed(tensors, NAMES), file)


VARIANTS = {
    "nomic_bert": Variant("NomicBertConfig", FIELDS, auto=BODY),
    "nomic_bert-hub": Variant("NomicBertConfig", FIELDS | THETA, of_the_hub, auto=BODY),
    "nomic_bert-words": Variant("NomicBertConfig", FIELDS | {"hidden_act": "gelu"}, auto="AutoModelForMaskedLM"),
    "nomic_bert-classes": Variant("NomicBertConfig", FIELDS | THREE | {"head_dim": 12}, auto=CLASSES),
}
MUTANTS = {
    "nomic_bert: activation": Mutant("nomic_bert", lambda config: replace(config, activation="gelu")),
    "nomic_bert: theta": Mutant("nomic_bert", of_ropes(theta=10000.0)),
    "nomic_bert: eps": Mutant("nomic_bert", lambda config: replace(config, norm_eps=1e-2)),
    "nomic_bert: scale": Mutant("nomic_bert-classes", lambda config: replace(config, scale=8**-0.5)),
}
