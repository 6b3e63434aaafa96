"""`jaxinfer bench serve`."""

import json


def test_a_server_is_measured(server, cli):
    command = ["bench", "serve", server.url, "--num-prompts", "6", "--input-len", "5", "--output-len", "9", "--json"]
    figures = json.loads(cli(*command, "--request-rate", "200", "--goodput", "ttft:60000").out)
    assert figures["completed"] == 6
    assert figures["request_goodput"] == figures["request_throughput"]
    assert abs(figures["output_throughput"] / figures["request_throughput"] - 9) < 1e-6
    assert figures["median_ttft_ms"] <= figures["median_e2el_ms"]
    assert "--goodput" in cli("bench", "serve", server.url, "--goodput", "x:1").error()
    assert "404" in cli("bench", "serve", f"{server.url}/nowhere").error()
