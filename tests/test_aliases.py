"""Options in the words of vLLM, transformers and mlx-lm: ours under another name, or fine, or one line for all.

The names and defaults are those of their signatures, written down here; nothing of them is installed for it.
"""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

import jaxinfer
from jaxinfer import LLM, SamplingParams, StructuredOutputsParams
from jaxinfer.aliases import takes
from jaxinfer.aliases.loading import LOADING
from jaxinfer.aliases.sampling import CALL, SAMPLING
from jaxinfer.engine.config import EngineConfig, check_options, in_our_words
from jaxinfer.engine.deployment import read_deployment
from jaxinfer.models.model import AbstractModel
from tests.checkpoint.formats import CASES
from tests.plain import CONFIG
from tests.refusals import line

# vllm.LLM and vllm.EngineArgs: names and defaults (model, tokenizer and skip_tokenizer_init apart).
VLLM_LOADING = {
    "runner": "auto", "convert": "auto", "task": "auto", "tokenizer_mode": "auto", "trust_remote_code": False,
    "allowed_local_media_path": "", "allowed_media_domains": None, "tensor_parallel_size": 1, "dtype": "auto",
    "quantization": None, "revision": None, "tokenizer_revision": None, "chat_template": None, "seed": None,
    "gpu_memory_utilization": 0.9, "cpu_offload_gb": 0, "offload_group_size": 0, "offload_num_in_group": 1,
    "offload_prefetch_step": 1, "offload_params": None, "enforce_eager": False, "enable_return_routed_experts": False,
    "disable_custom_all_reduce": False, "hf_token": None, "hf_overrides": None, "mm_processor_kwargs": None,
    "pooler_config": None, "structured_outputs_config": None, "profiler_config": None, "attention_config": None,
    "kv_cache_memory_bytes": None, "compilation_config": None, "logits_processors": None, "served_model_name": None,
    "hf_config_path": None, "enable_prompt_embeds": False, "download_dir": None, "safetensors_load_strategy": "lazy",
    "load_format": "auto", "config_format": "auto", "kv_cache_dtype": "auto", "max_model_len": None,
    "cudagraph_capture_sizes": None, "max_cudagraph_capture_size": None, "distributed_executor_backend": None,
    "pipeline_parallel_size": 1, "master_addr": "127.0.0.1", "master_port": 29501, "nnodes": 1, "node_rank": 0,
    "prefill_context_parallel_size": 1, "decode_context_parallel_size": 1, "dcp_kv_cache_interleave_size": 1,
    "cp_kv_cache_interleave_size": 1, "data_parallel_size": 1, "data_parallel_rank": None,
    "data_parallel_start_rank": None, "data_parallel_size_local": None, "data_parallel_address": None,
    "data_parallel_rpc_port": None, "data_parallel_hybrid_lb": False, "data_parallel_external_lb": False,
    "data_parallel_backend": "mp", "enable_expert_parallel": False, "all2all_backend": "allgather_reducescatter",
    "enable_dbo": False, "ubatch_size": 0, "dbo_decode_token_threshold": 32, "dbo_prefill_token_threshold": 512,
    "disable_nccl_for_dp_synchronization": None, "eplb_config": None, "enable_eplb": False,
    "expert_placement_strategy": "linear", "max_parallel_loading_workers": None, "block_size": None,
    "enable_prefix_caching": None, "prefix_caching_hash_algo": "sha256", "disable_sliding_window": False,
    "disable_cascade_attn": False, "swap_space": 4, "max_num_batched_tokens": None, "max_num_partial_prefills": 1,
    "max_long_partial_prefills": 1, "long_prefill_token_threshold": 0, "max_num_seqs": None, "max_logprobs": 20,
    "logprobs_mode": "raw_logprobs", "disable_log_stats": False, "aggregate_engine_logging": False,
    "code_revision": None, "allow_deprecated_quantization": False, "limit_mm_per_prompt": {}, "enable_mm_embeds": False,
    "interleave_mm_strings": False, "media_io_kwargs": {}, "mm_processor_cache_gb": 4,
    "mm_processor_cache_type": "lru", "mm_shm_cache_max_object_size_mb": 128, "mm_encoder_only": False,
    "mm_encoder_tp_mode": "weights", "mm_encoder_attn_backend": None, "io_processor_plugin": None,
    "skip_mm_profiling": False, "video_pruning_rate": 0.0, "enable_lora": False, "max_loras": 1, "max_lora_rank": 16,
    "default_mm_loras": None, "fully_sharded_loras": False, "max_cpu_loras": None, "lora_dtype": "auto",
    "enable_tower_connector_lora": False, "specialize_active_lora": False, "ray_workers_use_nsight": False,
    "num_gpu_blocks_override": None, "model_loader_extra_config": {}, "ignore_patterns": [],
    "enable_chunked_prefill": None, "disable_chunked_mm_input": False, "disable_hybrid_kv_cache_manager": None,
    "reasoning_parser": "", "reasoning_parser_plugin": None, "logits_processor_pattern": None,
    "speculative_config": None, "show_hidden_metrics_for_version": None, "otlp_traces_endpoint": None,
    "collect_detailed_traces": None, "kv_cache_metrics": False, "kv_cache_metrics_sample": 0.01,
    "cudagraph_metrics": False, "enable_layerwise_nvtx_tracing": False, "enable_mfu_metrics": False,
    "enable_logging_iteration_details": False, "enable_mm_processor_stats": False, "scheduling_policy": "fcfs",
    "scheduler_cls": None, "worker_cls": "auto", "worker_extension_cls": "", "kv_transfer_config": None,
    "kv_events_config": None, "ec_transfer_config": None, "generation_config": "auto", "enable_sleep_mode": False,
    "override_generation_config": {}, "model_impl": "auto", "override_attention_dtype": None,
    "attention_backend": None, "calculate_kv_scales": False, "mamba_cache_dtype": "auto",
    "mamba_ssm_cache_dtype": "auto", "mamba_block_size": None, "mamba_cache_mode": "none", "additional_config": {},
    "use_tqdm_on_load": True, "pt_load_map_location": "cpu", "async_scheduling": None, "stream_interval": 1,
    "kv_sharing_fast_prefill": False, "optimization_level": 2, "enable_fault_tolerance": False,
    "engine_recovery_timeout": 60, "kv_offloading_size": None, "kv_offloading_backend": "native",
    "tokens_only": False, "afd_config": None, "weight_transfer_config": None,
    # of older versions
    "max_seq_len_to_capture": 8192, "disable_async_output_proc": False, "override_pooler_config": None,
    "intial_incremental_detokenization_offset": 5, "use_v2_block_manager": True, "rope_scaling": None,
    "rope_theta": None, "tokenizer_pool_size": 0, "tokenizer_pool_type": "ray", "tokenizer_pool_extra_config": None,
    "disable_mm_preprocessor_cache": False, "enable_lora_bias": False, "enable_prompt_adapter": False,
    "max_prompt_adapters": 1, "max_prompt_adapter_token": 0, "lora_extra_vocab_size": 256,
    "long_lora_scaling_factors": None, "device": "auto", "num_scheduler_steps": 1, "multi_step_stream_outputs": True,
    "num_lookahead_slots": 0, "preemption_mode": None, "scheduler_delay_factor": 0.0,
    "guided_decoding_backend": "xgrammar", "speculative_model": None, "speculative_model_quantization": None,
    "speculative_draft_tensor_parallel_size": None, "num_speculative_tokens": None,
    "speculative_disable_mqa_scorer": False, "speculative_max_model_len": None,
    "speculative_disable_by_batch_size": None, "ngram_prompt_lookup_max": None, "ngram_prompt_lookup_min": None,
    "spec_decoding_acceptance_method": "rejection_sampler", "typical_acceptance_sampler_posterior_threshold": None,
    "typical_acceptance_sampler_posterior_alpha": None, "qlora_adapter_name_or_path": None,
    "disable_logprobs_during_spec_decoding": None, "override_neuron_config": None,
}  # fmt: skip

