"""What the two have in common."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np

from jaxinfer.aliases import Words, names
from jaxinfer.engine.outputs import PoolingRequestOutput
from jaxinfer.engine.prompts import BYTES
from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.llm import LLM
from jaxinfer.sampling.ids import is_id
from jaxinfer.tasks.pooling import PoolingTask, TextOptions, progress

TENSORS = "tensors are torch's, which this program has not imported: import it, or take NumPy's arrays"
ONE = "the model runs in this process, on the devices of its mesh"
CONSTRUCTING = Words(
    "argument",
    same={"default_activation_function": "activation_fn"},
    instead=names(
        {
            "modules": "a model is a folder, or a hub id",
            "backend": "the backend is JAX",
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
            "pool chunk_size": ONE,
            "task": "the modules of a Router are not done here",
            "processing_kwargs": "max_seq_length is the length of texts",
            "num_workers": ONE,
        }
    ),
)


@dataclass
class ModelCard:
    """What other programs ask and say about a model.

    base_model, base_model_revision: the folder or hub id that it is, and which revision was asked for.
    model_name: another name; may be set.
    evaluations: what evaluators found: each with its numbers by name, the epoch and the step.
    """

    base_model: str
    base_model_revision: str | None
    model_name: str | None = None
    evaluations: list[tuple[Any, dict[str, float], int, int]] = field(default_factory=list)

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, float], epoch: int = 0, step: int = 0) -> None:
        """Adds to `evaluations`, as evaluators of sentence-transformers do at their end."""
        self.evaluations.append((evaluator, metrics, epoch, step))


class Face:
    """What the two have in common.

    llm: the model. model_card_data: see ModelCard.
    prompts, default_prompt_name: texts that are put before others, by name.
    """

    def __init__(
        self,
        llm: LLM,
        card: ModelCard,
        device: str | None,
        prompts: dict[str, str] | None,
        default_prompt_name: str | None,
    ):
        assert llm.loaded is not None
        self.llm, self.loaded, self.model_card_data = llm, llm.loaded, card
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
        if not is_id(value) or not 1 <= value <= longest:
            raise ValueError(f"max_seq_length is {value!r}: it must be an integer from 1 to {longest}")
        self._max_seq_length = int(value)

    @property
    def tokenizer(self) -> Any:
        """jaxinfer's own."""
        return self.llm.tokenizer

    @property
    def device(self) -> str:
        """The platform, as "cpu" or "tpu"."""
        return str(self.loaded.engine.programs.devices[0].platform)

    def evaluate(self, evaluator: Callable[..., Any], output_path: str | None = None) -> Any:
        """What one of sentence-transformers' evaluators finds."""
        return evaluator(self, output_path)

    def to(self, device: Any) -> Self:
        """Itself, where it is on the device. Raises UnsupportedError."""
        self._check_device(device)
        return self

    def eval(self) -> Self:
        """Itself: models are not trained here."""
        return self

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
            if not isinstance(prompt, str):
                raise RequestError.at("prompt", f"{prompt!r:.100} is no text")
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

    def _check(self, batch_size: int, device: Any) -> None:
        """Of arguments that only say what is done anyhow."""
        if not is_id(batch_size) or batch_size < 1:
            raise RequestError.at("batch_size", f"{batch_size!r:.100} must be an integer of at least 1")
        self._check_device(device)

    def _check_device(self, device: Any) -> None:
        if device is not None and str(device).partition(":")[0] != self.device:
            raise UnsupportedError.at(
                "device", f"{device!r:.60}: the model is on {self.device}; JAX_PLATFORMS and mesh say on which devices"
            )


def listed(inputs: Any, what: str = "a text or a list of them", where: str = "sentences", most: int = 1) -> list[Any]:
    """What any iterable gives. most: dimensions that an array may have. Raises RequestError for what is no list."""
    fine = isinstance(inputs, Iterable) and not isinstance(inputs, str | Mapping | BYTES)
    if not fine or not 1 <= getattr(inputs, "ndim", 1) <= most:
        raise RequestError.at(where, f"{what} is needed, not {type(inputs).__name__}")
    return list(inputs)


def form(convert_to_numpy: bool, convert_to_tensor: bool) -> Callable[[np.ndarray], Any]:
    """How an array is given: as it is, as torch's tensor, or as a list of tensors, one a text. Raises UnsupportedError
    where torch is not imported, which this package never does."""
    if convert_to_numpy and not convert_to_tensor:
        return lambda array: array
    if "torch" not in sys.modules:
        raise UnsupportedError.at("convert_to_tensor" if convert_to_tensor else "convert_to_numpy", TENSORS)
    from_numpy = sys.modules["torch"].from_numpy

    def tensor(array: np.ndarray) -> Any:
        return from_numpy(np.require(array, requirements="W"))  # JAX's can't be written

    return tensor if convert_to_tensor else lambda array: list(tensor(array))


def like(array: np.ndarray, *given: Any) -> Any:
    """The array as torch's tensor where something is one, or a list of them, that it was made of."""
    firsts = [one[0] if isinstance(one, list | tuple) and one else one for one in given]
    tensors = any(type(one).__module__.partition(".")[0] == "torch" for one in firsts)
    return form(True, tensors)(array)


def options_of(model_kwargs: dict[str, Any] | None, options: dict[str, Any]) -> dict[str, Any]:
    """Those of LLM, with what is given for transformers' from_pretrained."""
    ours, problems = CONSTRUCTING.read(options, [name for name in options if name not in CONSTRUCTING])
    if problems:
        raise CONSTRUCTING.error(problems, ())
    return {**(model_kwargs or {}), **ours}
