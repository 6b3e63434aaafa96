"""What a user asks of models that embed, classify or score. Names and meanings are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxinfer.aliases import ANY, Words, names, takes
from jaxinfer.errors import RequestError
from jaxinfer.sampling.ids import is_id

POOLING = Words(
    "pooling parameter",
    is_request=True,
    same={"normalize": "use_activation", "softmax": "use_activation", "activation": "use_activation"},
    instead=names(
        {
            "task": "LLM.encode has pooling_task, and embed, classify, score and reward are methods",
            "requires_token_ids": "outputs have prompt_token_ids",
            "skip_reading_prefix_cache": "nothing is kept of texts",
            "extra_kwargs": "there is nothing that would read it",
            "output_kind": "a text has one output",
            "late_interaction_params": "vectors of tokens are not compared here: token_embed gives them",
        }
    ),
    fine={"requires_token_ids": (ANY,), "skip_reading_prefix_cache": (ANY,), "output_kind": (ANY,)},
)


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """How what a model makes of a text is given. What is None is as the checkpoint says, or pooler_config.

    truncate_prompt_tokens: a longer text is cut to so many tokens, or with -1 to max_model_len: its end is cut off, and
        special tokens stay. (vLLM cuts off its beginning.)
    dimensions: vectors are cut to so many.
    use_activation: vectors are normalized, logits become probabilities and scores; `normalize` is the same.
    step_tag_id: of token_classify: only tokens of this id have an output.
    returned_token_ids: of token_classify: of the numbers of a token, only those at these places.
    """

    truncate_prompt_tokens: int | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    step_tag_id: int | None = None
    returned_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        if self.use_activation not in (None, True, False):
            wrong = f"{self.use_activation!r:.100} is neither true nor false"
            raise RequestError(f"normalize: {wrong} (of heads: use_activation)", "normalize")
        ids = [] if self.step_tag_id is None else [self.step_tag_id]
        if any(not is_id(i) or i < 0 for i in ids):
            raise RequestError.at("step_tag_id", f"{self.step_tag_id!r:.100} is no token id")
        listed = self.returned_token_ids
        if listed is not None and (not isinstance(listed, list) or any(not is_id(i) or i < 0 for i in listed)):
            raise RequestError.at("returned_token_ids", f"{listed!r:.100} is no list of ids")

    @property
    def normalize(self) -> bool | None:
        """use_activation, of vectors."""
        return self.use_activation

    def only(self, task: str, *known: str) -> PoolingParams:
        """These, where no other ones are given. Raises RequestError."""
        for name in self.__dataclass_fields__:
            if name not in known and getattr(self, name) is not None:
                raise RequestError.at(name, f"{task} has no use for it; it takes {', '.join(known)}")
        return self

    def beside(self, **given: Any) -> PoolingParams:
        """With what is given by itself. Raises RequestError for what is given twice."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if getattr(self, name) is not None}
        more = {name: value for name, value in given.items() if value is not None}
        if both := own.keys() & more.keys():
            raise RequestError.at(min(both), "it is in pooling_params, too; leave one of them out")
        return PoolingParams(**own, **more)


# Other programs' names too: of a dataclass, __init__ is what takes them.
PoolingParams.__init__ = takes(POOLING)(PoolingParams.__init__)  # type: ignore[method-assign]
