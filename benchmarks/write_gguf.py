"""A Llama, Qwen3-MoE or Qwen3.5 checkpoint of random_model.py as GGUF, for llama.cpp: f32, bf16, q8_0, q4_0. Arguments:
folder, file, kind. Needs the gguf package.

Names and the order of rows of Llama's q and k are those of llama.cpp's format, whose rotary pairs are neighbours there;
experts are stacked; of Qwen3.5 see `delta_net_tensor`. The vocabulary is of made-up tokens: benchmarks deal in ids.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
ARCHITECTURES = {"llama": "llama", "qwen3_moe": "qwen3moe", "qwen3_5_text": "qwen35"}
# What Qwen3.5's configuration leaves out.
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}


def delta_net_tensor(part: str, value: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """A gated delta net's tensor as llama.cpp has it: decays for their logarithms, and value heads in another order.

    Those of the first key head come first in the checkpoint. There the first ones of all key heads do.
    """
    if part == "norm":
        return value
    if part == "A_log":
        value = -np.exp(value)
    key_heads, axis = config["linear_num_key_heads"], 1 if part == "out_proj" else 0
    keys = 2 * key_heads * config["linear_key_head_dim"] if part in ("in_proj_qkv", "conv1d") else 0
    before, values = np.split(value.squeeze(), [keys], axis)
    each = config["linear_num_value_heads"] // key_heads
    heads = values.reshape(*values.shape[:axis], key_heads, each, -1, *values.shape[axis + 1 :])
    return np.concatenate([before, heads.swapaxes(axis, axis + 1).reshape(values.shape)], axis)


def main(folder: Path, file: Path, kind: str) -> None:
    config = DEFAULTS | json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    names = NAMES | ({"post_attention_layernorm": "post_attention_norm"} if arch == "qwen35" else {})
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, experts = config.get("head_dim", config["hidden_size"] // heads), config.get("num_experts", 0)
    wanted, plain = gguf.GGMLQuantizationType[kind.upper()], gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(head_dim // 4 if arch == "qwen35" else head_dim)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if arch == "qwen35":
        writer.add_rope_dimension_sections([11, 11, 10, 0])  # Positions of text are the same in each.
        writer.add_full_attention_interval(config["full_attention_interval"])
        writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
        writer.add_ssm_state_size(config["linear_key_head_dim"])
        writer.add_ssm_group_count(config["linear_num_key_heads"])
        writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
        writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    with safe_open(folder / "model.safetensors", "np") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            stem, suffix, _ = name.partition(".weight")
            if expert := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", stem):
                if expert[2] != "0":
                    continue
                stem = f"{expert[1]}.{expert[3]}"
                each = (f"{expert[1]}.{i}.{expert[3]}.weight" for i in range(experts))
                value = np.stack([tensors.get_tensor(one) for one in each])
            else:
                value = tensors.get_tensor(name)
            if stem.startswith("model.layers."):
                layer, part = stem.removeprefix("model.layers.").split(".", 1)
                new = f"blk.{layer}.{names[part]}{suffix}"
                if part.startswith("linear_attn."):
                    value = delta_net_tensor(part.removeprefix("linear_attn."), value, config)
                if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                    count = heads if "q_proj" in part else kv_heads
                    value = value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            else:
                new = f"{names[stem]}{suffix}"
            if arch == "qwen35" and stem.endswith("norm") and not stem.endswith("linear_attn.norm"):
                value = value + 1
            held = plain if value.ndim == 1 or new.endswith(("ffn_gate_inp.weight", "ssm_conv1d.weight")) else wanted
            writer.add_tensor(new, gguf.quants.quantize(np.ascontiguousarray(value), held), raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
