// The state of the page, and what each change of it redraws.

const SAY_AFTER = 80; // milliseconds without a change
const byId = (id) => document.getElementById(id);

class Page {
  constructor(report) {
    this.report = report;
    this.planes = new Planes(report, (key) => byId(key).textContent);
    this.state = beginning(report);
    this.steps = unionOf(report.runs.map((run) => run.steps));
    this.charts = [];
    this.dark = matchMedia("(prefers-color-scheme: dark)");
  }

  metric() {
    return this.report.metrics.find((each) => each.name === this.state.metric);
  }

  shownRuns() {
    return this.state.view === "difference" ? [0, 1] : [Number(this.state.view)];
  }

  async begin() {
    this.look();
    this.fill();
    await this.load();
    if (!this.state.story) this.toWorst();
    this.controls();
    this.draw();
    performance.mark("drawn");
    document.body.dataset.state = "ready";
    this.dark.addEventListener("change", () => {
      this.look();
      this.draw();
    });
    let width = 0;
    new ResizeObserver(([entry]) => {
      if (Math.abs(entry.contentRect.width - width) < 1) return;
      width = entry.contentRect.width;
      this.draw();
    }).observe(byId("explorer"));
    addEventListener("beforeprint", () => document.querySelectorAll("details.issue").forEach((each) => { each.open = true; }));
  }

  // Without an issue, the page begins at the worst head of the last step.
  toWorst() {
    const { steps } = this.report.runs[0];
    const [codes, marks] = [this.state.metric, "marks"].map((name) => this.planes.ready(0, name));
    const lowIsBad = this.metric().worse === "low";
    const [worst] = worstHeads(codes, marks, steps.length - 1, steps.length, this.report.heads, lowIsBad, 1);
    if (worst !== undefined) Object.assign(this.state, headAt(this.report.layers, worst));
  }

  load() {
    const names = [this.state.metric, "marks"];
    return Promise.all(this.report.runs.flatMap((_, run) => names.map((name) => this.planes.load(run, name))));
  }

  look() {
    const style = getComputedStyle(document.body);
    const of = (name) => style.getPropertyValue(`--${name}`).trim();
    const family = style.fontFamily;
    this.colours = Object.fromEntries(["text", "strong", "surface", "grid", "error", "warning", "note", "done", "first", "second", "quiet", "forecast"].map((name) => [name, of(name)]));
    this.colours.font = `11px ${family}`;
    this.colours.chartFont = (ratio) => `${11 * ratio}px ${family}`;
    this.empty = this.dark.matches ? [58, 58, 66] : [208, 208, 212];
  }

  // The parts that do not change.
  fill() {
    const { report } = this;
    report.runs.forEach((run, index) => {
      issueList(byId(`issues-${index}`), run.stories, (story) => this.show(story, index));
      eventList(byId(`issues-${index}`), run.actions);
      coverage(byId(`coverage-${index}`), { ...run, index }, report.layers);
      environment(byId(`environment-${index}`), run);
    });
    if (report.comparison) {
      byId("comparison").append(table("The two runs", ["what", ...report.runs.map((run) => run.name)],
        report.comparison.map((row) => [row.name, row.first, row.second])));
    }
    for (const metric of report.metrics) byId("metric").append(new Option(metric.label, metric.name));
    report.layers.forEach((layer, place) => byId("layer").append(new Option(layer.name || "(the model itself)", place)));
    const names = [...new Set(report.runs.flatMap((run) => Object.keys(run.scalars)))];
    names.sort((a, b) => (b === "loss") - (a === "loss") || a.localeCompare(b));
    for (const name of names) byId("scalar").append(new Option(name, name));
    byId("scalars").hidden = !names.length;
  }

