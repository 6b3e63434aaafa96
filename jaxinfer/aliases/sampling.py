"""Sampling parameters, and arguments of calls: those of vLLM, transformers' GenerationConfig and mlx-lm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxinfer.aliases import ANY, Options, Words, names
from jaxinfer.aliases.loading import GRAMMAR, PROMPT_ADAPTER, SPECULATIVE, TEXT, XLA


def _do_sample(value: Any, options: Options) -> dict[str, Any]:
    temperature = options.get("temperature", options.get("temp"))
    if temperature is None:
        return {"temperature": 1.0 if value else 0.0}
    if bool(value) != bool(temperature):
        raise ValueError(f"{value} is temperature {'above 0' if value else '0'}, and temperature is {temperature!r}")
    return {}


def _field(name: str) -> Callable[[Any, Options], dict[str, Any]]:
    """Of structured_outputs."""
    return lambda value, _: {"structured_outputs": {name: value}}


def _guided_decoding(value: Any, _: Options) -> dict[str, Any]:
    """vLLM's GuidedDecodingParams, or a dict of its fields."""
    fields = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    unsaid = {"backend", "backend_was_auto", "disable_fallback"}
    asked = {name: v for name, v in fields.items() if name not in unsaid and v is not None}
    if not asked:
        raise ValueError("it says nothing: here it is structured_outputs")
    return {"structured_outputs": asked}


