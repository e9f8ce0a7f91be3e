// The logic of the report's page. Run with the folder of its scripts: node report_page.test.mjs FOLDER
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { deflateSync } from "node:zlib";

const NAMES = ["LAST", "NO_NUMBER", "INFINITE", "MINUS_INFINITE", "NOT_FINITE", "SINK", "DORMANT", "accumulate", "unpack",
  "numberOf", "placeOf", "history", "percentiles", "worstHeads", "countMarks", "chartRange", "logTicks", "numberText", "withUnit", "scaleEnds", "headAt",
  "markWords", "cellText", "lineText", "isOpen", "openHeads", "forecastsOf", "lastStep", "palette", "differencePalette", "gridOf", "cellAt", "moved",
  "onSteps", "unionOf", "Planes", "colourOf", "bitsOf", "beginning", "flattened"];
const files = ["numbers.js", "words.js", "colours.js", "heatmap.js", "charts.js", "parts.js", "planes.js"];
const text = files.map((name) => readFileSync(join(process.argv[2], name), "utf8")).join("\n");
const page = new Function(`"use strict"; ${text}; return { ${NAMES.join(", ")} };`)();

const even = { low: 0, high: 252, log: false };
const LAYERS = [{ name: "a", label: "a", heads: 2, start: 0 }, { name: "b", label: "b", heads: 3, start: 2 }];

function packed(rows) { // codes of heads over steps
  const moved = rows.flatMap((row) => row.map((code, i) => (code - (i ? row[i - 1] : 0)) & 255));
  return deflateSync(Buffer.from(moved)).toString("base64");
}

test("codes are unpacked as they were packed, NaN and infinities too", async () => {
  const rows = [[0, 252, 255, 7], [254, 253, 1, 1]];
  assert.deepEqual([...await page.unpack(packed(rows), 2, 4)], rows.flat());
});

test("a plane of another size is refused", async () => {
  await assert.rejects(page.unpack(packed([[1, 2]]), 2, 2), /expected 4 numbers, got 2/);
});

test("codes are numbers on either scale", () => {
  assert.equal(page.numberOf(126, even), 126);
  const log = { low: 1e-3, high: 1e3, log: true };
  assert.ok(Math.abs(page.numberOf(126, log) - 1) < 1e-9);
  assert.ok(Math.abs(page.numberOf(252, log) - 1e3) < 1e-9);
  assert.ok(Number.isNaN(page.numberOf(page.NO_NUMBER, log)));
  assert.equal(page.numberOf(page.INFINITE, even), Infinity);
  assert.equal(page.numberOf(page.MINUS_INFINITE, even), -Infinity);
});

test("the step at or before another one is found", () => {
  const steps = [10, 20, 30];
  assert.deepEqual([5, 10, 19, 20, 99].map((step) => page.placeOf(steps, step)), [-1, 0, 0, 1, 2]);
  assert.equal(page.placeOf([], 3), -1);
});

test("a history leaves gaps where there is no number", () => {
  assert.deepEqual(page.history(Uint8Array.of(9, 9, 3, 255, 254, 4), 1, 3, even), [255, 254, 4].map((x, i) => (i < 2 ? null : x)));
  assert.deepEqual(page.history(Uint8Array.of(9, 9, 3, 255, 254, 4), 0, 3, even), [9, 9, 3]);
});

test("percentiles are of the heads of a layer, at each step", () => {
  const heads = 11;
  const codes = new Uint8Array(heads * 2);
  for (let head = 0; head < heads; head++) codes.set([head * 10, 255], head * 2);
  const found = page.percentiles(codes, 0, heads, 2, [0, 0.5, 1], even);
  assert.deepEqual(found, [[0, null], [50, null], [100, null]]);
  assert.deepEqual(page.percentiles(codes, 3, 5, 2, [0, 1], even).map((each) => each[0]), [30, 40]);
});

test("the worst heads are those at the bad end; NaN comes first, no number never", () => {
  const codes = Uint8Array.of(5, 200, 100, 255, 1);
  const marks = new Uint8Array(5);
  assert.deepEqual(page.worstHeads(codes, marks, 0, 1, 5, false, 3), [1, 2, 0]);
  assert.deepEqual(page.worstHeads(codes, marks, 0, 1, 5, true, 3), [4, 0, 2]);
  marks[3] = page.NOT_FINITE;
  assert.equal(page.worstHeads(codes, marks, 0, 1, 5, true, 1)[0], 3);
  assert.equal(page.worstHeads(codes, new Uint8Array(5), 0, 1, 5, false, 9).length, 4);
});

