"""What the two have in common."""

from __future__ import annotations

import dataclasses
from types import TracebackType
from typing import Any, Self

from jaxinfer.aliases import Words, names
from jaxinfer.engine.outputs import PoolingRequestOutput
from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.llm import LLM
from jaxinfer.tasks.pooling import PoolingTask, TextOptions, progress

NUMPY = "what comes back is NumPy's: torch.from_numpy makes tensors of it"
ONE = "the model runs in this process, on the devices of its mesh"
CONSTRUCTING = Words(
    "argument",
    same={"default_activation_function": "activation_fn"},
    instead=names(
        {
            "modules": "a model is a folder, or a hub id",
            "backend": "the backend is JAX",
            "cache_folder": "HF_HUB_CACHE says where downloads are kept",
            "tokenizer_kwargs processor_kwargs tokenizer_args": "tokenizer is another one, max_seq_length its length",
            "config_kwargs config_args": "here it is hf_overrides",
            "model_card_data": "models are not saved here",
            "keep_in_fp32_modules": "dtype is of the model; products are summed in float32",
        }
    ),
    fine={"backend": ("torch", "jax")},  # torch is what it is where nobody says anything
)
ASKING = Words(
    "argument",
    is_request=True,
    same={"inputs": "sentences", "activation_fct": "activation_fn"},
    instead=names(
        {
            "convert_to_tensor": NUMPY,
            "pool chunk_size": ONE,
            "task": "the modules of a Router are not done here",
            "processing_kwargs": "max_seq_length is the length of texts",
            "num_workers": ONE,
        }
    ),
)


class Face:
    """What the two have in common.

    llm: the model. prompts, default_prompt_name: texts that are put before others, by name.
    """

    def __init__(self, llm: LLM, device: str | None, prompts: dict[str, str] | None, default_prompt_name: str | None):
        assert llm.loaded is not None
        self.llm, self.loaded = llm, llm.loaded
        self._check_device(device)
        said = self.loaded.sentence or self.loaded.pairs
        assert said is not None
        self.prompts = {**(said.prompts or {}), **(prompts or {})}
        self.default_prompt_name = said.default_prompt if default_prompt_name is None else default_prompt_name
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise self._no_prompt("default_prompt_name", self.default_prompt_name)
        self._max_seq_length = self.loaded.max_model_len

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text; a longer one loses its end, as in sentence-transformers. May be set, up to what the model
        is defined for."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        longest = self.loaded.longest
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= longest:
            raise ValueError(f"max_seq_length is {value!r}: it must be an integer from 1 to {longest}")
        self._max_seq_length = value

    @property
    def tokenizer(self) -> Any:
        """jaxinfer's own."""
        return self.llm.tokenizer

    @property
    def device(self) -> str:
        """The platform, as "cpu" or "tpu"."""
        return str(self.loaded.engine.programs.devices[0].platform)

    def close(self) -> None:
        """Frees the memory."""
        self.llm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.llm!r}>"

    def _prompt(self, prompt: str | None, name: str | None) -> str | None:
        """A prompt comes before a name, and both before the default."""
        if prompt is not None:
            return prompt
        name = self.default_prompt_name if name is None else name
        if name is None:
            return None
        if name not in self.prompts:
            raise self._no_prompt("prompt_name", name)
        return self.prompts[name]

    def _no_prompt(self, where: str, name: object) -> RequestError:
        there = f"there are {', '.join(self.prompts)}" if self.prompts else "there are none"
        return RequestError.at(where, f"{name!r:.100} is no prompt: {there}")

    def _text_options(self, task: PoolingTask[Any], prompt: str | None) -> TextOptions:
        return dataclasses.replace(task.text_options(prompt), most=self.max_seq_length, truncate=True)

    def _outputs(
        self, task: PoolingTask[Any], texts: list[Any], prompt: str | None, options: Any, shown: Any
    ) -> list[Any]:
        """What the task makes of them. Raises ValueError where it makes none of one."""
        run = task.run(texts, self._text_options(task, prompt), options, "raise")
        outputs: list[PoolingRequestOutput[Any]] = list(progress(run, len(texts), bool(shown), task.done))
        for output in outputs:
            if output.error is not None:
                raise ValueError(f"text {output.index}: {output.error}")
        return [output.outputs for output in outputs]

    def _check(self, batch_size: int, convert_to_numpy: bool, device: Any) -> None:
        """Of arguments that only say what is done anyhow."""
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise RequestError.at("batch_size", f"{batch_size!r:.100} must be an integer of at least 1")
        if convert_to_numpy is not True:
            raise UnsupportedError.at("convert_to_numpy", NUMPY)
        self._check_device(device)

    def _check_device(self, device: Any) -> None:
        if device is not None and str(device).partition(":")[0] != self.device:
            raise UnsupportedError.at(
                "device", f"{device!r:.60}: the model is on {self.device}; JAX_PLATFORMS and mesh say on which devices"
            )


def options_of(model_kwargs: dict[str, Any] | None, options: dict[str, Any]) -> dict[str, Any]:
    """Those of LLM, with what is given for transformers' from_pretrained."""
    ours, problems = CONSTRUCTING.read(options, [name for name in options if name not in CONSTRUCTING])
    if problems:
        raise CONSTRUCTING.error(problems, ())
    return {**(model_kwargs or {}), **ours}
