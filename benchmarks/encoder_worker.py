"""Worker of encoders.py. Arguments: system, format, folder of a model that embeds, of one that classifies, threads."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

system, kind, *folders = sys.argv[1:5]
threads = int(sys.argv[5])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

from peers import serve  # noqa: E402

Ids = list[list[int]]
BATCHES = (4, 8, 16, 32)  # texts
Batch = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of ids and mask, [texts, tokens], to a row of numbers of each


def jaxinfer() -> tuple[Callable[[str, Any], np.ndarray], dict[str, Any]]:
    from jaxinfer import LLM

    options: dict[str, Any] = {"dtype": kind} if "float" in kind else {"dtype": "float32", "quantization": kind}
    embedder, classifier = LLM(folders[0], warmup=True, **options), LLM(folders[1], warmup=True, **options)

    def call(task: str, texts: Any) -> np.ndarray:
        if task == "texts":
            return np.stack([out.outputs.embedding for out in embedder.embed(texts, use_tqdm=False)])
        asked = [{"prompt_token_ids": ids} for ids in texts]
        if task == "classify":
            outs = classifier.classify(asked, use_activation=False, use_tqdm=False)
            return np.stack([out.outputs.probs for out in outs])
        return np.stack([out.outputs.embedding for out in embedder.embed(asked, use_tqdm=False)])

    return call, {"load_seconds": embedder.load_seconds}


def in_batches(batch: Batch, texts: Ids, size: int) -> np.ndarray:
    """Sorted by tokens, as sentence-transformers does it."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    outs: list[Any] = [None] * len(texts)
    for start in range(0, len(order), size):
        some = order[start : start + size]
        ids = np.zeros((len(some), len(texts[some[0]])), np.int64)
        mask = np.zeros_like(ids)
        for row, i in enumerate(some):
            ids[row, : len(texts[i])], mask[row, : len(texts[i])] = texts[i], 1
        for i, out in zip(some, batch(ids, mask), strict=True):
            outs[i] = out
    return np.stack(outs)


def best_size(batch: Batch) -> int:
    """Texts of a batch, of those that were tried on some texts."""
    rng = np.random.default_rng(0)
    some = [[1] * length for length in np.clip(np.exp(rng.normal(3.7, 0.8, max(BATCHES))), 4, 256).astype(int)]
    seconds = {}
    in_batches(batch, some[:2], 2)
    for size in BATCHES:
        start = time.process_time()
        in_batches(batch, some, size)
        seconds[size] = time.process_time() - start
    return min(seconds, key=lambda size: seconds[size])


def sentence_transformers() -> tuple[Callable[[str, Any], np.ndarray], dict[str, Any]]:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    dtype = getattr(torch, kind)
    embedder = SentenceTransformer(folders[0], device="cpu", model_kwargs={"torch_dtype": dtype})
    classifier = AutoModelForSequenceClassification.from_pretrained(folders[1], dtype=dtype).eval()

    @torch.inference_mode()
    def embed(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        vectors: np.ndarray = embedder(features)["sentence_embedding"].float().numpy()
        return vectors

    @torch.inference_mode()
    def classify(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        outs = classifier(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        logits: np.ndarray = outs.logits.float().numpy()
        return logits

    size = best_size(embed)

    def call(task: str, texts: Any) -> np.ndarray:
        if task == "texts":
            return np.asarray(embedder.encode(texts, batch_size=size, show_progress_bar=False))
        return in_batches(classify if task == "classify" else embed, texts, size)

    return call, {"batch": size}


def onnxruntime() -> tuple[Callable[[str, Any], np.ndarray], dict[str, Any]]:
    import onnxruntime as ort
    from bert_onnx import write_onnx
    from tokenizers import Tokenizer

    def session(folder: str) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        return ort.InferenceSession(str(write_onnx(Path(folder), kind)), options, providers=["CPUExecutionProvider"])

    embedder, classifier = (session(folder) for folder in folders)

    def run(session: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        out: np.ndarray = session.run(None, {"ids": ids.astype(np.int32), "mask": mask.astype(np.int32)})[0]
        return out

    def embed(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        vectors = run(embedder, ids, mask)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    size = best_size(embed)
    tokenizer = Tokenizer.from_file(str(Path(folders[0]) / "tokenizer.json"))

    def call(task: str, texts: Any) -> np.ndarray:
        if task == "classify":
            return in_batches(lambda ids, mask: run(classifier, ids, mask), texts, size)
        rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)] if task == "texts" else texts
        return in_batches(embed, rows, size)

    return call, {"batch": size}


systems = {"jaxinfer": jaxinfer, "sentence-transformers": sentence_transformers, "onnxruntime": onnxruntime}
call, about = systems[system]()


def answer(task: str, texts: Any, times: int = 1) -> dict[str, Any]:
    """task: "embed" or "classify" of ids, or "texts". Seconds of each time, on the clock and of CPUs; some numbers."""
    seconds, used, out = [], [], np.zeros(0)
    for _ in range(times):
        clock, cpu = time.perf_counter(), time.process_time()
        out = call(task, texts)
        seconds.append(time.perf_counter() - clock)
        used.append(time.process_time() - cpu)
    return {"seconds": seconds, "cpu_seconds": used, "numbers": out[:64].tolist()}


serve(about, answer)