# vllm.SamplingParams, old and new.
VLLM_SAMPLING = {
    "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 1.0,
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None, "stop": None, "stop_token_ids": None, "ignore_eos": False,
    "max_tokens": 16, "min_tokens": 0, "logprobs": None, "prompt_logprobs": None, "prompt_logprob_token_ids": None,
    "prompt_logprob_start": None, "logprob_token_ids": None, "flat_logprobs": False, "detokenize": True,
    "skip_special_tokens": True, "spaces_between_special_tokens": True, "include_stop_str_in_output": False,
    "output_kind": 0, "stream_interval": None, "skip_clone": False, "output_text_buffer_length": 0,
    "structured_outputs": None, "logit_bias": None, "allowed_token_ids": None, "extra_args": None, "bad_words": None,
    "skip_reading_prefix_cache": None, "thinking_token_budget": None, "repetition_detection": None,
    "routed_experts_prompt_start": 0, "trace_decode_token_ids": None, "best_of": None, "use_beam_search": False,
    "length_penalty": 1.0, "early_stopping": False, "guided_decoding": None, "logits_processors": None,
    "truncate_prompt_tokens": None,
}  # fmt: skip

# transformers' GenerationConfig and generate().
TRANSFORMERS_SAMPLING = {
    "max_length": None, "max_new_tokens": None, "min_length": 0, "min_new_tokens": None, "early_stopping": False,
    "max_time": None, "stop_strings": None, "num_beams": 1, "use_mtp": None, "use_cache": True,
    "cache_implementation": None, "cache_config": None, "max_cache_len": None, "temperature": 1.0, "top_k": 50,
    "top_p": 1.0, "min_p": 0.0, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "bad_words_ids": None, "renormalize_logits": False, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "remove_invalid_values": False, "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "sequence_bias": None, "token_healing": False, "guidance_scale": None,
    "watermarking_config": None, "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False,
    "output_scores": False, "output_logits": None, "return_dict_in_generate": False, "pad_token_id": 7,
    "bos_token_id": None, "eos_token_id": None, "encoder_no_repeat_ngram_size": 0, "decoder_start_token_id": None,
    "is_assistant": False, "num_assistant_tokens": 20, "num_assistant_tokens_schedule": None,
    "assistant_confidence_threshold": None, "prompt_lookup_num_tokens": None, "max_matching_ngram_size": None,
    "assistant_early_exit": None, "assistant_lookbehind": None, "target_lookbehind": None,
    "assistant_ensemble_weight": None, "speculation_type": None, "compile_config": None, "disable_compile": False,
    "continuous_batching_config": None, "low_memory": None, "penalty_alpha": None, "dola_layers": None,
    "diversity_penalty": 0.0, "num_beam_groups": 1, "constraints": None, "force_words_ids": None,
    "prefill_chunk_size": None, "inputs": None, "generation_config": None, "logits_processor": None,
    "stopping_criteria": None, "prefix_allowed_tokens_fn": None, "synced_gpus": None, "assistant_model": None,
    "streamer": None, "negative_prompt_ids": None, "negative_prompt_attention_mask": None, "custom_generate": None,
    "attention_mask": None, "input_ids": None,
}  # fmt: skip

