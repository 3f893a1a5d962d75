"""Figures of several replicas stand on one page, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from river_compile.serve.metrics import Metrics, merged


def test_the_figures_of_replicas_stand_together() -> None:
    texts = {}
    for replica, tokens in (("a", 3), ("b", 5)):
        metrics = Metrics(replica, layers=4)
        metrics.generated_tokens.inc(tokens)
        metrics.exit_depth.observe(tokens)
        metrics.ended("stop")
        texts[replica] = metrics.text()
    page = merged(texts)
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert page.count("# TYPE river_exit_depth histogram") == 1
    found = {sample.labels["replica"]: sample.value for sample in families["river_generated_tokens"].samples}
    assert found == {"a": 3, "b": 5}
    buckets = {
        (sample.labels["replica"], sample.labels["le"]): sample.value
        for sample in families["river_exit_depth"].samples
        if sample.name.endswith("_bucket")
    }
    assert (buckets["a", "3.0"], buckets["b", "3.0"], buckets["b", "4.0"], buckets["b", "+Inf"]) == (1, 0, 0, 1)
