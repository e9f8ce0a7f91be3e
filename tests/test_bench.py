"""The benchmarks' own arithmetic and tables; their runs over tiny models and sequences on the CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
if not (BENCH / "report.py").is_file():
    pytest.skip("the benchmarks are in the checkout only", allow_module_level=True)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def benchmark(group, peer, seconds, **extra):
    extra = {"flop": 4e12, **extra}
    return {"group": group, "params": {"peer": peer}, "extra_info": extra, "stats": {"median": seconds}}


def attention_document(**machine):
    group = "D=64 H=32 N=1024 causal"
    seconds = {"sdpa default": 0.01, "sdpa flash": 0.02, "ours": 0.008, "flex": 0.015}
    found = [benchmark(group, name, time, peak_bytes=3 * 2**20) for name, time in seconds.items()]
    found.append(benchmark("D=256 H=8 N=1024 full", "sdpa default", 0.01))  # of which ours is missing
    return {"machine_info": machine, "benchmarks": found}


def steps_document():
    def variant(ms, peak):
        return {"ms": ms, "peak_bytes": peak * 2**30, "overhead": ms / 100 - 1}

    rows = []
    for tokens in (1024, 16384):
        variants = {"plain": {"ms": 100.0, "peak_bytes": 2**30}, "log_every=1": variant(103.0, 2)}
        variants |= {"idle": variant(100.2, 1), "record_every=1": variant(102.0, 2)}
        variants |= {"log_every=100": variant(100.4, 2), "eager": variant(300.0, 9)}
        rows.append({"model": "gpt2", "tokens": tokens, "variants": variants})
    rows[1]["variants"]["eager"] = "out of memory"
    return {"machine": {}, "steps": rows}


def cells(table):
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_a_forward_table_compares_with_sdpa_and_with_the_ceiling():
    from tables import tables

    found = tables(attention_document(matmul_tflops=800.0))
    (row,) = cells(found["core"])
    assert row["ours"] == "8.000 ms" and row["of SDPA default"] == "0.80x" and row["of FA2"] == "0.40x"
    assert row["ours, TFLOP/s"] == "500" and row["of the ceiling"] == "62%"
    assert row["ours, peak memory"] == "3 MiB" and "cuDNN" not in row
    (row,) = cells(found["others"])
    assert row["flex"] == "1.50x, 3 MiB"


def test_captured_steps_say_what_recording_adds():
    from tables import tables

    rows = cells(tables(json.loads((BENCH / "results" / "graphed_h200.json").read_text()))["graphed"])
    assert len(rows) == 6 and rows[0]["model"] == "GPT-2, 86M" and rows[0]["overhead"] == "+2.6%"


def test_the_pages_show_what_the_result_files_say():
    from report import PAGES, ROOT, fill

    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert fill(text, ROOT) == text


def test_the_summary_has_each_models_shortest_and_longest_step():
    from tables import tables

    document = json.loads((BENCH / "results" / "whole_step_h200.json").read_text())
    rows = [row["training step"] for row in cells(tables(document)["summary"])]
    assert rows == [f"{name}, {n} tokens" for name in ("GPT-2 124M", "LLaMA 1B") for n in (1024, 16384)]


def test_the_demos_seeds_are_a_table():
    from tables import tables

    document = json.loads((BENCH / "results" / "demo_seeds.json").read_text())
    first, *others = cells(tables(document)["seeds"])
    assert len(others) == 7 and first["first warning"] == "step 35" and first["treated"] == "2.34"
    document["results"][0] |= {"alarm_step": None, "loss_shows": None, "untreated_final_loss": None}
    first = cells(tables(document)["seeds"])[0]
    assert first["first error"] == first["loss shows it"] == "never"
    assert first["final loss, untreated"] == "not finite"


def test_an_older_file_has_a_table_without_what_it_did_not_record():
    from tables import tables

    results = sorted((BENCH / "results").glob("*ward_*.json")) + sorted(
        (BENCH / "results").glob("train*.json")
    )
    assert results
    for path in results:
        rows = cells(tables(json.loads(path.read_text()))["core"])
        assert len(rows) >= 4 and all(row["ours"].endswith(" ms") for row in rows)
    assert "of the ceiling" not in cells(tables(attention_document())["core"])[0]


def test_whole_steps_say_the_overhead_and_where_memory_ran_out(tmp_path):
    from charts import draw
    from tables import tables

    found = tables(steps_document())
    short, long = cells(found["overhead"])
    assert short["plain"] == "100.0 ms" and short["monitored every 100 steps"] == "+0.4%"
    assert long["eager, output_attentions=True"] == "out of memory"
    assert cells(found["memory"])[0]["eager, output_attentions=True"] == "9.00 GiB"
    written = draw(steps_document(), tmp_path, "test")
    assert [path.name for path in written] == ["overhead_test.svg", "memory_test.svg"]
    assert all("out of memory" in path.read_text() for path in written)


def test_a_report_replaces_what_stands_between_its_comments(tmp_path):
    from report import fill

    (tmp_path / "forward.json").write_text(json.dumps(attention_document()))
    text = "above\n<!-- core table of forward.json -->\nold\n<!-- end -->\nbelow\n"
    filled = fill(text, tmp_path)
    assert filled.startswith("above\n<!-- core table of forward.json -->\n| case |")
    assert filled.endswith("|\n<!-- end -->\nbelow\n") and "old" not in filled
    assert fill(filled, tmp_path) == filled
    absent = text.replace("forward.json", "absent.json")
    assert fill(absent, tmp_path) == absent
    with pytest.raises(ValueError, match="expected one of the tables"):
        fill(text.replace("core", "memory"), tmp_path)


def test_a_period_of_100_steps_is_99_idle_ones_and_a_logged_one():
    from whole_step import derived

    plain, idle, logged = ([{"ms": ms, "peak_bytes": None}] for ms in (100.0, 101.0, 150.0))
    assert derived(plain, idle, logged)["overhead"] == pytest.approx((99 * 101 + 150) / 100 / 100 - 1)


def test_a_variant_that_runs_out_of_memory_is_reported_and_the_others_go_on(monkeypatch):
    import whole_step

    def turn(training, options, warmup, steps):
        if options is not None and options["log_every"] == 1:
            raise torch.OutOfMemoryError("made up")
        return {"ms": 100.0 if options is None else 102.0, "host_ms": 1000.0, "peak_bytes": 1}

    monkeypatch.setattr(whole_step, "turn", turn)
    monkeypatch.setattr(whole_step, "cleanup", lambda training: None)
    found = whole_step.rounds(None, 2, list(whole_step.VARIANTS))["variants"]
    assert found["log_every=1"] == whole_step.OUT_OF_MEMORY and "log_every=100" not in found
    assert found["record_every=1"]["overhead"] == pytest.approx(0.02)


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(torch.cuda.is_available(), reason="dry runs are for the CPU")
@pytest.mark.parametrize("script", ["whole_step", "long_sequences"])
@pytest.mark.slow
def test_a_dry_run_measures_what_it_says(script, tmp_path, monkeypatch):
    from importlib import import_module

    if script == "whole_step":
        pytest.importorskip("transformers")
    path = tmp_path / "out.json"
    options = ["--dry", *(["--lengths", "130"] if script == "long_sequences" else ["--shapes", "1x16"])]
    options += ["--models", "llama", "--rounds", "1"] if script == "whole_step" else []
    monkeypatch.setattr(sys, "argv", [script, str(path), *options])
    module = import_module(script)
    monkeypatch.setattr(module, "TURN_SECONDS", 0.0, raising=False)  # one step a turn
    assert not module.main()
    document = json.loads(path.read_text())
    if script == "long_sequences":
        assert document["long"][0]["right"]
        return
    variants = document["steps"][0]["variants"]
    for name in ("log_every=1", "record_every=1"):
        assert sum(variants[name]["measured"].values()) == 2 and not variants[name]["not_measured"]
    assert not variants["idle"]["measured"] and variants["eager"]["ms"] > 0


def test_rows_that_are_checked_include_the_ends_and_tile_borders():
    from long_sequences import sampled_rows

    for length in (131072, 1048576):
        rows = sampled_rows(length)
        assert {0, 63, 64, 127, 128, length // 2, length - 1} <= set(rows)
        assert rows == sorted(set(rows)) and 60 <= len(rows) <= 64 and rows[-1] == length - 1


def test_tables_of_the_theorys_results():
    from tables import tables

    results = BENCH / "results"
    found = tables(json.loads((results / "theory_cpu.json").read_text()))
    assert list(found) == ["soundness", "bits"]
    assert [line.split("|")[3].strip() for line in found["soundness"].splitlines()[2:]] == ["0"] * 4
    assert "| query, key | 2,000 | 0 |" in found["bits"]
    initial = tables(json.loads((results / "initial_cpu.json").read_text()))["initial"].splitlines()
    assert len(initial) == 2 + 8 and "| GPT-2 124M | 512 | 0.307 | -1.3% | -8.6% |" in initial[2]
    weights = tables(json.loads((results / "weight_bounds.json").read_text()))["weights"]
    assert [line.split("|")[3].strip() for line in weights.splitlines()[2:]] == ["0"] * 4