# mlx_lm.generate, stream_generate, generate_step and sample_utils.make_sampler.
MLX_SAMPLING = {
    "verbose": False, "max_tokens": 256, "sampler": None, "logits_processors": None, "max_kv_size": None,
    "prompt_cache": None, "prefill_step_size": 2048, "kv_bits": None, "kv_group_size": 64, "quantized_kv_start": 0,
    "prompt_progress_callback": None, "input_embeddings": None, "draft_model": None, "num_draft_tokens": 3,
    "temp": 0.0, "top_p": 1.0, "min_p": 0.0, "min_tokens_to_keep": 1, "top_k": 0, "xtc_probability": 0.0,
    "xtc_threshold": 0.0, "xtc_special_tokens": [], "repetition_context_size": 20,
}  # fmt: skip

# transformers' from_pretrained.
TRANSFORMERS_LOADING = {
    "torch_dtype": "auto", "device_map": "auto", "attn_implementation": None, "load_in_8bit": False,
    "load_in_4bit": False, "low_cpu_mem_usage": True, "cache_dir": None, "local_files_only": False,
    "use_safetensors": True, "quantization_config": None, "token": None, "trust_remote_code": False,
}  # fmt: skip

# LLM.generate and LLM.chat of vLLM, but for prompts, messages and sampling_params.
VLLM_GENERATE = {
    "use_tqdm": False, "lora_request": None, "priority": None, "tokenization_kwargs": None, "prompt_token_ids": None,
    "prompt_adapter_request": None, "guided_options_request": None,
}  # fmt: skip
VLLM_CHAT = {
    "use_tqdm": False, "lora_request": None, "chat_template": None, "chat_template_content_format": "auto",
    "add_generation_prompt": True, "tools": None, "chat_template_kwargs": None, "tokenization_kwargs": None,
    "mm_processor_kwargs": None,
}  # fmt: skip

