from dataclasses import replace

from tests.models.families import BASE, BODY, CLASSES, Mutant, Variant

OTHERS = ("num_key_value_heads", "tie_word_embeddings")
FIELDS = {name: value for name, value in BASE.items() if name not in OTHERS}
THREE = {"num_labels": 3}


def old_norms(folder):
    """TensorFlow's names of norms, no prefix, and the positions that old versions saved."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    ours = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, old in ours.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    save_file(tensors | {"embeddings.position_ids": np.arange(256)[None]}, file)


def head(**changes):
    """A mutant's change of the head."""
    return lambda config: replace(config, classifier=replace(config.classifier, **changes))


VARIANTS = {
    "bert": Variant("BertConfig", FIELDS, auto=BODY),
    "bert-old": Variant("BertConfig", FIELDS | {"hidden_act": "relu", "type_vocab_size": 1}, old_norms, auto=BODY),
    "bert-words": Variant("BertConfig", FIELDS | {"layer_norm_eps": 1e-3}, auto="AutoModelForMaskedLM"),
    "bert-classes": Variant("BertConfig", FIELDS | THREE, auto=CLASSES),
}
MUTANTS = {
    "bert: eps": Mutant("bert", lambda config: replace(config, norm_eps=1e-2)),
    "bert: activation": Mutant("bert", lambda config: replace(config, activation="gelu_new")),
    "bert: scale": Mutant("bert", lambda config: replace(config, scale=1.0)),
    "bert: padding": Mutant("bert", lambda config: replace(config, padding_id=1)),
    "bert: window": Mutant("bert", lambda config: replace(config, windows=(39, None))),
    "bert: pooler's activation": Mutant("bert-classes", head(activation="gelu")),
    "bert: pooled token": Mutant("bert-classes", head(pooling="mean")),
}
