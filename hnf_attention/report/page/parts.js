// Parts of the page. Every text of a run goes in as text, never as markup.

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, call] of Object.entries(value)) made.addEventListener(event, call);
    else made.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== "") made.append(child);
  }
  return made;
}

function severityMark(severity) {
  return element("span", { class: `severity ${["error", "warning", "note"].includes(severity) ? severity : "gone"}` }, severity);
}

function momentItem(moment) {
  const kind = moment.kind === "intervention" ? "done" : moment.kind;
  const label = moment.kind === "intervention" ? `done: ${moment.text}` : moment.text;
  return element("li", { class: `moment ${["new", "worse", "better", "gone", "done"].includes(kind) ? kind : "other"}` },
    element("span", { class: "when" }, `step ${moment.step.toLocaleString("en-US")}`), " ", label);
}

const SHOWN_MOMENTS = 8;

function momentList(moments) {
  const left = moments.length - SHOWN_MOMENTS;
  if (left <= 0) return element("ol", { class: "story" }, moments.map(momentItem));
  const shown = [...moments.slice(0, SHOWN_MOMENTS / 2), ...moments.slice(-SHOWN_MOMENTS / 2)];
  const items = shown.map(momentItem);
  items.splice(SHOWN_MOMENTS / 2, 0, element("li", { class: "moment other" }, `${plural(left, "more change")} between`));
  return element("ol", { class: "story" }, items);
}

function codeBlock(code) {
  const copy = element("button", { type: "button", class: "copy" }, "Copy");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Select the code and copy it";
    }
  });
  return element("div", { class: "code" }, element("pre", { tabindex: "0", "aria-label": "the fix as code" }, element("code", {}, code)), copy);
}

function issueCard(story, open, show) {
  const state = story.now ? [severityMark(story.now)] : [severityMark("gone"), element("span", { class: "was" }, ` was ${story.severity}`)];
  const summary = element("summary", {}, element("span", { class: "state" }, ...state), " ",
    element("span", { class: "what" }, `${story.plain} in ${story.place}`), " ",
    element("span", { class: "when" }, `since step ${story.first.toLocaleString("en-US")}`));
  const limit = story.threshold === null ? "" : `Threshold ${numberText(story.threshold)}${story.source ? `: ${story.source}` : ""}`;
  const facts = [
    ["Evidence", story.evidence],
    ["Judged by", limit],
    ["Measured", story.measured],
    ["Forecast", story.forecast],
    ["What to do", story.suggestion],
    ["Outcome", story.outcome],
  ].filter(([, text]) => text);
  return element("details", { class: "issue", open },
    summary,
    momentList(story.moments),
    element("dl", {}, facts.map(([name, text]) => [element("dt", {}, name), element("dd", {}, text)])),
    story.code ? codeBlock(story.code) : "",
    story.layer >= 0 ? element("button", { type: "button", on: { click: () => show(story) } }, "Show it on the map") : "");
}

const SHOWN_ISSUES = 6;

function issueList(box, stories, show) {
  box.replaceChildren();
  if (!stories.length) box.append(element("p", { class: "none" }, "No issue in this run."));
  const cards = stories.slice(0, SHOWN_ISSUES).map((story, place) => issueCard(story, place === 0, show));
  box.append(...cards);
  if (stories.length > SHOWN_ISSUES) {
    const more = element("button", { type: "button" }, `Show ${plural(stories.length - SHOWN_ISSUES, "more issue")}`);
    more.addEventListener("click", () => {
      const rest = stories.slice(SHOWN_ISSUES).map((story) => issueCard(story, false, show));
      more.replaceWith(...rest);
      rest[0].querySelector("summary").focus();
    });
    box.append(more);
  }
}

// Interventions, checkpoints and whatever else a log notes.
function eventList(box, actions) {
  if (!actions.length) {
    box.append(element("p", { class: "quiet" }, "The log of this run notes no intervention."));
    return;
  }
  const rows = actions.map((action) => [`step ${action.step.toLocaleString("en-US")}`, action.text, action.layers.join(", ")]);
  box.append(element("details", { class: "events", open: actions.length <= 5 }, element("summary", {}, "What was done, and what else the log notes"),
    table("What was done, and what else the log notes", ["step", "what", "layers"], rows)));
}

// A table with a caption; the first cell of a row is its heading.
function table(caption, heads, rows) {
  const line = (cells) => cells.map((cell, place) => element(place ? "td" : "th", place ? {} : { scope: "row" }, cell));
  return element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption },
    element("table", {}, element("caption", {}, caption),
      element("thead", {}, element("tr", {}, heads.map((head) => element("th", { scope: "col" }, head)))),
      element("tbody", {}, rows.map((row) => element("tr", {}, line(row))))));
}

// What the machine and the run said of themselves, as lines "name: value".
function flattened(value, name = "") {
  if (value !== null && typeof value === "object") {
    return Object.entries(value).flatMap(([key, each]) => flattened(each, name ? `${name}.${key}` : key));
  }
  return [[name, value === null ? "none" : String(value)]];
}

function coverage(box, run, layers) {
  const judged = `${plural(run.heads, "head")} in ${plural(run.layers, "layer")} measured at ${plural(run.steps.length, "log step")}`;
  const lines = [`${judged}, from step ${run.steps[0].toLocaleString("en-US")} to ${run.steps[run.steps.length - 1].toLocaleString("en-US")}.`];
  if (run.joined) lines.push("Neighbouring log steps were joined to keep this page small; extremes were kept.");
  if (run.notJudged) lines.push(`${plural(run.notJudged, "head")} had too few keys to be judged at the last log step.`);
  box.append(element("p", {}, lines.join(" ")));
  const missed = Object.entries(run.notMeasured);
  if (missed.length) box.append(table("Attention that was not measured", ["layer", "why"], missed));
  else box.append(element("p", {}, "No attention was seen that could not be measured."));
  const rows = layers.filter((layer) => layer.about[run.index]).map((layer) => {
    const about = layer.about[run.index];
    return [layer.name || "(the model itself)", String(layer.heads), String(about.head_dim ?? ""), String(about.dtype ?? ""), about.sample_period > 1 ? `1 in ${about.sample_period}` : "all"];
  });
  box.append(element("details", {}, element("summary", {}, "Measured layers"), table("Measured layers", ["layer", "heads", "head dimension", "dtype", "rows"], rows)));
}

function environment(box, run) {
  run.sessions.forEach((session, place) => {
    const { started, ...rest } = session;
    const when = typeof started === "number" ? new Date(started * 1000).toISOString().replace("T", " ").slice(0, 16) + " UTC" : "";
    box.append(table(`Process ${place + 1}${when ? `, started ${when}` : ""}`, ["name", "value"], flattened(rest)));
  });
  if (!run.sessions.length) box.append(element("p", {}, "The source of this report does not say where it ran."));
}