  controls() {
    const on = (id, event, call) => byId(id).addEventListener(event, (given) => call(given.target, given));
    byId("step").max = this.steps.length - 1;
    on("metric", "change", ({ value }) => this.change({ metric: value }));
    on("step", "input", ({ value }) => this.change({ step: this.steps[value] }));
    on("layer", "change", ({ value }) => this.change({ layer: Number(value), head: 0 }));
    on("head", "change", ({ value }) => this.change({ head: Math.min(Math.max(Number(value) || 0, 0), this.report.layers[this.state.layer].heads - 1) }));
    on("marked", "change", ({ checked }) => this.change({ marked: checked }));
    on("scalar", "change", () => this.drawScalars());
    on("before", "click", () => this.stepBy(-1));
    on("after", "click", () => this.stepBy(1));
    for (const radio of document.querySelectorAll("[name=view]")) {
      radio.addEventListener("change", () => this.change({ view: radio.value }));
    }
    const map = byId("map");
    const under = (event) => cellAt(this.grid, event.offsetX, event.offsetY, this.report.layers);
    map.addEventListener("click", (event) => under(event) && this.change(under(event)));
    map.addEventListener("pointermove", (event) => {
      const found = under(event);
      byId("under").textContent = found ? this.describe(found) : "";
    });
    map.addEventListener("pointerleave", () => { byId("under").textContent = ""; });
    map.addEventListener("keydown", (event) => {
      if (event.key === "PageUp" || event.key === "PageDown") this.stepBy(event.key === "PageUp" ? 1 : -1);
      else {
        const found = moved(event.key, this.state, this.report.layers);
        if (!found) return;
        this.change(found);
      }
      event.preventDefault();
    });
  }

  stepBy(count) {
    const place = Math.max(placeOf(this.steps, this.state.step), 0) + count;
    this.change({ step: this.steps[Math.min(Math.max(place, 0), this.steps.length - 1)] });
  }

  show(story, run) {
    this.change({ ...placeOfStory(story, this.report, this.state.metric), view: String(run) });
    byId("map").focus({ preventScroll: true });
    byId("explorer").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  }

  async change(changes) {
    const before = this.state;
    this.state = { ...before, ...changes };
    const needed = this.report.runs.some((_, run) => !this.planes.ready(run, this.state.metric));
    if (needed) await this.load();
    this.stale ||= !Object.keys(changes).every((name) => name === "step");
    this.frame ??= requestAnimationFrame(() => this.drawChanged());
  }

  // All changes since the last frame at once.
  drawChanged() {
    this.frame = null;
    this.drawMap();
    if (this.stale) this.drawCharts();
    else for (const chart of this.charts) chart.showStep(this.state.step);
    this.stale = false;
  }

  draw() {
    this.drawMap();
    this.drawCharts();
  }

  describe({ layer, head }) {
    const { report, state } = this;
    const { start, label } = report.layers[layer];
    const metric = this.metric();
    const texts = this.shownRuns().map((run) => {
      const { steps, name } = report.runs[run];
      const at = placeOf(steps, state.step);
      const place = (start + head) * steps.length + at;
      const code = at < 0 ? NO_NUMBER : this.planes.ready(run, state.metric)[place];
      const bits = at < 0 ? 0 : this.planes.ready(run, "marks")[place];
      const text = cellText(label, head, state.step, numberOf(code, metric.scale), metric.unit, bits);
      return state.view === "difference" ? `${name}: ${text}` : text;
    });
    return texts.join("; ");
  }

  drawMap() {
    const { report, state, planes } = this;
    const metric = this.metric();
    const run = report.runs[state.view === "difference" ? 0 : Number(state.view)];
    const { colours, differences } = this.palettes(metric);
    const bits = bitsOf(planes, report, state);
    const issues = state.view === "difference" ? new Map() : openHeads(run.stories, report.layers, state.step);
    this.grid = drawMap(byId("map"), report.layers, colourOf(planes, report, state, colours, differences), bits, issues, state, this.colours);
    const place = Math.max(placeOf(this.steps, state.step), 0);
    byId("step").value = place;
    byId("step").setAttribute("aria-valuetext", `step ${state.step}`);
    byId("step-text").textContent = state.step.toLocaleString("en-US");
    byId("metric").value = state.metric;
    byId("layer").value = state.layer;
    byId("head").value = state.head;
    byId("marked").checked = this.grid.marked;
    byId("head").max = report.layers[state.layer].heads - 1;
    for (const radio of document.querySelectorAll("[name=view]")) radio.checked = radio.value === state.view;
    clearTimeout(this.later);
    this.later = setTimeout(() => this.say(metric, run, bits), SAY_AFTER);
    this.cell = this.describe(state);
    if (document.body.dataset.state !== "ready") this.say(metric, run, bits);
  }

