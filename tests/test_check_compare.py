"""Designs side by side, and what an advised change costs."""

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from hnf_attention.cli.main import main
from hnf_attention.precheck import check_attention_stability, known_design
from hnf_attention.precheck.costs import Cost, cost
from hnf_attention.report.designs import CheckedDesign, short_names, side_by_side

NUMBERS = {"d_model": 512, "n_heads": 8, "n_layers": 3, "seq_len": 1024}


def design_file(folder, name, **numbers):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(NUMBERS | numbers))
    return str(path)


@pytest.fixture
def designs(tmp_path):
    return [
        design_file(tmp_path, "usual"),
        design_file(tmp_path, "sharp", temperature=0.1),
        design_file(tmp_path, "wild", init_std=0.3, n_heads=64),
    ]


def test_designs_are_put_side_by_side(designs, tmp_path, capsys):
    target = tmp_path / "all.json"
    assert main(["check", *designs, "--json", str(target)]) == 1
    printed = capsys.readouterr().out
    verdicts = printed.rstrip().splitlines()[-3:]
    assert [line.split(":")[0] for line in verdicts] == ["stable", "marginal", "unstable"]
    assert ["(largest margin)" in line for line in verdicts] == [True, False, False]
    advised = printed.partition("Advised changes")[2]
    assert "QK-norm" in advised and "weights x 0.25" in advised and "usual.json │" not in advised
    found = json.loads(target.read_text())
    assert [each["verdict"] for each in found["designs"]] == ["stable", "marginal", "unstable"]
    assert [each["name"] for each in found["designs"]] == designs
    lowest = found["designs"][1]["lowest_stable_temperature"]
    assert list(lowest) == ["128", "1024", "8192"] and lowest["1024"] == pytest.approx(0.1328, rel=1e-2)
    assert list(lowest.values()) == sorted(lowest.values(), reverse=True)


def test_a_design_of_two_keys_has_no_shorter_one_and_keeps_its_columns(designs, tmp_path, capsys):
    short = design_file(tmp_path, "short", seq_len=2)
    assert main(["check", short, designs[0]]) == 0
    row = next(
        line for line in capsys.readouterr().out.splitlines() if "short.json" in line and "from" in line
    )
    assert re.findall(r"\((\d+)\)", row) == ["2", "2", "16"] and "not known" not in row


def test_of_designs_that_are_not_known_none_has_the_largest_margin():
    report = check_attention_stability(config=NUMBERS)
    unknown = type(report)(report | {"verdict": "not known"})
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(side_by_side([CheckedDesign("a", unknown, {}), CheckedDesign("b", unknown, {})]))
    assert "largest margin" not in screen.export_text()


def test_one_design_keeps_its_document_and_all_must_pass(designs, capsys):
    assert main(["check", designs[0], "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "stable"
    assert main(["check", designs[0], designs[1]]) == 0
    assert main(["check", designs[0], designs[1], "--fail-on", "marginal"]) == 1


@pytest.mark.parametrize("bad", ["missing.json", "bad.json"])
def test_a_design_that_cannot_be_read_is_named(designs, tmp_path, capsys, bad):
    (tmp_path / "bad.json").write_text('{"d_model": 100, "n_heads": 7}')
    assert main(["check", designs[0], str(tmp_path / bad)]) == 2
    captured = capsys.readouterr()
    assert bad in captured.err and captured.out == ""


@pytest.mark.slow
def test_regions_are_drawn_beside_each_other(designs, tmp_path):
    from PIL import Image

    widths = []
    for some in (designs[:1], designs):
        main(["check", *some, "--region", str(tmp_path / "region.png")])
        with Image.open(tmp_path / "region.png") as picture:
            widths.append(picture.width)
    assert widths[1] == 3 * widths[0] == 3 * 1080


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_a_name_with_dollars_is_no_formula(designs, tmp_path):
    strange = design_file(tmp_path, r"a$\frac$b_")
    assert main(["check", designs[0], strange, "--region", str(tmp_path / "region.png")]) == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Cost(1, 1, 1)),
        ({"qk_norm": True, "softcap": 30.0}, Cost(1, 1, 1)),
        # 512 x (2 x 512 + 2 x 512) weights; 2 operations each, and 4 x 1024 x 512 for its keys.
        ({"seq_len": 2048}, Cost(1, 3 / 2, 2)),
        ({"n_kv_heads": 2}, Cost(5 / 8, (5 / 8 * 2**21 + 2**21) / 2**22, 1 / 4)),
        ({"windows": (256, 1024, 256)}, Cost(1, (2 * 2**20 + 4 * 512 * 512) / 2**22, 1 / 2)),
    ],
)
def test_a_change_costs_what_its_shapes_say(change, expected):
    design = known_design(NUMBERS)
    found = cost(design, replace(design, **change))
    assert (found.weights, found.flops, found.cache) == pytest.approx(
        (expected.weights, expected.flops, expected.cache)
    )


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/a/b/x.json", "/a/c/y.json"], ["x.json", "y.json"]),
        (["/a/b/config.json", "/a/c/config.json", "gpt2"], ["b/config.json", "c/config.json", "gpt2"]),
        (["gpt2", "gpt2"], ["gpt2", "gpt2"]),
        (["x/a", "y/x/a"], ["x/a", "y/x/a"]),
        (["folder/", "other"], ["folder", "other"]),
    ],
)
def test_names_lose_the_folders_that_nobody_needs(names, short):
    assert short_names(names) == short


def test_a_cost_in_words():
    assert str(Cost(1.0, 1.001, 1.0)) == "none"
    assert str(Cost(0.25, 1.0, 2.0)) == "weights x 0.25, cache x 2"


def test_narrower_and_wider_models_cost_by_the_square():
    design = known_design(NUMBERS)
    assert cost(design, design.with_width(256)).weights == pytest.approx(1 / 4)
    assert cost(design, design.with_heads(4)) == Cost(1.0, 1.0, 1.0)
