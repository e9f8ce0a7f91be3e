// Lines over steps, drawn by uPlot.

const CHART_HEIGHT = 190;

// A chart that follows the width of its box. series: [{name, values, colour, width, dash, fill}]; bands: pairs of series.
// forecasts: [{value, made, step, low, high, met}], drawn as an interval with its most likely step.
function lineChart(box, options) {
  const { steps, series, bands, log, unit, limits, moments, look, onStep, readout } = options;
  const range = chartRange(series.map((each) => each.values), limits, log);
  const end = lastStep(steps, options.forecasts || []);
  const axis = { stroke: look.text, font: look.font, grid: { stroke: look.grid, width: 1 }, ticks: { stroke: look.grid, width: 1 } };
  const chart = new uPlot({
    width: Math.max(box.clientWidth, 120),
    height: CHART_HEIGHT,
    legend: { show: false },
    cursor: { y: false, points: { size: 6 } },
    scales: {
      x: { time: false, range: () => (steps.length > 1 ? [steps[0], end] : [steps[0] - 1, steps[0] + 1]) },
      y: { distr: log ? 3 : 1, range: () => range },
    },
    axes: [
      { ...axis, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? numberText(tick) : "")) },
      { ...axis, size: 58, ...(log ? { splits: () => logTicks(...range), filter: (_, ticks) => ticks } : {}), values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : numberText(tick))) },
    ],
    series: [
      {},
      ...series.map((each) => ({
        label: each.name,
        stroke: each.colour,
        width: each.width ?? 2,
        dash: each.dash,
        spanGaps: each.spanGaps ?? false,
        points: { show: each.values.filter((value) => value !== null).length < 3 && each.width !== 0, size: 5 },
      })),
    ],
    bands,
    hooks: {
      draw: [(plot) => drawLines(plot, options, range)],
      setCursor: [(plot) => say(plot, options, readout)],
    },
  }, [steps, ...series.map((each) => each.values)], box);
  // The chosen step is an element above the canvas, so that scrubbing draws no chart anew.
  const line = element("div", { class: "step-line" });
  chart.over.append(line);
  chart.showStep = (step) => {
    const left = chart.valToPos(step, "x");
    line.hidden = !(left >= 0 && left <= chart.over.clientWidth);
    line.style.left = `${left}px`;
  };
  chart.over.addEventListener("click", () => {
    if (chart.cursor.idx !== null && chart.cursor.idx !== undefined) onStep(steps[chart.cursor.idx]);
  });
  return chart;
}

function say(plot, { steps, series, unit }, readout) {
  const place = plot.cursor.idx;
  if (place === null || place === undefined) return;
  const numbers = series.filter((each) => each.name).map((each) => [each.name, each.values[place]]);
  const texts = numbers.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => `${name} ${withUnit(value, unit)}`);
  readout.textContent = `step ${steps[place].toLocaleString("en-US")}: ${texts.join(", ") || "no number"}`;
}

// Limits across, things that happened upright.
function drawLines(plot, options, [low, high]) {
  const { limits, moments, look, log } = options;
  const { ctx } = plot;
  const { left, top, width, height } = plot.bbox;
  const ratio = window.devicePixelRatio || 1;
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, top, width, height);
  ctx.clip();
  ctx.font = look.chartFont(ratio);
  const shown = limits.filter(({ value }) => value >= low && value <= high && !(log && value <= 0));
  for (const { value } of shown) {
    const y = plot.valToPos(value, "y", true);
    stroke(ctx, look.error, ratio, [6, 4], left, y, left + width, y);
  }
  for (const forecast of options.forecasts || []) interval(plot, forecast, [low, high], look, ratio);
  for (const moment of moments) {
    const x = plot.valToPos(moment.step, "x", true);
    stroke(ctx, look[moment.colour] || look.done, 1.5 * ratio, moment.dash || [], x, top, x, top + height);
    if (moment.kind === "intervention") diamond(ctx, x, top + 7 * ratio, 5 * ratio, look.done);
  }
  // Names come last, with a rim in the colour of the page, so that lines which cross them leave them readable.
  let lastY = Infinity;
  let end = 0;
  for (const { value, name } of shown) {
    const y = plot.valToPos(value, "y", true);
    const near = Math.abs(y - lastY) < 14 * ratio; // two names must not lie on each other
    lastY = near ? Infinity : y;
    ctx.textAlign = "left";
    ctx.textBaseline = y - top < 14 * ratio ? "top" : "bottom";
    const start = near ? end + 12 * ratio : left + 4 * ratio;
    end = start + ctx.measureText(name).width;
    const place = [name, start, y + (ctx.textBaseline === "top" ? 2 : -2) * ratio];
    ctx.setLineDash([]);
    ctx.strokeStyle = look.surface;
    ctx.lineWidth = 4 * ratio;
    ctx.lineJoin = "round";
    ctx.strokeText(...place);
    ctx.fillStyle = look.error;
    ctx.fillText(...place);
  }
  ctx.restore();
}

// The end of a chart: a forecast that is not due yet makes room for itself, half the run at most.
function lastStep(steps, forecasts) {
  const last = steps[steps.length - 1];
  const due = forecasts.filter((each) => each.met === null).map((each) => each.high ?? each.step);
  return Math.min(Math.max(last, ...due), last + (last - steps[0]) / 2);
}

// From when to when something was forecast, at the value that it was forecast to pass.
function interval(plot, { value, step, low, high }, [bottom, top], look, ratio) {
  const { ctx } = plot;
  const y = plot.valToPos(Math.min(Math.max(value, bottom), top), "y", true);
  const [from, likely, to] = [low ?? step, step, high ?? step].map((each) => plot.valToPos(each, "x", true));
  stroke(ctx, look.forecast, 3 * ratio, [], from, y, to, y);
  for (const end of [from, to]) stroke(ctx, look.forecast, 2 * ratio, [], end, y - 5 * ratio, end, y + 5 * ratio);
  ctx.fillStyle = look.forecast;
  ctx.beginPath();
  ctx.arc(likely, y, 4 * ratio, 0, 2 * Math.PI);
  ctx.fill();
}

function stroke(ctx, colour, width, dash, fromX, fromY, toX, toY) {
  ctx.strokeStyle = colour;
  ctx.lineWidth = width;
  ctx.setLineDash(dash);
  ctx.beginPath();
  ctx.moveTo(fromX, fromY);
  ctx.lineTo(toX, toY);
  ctx.stroke();
}

function diamond(ctx, x, y, size, colour) {
  ctx.fillStyle = colour;
  ctx.beginPath();
  ctx.moveTo(x, y - size);
  ctx.lineTo(x + size, y);
  ctx.lineTo(x, y + size);
  ctx.lineTo(x - size, y);
  ctx.fill();
}

// Values of a run at the steps of a chart that several runs share: null where the run has none.
function onSteps(steps, ownSteps, values) {
  const found = new Array(steps.length).fill(null);
  const places = new Map(ownSteps.map((step, place) => [step, place]));
  steps.forEach((step, place) => {
    if (places.has(step)) found[place] = values[places.get(step)];
  });
  return found;
}

function unionOf(lists) {
  return [...new Set(lists.flat())].sort((a, b) => a - b);
}
