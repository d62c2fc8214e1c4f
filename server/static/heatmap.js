// The heat map of density: a row per layer, time from left to right, and beside it each layer's mean of the window.

const TOPS = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1];
// In CSS pixels. Many layers make a taller plot: a row has at least 4.
const PLOT_HEIGHT = 336;
const GUTTER = 30;
const AXIS = 20;
const GAP = 14;
const PROFILE_SHARE = 0.2;

const dark = matchMedia("(prefers-color-scheme: dark)");

/**
 * Colour of a share in [0, 1] of the scale. Equal steps of density look equal: along this ramp they are equal in OKLab to within
 * 1 %. It starts near the page's own lightness, so that a sparse layer recedes and a dense one stands out, in both themes.
 */
export function colour(share) {
  const t = dark.matches ? share : 1 - share;
  return `oklch(${0.26 + 0.68 * t} ${0.05 + 0.05 * Math.sin(Math.PI * t)} ${285 - 125 * t})`;
}

/** The top of the scale: the smallest round share that no density in the window exceeds. */
const topOf = (intervals) => {
  const most = Math.max(0.001, ...intervals.flatMap(({ layers }) => layers.map(({ density }) => density ?? 0)));
  return TOPS.find((top) => top >= most) ?? 1;
};

export class HeatMap {
  /** `seconds`: the time shown. `onInspect(cell)` is told the cell under pointer or cursor, or null. */
  constructor(canvas, ramp, seconds, onInspect) {
    this.canvas = canvas;
    this.ramp = ramp;
    this.seconds = seconds;
    this.onInspect = onInspect;
    this.intervals = [];
    this.cursor = null;
    new ResizeObserver(() => this.draw()).observe(canvas);
    dark.addEventListener("change", () => this.draw());
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => this.#inspect(null));
    canvas.addEventListener("blur", () => this.#inspect(null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Show intervals, oldest first; `means` is the interval over all of them. */
  show(intervals, means) {
    this.intervals = intervals;
    this.means = means;
    this.top = topOf(intervals);
    this.now = intervals.at(-1).to;
    this.canvas.style.height = `${this.rowHeight * this.layerCount + AXIS}px`;
    this.draw();
    if (this.cursor) this.#inspect(this.cursor);
  }

  get layerCount() {
    return this.means?.layers.length ?? 0;
  }

  get rowHeight() {
    return Math.max(4, Math.min(42, Math.floor(PLOT_HEIGHT / Math.max(1, this.layerCount))));
  }

  get #plotWidth() {
    const room = this.canvas.clientWidth - GUTTER - GAP;
    return room - Math.max(64, room * PROFILE_SHARE);
  }

  #x(time) {
    return GUTTER + this.#plotWidth * Math.max(0, 1 - (this.now - time) / this.seconds);
  }

  draw() {
    const { canvas } = this;
    const scale = devicePixelRatio;
    canvas.width = canvas.clientWidth * scale;
    canvas.height = canvas.clientHeight * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    this.style = getComputedStyle(canvas);
    if (this.layerCount > 0) {
      this.#drawCells(context, scale);
      this.#drawAxes(context);
      this.#drawProfile(context);
    }
    this.#drawRamp();
  }