OURS = {
    "tensor_parallel_size": (4, {"mesh": "tensor=4"}),
    "data_parallel_size": (2, {"mesh": "data=2"}),
    "gpu_memory_utilization": (0.5, {"memory_utilization": 0.5}),
    "kv_cache_memory_bytes": (10**6, {"kv_cache_memory": 10**6}),
    "block_size": (32, {"page_size": 32}),
    "hf_token": ("x", {"token": "x"}),
    "torch_dtype": ("torch.float16", {"dtype": "float16"}),
    "enable_lora": (True, {"max_adapters": 1}),
    "max_cpu_loras": (8, {"max_host_adapters": 8}),
}


class Strange:
    """No value that anything is set to by default."""


@pytest.mark.parametrize("options", [VLLM_LOADING, TRANSFORMERS_LOADING], ids=["vllm", "transformers"])
def test_every_option_of_loading_as_it_is_by_default(options):
    """Each alone, and all of them: no complaint, and our own defaults but for one device, which vLLM means."""
    axes = ("tensor_parallel_size", "data_parallel_size")
    for name, value in options.items():
        settings = check_options({name: value})
        ours = "mesh" if name in axes else name
        expected = {ours: settings[ours]} if name in (*axes, "max_lora_rank") else {}
        assert settings == check_options({}) | expected, name
    assert check_options(options)["mesh"] in (None, "tensor=1,data=1")


def test_every_other_option_of_loading_is_ours_or_says_what_to_do():
    for name in {**VLLM_LOADING, **TRANSFORMERS_LOADING}:
        if name in EngineConfig.__annotations__:
            continue
        if name in OURS:
            value, expected = OURS[name]
            assert in_our_words({name: value}) == expected
            continue
        if name in LOADING.fine and any(not isinstance(v, bool | int | float | str) for v in LOADING.fine[name]):
            continue  # whatever it is, it changes nothing
        text = line(lambda name=name: check_options({name: Strange()}))
        assert text.startswith(f"option {name}: ")
        assert "known are" not in text


