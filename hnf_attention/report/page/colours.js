// Colours of codes. Viridis and a blue-to-orange scale: both are told apart by colour-blind readers, and in grey.

const VIRIDIS = [
  [68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142],
  [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37],
];
const DIVERGING = {
  light: [[12, 60, 120], [67, 128, 190], [160, 197, 227], [244, 244, 242], [246, 190, 130], [219, 120, 40], [140, 62, 8]],
  dark: [[130, 190, 255], [74, 133, 200], [40, 76, 118], [42, 42, 48], [118, 68, 28], [205, 112, 38], [255, 186, 110]],
};
const NAN_COLOUR = [227, 26, 121];

function mixed(stops, part) {
  const at = Math.min(Math.max(part, 0), 1) * (stops.length - 1);
  const place = Math.min(Math.floor(at), stops.length - 2);
  const share = at - place;
  return stops[place].map((value, channel) => Math.round(value + (stops[place + 1][channel] - value) * share));
}

const packed = ([red, green, blue]) => (255 << 24 | blue << 16 | green << 8 | red) >>> 0;

// 256 colours for codes, as ImageData holds them; the bad end is bright.
function palette(lowIsBad, empty) {
  const found = new Uint32Array(256);
  for (let code = 0; code <= LAST; code++) {
    found[code] = packed(mixed(VIRIDIS, lowIsBad ? 1 - code / LAST : code / LAST));
  }
  found[INFINITE] = found[MINUS_INFINITE] = packed(NAN_COLOUR);
  found[NO_NUMBER] = packed(empty);
  return found;
}

// 512 colours for differences of codes from -LAST to LAST, at the place LAST + difference; the last is "no number".
function differencePalette(dark, empty) {
  const found = new Uint32Array(512);
  const stops = dark ? DIVERGING.dark : DIVERGING.light;
  // Differences of a fifth of the scale are far along already.
  const bent = (part) => Math.sign(part) * Math.sqrt(Math.abs(part));
  for (let place = 0; place <= 2 * LAST; place++) {
    found[place] = packed(mixed(stops, 0.5 + 0.5 * bent((place - LAST) / LAST)));
  }
  found[511] = packed(empty);
  return found;
}