test("marks are counted once a head; a dormant head is no plain sink", () => {
  const marks = [page.SINK, page.SINK | page.DORMANT, page.NOT_FINITE | page.SINK, 8, 0];
  assert.deepEqual(page.countMarks((place) => marks[place], 5), { nan: 1, sink: 2, dormant: 1, unjudged: 1 });
});

test("a chart shows its values and the limits near them", () => {
  const [low, high] = page.chartRange([[40, 50, null]], [{ value: 60 }, { value: 1e5 }], false);
  assert.ok(low < 40 && high > 60 && high < 100);
  assert.deepEqual(page.chartRange([[null]], [], true), [1, 10]);
  const [from, to] = page.chartRange([[10, 100]], [{ value: 200 }, { value: 2000 }], true);
  assert.ok(from < 10 && to > 200 && to < 2000);
});

test("a logarithmic axis has a few round numbers", () => {
  assert.deepEqual(page.logTicks(9, 1100), [10, 30, 100, 300, 1000]);
  for (const [low, high] of [[1, 3], [1e-8, 1], [0.5, 2e10]]) {
    const ticks = page.logTicks(low, high);
    assert.ok(ticks.length >= 2 && ticks.length <= 9, String(ticks));
  }
});

test("numbers are written for people", () => {
  const texts = [0.12345, 12.345, 1234.5, 131072, 1e-9, NaN, Infinity, null].map(page.numberText);
  assert.deepEqual(texts, ["0.123", "12.3", "1,235", "131,072", "1.00e-9", "no number", "inf", "no number"]);
  assert.equal(page.withUnit(3, "nats"), "3 nats");
  assert.equal(page.withUnit(NaN, "nats"), "no number");
});

test("a statistic without a number has no scale", () => {
  assert.deepEqual(page.scaleEnds({ scale: even, unit: "nats", numbers: true }), ["0 nats", "252 nats"]);
  assert.deepEqual(page.scaleEnds({ scale: even, unit: "nats", numbers: false }), ["no number", ""]);
});

test("a cell and a line are said in words", () => {
  assert.equal(page.cellText("b", 3, 1000, 12.345, "nats", page.SINK), "b head 3 at step 1,000: about 12.3 nats; sink");
  assert.equal(page.cellText("b", 3, 1, NaN, "", page.NOT_FINITE), "b head 3 at step 1: no number; NaN or inf");
  assert.deepEqual(page.markWords(page.SINK | page.DORMANT), ["dormant: rests on a sink"]);
  const line = page.lineText("loss", [1, 2, 3, 4], [5, 1, 2, null], "");
  assert.equal(line, "loss: 5 at step 1, then between 1 at step 2 and 5 at step 1; last 2 at step 3, and no number from step 4 on.");
  assert.match(page.lineText("loss", [1], [null], ""), /no number in this run/);
});

test("an issue marks its heads while it lasts, an error over a warning", () => {
  const stories = [
    { layer: 1, heads: [2], severity: "warning", spans: [[10, 20], [40, null]] },
    { layer: 1, heads: [], severity: "error", spans: [[40, 50]] },
    { layer: -1, heads: [], severity: "error", spans: [[0, null]] },
    { layer: 0, heads: [2, 99], severity: "error", spans: [[0, null]] },
  ];
  assert.deepEqual([...page.openHeads(stories, LAYERS, 10)], [[4, "warning"]]);
  assert.equal(page.openHeads(stories, LAYERS, 20).size, 0);
  assert.deepEqual([...page.openHeads(stories, LAYERS, 45)].sort(), [[2, "error"], [3, "error"], [4, "error"]]);
  assert.deepEqual([...page.openHeads(stories, LAYERS, 99)], [[4, "warning"]]);
});

test("the bad end of a scale is bright, and no number is a colour of its own", () => {
  const light = (colour) => (colour & 255) + ((colour >> 8) & 255) + ((colour >> 16) & 255);
  const [high, low] = [page.palette(false, [1, 2, 3]), page.palette(true, [1, 2, 3])];
  assert.ok(light(high[252]) > light(high[0]) && light(low[0]) > light(low[252]));
  assert.equal(high[page.NO_NUMBER] & 0xffffff, 0x030201);
  const values = new Set(high.subarray(0, 253));
  assert.ok(!values.has(high[page.INFINITE]) && !values.has(high[page.NO_NUMBER]));
  const differences = page.differencePalette(false, [1, 2, 3]);
  assert.notEqual(differences[0], differences[504]);
});