@pytest.mark.parametrize(
    "fields", [VLLM_SAMPLING, TRANSFORMERS_SAMPLING, MLX_SAMPLING], ids=["vllm", "transformers", "mlx"]
)
def test_every_sampling_parameter(fields):
    """As it is there by default, and otherwise."""
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name, value in fields.items():
        SamplingParams(**{name: value})
        if name in known or name in SAMPLING.same or name in ("pad_token_id", "skip_clone"):
            continue
        text = line(lambda name=name: SamplingParams(**{name: Strange()}))
        assert text.startswith(f"sampling parameter {name}: ")
        assert "known are" not in text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_new_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"min_new_tokens": 2}, {"min_tokens": 2}),
        ({"num_return_sequences": 3}, {"n": 3}),
        ({"stop_strings": ["a"]}, {"stop": ("a",)}),
        ({"temp": 0.5}, {"temperature": 0.5}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.3}, {"temperature": 0.3}),
        ({"do_sample": False, "temp": 0}, {"temperature": 0}),
        ({"max_new_tokens": None, "best_of": 1, "skip_clone": True}, {"max_tokens": 16}),
        ({"guided_choice": ["a"]}, {"structured_outputs": StructuredOutputsParams(choice=("a",))}),
        (
            {"guided_json": {}, "guided_whitespace_pattern": " "},
            {"structured_outputs": StructuredOutputsParams(json={}, whitespace_pattern=" ")},
        ),
        (
            {"guided_decoding": {"regex": "a", "backend": "xgrammar"}},
            {"structured_outputs": StructuredOutputsParams(regex="a")},
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": True}}},
            {"structured_outputs": StructuredOutputsParams(json="{}")},
        ),
        (
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": StructuredOutputsParams(json_object=True)},
        ),
        ({"response_format": {"type": "text"}}, {}),
    ],
)
def test_sampling_parameters_that_are_ours(fields, expected):
    assert SamplingParams(**fields) == SamplingParams(**expected)
    changed = SamplingParams(temperature=0.9, max_tokens=16).with_changes(**expected)
    assert all(getattr(changed, name) == value for name, value in expected.items())


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"max_new_tokens": 5, "max_tokens": 6}, "max_new_tokens: it is max_tokens here, which is given too"),
        ({"max_new_tokens": 5, "max_completion_tokens": 6}, "it is max_tokens here, which is given too"),
        ({"do_sample": False, "temperature": 0.7}, "do_sample: False is temperature 0, and temperature is 0.7"),
        ({"do_sample": True, "temp": 0}, "do_sample: True is temperature above 0, and temperature is 0"),
        ({"temp": -1}, "sampling parameter temperature is -1"),
        ({"best_of": 2}, "raise n"),
        ({"output_kind": 1}, "LLM.stream"),
        ({"eos_token_id": 0}, "stop_token_ids"),
        ({"self": 1}, "'self' is not supported"),
    ],
)
def test_contradictions(fields, fact):
    assert fact in line(lambda: SamplingParams(**fields))


def test_kinds_of_output_are_vllms_enum():
    import enum

    kind = enum.Enum("RequestOutputKind", {"CUMULATIVE": 0, "DELTA": 1, "FINAL_ONLY": 2})
    assert SamplingParams(output_kind=kind.FINAL_ONLY) == SamplingParams(output_kind=kind.CUMULATIVE)
    assert "output_kind: LLM.stream" in line(lambda: SamplingParams(output_kind=kind.DELTA))


def test_all_that_is_wrong_is_in_one_line():
    text = line(lambda: check_options({"enforce_eager": True, "swap_space": 16, "dtyp": "x", "seed": 0}))
    for fact in ("enforce_eager: not needed here", "swap_space: ", "'dtyp' is not known: did you mean dtype?"):
        assert fact in text
    assert text.endswith(f"; known are {', '.join(EngineConfig.__annotations__)}")
    text = line(lambda: jaxinfer.generate("x", model="/none", enforce_eager=True, best_of=2, max_time=1))
    for fact in ("option enforce_eager: ", "sampling parameter best_of: ", "max_time: "):
        assert fact in text
    assert "trust_remote_code: no code of a checkpoint is ever run" in line(
        lambda: LLM("/none", trust_remote_code=True)
    )
    both = {"tensor_parallel_size": 2, "mesh": "tensor=2"}
    assert "tensor_parallel_size: it is mesh here, which is given too" in line(lambda: LLM("/none", **both))
    assert "mesh is 'tensor=0'" in line(lambda: LLM(jaxinfer.demo.MODEL_DIR, tensor_parallel_size=0))


