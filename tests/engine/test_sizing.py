"""How many pages fit, and what is said when what was asked for does not."""

from typing import Any

import jax
import pytest

from jaxinfer.attention import CacheLayout, LayerLayout
from jaxinfer.cache import ChunkedSpec, FullAttentionSpec
from jaxinfer.engine import load
from jaxinfer.engine.config import check_options
from jaxinfer.engine.sizing import Sizes, choose_sizes, page_size, size_cache
from jaxinfer.models.model import AbstractModel
from tests.plan.test_roofline import CONFIG

GIB = 2**30


def layout(bytes_per_token: int) -> CacheLayout:
    spec = FullAttentionSpec(1, bytes_per_token // 8)
    return CacheLayout.of([LayerLayout.of(spec, "float32", jax.devices()[0])], 10**6)


def size(**changes: Any) -> Sizes:
    """1 KiB a token, 16 KiB a page."""
    arguments = {
        "layout": layout(1024),
        "page_size": 16,
        "reach": 32,
        "max_num_seqs": 4,
        "max_model_len": None,
        "max_context": 1000,
        "available": GIB,
    }
    return size_cache(**(arguments | changes))


def test_no_more_than_all_sequences_at_full_length_need():
    sizes = size()
    assert sizes == Sizes(max_model_len=1000, num_pages=4 * 63 + 1, page_size=16, bytes=(4 * 63 + 1) * 16 * 1024)
    assert size(max_model_len=160).num_pages == 4 * 10 + 1


def test_no_more_than_there_is_memory_for():
    available = 100 * 16 * 1024 + 5  # 100 pages, one of them reserved
    sizes = size(available=available)
    assert (sizes.num_pages, sizes.max_model_len) == (100, 1000)
    assert sizes.bytes <= available


def test_a_length_of_its_own_choice_shrinks_to_what_fits():
    sizes = size(available=11 * 16 * 1024)
    assert (sizes.num_pages, sizes.max_model_len) == (11, 160)
    assert size(available=2 * 16 * 1024).max_model_len == 16


def test_a_length_that_was_asked_for_does_not_shrink():
    with pytest.raises(ValueError, match="lower max_model_len to at most 160 or raise kv_cache_memory"):
        size(max_model_len=900, available=11 * 16 * 1024)
    assert size(max_model_len=160, available=11 * 16 * 1024).max_model_len == 160
    with pytest.raises(ValueError, match="at most 160"):
        size(max_model_len=161, available=11 * 16 * 1024)


@pytest.mark.parametrize("available", [0, 1, 2 * 16 * 1024 - 1])
def test_no_room_for_a_single_page(available):
    with pytest.raises(ValueError, match=f"and there are {available:,}: raise kv_cache_memory or take a device"):
        size(available=available)


def test_the_error_has_the_numbers():
    with pytest.raises(ValueError) as error:
        size(layout=layout(2**20), max_model_len=1000, max_context=2000, available=GIB // 2)
    assert str(error.value) == (
        "max_model_len 1000 needs 1,073,741,824 bytes of KV cache, and there are 536,870,912: lower max_model_len to "
        "at most 496 or raise kv_cache_memory or take a device with more memory"
    )
    size(layout=layout(2**20), max_model_len=496, max_context=2000, available=GIB // 2)


def test_beyond_what_the_model_is_defined_for():
    with pytest.raises(ValueError, match="max_model_len is 1001: config"):
        size(max_model_len=1001)


class FakeDevice:
    def __init__(self, platform: str):
        self.platform = platform


def test_pages_are_as_large_as_their_table_needs_on_tpu():
    assert page_size(None, FakeDevice("cpu"), 256, 131072) == 16
    assert page_size(8, FakeDevice("gpu"), 256, 131072) == 8
    assert page_size(None, FakeDevice("tpu"), 64, 4096) == 64
    assert page_size(None, FakeDevice("tpu"), 256, 131072) == 512  # 256 rows of 256 pages: 256 KiB
    assert page_size(256, FakeDevice("tpu"), 128, 131072) == 256
    with pytest.raises(ValueError, match=r"page_size is 16: on TPU, 256 sequences of up to 131072 tokens need .* 512;"):
        page_size(16, FakeDevice("tpu"), 256, 131072)
    assert page_size(None, FakeDevice("cpu"), 64, 2**23) == 128  # elsewhere tables may be of 16 MiB
    assert page_size(16, FakeDevice("gpu"), 64, 2**23) == 16


def test_pages_divide_chunks():
    assert page_size(None, FakeDevice("cpu"), 64, 4096, 20) == 4
    assert page_size(None, FakeDevice("cpu"), 64, 2**23, 8192) == 128
    assert page_size(None, FakeDevice("cpu"), 64, 2**23, 16) == 16
    assert page_size(None, FakeDevice("tpu"), 256, 4096, 48) == 16
    assert page_size(None, FakeDevice("tpu"), 256, 2**21, 8192) == 8192
    with pytest.raises(
        ValueError, match=r"page_size is 8192: on TPU, 256 .* need more, which can't divide 8192, the m"
    ):
        page_size(None, FakeDevice("tpu"), 256, 2**21 + 1, 8192)
    with pytest.raises(
        ValueError, match=r"page_size is 64: on TPU, 256 sequences of .* need at least 8192; or lower max"
    ):
        page_size(64, FakeDevice("tpu"), 256, 2**21, 8192)


def chunked_layout():
    specs = FullAttentionSpec(1, 128), ChunkedSpec(1, 128, 8192)
    return CacheLayout.of([LayerLayout.of(spec, "float32", jax.devices()[0]) for spec in specs], 10**7)


def test_lengths_that_nobody_asked_for():
    """Are what tables of pages have room for that divide chunks, or what there is memory for."""
    assert chunked_layout().chunk == 8192
    assert layout(1024).chunk == 0
    rest = {"reach": 32, "max_num_seqs": 256, "max_context": 10**7}
    for platform, available, most, pages in (
        ("cpu", 2**40, 10**7, 1024),
        ("tpu", 2**40, 2**21, 8192),
        ("tpu", 2**28, 2**18 - 2 * 8192, 1024),
        ("cpu", 2**28, 247 * 1024, 16),
    ):
        sizes = choose_sizes(
            chunked_layout(), FakeDevice(platform), None, max_model_len=None, available=available, **rest
        )
        assert (sizes.max_model_len, sizes.page_size) == (most, pages), platform
    asked = choose_sizes(chunked_layout(), FakeDevice("tpu"), None, max_model_len=4096, available=2**40, **rest)
    assert (asked.max_model_len, asked.page_size) == (4096, 64)


class Chip:
    platform = "tpu"

    def memory_stats(self):
        return {"bytes_limit": 1000, "bytes_in_use": 300}


def test_memory_is_asked_of_a_device_of_this_host(monkeypatch):
    """On several hosts the first device of the mesh is another one's for most of them, and JAX refuses to say."""
    device = jax.devices()[0]
    monkeypatch.setattr(jax, "local_devices", lambda: [Chip()])
    for placed in ("placed_decode_state", "placed_hidden"):
        monkeypatch.setattr(load, placed, lambda *_: ())
    options = check_options({"memory_utilization": 0.95})
    assert load._available(AbstractModel.from_config(CONFIG, "float32"), device, options) == pytest.approx(600, abs=1)
