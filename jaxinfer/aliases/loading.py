"""Options of loading: those of vLLM's LLM and EngineArgs, and of transformers' from_pretrained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxinfer.aliases import ANY, Options, Words, names


def _axis(axis: str) -> Callable[[Any, Options], dict[str, Any]]:
    return lambda count, _: {"mesh": f"{axis}={count}"}


def _enable_lora(value: Any, options: Options) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise ValueError(f"it is {value!r:.60}, and must be true or false; here it is max_adapters")
    said = [name for name in ("adapters", "max_adapters", "max_loras") if options.get(name) is not None]
    if not value and said[:1] not in ([], ["max_loras"]):
        raise ValueError(f"it is False, and {said[0]} is given: leave one of them out")
    return {"max_adapters": 1} if value and not said else {}


def _max_loras(value: Any, options: Options) -> dict[str, Any]:
    if options.get("enable_lora") or options.get("adapters") or options.get("max_adapters") is not None:
        return {"max_adapters": value}
    if options.get("enable_lora") is None and (value != 1 or isinstance(value, bool)):
        raise ValueError(f"it is {value!r:.60}, without enable_lora=True: give that too; here it is max_adapters")
    return {}


MESH = "mesh splits it: data, fsdp, tensor"
CODE = "no code of a checkpoint is ever run: leave it out"
XLA = "not needed here: XLA compiles every program; warmup=True does it while loading"
TEXT = "models of text run here, and no others"
ADAPTERS = "here it is adapters={NAME: FOLDER}, in PEFT's format, and generate(..., adapter=NAME)"
PROMPT_ADAPTER = "there are no adapters of prompts, only low-rank ones: adapters={NAME: FOLDER}"
SPECULATIVE = "there is no speculative decoding"
GRAMMAR = "SamplingParams(structured_outputs=...) has grammars, which llguidance follows"
REASONING = "text is not split into reasoning and answer"
SERVER = "it is for a server's log and metrics; LLM.stats and RequestOutput.metrics have the figures"
HOSTS = "jaxinfer.distributed.initialize, or --coordinator, joins several hosts; mesh splits the model over devices"
OFFLOAD = "weights and cache stay on the devices: quantization, kv_cache_dtype and mesh make them smaller there"
TUNING = "the engine chooses it"
HUB = "HF_HUB_CACHE says where downloads are kept"
NOTHING = "there is nothing like it here"
CONFIG = "change the model's config.json"

LOADING = Words(
    "option",
    "is not known",
    same={
        "gpu_memory_utilization": "memory_utilization",
        "kv_cache_memory_bytes": "kv_cache_memory",
        "block_size": "page_size",
        "hf_token": "token",
        "use_auth_token": "token",
        "torch_dtype": "dtype",
        "max_cpu_loras": "max_host_adapters",
    },
    made={
        "tensor_parallel_size": _axis("tensor"),
        "data_parallel_size": _axis("data"),
        "enable_lora": _enable_lora,
        "max_loras": _max_loras,
    },
    instead=names(
        {
            "tensor_parallel_size": "here it is mesh, as tensor=4",
            "data_parallel_size": "here it is mesh, as data=2",
            "pipeline_parallel_size": f"there are no stages of layers: {MESH}",
            "prefill_context_parallel_size decode_context_parallel_size dcp_kv_cache_interleave_size "
            "cp_kv_cache_interleave_size": f"sequences are not split: {MESH}",
            "enable_expert_parallel all2all_backend enable_eplb eplb_config expert_placement_strategy enable_dbo "
            "ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold enable_return_routed_experts "
            "moe_backend": "experts are split over all devices, each having as many; mesh says over how many: expert=4",
            "distributed_executor_backend nnodes node_rank master_addr master_port data_parallel_rank "
            "data_parallel_start_rank data_parallel_size_local data_parallel_address data_parallel_rpc_port "
            "data_parallel_hybrid_lb data_parallel_external_lb data_parallel_backend "
            "disable_nccl_for_dp_synchronization ray_workers_use_nsight worker_cls worker_extension_cls "
            "worker_use_ray": HOSTS,
            "trust_remote_code code_revision": CODE,
            "enforce_eager compilation_config optimization_level performance_mode cudagraph_capture_sizes "
            "max_cudagraph_capture_size cuda_graph_sizes max_seq_len_to_capture disable_compile": XLA,
            "disable_custom_all_reduce disable_cascade_attn disable_hybrid_kv_cache_manager use_v2_block_manager "
            "disable_async_output_proc": "not needed here: there is nothing like it to turn off",
            "attention_backend attention_config attn_implementation override_attention_dtype": "here it is attention",
            "disable_sliding_window": CONFIG,
            "rope_scaling rope_theta hf_config_path": CONFIG,
            "download_dir cache_dir": HUB,
            "local_files_only": "HF_HUB_OFFLINE=1 says so",
            "load_format use_safetensors": "safetensors are read, and what jaxinfer convert writes",
            "safetensors_load_strategy model_loader_extra_config ignore_patterns pt_load_map_location "
            "max_parallel_loading_workers low_cpu_mem_usage": "not needed here: weights are read one at a time",
            "config_format": "config.json in Hugging Face's format is read",
            "model_impl": "models are this package's own",
            "task": "here it is runner and convert",
            "override_pooler_config": "here it is pooler_config",
            "tokenizer_mode": "there is one way to read each tokenizer: leave it out",
            "tokenizer_revision": "revision is of the tokenizer, too",
            "tokenizer_pool_size tokenizer_pool_type tokenizer_pool_extra_config": "not needed here: text is split in "
            "this process",
            "swap_space cpu_offload_gb cpu_offload_params offload_backend offload_group_size offload_num_in_group "
            "offload_prefetch_step offload_params kv_offloading_size kv_offloading_backend": OFFLOAD,
            "preemption_mode": "a request that loses its pages is computed again",
            "num_gpu_blocks_override": "kv_cache_memory says how large the cache is, in bytes",
            "calculate_kv_scales": "keys and values have a scale for each token and head where there are any",
            "kv_cache_dtype_skip_layers": "kv_cache_dtype is of all layers",
            "prefix_caching_hash_algo": "pages are known by a keyed hash",
            "kv_sharing_fast_prefill": "no supported model needs it",
            "mamba_cache_dtype mamba_ssm_cache_dtype": "states are float32",
            "mamba_block_size mamba_cache_mode": "enable_prefix_caching copies states where they are looked for",
            "enable_chunked_prefill": "long prompts always go in chunks, of up to max_num_batched_tokens",
            "max_num_partial_prefills max_long_partial_prefills long_prefill_token_threshold num_scheduler_steps "
            "multi_step_stream_outputs num_lookahead_slots scheduler_delay_factor scheduler_cls": TUNING,
            "async_scheduling": "the host always prepares the next call while one runs",
            "scheduling_policy": "generate(priority=...) orders requests; without it they run as they came",
            "stream_interval": "LLM.stream gives text as it comes",
            "max_logprobs": "SamplingParams takes up to 20 logprobs",
            "logprobs_mode": "log-probabilities are the model's own, before penalties, temperature and filters",
            "disable_log_stats aggregate_engine_logging disable_log_requests enable_log_requests "
            "show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces kv_cache_metrics "
            "kv_cache_metrics_sample cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics "
            "enable_logging_iteration_details enable_mm_processor_stats profiler_config": SERVER,
            "served_model_name": "jaxinfer serve has --served-model-name",
            "use_tqdm_on_load": "on_progress is told what loading waits for",
            "limit_mm_per_prompt enable_mm_embeds interleave_mm_strings media_io_kwargs mm_processor_kwargs "
            "mm_processor_cache_gb mm_processor_cache_type mm_shm_cache_max_object_size_mb mm_encoder_only "
            "mm_encoder_tp_mode mm_encoder_attn_backend io_processor_plugin skip_mm_profiling video_pruning_rate "
            "disable_mm_preprocessor_cache disable_chunked_mm_input allowed_local_media_path allowed_media_domains "
            "enable_prompt_embeds": TEXT,
            "enable_lora max_loras": "here it is max_adapters",
            "lora_modules lora_local_path qlora_adapter_name_or_path adapter_path peft": ADAPTERS,
            "enable_lora_bias": "biases are part of an adapter",
            "lora_dtype": "adapters are in the dtype of weights",
            "fully_sharded_loras": "factors are split as their weights are: leave it out",
            "specialize_active_lora": "not needed here: calls whose rows have no adapter are programs of their own",
            "lora_target_modules": "an adapter's own target_modules say what it changes",
            "lora_extra_vocab_size long_lora_scaling_factors": "an adapter has no tokens and no length of its own: "
            "jaxinfer merge BASE ADAPTER DST writes the model with one that has",
            "enable_prompt_adapter max_prompt_adapters max_prompt_adapter_token": PROMPT_ADAPTER,
            "default_mm_loras enable_tower_connector_lora": TEXT,
            "speculative_config speculative_model speculative_model_quantization num_speculative_tokens "
            "speculative_draft_tensor_parallel_size speculative_disable_mqa_scorer speculative_max_model_len "
            "speculative_disable_by_batch_size ngram_prompt_lookup_max ngram_prompt_lookup_min "
            "spec_decoding_acceptance_method typical_acceptance_sampler_posterior_threshold "
            "typical_acceptance_sampler_posterior_alpha disable_logprobs_during_spec_decoding spec_method spec_model "
            "spec_tokens": SPECULATIVE,
            "guided_decoding_backend structured_outputs_config": GRAMMAR,
            "reasoning_parser reasoning_parser_plugin": REASONING,
            "logits_processors logits_processor_pattern": "SamplingParams has logit_bias and allowed_token_ids",
            "chat_template": "give it to LLM.chat, or to generate and chat on the command line",
            "generation_config": "without sampling_params it is the checkpoint's; give sampling_params for others",
            "override_generation_config": "give sampling_params",
            "enable_sleep_mode": "LLM.close() frees the memory",
            "device device_map": "JAX_PLATFORMS says which devices are used, and mesh how many",
            "allow_deprecated_quantization": "what is read needs no leave",
            "load_in_8bit load_in_4bit quantization_config": "here it is quantization, as int8, int4 or nf4",
            "kv_transfer_config kv_events_config ec_transfer_config weight_transfer_config afd_config "
            "additional_config override_neuron_config enable_fault_tolerance engine_recovery_timeout": NOTHING,
            "intial_incremental_detokenization_offset tokens_only": "leave it out",
        }
    ),
    fine={
        "pipeline_parallel_size": (1,),
        "prefill_context_parallel_size": (1,),
        "decode_context_parallel_size": (1,),
        "dcp_kv_cache_interleave_size": (1,),
        "cp_kv_cache_interleave_size": (1,),
        "enable_expert_parallel": (ANY,),
        "all2all_backend": ("allgather_reducescatter", "naive"),
        "expert_placement_strategy": ("linear",),
        "dbo_decode_token_threshold": (32,),
        "dbo_prefill_token_threshold": (512,),
        "distributed_executor_backend": ("mp", "uni"),
        "data_parallel_backend": ("mp",),
        "nnodes": (1,),
        "master_addr": ("127.0.0.1",),
        "master_port": (29501,),
        "worker_cls": ("auto",),
        "optimization_level": (2,),
        "performance_mode": ("balanced",),
        "compilation_config": ({},),
        "max_seq_len_to_capture": (8192,),
        "disable_custom_all_reduce": (ANY,),
        "disable_cascade_attn": (ANY,),
        "disable_hybrid_kv_cache_manager": (ANY,),
        "use_v2_block_manager": (ANY,),
        "disable_async_output_proc": (False,),
        "attention_backend": ("auto",),
        "load_format": ("auto", "safetensors"),
        "use_safetensors": (True,),
        "safetensors_load_strategy": ("lazy",),
        "pt_load_map_location": ("cpu",),
        "low_cpu_mem_usage": (ANY,),
        "config_format": ("auto", "hf"),
        "task": ("auto", "generate"),
        "tokenizer_pool_type": ("ray",),
        "swap_space": (0, 4),
        "offload_backend": ("auto",),
        "offload_num_in_group": (1,),
        "offload_prefetch_step": (1,),
        "kv_offloading_backend": ("native",),
        "prefix_caching_hash_algo": ("sha256", "builtin"),
        "mamba_cache_mode": ("none", "align", "all"),
        "enable_chunked_prefill": (True,),
        "max_num_partial_prefills": (1,),
        "max_long_partial_prefills": (1,),
        "num_scheduler_steps": (1,),
        "multi_step_stream_outputs": (ANY,),
        "async_scheduling": (True,),
        "scheduling_policy": ("fcfs", "priority"),
        "stream_interval": (1,),
        "max_logprobs": tuple(range(21)),
        "logprobs_mode": ("raw_logprobs",),
        "disable_log_stats": (True, False),
        "disable_log_requests": (True,),
        "kv_cache_metrics_sample": (0.01,),
        "use_tqdm_on_load": (ANY,),
        "mm_processor_cache_gb": (0, 4),
        "mm_processor_cache_type": ("lru",),
        "mm_shm_cache_max_object_size_mb": (128,),
        "mm_encoder_tp_mode": ("weights",),
        "enable_lora_bias": (ANY,),
        "lora_extra_vocab_size": (256,),
        "max_prompt_adapters": (1,),
        "spec_decoding_acceptance_method": ("rejection_sampler",),
        "guided_decoding_backend": ("auto", "xgrammar", "guidance"),
        "generation_config": ("auto",),
        "local_files_only": (False,),
        "engine_recovery_timeout": (60,),
        "intial_incremental_detokenization_offset": (5,),
    },
)

# Other spellings of values, by option.
VALUES: Mapping[str, Mapping[Any, str]] = {
    "dtype": {
        "half": "float16",
        "fp16": "float16",
        "bf16": "bfloat16",
        "float": "float32",
        "fp32": "float32",
    },
    "kv_cache_dtype": {"fp8_e4m3": "fp8", "bf16": "bfloat16"},
}


POOLER_FIELDS = {"seq_pooling_type": "pooling_type", "tok_pooling_type": "pooling_type"}


def without_lora(options: Options) -> Options:
    """Where enable_lora is False, as in vLLM, nothing else is said of adapters' sizes."""
    sizes = ("max_loras", "max_lora_rank", "max_cpu_loras") if options.get("enable_lora") is False else ()
    return {name: value for name, value in options.items() if name not in sizes}


def spelt(name: str, value: Any) -> Any:
    """A value as it is spelt here: dtypes may be NumPy's, JAX's or torch's own, and None is as by default."""
    if name == "dtype" and value is not None and not isinstance(value, str):
        value = getattr(value, "name", None) or getattr(value, "__name__", None) or str(value)
    if name == "dtype" and isinstance(value, str):
        value = value.removeprefix("torch.")
    if name == "pooler_config" and isinstance(value, Mapping):
        return {POOLER_FIELDS.get(field, field): setting for field, setting in value.items()}
    return VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