def test_adapters_in_vllms_words():
    def given(**options):
        options = in_our_words(options)
        return options.get("max_adapters"), options.get("max_lora_rank"), options.get("adapters")

    assert given(enable_lora=True, max_loras=4, max_lora_rank=64, max_cpu_loras=8, lora_dtype="auto") == (4, 64, None)
    assert given(enable_lora=True, adapters={"x": "y"}) == (None, None, {"x": "y"})
    assert given(enable_lora=False, max_loras=4, max_lora_rank=64) == (None, None, None)
    for options, fact in {
        (("max_loras", 4),): "option max_loras: it is 4, without enable_lora=True",
        (("max_loras", 4), ("max_adapters", 4)): "max_loras: it is max_adapters here, which is given too",
        (("enable_lora", False), ("max_adapters", 4)): "enable_lora: it is False, and max_adapters is given",
        (("adapter_path", "x"),): "here it is adapters={NAME: FOLDER}",
    }.items():
        assert fact in line(lambda options=options: in_our_words(dict(options)))


def test_dtypes_however_they_are_spelt():
    class Torch:
        def __init__(self, name):
            self.name = name

        def __str__(self):
            return f"torch.{self.name}"

    import jax.numpy as jnp

    for name, spellings in {
        "float16": ["half", "fp16", "float16", "torch.float16", np.float16, np.dtype("float16"), Torch("float16")],
        "bfloat16": ["bf16", jnp.bfloat16, np.dtype(ml_dtypes.bfloat16), ml_dtypes.bfloat16, Torch("bfloat16")],
        "float32": ["float", "fp32", np.float32, jnp.float32, Torch("float32")],
        "auto": ["auto"],
    }.items():
        for spelling in spellings:
            assert check_options({"dtype": spelling})["dtype"] == name
    for wrong in (np.int8, np.float64, "double", Torch("int4"), 5):
        assert "it must be one of auto, float32, bfloat16, float16" in line(
            lambda wrong=wrong: check_options({"dtype": wrong})
        )
    assert check_options({"kv_cache_dtype": "fp8_e4m3"})["kv_cache_dtype"] == "fp8"
    assert check_options({"kv_cache_dtype": "bf16"})["kv_cache_dtype"] == "bfloat16"
    assert "auto, float32, bfloat16, int8, fp8" in line(lambda: check_options({"kv_cache_dtype": "fp8_e5m2"}))


def test_a_deployment_in_other_words(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text("model: x\ndtype: half\nkv_cache_dtype: fp8_e4m3\n")
    assert check_options(read_deployment(file).options) == check_options({"dtype": "float16", "kv_cache_dtype": "fp8"})
    file.write_text("model: x\ntensor_parallel_size: 4\n")
    assert (
        line(lambda: read_deployment(file))
        == f"{file}:2: there is no field 'tensor_parallel_size': here it is mesh, as tensor=4"
    )


@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("awq", "awq"),
        ("awq", "awq_marlin"),
        ("gptq", "gptq"),
        ("gptq", "gptq_marlin"),
        ("deepseek", "fp8"),
        ("int4", "compressed-tensors"),
    ],
)
def test_the_method_that_a_checkpoint_is_quantized_by(case, method):
    config = CONFIG | {"num_hidden_layers": 1, "quantization_config": CASES[case].config}
    check_options({"quantization": method})
    model, expected = AbstractModel.from_config(config, "float32", method), AbstractModel.from_config(config, "float32")
    assert (model.params, model.quantization) == (expected.params, None)
    if method != "fp8":  # which is a scheme of ours, too
        for other in (CONFIG, config | {"quantization_config": CASES["fp8 of whole tensors"].config}):
            assert f"quantization is {method!r}: the checkpoint's own is " in line(
                lambda other=other: AbstractModel.from_config(other, "float32", method)
            )


