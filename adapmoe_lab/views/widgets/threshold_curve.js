// One value per layer as a curve: drag a dot, paint across layers, or step with the keys.
// Follows threshold_axis.js in the same module.

const GRAB_RADIUS = 14;
const HINT = "drag a dot, paint across layers, or use arrow keys";
const AXIS_TRAITS = ["vmin", "vmax", "step", "label", "unit_text", "baseline_text"];

function svgElement(tag, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}

function htmlElement(tag, className, parent) {
  const element = document.createElement(tag);
  element.className = className;
  parent.append(element);
  return element;
}

class Curve {
  constructor(model, el) {
    this.model = model;
    this.values = [...model.get("values")];
    this.active = 0; // the layer that Tab reaches
    this.shown = null; // the layer that is read out
    this.drag = null; // {paint, offset, layer, value, moved} while the pointer is down
    this.frame = null; // the next send of streamed values
    this.axis = new Axis(model);
    this.build(el);
    this.rebuildDots();
  }

  build(el) {
    el.classList.add("threshold-curve");
    el.dataset.lmSuppressShortcuts = "true";
    const header = htmlElement("header", "", el);
    this.title = htmlElement("span", "title", header);
    const skipped = htmlElement("span", "key key-skipped", header);
    skipped.append(document.createElement("i"), "skipped");
    this.baselineKey = htmlElement("span", "key key-baseline", header);
    this.readout = htmlElement("span", "readout", header);
    this.svg = svgElement("svg", { role: "group", height: HEIGHT }, el);
    this.axes = svgElement("g", { "aria-hidden": "true" }, this.svg);
    this.area = svgElement("path", { class: "skipped" }, this.svg);
    this.guide = svgElement("line", { class: "guide" }, this.svg);
    this.baseline = svgElement("polyline", { class: "baseline" }, this.svg);
    this.line = svgElement("polyline", { class: "curve" }, this.svg);
    this.dotLayer = svgElement("g", {}, this.svg);
    this.svg.addEventListener("pointerdown", (event) => this.press(event));
    this.svg.addEventListener("pointermove", (event) => this.move(event));
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
      this.svg.addEventListener(end, () => this.release());
    }
    this.svg.addEventListener("pointerleave", () => this.read(null));
  }

  get n() {
    return this.values.length;
  }

  // Drawing.

  resize(width) {
    if (width <= 0 || width === this.axis.width) return;
    this.axis.width = width;
    this.drawAll();
  }

  rebuildDots() {
    this.dotLayer.replaceChildren();
    this.active = clamp(this.active, 0, Math.max(0, this.n - 1));
    this.shown = null;
    this.dots = this.values.map((_, layer) => {
      const dot = svgElement("circle", { role: "slider", class: "dot" }, this.dotLayer);
      dot.setAttribute("aria-label", `layer ${layer}`);
      dot.setAttribute("aria-orientation", "vertical");
      dot.addEventListener("keydown", (event) => this.key(event, layer));
      dot.addEventListener("focus", () => this.activate(layer));
      dot.addEventListener("blur", () => this.read(null));
      return dot;
    });
    this.drawAll();
  }

  drawAll() {
    this.title.textContent = this.model.get("label");
    this.svg.setAttribute("aria-label", this.model.get("label"));
    this.svg.setAttribute("viewBox", `0 0 ${Math.max(1, this.axis.width)} ${HEIGHT}`);
    this.axis.n = this.n;
    this.drawAxes();
    const radius = clamp(this.axis.spacing * 0.42, 4, 6.5);
    this.dots.forEach((dot, layer) => {
      dot.setAttribute("cx", this.axis.x(layer));
      dot.setAttribute("r", radius);
      dot.setAttribute("tabindex", layer === this.active ? 0 : -1);
      dot.setAttribute("aria-valuemin", this.axis.vmin);
      dot.setAttribute("aria-valuemax", this.axis.vmax);
    });
    this.drawBaseline();
    this.draw();
  }

  drawAxes() {
    this.axes.replaceChildren();
    const right = this.axis.right;
    for (const value of [...this.axis.rows(), this.axis.vmax]) {
      const y = this.axis.y(value);
      const top = value === this.axis.vmax;
      svgElement("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y }, this.axes);
      const at = { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end", class: top ? "off" : "" };
      svgElement("text", at, this.axes).textContent = top ? "off" : +value.toFixed(4);
    }
    const every = this.axis.labelEvery();
    for (let layer = 0; layer < this.n; layer += every) {
      const at = { x: this.axis.x(layer), y: HEIGHT - MARGIN.bottom + 16, "text-anchor": "middle" };
      svgElement("text", at, this.axes).textContent = layer;
    }
    const middle = { x: (MARGIN.left + right) / 2, y: HEIGHT - 4, "text-anchor": "middle" };
    svgElement("text", middle, this.axes).textContent = "layer";
  }

  points(values) {
    return values.map((value, layer) => `${this.axis.x(layer)},${this.axis.y(value)}`).join(" ");
  }

  drawBaseline() {
    const values = this.model.get("baseline");
    const drawn = values.length > 0 && values.length === this.n;
    this.baseline.setAttribute("points", drawn ? this.points(values) : "");
    this.baselineKey.replaceChildren(
      document.createElement("i"),
      this.model.get("baseline_text"),
    );
    this.baselineKey.style.display = drawn ? "" : "none";
  }

  draw() {
    const points = this.points(this.values);
    this.line.setAttribute("points", points);
    const [first, last] = [this.axis.x(0), this.axis.x(this.n - 1)];
    const top = MARGIN.top;
    this.area.setAttribute("d", this.n ? `M${first},${top} L${points} L${last},${top} Z` : "");
    this.dots.forEach((dot, layer) => {
      const value = this.values[layer];
      dot.setAttribute("cy", this.axis.y(value));
      dot.classList.toggle("is-off", this.axis.isOff(value));
      dot.setAttribute("aria-valuenow", this.axis.onAxis(value));
      dot.setAttribute("aria-valuetext", this.axis.valueText(value));
    });
    this.drawReadout();
  }

  drawReadout() {
    const layer = this.shown;
    this.readout.classList.toggle("active", layer !== null);
    this.guide.style.display = layer === null ? "none" : "";
    if (layer === null) {
      this.readout.textContent = HINT;
      return;
    }
    const value = this.values[layer];
    const told = this.axis.isOff(value)
      ? "off, nothing skipped"
      : `${this.model.get("unit_text")} ${this.axis.valueText(value)}`;
    this.readout.textContent = `layer ${layer}: ${told}`;
    const x = this.axis.x(layer);
    const ends = { x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom };
    for (const [name, end] of Object.entries(ends)) this.guide.setAttribute(name, end);
  }

  /** Read out a layer; with null, the focused one if there is one. */
  read(layer) {
    const focused = this.dots.indexOf(this.dots.find((dot) => dot.matches(":focus")));
    this.shown = layer ?? (focused >= 0 ? focused : null);
    this.drawReadout();
  }

  activate(layer) {
    this.dots[this.active]?.setAttribute("tabindex", -1);
    this.active = layer;
    this.dots[layer].setAttribute("tabindex", 0);
    this.read(layer);
  }

  // Changing values.

  press(event) {
    if (event.button !== 0 || !this.n) return;
    const { x, y } = this.position(event);
    const layer = this.axis.layerAt(x);
    const distance = Math.hypot(x - this.axis.x(layer), y - this.axis.y(this.values[layer]));
    const paint = event.shiftKey || distance > GRAB_RADIUS;
    const offset = paint ? 0 : this.axis.y(this.values[layer]) - y;
    event.preventDefault();
    this.svg.setPointerCapture(event.pointerId);
    this.dots[layer].focus({ preventScroll: true });
    this.drag = { paint, offset, layer, value: this.values[layer], moved: false };
    if (paint) this.paintTo(layer, this.axis.valueAt(y));
  }

  move(event) {
    const { x, y } = this.position(event);
    if (!this.n) return;
    if (this.drag === null) this.read(this.axis.layerAt(x));
    else if (this.drag.paint) this.paintTo(this.axis.layerAt(x), this.axis.valueAt(y));
    else this.put(this.drag.layer, this.axis.valueAt(y + this.drag.offset));
  }

  /** Set every layer between the last painted one and `layer` along a straight line. */
  paintTo(layer, value) {
    const from = this.drag.moved ? this.drag : { layer, value };
    const [start, end] = [this.axis.onAxis(from.value), this.axis.onAxis(value)];
    const distance = layer - from.layer;
    for (let i = 0; i <= Math.abs(distance); i += 1) {
      const part = distance ? i / Math.abs(distance) : 1;
      const between = from.layer + Math.sign(distance) * i;
      this.values[between] = this.axis.rounded(start + part * (end - start));
    }
    Object.assign(this.drag, { layer, value, moved: true });
    this.dots[layer].focus({ preventScroll: true });
    this.changed(layer);
  }

  put(layer, value) {
    this.values[layer] = value;
    this.drag.moved = true;
    this.changed(layer);
  }

  release() {
    if (this.drag === null) return;
    const { moved } = this.drag;
    this.drag = null;
    if (moved) this.commit();
  }

  key(event, layer) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const pace = this.model.get("step") * (event.shiftKey ? 10 : 1);
    const now = this.axis.onAxis(this.values[layer]);
    const target = { ArrowUp: now + pace, ArrowDown: now - pace }[event.key];
    const neighbour = { ArrowRight: layer + 1, ArrowLeft: layer - 1 }[event.key];
    if (target === undefined && neighbour === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    if (neighbour !== undefined) {
      this.dots[clamp(neighbour, 0, this.n - 1)].focus();
      return;
    }
    this.values[layer] = this.axis.rounded(target);
    this.shown = layer;
    this.draw();
    this.commit();
  }

  position(event) {
    const box = this.svg.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  changed(layer) {
    this.shown = layer;
    this.draw();
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.model.set("values", [...this.values]);
      this.model.save_changes();
    });
  }

  commit() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    this.model.set("values", [...this.values]);
    this.model.set("committed", [...this.values]);
    this.model.save_changes();
  }

  /** Take over values set elsewhere; a drag goes on unless the number of layers changed. */
  receive() {
    const values = this.model.get("values");
    if (values.length !== this.n) {
      this.drag = null;
      this.values = [...values];
      this.rebuildDots();
    } else if (this.drag === null) {
      this.values = [...values];
      this.draw();
    }
  }
}

function render({ model, el }) {
  const curve = new Curve(model, el);
  const receive = () => curve.receive();
  const drawAll = () => curve.drawAll();
  const drawBaseline = () => curve.drawBaseline();
  model.on("change:values", receive);
  model.on("change:baseline", drawBaseline);
  for (const trait of AXIS_TRAITS) model.on(`change:${trait}`, drawAll);
  const observer = new ResizeObserver(([entry]) => curve.resize(entry.contentRect.width));
  observer.observe(curve.svg);
  return () => {
    observer.disconnect();
    model.off("change:values", receive);
    model.off("change:baseline", drawBaseline);
    for (const trait of AXIS_TRAITS) model.off(`change:${trait}`, drawAll);
  };
}

export default { render };