def _response_format(value: Any, _: Options) -> dict[str, Any]:
    """OpenAI's."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    match kind:
        case "text":
            return {}
        case "json_object":
            return {"structured_outputs": {"json_object": True, "asked_as": "response_format"}}
        case "json_schema":
            inner = value.get("json_schema")
            if not isinstance(inner, Mapping) or inner.get("schema") is None:
                raise ValueError('it must have {"json_schema": {"schema": {...}}}')
            return {"structured_outputs": {"json": inner["schema"], "asked_as": "response_format"}}
        case "structural_tag":
            return {"structured_outputs": {"structural_tag": value, "asked_as": "response_format"}}
    raise ValueError(f"its type is {kind!r:.60}: it must be text, json_object, json_schema or structural_tag")


BEAMS = "LLM.beam_search(prompts, beam_width=...) has beams"
RANKS = "logprobs=20 has the likeliest tokens with their log-probabilities, and RequestOutput all that is known"
NOT_SAMPLED = "temperature, top_p, top_k, min_p, typical_p and the penalties are there"
STREAM = "LLM.stream gives text as it comes"

SAMPLING = Words(
    "sampling parameter",
    is_request=True,
    same={
        "max_new_tokens": "max_tokens",
        "max_completion_tokens": "max_tokens",
        "min_new_tokens": "min_tokens",
        "num_return_sequences": "n",
        "stop_strings": "stop",
        "stop_sequences": "stop",
        "temp": "temperature",
        "repeat_penalty": "repetition_penalty",
    },
    made={
        "do_sample": _do_sample,
        "guided_json": _field("json"),
        "guided_regex": _field("regex"),
        "guided_choice": _field("choice"),
        "guided_grammar": _field("grammar"),
        "guided_json_object": _field("json_object"),
        "guided_whitespace_pattern": _field("whitespace_pattern"),
        "guided_decoding": _guided_decoding,
        "response_format": _response_format,
    },
    instead=names(
        {
            "do_sample": "here it is temperature: 0 is greedy",
            "guided_json guided_regex guided_choice guided_grammar guided_json_object guided_whitespace_pattern "
            "guided_decoding response_format": "here it is structured_outputs",
            "best_of": "all n continuations come back: raise n, and take the one of the best cumulative_logprob",
            "use_beam_search num_beams num_beam_groups diversity_penalty length_penalty early_stopping "
            "constraints force_words_ids": BEAMS,
            "max_length": "max_tokens counts new tokens alone",
            "max_time": "max_tokens is the only limit",
            "logits_processors logits_processor sequence_bias prefix_allowed_tokens_fn sampler": "logit_bias, "
            "allowed_token_ids and bad_words are there",
            "decoder_start_token_id": "a prompt of token ids ends as it is to",
            "encoder_no_repeat_ngram_size encoder_repetition_penalty repetition_context_size "
            "repetition_detection": "no_repeat_ngram_size, repetition_penalty, presence_penalty and frequency_penalty "
            "are there",
            "top_h penalty_alpha dola_layers guidance_scale xtc_probability "
            "xtc_threshold xtc_special_tokens min_tokens_to_keep watermarking_config renormalize_logits low_memory "
            "token_healing negative_prompt_ids negative_prompt_attention_mask custom_generate": NOT_SAMPLED,
            "remove_invalid_values": "logits that are not numbers are no choice: leave it out",
            "eos_token_id": "stop_token_ids has ids beside the checkpoint's own, and ignore_eos leaves those out",
            "stopping_criteria": "stop and stop_token_ids are there",
            "extra_eos_token": "stop has texts, and stop_token_ids ids",
            "pad_token_id": "nothing is padded",
            "bos_token_id": "give a prompt as token ids for another one",
            "input_ids inputs": "prompts may be token ids",
            "attention_mask": "prompts are lists of their own length: nothing is padded",
            "generation_config": "give its fields; without any they are the checkpoint's",
            "truncate_prompt_tokens": "cut the prompt's token ids",
            "prompt_logprob_token_ids prompt_logprob_start logprob_token_ids flat_logprobs return_dict_in_generate "
            "output_scores output_logits output_attentions output_hidden_states": RANKS,
            "spaces_between_special_tokens": "text is as the tokenizer decodes it",
            "output_kind": STREAM,
            "streamer stream": STREAM,
            "stream_interval": STREAM,
            "verbose": "jaxinfer.stream gives text to print as it comes",
            "skip_clone output_text_buffer_length": "leave it out",
            "extra_args custom_params": "there is nothing that would read it",
            "skip_reading_prefix_cache": "LLM(enable_prefix_caching=False) does it for all requests",
            "thinking_token_budget": "max_tokens counts all tokens",
            "routed_experts_prompt_start trace_decode_token_ids": "there is nothing like it here",
            "lora_request": "generate(..., adapter=NAME) has it, and LLM.generate takes a lora_request, too",
            "assistant_model prompt_lookup_num_tokens num_assistant_tokens num_assistant_tokens_schedule is_assistant "
            "assistant_confidence_threshold max_matching_ngram_size assistant_early_exit assistant_lookbehind "
            "target_lookbehind assistant_ensemble_weight speculation_type use_mtp draft_model "
            "num_draft_tokens": SPECULATIVE,
            "use_cache": "there is always a cache",
            "cache_implementation cache_config max_cache_len prompt_cache prompt_cache_file past_key_values "
            "max_kv_size": "LLM has a cache, of kv_cache_memory bytes",
            "kv_bits kv_group_size quantized_kv_start": "LLM(kv_cache_dtype=...) has them in eight bits",
            "prefill_step_size prefill_chunk_size": "LLM(max_num_batched_tokens=...) says it",
            "compile_config disable_compile continuous_batching_config synced_gpus": XLA,
            "prompt_progress_callback": "LLM.generate(use_tqdm=True) shows a bar",
            "input_embeddings inputs_embeds": "prompts are text or token ids",
        }
    ),
    fine={
        "best_of": (1,),
        "num_beams": (1,),
        "num_beam_groups": (1,),
        "length_penalty": (1.0,),
        "encoder_repetition_penalty": (1.0,),
        "guidance_scale": (1.0,),
        "min_tokens_to_keep": (1,),
        "repetition_context_size": (20,),
        "pad_token_id": (ANY,),
        "skip_clone": (ANY,),
        "output_text_buffer_length": (0,),
        "spaces_between_special_tokens": (True,),
        "output_kind": ("CUMULATIVE", "FINAL_ONLY", 0, 2),
        "thinking_token_budget": (-1,),
        # 0 is a token, too
        **dict.fromkeys(["eos_token_id", "bos_token_id"], ()),
        "decoder_start_token_id": (),
        "stream_interval": (1,),
        "use_cache": (True,),
        "kv_group_size": (64,),
        "quantized_kv_start": (0, 5000),
        "prefill_step_size": (2048,),
        "num_draft_tokens": (3,),
        "num_assistant_tokens": (20,),
        "synced_gpus": (False,),
        "disable_compile": (False,),
    },
)

CALL = Words(
    "argument",
    is_request=True,
    same={"lora_request": "adapter"},
    instead=names(
        {
            "prompt_token_ids": 'a prompt may be {"prompt_token_ids": ids}',
            "prompt_adapter_request": PROMPT_ADAPTER,
            "tokenization_kwargs": "give token ids for another way to split text",
            "guided_options_request": GRAMMAR,
            "mm_processor_kwargs multi_modal_data": TEXT,
            "chat_template_content_format": "content reaches the template as it is given",
        }
    ),
    fine={"chat_template_content_format": ("auto", "string")},
)
