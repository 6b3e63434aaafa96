"""A plan as numbers by name: what `jaxinfer plan --json` prints, and what its tables and its picture show."""

from __future__ import annotations

from typing import Any

from jaxinfer.engine.config import EngineConfig
from jaxinfer.models.config import ModelConfig
from jaxinfer.plan.compile import Plan
from jaxinfer.plan.fit import Fit
from jaxinfer.plan.roofline import Bound, bound

CONTEXT = 1024  # tokens of each sequence, where nobody says how many
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
UNKNOWN = ("padding", "temporaries", "code")  # without a compiler


def context_of(shape: ModelConfig, wanted: int | None, options: EngineConfig) -> int:
    """How many tokens each sequence has when it decodes: those that are wanted, of as many as the model takes with
    these options. Raises ValueError for more."""
    most = min(options.get("max_model_len") or shape.max_context, shape.max_context)
    if wanted is not None and wanted > most:
        limit = "max_model_len is" if most < shape.max_context else "config.json defines the model for at most"
        raise ValueError(f"context is {wanted}: {limit} {most}")
    return wanted or min(CONTEXT, most)


def figures(plan: Plan, context: int) -> dict[str, Any]:
    """Bytes are each device's, and so is what a step takes; rates are of all, and of a chip. context: tokens that each
    sequence has when it decodes."""
    fit = plan.fit
    sizes = {
        "weights": fit.weights,
        "cache": fit.sizes.bytes,
        "slots": fit.slots,
        "hidden_states": fit.hidden,
        **({"adapters": fit.adapters} if fit.adapters else {}),
        "padding": plan.padding,
        "temporaries": plan.temporaries,
        "code": plan.code,
        "total": plan.total,
        "memory": fit.target.chip.memory,
        "free": plan.free,
    }
    longest = fit.max_num_batched_tokens
    piece = longest // fit.shards
    prompt = step_bound(fit, piece, piece, 1)
    return {
        "topology": fit.target.name,
        "mesh": fit.mesh,
        "tensor": fit.tensor,
        "experts_over": fit.tensor * fit.gathered if fit.model.config.experts_per_token else None,
        "devices": fit.devices,
        "devices_per_chip": fit.target.per_chip,
        "compiled": bool(plan.programs),
        "dtype": str(fit.model.dtype),
        "quantization": fit.model.quantization,
        "precision": fit.model.precision,
        "kv_cache_dtype": str(fit.programs.layout.dtype),
        "max_model_len": fit.sizes.max_model_len,
        "max_adapters": fit.programs.adapter_limits.slots,
        "max_lora_rank": fit.programs.adapter_limits.rank,
        "bytes": {n: b for n, b in sizes.items() if plan.programs or n not in UNKNOWN},
        "cache_tokens": fit.cache_tokens,
        "bytes_per_token": fit.programs.layout.bytes_per_token,
        "bytes_per_sequence": fit.programs.layout.slot_bytes,
        "snapshots": fit.sizes.snapshots,
        "programs": [program.figures() for program in plan.programs],
        "context": context,
        "rows_of_context": fit.rows_of(context),
        "decode": [{"rows": rows, **decoding(fit, rows, context)} for rows in _batches(fit.max_num_seqs)],
        "prefill": {"tokens": longest, **_bound(fit, prompt, longest)},
    }


def decoding(fit: Fit, rows: int, context: int) -> dict[str, Any]:
    """The bound of a step of `rows` sequences, and whether there is room in the cache for them."""
    each = -(-rows // fit.shards)
    return {"fits": rows <= fit.rows_of(context), **_bound(fit, step_bound(fit, each, context, each), rows)}


def step_bound(fit: Fit, tokens: int, context: int, rows: int) -> Bound:
    """Of a shard of rows: tokens of a step, and context of each row then."""
    sizes = fit.tensor, tokens, context, rows, fit.fsdp, fit.gathered
    return bound(fit.model, fit.target.chip, fit.programs.layout, *sizes)


def _batches(most: int) -> list[int]:
    return [*(rows for rows in BATCHES if rows < most), most]


def _bound(fit: Fit, step: Bound, tokens: int) -> dict[str, Any]:
    return {
        "seconds": step.seconds,
        "binds": step.binds,
        "tokens_per_second": tokens / step.seconds,
        "tokens_per_second_per_chip": tokens / step.seconds * fit.target.per_chip / fit.devices,
        "flops": step.flops,
        "bytes_moved": step.moved,
        "bytes_sent": step.sent,
        "compute_seconds": step.compute,
        "memory_seconds": step.memory,
        "links_seconds": step.links,
        "busiest_rows": step.busiest_rows,
        "busiest_experts": step.busiest_experts,
    }
