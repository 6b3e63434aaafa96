"""Low-rank adapters in PEFT's format, all of them random, without peft."""

import json

import numpy as np
from safetensors.numpy import save_file

from jaxinfer.models.model import AbstractModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(folder, base, rank=4, seed=0, targets=TARGETS, scale=0.3, dora=False, **fields):
    """For a checkpoint's folder `base` whose weights have transformers' names. Returns the folder."""
    random = np.random.default_rng(seed)
    model = AbstractModel.from_config(json.loads((base / "config.json").read_text()), "float32")
    tensors = {}
    for name, spec in model.adaptable.items():
        module = name.removesuffix(".weight")
        if len(spec.shape) == 2 and module.rpartition(".")[2] in targets:
            rows, columns = spec.shape
            shapes = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
            shapes |= {"lora_magnitude_vector": (rows,)} if dora else {}
            for end, shape in shapes.items():
                values = scale * random.standard_normal(shape) + (end == "lora_magnitude_vector")
                tensors[f"base_model.model.{module}.{end}"] = values.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets), "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps(about | fields))
    return folder
