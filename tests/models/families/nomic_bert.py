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


def parted(tensors, whole, parts):
    """With some tensors cut into parts of the same size."""
    import numpy as np

    for name in [name for name in tensors if whole in name]:
        pieces = np.split(tensors.pop(name), len(parts))
        tensors |= {name.replace(whole, part): piece.copy() for part, piece in zip(parts, pieces, strict=True)}
    return tensors


QKV = [f"self_attn.{part}_proj" for part in "qkv"]


def of_the_hub(folder):
    """What the hub's own code says; its names are those that transformers writes, too."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    theta = data.pop("rope_parameters")["rope_theta"]
    data = {SPELT.get(name, name): value for name, value in data.items()}
    said = {"rotary_emb_base": theta, "activation_function": "swiglu", "prenorm": False, "rotary_emb_fraction": 1.0}
    path.write_text(json.dumps(data | said | {"architectures": ["NomicBertModel"]}))


def as_in_memory(folder):
    """The names that transformers has itself."""
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    ours = {theirs: ours for ours, theirs in NAMES.items()}
    save_file(renamed(parted(load_file(file), "attn.Wqkv", QKV), ours), file)


VARIANTS = {
    "nomic_bert": Variant("NomicBertConfig", FIELDS, auto=BODY),
    "nomic_bert-hub": Variant("NomicBertConfig", FIELDS | THETA, of_the_hub, auto=BODY),
    "nomic_bert-words": Variant(
        "NomicBertConfig", FIELDS | {"hidden_act": "gelu"}, as_in_memory, auto="AutoModelForMaskedLM"
    ),
    "nomic_bert-classes": Variant("NomicBertConfig", FIELDS | THREE | {"head_dim": 12}, auto=CLASSES),
}
MUTANTS = {
    "nomic_bert: activation": Mutant("nomic_bert", lambda config: replace(config, activation="gelu")),
    "nomic_bert: theta": Mutant("nomic_bert", of_ropes(theta=10000.0)),
    "nomic_bert: eps": Mutant("nomic_bert", lambda config: replace(config, norm_eps=1e-2)),
    "nomic_bert: scale": Mutant("nomic_bert-classes", lambda config: replace(config, scale=8**-0.5)),
}