  // What the map says in words; while the slider moves, nobody could read it.
  say(metric, run, bits) {
    byId("cell").textContent = this.cell;
    byId("map").setAttribute("aria-label", `Map of heads, ${metric.label}. ${this.cell}. Arrow keys move, page up and page down change the step.`);
    this.drawLegend(metric, bits);
    this.drawWorst(metric, run);
  }

  palettes(metric) {
    const key = `${metric.worse}${this.dark.matches}`;
    if (this.painted?.key !== key) {
      const colours = palette(metric.worse === "low", this.empty);
      this.painted = { key, colours, differences: differencePalette(this.dark.matches, this.empty) };
    }
    return this.painted;
  }

  drawLegend(metric, bits) {
    const bar = byId("scale");
    const difference = this.state.view === "difference";
    const width = (bar.width = 253);
    const context = bar.getContext("2d");
    const image = new ImageData(width, 1);
    const pixels = new Uint32Array(image.data.buffer);
    const { colours, differences } = this.palettes(metric);
    for (let i = 0; i < width; i++) pixels[i] = difference ? differences[i * 2] : colours[i];
    context.putImageData(image, 0, 0);
    const { scale } = metric;
    const names = this.report.runs.map((each) => each.name);
    const [low, high] = difference ? [`${names[1]} lower`, `${names[1]} higher`] : scaleEnds(metric);
    byId("scale-low").textContent = low;
    byId("scale-high").textContent = high;
    bar.hidden = !metric.numbers;
    byId("scale-kind").textContent = difference ? "difference" : scale.log ? "log scale" : "";
    for (const [id, count] of Object.entries(countMarks(bits, this.report.heads))) byId(`count-${id}`).textContent = count;
  }

  drawWorst(metric, run) {
    const { report, planes, state } = this;
    const number = report.runs.indexOf(run);
    const at = placeOf(run.steps, state.step);
    const box = byId("worst");
    box.replaceChildren();
    if (at < 0) return;
    const codes = planes.ready(number, state.metric);
    const marks = planes.ready(number, "marks");
    const heads = worstHeads(codes, marks, at, run.steps.length, report.heads, metric.worse === "low", 5);
    box.append(...heads.map((place) => {
      const { layer, head } = headAt(report.layers, place);
      const bits = marks[place * run.steps.length + at];
      const value = bits & NOT_FINITE ? "NaN or inf" : withUnit(numberOf(codes[place * run.steps.length + at], metric.scale), metric.unit);
      const button = element("button", { type: "button", on: { click: () => this.change({ layer, head }) } }, `${report.layers[layer].label} head ${head}`, element("span", { class: "value" }, value));
      return element("li", {}, button);
    }));
  }

  drawCharts() {
    for (const chart of this.charts) chart.destroy();
    this.charts = [];
    this.drawHistory();
    this.drawRibbon();
    this.drawScalars();
  }

  chart(id, options) {
    const box = byId(id);
    const readout = byId(`${id}-text`);
    const made = lineChart(box, {
      ...options,
      look: this.colours,
      onStep: (step) => this.change({ step: this.steps[Math.max(placeOf(this.steps, step), 0)] }),
      readout,
    });
    readout.textContent = options.text;
    box.setAttribute("role", "img");
    box.setAttribute("aria-label", options.text);
    this.charts.push(made);
    made.showStep(this.state.step);
  }

  // What happened to a layer: interventions, and the first sign of its issues.
  moments(layer) {
    const found = [];
    for (const run of this.shownRuns()) {
      const { stories, actions } = this.report.runs[run];
      for (const story of stories) {
        if (layer === null || story.layer === layer) found.push({ step: story.first, kind: "first", colour: story.severity, dash: [3, 3] });
      }
      for (const action of actions) found.push({ ...action, colour: action.kind === "intervention" ? "done" : "quiet" });
    }
    return found.slice(0, 200);
  }

