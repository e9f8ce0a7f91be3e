"""Record what ran where in every benchmark file."""

from machine import machine


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["machine_info"] = machine()
    output_json["seed"] = 0
    output_json.pop("commit_info", None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"] = {key: benchmark["stats"][key] for key in ("median", "iqr", "min", "rounds")}
