// Where layers and values lie on the page, and back. Leads threshold_curve.js in the same module.

const HEIGHT = 236;
const MARGIN = { left: 46, right: 16, top: 12, bottom: 36 };
const INNER_HEIGHT = HEIGHT - MARGIN.top - MARGIN.bottom;
const LABEL_WIDTH = 26;
const LABEL_HEIGHT = 14;

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** Values at round distances from `low` up to `high`, about `count` of them. */
function roundValues(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const distance = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const first = Math.ceil(low / distance - 1e-9);
  const last = Math.floor(high / distance + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * distance);
}

/** Layers across, values up; the top of the values is off. Lengths in pixels. */
class Axis {
  constructor(model) {
    this.model = model;
    this.width = 0;
    this.n = 0;
  }

  get vmin() {
    return this.model.get("vmin");
  }

  get vmax() {
    return this.model.get("vmax");
  }

  get right() {
    return this.width - MARGIN.right;
  }

  get spacing() {
    return (this.right - MARGIN.left) / Math.max(1, this.n);
  }

  x(layer) {
    return MARGIN.left + (layer + 0.5) * this.spacing;
  }

  y(value) {
    const part = (this.onAxis(value) - this.vmin) / (this.vmax - this.vmin);
    return HEIGHT - MARGIN.bottom - part * INNER_HEIGHT;
  }

  layerAt(x) {
    return clamp(Math.floor((x - MARGIN.left) / this.spacing), 0, this.n - 1);
  }

  valueAt(y) {
    const part = (HEIGHT - MARGIN.bottom - y) / INNER_HEIGHT;
    return this.rounded(this.vmin + part * (this.vmax - this.vmin));
  }

  isOff(value) {
    return value > 1 || value >= this.vmax;
  }

  onAxis(value) {
    return this.isOff(value) ? this.vmax : Math.max(this.vmin, value);
  }

  /** The nearest value that the curve gives. */
  rounded(value) {
    const step = this.model.get("step");
    const steps = Math.round((value - this.vmin) / step);
    const snapped = clamp(+(this.vmin + steps * step).toFixed(9), this.vmin, this.vmax);
    return this.isOff(snapped) ? this.model.get("_off") : snapped;
  }

  valueText(value) {
    if (this.isOff(value)) return "off";
    const digits = clamp(Math.ceil(-Math.log10(this.model.get("step"))), 0, 4);
    return value.toFixed(digits);
  }

  /** Values that get a grid line and a label, off aside. */
  rows() {
    const values = roundValues(this.vmin, this.vmax, 5);
    return values.filter((value) => this.y(value) - MARGIN.top > LABEL_HEIGHT);
  }

  /** Every how many layers there is room for a label. */
  labelEvery() {
    const room = (this.right - MARGIN.left) / LABEL_WIDTH;
    return [1, 2, 4, 8, 16].find((every) => this.n / every <= room) ?? 32;
  }
}