def test_calls(checkpoints):
    with LLM(checkpoints("llama").folder, max_num_seqs=4, max_num_batched_tokens=64, tensor_parallel_size=1) as llm:
        assert llm.get_tokenizer() is llm.tokenizer
        assert repr(llm) == f"<LLM {checkpoints('llama').folder}: {llm.description}>"
        assert "float32" in repr(llm)
        params = SamplingParams(max_tokens=3, temperature=0)
        (output,) = llm.generate("a prompt", params, **VLLM_GENERATE)
        (again,) = llm.generate(["a prompt"], sampling_params=params)
        assert output.outputs[0].text == again.outputs[0].text
        metrics = again.metrics
        assert 0 < output.metrics.arrival_time <= metrics.arrival_time
        assert metrics.arrival_time < metrics.first_token_time <= metrics.finished_time == metrics.last_token_time
        assert metrics.first_token_latency == metrics.time_to_first_token
        assert again.num_cached_tokens == metrics.cached_tokens
        assert again.outputs[0].finished()
        messages = [{"role": "user", "content": "Hello"}]
        (answer,) = llm.chat(messages, params, **VLLM_CHAT)
        assert answer.prompt_token_ids == llm.tokenizer.encode("user: Hello\nassistant:")
        template = "{{ messages[0].content }}{{ more }}{{ '!' if add_generation_prompt }}"
        kwargs = {"chat_template": template, "add_generation_prompt": False, "chat_template_kwargs": {"more": "?"}}
        (answer,) = llm.chat(messages, params, **kwargs)
        assert answer.prompt_token_ids == llm.tokenizer.encode("Hello?")
        waiting = llm.stats
        for call in (llm.generate, llm.chat):
            prompt = messages if call == llm.chat else "x"
            text = line(lambda call=call, prompt=prompt: call(prompt, max_tokens=5, temp=0))
            assert text.startswith("argument max_tokens: it belongs in SamplingParams; temp: it belongs in SamplingP")
            text = line(lambda call=call, prompt=prompt: call(prompt, params, lora_request="x"))
            assert text == "adapter is 'x': there are none; LLM(adapters={NAME: FOLDER}) and load_adapter load them"
        assert "'prompt' is not supported: did you mean prompts?" in line(lambda: llm.generate("x", prompt="y"))
        assert llm.stats.running == waiting.running
    assert repr(llm) == f"<LLM {checkpoints('llama').folder}: closed>"


def test_on_the_command_line(cli):
    text = cli("generate", "x", "--enforce-eager", "--tensor-parallel-size=4", "--max-new-tokens", "5").error()
    assert text == (
        "No such option: --enforce-eager; --enforce-eager: not needed here: XLA compiles every program; warmup=True "
        "does it while loading; --tensor-parallel-size: here it is mesh, as tensor=4; --max-new-tokens: here it is "
        "--max-tokens; see jaxinfer generate --help"
    )
    assert cli("generate", "x", "--nothing").error() == "No such option: --nothing; see jaxinfer generate --help"


def test_no_name_is_two_things():
    for words in (LOADING, SAMPLING, CALL):
        assert not words.same.keys() & (words.instead.keys() | words.made.keys())
        assert words.fine.keys() <= words.instead.keys()
        assert all(words.word(name) for name in words)
    assert not LOADING.same.keys() & EngineConfig.__annotations__.keys()


def test_a_function_keeps_its_signature():
    import inspect

    assert "temperature" in inspect.signature(SamplingParams).parameters
    assert list(inspect.signature(LLM.generate).parameters)[1:3] == ["prompts", "sampling_params"]

    @takes(CALL)
    def call(first: int, *, second: int = 2) -> int:
        return first + second

    assert call(1, second=3) == call(first=1, second=3) == 4
