// The map of heads: a row for each layer, a column for each head.

const LARGEST_CELL = 44;
const MARK_CELL = 7; // pixels of a cell from which sinks and dormant heads are marked unless the reader says otherwise

// Sizes in CSS pixels. gutter: of the layers' names.
function gridOf(width, rows, columns, gutter) {
  const cell = Math.max(1, Math.min(LARGEST_CELL, (width - gutter) / Math.max(columns, 1)));
  const most = Math.max(3, 680 / Math.max(rows, 1));
  const height = Math.max(3, Math.min(Math.max(cell, rows <= 40 ? 14 : 3), most, LARGEST_CELL));
  return { cell, height, gutter, top: 16, width: gutter + cell * columns, whole: 22 + height * rows };
}

// The row and column at a point, null outside of the heads.
function cellAt(grid, x, y, layers) {
  const row = Math.floor((y - grid.top) / grid.height);
  const column = Math.floor((x - grid.gutter) / grid.cell);
  if (row < 0 || row >= layers.length || column < 0 || column >= layers[row].heads) return null;
  return { layer: row, head: column };
}

// Where an arrow key leads.
function moved(key, { layer, head }, layers) {
  const clamp = (value, size) => Math.min(Math.max(value, 0), size - 1);
  if (key === "ArrowUp") layer = clamp(layer - 1, layers.length);
  else if (key === "ArrowDown") layer = clamp(layer + 1, layers.length);
  else if (key === "ArrowLeft") head -= 1;
  else if (key === "ArrowRight") head += 1;
  else if (key === "Home") head = 0;
  else if (key === "End") head = Infinity;
  else return null;
  return { layer, head: clamp(head, layers[layer].heads) };
}

// Draws one step. colour: (place) => packed colour. bits: (place) => marks. selected: layer, head, and whether marks are
// drawn, null to decide by the size of a cell. look: colours of text and marks, from the style sheet.
function drawMap(canvas, layers, colour, bits, issues, selected, look) {
  const columns = Math.max(...layers.map((layer) => layer.heads), 1);
  const context = canvas.getContext("2d");
  context.font = look.font;
  const available = canvas.parentElement.clientWidth;
  const { names, gutter } = labelsOf(context, layers, available);
  const grid = gridOf(available, layers.length, columns, gutter);
  const ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(grid.width * ratio) || canvas.height !== Math.round(grid.whole * ratio)) {
    canvas.width = Math.round(grid.width * ratio);
    canvas.height = Math.round(grid.whole * ratio);
    canvas.style.width = `${grid.width}px`;
    canvas.style.height = `${grid.whole}px`;
  }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, grid.width, grid.whole);
  drawCells(context, layers, columns, colour, bits, grid);
  drawLabels(context, names, columns, grid, look);
  grid.marked = selected.marked ?? Math.min(grid.cell, grid.height) >= MARK_CELL;
  drawMarks(context, layers, bits, issues, grid, look);
  outline(context, grid, selected.layer, selected.head, look.strong, 2.5);
  outline(context, grid, selected.layer, selected.head, look.surface, 1);
  return grid;
}

function drawCells(context, layers, columns, colour, bits, grid) {
  const image = new ImageData(columns, layers.length);
  const pixels = new Uint32Array(image.data.buffer);
  const nan = packed(NAN_COLOUR);
  layers.forEach(({ start, heads }, row) => {
    for (let head = 0; head < heads; head++) {
      pixels[row * columns + head] = bits(start + head) & NOT_FINITE ? nan : colour(start + head);
    }
  });
  const small = new OffscreenCanvas(columns, layers.length);
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, grid.gutter, grid.top, grid.cell * columns, grid.height * layers.length);
}

function drawLabels(context, names, columns, grid, look) {
  context.font = look.font;
  context.fillStyle = look.text;
  context.textBaseline = "middle";
  context.textAlign = "right";
  const every = Math.ceil(13 / grid.height);
  names.forEach((name, row) => {
    if (row % every) return;
    context.fillText(name, grid.gutter - 5, grid.top + (row + 0.5) * grid.height);
  });
  context.textAlign = "center";
  const apart = [1, 2, 4, 8, 16, 32, 64].find((count) => count * grid.cell >= 22) || 128;
  for (let head = 0; head < columns; head += apart) {
    context.fillText(String(head), grid.gutter + (head + 0.5) * grid.cell, 8);
  }
}

