"""lm-eval's own models of servers give the metrics of `jaxinfer lm-eval`."""

import pytest

from tests.test_lm_eval import evaluate, private_cache, tasks  # noqa: F401

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


NAMES = ("choice", "cloze", "said")  # of texts that are longer than the context it makes other windows


def test_completions(server, served_llm, tasks):  # noqa: F811
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from jaxinfer.lm_eval import JaxInferLM

    ours, our_samples = evaluate(JaxInferLM(served_llm), tasks, NAMES)
    theirs, their_samples = evaluate(
        LocalCompletionsAPI(
            model="tiny",
            base_url=f"{server.url}/v1/completions",
            tokenizer=str(served_llm.folder),
            max_length=served_llm.sizes.max_model_len,
            num_concurrent=1,
        ),
        tasks,
        NAMES,
    )
    assert len(ours) == len(theirs) >= 5
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert our_samples["said"] == their_samples["said"]


def test_chat_completions(server, served_llm, tasks):  # noqa: F811
    from lm_eval.models.openai_completions import LocalChatCompletion

    from jaxinfer.lm_eval import JaxInferLM

    ours, our_samples = evaluate(JaxInferLM(served_llm), tasks, ["said"], apply_chat_template=True)
    model = LocalChatCompletion(model="tiny", base_url=f"{server.url}/v1/chat/completions", num_concurrent=1)
    theirs, their_samples = evaluate(model, tasks, ["said"], apply_chat_template=True)
    assert ours == theirs
    assert our_samples == their_samples
    assert len({text for (text,) in our_samples["said"]}) > 1