test("the grid fits its width, and a point is the head that is drawn there", () => {
  for (const width of [350, 640, 1000]) {
    const grid = page.gridOf(width, 126, 128, 50);
    assert.ok(grid.width <= width + 1e-9 && grid.whole < 800);
  }
  const grid = page.gridOf(400, 2, 3, 50);
  const at = (layer, head) => page.cellAt(grid, 50 + (head + 0.5) * grid.cell, 16 + (layer + 0.5) * grid.height, LAYERS);
  assert.deepEqual(at(1, 2), { layer: 1, head: 2 });
  assert.equal(at(0, 2), null); // layer a has two heads
  assert.equal(page.cellAt(grid, 10, 20, LAYERS), null);
});

test("arrow keys stay on the map", () => {
  assert.deepEqual(page.moved("ArrowUp", { layer: 1, head: 2 }, LAYERS), { layer: 0, head: 1 });
  assert.deepEqual(page.moved("ArrowLeft", { layer: 0, head: 0 }, LAYERS), { layer: 0, head: 0 });
  assert.deepEqual(page.moved("End", { layer: 1, head: 0 }, LAYERS), { layer: 1, head: 2 });
  assert.equal(page.moved("a", { layer: 0, head: 0 }, LAYERS), null);
});

test("two runs share an axis of steps", () => {
  assert.deepEqual(page.unionOf([[10, 30], [20, 30]]), [10, 20, 30]);
  assert.deepEqual(page.onSteps([10, 20, 30], [10, 30], [1, 3]), [1, null, 3]);
});

test("the map shows one run, or the difference of two at the same step", async () => {
  const report = { heads: 1, runs: [{ steps: [10, 20] }, { steps: [10] }] };
  const planes = new page.Planes(report, (key) => packed([key.startsWith("plane-0") ? [100, 200] : [50]]));
  for (const run of [0, 1]) for (const name of ["m", "marks"]) await planes.load(run, name);
  const colours = Uint32Array.from({ length: 256 }, (_, code) => code);
  const differences = Uint32Array.from({ length: 512 }, (_, code) => 1000 + code);
  const at = (view, step) => page.colourOf(planes, report, { view, step, metric: "m" }, colours, differences)(0);
  assert.deepEqual([at("0", 10), at("0", 25), at("1", 25), at("0", 5)], [100, 200, 50, page.NO_NUMBER]);
  assert.equal(at("difference", 25), 1000 + page.LAST + 50 - 200);
  assert.equal(at("difference", 5), 1000 + 511);
  assert.equal(page.bitsOf(planes, report, { view: "difference", step: 10 })(0), 100 | 50);
});

test("the page begins at the worst issue that has a place", () => {
  const metrics = [{ name: "m" }, { name: "n" }];
  const story = { layer: 1, head: 2, heads: [2], worst: 7, metric: "n" };
  const report = { metrics, layers: LAYERS, runs: [{ steps: [1, 9], stories: [{ layer: -1 }, story] }] };
  const start = { layer: 1, head: 2, step: 7, view: "0", marked: null, story: true };
  assert.deepEqual(page.beginning(report), { ...start, metric: "n" });
  report.runs[0].stories = [{ ...story, metric: "not in this page", head: null }];
  assert.deepEqual(page.beginning(report), { ...start, metric: "m" });
  report.runs[0].stories = [{ ...story, head: 99 }]; // a log may say anything
  assert.equal(page.beginning(report).head, 2);
  report.runs[0].stories = [];
  assert.equal(page.beginning(report).step, 9);
  assert.equal(page.beginning(report).story, false);
});

test("settings become lines", () => {
  assert.deepEqual(page.flattened({ run: { rate: 0.1, on: null } }), [["run.rate", "0.1"], ["run.on", "none"]]);
});

test("forecasts are those of the head and the statistic that are shown", () => {
  const forecast = (head, statistic) => ({ head, statistic });
  const runs = [{ stories: [{ layer: 1, forecasts: [forecast(2, "a"), forecast(0, "a"), forecast(2, "b")] }, { layer: 0, forecasts: [forecast(2, "a")] }] }];
  assert.deepEqual(page.forecastsOf(runs, { layer: 1, head: 2, metric: "a" }), [forecast(2, "a")]);
});

test("a forecast that is not due yet makes room for itself, half the run at most", () => {
  const due = (step, high, met = null) => ({ step, high, met });
  assert.equal(page.lastStep([0, 100], []), 100);
  assert.equal(page.lastStep([0, 100], [due(120, null)]), 120);
  assert.equal(page.lastStep([0, 100], [due(120, 400)]), 150);
  assert.equal(page.lastStep([0, 100], [due(120, 400, 90), due(50, 80)]), 100);
});
