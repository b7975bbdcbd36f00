import time

import pytest

from backends.engine_load import EngineLoad, read_load, read_metrics

VLLM = b"""# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 12345.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 5.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:num_requests_waiting{engine="1",model_name="m"} 7.0
vllm:num_requests_waiting_by_reason{engine="1",model_name="m",reason="capacity"} 99.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 9.5e-01
"""


def test_each_engine_of_a_group_has_its_own_figures():
    assert read_metrics(VLLM) == {0: EngineLoad(3, 0, 0.25), 1: EngineLoad(5, 7, 0.95)}


def test_together_they_add_up_and_are_as_full_as_the_fullest():
    loads = read_metrics(VLLM)
    assert loads[0] + loads[1] == EngineLoad(8, 7, 0.95)


@pytest.mark.parametrize(
    ("page", "loads"),
    [
        (b"", {}),
        (b"<html>vllm: not here</html>", {}),
        (b'vllm:num_requests_running{model_name="m"} NaN\n', {}),
        (b'vllm:num_requests_running{model_name="m"} ..\n', {}),
        (b'vllm:num_requests_running{model_name="m"} 2', {0: EngineLoad(2, 0, 0.0)}),
        (b'vllm:num_requests_running{model_name="a",engine="0"} 2\nvllm:num_requests_running{model_name="b",engine="0"} 1\n', {0: EngineLoad(3, 0, 0.0)}),
        (b'vllm:gpu_cache_usage_perc{model_name="m"} 0.5\n', {0: EngineLoad(0, 0, 0.5)}),
        (b'vllm:kv_cache_usage_perc{model_name="m"} 17\n', {0: EngineLoad(0, 0, 1.0)}),
    ],
)  # fmt: skip
def test_older_names_and_odd_pages_are_read_for_what_they_have(page, loads):
    assert read_metrics(page) == loads


def test_a_page_of_a_megabyte_is_searched_quickly():
    histogram = b"".join(
        b'vllm:time_to_first_token_seconds_bucket{engine="0",le="%d",model_name="m"} 5.0\n' % n
        for n in range(14_000)
    )
    page = VLLM + histogram
    started = time.process_time()
    assert len(read_metrics(page)) == 2
    assert time.process_time() - started < 0.2


@pytest.mark.parametrize(
    ("body", "load"),
    [
        (b'{"server_load":4}', EngineLoad(4, 0, 0.0)),
        (b'{"server_load":-1}', EngineLoad(0, 0, 0.0)),
        (b"{}", None),
        (b"Not Found", None),
    ],
)
def test_the_count_of_load_is_read(body, load):
    assert read_load(body) == load


@pytest.mark.parametrize(
    ("page", "load"),
    [
        (
            (
                b"# HELP sglang:num_running_reqs The number of running requests.\n# TYPE sglang:num_running_reqs gauge\n"
                b'sglang:num_running_reqs{model_name="m"} 3.0\nsglang:num_running_reqs_offline{model_name="m"} 9.0\n'
                b'sglang:num_queue_reqs{model_name="m"} 2.0\nsglang:token_usage{model_name="m"} 0.25\n'
            ),
            EngineLoad(3, 2, 0.25),
        ),
        (
            (
                b"# TYPE llamacpp:requests_processing gauge\nllamacpp:requests_processing 1\n"
                b"llamacpp:requests_deferred 4\nllamacpp:kv_cache_usage_ratio 0.5\n"
            ),
            EngineLoad(1, 4, 0.5),
        ),
        (
            b"tgi_batch_current_size 5\ntgi_batch_current_max_tokens 900\ntgi_queue_size 7\n",
            EngineLoad(5, 7, 0.0),
        ),
    ],
    ids=["sglang", "llama.cpp", "tgi"],
)
def test_other_engines_have_other_names_for_the_same(page, load):
    assert read_metrics(page) == {0: load}
