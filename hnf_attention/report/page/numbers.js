// Packed numbers of the page, and what they say. No part of this file touches the document.

const LAST = 252; // the largest code of a finite number
const MINUS_INFINITE = 253;
const INFINITE = 254;
const NO_NUMBER = 255;

// Bits of the plane of marks.
const NOT_FINITE = 1;
const SINK = 2;
const DORMANT = 4;
const NOT_JUDGED = 8;

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Differences in time become codes again. Codes of a head lie together: (heads, steps).
function accumulate(codes, heads, steps) {
  for (let head = 0; head < heads; head++) {
    const start = head * steps;
    let code = 0;
    for (let i = start; i < start + steps; i++) codes[i] = code = (code + codes[i]) & 255;
  }
  return codes;
}

async function unpack(base64, heads, steps) {
  const codes = await inflate(bytesOf(base64));
  if (codes.length !== heads * steps) {
    throw new Error(`expected ${heads * steps} numbers, got ${codes.length}`);
  }
  return accumulate(codes, heads, steps);
}

function numberOf(code, scale) {
  if (code === NO_NUMBER) return NaN;
  if (code === INFINITE) return Infinity;
  if (code === MINUS_INFINITE) return -Infinity;
  const part = code / LAST;
  if (scale.log) return scale.low * (scale.high / scale.low) ** part;
  return scale.low + (scale.high - scale.low) * part;
}

// The place of the last step that is not after `step`; -1 before the first one.
function placeOf(steps, step) {
  let low = 0;
  let high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

// One head over the run; null where a chart has no point.
function history(codes, head, steps, scale) {
  const found = new Array(steps);
  for (let i = 0; i < steps; i++) {
    const value = numberOf(codes[head * steps + i], scale);
    found[i] = Number.isFinite(value) ? value : null;
  }
  return found;
}

// Percentiles over heads from `start` to `end`, at each step: one array for each share from 0 to 1.
function percentiles(codes, start, end, steps, shares, scale) {
  const found = shares.map(() => new Array(steps).fill(null));
  const counts = new Uint32Array(LAST + 1);
  for (let step = 0; step < steps; step++) {
    counts.fill(0);
    let total = 0;
    for (let head = start; head < end; head++) {
      const code = codes[head * steps + step];
      if (code <= LAST) {
        counts[code]++;
        total++;
      }
    }
    if (!total) continue;
    shares.forEach((share, place) => {
      const rank = Math.min(total - 1, Math.floor(share * total));
      let code = 0;
      for (let below = counts[0]; below <= rank; below += counts[code]) code++;
      found[place][step] = numberOf(code, scale);
    });
  }
  return found;
}

// The places of the heads that are worst at a step, NaN or inf first.
function worstHeads(codes, marks, place, steps, heads, lowIsBad, count) {
  const badness = (head) => {
    const code = codes[head * steps + place];
    if (marks[head * steps + place] & NOT_FINITE) return 1000;
    if (code === NO_NUMBER) return -1000;
    if (code > LAST) return (code === INFINITE) !== lowIsBad ? 999 : -999;
    return lowIsBad ? LAST - code : code;
  };
  const found = [];
  for (let head = 0; head < heads; head++) {
    const bad = badness(head);
    if (bad > -1000 && (found.length < count || bad > found[found.length - 1].bad)) {
      let at = found.length;
      while (at > 0 && found[at - 1].bad < bad) at--;
      found.splice(at, 0, { head, bad });
      if (found.length > count) found.pop();
    }
  }
  return found.map((each) => each.head);
}

// How many heads bear each mark. bits: the marks of a place.
function countMarks(bits, heads) {
  const found = { nan: 0, sink: 0, dormant: 0, unjudged: 0 };
  for (let place = 0; place < heads; place++) {
    const mark = bits(place);
    found.nan += (mark & NOT_FINITE) > 0;
    found.dormant += (mark & DORMANT) > 0;
    found.sink += (mark & (SINK | DORMANT)) === SINK;
    found.unjudged += (mark & NOT_JUDGED) > 0;
  }
  return found;
}

// Round numbers of a logarithmic axis, at most about six.
function logTicks(low, high) {
  const found = [];
  const decades = Math.log10(high / low);
  const digits = decades < 1.5 ? [1, 2, 3, 5, 7] : decades < 4 ? [1, 3] : [1];
  const apart = Math.max(1, Math.ceil(decades / 6));
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    if (digits.length === 1 && power % apart) continue;
    for (const digit of digits) {
      const tick = Number(`${digit}e${power}`);
      if (tick >= low && tick <= high) found.push(tick);
    }
  }
  return found;
}

// The range of a chart: its values, the limits among them, and the next limit if it is near.
function chartRange(lists, limits, log) {
  let low = Infinity;
  let high = -Infinity;
  for (const list of lists) {
    for (const value of list) {
      if (value === null || !Number.isFinite(value)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  if (low > high) return log ? [1, 10] : [0, 1];
  const [ownLow, ownHigh] = [low, high];
  for (const { value } of limits) {
    const near = log ? value < ownHigh * 3 && value > ownLow / 3 : Math.abs(value - (ownLow + ownHigh) / 2) < 2 * (ownHigh - ownLow);
    if (near) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  if (log) return [low / 1.15, high * 1.15];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low >= 0 && low < room * 2 ? 0 : low - room, high + room];
}