const laidOut = new WeakMap(); // layers to their names as they were fitted last

// The layers' names, shortened where they need more than three tenths of the width: their ends tell layers apart.
function labelsOf(context, layers, available) {
  const key = `${available} ${context.font}`;
  const before = laidOut.get(layers);
  if (before && before.key === key) return before;
  const width = (text) => context.measureText(text).width;
  const gutter = Math.min(Math.max(0, ...layers.map(({ label }) => width(label))) + 10, available * 0.3);
  const names = layers.map(({ label }) => {
    let text = label;
    while (text.length > 3 && width(text) > gutter - 6) text = `…${text.slice(2)}`;
    return text;
  });
  const found = { key, gutter, names };
  laidOut.set(layers, found);
  return found;
}

// Marks of one kind are one path: thousands of heads may have a sink.
function drawMarks(context, layers, bits, issues, grid, look) {
  const size = Math.min(grid.cell, grid.height);
  const found = { crosses: [], bars: [], dots: [], slashes: [] };
  layers.forEach(({ start, heads }, row) => {
    for (let head = 0; head < heads; head++) {
      const mark = bits(start + head);
      if (!mark) continue;
      const corner = [grid.gutter + head * grid.cell, grid.top + row * grid.height];
      if (mark & NOT_FINITE) found.crosses.push(corner);
      else if (mark & DORMANT) found.bars.push(corner);
      else if (mark & SINK) found.dots.push(corner);
      if (mark & NOT_JUDGED) found.slashes.push(corner);
    }
  });
  if (grid.marked) {
    dots(context, found.dots, grid, size);
    bars(context, found.bars, grid, size);
  }
  const { cell, height } = grid;
  const falling = ([x, y]) => [x + cell * 0.25, y + height * 0.25, x + cell * 0.75, y + height * 0.75];
  const rising = ([x, y]) => [x + cell * 0.25, y + height * 0.75, x + cell * 0.75, y + height * 0.25];
  if (size >= 5) lines(context, "#ffffff", 1.5, found.crosses.flatMap((corner) => [falling(corner), rising(corner)]));
  if (size >= 8) lines(context, look.text, 1, found.slashes.map(rising));
  for (const [place, severity] of issues) {
    const { layer, head } = headAt(layers, place);
    outline(context, grid, layer, head, look[severity] || look.strong, size >= 16 ? 2 : 1);
  }
}

function dots(context, corners, grid, size) {
  const radius = Math.max(1, size * 0.16);
  context.beginPath();
  for (const [x, y] of corners) {
    const [middleX, middleY] = [x + grid.cell / 2, y + grid.height / 2];
    if (size < 9) context.rect(Math.round(middleX - radius), Math.round(middleY - radius), 2 * radius, 2 * radius);
    else {
      context.moveTo(middleX + radius, middleY);
      context.arc(middleX, middleY, radius, 0, 2 * Math.PI);
    }
  }
  context.fillStyle = "#ffffff";
  context.fill();
  if (size >= 9) {
    context.lineWidth = 1;
    context.strokeStyle = "#000000";
    context.stroke();
  }
}

function bars(context, corners, grid, size) {
  const thick = Math.max(2, size * 0.22);
  for (const [colour, inset] of [["#000000", 0], ["#ffffff", 1]]) {
    context.fillStyle = colour;
    context.beginPath();
    for (const [x, y] of corners) {
      context.rect(x + grid.cell * 0.15 + inset, y + (grid.height - thick) / 2 + inset, grid.cell * 0.7 - 2 * inset, Math.max(thick - 2 * inset, 0.5));
    }
    context.fill();
  }
}

function lines(context, colour, width, ends) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.beginPath();
  for (const [fromX, fromY, toX, toY] of ends) {
    context.moveTo(fromX, fromY);
    context.lineTo(toX, toY);
  }
  context.stroke();
}

function outline(context, grid, layer, head, colour, width) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  const half = width / 2;
  context.strokeRect(
    grid.gutter + head * grid.cell + half,
    grid.top + layer * grid.height + half,
    Math.max(grid.cell - width, 0.5),
    Math.max(grid.height - width, 0.5),
  );
}
