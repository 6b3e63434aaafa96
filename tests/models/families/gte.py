import json
from dataclasses import replace

from tests.models.families import BODY, CLASSES, Mutant, Variant, of_ropes
from tests.models.families.bert import FIELDS, THREE
from tests.models.families.nomic_bert import joined, renamed

NAMES = {
    "layers.": "encoder.layer.",
    ".self_attn.o_proj.": ".attention.o_proj.",
    ".post_attention_layernorm.": ".attn_ln.",
    ".post_mlp_layernorm.": ".mlp_ln.",
    "gte.": "new.",
}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}}


def of_the_hub(folder):
    """What the hub's own code has."""
    from safetensors.numpy import load_file, save_file

    path, file = folder / "config.json", folder / "model.safetensors"
    data = json.loads(path.read_text())
    theta = data.pop("rope_parameters")["rope_theta"]
    names = [name.replace("Gte", "New") for name in data["architectures"]]
    said = {"rope_theta": theta, "pack_qkv": True, "position_embedding_type": "rope", "rope_scaling": None}
    path.write_text(json.dumps(data | said | {"architectures": names, "model_type": "new"}))
    tensors = joined(load_file(file), [f"self_attn.{part}_proj" for part in "qkv"], "attention.qkv_proj")
    save_file(renamed(joined(tensors, ["mlp.up_proj", "mlp.gate_proj"], "mlp.up_gate_proj"), NAMES), file)


VARIANTS = {
    "gte": Variant("GteConfig", FIELDS | LINEAR, auto=BODY),
    "new": Variant("GteConfig", FIELDS | {"type_vocab_size": 0, "hidden_act": "gelu_new"}, of_the_hub, auto=BODY),
    "gte-words": Variant("GteConfig", FIELDS | {"type_vocab_size": 2}, auto="AutoModelForMaskedLM"),
    "gte-classes": Variant("GteConfig", FIELDS | THREE, auto=CLASSES),
    "new-classes": Variant("GteConfig", FIELDS | THREE, of_the_hub, auto=CLASSES),
}
MUTANTS = {
    "gte: activation": Mutant("gte", lambda config: replace(config, activation="silu")),
    "gte: theta": Mutant("gte-words", of_ropes(theta=10000.0)),
    "gte: scaling": Mutant("gte", of_ropes(kind="default")),
    "gte: eps": Mutant("gte", lambda config: replace(config, norm_eps=1e-2)),
}