  drawHistory() {
    const { report, state, planes } = this;
    const metric = this.metric();
    const { start, label } = report.layers[state.layer];
    const two = report.runs.length > 1;
    const series = report.runs.map((run, number) => ({
      name: two ? run.name : `head ${state.head}`,
      colour: number ? this.colours.second : this.colours.first,
      dash: number ? [7, 4] : undefined,
      spanGaps: two, // the runs' log steps may differ
      values: onSteps(this.steps, run.steps, history(planes.ready(number, state.metric), start + state.head, run.steps.length, metric.scale)),
    }));
    const runs = two ? `; ${report.runs[0].name} solid, ${report.runs[1].name} dashed` : "";
    byId("history-title").textContent = `${label} head ${state.head}: ${metric.label}${metric.unit ? ` (${metric.unit})` : ""}${runs}`;
    const foretold = forecastsOf(this.shownRuns().map((run) => report.runs[run]), state);
    const lines = series.map((each) => lineText(two ? each.name : `${label} head ${state.head}`, this.steps, each.values, metric.unit));
    const text = [...lines, ...foretold.map((each) => each.text)].join(" ");
    this.chart("history", { steps: this.steps, series, log: metric.scale.log, unit: metric.unit, limits: metric.limits, moments: this.moments(state.layer), forecasts: foretold, text });
    byId("forecast-key").hidden = !foretold.length;
    const sources = byId("history-sources");
    sources.replaceChildren(...metric.limits.map(({ value, name, source }) => element("li", {}, `${name}, ${withUnit(value, metric.unit)}: ${source}`)));
    byId("history-thresholds").hidden = !metric.limits.length;
  }

  drawRibbon() {
    const { report, state, planes } = this;
    const metric = this.metric();
    const number = this.shownRuns()[this.shownRuns().length - 1];
    const run = report.runs[number];
    const { start, heads, label } = report.layers[state.layer];
    const shares = [0, 0.1, 0.5, 0.9, 1];
    const lists = percentiles(planes.ready(number, state.metric), start, start + heads, run.steps.length, shares, metric.scale);
    const colour = number ? this.colours.second : this.colours.first;
    const names = ["lowest", "10%", "median", "90%", "highest"];
    const series = lists.map((values, place) => ({ name: names[place], values, colour, width: place === 2 ? 2 : 0 }));
    const bands = [{ series: [5, 1], fill: `${colour}22` }, { series: [4, 2], fill: `${colour}44` }];
    const title = `${label}: all ${plural(heads, "head")}${report.runs.length > 1 ? `, ${run.name}` : ""}`;
    byId("ribbon-title").textContent = title;
    const text = lineText(`Median head of ${label}`, run.steps, lists[2], metric.unit);
    this.chart("ribbon", { steps: run.steps, series, bands, log: metric.scale.log, unit: metric.unit, limits: metric.limits, moments: this.moments(state.layer), text });
  }

  drawScalars() {
    const { report } = this;
    const name = byId("scalar").value;
    if (!name) return;
    const drawn = this.charts.findIndex((chart) => chart.root.parentElement === byId("loss"));
    if (drawn >= 0) this.charts.splice(drawn, 1)[0].destroy();
    const runs = report.runs.filter((run) => run.scalars[name]);
    const steps = unionOf(runs.map((run) => run.scalars[name].steps));
    const series = runs.map((run) => ({
      name: report.runs.length > 1 ? run.name : name,
      colour: report.runs.indexOf(run) ? this.colours.second : this.colours.first,
      dash: report.runs.indexOf(run) ? [7, 4] : undefined,
      spanGaps: report.runs.length > 1,
      values: onSteps(steps, run.scalars[name].steps, run.scalars[name].values),
    }));
    const text = series.map((each) => lineText(each.name, steps, each.values, "")).join(" ");
    this.chart("loss", { steps, series, log: false, unit: "", limits: [], moments: this.moments(null), text });
  }
}

const page = new Page(JSON.parse(byId("report").textContent));
page.begin();
