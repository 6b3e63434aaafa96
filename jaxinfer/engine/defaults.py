"""What a checkpoint asks of sampling: the fields of its generation_config.json, as transformers' GenerationConfig and
`GenerationMixin._get_logits_processor` (5.24) have them. Those that decide no token are left alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxinfer.sampling.ids import are_ids, is_id
from jaxinfer.sampling.params import FILTERS, SamplingParams

log = logging.getLogger("jaxinfer")

FIRST_KNOWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # what is wrong with these is an error
RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_strings": "stop"}
SAME = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "min_length",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
)
# What is not done, with the value that asks for nothing, if that is not nothing itself.
NOT_DONE = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "encoder_no_repeat_ngram_size": None,
    "top_h": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "forced_decoder_ids": None,
    "watermarking_config": None,
    "token_healing": None,
    "remove_invalid_values": None,
    "max_time": None,
}


def checkpoint_params(
    generation: Mapping[str, Any], config: Mapping[str, Any], folder: Path, vocab_size: int
) -> dict[str, Any]:
    """The arguments of SamplingParams that a checkpoint asks for, greedy unless it says `do_sample`. What is not done,
    or makes no sense, is left out with a warning, but for the fields that `SamplingParams` itself is to refuse.

    Without a generation_config.json, config.json has the fields, as old checkpoints do.
    """
    fields, name = (generation, "generation_config.json") if generation else (config, "config.json")
    sample, biases = fields.get("do_sample"), fields.get("sequence_bias")
    if not isinstance(sample, bool | None):
        log.warning("%s: do_sample %.60r is left out: it must be true or false", folder / name, sample)
        fields = {**fields, "do_sample": None}
    if not isinstance(biases, list | None):
        log.warning("%s: sequence_bias %.60r is left out: it must be a list of [ids, bias]", folder / name, biases)
    chosen: dict[str, Any] = {} if fields.get("do_sample") else {"temperature": 0.0}
    for field, parameter, value in _fields(fields, vocab_size):
        try:
            SamplingParams(**{"max_tokens": None, parameter: value})
        except ValueError as error:
            if field not in FIRST_KNOWN or not generation:
                log.warning("%s: %s is left out: %s", folder / name, field, error)
                continue
        chosen[parameter] = value
    if undone := [field for field, nothing in NOT_DONE.items() if fields.get(field) and fields[field] != nothing]:
        log.warning("%s asks for what is not done here: %s", folder / name, ", ".join(undone))
    least, most = chosen.get("min_tokens", 0), chosen.get("max_tokens")
    if most is None:  # its min_tokens must fit, whatever is the default
        return chosen | {"max_tokens": max(least, SamplingParams().max_tokens or 0)}
    return chosen | {"min_tokens": min(least, most)}


def _fields(fields: Mapping[str, Any], vocab_size: int) -> Iterator[tuple[str, str, Any]]:
    """Each field that is there, what it is called here, and its value."""
    filters = sorted(FILTERS | {"temperature"}) if fields.get("do_sample") else []
    for field in (*filters, *SAME, *RENAMED):
        value = fields.get(field)
        if value is None or (field == "min_length" and fields.get("min_new_tokens") is not None):
            continue
        if field == "forced_eos_token_id" and isinstance(value, list) and value:
            value = value[0]  # whichever it is, it ends the text
        if field == "bad_words_ids" and isinstance(value, list):
            value = [word for word in value if not are_ids(word) or _known(word, vocab_size) == list(word)]
        elif field.startswith("forced") and is_id(value) and not 0 <= value < vocab_size:
            continue  # as it could never come
        elif field.endswith("suppress_tokens") and are_ids(value):
            value = _known(value, vocab_size)
        yield field, RENAMED.get(field, field), value
    bias = dict(_biases(fields.get("sequence_bias"), vocab_size))
    if bias:
        yield "sequence_bias", "logit_bias", bias


def _known(ids: Any, vocab_size: int) -> list[int]:
    """Those that the model has: -1, say, stands for nothing in some of OpenAI's."""
    return [i for i in ids if 0 <= i < vocab_size]


def _biases(sequence_bias: Any, vocab_size: int) -> Iterator[tuple[int, Any]]:
    """Of sequence_bias, those of single tokens: it is [[ids], bias] for each sequence."""
    for entry in sequence_bias if isinstance(sequence_bias, list) else ():
        ids: Any = entry[0] if isinstance(entry, list) and len(entry) == 2 else None
        if are_ids(ids) and len(_known(ids, vocab_size)) == len(ids) == 1:
            yield ids[0], entry[1]
        else:
            log.warning("sequence_bias %.60r is not done here: only those of single tokens are", entry)
