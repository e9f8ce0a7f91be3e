// The planes of the page: each is unpacked when it is first shown.

class Planes {
  constructor(report, textOf) {
    this.report = report;
    this.textOf = textOf; // the name of a plane to its packed text
    this.found = new Map();
  }

  // Codes (heads, steps) of a statistic of a run, or of its marks: a promise.
  load(run, name) {
    const key = `plane-${run}-${name}`;
    if (!this.found.has(key)) {
      const { heads, runs } = this.report;
      const made = unpack(this.textOf(key), heads, runs[run].steps.length);
      this.found.set(key, made);
      made.then((codes) => this.found.set(key, codes));
    }
    return this.found.get(key);
  }

  // The codes if they are unpacked, else null.
  ready(run, name) {
    const found = this.found.get(`plane-${run}-${name}`);
    return found instanceof Uint8Array ? found : null;
  }
}

// The packed colour of a place on the map: of one run, or of the difference of two.
function colourOf(planes, report, state, colours, differences) {
  const code = (run) => {
    const codes = planes.ready(run, state.metric);
    const steps = report.runs[run].steps;
    const at = placeOf(steps, state.step);
    return (place) => (at < 0 ? NO_NUMBER : codes[place * steps.length + at]);
  };
  if (state.view !== "difference") {
    const own = code(Number(state.view));
    return (place) => colours[own(place)];
  }
  const [first, second] = [code(0), code(1)];
  return (place) => {
    const [before, after] = [first(place), second(place)];
    return differences[before > LAST || after > LAST ? 511 : LAST + after - before];
  };
}

// The marks of a place: of the run that is shown, of both in a difference.
function bitsOf(planes, report, state) {
  const runs = state.view === "difference" ? [0, 1] : [Number(state.view)];
  const each = runs.map((run) => {
    const marks = planes.ready(run, "marks");
    const steps = report.runs[run].steps;
    const at = placeOf(steps, state.step);
    return (place) => (at < 0 ? 0 : marks[place * steps.length + at]);
  });
  if (each.length === 1) return each[0];
  return (place) => each[0](place) | each[1](place);
}

// Where the page begins: at the worst issue, else at the worst head of the last step.
function beginning(report) {
  const run = report.runs[0];
  const last = run.steps[run.steps.length - 1];
  const start = { metric: report.metrics[0].name, step: last, layer: 0, head: 0, view: "0", marked: null, story: false };
  const story = run.stories.find((each) => each.layer >= 0);
  return story ? { ...start, ...placeOfStory(story, report, start.metric), story: true } : start;
}

function placeOfStory(story, report, current) {
  const metrics = report.metrics.map((metric) => metric.name);
  const head = story.head ?? story.heads[0] ?? 0;
  return {
    metric: story.metric && metrics.includes(story.metric) ? story.metric : current,
    step: story.worst,
    layer: story.layer,
    head: Math.min(head, report.layers[story.layer].heads - 1),
  };
}
