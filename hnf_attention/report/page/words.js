// Numbers and places in words. No part of this file touches the document.

function numberText(value) {
  if (value === null || Number.isNaN(value)) return "no number";
  if (value === Infinity) return "inf";
  if (value === -Infinity) return "-inf";
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(3)));
}

function withUnit(value, unit) {
  const text = numberText(value);
  return unit && text !== "no number" ? `${text} ${unit}` : text;
}

// The ends of a statistic's scale; a statistic without a number has none.
function scaleEnds({ scale, unit, numbers }) {
  return numbers ? [withUnit(scale.low, unit), withUnit(scale.high, unit)] : ["no number", ""];
}

function plural(count, noun) {
  return `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;
}

// The layer and the head of a column of the planes.
function headAt(layers, place) {
  for (let layer = 0; layer < layers.length; layer++) {
    const { start, heads } = layers[layer];
    if (place >= start && place < start + heads) return { layer, head: place - start };
  }
  return null;
}

function markWords(bits) {
  const words = [];
  if (bits & NOT_FINITE) words.push("NaN or inf");
  if (bits & DORMANT) words.push("dormant: rests on a sink");
  else if (bits & SINK) words.push("sink");
  if (bits & NOT_JUDGED) words.push("too few keys to be judged");
  return words;
}

// 'blocks.1 head 3 at step 40: about 12.5 nats; sink'
function cellText(layer, head, step, value, unit, bits) {
  const words = markWords(bits);
  const number = Number.isNaN(value) ? "no number" : `${Number.isFinite(value) ? "about " : ""}${withUnit(value, unit)}`;
  return `${layer} head ${head} at step ${step.toLocaleString("en-US")}: ${[number, ...words].join("; ")}`;
}

// A list of numbers as a sentence for those who do not see its chart.
function lineText(name, steps, values, unit) {
  const found = [];
  values.forEach((value, place) => {
    if (value !== null && Number.isFinite(value)) found.push([value, steps[place]]);
  });
  if (!found.length) return `${name}: no number in this run.`;
  const lowest = found.reduce((a, b) => (b[0] < a[0] ? b : a));
  const highest = found.reduce((a, b) => (b[0] > a[0] ? b : a));
  const [first, last] = [found[0], found[found.length - 1]];
  const at = ([value, step]) => `${withUnit(value, unit)} at step ${step.toLocaleString("en-US")}`;
  const gap = steps[values.length - 1] > last[1] ? steps.find((step) => step > last[1]) : null;
  const after = gap === null ? "" : `, and no number from step ${gap.toLocaleString("en-US")} on`;
  return `${name}: ${at(first)}, then between ${at(lowest)} and ${at(highest)}; last ${at(last)}${after}.`;
}

// Whether a story's issue is there at a step. spans: [from, to] each, null for no end.
function isOpen(story, step) {
  return story.spans.some(([from, to]) => step >= from && (to === null || step < to));
}

// What was forecast of a head in the statistic that is shown.
function forecastsOf(runs, { layer, head, metric }) {
  return runs.flatMap((run) => run.stories).filter((story) => story.layer === layer)
    .flatMap((story) => story.forecasts).filter((each) => each.head === head && each.statistic === metric);
}

// Places of the planes that stories of a step are about: place to severity, the worst one.
function openHeads(stories, layers, step) {
  const rank = { note: 1, warning: 2, error: 3 };
  const found = new Map();
  for (const story of stories) {
    if (story.layer < 0 || !isOpen(story, step)) continue;
    const { start, heads } = layers[story.layer];
    const named = story.heads.length ? story.heads : Array.from({ length: heads }, (_, head) => head);
    for (const head of named.filter((each) => each < heads)) {
      const before = found.get(start + head);
      if (!before || rank[before] < rank[story.severity]) found.set(start + head, story.severity);
    }
  }
  return found;
}
