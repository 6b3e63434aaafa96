"""`jaxinfer generate`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli.bench import BatchingOptions
from jaxinfer.cli.console import Progress, print_pieces, say_error, title
from jaxinfer.cli.guided import GuidedOptions
from jaxinfer.cli.hosts import HostOptions
from jaxinfer.cli.options import (
    CHAT_TEMPLATE,
    JSON,
    ModelOptions,
    PromptAdapterOptions,
    SamplingOptions,
    Verbosity,
    grouped,
)
from jaxinfer.cli.options import chat_template as read_chat_template

if TYPE_CHECKING:
    from jaxinfer.engine.outputs import CompletionOutput, Logprob, RequestOutput
    from jaxinfer.engine.prompts import Prompt
    from jaxinfer.llm import LLM
    from jaxinfer.sampling.params import SamplingParams


@grouped
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT", show_default=False, help="- is all of stdin; without any: piped input, one a line."
        ),
    ] = None,
    *,
    file: Annotated[
        str | None, typer.Option("--file", "-f", metavar="F", help="Prompts from a file, one a line; - is stdin.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is a user's message, put through the chat template.")
    ] = False,
    chat_template: CHAT_TEMPLATE = None,
    n: Annotated[int, typer.Option("-n", "--n", metavar="N", min=1, help="Continuations of each prompt.")] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="With --json: log-probabilities of the tokens, and of the N likeliest ones at each place."
        ),
    ] = None,
    as_json: JSON = False,
    profile: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write a trace of the generation for JAX's profiler tools.")
    ] = None,
    batching: BatchingOptions,
    load: ModelOptions,
    adapters: PromptAdapterOptions,
    hosts: HostOptions,
    sampling: SamplingOptions,
    guided: GuidedOptions,
    verbosity: Verbosity,
) -> None:
    """Continue one prompt, or each of several.

    One prompt's text is printed as it comes; several are run together and printed in order, each when it is done. With
    --json there is a line for each continuation.
    """
    if chat_template is not None and not chat:
        raise ValueError("--chat-template is for messages: give --chat too")
    if logprobs is not None and not as_json:
        raise ValueError("--logprobs are part of what --json prints: give that too")
    asked: dict[str, Any] = {"n": n, "logprobs": logprobs, **guided.changes}
    with verbosity.apply() as progress:
        adapter = adapters.used
        if hosts.join():
            batching.load(load, progress, **adapters.loading)
        texts = _texts(prompts or [], file)
        sampling.params(**asked)
        if profile is not None:
            from jaxinfer.places import local

            profile = local(profile, "--profile")
            Path(profile).mkdir(parents=True, exist_ok=True)
        llm = batching.load(load, progress, **adapters.loading)
        llm.engine.check_adapter(adapter)
        params = sampling.params(llm.get_default_sampling_params(), **asked)
        template = {} if chat_template is None else {"chat_template": read_chat_template(chat_template, llm)}
        inputs: list[Prompt] = [_as_message(llm, text, template) for text in texts] if chat else list(texts)
        with _trace(profile):
            if as_json or len(texts) > 1 or n > 1:
                outputs = llm.generate_iter(inputs, params, in_order=True, adapter=adapter)
                _print_outputs(llm, texts, outputs, params, as_json, progress)
            else:
                print_pieces(llm.stream(inputs[0], params, adapter=adapter), progress)


def _texts(arguments: list[str], file: str | None) -> list[str]:
    """The prompts, from wherever they are to come. Raises ValueError if there is none, or an empty one."""
    if arguments and file is not None:
        raise ValueError("prompts are given both as PROMPT and by --file: give only one of them")
    if file is not None:
        arguments = _lines(file)
        if not arguments:
            raise ValueError(f"--file {file}: there is no prompt in it; write one a line")
    elif not arguments:
        if sys.stdin.isatty():
            raise ValueError("no prompt: give PROMPT, --file F, or pipe one in")
        arguments = _lines("-") or [""]
    else:
        arguments = [_read("-").removesuffix("\n") if prompt == "-" else prompt for prompt in arguments]
    if "" in arguments:
        which = f"prompt {arguments.index('')}" if len(arguments) > 1 else "the prompt"
        raise ValueError(f"{which} is empty: give some text as PROMPT, by --file F, or pipe it in")
    return arguments


def _lines(file: str) -> list[str]:
    """Those that have something in them. Lines end with LF or CR LF and nothing else: a prompt may have any character
    that str.splitlines takes for an end."""
    lines = (line.removesuffix("\r") for line in _read(file).split("\n"))
    return [line for line in lines if line]


def _read(file: str) -> str:
    name = "stdin" if file == "-" else file
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start}; prompts must be UTF-8 text") from None


def _as_message(llm: LLM, text: str, template: Mapping[str, Any]) -> Prompt:
    return llm.chat_prompt([{"role": "user", "content": text}], **template)


def _trace(folder: str | None) -> contextlib.AbstractContextManager[Any]:
    if folder is None:
        return contextlib.nullcontext()
    import jax

    return jax.profiler.trace(folder)


def _print_outputs(
    llm: LLM,
    texts: list[str],
    outputs: Iterator[RequestOutput],
    params: SamplingParams,
    as_json: bool,
    progress: Progress,
) -> None:
    errors = 0
    for i, output in enumerate(outputs):
        progress.hide()
        if output.error is not None:
            errors += 1
            say_error(f"prompt {output.index}: {output.error}")
        for completion in output.outputs:
            if as_json:
                print(json.dumps(_record(llm, texts[i], output, completion)), flush=True)
                continue
            separation = "\n" if i or completion.index else ""
            which = f", {completion.index + 1} of {params.n}" if params.n > 1 else ""
            print(f"{separation}==> {title(texts[i])}{which} <==\n{completion.text}", flush=True)
        if i + 1 < len(texts):
            progress(f"generating, {i + 1} of {len(texts)} are done")
    if errors:
        raise typer.Exit(1)


def _record(llm: LLM, prompt: str, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
    """Rates are those of the whole run so far: prompts run together."""
    prompt_tokens, completion_tokens = len(output.prompt_token_ids), len(completion.token_ids)
    return {
        "prompt": prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        **({"index": completion.index} if len(output.outputs) > 1 else {}),
        **({} if completion.logprobs is None else {"logprobs": [_likeliest(step) for step in completion.logprobs]}),
        **({} if output.error is None else {"error": output.error}),
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
        "timing": {
            "load_seconds": llm.load_seconds,
            "compile_seconds": llm.compile_seconds,
            "time_to_first_token": output.metrics.time_to_first_token,
            "prefill_tokens_per_second": llm.stats.prefill_tokens_per_second,
            "decode_tokens_per_second": llm.stats.decode_tokens_per_second,
        },
    }


def _likeliest(step: Mapping[int, Logprob]) -> list[dict[str, Any]]:
    """Of one token, the sampled one first, as `jaxinfer batch` writes it."""
    return [
        {"token_id": i, "token": logprob.decoded_token, "logprob": logprob.logprob, "rank": logprob.rank}
        for i, logprob in step.items()
    ]
