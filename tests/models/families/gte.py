import json
from dataclasses import replace

from tests.models.families import BODY, CLASSES, Mutant, Variant, of_ropes
from tests.models.families.bert import FIELDS, THREE
from tests.models.families.nomic_bert import QKV, parted, renamed

NAMES = {
    "layers.": "encoder.layer.",
    ".self_attn.o_proj.": ".attention.o_proj.",
    ".post_attention_layernorm.": ".attn_ln.",
    ".post_mlp_layernorm.": ".mlp_ln.",
}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}}


def of_the_hub(folder):
    """What the hub's own code says; its names are those that transformers writes, too, but for the body's."""
    from safetensors.numpy import load_file, save_file

    path, file = folder / "config.json", folder / "model.safetensors"
    data = json.loads(path.read_text())
    theta = data.pop("rope_parameters")["rope_theta"]
    names = [name.replace("Gte", "New") for name in data["architectures"]]
    said = {"rope_theta": theta, "pack_qkv": True, "position_embedding_type": "rope", "rope_scaling": None}
    path.write_text(json.dumps(data | said | {"architectures": names, "model_type": "new"}))
    save_file(renamed(load_file(file), {"gte.": "new."}), file)


def as_in_memory(folder):
    """The names that transformers has itself."""
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    tensors = parted(load_file(file), "attention.qkv_proj", QKV)
    tensors = parted(tensors, "mlp.up_gate_proj", ["mlp.up_proj", "mlp.gate_proj"])
    save_file(renamed(tensors, {theirs: ours for ours, theirs in NAMES.items()}), file)


VARIANTS = {
    "gte": Variant("GteConfig", FIELDS | LINEAR, auto=BODY),
    "new": Variant("GteConfig", FIELDS | {"type_vocab_size": 0, "hidden_act": "gelu_new"}, of_the_hub, auto=BODY),
    "gte-words": Variant("GteConfig", FIELDS | {"type_vocab_size": 2}, as_in_memory, auto="AutoModelForMaskedLM"),
    "gte-classes": Variant("GteConfig", FIELDS | THREE, auto=CLASSES),
    "new-classes": Variant("GteConfig", FIELDS | THREE, of_the_hub, auto=CLASSES),
}
MUTANTS = {
    "gte: activation": Mutant("gte", lambda config: replace(config, activation="silu")),
    "gte: theta": Mutant("gte-words", of_ropes(theta=10000.0)),
    "gte: scaling": Mutant("gte", of_ropes(kind="default")),
    "gte: eps": Mutant("gte", lambda config: replace(config, norm_eps=1e-2)),
}