  #drawCells(context, scale) {
    const height = this.rowHeight;
    const width = this.#plotWidth;
    context.fillStyle = this.style.getPropertyValue("--rest");
    context.fillRect(GUTTER, 0, width, height * this.layerCount);
    // Edges on whole device pixels, or neighbouring cells would show a seam.
    const snap = (value) => Math.round(value * scale) / scale;
    const gap = height >= 10 ? 1 : 0;
    for (const { from, to, layers } of this.intervals) {
      const left = snap(this.#x(from));
      const right = snap(this.#x(to));
      layers.forEach(({ density }, index) => {
        if (density === null) return;
        context.fillStyle = colour(Math.min(1, density / this.top));
        context.fillRect(left, index * height, Math.max(0.5, right - left - (right - left > 4 ? 1 : 0)), height - gap);
      });
    }
    if (this.cursor) {
      const { interval, index } = this.cursor;
      context.strokeStyle = this.style.getPropertyValue("--ink");
      context.lineWidth = 2;
      const left = this.#x(interval.from);
      context.strokeRect(left, index * height, Math.max(3, this.#x(interval.to) - left - 1), height - gap);
    }
  }

  #drawAxes(context) {
    const height = this.rowHeight;
    const bottom = height * this.layerCount + AXIS - 5;
    context.fillStyle = this.style.getPropertyValue("--muted");
    context.font = `11px ${this.style.fontFamily}`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    const every = Math.ceil(this.layerCount / Math.max(1, Math.floor((height * this.layerCount) / 22)));
    this.means.layers.forEach(({ name }, index) => {
      if (index % every === 0) context.fillText(name, GUTTER - 8, index * height + height / 2);
    });
    context.textBaseline = "alphabetic";
    context.textAlign = "left";
    context.fillText(`${this.seconds} s ago`, GUTTER, bottom);
    context.textAlign = "right";
    context.fillText("now", GUTTER + this.#plotWidth, bottom);
    context.textAlign = "left";
    context.fillText("mean", GUTTER + this.#plotWidth + GAP, bottom);
  }

  /** Bars: the mean over the window, in the colour of that density; a tick: the checkpoint's own figure. */
  #drawProfile(context) {
    const height = this.rowHeight;
    const left = GUTTER + this.#plotWidth + GAP;
    const text = height >= 14 ? 44 : 0;
    const width = this.canvas.clientWidth - left - text;
    const length = (density) => width * Math.min(1, density / this.top);
    this.means.layers.forEach(({ density, checkpoint }, index) => {
      const top = index * height;
      const thickness = Math.max(2, height - (height >= 10 ? 1 : 0));
      context.fillStyle = this.style.getPropertyValue("--rest");
      context.fillRect(left, top, width, thickness);
      if (density !== null) {
        context.fillStyle = colour(Math.min(1, density / this.top));
        context.fillRect(left, top, length(density), thickness);
      }
      if (checkpoint !== undefined && checkpoint <= this.top) {
        context.fillStyle = this.style.getPropertyValue("--ink");
        context.fillRect(left + length(checkpoint) - 1, top, 2, thickness);
      }
      if (text && density !== null) {
        context.textAlign = "right";
        context.textBaseline = "middle";
        context.fillText(`${(100 * density).toFixed(1)} %`, this.canvas.clientWidth, top + thickness / 2);
        context.textBaseline = "alphabetic";
      }
    });
  }

  #drawRamp() {
    const context = this.ramp.getContext("2d");
    for (let x = 0; x < this.ramp.width; x++) {
      context.fillStyle = colour(x / (this.ramp.width - 1));
      context.fillRect(x, 0, 1, this.ramp.height);
    }
  }

  #point(event) {
    const index = Math.floor(event.offsetY / this.rowHeight);
    const interval = this.intervals.find(({ from, to }) => this.#x(from) <= event.offsetX && event.offsetX < this.#x(to));
    this.#inspect(interval && index < this.layerCount ? { interval, index } : null);
  }

  #key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || this.intervals.length === 0) return;
    event.preventDefault();
    const at = this.intervals.indexOf(this.cursor?.interval);
    const clamp = (value, size) => Math.max(0, Math.min(size - 1, value));
    const column = at < 0 ? this.intervals.length - 1 : clamp(at + step[0], this.intervals.length);
    const index = clamp((this.cursor?.index ?? 0) + (at < 0 ? 0 : step[1]), this.layerCount);
    this.#inspect({ interval: this.intervals[column], index });
  }

  #inspect(cursor) {
    this.cursor = cursor;
    this.draw();
    this.onInspect(cursor && { layer: cursor.interval.layers[cursor.index], ago: this.now - cursor.interval.to });
  }
}
