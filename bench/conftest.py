"""Record what ran where in every benchmark file, and how fast that card multiplies matrices."""

from machine import machine
from timing import matmul_tflops


def pytest_benchmark_update_json(config, benchmarks, output_json):
    # Measured at the end: the card is then as warm as it was for the benchmarks that are compared with this number.
    output_json["machine_info"] = machine() | {"matmul_tflops": matmul_tflops()}
    output_json["seed"] = 0
    output_json.pop("commit_info", None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"] = {key: benchmark["stats"][key] for key in ("median", "iqr", "min", "rounds")}
